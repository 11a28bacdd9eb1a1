#!/usr/bin/env bash
# The published inference: LHP, BLIP-2 and CLIP score, then UIT over LHP's candidates and the fusion.
#   bash scripts/infer_all.sh     every path as the README says; arguments are those of
# iterative_ensemble.sh, of which --annotation, --answers, --query_order and --image_folder go to every step.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
words=("$@")
source scripts/ensemble_flags.sh # takes the words off the line

python=.venv/bin/python
$python -m lhp.infer "${data[@]}" --save_score "$beit3_score"
if [ "$blip2_score" != none ]; then
    $python scripts/blip2_infer.py "${data[@]}" --save_score "$blip2_score"
fi
if [ "$clip_score" != none ]; then
    $python scripts/clip_infer.py "${data[@]}" --save_score "$clip_score"
fi
bash scripts/iterative_ensemble.sh "${words[@]}"
