"""Compare the mini CLIP before and after tuning: `python benchmarks/encoder_tuning.py --out FILE`.

The first model replaces a pretrained model: it is trained from scratch for a few epochs, on whole
images in random order. It is then fine-tuned with the project's recipe (local views, and batches
with twins that differ only in the action) in three ways: all weights, low-rank updates only, and
all weights except the image tower.
"""

from __future__ import annotations

from pathlib import Path

import mini_runs as mini
from machine import flag_parser

RECIPE = Path("configs/clip/mini.yaml")
BEFORE = ("--config", str(RECIPE), "--local_prob", "0", "--twin_batches_from", "99")
TUNED = ("--config", str(RECIPE), "--warmup_steps", "20", "--twin_batches_from", "0")
WAYS = {
    "all weights": ("--lr", "5e-4"),
    "LoRA, rank 8": ("--lr", "5e-3", "--lora_rank", "8", "--lora_alpha", "16"),
    "image tower frozen": ("--lr", "5e-4", "--freeze", "image"),
}


def tuned(out: Path, *flags: str) -> tuple[Path, mini.Evaluation]:
    """Train a model unless it exists; return its best weights in validation and test metrics."""
    if not (out / mini.FINAL).is_file():
        mini.run_script("finetune_clip", [*flags, "--output_dir", str(out)])
    weights = out / mini.BEST
    scores = mini.score_encoder("clip", mini.TEST, out, "--pretrained", str(weights))
    return weights, mini.judged(scores)


def main() -> None:
    args = flag_parser(
        __doc__,
        out=mini.PAGE,
        work=Path("output/encoder_tuning"),
        epochs_before=3,
        epochs=2,
        seed=16,
    ).parse_args()
    seed = ("--seed", str(args.seed))
    first = (*BEFORE, "--epochs", str(args.epochs_before), *seed)
    settings = (*TUNED, "--epochs", str(args.epochs), *seed)
    folder = mini.keyed_folder(args.work, RECIPE.read_text(), " ".join((*first, *settings)))
    start, before = tuned(folder / "before", *first)
    rows = [mini.table_row("before tuning", before, None)]
    for name, flags in WAYS.items():
        out = folder / name.replace(" ", "_").replace(",", "")
        _, found = tuned(out, *settings, "--pretrained", str(start), *flags)
        rows.append(mini.table_row(f"{name} (`{' '.join(flags)}`)", found, before))
    text = [
        f"Written by `python benchmarks/encoder_tuning.py --out {args.out}`. The first row is a",
        "model that is trained from scratch with",
        f"`scripts/finetune_clip.py {' '.join(first)}`.",
        f"The other rows start from it, with `{' '.join(settings)}`",
        "and the flags in the first column. Each row evaluates the epoch with the best R@1 on the",
        "501 validation pairs.",
        "Figures are percentages on the 2,000 queries of the mini test set, with 95 % bootstrap",
        "intervals. Gains in R@1 are paired.",
    ]
    columns = ["training", *mini.METRICS, "R@1 over the first row"]
    mini.write_table(args.out, "Fine-tuning the mini CLIP", text, columns, rows)


if __name__ == "__main__":
    main()
