"""``python -m pab.layout check ROOT``: what of PAB's data is there, and what is to be fetched.

Every annotation line is checked on the way. Images are looked for by listing folders, which stays
quick for a million of them; whether they can be decoded is for the commands that read them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from pab.annotations import read_labelled_images, read_query_order, read_retrieval
from pab.config import CommandParser
from pab.data_tree import find_shards
from pab.errors import InputError, run_cli
from pab.files import existing_folder
from pab.image_paths import IMAGE_ENDINGS, spellings

# What PAB publishes: training shards, and lines of its parts.
PAB_SHARDS, PAB_TRAIN, PAB_TEST, PAB_UCC = 75, 1_013_605, 1_978, 5_320

PAB_SOURCE = "https://github.com/Shuyu-XJTU/CMP"
CHALLENGE_SOURCE = "https://github.com/Shuyu-XJTU/WWW2025Workshop"


@dataclass(frozen=True)
class Part:
    """One part of the data as it was found.

    Attributes:
        name: what it is.
        place: file or files, relative to the root.
        published: how many lines PAB has there.
        lines: how many lines are there; None where the annotation is missing.
        named: images that the lines name; None for a masked set, whose lines name none.
        found: how many images are there.
        missing: what to say of what is not there; empty if all is.
    """

    name: str
    place: str
    published: int
    lines: int | None = None
    named: int | None = None
    found: int = 0
    missing: tuple[str, ...] = ()

    @property
    def usable(self) -> bool:
        """Whether a command could do something with it."""
        return bool(self.lines and self.found)

    def row(self) -> str:
        """The part as a line of the table."""
        lines = "-" if self.lines is None else f"{self.lines:,}"
        images = "-" if self.lines is None else f"{self.found:,}"
        if self.named is not None:
            images += f" of {self.named:,}"
        return f"{self.name:<16} {self.place:<44} {lines:>10} {self.published:>10,}   {images}"


def check(root: str | Path) -> list[Part]:
    """Look through a data root.

    Raises:
        InputError: the root is missing, a line of a file is bad (named), or no part can be used.
    """
    fetch = f"download PAB from {PAB_SOURCE} (see data/README.md), or make the mini data"
    if not Path(root).exists():
        raise InputError(root, "expected the data root, found no such folder", todo=fetch)
    root = existing_folder(root, "the data root")
    parts = [_shards(root, "training", "annotation/train")]
    if "attr_" not in parts[0].place:  # else the release has one set of shards, with actions
        parts.append(_shards(root, "training actions", "annotation/train_attr"))
    parts += [
        _labelled(root, "test", "annotation/test/pair.json", PAB_TEST),
        _labelled(root, "test actions", "annotation/test/attr.json", PAB_TEST),
        _labelled(root, "out of domain", "annotation/test/ucc.json", PAB_UCC),
        _masked(root, "masked test", "name-masked_test-set"),
    ]
    if (root / "track4").is_dir():
        parts.append(_masked(root, "Track 4", "track4/name-masked_test-set"))
    if not any(part.usable for part in parts):
        raise InputError(
            root,
            "expected PAB's annotations and images, found no part that can be used",
            todo=fetch,
        )
    return parts


def report(root: str | Path, parts: list[Part]) -> str:
    """The findings as text: a table, then what is missing and where it comes from."""
    head = (
        f"{'part':<16} {'place':<44} {'lines':>10} {'PAB has':>10}   images found, of those named"
    )
    text = [f"{root}", head, *(part.row() for part in parts)]
    missing = [f"  {line}" for part in parts for line in part.missing]
    if missing:
        text += [
            "",
            "not there:",
            *missing,
            "",
            f"PAB (annotations, training images, test images): {PAB_SOURCE}",
            f"name-masked test set of the challenge: {CHALLENGE_SOURCE}",
            f"unpack them so that {root}/annotation, {root}/train, ... stand as in data/README.md",
        ]
    else:
        text += ["", "all parts are there"]
    return "\n".join(text)


def _shards(root: Path, name: str, folder: str) -> Part:
    """A folder of training shards, which may be fewer than PAB has."""
    if not (root / folder).is_dir():
        return Part(name, folder, PAB_TRAIN, missing=(f"{folder}/: {PAB_SHARDS} shards",))
    shards = find_shards(root, [folder])
    place = f"{folder}/{shards[0].name.partition('_')[0]}_*.json ({len(shards)})"
    return _count(root, name, place, shards, PAB_TRAIN)


def _labelled(root: Path, name: str, place: str, published: int) -> Part:
    if not (root / place).is_file():
        return Part(name, place, published, missing=(f"{place}: {published:,} lines",))
    return _count(root, name, place, [root / place], published)


def _count(root: Path, name: str, place: str, files: list[Path], published: int) -> Part:
    lines, found, first_missing = 0, 0, None
    for file in files:
        for image in read_labelled_images(file):
            lines += 1
            if _is_there(root, image.image):
                found += 1
            elif first_missing is None:
                first_missing = image.image
    missing: tuple[str, ...] = ()
    if first_missing is not None:
        missing = (f"{lines - found:,} images of {place}, the first {first_missing}",)
    return Part(name, place, published, lines, lines, found, missing)


def _masked(root: Path, name: str, folder: str) -> Part:
    """A name-masked set; nothing in it says how many images belong in its gallery."""
    query_file, gallery = root / folder / "query.json", root / folder / "gallery"
    place = f"{folder}/query.json"
    if not query_file.is_file():
        return Part(name, place, PAB_TEST, missing=(f"{folder}/: query.json and gallery/",))
    queries = [query.query_id for query in read_retrieval(query_file).queries]
    order = root / folder / "query_index.txt"
    if order.is_file() and set(read_query_order(order)) != set(queries):
        raise InputError(order, f"expected the query ids of {query_file}, found other ids")
    found = sum(Path(n).suffix.lower() in IMAGE_ENDINGS for n in _names(gallery) if n[0] != ".")
    missing = () if found else (f"{folder}/gallery/: the images to search in",)
    return Part(name, place, PAB_TEST, len(queries), None, found, missing)


def _is_there(root: Path, image: str) -> bool:
    return any(
        os.path.basename(path) in _names(root / os.path.dirname(path))  # noqa: PTH119, PTH120
        for path in spellings(os.path.normpath(image))
    )


@lru_cache(maxsize=64)  # the folders of one shard are asked for many times, then never again
def _names(folder: Path) -> frozenset[str]:
    if not folder.is_dir():
        return frozenset()
    try:
        return frozenset(_listing(folder))
    except OSError as error:
        raise InputError(folder, f"cannot be listed: {error.strerror or error}") from error


def _listing(folder: Path) -> Iterator[str]:
    with os.scandir(folder) as entries:
        yield from (entry.name for entry in entries)


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = CommandParser(
        prog="python -m pab.layout", description="Look at the data folder.", allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True)
    checking = commands.add_parser(
        "check", help="what is there, what is missing", allow_abbrev=False
    )
    checking.add_argument("root", nargs="?", default="data/PAB", help="default: data/PAB")
    args = parser.parse_args(argv)
    _names.cache_clear()
    print(report(args.root, check(args.root)))


if __name__ == "__main__":
    run_cli(main)
