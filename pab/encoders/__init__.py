"""Library models of the ensemble behind one interface: CLIP, BLIP-2, vision-language models.

`clip` and `blip2` load the models as encoders of `pab.scoring` and fine-tune them; `scoring` holds
their common settings. `captions` and `pooling` are BLIP-2's caption processor and similarity.
`tuning` freezes towers and adds LoRA in fine-tuning. `layer_numbers` supports layer-wise
learning-rate decay. `train_clip_tokenizer` trains a small tokenizer. `st` scores with
vision-language models, and fine-tunes them.
"""
