"""CLIP and all other OpenCLIP models.

`model` joins an architecture (`names`), its `weights` (tag, file or folder) and its tokenizer.
`encoder` and `infer` make it the member `clip`. `identity` rejects weights of another model.
`positions` resizes position tables, and `blocks` holds faster transformer blocks with equal
vectors.
"""
