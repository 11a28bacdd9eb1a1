"""Training code shared by all recipes: settings, data, loop, resuming, losses, optimizer, log.

`config` and `command` hold the settings and flags. `data`, `pair_data` and `sampling` make batches
that do not depend on the number of processes or workers. `setup` opens a run's data and finds the
checkpoint to resume from. `loop` feeds, updates, validates and saves; `pairs` is the contrastive
recipe with the loss of `contrastive`. `optim` groups parameters and schedules rates. `preflight`,
`resume` and `run_log` check, resume and record a run. Imports the public modules, `pab.data` and
`pab.core`.
"""
