"""Annotations, images, tables and training sets.

Readers of files, and the records that they give.
"""
