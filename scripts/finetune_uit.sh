#!/usr/bin/env bash
# Fine-tune UIT as released, on the first four GPUs; arguments win over the recipe.
#   bash scripts/finetune_uit.sh     bash scripts/finetune_uit.sh --dist f1 --bs 42
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

.venv/bin/python -m uit.run --task cmp --dist f4 --output_dir output/uit "$@"
