"""Library models of the ensemble behind one interface: CLIP, BLIP-2, vision-language models.

`clip` and `blip2` load the models as encoders of `pab.scoring` and fine-tune them; `scoring` holds
their common settings. `captions` and `pooling` are LAVIS's caption processor and similarity.
`tuning` adds frozen towers and LoRA to the contrastive recipe. `layer_numbers` supports layer-wise
learning-rate decay. `train_clip_tokenizer` trains a small tokenizer. `st` scores with
vision-language models, and fine-tunes them. The package imports `pab.scoring`, `pab.training`,
`pab.scores`, `pab.formats`, `pab.metrics`, `pab.data` and `pab.core`.
"""
