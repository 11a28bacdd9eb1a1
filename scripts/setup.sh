#!/usr/bin/env bash
# Create .venv and install the dependencies, unless they are already installed.
#   bash scripts/setup.sh            PYTHON=python3.12 bash scripts/setup.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

requirements=(requirements_lhp.txt requirements_uit.txt requirements_dev.txt)
stamp=.venv/installed.sha256
wanted=$(cat "${requirements[@]}" pyproject.toml | sha256sum)
if [ -x .venv/bin/python ] && [ "$(cat "$stamp" 2>/dev/null || true)" = "$wanted" ]; then
    exit 0
fi

python=${PYTHON:-}
if [ -z "$python" ]; then
    for candidate in python3.11 python3.12 python3.13 python3; do
        if command -v "$candidate" >/dev/null 2>&1; then python=$candidate; break; fi
    done
fi
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    echo "error: expected Python 3.11 or newer, found '${python:-none}'; set PYTHON=/path/to/python3.11" >&2
    exit 2
fi

echo "Installing into .venv with $("$python" --version): about 7 GB, mostly PyTorch." >&2
[ -x .venv/bin/python ] || "$python" -m venv .venv
# One command for all files, so that pip resolves torch and torchvision together.
.venv/bin/python -m pip install --quiet --disable-pip-version-check \
    -r requirements_lhp.txt -r requirements_uit.txt -r requirements_dev.txt
.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
echo "$wanted" > "$stamp"
