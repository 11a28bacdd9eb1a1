"""Photo search: rank the photographs of a folder by how well they match a description.

`python -m pab.search` checks the queries and loads a member by name (LHP, UIT, CLIP, BLIP-2, or one
of another package). `members` parses the member's flags. `engine` encodes and ranks the
photographs, `page` writes the HTML page. `results` builds the content of the JSON file, and writes
the list of unreadable images. Imports `pab.scoring`, `pab.encoders.captions`, `pab.ranking`,
`pab.data` and `pab.core`.
"""
