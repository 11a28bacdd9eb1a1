#!/usr/bin/env bash
# The paper on a GPU, step by step, each published number beside the one obtained.
#   bash scripts/reproduce.sh                  score the released checkpoints, fuse, compare
#   bash scripts/reproduce.sh --train          fine-tune LHP and UIT first (days; GPUS=4 uses four)
#   bash scripts/reproduce.sh --mini           the same steps with the mini models on the mini data
# DATA and OUT name other folders of data and of results.
# Expected hours: docs/reproduce.md. A step whose score file is there is not run again.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

train=false mini=false
for word in "$@"; do
    case $word in
        --train) train=true ;;
        --mini) mini=true ;;
        *) echo "error: $word: expected --train or --mini" >&2; exit 2 ;;
    esac
done
if $train && $mini; then
    echo "error: --train: the mini models are shipped; train them with the commands of their configs" >&2
    exit 2
fi
data=data/PAB out=output/reproduce
gpus=${GPUS:-1} lhp_batch=184 uit_batch=84
# Each way has a folder of its own: never one model's scores under another's name.
if $train; then
    out=output/reproduce_trained
elif $mini; then
    data=data/mini out=output/reproduce_mini
fi
data=${DATA:-$data} out=${OUT:-$out}
python=.venv/bin/python
test=$data/annotation/test/pair.json
lhp=(--checkpoint checkpoints/lhp/lhp_beit3.pth) uit=(--config configs/uit/infer.yaml)
blip2=() clip=() weights=(--config configs/ensemble/published.yaml)
if $mini; then
    lhp=(--config configs/lhp/mini_infer.yaml) uit=(--config configs/uit/mini_infer.yaml)
    blip2=(--config configs/blip2/mini_infer.yaml) clip=(--config configs/clip/mini_infer.yaml)
    weights=(--config configs/ensemble/mini.yaml)
fi
labelled=(--annotation "$test" --image_folder "$data" --answers none)

if ! $mini; then
    $python -m pab.layout check "$data"
fi
if $train; then
    if [ $((lhp_batch % gpus)) -ne 0 ] || [ $((uit_batch % gpus)) -ne 0 ]; then
        echo "error: GPUS: the published 184 and 84 pairs a step do not divide by $gpus" >&2
        exit 2
    fi
    lhp_batch=$((lhp_batch / gpus)) uit_batch=$((uit_batch / gpus))
    bash scripts/finetune_lhp.sh --batch_size "$lhp_batch" --data_path "$data" \
        --output_dir "$out/lhp" --log_dir "$out/lhp/log"
    $python -m uit.run --task cmp --dist "f$gpus" --bs "$uit_batch" --data_path "$data" --output_dir "$out/uit"
    lhp=(--checkpoint "$out/lhp/checkpoint-final.pth")
    uit+=(--checkpoint "$out/uit/checkpoint-final.pth")
fi

score() {  # name, command ...
    local name=$1
    shift
    if [ ! -f "$out/score_$name.pt" ]; then
        "$@" "${labelled[@]}" --save_score "$out/score_$name.pt" --output_file "$out/predictions_$name.txt"
    fi
}
score lhp $python -m lhp.infer "${lhp[@]}"
score uit $python -m uit.infer "${uit[@]}" --candidates "$out/score_lhp.pt"
score blip2 $python scripts/blip2_infer.py "${blip2[@]}"
score clip $python scripts/clip_infer.py "${clip[@]}"

members=(--beit3_score "$out/score_lhp.pt")
step=lhp
compare() {  # step
    step=$1
    echo
    $python -m ensemble.run "${weights[@]}" --uit_score none --blip2_score none --clip_score none \
        "${members[@]}" --save_score "$out/fused.pt" --output_file "$out/predictions.txt"
    $python -m ensemble.published "$step" --score "$out/fused.pt" --annotation "$test" --image_folder "$data"
}
compare lhp
members+=(--uit_score "$out/score_uit.pt") && compare lhp+uit
members+=(--blip2_score "$out/score_blip2.pt") && compare lhp+uit+blip2
members+=(--clip_score "$out/score_clip.pt") && compare lhp+uit+blip2+clip
