"""Find PAB's annotation files under a data root, by their names in the releases."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from pab.core.counts import counted
from pab.core.errors import InputError
from pab.core.files import existing_folder
from pab.core.notices import notice

# Folders and names of training shards. All contain the same pairs; attr_N.json adds the actions.
SHARD_FOLDERS = ("annotation/train", "annotation/train_attr")
SHARD_NAMES = ("pair", "attr", "imgs")
TEST_NAMES = ("pair.json", "attr.json")  # in annotation/test; both contain the same pairs


def find_shards(root: Path, folders: Sequence[str] = SHARD_FOLDERS) -> list[Path]:
    """Find training shards under a data root, in order of N.

    Shards are named ``pair_N.json``, ``attr_N.json`` or ``imgs_N.json``. If shards have several of
    these names or are in several folders, only the largest set with one name in one folder is used,
    with a notice. Among equal sets, the first folder wins, then the first name in this order.

    Args:
        root: the data root.
        folders: folders to search, relative to the root.

    Raises:
        InputError: there are no shards, or the data root does not exist.
    """
    existing_folder(root, "the data root")
    kinds: dict[str, list[Path]] = {}
    for folder in folders:
        files = sorted((root / folder).iterdir()) if (root / folder).is_dir() else []
        for name in SHARD_NAMES:
            found = [path for path in files if re.fullmatch(rf"{name}_\d+\.json", path.name)]
            if found:
                kinds[f"{folder}/{name}_N.json"] = sorted(found, key=shard_order)
    if not kinds:
        problem = "expected training shards pair_N.json, attr_N.json or imgs_N.json, found none"
        todo = f"see data/README.md, or check the data with: python -m pab.layout check {root}"
        raise InputError(root / folders[0], problem, todo=todo)
    taken = max(kinds, key=lambda kind: len(kinds[kind]))  # the first one wins ties
    shown = {kind: f"{kind} ({counted(len(found), 'file')})" for kind, found in kinds.items()}
    chosen = shown.pop(taken)
    if shown:
        others = ", ".join(shown.values())
        notice(root, f"reading {chosen}, not {others}: all contain the same pairs")
    return kinds[taken]


def shard_order(path: Path) -> tuple[int, str]:
    """Return a sort key by the number in a shard's name, so that pair_2 comes before pair_10."""
    return (shard_number(path), str(path))


def shard_number(path: Path) -> int:
    """Return the last number in a file name; -1 if there is none."""
    number = re.search(r"(\d+)\D*$", path.name)
    return int(number.group(1)) if number else -1


def labelled_test(root: str | Path) -> Path:
    """Find the labelled test set of a data root: ``pair.json``, or ``attr.json`` in newer releases.

    If both are missing, the path of ``pair.json`` is returned, and reading it reports the problem.
    """
    first, *others = (Path(root, "annotation/test", name) for name in TEST_NAMES)
    for other in others:
        if not first.exists() and other.exists():
            notice(first, f"not found; reading {other.name}, which has the same contents")
            return other
    return first
