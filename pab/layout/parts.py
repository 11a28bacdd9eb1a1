"""Check which parts of PAB are present under a data root, and which commands can use them.

Every annotation line is checked. Images are checked by listing folders, which is fast even for a
million images. No image is decoded; the commands that read images report damaged ones.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from pathlib import Path

from pab.core.errors import InputError
from pab.data.annotations import read_retrieval
from pab.data.bad_lines import BadLines
from pab.data.id_lists import read_query_order
from pab.data.image_paths import ImageFinder, file_names, is_image_name
from pab.data.labelled_images import read_labelled_images
from pab.data.pairs import read_shards
from pab.data.tree import SHARD_FOLDERS, find_shards, labelled_test
from pab.layout.found import count, quoted

# PAB's published numbers: training shards, and lines per part.
PAB_SHARDS, PAB_TRAIN, PAB_TEST, PAB_UCC = 75, 1_013_605, 1_978, 5_320

PAB_SOURCE = "https://github.com/Shuyu-XJTU/CMP"
CHALLENGE_SOURCE = "https://github.com/Shuyu-XJTU/WWW2025Workshop"
FETCH = (
    f"download PAB from {PAB_SOURCE} (see data/README.md), or render the mini data: "
    "python -m pab.mini --out data/mini"
)

MASKED, TRACK4 = "name-masked_test-set", "track4/name-masked_test-set"
QUERY_FILES = ("query.json", "query_text.json")  # of a name-masked set
SOURCE_CAPTIONS = "annotation/source_caption.json"


@dataclass(frozen=True)
class Part:
    """Description of a part of PAB under a data root."""

    name: str
    place: str  # annotation file or files, relative to the root
    published: int  # lines in PAB
    lines: int | None = None  # None if the annotation is missing
    # Images named by the lines; None for a missing annotation and for a name-masked set.
    named: int | None = None
    found: int = 0  # named images whose file exists; for a name-masked set, images in gallery/
    missing: tuple[str, ...] = ()  # descriptions of missing files
    commands: tuple[str, ...] = ()  # commands that use the part
    bad: BadLines = field(default_factory=BadLines)

    @property
    def usable(self) -> bool:
        """True if a command can use the part."""
        return bool(self.lines and self.found and self.commands)

    def row(self) -> str:
        """Format the part as a row of the table."""
        lines = "-" if self.lines is None else f"{self.lines:,}"
        images = "-" if self.lines is None else f"{self.found:,}"
        if self.named is not None:
            images += f" of {self.named:,}"
        return f"{self.name:<16} {self.place:<44} {lines:>10} {self.published:>10,}   {images}"


def is_data_root(folder: Path) -> bool:
    """Return true if a folder looks like the data root of PAB or of a part of PAB."""
    if any((folder / name).is_dir() for name in ("annotation", MASKED, "track4")):
        return True
    return any(
        re.fullmatch(r"imgs_\d+", path.name)
        for place in (folder / "train", *folder.glob("Part *"))
        if place.is_dir()
        for path in place.iterdir()
    )


def check_root(root: Path) -> list[Part]:
    """Check a data root.

    Raises:
        InputError: a file cannot be read, no part can be used, or a name-masked set is invalid (see
            :func:`masked_part`).
    """
    finder = ImageFinder(root)
    parts = [_shards(root, finder, "training", SHARD_FOLDERS[0])]
    if "attr_" not in parts[0].place:  # otherwise the first part already has the actions
        parts.append(_shards(root, finder, "training actions", SHARD_FOLDERS[1]))
    test = labelled_test(root)
    parts.append(_labelled(root, finder, "test", f"annotation/test/{test.name}", PAB_TEST))
    if test.name == "pair.json":  # otherwise only attr.json exists, and is checked above
        parts.append(_labelled(root, finder, "test actions", "annotation/test/attr.json", PAB_TEST))
    parts.append(_labelled(root, finder, "out of domain", "annotation/test/ucc.json", PAB_UCC))
    parts.append(masked_part(root, "masked test", MASKED))
    if (root / "track4").is_dir():
        parts.append(masked_part(root, "Track 4", TRACK4))
    if not any(part.usable for part in parts):
        for part in parts:
            part.bad.check(root / part.place)
        problem = "expected PAB's annotations and images, found no part that can be used"
        raise InputError(root, problem, todo=FETCH)
    return parts


def report(root: Path, parts: list[Part]) -> list[str]:
    """Format the result: a table, other data, bad lines, missing files, and their sources."""
    images = "images found, of those listed"
    head = f"{'part':<16} {'place':<44} {'lines':>10} {'PAB has':>10}   {images}"
    text = [f"{root}", head, *(part.row() for part in parts), *_others(root), *_bad_lines(parts)]
    missing = [f"  {line}" for part in parts for line in part.missing]
    if not missing:
        return [*text, "", "all parts found"]
    return [
        *text,
        "",
        "missing:",
        *missing,
        "",
        f"PAB (annotations, training images, test images): {PAB_SOURCE}",
        f"name-masked test set of the challenge: {CHALLENGE_SOURCE}",
        f"unpack them to {root}/annotation, {root}/train, ... (see data/README.md)",
    ]


def root_commands(root: Path, parts: list[Part]) -> list[str]:
    """List the commands to run next on a data root."""
    commands = [command for part in parts if part.usable for command in part.commands]
    scored = {part.name for part in parts if part.usable} & {"test", "masked test"}
    if scored:
        commands.append(f"DATA={quoted(root)} bash scripts/reproduce.sh")
    return list(dict.fromkeys(commands))


def _bad_lines(parts: list[Part]) -> list[str]:
    text = []
    for part in parts:
        bad = part.bad
        if bad.total:
            text.append(f"  {part.place}: {count(bad.total, 'bad line')} ({bad.summary()})")
            text += [f"    {fault}" for fault in bad.first]
            if bad.total > len(bad.first):
                text.append(f"    and {bad.total - len(bad.first):,} more")
    return ["", "bad lines:", *text] if text else []


def _others(root: Path) -> list[str]:
    """List data of the release that no command uses."""
    found = []
    if (root / SOURCE_CAPTIONS).is_file():
        found.append(f"{SOURCE_CAPTIONS} (captions of the source videos)")
    poses = root / "pose"
    if poses.is_dir():
        kinds = ", ".join(sorted(path.name for path in poses.iterdir() if path.is_dir()))
        found.append(f"pose/ (pose images: {kinds or 'none'})")
    return ["", f"also found, but not used: {'; '.join(found)}"] if found else []


def _shards(root: Path, finder: ImageFinder, name: str, folder: str) -> Part:
    """Describe a folder of training shards, which may contain fewer than PAB has."""
    try:
        shards = find_shards(root, [folder])
    except InputError:  # no shards: treat as a missing folder
        return Part(name, folder, PAB_TRAIN, missing=(f"{folder}/: {PAB_SHARDS} shards",))
    place = f"{folder}/{shards[0].name.partition('_')[0]}_*.json ({len(shards)})"
    commands: tuple[str, ...] = (
        f"python -m lhp.train --config configs/lhp/finetune.yaml --data_path {quoted(root)}",
        f"python -m uit.run --task cmp --data_path {quoted(root)}",
    )
    bad = BadLines()
    images = [pair.image for pair in read_shards(shards, root, bad)]
    if bad.total:  # training can skip bad lines
        commands = tuple(f"{command} --skip_bad_lines" for command in commands)
    return _counted(Part(name, place, PAB_TRAIN, commands=commands, bad=bad), finder, images)


def _labelled(root: Path, finder: ImageFinder, name: str, place: str, published: int) -> Part:
    if not (root / place).is_file():
        return Part(name, place, published, missing=(f"{place}: {published:,} lines",))
    file, folder = quoted(root / place), quoted(root)
    commands = (f"python -m lhp.infer --annotation {file} --image_folder {folder}",)
    bad = BadLines()
    images = [line.image for line in read_labelled_images(root / place, root, bad)]
    part = Part(name, place, published, commands=() if bad.total else commands, bad=bad)
    return _counted(part, finder, images)


def _counted(part: Part, finder: ImageFinder, images: list[str]) -> Part:
    """Add the numbers of lines and of images found, and a description of missing images."""
    absent = finder.absent(images)
    missing: tuple[str, ...] = ()
    if absent:
        missing = (f"{count(len(absent), 'image')} of {part.place}, the first {absent[0]}",)
    n, found = len(images), len(images) - len(absent)
    return replace(part, lines=n, named=n, found=found, missing=missing)


def query_file(folder: Path) -> Path | None:
    """Return the query file of a name-masked set; None if there is none."""
    return next((folder / name for name in QUERY_FILES if (folder / name).is_file()), None)


def masked_part(root: Path, name: str, folder: str) -> Part:
    """Describe a name-masked set; its annotation does not list the gallery images.

    Args:
        root: the data root, or the folder of a single set.
        name: name of the part.
        folder: folder of the set, relative to the root; "." is the root itself.

    Raises:
        InputError: the queries or the query order cannot be read, a line is bad, or the query
            order has other query ids.
    """
    home = root / folder
    queries, gallery, order = query_file(home), home / "gallery", home / "query_index.txt"
    if queries is None:
        missing = (f"{folder}/: query.json and gallery/",)
        return Part(name, f"{folder}/query.json", PAB_TEST, missing=missing)
    ids = [query.query_id for query in read_retrieval(queries).queries]
    command = [f"python -m lhp.infer --annotation {quoted(queries)}"]
    command.append(f"--image_folder {quoted(gallery)}")
    if order.is_file():
        if set(read_query_order(order)) != set(ids):
            raise InputError(order, f"expected the query ids of {queries}, found other ids")
        command.append(f"--query_order {quoted(order)}")
    if (home / "answers.json").is_file():
        command.append(f"--answers {quoted(home / 'answers.json')}")
    names = file_names(gallery) if gallery.is_dir() else []
    found = sum(map(is_image_name, names))
    lacking = () if found else (f"{folder}/gallery/: the images to search in",)
    place = f"{folder}/{queries.name}"
    return Part(name, place, PAB_TEST, len(ids), None, found, lacking, (" ".join(command),))
