"""BLIP-2 retrieval with LAVIS's results, without LAVIS.

`model` is the published `pretrain_vitL`: OpenCLIP's vision transformer and the Q-Former of
transformers. `vit_g` has the same interface for the ViT-g model. `encoder` and `infer` make both
the member `blip2`. `lavis` runs LAVIS itself, in an environment of its own, as the reference.
"""
