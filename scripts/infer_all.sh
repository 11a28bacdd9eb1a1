#!/usr/bin/env bash
# The published inference: LHP, BLIP-2 and CLIP score, then UIT over LHP's candidates and the fusion.
#   bash scripts/infer_all.sh     default paths, as in the README
# Takes the arguments of iterative_ensemble.sh. --annotation, --answers, --query_order and
# --image_folder go to every step. A member with a given score file (or "none") is not scored.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec .venv/bin/python -m scripts.published_inference infer_all "$@"
