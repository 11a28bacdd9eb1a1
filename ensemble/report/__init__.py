"""Write an offline HTML report on rankings: `python -m ensemble.report`.

`inputs` reads and evaluates score files. `findings` computes recall curves, the weight sweep, step
changes and tables; `charts` lays out the curves. `steps` selects examples of each fusion step.
`pictures` embeds thumbnails. `page` fills the templates and writes one file.
"""
