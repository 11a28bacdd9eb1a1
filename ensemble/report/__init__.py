"""Offline HTML report on rankings: `python -m ensemble.report`.

`inputs` reads the score files and evaluates them. `findings`, `steps` and `charts` compute tables,
fusion steps and curves. `pictures` embeds thumbnails. `page` fills the templates: metrics, failures
with pictures, steps, curves, tables, in one file. Imports `ensemble` and `pab`.
"""
