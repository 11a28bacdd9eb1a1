"""Describe any file or folder, and suggest the next command: `python -m pab.layout check PATH`.

`check` passes a data root to `parts`, any other folder to `folders`, and a file to `files`, which
uses `weights` and `scores`. `parts` returns one `Part` per set of PAB (training, test, name-masked,
UCC); the other modules return a `Found` with kind, counts and commands. Imports `pab.core`,
`pab.data` and `pab.formats`.
"""
