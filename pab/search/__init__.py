"""Photo search: rank the photographs of a folder by how well they match a description.

`python -m pab.search` checks its queries, opens one of the `members` (LHP, UIT, CLIP, BLIP-2, or
another package's), and ranks the photographs in `engine`. `page` writes the HTML page and `results`
the JSON file. Imports `pab.scoring`, `pab.encoders.captions`, `pab.data` and `pab.core`; members
are loaded by name at run time.
"""
