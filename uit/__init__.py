"""UIT, the unified image-text model: Swin and BERT with four losses, and candidate re-ranking.

`run` trains (`train`, `config`, `schedules`) or evaluates. `model` joins `swin` and `bert`; `data`
(with `augment`, `eda`, `masking`) feeds `objective` and `losses`; `weights` loads checkpoints.
`infer` writes a score file: `encode` computes vectors and image tokens (in a temporary file), and
`rerank` scores each query's candidates (published: the best of LHP's score file). `outputs`
names the default files. `make_vocabulary` writes a small vocabulary. Imports `pab`, never `lhp` or
`ensemble`.
"""
