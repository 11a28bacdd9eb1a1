"""CLIP and all other OpenCLIP models.

`model` joins an architecture (`names`), its `weights` (tag, file or folder) and its tokenizer.
`encoder` and `infer` define the member `clip`, and `finetune` trains it. `identity` rejects weights
of another model. `positions` resizes position embeddings. `blocks` holds faster transformer blocks.
"""
