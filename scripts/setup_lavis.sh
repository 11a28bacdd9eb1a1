#!/usr/bin/env bash
# Create .venv-lavis, in which BLIP-2 runs with LAVIS's own code; .venv is unchanged.
#   bash scripts/setup_lavis.sh
#   .venv-lavis/bin/python scripts/blip2_infer.py --backend lavis
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-python3.11}
[ -x .venv-lavis/bin/python ] || "$python" -m venv .venv-lavis
.venv-lavis/bin/python -m pip install --quiet --disable-pip-version-check -r requirements_blip2_lavis.txt
.venv-lavis/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
.venv-lavis/bin/python -W ignore -c "import lavis.models"
