"""Foundation of all rooms: errors, files, configs, devices, processes and checkpoints.

Commands are built on `commands` (grouped flags), `config` (YAML, then flags), `errors` (one line,
exit code 2), `notices` and `outputs` (checks before any work). `files`, `text_files` and
`tensor_files` read safely and write atomically. `checkpoints`, `state_dicts`, `adapters` and
`weight_folders` load weights of this and other projects. `devices` and `processes` serve the
models, `progress` shows long loops, `resources` finds shipped files. Imports nothing from the rooms
above.
"""

__version__ = "0.1.0"
