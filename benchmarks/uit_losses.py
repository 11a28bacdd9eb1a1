"""Ablate UIT's losses on the mini data: `python benchmarks/uit_losses.py --out FILE`.

Trains the mini recipe on a shortened schedule with all losses, without MIM, without MLM, and
without the augmented caption, with several seeds each. Scores the mini test set by ITC and over the
candidates of the shipped LHP. Writes the table whatever the result.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

from mini_runs import (
    TEST,
    UIT_RECIPE,
    judged,
    keyed_folder,
    score_lhp,
    score_uit,
    train_uit,
    write_table,
)

VARIANTS = {
    "all losses": (),
    "without MIM": ("--mim_weight", "0"),
    "without MLM": ("--mlm_weight", "0"),
    "without EDA": ("--eda_weight", "0"),
}
COLUMNS = ("ITC R@1", "ITC R@10", "re-ranked R@1", "re-ranked mAP", "over twin")


def one_run(flags: tuple[str, ...], out: Path, candidates: Path) -> dict[str, float]:
    """Metrics of one trained model on the mini test set, in percent."""
    checkpoint = train_uit(out, *flags)
    _, itc = score_uit(checkpoint, TEST, out, None)
    assert itc is not None
    by_itc = judged(itc, TEST).summary()
    ranked = judged(score_uit(checkpoint, TEST, out, candidates)[0], TEST).summary()
    values = (by_itc["R@1"], by_itc["R@10"], ranked["R@1"], ranked["mAP"], ranked["over twin"])
    return dict(zip(COLUMNS, values, strict=True))


def main() -> None:
    """Read the command line, train, write the table."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--out", type=Path, required=True, help="Markdown file to write")
    parser.add_argument("--work", type=Path, default=Path("output/uit_losses"))
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--twin_batches_from", type=int, default=2)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    args = parser.parse_args()
    shortened = ("--epochs", str(args.epochs), "--twin_batches_from", str(args.twin_batches_from))
    folder = keyed_folder(args.work, UIT_RECIPE.read_text(), " ".join(shortened))
    candidates = score_lhp(TEST, folder)
    rows = []
    for name, flags in VARIANTS.items():
        runs = [
            one_run(
                (*shortened, *flags, "--seed", str(seed), "--val_pairs", "0"),
                folder / f"{name.replace(' ', '_')}_s{seed}",
                candidates,
            )
            for seed in args.seeds
        ]
        cells = [
            f"{statistics.mean(run[column] for run in runs):.2f} "
            f"({' / '.join(f'{run[column]:.2f}' for run in runs)})"
            for column in COLUMNS
        ]
        rows.append(f"| {name} | {' | '.join(cells)} |")
        print(rows[-1], flush=True)
    text = [
        f"Written by `python benchmarks/uit_losses.py --out {args.out} --epochs {args.epochs} "
        f"--twin_batches_from {args.twin_batches_from}`.",
        f"The recipe of `configs/uit/mini.yaml` is shortened to {args.epochs} epochs (twin batches",
        f"from epoch {args.twin_batches_from}), and one loss is left out at a time. Figures are",
        "percent on the 2,000 queries of the mini test set: the mean, then the seeds",
        f"{', '.join(map(str, args.seeds))}. Re-ranked means the match score over the 32",
        "candidates of the shipped LHP.",
    ]
    write_table(args.out, "UIT's losses on the mini data", text, ["losses", *COLUMNS], rows)


if __name__ == "__main__":
    main()
