"""Vision-language models as members, read with sentence-transformers: embedders and rerankers.

The library is the optional extra ``vlm``. Nothing here imports it before a command needs it.
"""
