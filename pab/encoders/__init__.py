"""Library models of the ensemble behind one interface: CLIP (OpenCLIP), BLIP-2 (transformers)."""
