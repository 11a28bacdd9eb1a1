"""Score candidates with a vision-language model: `python scripts/rerank_infer.py`."""

from __future__ import annotations

from pab.core.errors import run_cli
from pab.encoders.st.rerank import RerankConfig
from pab.scoring.job import scoring_command


def main(argv: list[str] | None = None) -> None:
    """Read the command line and score."""
    scoring_command(RerankConfig, argv, prog="python scripts/rerank_infer.py")


if __name__ == "__main__":
    run_cli(main)
