"""Compare LHP's views on the mini data: `python benchmarks/lhp_views.py --out docs/lhp_views.md`.

Trains the mini recipe on a shortened schedule with only global views (`--local_prob 0`), hybrid
views (0.5) and only local views (1), with three seeds each. Scores the mini test set with each
model, and writes a table. Finished runs stay in a subfolder of ``--work``, so that an interrupted
benchmark can continue. The subfolder's name is a hash of recipe, data and schedule.
"""

from __future__ import annotations

from pathlib import Path

import mini_runs as mini
from machine import flag_parser

from lhp.train import main as train

RECIPE = Path("configs/lhp/mini.yaml")
VIEWS = {"only global": 0.0, "hybrid": 0.5, "only local": 1.0}
METRICS = ("R@1", "R@5", "R@10", "mAP")


def one_run(prob: float, seed: int, epochs: int, folder: Path) -> dict[str, float]:
    """Train and score one model; return its metrics on the mini test set, percent."""
    out = folder / f"p{prob}_s{seed}"
    if not (out / mini.FINAL).is_file():
        train(
            ["--config", str(RECIPE), "--output_dir", str(out)]
            + ["--local_prob", str(prob), "--seed", str(seed), "--epochs", str(epochs)]
            + ["--val_pairs", "0", "--save_ckpt_freq", str(epochs)]
        )
    scores = mini.score_lhp(mini.TEST, out, "--checkpoint", str(out / mini.FINAL))
    found = mini.judged(scores).summary()
    return {name: found[name] for name in METRICS}


def main() -> None:
    args = flag_parser(
        __doc__, out=mini.PAGE, work=Path("output/lhp_views"), epochs=3, seeds=[1, 2, 3]
    ).parse_args()
    folder = mini.keyed_folder(args.work, RECIPE.read_text(), f"{args.epochs} epochs")
    rows = []
    for name, prob in VIEWS.items():
        runs = [one_run(prob, seed, args.epochs, folder) for seed in args.seeds]
        label = f"{name} (`--local_prob {prob:g}`)"
        rows.append(mini.seeds_row(label, runs, lambda v: f"{min(v):.2f} to {max(v):.2f}"))
    text = [
        f"Written by `python benchmarks/lhp_views.py --out {args.out} --epochs {args.epochs}`.",
        f"LHP is trained with `configs/lhp/mini.yaml`, shortened to {args.epochs} epochs, with the",
        f"seeds {', '.join(map(str, args.seeds))}. Values are percentages on the 2,000 queries of",
        "the mini test set: the mean, and in parentheses the range over the seeds.",
    ]
    title = "Local, global and hybrid views on the mini data"
    mini.write_table(args.out, title, text, ["views", *METRICS], rows)


if __name__ == "__main__":
    main()
