"""Fusion of score files into ranked lists, and reports. No model is loaded here.

`run` is the command: it reads `members`, adds their scores in `fuse` (with `scaling` or
`reciprocal_rank`), and applies a reranker and the decodings (`chain`, `decode`, `matching`,
`arbitration`). `library` is the same fusion as a function. `search` and `trials` choose weights on
validation data. `protocol` checks an answer file, `published` compares with the paper, `report`
writes the HTML page. Imports `pab`, never `lhp` or `uit`.
"""
