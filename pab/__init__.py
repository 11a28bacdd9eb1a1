"""Code shared by all models: data, images, score files, metrics, training tools.

This room has no model of its own and imports none of the rooms above it (lhp, uit, ensemble,
scripts).
"""

__version__ = "0.1.0"
