#!/usr/bin/env bash
# Fine-tune UIT with the release's command, which names four GPUs. Arguments override the recipe.
# The release used only one GPU: for its 84 pairs per step, pass --dist f1, or --dist f4 --bs 21.
#   bash scripts/finetune_uit.sh     bash scripts/finetune_uit.sh --dist f1 --bs 42
# To use several machines, run the script on each, with NNODES, NODE_RANK and MASTER_ADDR set
# (docs/reproduce.md).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

.venv/bin/python -m uit.run --task cmp --dist f4 --output_dir output/uit "$@"
