"""Photo search: index images and videos, and find them by a description or an example.

`index` is the format of an index on disk, `writing` writes it, and `build` updates it from
`sources` (folders, tables, `archives`, `video`); `previous` is the state before an update. `query`
searches an index with `exact`, and `rerank` gives the first images a second score. `engine`
searches a folder once, through a temporary index. `python -m pab.search` selects a command:
`index_command`, `query_command` or `once`. `members` opens the models by name. `results` and `page`
write what was found. Imports `pab.scoring`, `pab.encoders.captions`, `pab.formats`,
`pab.data` and `pab.core`.
"""
