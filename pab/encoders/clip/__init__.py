"""CLIP and all other OpenCLIP models."""
