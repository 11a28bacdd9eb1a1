"""Photo search: index images and videos, and find them by a description or an example.

`index` is the format of an index on disk, `writing` writes it, and `build` updates it from
`sources` (folders, tables, `archives`, `video`); `previous` locks the index and holds its state
before the update.
`ray_engine` lets `worker` encode the parts of a run (`jobs`) on other processes or machines.
`query` searches an index with `exact` or `ann`, and `rerank` gives the first images a second score.
`engine` searches a folder once, through a temporary index. `export` writes an index for vector
databases, and `server` serves an index. `python -m pab.search` selects a command: `index_command`,
`query_command`, `export_command`, `server.command` or `once`. They share `flags`, `texts` (checks
of queries) and `libraries` (imports of optional packages). `members` opens the models by name.
`results` and `page` write the results. Imports `pab.scoring`, `pab.encoders`, `pab.formats`,
`pab.data` and `pab.core`.
"""
