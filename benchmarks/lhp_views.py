"""Test LHP's claim on the mini data: `python benchmarks/lhp_views.py --out docs/lhp_views.md`.

Trains the mini recipe on a shortened schedule with only global views (`--local_prob 0`), hybrid
views (0.5) and only local views (1), with three seeds each. Scores the mini test set with each
model, and writes the table whatever the result. Finished runs stay in ``--work``, in a folder named
by recipe, data and schedule, so the nine runs can be split over several sessions.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

from lhp.infer import main as infer
from lhp.train import main as train
from pab.core.files import sha256_of_lines, write_text
from pab.evaluate import main as evaluate

RECIPE, DATA = Path("configs/lhp/mini.yaml"), Path("data/mini")
VIEWS = {"only global": 0.0, "hybrid": 0.5, "only local": 1.0}
PARTS = ("images", "annotations")
METRICS = ("R@1", "R@5", "R@10", "mAP")


def one_run(prob: float, seed: int, epochs: int, folder: Path) -> dict[str, float]:
    """Metrics of one trained model on the mini test set, in percent."""
    out = folder / f"p{prob}_s{seed}"
    if (out / "metrics.json").is_file():
        return metrics_of(out)
    train(
        ["--config", str(RECIPE), "--output_dir", str(out)]
        + ["--local_prob", str(prob), "--seed", str(seed), "--epochs", str(epochs)]
        + ["--val_pairs", "0", "--save_ckpt_freq", str(epochs)]
    )
    test, score = str(DATA / "annotation/test/pair.json"), str(out / "score.pt")
    infer(
        ["--config", "configs/lhp/mini_infer.yaml", "--annotation", test, "--answers", "none"]
        + ["--image_folder", str(DATA / "test"), "--checkpoint", str(out / "checkpoint-final.pth")]
        + ["--save_score", score, "--output_file", str(out / "list.txt")]
    )
    evaluate(["--score", score, "--annotation", test, "--json", str(out / "metrics.json")])
    return metrics_of(out)


def metrics_of(out: Path) -> dict[str, float]:
    """Select the reported metrics from the output of ``pab.evaluate``."""
    found = json.loads((out / "metrics.json").read_text())
    return {name: found["groups"]["all"][name] for name in METRICS}


def folder_of(work: Path, epochs: int) -> Path:
    """Folder for the runs of this recipe, data and schedule."""
    splits = json.loads((DATA / "manifest.json").read_text())["splits"]
    made = [splits[name][f"{part}_sha256"] for name in ("train", "test") for part in PARTS]
    key = sha256_of_lines([RECIPE.read_text(), *made])
    return work / f"{key[:12]}_{epochs}_epochs"


def main() -> None:
    """Read the command line, train, write the table."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--out", type=Path, required=True, help="Markdown file to write")
    parser.add_argument("--work", type=Path, default=Path("output/lhp_views"))
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    args = parser.parse_args()
    lines = [
        "# Local, global and hybrid views on the mini data",
        "",
        f"Written by `python benchmarks/lhp_views.py --out {args.out} --epochs {args.epochs}`: the",
        f"mini recipe shortened to {args.epochs} epochs, with the seeds "
        f"{', '.join(map(str, args.seeds))}. Figures are percent on",
        "the 2,000 queries of the mini test set: mean and range over the seeds.",
        "",
        f"| views | {' | '.join(METRICS)} |",
        f"| --- |{' --- |' * len(METRICS)}",
    ]
    folder = folder_of(args.work, args.epochs)
    for name, prob in VIEWS.items():
        runs = [one_run(prob, seed, args.epochs, folder) for seed in args.seeds]
        cells = [
            f"{statistics.mean(r[m] for r in runs):.2f} "
            f"({min(r[m] for r in runs):.2f} to {max(r[m] for r in runs):.2f})"
            for m in METRICS
        ]
        lines.append(f"| {name} (`--local_prob {prob:g}`) | {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    write_text(args.out, "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
