#!/usr/bin/env bash
# The whole way on the mini data: set up, build the data, score, rank, evaluate, report.
#   bash scripts/demo.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash scripts/setup.sh
python=.venv/bin/python
data=data/mini
masked=$data/name-masked_test-set
out=output/demo

if [ ! -f "$masked/answers.json" ]; then
    echo "Building the mini test set in $data ..."
    $python -m pab.mini --out "$data" --splits test
fi

echo "1 of 3: LHP scores 2,000 captions against 2,000 images ..."
$python -m lhp.infer --config configs/lhp/mini_infer.yaml --answers none \
    --image_folder "$masked/gallery" --annotation "$masked/query.json" \
    --save_score "$out/score_lhp.pt" --output_file "$out/predictions_lhp.txt"

echo "2 of 3: UIT's cross encoder scores LHP's 32 best images of each caption ..."
$python -m uit.infer --config configs/uit/mini_infer.yaml --answers none \
    --image_folder "$masked/gallery" --annotation "$masked/query.json" \
    --candidates "$out/score_lhp.pt" \
    --save_score "$out/score_uit.pt" --output_file "$out/predictions_uit.txt"

echo "3 of 3: fusing the two ..."
$python -m ensemble.run --config configs/ensemble/mini.yaml \
    --beit3_score "$out/score_lhp.pt" --uit_score "$out/score_uit.pt" \
    --save_score "$out/score_fused.pt" --output_file "$out/predictions.txt"

$python -m pab.evaluate --score "$out/score_fused.pt" --annotation "$masked/query.json" \
    --answers "$masked/answers.json" --intervals --json "$out/metrics.json"
echo
$python -m ensemble.report --score "fused=$out/score_fused.pt" \
    --score "LHP=$out/score_lhp.pt" --score "UIT=$out/score_uit.pt" \
    --annotation "$masked/query.json" --answers "$masked/answers.json" \
    --image_folder "$masked/gallery" --steps LHP fused \
    --title "LHP, UIT and their fusion on the mini test set" --out "$out/report.html"

echo "Ranked list: $out/predictions.txt    Report: $out/report.html"
