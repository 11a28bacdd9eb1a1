"""Library models of the ensemble behind one interface: CLIP (OpenCLIP), BLIP-2 (transformers).

`clip` and `blip2` hold the models with their weights, tokenizers and preprocessing, and make them
encoders of `pab.scoring`. `scoring` holds what both share. `tuning` adds frozen towers and LoRA to
the contrastive recipe of `pab.training`. Imports `pab.scoring`, `pab.training` and what is below
them.
"""
