"""Annotations, images, tables and training sets.

File readers, and the records that they return.
"""
