"""BLIP-2 for retrieval: a port of LAVIS's model that outputs the same vectors.

`model` is the published `pretrain_vitL`: OpenCLIP's vision transformer (with
`pab.encoders.clip.blocks`) and the Q-Former of transformers. `vit_g` gives the ViT-g model of
transformers the same interface. `encoder` and `infer` define the member `blip2`, and `finetune`
trains `model`. `lavis` calls LAVIS itself, if it is installed, to verify the port.
"""
