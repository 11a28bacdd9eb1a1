#!/usr/bin/env bash
# Fine-tune LHP as published. Arguments override the recipe; GPUS=4 starts four processes.
#   bash scripts/finetune_lhp.sh     GPUS=4 bash scripts/finetune_lhp.sh --batch_size 46
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

run=(.venv/bin/python -m)
if [ "${GPUS:-1}" -gt 1 ]; then
    run=(.venv/bin/torchrun --standalone --nproc_per_node "$GPUS" -m)
fi
"${run[@]}" lhp.train --config configs/lhp/finetune.yaml "$@"
