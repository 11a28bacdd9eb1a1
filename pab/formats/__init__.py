"""Readers and writers for scores and ranked lists, in this project's and other tools' formats.

`score_file` is the matrix of scores with its ids, and its file. `forms` detects the form of any
file and reads it as one of the `contents`: a matrix, or ranked images per query. `runs` and
`tables` parse TREC, ranx, JSON, CSV and Parquet. `conversion` turns contents into score files,
`export` writes other forms, `description` explains a file. Imports `pab.data`, `pab.core` and
public modules.
"""
