"""Gain of UIT over LHP on the mini data: `python benchmarks/uit_fused.py --out docs/uit_fused.md`.

For each seed: trains the mini UIT, and scores the validation split and the test set by ITC alone
and over the candidates of the shipped LHP. Chooses the fusion's weight on the validation split
(`ensemble.search`), and fuses the test set's scores with it. Writes the table whatever the result.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import yaml
from mini_runs import (
    METRICS,
    TEST,
    UIT_RECIPE,
    LabelledSet,
    judged,
    keyed_folder,
    score_lhp,
    score_uit,
    table_row,
    train_uit,
    write_table,
)

from ensemble.run import main as fuse
from ensemble.search import main as search


def fused_scores(lhp: Path, uit: Path, weights: Path, out: Path) -> Path:
    """Fuse the test set; return the score file."""
    fuse(
        ["--config", str(weights), "--beit3_score", str(lhp), "--uit_score", str(uit)]
        + ["--save_score", str(out), "--output_file", str(out.with_suffix(".txt"))]
    )
    return out


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
    rows = [table_row("LHP", lhp, None)]
    for seed in args.seeds:
        out = folder / f"s{seed}"
        checkpoint = train_uit(out, "--seed", str(seed))
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
            table_row(f"UIT's ITC, seed {seed}", judged(itc, TEST), lhp),
            table_row(f"UIT over LHP's candidates, seed {seed}", judged(uit, TEST), lhp),
            table_row(f"LHP and UIT fused at {weight:g}, seed {seed}", judged(fused, TEST), lhp),
        ]
    seeds = " ".join(map(str, args.seeds))
    text = [
        f"Written by `python benchmarks/uit_fused.py --seeds {seeds} --out {args.out}`:",
        "the shipped mini LHP and the mini UIT of `configs/uit/mini.yaml`, trained with each of",
        "these seeds (16 is the shipped one), with 32 candidates per query. A weight is LHP's",
        "share of the sum, chosen on the 501 validation pairs. Figures are percent on the 2,000",
        "queries of the mini test set, with 95 % bootstrap intervals. Gains are paired.",
    ]
    columns = ["what", *METRICS, "R@1 over LHP"]
    write_table(args.out, "UIT fused with LHP on the mini data", text, columns, rows)


if __name__ == "__main__":
    main()
