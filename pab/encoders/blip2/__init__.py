"""BLIP-2 with LAVIS's results, without LAVIS."""
