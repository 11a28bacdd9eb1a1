#!/usr/bin/env bash
# Install requirements_lhp.txt and requirements_uit.txt, each alone in a fresh environment, and run
# the commands listed below with --help.
#   bash scripts/check_requirements.sh            each file installs PyTorch, about 7 GB
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

shared=(pab pab.layout pab.mini pab.mini.contact_sheet pab.evaluate pab.compare pab.scores
    pab.export_weights pab.core.launch ensemble.run ensemble.search ensemble.mine
    ensemble.protocol ensemble.published ensemble.report)
declare -A commands=(
    [requirements_lhp.txt]="lhp.train lhp.infer lhp.train_tokenizer ${shared[*]}"
    [requirements_uit.txt]="uit.run uit.train uit.infer uit.make_vocabulary ${shared[*]}
        pab.fetch pab.scoring pab.search pab.encoders.train_clip_tokenizer
        pab.encoders.st.make_small scripts/clip_infer.py scripts/blip2_infer.py
        scripts/embed_infer.py scripts/rerank_infer.py scripts/finetune_clip.py
        scripts/finetune_blip2.py scripts/finetune_embedder.py scripts/finetune_reranker.py"
)
python=${PYTHON:-python3.11}
for file in "${!commands[@]}"; do
    home=$(mktemp -d)
    trap 'rm -rf "$home"' EXIT
    "$python" -m venv "$home/venv"
    "$home/venv/bin/python" -m pip install --quiet --disable-pip-version-check -r "$file"
    "$home/venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps --editable .
    for command in ${commands[$file]}; do
        case $command in *.py) words=("$command") ;; *) words=(-m "$command") ;; esac
        PYTHONPATH=. "$home/venv/bin/python" "${words[@]}" --help > /dev/null
        echo "$file: python ${words[*]} --help"
    done
    rm -rf "$home"
done
