"""LHP: BEiT-3, fine-tuned for retrieval with the local-global hybrid perspective.

`beit3` is the model, `tokenizer` its text input, `views` the choice of the image view in a training
step. `train` fine-tunes it, and `infer` scores a gallery with the vectors of `encode`; both take
the settings in `config`. `train_tokenizer` makes a small vocabulary for data of one's own. Imports
`pab`, never `uit` or `ensemble`.
"""
