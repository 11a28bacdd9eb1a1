"""Kill a re-ranking run at random moments and resume it: `python -m tests.kill_and_rerank`.

One run is never interrupted. Another run is killed (SIGKILL) several times and restarted with the
same command. At the end, both score files must be equal, byte for byte. Each kill may lose only the
batch that is being scored.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from pab.scores import load_scores
from tests.conftest import make_data
from tests.small_reranker import make_candidates, make_reranker, rerank_words

ROOT = Path(__file__).resolve().parents[1]
SLOWED = 0.05  # seconds added per batch, so that kills also fall before, between and after writes
BATCH = 3
# Runs the command. Before each batch, appends the number of its pairs to a file.
COUNTING = """\
import sys, time
from pab.encoders.st.pair_inputs import PairModel
from scripts.rerank_infer import main
log, seconds, original = sys.argv[1], float(sys.argv[2]), PairModel.scores
def scores(self, inputs):
    with open(log, "a") as file:
        file.write(f"{len(inputs['input_ids'])}\\n")
    time.sleep(seconds)
    return original(self, inputs)
PairModel.scores = scores
main(sys.argv[3:])
"""


def scored_pairs(log: Path) -> list[int]:
    """Return the number of pairs of each batch that was begun."""
    return [int(line) for line in log.read_text().split()] if log.exists() else []


def start(words: list[str], log: Path) -> subprocess.Popen[bytes]:
    """Start a run that writes the number of pairs of each batch to ``log``."""
    return subprocess.Popen(
        [sys.executable, "-c", COUNTING, str(log), str(SLOWED), *words],
        cwd=ROOT, stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},  # rounding depends on the number of threads
    )  # fmt: skip


def kill_after(words: list[str], log: Path, batches: int, delay: float) -> int:
    """Kill a run after it has begun some batches; return how many it began.

    Args:
        words: arguments of the command.
        log: see :func:`start`.
        batches: number of batches to wait for.
        delay: seconds between the start of the last of these batches and the kill.

    Raises:
        SystemExit: the run ended before it could be killed.
    """
    before = len(scored_pairs(log))
    process = start(words, log)
    while len(scored_pairs(log)) < before + batches and process.poll() is None:
        time.sleep(0.002)
    time.sleep(delay)
    if process.poll() is not None:
        sys.exit(f"the run ended early, with exit code {process.returncode}")
    process.send_signal(signal.SIGKILL)
    process.wait()
    return len(scored_pairs(log)) - before


def main() -> None:
    """Re-rank the tiny test set with and without kills, and compare the score files."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    draw = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_data(folder / "data")
        model = make_reranker(folder / "model")
        first = make_candidates(folder / "data", folder / "first.pt")
        words = {
            run: rerank_words(
                model, folder / "data", first, save_score=folder / f"{run}.pt", k_test=10,
                batch_size=BATCH, feature_cache_dir=folder / run,
            )
            for run in ("alone", "killed")
        }  # fmt: skip
        start(words["alone"], folder / "alone.log").wait()
        pairs = sum(scored_pairs(folder / "alone.log"))
        for number in range(args.kills):
            begun = kill_after(
                words["killed"],
                folder / "killed.log",
                draw.randint(1, 4),
                draw.uniform(0, 3 * SLOWED),
            )
            print(f"kill {number + 1}: after {begun} batches", flush=True)
        start(words["killed"], folder / "killed.log").wait()
        again = sum(scored_pairs(folder / "killed.log")) - pairs
        equal = (folder / "alone.pt").read_bytes() == (folder / "killed.pt").read_bytes()
        rows = len(load_scores(folder / "killed.pt").query_ids)
        print(
            f"{args.kills} kills, {pairs} pairs of {rows} queries, {BATCH} per batch: "
            f"{again} pairs scored again (at most {args.kills * BATCH}); score files "
            f"{'equal' if equal else 'differ'}"
        )
        if not equal or again > args.kills * BATCH:
            sys.exit(1)


if __name__ == "__main__":
    main()
