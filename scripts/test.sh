#!/usr/bin/env bash
# Set up, check style and types, and run the tests; arguments are passed to pytest.
#   bash scripts/test.sh             bash scripts/test.sh -k ranking
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash scripts/setup.sh
.venv/bin/ruff check --output-format concise .
.venv/bin/ruff format --check --quiet .
.venv/bin/mypy
.venv/bin/python -m pytest --numprocesses 2 --dist loadfile "$@"
