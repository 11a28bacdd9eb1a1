"""Write the HTML report: `python -m ensemble.report`."""

from ensemble.report.page import main
from pab.core.errors import run_cli

if __name__ == "__main__":
    run_cli(main)
