"""Run the layout check: `python -m pab.layout check PATH`."""

from pab.core.errors import run_cli
from pab.layout.check import main

if __name__ == "__main__":
    run_cli(main)
