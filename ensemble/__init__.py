"""Fuse score files into ranked lists and reports; only `mine --encoder` loads a model.

`run` reads input score files (`members`), adds them in `fuse` (with `scaling`, `reciprocal_rank`),
and runs the stages of `chain`: reranking (`rerank_prior`), then decodings, most of which use all
queries jointly (`decode`, `matching`, `arbitration`, `component_assignment`). `config` defines the
settings. `api` fuses from Python. `search` chooses weights (`trials`) and the settings
of later stages (`stage_search`) on validation data. `mine` finds training questions for a reranker
(near-duplicates by `image_vectors`). `refusals` rejects test sets in `search` and `mine`.
`protocol` supplies files and metrics to `run`, and checks answer files. `published` compares
results with the paper's. `report` writes HTML. This package imports `pab`, never `lhp` or `uit`.
"""
