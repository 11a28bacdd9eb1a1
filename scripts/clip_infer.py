"""Score a gallery with CLIP, zero-shot or fine-tuned: `python scripts/clip_infer.py`."""

from __future__ import annotations

from pab.core.errors import run_cli
from pab.encoders.clip.infer import InferConfig
from pab.scoring.job import scoring_command


def main(argv: list[str] | None = None) -> None:
    """Read the command line and score."""
    scoring_command(InferConfig, argv, prog="python scripts/clip_infer.py")


if __name__ == "__main__":
    run_cli(main)
