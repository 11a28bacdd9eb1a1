"""Errors, files, configs, devices, processes, checkpoints.

Foundation of all other packages; imports none of them.
"""

__version__ = "0.1.0"
