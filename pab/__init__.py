"""Code shared by all models: data, images, score files, metrics, training tools.

This package contains no model. It imports none of the packages above it (lhp, uit, ensemble,
scripts).
"""

from pab.core import __version__ as __version__
