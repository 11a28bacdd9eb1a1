"""Fuse score files to ranked lists and reports; no model is loaded.

`run` reads input score files (`members`), adds them in `fuse` (with `scaling`, `reciprocal_rank`),
and runs the stages of `chain`: a reranker's scores (`rerank_prior`), then decodings (`decode`,
`matching`, `arbitration`, `component_assignment`). `api` is the same as a function. `search`
and `trials` choose weights on validation data. `protocol` supplies files and metrics to `run`, and
checks answer files. `published` compares with the paper. Imports `pab`, never `lhp` or `uit`.
"""
