#!/usr/bin/env bash
# The release's last command: UIT over LHP's candidates, then the fusion of all members.
#   bash scripts/iterative_ensemble.sh --config configs/uit/infer.yaml --task cmp --output_dir output \
#       --checkpoint checkpoints/uit/uit.pth --output_file reproduce.txt \
#       --beit3_weight 0.925 --beit3_score sims_score/score_beit3_reproduce.pt \
#       --blip2_weight 0.9 --blip2_score sims_score/score_blip2_reproduce.pt \
#       --clip_weight 0.9 --clip_score sims_score/score_clip_reproduce.pt
# UIT's score file and ranked list go to --output_dir. Members with the score "none" are left out.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/ensemble_flags.sh

for file in "$beit3_score" "$blip2_score" "$clip_score"; do
    if [ "$file" != none ] && [ ! -f "$file" ]; then # fail before UIT's long run
        echo "error: $file: expected a score file, found no such file" >&2
        exit 2
    fi
done
python=.venv/bin/python
$python -m uit.infer --config "$config" --candidates "$beit3_score" "${uit[@]}" "${data[@]}" \
    --save_score "$output_dir/score_uit.pt" --output_file "$output_dir/predictions_uit.txt"
$python -m ensemble.run --beit3_score "$beit3_score" --uit_score "$output_dir/score_uit.pt" \
    --blip2_score "$blip2_score" --clip_score "$clip_score" "${fusion[@]}" "${data[@]}" \
    --output_file "$output_file"
