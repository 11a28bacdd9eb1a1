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

echo "Scoring 2,000 captions against 2,000 images with LHP (mini) ..."
$python -m lhp.infer --config configs/lhp/mini_infer.yaml --answers none \
    --image_folder "$masked/gallery" --annotation "$masked/query.json" \
    --save_score "$out/score_lhp.pt" --output_file "$out/predictions.txt"

$python -m pab.evaluate --score "$out/score_lhp.pt" --annotation "$masked/query.json" \
    --answers "$masked/answers.json" --intervals --json "$out/metrics.json"

$python -m ensemble.report --score "LHP=$out/score_lhp.pt" --annotation "$masked/query.json" \
    --answers "$masked/answers.json" --image_folder "$masked/gallery" \
    --title "LHP on the mini test set" --out "$out/report.html"

echo "Ranked list: $out/predictions.txt    Report: $out/report.html"
