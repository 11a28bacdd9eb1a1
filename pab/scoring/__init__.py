"""Scoring code shared by all members: encoder interface, scoring job, feature cache.

`encoder` is the interface of a model that embeds images and captions. `job` is the frame of all
scoring commands: it checks inputs, and writes score file, ranked list and metrics. `encoding` runs
an encoder over images and captions in batches. `feature_cache` keeps their vectors on disk. Imports
the public modules, `pab.data` and `pab.core`.
"""
