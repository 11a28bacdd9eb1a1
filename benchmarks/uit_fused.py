"""What UIT adds to LHP on the mini data: `python benchmarks/uit_fused.py --out docs/uit_fused.md`.

For each seed: trains the mini UIT, scores the validation split and the test set by ITC alone and
over the candidates of the shipped LHP, chooses the fusion's weight on the validation split
(`ensemble.search`), and fuses the test set's scores with it. Writes a table, whatever it says.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import yaml
from mini_runs import TEST, UIT_RECIPE, LabelledSet, judged, keyed_folder, score_lhp, score_uit
from mini_runs import train_uit as train

from ensemble.run import main as fuse
from ensemble.search import main as search
from pab.evaluate import Evaluation
from pab.files import write_text
from pab.metrics import paired_bootstrap

METRICS = ("R@1", "R@5", "R@10", "mAP")


def fused_scores(lhp: Path, uit: Path, weights: Path, out: Path) -> Path:
    """Score file of the fused test set."""
    fuse(
        ["--config", str(weights), "--beit3_score", str(lhp), "--uit_score", str(uit)]
        + ["--save_score", str(out), "--output_file", str(out.with_suffix(".txt"))]
    )
    return out


def row(name: str, found: Evaluation, before: Evaluation | None) -> str:
    """A line of the table: R@1 with its interval, further metrics, the gain over LHP."""
    figures, bounds = found.summary(), found.intervals()
    cells = [f"{figures[m]:.2f} ({bounds[m][0]:.1f} to {bounds[m][1]:.1f})" for m in METRICS]
    gain = "-"
    if before is not None:
        ours = paired_bootstrap(before.metrics.values["R@1"], found.metrics.values["R@1"])
        gain = f"{ours.mean:+.2f} ({ours.low:+.2f} to {ours.high:+.2f})"
    line = f"| {name} | {' | '.join(cells)} | {gain} |"
    print(line, flush=True)
    return line


def main() -> None:
    """Read the command line, train, score, fuse, write the table."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--out", type=Path, required=True, help="Markdown file to write")
    parser.add_argument("--work", type=Path, default=Path("output/uit_fused"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[16, 17, 18])
    args = parser.parse_args()
    folder = keyed_folder(args.work, UIT_RECIPE.read_text())
    lhp_test = score_lhp(TEST, folder)
    lhp = judged(lhp_test, TEST)
    rows = [row("LHP", lhp, None)]
    for seed in args.seeds:
        out = folder / f"s{seed}"
        checkpoint = train(out, "--seed", str(seed))
        validation = LabelledSet("val", out / "val_pairs.json")
        lhp_val = score_lhp(validation, folder)
        weights = out / "weights.yaml"
        search(
            ["--annotation", str(validation.annotation), "--image_folder", str(validation.root)]
            + ["--beit3_score", str(lhp_val), "--out", str(weights)]
            + ["--uit_score", str(score_uit(checkpoint, validation, out, lhp_val)[0])]
            + ["--trials", str(out / "trials.csv")]
        )
        weight = yaml.safe_load(weights.read_text())["beit3_weight"]
        _, itc = score_uit(checkpoint, TEST, out, None)
        assert itc is not None
        uit, _ = score_uit(checkpoint, TEST, out, lhp_test)
        fused = fused_scores(lhp_test, uit, weights, out / "fused.pt")
        rows += [
            row(f"UIT's ITC, seed {seed}", judged(itc, TEST), lhp),
            row(f"UIT over LHP's candidates, seed {seed}", judged(uit, TEST), lhp),
            row(f"LHP and UIT fused at {weight:g}, seed {seed}", judged(fused, TEST), lhp),
        ]
    seeds = " ".join(map(str, args.seeds))
    lines = [
        "# What UIT adds to LHP on the mini data",
        "",
        f"`python benchmarks/uit_fused.py --seeds {seeds} --out {args.out}`:",
        "the shipped mini LHP and the mini UIT of `configs/uit/mini.yaml`, trained with each of",
        "these seeds (16 is the shipped one), 32 candidates a query. Weights are",
        "what LHP keeps, chosen on the 501 validation pairs; figures are percent on the 2,000",
        "queries of the mini test set with 95 % bootstrap intervals, gains are paired.",
        "",
        f"| what | {' | '.join(METRICS)} | R@1 over LHP |",
        f"| --- |{' --- |' * (len(METRICS) + 1)}",
        *rows,
    ]
    write_text(args.out, "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
