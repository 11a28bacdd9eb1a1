#!/usr/bin/env bash
# Run the release's last command: re-rank LHP's candidates with UIT, then fuse all members.
#   bash scripts/iterative_ensemble.sh --config configs/uit/infer.yaml --task cmp --output_dir output \
#       --checkpoint checkpoints/uit/uit.pth --output_file reproduce.txt \
#       --beit3_weight 0.925 --beit3_score sims_score/score_beit3_reproduce.pt \
#       --blip2_weight 0.9 --blip2_score sims_score/score_blip2_reproduce.pt \
#       --clip_weight 0.9 --clip_score sims_score/score_clip_reproduce.pt
# UIT's score file and ranked list are written to --output_dir. To omit a member, pass "none" as its
# score file.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec .venv/bin/python -m scripts.published_inference iterative_ensemble "$@"
