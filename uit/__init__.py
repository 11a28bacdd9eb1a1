"""UIT, the unified image-text model: Swin and BERT with four losses, and candidate re-ranking.

`model` joins `swin` and `bert` with the heads of the losses: ITC, ITM, MLM and MIM (`losses`,
`masking`, `objective`). `run` starts `train` on samples of `data` (with `augment` and `eda`), from
the weights of `weights`. `infer` scores a gallery: `encode` gives the vectors, and `rerank` lets
the cross encoder order each query's candidates. Imports `pab`, never `lhp` or `ensemble`.
"""
