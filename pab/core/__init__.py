"""Errors, files, configs, devices, processes, checkpoints.

Foundation of all other packages; imports none of them.
"""
