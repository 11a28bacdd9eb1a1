"""Measure time and memory of opening training annotations of PAB's size.

Writes 75 shards with 1,013,605 lines of about 1 KB to a temporary folder. Opens them twice, each
time in a fresh process, then reads pairs in random order through a DataLoader with two workers.
Prints seconds and memory, and removes the folder. Linux only (``/proc``).

``--odd_share`` is the fraction of irregular lines. Half of them have another valid form (numbers as
ids, unknown fields, empty optional fields, captions in lists). Half are bad, with eight kinds of
faults. With such lines, every third shard starts with a byte-order mark. The benchmark then fails
if a reported count is wrong, or if the first opening takes 100 s of CPU time or more.

    python benchmarks/training_set_memory.py [--pairs 1013605] [--odd_share 0.001] [--folder /tmp]
"""

from __future__ import annotations

import json
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from machine import flag_parser, in_fresh_process, memory_mib

from pab.core.errors import InputError
from pab.data.training_set import TrainingSet

PAIRS, SHARDS = 1_013_605, 75  # PAB's published size
LIMIT = 100.0  # maximum CPU seconds for the first opening of a set with odd lines
READ = 200_000
WORKERS = 2
TEXT = (
    "The image shows a person in a red jacket and dark trousers who walks along a wet road at dusk "
    "while a small dog runs beside two parked cars and a child looks up from a wooden bench"
)


# Fields for other valid forms of a pair; a list around the caption is the fourth form.
FORMS: list[dict[str, Any]] = [
    {"hard_i_id": 8954},
    {"camera": "c3", "quality": 0.9},
    {"source_caption": None, "hard_c": "", "scene": [1]},
]
CUT = "expected a JSON object"  # the fault of a truncated line
# Reported fault -> fields that cause it. Empty: the image field is removed, or the line truncated.
FAULTS: dict[str, dict[str, Any]] = {
    "field 'caption': expected a non-empty string": {"caption": " "},
    "field 'caption': expected a string with a visible character": {"caption": "\u200b\u2060"},
    "field 'caption': expected one caption": {"caption": ["a man", "a woman"]},
    "field 'image': expected a string": {},
    "field 'image': expected a path inside the data root": {"image": "../x.jpg"},
    "field 'image_id': expected an id (a string or a whole number)": {"image_id": 1.5},
    "expected every image_id once": {"image_id": "0_0"},
    CUT: {},
}


class OddLines:
    """Generator of odd lines: other valid forms and faults in turn.

    Attributes:
        faults: number of generated bad lines per kind.
    """

    def __init__(self, share: float) -> None:
        self.share, self.made = share, 0
        self.faults: Counter[str] = Counter()

    def text(self, line: dict[str, Any], number: int) -> str:
        """Format a line; ``number`` counts all lines from 0, and line 0 is never odd."""
        if self.made >= int(number * self.share):
            return json.dumps(line)
        self.made += 1
        at = self.made // 2
        if self.made % 2:
            forms = [*FORMS, {"caption": [line["caption"]]}]
            return json.dumps(line | forms[at % len(forms)])
        kind = list(FAULTS)[at % len(FAULTS)]
        self.faults[kind] += 1
        if kind == CUT:
            return json.dumps(line)[:-3]
        bad = line | FAULTS[kind]
        if not FAULTS[kind]:
            del bad["image"]
        return json.dumps(bad)


def write_shards(root: Path, pairs: int, odd: OddLines) -> int:
    """Write the shards; return their size in bytes, without byte-order marks."""
    folder = root / "annotation" / "train"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    vocabulary = TEXT.split()
    written = 0
    for shard, indices in enumerate(np.array_split(np.arange(pairs), SHARDS)):
        encoding = "utf-8-sig" if odd.share and shard % 3 == 0 else "utf-8"
        with (folder / f"pair_{shard}.json").open("w", encoding=encoding) as handle:
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
                written += handle.write(odd.text(line, int(indices[k])) + "\n")
    return written


def memory() -> dict[str, int]:
    """Return this process's memory, MiB: resident, peak, anonymous, private, shared."""
    rollup = {
        "resident": ("Rss",),
        "anonymous": ("Anonymous",),
        "private": ("Private_Clean", "Private_Dirty"),
        "shared": ("Shared_Clean", "Shared_Dirty"),
    }
    figures = {
        name: sum(memory_mib(key, table="smaps_rollup") for key in keys)
        for name, keys in rollup.items()
    }
    return {name: round(mib) for name, mib in {"peak": memory_mib("VmHWM"), **figures}.items()}


def show(what: str, seconds: float, held: dict[str, int]) -> None:
    """Print a row of seconds and memory."""
    figures = ", ".join(f"{name} {value}" for name, value in held.items())
    print(f"{what:<34} {seconds:7.2f} s   MiB: {figures}", flush=True)


def check_counts(root: Path, odd: OddLines) -> None:
    """Check that the reported counts of bad lines are the true ones, and print them."""
    try:
        TrainingSet.open(root)
    except InputError as error:
        message = str(error)
    else:
        raise AssertionError("the bad lines were not found")
    print(f"{odd.faults.total()} bad lines, and {odd.made - odd.faults.total()} in other forms:")
    for kind, count in odd.faults.items():
        print(f"  {count} x {kind}")
        assert f"{count} x {kind}" in message, message


def open_once(root: Path) -> tuple[float, float, int, dict[str, int]]:
    """Open the set in this process; return seconds, CPU seconds, number of pairs, memory."""
    start, worked = time.perf_counter(), time.process_time()
    pairs = TrainingSet.open(root, skip_bad_lines=True)
    return time.perf_counter() - start, time.process_time() - worked, len(pairs), memory()


@dataclass(frozen=True)
class _Captions:
    """Dataset of caption lengths; item -1 returns the worker's memory."""

    pairs: TrainingSet

    def __getitem__(self, index: int) -> int | dict[str, int]:
        return memory() if index < 0 else len(self.pairs[index].caption)


def read_through_loader(root: Path) -> tuple[float, int, list[Any]]:
    """Read pairs in random order with two workers; return seconds, number of pairs and memory.

    The memory is a list: this process before and after the reading, then each worker.
    """
    from torch.utils.data import DataLoader

    pairs = TrainingSet.open(root, skip_bad_lines=True)
    chosen = np.random.default_rng(1).permutation(len(pairs))[:READ]
    batches = [list(map(int, part)) for part in np.array_split(chosen, max(len(chosen) // 1000, 1))]
    batches += [[-1]] * WORKERS  # workers receive batches in turn, so each of them gets one
    loader: DataLoader = DataLoader(
        _Captions(pairs),  # type: ignore[arg-type]
        batch_sampler=batches,
        num_workers=WORKERS,
        collate_fn=list,
        multiprocessing_context="fork",  # the default is spawn in a spawned process such as this
    )
    before = memory()
    start = time.perf_counter()
    read = list(loader)
    seconds = time.perf_counter() - start
    return seconds, len(chosen), [before, memory(), *(batch[0] for batch in read[-WORKERS:])]


def main() -> None:
    args = flag_parser(
        __doc__,
        pairs=PAIRS,
        odd_share=(0.0, "fraction of irregular lines"),
        folder=(None, "parent of the temporary folder"),
    ).parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        root = Path(name)
        start = time.perf_counter()
        odd = OddLines(args.odd_share)
        size = write_shards(root, args.pairs, odd)
        print(
            f"{args.pairs:,} lines, {size / args.pairs:.0f} bytes per line, {SHARDS} shards, "
            f"written in {time.perf_counter() - start:.0f} s"
        )
        bad = odd.faults.total()
        took = []
        for what in ("first open (checks every line)", "second open"):
            seconds, worked, count, held = in_fresh_process(open_once, root)
            assert count == args.pairs - bad, f"{bad} bad lines, {count} pairs"
            show(what, seconds, held)
            took.append((seconds, worked))
        if odd.share:
            check_counts(root, odd)
            seconds, worked = took[0]
            print(
                f"first open: {seconds:.1f} s, {worked:.1f} s of CPU time, limit {LIMIT:.0f} s: "
                f"ratio {worked / LIMIT:.2f}"
            )
            assert worked < LIMIT, "the first opening takes too long"
        seconds, count, (before, after, *workers) = in_fresh_process(read_through_loader, root)
        show("opened, torch imported", 0.0, before)
        show(f"read {count:,} pairs, {WORKERS} workers", seconds, after)
        for worker in workers:
            show("  a worker at the end", seconds, worker)
        print(f"{count / seconds:,.0f} pairs/s in random order")


if __name__ == "__main__":
    main()
