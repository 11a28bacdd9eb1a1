"""Foundation of all packages: errors, files, configs, devices, processes and checkpoints.

This package imports no other package of the project.
"""

__version__ = "0.1.0"
