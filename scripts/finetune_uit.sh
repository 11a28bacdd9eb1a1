#!/usr/bin/env bash
# Fine-tune UIT by the release's command, which names four GPUs; arguments win over the recipe.
# The release then used one GPU, so its 84 pairs a step are --dist f1, or --dist f4 --bs 21.
#   bash scripts/finetune_uit.sh     bash scripts/finetune_uit.sh --dist f1 --bs 42
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

.venv/bin/python -m uit.run --task cmp --dist f4 --output_dir output/uit "$@"
