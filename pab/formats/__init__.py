"""Read and write scores and ranked lists, in this project's and other tools' formats.

The public interface is `pab.scores`. `score_file` defines a score matrix with ids. `forms` detects
the form of a file and reads it as one of the `contents`: a matrix, or ranked images per query.
`runs` and `tables` parse TREC, ranx, JSON, CSV and Parquet. `conversion` converts contents to score
files, `export` writes other forms, and `description` describes a file. `parts` divides queries, and
joins the score files of the parts. Imports `pab.core`, `pab.data` and `pab.ranking`.
"""
