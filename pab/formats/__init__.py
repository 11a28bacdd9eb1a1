"""Readers and writers for scores and ranked lists in other tools' formats.

`forms` detects the form of a file and reads it as one of the `contents`: a matrix, or ranked images
per query. `runs` and `tables` parse the forms: TREC, ranx, JSON rankings, CSV, Parquet. `export`
writes them. `pab.scores` turns contents into score files with ids. Imports `pab.core` and public
modules of `pab`.
"""
