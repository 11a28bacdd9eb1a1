"""BLIP-2 for retrieval: a port of LAVIS's model that gives the same vectors.

`model` is the published `pretrain_vitL`: OpenCLIP's vision transformer (with
`pab.encoders.clip.blocks`) and the Q-Former of transformers. `vit_g` wraps the ViT-g model with the
same interface. `encoder` and `infer` define the member `blip2`, and `finetune` trains `model`.
`lavis` runs LAVIS in a separate environment, to verify the port.
"""
