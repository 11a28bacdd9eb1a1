"""Offline HTML report on rankings: metrics, curves, failures with pictures, fusion steps."""
