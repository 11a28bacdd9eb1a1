"""Vision-language models as members, read with sentence-transformers: embedders and rerankers.

The optional extra ``vlm`` installs the library. Nothing here imports it before a command needs it.
"""
