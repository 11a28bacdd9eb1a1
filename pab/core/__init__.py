"""Foundation of all packages: errors, files, configs, devices, processes and checkpoints.

Commands use `commands` (grouped flags), `config` (YAML, then flags), `errors` (one line, exit code
2), `notices` (assumptions, on stderr) and `outputs` (checked before any work). `files`,
`text_files`, `tensor_files` and `foreign_values` read safely and write atomically; `file_kinds`
detects formats. `checkpoints` and `state_dicts` load weights in known formats, `weight_folders`
finds them in folders, and `adapters` merges LoRA and DoRA into them. `devices`, `precision`
(dtypes) and `device_errors` serve the models. `launch` starts processes, `processes` connects them,
and `gradients` averages their gradients. `progress` shows the progress of long loops, `counts`
formats numbers with nouns, `resources` finds the configs that ship with the code, and `hub` lists
the files of published models. This package imports no other package of the project.
"""

__version__ = "0.1.0"
