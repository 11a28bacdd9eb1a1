"""Score a gallery with BLIP-2, zero-shot or fine-tuned: `python scripts/blip2_infer.py`.

`--backend lavis` runs LAVIS's own code, in the environment of `scripts/setup_lavis.sh`.
"""

from __future__ import annotations

from pab.core.errors import run_cli
from pab.encoders.blip2.infer import InferConfig
from pab.scoring.job import scoring_command


def main(argv: list[str] | None = None) -> None:
    """Read the command line and score."""
    scoring_command(InferConfig, argv, prog="python scripts/blip2_infer.py")


if __name__ == "__main__":
    run_cli(main)
