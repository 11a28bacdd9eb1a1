"""CLIP and every other model of OpenCLIP."""
