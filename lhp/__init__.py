"""LHP: BEiT-3, fine-tuned for retrieval with the local-global hybrid perspective."""
