"""How long PAB's training annotations take to open, and what memory they hold.

Makes 75 shards with 1,013,605 lines of about 1 KB in a temporary folder, opens them twice, each
time in a fresh process, then reads pairs in random order through a DataLoader with two workers.
Prints seconds and memory, and removes the folder. Linux only (``/proc``).

    python benchmarks/training_set_memory.py [--pairs 1013605] [--folder /tmp]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from pab.training_set import TrainingSet

PAIRS, SHARDS = 1_013_605, 75  # PAB's published size
READ = 200_000
WORKERS = 2
TEXT = (
    "The image shows a person in a red jacket and dark trousers who walks along a wet road at dusk "
    "while a small dog runs beside two parked cars and a child looks up from a wooden bench"
)


def write_shards(root: Path, pairs: int) -> int:
    """Write the shards; returns their bytes."""
    folder = root / "annotation" / "train"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    vocabulary = TEXT.split()
    written = 0
    for shard, indices in enumerate(np.array_split(np.arange(pairs), SHARDS)):
        with (folder / f"pair_{shard}.json").open("w", encoding="utf-8") as handle:
            for k, words in enumerate(rng.integers(0, len(vocabulary), (len(indices), 170))):
                text = [vocabulary[word] for word in words]
                line = {
                    "image": f"train/imgs_{shard}/goal/{k}.jpg",
                    "caption": " ".join(text[:80]),
                    "image_id": f"{shard}_{k}",
                    "hard_i": f"imgs_{shard}/full/{k}.jpg",
                    "hard_c": " ".join(text[80:160]),
                    "hard_i_id": f"{shard}_{k ^ 1}",
                    "source_id": f"{int(indices[k]) // 60}_{k % 3}",
                    "source_caption": " ".join(text[160:]),
                }
                written += handle.write(json.dumps(line) + "\n")
    return written


def memory() -> dict[str, int]:
    """Memory of this process in MiB: resident now and at its peak, anonymous, private, shared."""
    fields: dict[str, int] = {}
    for name in ("smaps_rollup", "status"):
        for line in Path(f"/proc/self/{name}").read_text(encoding="ascii").splitlines():
            key, _, value = line.partition(":")
            if value.strip().endswith("kB"):
                fields[key] = int(value.split()[0])
    kib = {
        "peak": fields["VmHWM"],
        "resident": fields["Rss"],
        "anonymous": fields["Anonymous"],
        "private": fields["Private_Clean"] + fields["Private_Dirty"],
        "shared": fields["Shared_Clean"] + fields["Shared_Dirty"],
    }
    return {name: round(value / 1024) for name, value in kib.items()}


def show(what: str, seconds: float, held: dict[str, int]) -> None:
    """Print one row."""
    figures = ", ".join(f"{name} {value}" for name, value in held.items())
    print(f"{what:<34} {seconds:7.2f} s   MiB: {figures}", flush=True)


def open_once(root: Path, results: Any) -> None:
    """Open in this process and send seconds, number of pairs and memory."""
    start = time.perf_counter()
    pairs = TrainingSet.open(root)
    results.put((time.perf_counter() - start, len(pairs), memory()))


class _Captions:
    """Dataset of caption lengths; item -1 asks for the worker's memory."""

    def __init__(self, pairs: TrainingSet) -> None:
        self.pairs = pairs

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> int | dict[str, int]:
        return memory() if index < 0 else len(self.pairs[index].caption)


def read_through_loader(root: Path, results: Any) -> None:
    """Read pairs in random order with two workers; send seconds, pairs and everybody's memory."""
    from torch.utils.data import DataLoader

    pairs = TrainingSet.open(root)
    chosen = np.random.default_rng(1).permutation(len(pairs))[:READ]
    batches = [list(map(int, part)) for part in np.array_split(chosen, max(len(chosen) // 1000, 1))]
    batches += [[-1]] * WORKERS  # each worker gets one, as batches go round
    loader: DataLoader = DataLoader(
        _Captions(pairs),  # type: ignore[arg-type]
        batch_sampler=batches,
        num_workers=WORKERS,
        collate_fn=list,
        multiprocessing_context="fork",  # Linux's usual one, which this spawned process lost
    )
    before = memory()
    start = time.perf_counter()
    read = list(loader)
    seconds = time.perf_counter() - start
    results.put(
        (seconds, len(chosen), [before, memory(), *(batch[0] for batch in read[-WORKERS:])])
    )


def main(argv: list[str] | None = None) -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--pairs", type=int, default=PAIRS)
    parser.add_argument("--folder", default=None, help="where to make the temporary folder")
    args = parser.parse_args(argv)
    processes = multiprocessing.get_context("spawn")

    def in_fresh_process(work: Any, root: Path) -> Any:
        results = processes.Queue()
        process = processes.Process(target=work, args=(root, results))
        process.start()
        answer = results.get(timeout=600)
        process.join()
        return answer

    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        root = Path(name)
        start = time.perf_counter()
        size = write_shards(root, args.pairs)
        print(
            f"{args.pairs:,} lines, {size / args.pairs:.0f} bytes a line, {SHARDS} shards, "
            f"written in {time.perf_counter() - start:.0f} s"
        )
        for what in ("first open (checks every line)", "second open"):
            seconds, count, held = in_fresh_process(open_once, root)
            assert count == args.pairs
            show(what, seconds, held)
        seconds, count, (before, after, *workers) = in_fresh_process(read_through_loader, root)
        show("opened, torch imported", 0.0, before)
        show(f"read {count:,} pairs, {WORKERS} workers", seconds, after)
        for worker in workers:
            show("  a worker at the end", seconds, worker)
        print(f"{count / seconds:,.0f} pairs/s in random order")


if __name__ == "__main__":
    main()
