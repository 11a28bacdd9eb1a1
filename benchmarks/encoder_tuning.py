"""The mini CLIP before and after fine-tuning: `python benchmarks/encoder_tuning.py --out FILE`.

Goes on from the shipped mini CLIP for a few epochs of twin batches (the action alone tells an
image from its twin): all weights, low-rank updates alone, and with the image tower frozen.
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

from pab.files import sha256_of_file
from pab.training import BEST

RECIPE = Path("configs/clip/mini.yaml")
SHIPPED = Path("checkpoints/mini/clip/open_clip_model.safetensors")
SHARED = (
    *("--config", str(RECIPE), "--pretrained", str(SHIPPED), "--warmup_steps", "20"),
    *("--twin_batches_from", "0"),
)
WAYS = {
    "all weights": ("--lr", "2e-4"),
    "LoRA, rank 8": ("--lr", "2e-3", "--lora_rank", "8", "--lora_alpha", "16"),
    "image tower frozen": ("--lr", "2e-4", "--freeze", "image"),
}


def main() -> None:
    """Read the command line, tune, score, write the table."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--out", type=Path, required=True, help="Markdown file to write")
    parser.add_argument("--work", type=Path, default=Path("output/encoder_tuning"))
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--seed", type=int, default=16)
    args = parser.parse_args()
    settings = (*SHARED, "--epochs", str(args.epochs), "--seed", str(args.seed))
    key = (RECIPE.read_text(), sha256_of_file(SHIPPED), " ".join(settings))
    folder = keyed_folder(args.work, *key)
    before = judged(score_encoder("clip", TEST, folder), TEST)
    rows = [table_row("the shipped mini CLIP", before, None)]
    for name, flags in WAYS.items():
        out = folder / name.replace(" ", "_").replace(",", "")
        if not (out / BEST).is_file():
            run_script("finetune_clip", *settings, *flags, "--output_dir", str(out))
        tuned = score_encoder("clip", TEST, out, "--pretrained", str(out / BEST))
        rows.append(table_row(f"{name} ({' '.join(flags)})", judged(tuned, TEST), before))
    text = [
        f"`python benchmarks/encoder_tuning.py --out {args.out}`: `scripts/finetune_clip.py` with",
        f"`{' '.join(settings)}`",
        "and the flags of each row; percent on the 2,000 queries of the mini test set with 95 %",
        "bootstrap intervals, gains paired. The epoch that is best by R@1 on the 501 validation",
        "pairs is scored.",
    ]
    columns = ["what", *METRICS, "R@1 over the first row"]
    write_table(args.out, "Fine-tuning the mini CLIP", text, columns, rows)


if __name__ == "__main__":
    main()
