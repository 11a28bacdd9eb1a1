"""Kill a training run at random moments and resume it: `python -m tests.kill_and_resume`.

For each recipe, one run is never interrupted. Another run is killed (SIGKILL) several times and
restarted with the same command. A run saves a checkpoint after every step, so a kill can interrupt
a write. At the end, both must have written equal weight files for every epoch, byte for byte.
"""

from __future__ import annotations

import argparse
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Literal

from lhp.train_tokenizer import train_tokenizer
from pab.core.checkpoints import load_training_state
from pab.data.training_set import TrainingSet
from pab.encoders.st.make_small import SmallConfig, make_small
from pab.training.loop import FINAL
from pab.training.resume import LAST, epoch_files
from tests.conftest import MODEL, make_data
from uit.make_vocabulary import make_vocabulary

LATEST = 1.5  # longest delay of a kill, in seconds after the first new checkpoint
ROOT = Path(__file__).resolve().parents[1]
MINI = ROOT / "checkpoints/mini"
SMALL: dict[str, Any] = {"width": 48, "layers": 2, "heads": 2, "side": 64, "vocab_size": 400}
RECIPES = ("lhp", "uit", "clip", "blip2", "embedder", "reranker")
SHARED = {
    "batch_size": 4, "epochs": 80, "num_workers": 0, "device": "cpu", "dtype": "fp32",
    "save_every_steps": 1, "val_pairs": 4, "lr": 1e-3,
}  # fmt: skip


def command(recipe: str, data: Path, out: Path) -> list[str]:
    """Return the command of a small run; make the files that it reads if they are missing."""
    captions = [pair.caption for pair in TrainingSet.open(data)]
    if not (data / "t.spm").is_file():
        train_tokenizer(captions, data / "t.spm", 64)
        make_vocabulary(captions, data / "words", 100)
    kinds: dict[str, Literal["late", "reranker"]] = {"embedder": "late", "reranker": "reranker"}
    small = data / f"small_{recipe}"
    if recipe in kinds and not small.is_dir():
        make_small(SmallConfig(kind=kinds[recipe], out=str(small), **SMALL), captions)
    program, own = {
        "lhp": (["-m", "lhp.train"], {
            "model": MODEL, "input_size": 64, "sentencepiece_model": data / "t.spm",
            "drop_path": 0.2, "min_lr": 1e-4, "warmup_steps": 2, "ema_decay": 0.9,
        }),
        "uit": (["-m", "uit.train", "--no_synonyms"], {
            "model": "uit_debug", "input_size": 32, "window": 4, "text_encoder": data / "words",
            "max_text_length": 24, "max_words": 20, "mim_block": 16, "k_val": 3,
        }),
        "clip": (["scripts/finetune_clip.py"], {
            "model": f"local-dir:{MINI / 'clip'}", "pretrained": "random", "epochs": 40,
        }),
        "blip2": (["scripts/finetune_blip2.py"], {
            "model": "mini", "pretrained": "random", "text_encoder": MINI / "bert", "epochs": 40,
        }),
        "embedder": (["scripts/finetune_embedder.py"], {
            "model": small, "crop_prob": 0.5, "warmup_steps": 2, "epochs": 40,
        }),
        "reranker": (["scripts/finetune_reranker.py"], {
            "model": small, "lora_rank": 4, "prompt": "Match?", "val_candidates": 3,
            "warmup_steps": 2, "ema_decay": 0.9, "epochs": 40,
        }),
    }[recipe]  # fmt: skip
    settings = {**SHARED, **own, "data_path": data, "output_dir": out}
    return [
        sys.executable, *program,
        *(word for key, value in settings.items() for word in (f"--{key}", str(value))),
    ]  # fmt: skip


def run_with_kills(words: list[str], out: Path, kills: int, draw: random.Random) -> int:
    """Kill a run ``kills`` times, then let it finish; return how many kills interrupted a write.

    After each start, the kill follows the first new checkpoint by a random delay. A kill during a
    write leaves the unfinished file behind.
    """
    writes, known = 0, set[str]()
    for _ in range(kills):
        before = written_at(out / LAST)
        process = subprocess.Popen(words, cwd=ROOT, stderr=subprocess.DEVNULL)
        started = time.monotonic()
        while written_at(out / LAST) == before and process.poll() is None:
            time.sleep(0.005)
        time.sleep(draw.uniform(0.0, LATEST))
        if process.poll() is not None:
            sys.exit(f"the run ended early, with exit code {process.returncode}: set more epochs")
        process.send_signal(signal.SIGKILL)
        process.wait()
        torn = {path.name for path in out.iterdir() if path.name.startswith(".")} - known
        known |= torn
        writes += bool(torn)
        step = load_training_state(out / LAST).step
        print(
            f"  killed after {time.monotonic() - started:.1f} s"
            f"{', during a write' if torn else ''}; last complete checkpoint: step {step}",
            flush=True,
        )
    subprocess.run(words, cwd=ROOT, stderr=subprocess.DEVNULL, check=True)
    return writes


def written_at(path: Path) -> int | None:
    """Return a file's modification time in nanoseconds, or None if it does not exist."""
    return path.stat().st_mtime_ns if path.exists() else None


def main() -> None:
    """Run the chosen recipes with and without kills, and compare the weights."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--recipes", nargs="+", default=RECIPES, choices=RECIPES)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    draw = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as name:
        data = Path(name) / "data"
        make_data(data)
        for recipe in args.recipes:
            alone, killed = Path(name) / f"{recipe}_alone", Path(name) / f"{recipe}_killed"
            subprocess.run(
                command(recipe, data, alone), cwd=ROOT, stderr=subprocess.DEVNULL, check=True
            )
            print(f"{recipe}:", flush=True)
            words = command(recipe, data, killed)
            writes = run_with_kills(words, killed, args.kills, draw)
            names = [FINAL, *(path.name for _, path in epoch_files(alone))]
            differing = [
                name
                for name in names
                if (alone / name).read_bytes() != (killed / name).read_bytes()
            ]
            print(
                f"{recipe}: {args.kills} kills, {writes} of them during a write; "
                f"{len(differing)} of {len(names)} weight files differ",
                flush=True,
            )
            if differing or epoch_files(alone) == []:
                sys.exit(1)


if __name__ == "__main__":
    main()
