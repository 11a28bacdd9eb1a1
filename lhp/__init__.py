"""LHP: BEiT-3, fine-tuned for retrieval with the local-global hybrid perspective.

`beit3` is the model, `tokenizer` converts captions to token ids, and `views` chooses the local or
the global view of a training image. `train` fine-tunes the model with the settings in `config`.
`infer` encodes a gallery and captions with `encode`, and writes a score file and a ranked list.
`train_tokenizer` trains a small tokenizer on your own captions. The package imports `pab`, never
`uit` or `ensemble`.
"""
