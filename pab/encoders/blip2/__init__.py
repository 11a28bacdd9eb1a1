"""BLIP-2 as LAVIS computes it, without LAVIS."""
