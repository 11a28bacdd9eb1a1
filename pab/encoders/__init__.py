"""The ensemble's library models behind one interface: CLIP by OpenCLIP, BLIP-2 by transformers."""
