"""Describe any file or folder, and suggest the next command: `python -m pab.layout check PATH`.

`check` asks the modules for each kind of content in turn: `folders` and `parts` (PAB's layout),
`files` (annotations and tables), `weights`, and `scores`. Each returns the result of `found`:
counts, ignored fields, bad lines, command. Imports `pab.data`, `pab.formats` and `pab.core`.
"""
