"""Score the mini data with small vision-language models, and re-rank a fused list in stages."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import mini_runs as mini
import yaml

from ensemble.run import main as fuse
from ensemble.search import main as search
from pab.evaluate import Evaluation

K = 10  # images per query that the reranker scores
# Wider than the defaults of ensemble.search: the logits of a small model reach 20.
NUMBERS = ("0", "0.1", "0.2", "0.5", "1", "2", "5", "10", "20", "50")
GRIDS = tuple(word for flag in ("prior", "tau", "slack") for word in (f"--{flag}_grid", *NUMBERS))
CHAIN = ("--decode", "margin", "assignment", "--decode_top", "2", "--decode_scope", "collisions")
MARGIN = (
    "--decode",
    "margin",
    "--decode_slack",
    "none",
    "--decode_top",
    "none",
    "--decode_scope",
    "all",
)


def score_late(model: Path, labelled: mini.LabelledSet, out: Path) -> Path:
    """Score a set with a late-interaction embedder; return the score file."""
    path = out / f"{labelled.name}_late.pt"
    if not path.is_file():
        mini.run_script("embed_infer", [*_flags(model, labelled, path), "--batch_size", "64"])
    return path


def score_reranker(model: Path, labelled: mini.LabelledSet, out: Path, candidates: Path) -> Path:
    """Score each query's first images of ``candidates`` with a reranker; return the score file."""
    path = out / f"{labelled.name}_rerank.pt"
    if not path.is_file():
        chosen = ("--candidates", str(candidates), "--k_test", str(K), "--batch_size", "64")
        mini.run_script("rerank_infer", [*_flags(model, labelled, path), *chosen])
    return path


def _flags(model: Path, labelled: mini.LabelledSet, path: Path) -> list[str]:
    """Return the flags that both scripts share, for one model, set and score file."""
    outputs = ["--save_score", str(path), "--output_file", str(path.with_suffix(".txt"))]
    return ["--model", str(model), *labelled.flags(), "--answers", "none", *outputs]


def choose_chain(
    labelled: mini.LabelledSet, members: dict[str, Path], reranker: Path, out: Path
) -> Path:
    """Choose weights, depth, prior, tau and slack on a set; return the settings file."""
    chosen = out / "chain.yaml"
    files = ("--trials", str(out / "chain_trials.csv"), "--out", str(chosen))
    rerank = ("--rerank", f"reranker={reranker}")
    search([*labelled.flags(), *mini.given(members), *rerank, *CHAIN, *GRIDS, *files])
    return chosen


def stages(
    chain: Path, members: dict[str, Path], reranker: Path, out: Path
) -> Iterator[tuple[str, Evaluation]]:
    """Yield name and evaluation of each stage on the test set: fused, re-ranked, decoded."""
    settings = yaml.safe_load(chain.read_text())
    depth, prior = settings["rerank_depth"], settings["rerank_prior"]
    tau, slack = settings["decode_tau"], settings["decode_slack"]
    rerank = ("--rerank", f"reranker={reranker}")
    own = ("--rerank_prior", "0", "--rerank_depth", str(K))
    steps: list[tuple[str, tuple[str, ...]]] = [
        ("fused, without reranker", ("--decode", "none", "--rerank")),
        (f"reranker over the first {K}", (*rerank, *own, "--decode", "none")),
        (f"rank prior {prior:g}, depth {depth}", (*rerank, "--decode", "none")),
        (f"+ margin, tau {tau:g}", (*rerank, *MARGIN)),
        (f"+ assignment, slack {slack}", rerank),
    ]
    words = mini.given({**dict.fromkeys(mini.SCORE_FLAGS, "none"), **members})
    for number, (name, flags) in enumerate(steps):
        path = out / f"stage_{number}.pt"
        outputs = ("--save_score", str(path), "--output_file", str(path.with_suffix(".txt")))
        fuse(["--config", str(chain), *words, *outputs, *flags])
        yield name, mini.judged(path)
