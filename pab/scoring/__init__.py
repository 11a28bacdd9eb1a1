"""Scoring that all members share: the encoder interface, the job around it, kept vectors."""
