"""Fuse score files into ranked lists and reports; no model is loaded.

`run` reads input score files (`members`), adds them in `fuse` (with `scaling`, `reciprocal_rank`),
and runs the stages of `chain`: a reranker's scores (`rerank_prior`), then decodings, most of which
use all queries jointly (`decode`, `matching`, `arbitration`, `component_assignment`). `config`
defines the settings. `api` fuses from Python. `search` and `trials` choose weights on validation
data. `protocol` supplies files and metrics to `run`, and checks answer files. `published` compares
results with the paper's. `report` writes HTML. Imports `pab`, never `lhp` or `uit`.
"""
