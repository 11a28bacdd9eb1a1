"""Scoring code shared by all members: encoder interface, scoring job, feature cache."""
