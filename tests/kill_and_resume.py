"""Kill a training run at random moments and resume it: `python -m tests.kill_and_resume`.

For each recipe: one run that is left alone, and one that is killed (SIGKILL) again and again, also
while it writes a checkpoint (it writes one after every step), and started anew with the same
command. In the end both must have the same weights of every epoch, byte for byte.
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

from lhp.train_tokenizer import train_tokenizer
from pab.core.checkpoints import load_training_state
from pab.data.training_set import TrainingSet
from pab.training.loop import FINAL
from pab.training.resume import LAST, epoch_files
from tests.conftest import MODEL, make_data
from uit.make_vocabulary import make_vocabulary

LATEST = 1.5  # seconds of training after which a kill comes at the latest
ROOT = Path(__file__).resolve().parents[1]
MINI = ROOT / "checkpoints/mini"
RECIPES = ("lhp", "uit", "clip", "blip2")
SHARED = {
    "batch_size": 4, "epochs": 80, "num_workers": 0, "device": "cpu", "dtype": "fp32",
    "save_every_steps": 1, "val_pairs": 4, "lr": 1e-3,
}  # fmt: skip


def command(recipe: str, data: Path, out: Path) -> list[str]:
    """A small run of a recipe; what it needs beside the pairs is made when it is missing."""
    captions = [pair.caption for pair in TrainingSet.open(data)]
    if not (data / "t.spm").is_file():
        train_tokenizer(captions, data / "t.spm", 64)
        make_vocabulary(captions, data / "words", 100)
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
    }[recipe]  # fmt: skip
    settings = {**SHARED, **own, "data_path": data, "output_dir": out}
    return [
        sys.executable, *program,
        *(word for key, value in settings.items() for word in (f"--{key}", str(value))),
    ]  # fmt: skip


def killed_again_and_again(words: list[str], out: Path, kills: int, draw: random.Random) -> int:
    """Run to the end in spite of kills, each while it trains; how many hit a write.

    A kill comes when the run has written its first checkpoint since it was started, and a random
    moment later. One that hits a write leaves the unfinished file behind.
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
            sys.exit(f"the run ended by itself, with {process.returncode}: make it longer")
        process.send_signal(signal.SIGKILL)
        process.wait()
        torn = {path.name for path in out.iterdir() if path.name.startswith(".")} - known
        known |= torn
        writes += bool(torn)
        step = load_training_state(out / LAST).step
        print(
            f"  killed after {time.monotonic() - started:.1f} s, last whole checkpoint: step {step}"
            f"{', while it wrote the next' if torn else ''}",
            flush=True,
        )
    subprocess.run(words, cwd=ROOT, stderr=subprocess.DEVNULL, check=True)
    return writes


def written_at(path: Path) -> int | None:
    """When a file was written, nanoseconds; None where there is none."""
    return path.stat().st_mtime_ns if path.exists() else None


def main() -> None:
    """Read the command line, kill, compare."""
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
            writes = killed_again_and_again(words, killed, args.kills, draw)
            names = [FINAL, *(path.name for _, path in epoch_files(alone))]
            differing = [
                name
                for name in names
                if (alone / name).read_bytes() != (killed / name).read_bytes()
            ]
            print(
                f"{recipe}: {args.kills} kills, {writes} of them while it wrote; "
                f"{len(differing)} of {len(names)} weight files differ",
                flush=True,
            )
            if differing or epoch_files(alone) == []:
                sys.exit(1)


if __name__ == "__main__":
    main()
