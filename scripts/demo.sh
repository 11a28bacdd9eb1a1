#!/usr/bin/env bash
# Run all steps on the mini data: set up, build the data, score, fuse, evaluate, report.
#   bash scripts/demo.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

case ${1:-} in
    "") ;;
    --help | -h) sed -n '2,/^set /s/^# *//p' scripts/demo.sh; exit ;;
    --version) sed -n 's/^version = "\(.*\)"/person-anomaly-retrieval \1/p' pyproject.toml; exit ;;
    *) echo "error: $1: expected no arguments" >&2; exit 2 ;;
esac
bash scripts/setup.sh
python=.venv/bin/python
data=data/mini
masked=$data/name-masked_test-set
out=output/demo
test=(--answers none --image_folder "$masked/gallery" --annotation "$masked/query.json")

if [ ! -f "$masked/answers.json" ]; then
    echo "Building the mini test set in $data ..."
    $python -m pab.mini --out "$data" --splits test
fi

echo "1 of 5: LHP scores 2,000 captions against 2,000 images ..."
$python -m lhp.infer --config configs/lhp/mini_infer.yaml "${test[@]}" \
    --save_score "$out/score_lhp.pt" --output_file "$out/predictions_lhp.txt"

echo "2 of 5: UIT's cross encoder scores LHP's 32 best images per caption ..."
$python -m uit.infer --config configs/uit/mini_infer.yaml "${test[@]}" \
    --candidates "$out/score_lhp.pt" \
    --save_score "$out/score_uit.pt" --output_file "$out/predictions_uit.txt"

echo "3 of 5: BLIP-2 scores all pairs ..."
$python scripts/blip2_infer.py --config configs/blip2/mini_infer.yaml "${test[@]}" \
    --save_score "$out/score_blip2.pt" --output_file "$out/predictions_blip2.txt"

echo "4 of 5: CLIP scores all pairs ..."
$python scripts/clip_infer.py --config configs/clip/mini_infer.yaml "${test[@]}" \
    --save_score "$out/score_clip.pt" --output_file "$out/predictions_clip.txt"

echo "5 of 5: fusing the four score files, one after the other ..."
fuse() {  # score file, ranked list, member flags (these override the defaults below)
    local scores=$out/$1 list=$out/$2
    shift 2
    $python -m ensemble.run --config configs/ensemble/mini.yaml --blip2_score none --clip_score none \
        --save_score "$scores" --output_file "$list" "$@"
}
members=(--beit3_score "$out/score_lhp.pt" --uit_score "$out/score_uit.pt")
fuse score_with_uit.pt predictions_with_uit.txt "${members[@]}"
members+=(--blip2_score "$out/score_blip2.pt")
fuse score_with_blip2.pt predictions_with_blip2.txt "${members[@]}"
members+=(--clip_score "$out/score_clip.pt")
fuse score_fused.pt predictions.txt "${members[@]}"

$python -m pab.evaluate --score "$out/score_fused.pt" --annotation "$masked/query.json" \
    --answers "$masked/answers.json" --intervals --json "$out/metrics.json"
echo
$python -m ensemble.report --score "fused=$out/score_fused.pt" \
    --score "LHP=$out/score_lhp.pt" --score "UIT=$out/score_uit.pt" \
    --score "BLIP-2=$out/score_blip2.pt" --score "CLIP=$out/score_clip.pt" \
    --score "+ UIT=$out/score_with_uit.pt" --score "+ BLIP-2=$out/score_with_blip2.pt" \
    --annotation "$masked/query.json" --answers "$masked/answers.json" \
    --image_folder "$masked/gallery" --steps LHP "+ UIT" "+ BLIP-2" fused \
    --title "LHP, UIT, BLIP-2, CLIP and their fusion on the mini test set" --out "$out/report.html"

echo "Ranked list: $out/predictions.txt    Report: $out/report.html"
