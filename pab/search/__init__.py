"""Photo search: index images and videos, and find them by a description or an example.

- `index` defines the format of an index on disk and reads it; `writing` writes its files.
- `build` updates an index from `sources` (folders, tables, `archives`, `video`). `previous` locks
  the index and marks the rows to keep.
- `ray_engine` runs `worker` on other processes or machines, to encode the parts of a run (`jobs`).
- `query` searches an index with `exact` or `ann`; `rerank` scores the first images again.
- `engine` searches a folder once, with a temporary index.
- `export` writes an index for vector databases; `server` serves an index.
- The commands are `index_command`, `query_command`, `export_command`, `server.command` and `once`.
  They share `flags`, `texts` (checks of queries) and `libraries` (imports of optional packages).
- `members` opens the models by name; `results` and `page` write the results.

Imports `pab.scoring`, `pab.encoders`, `pab.formats`, `pab.data` and `pab.core`.
"""
