"""Errors, files, configs, devices, processes, checkpoints.

The ground of every room, which imports no other.
"""
