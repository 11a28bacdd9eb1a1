#!/usr/bin/env bash
# Reproduce the paper step by step, and print each published figure beside the one obtained.
#   bash scripts/reproduce.sh                  score the released checkpoints, fuse, compare
#   bash scripts/reproduce.sh --train          fine-tune LHP and UIT first (GPUS=4: on four GPUs)
#   bash scripts/reproduce.sh --mini           the same steps with the mini models on the mini data
#   bash scripts/reproduce.sh --answers FILE   also evaluate the name-masked set with its answer key
# The script scores the labelled test set and the name-masked set, if they exist. The variables DATA
# and OUT set the folders of data and results. If a model's score file exists, scoring is skipped.
# For the expected hours of fine-tuning and scoring, see docs/reproduce.md.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

train=false mini=false answers=
while [ $# -gt 0 ]; do
    case $1 in
        --train) train=true ;;
        --mini) mini=true ;;
        --answers)
            [ $# -gt 1 ] || { echo "error: --answers: expected a file" >&2; exit 2; }
            answers=$2
            shift ;;
        --help | -h) sed -n '2,/^set /s/^# *//p' scripts/reproduce.sh; exit ;;
        --version) sed -n 's/^version = "\(.*\)"/person-anomaly-retrieval \1/p' pyproject.toml; exit ;;
        *) echo "error: $1: expected --train, --mini or --answers FILE" >&2; exit 2 ;;
    esac
    shift
done
if $train && $mini; then
    echo "error: --train: cannot be used with --mini; to train mini models, see their config files" >&2
    exit 2
fi
if [ -n "$answers" ] && [ ! -f "$answers" ]; then
    echo "error: --answers: $answers: expected the answer key of the name-masked set, found no such file" >&2
    exit 2
fi
data=data/PAB out=output/reproduce
gpus=${GPUS:-1} lhp_batch=184 uit_batch=84
if ! [[ $gpus =~ ^[1-9][0-9]*$ ]]; then
    echo "error: GPUS: expected a number of GPUs, found $gpus" >&2
    exit 2
fi
# One default output folder per mode, so that score files of different models do not mix.
if $train; then
    out=output/reproduce_trained
elif $mini; then
    data=data/mini out=output/reproduce_mini
fi
data=${DATA:-$data} out=${OUT:-$out}
python=.venv/bin/python
lhp=(--checkpoint checkpoints/lhp/lhp_beit3.pth) uit=(--config configs/uit/infer.yaml)
blip2=() clip=() weights=(--config configs/ensemble/published.yaml)
if $mini; then
    lhp=(--config configs/lhp/mini_infer.yaml) uit=(--config configs/uit/mini_infer.yaml)
    blip2=(--config configs/blip2/mini_infer.yaml) clip=(--config configs/clip/mini_infer.yaml)
    weights=(--config configs/ensemble/mini.yaml)
fi

first_of() {  # file ...: print the first existing file, if any
    local file
    for file in "$@"; do
        if [ -f "$file" ]; then
            echo "$file"
            return
        fi
    done
}
test=$(first_of "$data"/annotation/test/{pair,attr}.json)
masked=$data/name-masked_test-set
queries=$(first_of "$masked"/{query,query_text}.json)
if [ -n "$queries" ] && [ ! -d "$masked/gallery" ]; then
    echo "note: $masked: not scored, because it has no gallery/" >&2
    queries=
fi
answers=${answers:-$(first_of "$masked/answers.json")}

$python -m pab.layout check "$data"
if [ -z "$test$queries" ]; then
    echo "error: $data: expected annotation/test/pair.json, or name-masked_test-set/ with its" \
        "query.json and gallery/, found neither" >&2
    exit 2
fi
if $train; then
    if [ $((lhp_batch % gpus)) -ne 0 ] || [ $((uit_batch % gpus)) -ne 0 ]; then
        echo "error: GPUS: expected a divisor of the published 184 and 84 pairs per step, found $gpus" >&2
        exit 2
    fi
    lhp_batch=$((lhp_batch / gpus)) uit_batch=$((uit_batch / gpus))
    bash scripts/finetune_lhp.sh --batch_size "$lhp_batch" --data_path "$data" \
        --output_dir "$out/lhp" --log_dir "$out/lhp/log"
    $python -m uit.run --task cmp --dist "f$gpus" --bs "$uit_batch" --data_path "$data" --output_dir "$out/uit"
    lhp=(--checkpoint "$out/lhp/checkpoint-final.pth")
    uit+=(--checkpoint "$out/uit/checkpoint-final.pth")
fi

score() {  # name, command ...: run the command for the set $set, unless its score file exists
    local name=$1
    shift
    if [ ! -f "$out/score_$name$set.pt" ]; then
        "$@" "${data_flags[@]}" --save_score "$out/score_$name$set.pt" \
            --output_file "$out/predictions_$name$set.txt"
    fi
}
score_all() {
    score lhp $python -m lhp.infer "${lhp[@]}"
    score uit $python -m uit.infer "${uit[@]}" --candidates "$out/score_lhp$set.pt"
    score blip2 $python scripts/blip2_infer.py "${blip2[@]}"
    score clip $python scripts/clip_infer.py "${clip[@]}"
}
fuse() {  # member flags ...
    $python -m ensemble.run "${weights[@]}" --uit_score none --blip2_score none --clip_score none \
        "$@" "${order[@]}" --save_score "$out/fused$set.pt" --output_file "$out/predictions$set.txt"
}
fuse_all() {  # with labels, add one member after the other and compare each fusion; else fuse all
    local step=lhp members=(--beit3_score "$out/score_lhp$set.pt") name
    for name in lhp uit blip2 clip; do
        if [ $name != lhp ]; then
            step=$step+$name members+=("--${name}_score" "$out/score_$name$set.pt")
        fi
        if [ ${#labels[@]} -gt 0 ]; then
            echo
            fuse "${members[@]}"
            $python -m ensemble.published "$step" --score "$out/fused$set.pt" --annotation "$annotation" "${labels[@]}"
        fi
    done
    [ ${#labels[@]} -gt 0 ] || fuse "${members[@]}"
}

if [ -n "$test" ]; then
    echo
    echo "labelled test: $test"
    set='' annotation=$test labels=(--image_folder "$data") order=()
    data_flags=(--annotation "$test" --image_folder "$data" --answers none)
    score_all
    fuse_all
fi
if [ -n "$queries" ]; then
    echo
    echo "name-masked set: $queries"
    set=_masked annotation=$queries labels=() order=()
    [ ! -f "$masked/query_index.txt" ] || order=(--query_order "$masked/query_index.txt")
    [ -z "$answers" ] || labels=(--answers "$answers")
    data_flags=(--annotation "$queries" --image_folder "$masked/gallery" --answers "${answers:-none}" "${order[@]}")
    score_all
    fuse_all
    if [ -z "$answers" ]; then
        echo "no metrics: the name-masked set has no labels; pass its answer key with --answers"
    fi
    echo "ranked list: $out/predictions_masked.txt"
fi
