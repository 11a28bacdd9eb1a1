"""Default output files of scoring with UIT, named after the number of candidates."""

from __future__ import annotations

PUBLISHED_K = 10  # candidates per query in the only scoring configuration of the release
AUTO = "auto"  # value of a path flag that stands for the default path
SCORES, LIST = "sims_score/score_uit{k}_reproduce.pt", "predictions/score_uit{k}_reproduce.txt"


def name_part(k: int) -> str:
    """Return the suffix of default file names: empty for the published k, otherwise ``_kN``."""
    return "" if k == PUBLISHED_K else f"_k{k}"


def output_path(path: str | None, default: str, k: int) -> str | None:
    """Replace ``auto`` with the default path for ``k`` candidates.

    The path depends on k, so that a run with another k does not overwrite the outputs of the
    published k.
    """
    return default.format(k=name_part(k)) if path == AUTO else path
