"""Describe any file or folder, and suggest the next command: `python -m pab.layout check PATH`.

`check` passes a data root to `parts`, any other folder to `folders`, and a file to `files`. `parts`
returns one `Part` per set of PAB (training, test, name-masked, UCC). `folders` and `files` return a
`Found` with kind, counts and commands, as do `weights` and `scores`, which they use. `found`
defines this class. Imports `pab.core`, `pab.data` and `pab.formats`.
"""
