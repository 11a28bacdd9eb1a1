"""Read one training shard line by line, without an index."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from pab.core.files import existing_file
from pab.data.pairs import train_pair
from pab.data.record_lines import read_records
from pab.data.records import TrainPair


def read_train_pairs(path: str | Path) -> Iterator[TrainPair]:
    """Yield the valid pairs of a shard, then raise one InputError for all bad lines."""
    return read_records(existing_file(path, "a training annotation file"), train_pair)
