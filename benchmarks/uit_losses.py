"""Ablate UIT's losses on the mini data: `python benchmarks/uit_losses.py --out FILE`.

Trains the mini recipe on a shortened schedule with all losses, without masked image modelling
(MIM), without masked language modelling (MLM), and without the augmented caption (EDA). Each
variant has several seeds. Scores the mini test set by image-text contrast (ITC), and by re-ranking
the candidates of the shipped LHP.
"""

from __future__ import annotations

from pathlib import Path

import mini_runs as mini
from machine import flag_parser

VARIANTS = {
    "all losses": (),
    "without MIM": ("--mim_weight", "0"),
    "without MLM": ("--mlm_weight", "0"),
    "without EDA": ("--eda_weight", "0"),
}
COLUMNS = ("ITC R@1", "ITC R@10", "re-ranked R@1", "re-ranked mAP", "over twin")


def one_run(flags: tuple[str, ...], out: Path, candidates: Path) -> dict[str, float]:
    """Train and score one model; return its metrics on the mini test set, percent."""
    checkpoint = mini.train_uit(out, *flags)
    by_itc = mini.judged(mini.score_itc(checkpoint, mini.TEST, out)).summary()
    ranked = mini.judged(mini.score_uit(checkpoint, mini.TEST, out, candidates)).summary()
    values = (by_itc["R@1"], by_itc["R@10"], ranked["R@1"], ranked["mAP"], ranked["over twin"])
    return dict(zip(COLUMNS, values, strict=True))


def main() -> None:
    args = flag_parser(
        __doc__,
        out=mini.PAGE,
        work=Path("output/uit_losses"),
        epochs=3,
        twin_batches_from=2,
        seeds=[1, 2],
    ).parse_args()
    shortened = ("--epochs", str(args.epochs), "--twin_batches_from", str(args.twin_batches_from))
    folder = mini.keyed_folder(args.work, mini.UIT_RECIPE.read_text(), " ".join(shortened))
    candidates = mini.score_lhp(mini.TEST, folder)
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
        rows.append(mini.seeds_row(name, runs, lambda v: " / ".join(f"{one:.2f}" for one in v)))
    unused = ", so no run uses them" if args.twin_batches_from >= args.epochs else ""
    text = [
        f"Written by `python benchmarks/uit_losses.py --out {args.out} --epochs {args.epochs} "
        f"--twin_batches_from {args.twin_batches_from}`.",
        f"The recipe of `configs/uit/mini.yaml` is shortened to {args.epochs} epochs, counted",
        f"from 0. Twin batches start at epoch {args.twin_batches_from}{unused}. Each row after the",
        "first omits a loss (MIM: masked images, MLM: masked captions) or the augmented caption",
        "(EDA). Values are percentages on the 2,000 queries of the mini test set: the mean, and",
        f"in parentheses the values for seeds {', '.join(map(str, args.seeds))}. ITC ranks the",
        "gallery by the similarity of the text and image vectors. Re-ranked: the cross encoder",
        "reorders the 32 best candidates of the shipped LHP. Over twin is the share of the queries",
        "with a twin whose right image ranks above the twin. A twin shows the same person and",
        "scene with another action.",
    ]
    mini.write_table(args.out, "UIT's losses on the mini data", text, ["losses", *COLUMNS], rows)


if __name__ == "__main__":
    main()
