"""Offline HTML report on rankings: `python -m ensemble.report`.

`members` reads the score files and evaluates them. `findings`, `steps` and `charts` compute tables,
fusion steps and curves; `pictures` embeds thumbnails. `page` fills the template: metrics, failures
with pictures, curves, in one file. Imports `ensemble` and `pab`.
"""
