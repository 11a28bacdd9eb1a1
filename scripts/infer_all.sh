#!/usr/bin/env bash
# Run the published inference: score with LHP, BLIP-2 and CLIP, re-rank with UIT, and fuse.
#   bash scripts/infer_all.sh     default paths, as in the README
# The script accepts the arguments of iterative_ensemble.sh. --annotation, --answers, --query_order
# and --image_folder apply to every step. To skip the scoring of a member, pass its score file. To
# omit a member, pass "none" instead of a file.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec .venv/bin/python -m scripts.published_inference infer_all "$@"
