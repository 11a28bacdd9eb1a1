#!/usr/bin/env bash
# Fine-tune LHP as published. Arguments override the recipe; GPUS=4 starts four processes.
#   bash scripts/finetune_lhp.sh     GPUS=4 bash scripts/finetune_lhp.sh --batch_size 46
# To use several machines, run the script on each, with NNODES, NODE_RANK and MASTER_ADDR set
# (docs/reproduce.md).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

run=(.venv/bin/python -m)
if [ "${GPUS:-1}" != 1 ] || [ "${NNODES:-1}" != 1 ]; then
    run+=(pab.core.launch "${GPUS:-1}")
fi
"${run[@]}" lhp.train --config configs/lhp/finetune.yaml "$@"
