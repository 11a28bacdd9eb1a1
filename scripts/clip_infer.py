"""Score a gallery with CLIP, zero-shot: `python scripts/clip_infer.py`."""

from __future__ import annotations

from pab.core.errors import run_cli
from pab.encoders.clip.infer import InferConfig
from pab.scoring.job import scoring_command


def main(argv: list[str] | None = None) -> None:
    """Parse the command line and score the gallery."""
    scoring_command(
        InferConfig,
        argv,
        prog="python scripts/clip_infer.py",
    )


if __name__ == "__main__":
    run_cli(main)
