"""UIT, the unified image-text model: Swin and BERT with four losses, and candidate re-ranking.

`run` trains (`train`, `config`, `schedules`) or evaluates. `model` combines `swin` and `bert`.
`data` (with `augment`, `eda`, `masking`) prepares batches, and `objective` computes their `losses`.
`weights` loads checkpoints. `infer` writes a score file: `encode` computes vectors and image tokens
(in a temporary file), and `rerank` scores each query's candidates (published: the best images in
LHP's score file). `outputs` names the default files. `make_vocabulary` writes a small vocabulary.
The package imports `pab`, never `lhp` or `ensemble`.
"""
