#!/usr/bin/env bash
# The published inference: LHP, BLIP-2 and CLIP score, then UIT over LHP's candidates and the fusion.
#   bash scripts/infer_all.sh     every path as the README says; arguments go to the last step
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=.venv/bin/python
$python -m lhp.infer
$python scripts/blip2_infer.py
$python scripts/clip_infer.py
bash scripts/iterative_ensemble.sh "$@"
