"""Fine-tuning code shared by all recipes; the result is a checkpoint for scoring.

`config` and `command` hold the settings and flags. `data`, `pair_data` and `sampling` make batches;
the order of the samples and their random draws do not depend on the number of processes or workers.
`setup` opens a run's data and finds the checkpoint to resume from. `loop` updates, validates and
saves. `pairs` is the recipe of LHP, CLIP and BLIP-2, with the loss in `contrastive`; UIT's is
`uit/train.py`, and those of vision-language models are in `pab/encoders/st`. `optim` groups
parameters and schedules the learning rate. `preflight`, `resume` and `run_log` check, resume and
record a run; `agreement` compares the processes before a run starts.
The package imports `pab.scoring`, the public modules, `pab.data` and `pab.core`.
"""
