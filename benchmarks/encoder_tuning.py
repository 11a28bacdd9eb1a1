"""Mini CLIP before and after fine-tuning: `python benchmarks/encoder_tuning.py --out FILE`.

"Before" knows the data as a pretrained model would: trained from scratch for a few epochs, on whole
images in random order. It is then tuned with the project's recipe (local views, and twin batches in
which only the action distinguishes twins) in three ways: all weights, only low-rank updates, and a
frozen image tower.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from mini_runs import (
    METRICS,
    TEST,
    judged,
    keyed_folder,
    run_script,
    score_encoder,
    table_row,
    write_table,
)

from pab.training.loop import BEST, FINAL

RECIPE = Path("configs/clip/mini.yaml")
BEFORE = ("--config", str(RECIPE), "--local_prob", "0", "--twin_batches_from", "99")
TUNED = ("--config", str(RECIPE), "--warmup_steps", "20", "--twin_batches_from", "0")
WAYS = {
    "all weights": ("--lr", "5e-4"),
    "LoRA, rank 8": ("--lr", "5e-3", "--lora_rank", "8", "--lora_alpha", "16"),
    "image tower frozen": ("--lr", "5e-4", "--freeze", "image"),
}


def tuned(out: Path, *flags: str) -> Path:
    """Train, and return the best weights on the validation split."""
    if not (out / FINAL).is_file():
        run_script("finetune_clip", *flags, "--output_dir", str(out))
    return out / BEST


def main() -> None:
    """Read the command line, tune, score, write the table."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--out", type=Path, required=True, help="Markdown file to write")
    parser.add_argument("--work", type=Path, default=Path("output/encoder_tuning"))
    parser.add_argument("--epochs_before", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--seed", type=int, default=16)
    args = parser.parse_args()
    seed = ("--seed", str(args.seed))
    first = (*BEFORE, "--epochs", str(args.epochs_before), *seed)
    settings = (*TUNED, "--epochs", str(args.epochs), *seed)
    folder = keyed_folder(args.work, RECIPE.read_text(), " ".join((*first, *settings)))
    start = tuned(folder / "before", *first)
    scored = score_encoder("clip", TEST, folder / "before", "--pretrained", str(start))
    before = judged(scored, TEST)
    rows = [table_row("before tuning", before, None)]
    for name, flags in WAYS.items():
        out = folder / name.replace(" ", "_").replace(",", "")
        weights = tuned(out, *settings, "--pretrained", str(start), *flags)
        scored = score_encoder("clip", TEST, out, "--pretrained", str(weights))
        rows.append(table_row(f"{name} (`{' '.join(flags)}`)", judged(scored, TEST), before))
    text = [
        f"Written by `python benchmarks/encoder_tuning.py --out {args.out}`. The first row is a",
        "model trained from scratch with",
        f"`scripts/finetune_clip.py {' '.join(first)}`.",
        f"The other rows start from it, with `{' '.join(settings)}`",
        "and their own flags. Each row scores the best epoch by R@1 on the 501 validation pairs.",
        "Figures are percent on the 2,000 queries of the mini test set, with 95 % bootstrap",
        "intervals. Gains are paired.",
    ]
    columns = ["what", *METRICS, "R@1 over the first row"]
    write_table(args.out, "Fine-tuning the mini CLIP", text, columns, rows)


if __name__ == "__main__":
    main()
