#!/usr/bin/env bash
# The release's last command: UIT over LHP's candidates, then the fusion of all members.
#   bash scripts/iterative_ensemble.sh --config configs/uit/infer.yaml --task cmp --output_dir output \
#       --checkpoint checkpoints/uit/uit.pth --output_file reproduce.txt \
#       --beit3_weight 0.925 --beit3_score sims_score/score_beit3_reproduce.pt \
#       --blip2_weight 0.9 --blip2_score sims_score/score_blip2_reproduce.pt \
#       --clip_weight 0.9 --clip_score sims_score/score_clip_reproduce.pt
# UIT's score file and list go to --output_dir. Members whose score is "none" are left out.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

config=configs/uit/infer.yaml task=cmp output_dir=output output_file=reproduce.txt
beit3_score=sims_score/score_beit3_reproduce.pt
blip2_score=sims_score/score_blip2_reproduce.pt
clip_score=sims_score/score_clip_reproduce.pt
uit=() fusion=() both=()
while [ $# -gt 0 ]; do
    flag=${1%%=*}
    if [ "$flag" != "$1" ]; then
        value=${1#*=}
        shift
    elif [ $# -gt 1 ]; then
        value=$2
        shift 2
    else
        echo "error: $1: expected a value after it" >&2
        exit 2
    fi
    case $flag in
        --config) config=$value ;;
        --task) task=$value ;;
        --output_dir) output_dir=$value ;;
        --output_file) output_file=$value ;;
        --beit3_score) beit3_score=$value ;;
        --blip2_score) blip2_score=$value ;;
        --clip_score) clip_score=$value ;;
        --beit3_weight | --blip2_weight | --clip_weight | --member | --save_score | --top_k)
            fusion+=("$flag" "$value") ;;
        --annotation | --answers | --query_order | --image_folder) both+=("$flag" "$value") ;;
        --checkpoint | --model | --input_size | --window | --text_encoder | --max_words | \
            --max_text_length | --k_test | --cache_dtype | --cache_dir | --batch_size | \
            --num_workers | --device | --dtype)
            uit+=("$flag" "$value") ;;
        *)
            echo "error: $flag: unknown flag; this script takes those of uit.infer and ensemble.run" >&2
            exit 2 ;;
    esac
done
if [ "$task" != cmp ]; then
    echo "error: --task: expected cmp, found $task" >&2
    exit 2
fi

python=.venv/bin/python
$python -m uit.infer --config "$config" --candidates "$beit3_score" "${uit[@]}" "${both[@]}" \
    --save_score "$output_dir/score_uit.pt" --output_file "$output_dir/predictions_uit.txt"
$python -m ensemble.run --beit3_score "$beit3_score" --uit_score "$output_dir/score_uit.pt" \
    --blip2_score "$blip2_score" --clip_score "$clip_score" "${fusion[@]}" "${both[@]}" \
    --output_file "$output_file"
