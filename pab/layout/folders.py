"""Describe folders for the layout check, except data roots of PAB."""

from __future__ import annotations

import os
import re
from collections import Counter
from pathlib import Path

from pab.core.errors import InputError
from pab.data.bad_lines import BadLines
from pab.data.image_paths import file_names, is_photo_name, part_of
from pab.data.tables import TABLE_ENDINGS, TableColumns, captioned_images, is_captioned_folder
from pab.data.tree import shard_number
from pab.layout.files import (
    VIDEO_ENDINGS,
    archive_names,
    explain_index,
    index_command,
    is_searchable,
)
from pab.layout.found import Found, blank_names, captioned_commands, count, counts_by_ending, quoted
from pab.layout.parts import masked_part, query_file
from pab.layout.weights import explain_weight_folder

# Weight files of a training run; the first is preferred.
_RUN_WEIGHTS = ("checkpoint-best.pth", "checkpoint-final.pth")
KNOWN_ENDINGS = frozenset((
    ".json", ".jsonl", ".csv", ".tsv", ".txt", ".pt", ".pth", ".bin", ".safetensors", ".npy",
    ".npz", ".parquet", ".zip", ".yaml",
))  # fmt: skip


def explain_folder(folder: Path) -> Found:
    """Describe a folder that is not a data root.

    Raises:
        InputError: the folder is of unknown kind, a file in it is damaged or cannot be read, or a
            name-masked set is incomplete or invalid.
    """
    names = sorted(file_names(folder))
    index = explain_index(folder)
    if index is not None:
        return index
    if (folder / "gallery").is_dir() or query_file(folder):
        return _masked(folder)
    if not any(map(is_photo_name, names)):  # opening every image of a gallery would be slow
        weights = explain_weight_folder(folder)
        if weights is not None:
            return weights
    shards = [path for path in folder.iterdir() if re.fullmatch(r"imgs_\d+", path.name)]
    if shards:
        return _image_shards(folder, [shard_number(path) for path in shards])
    tars = [name for name in names if name.endswith(".tar")]
    if tars:
        return _tars(folder, tars)
    nested = _nested_photos(folder)
    if nested or any(map(is_photo_name, names)):
        return _pictures(folder, names, nested)
    videos = _videos(folder, names)
    endings = Counter(Path(name).suffix.lower() for name in names if name[0] != ".")
    known = ", ".join(f"{endings[e]} {e}" for e in sorted(endings) if e in KNOWN_ENDINGS)
    if videos is not None and not known:
        return videos
    if known:
        first = next((name for name in _RUN_WEIGHTS if name in names), None)
        facts = [f"files of known kinds to check: {known}"]
        if first and (folder / "model").is_dir() and explain_weight_folder(folder / "model"):
            first = "model"  # the checkpoints of an embedder or reranker are not scored
            facts.append("the model of this run: model/")
        first = first or next(n for n in names if Path(n).suffix.lower() in KNOWN_ENDINGS)
        command = f"python -m pab.layout check {quoted(folder / first)}"
        more = videos or Found("", (), ())
        return Found("a folder of files", (*facts, *more.facts), (command, *more.commands))
    below = sum(path.is_dir() for path in folder.iterdir())
    found = f"{count(len(names), 'file')} of other kinds and {count(below, 'folder')}"
    problem = f"expected data, photographs, scores or weights, found {found}"
    raise InputError(folder, problem, todo="check one of the files or folders in it")


def _videos(folder: Path, names: list[str]) -> Found | None:
    """Describe the videos of a folder; return None if it has none."""
    videos = [name for name in names if _is_video(name)]
    if not videos:
        return None
    endings = sorted({Path(name).suffix for name in videos})
    files = " ".join(f"{quoted(folder)}/*{ending}" for ending in endings)
    return Found(count(len(videos), "video"), (), (index_command(f"--video {files}"),))


def _is_video(name: str) -> bool:
    return name[0] != "." and Path(name).suffix.lower() in VIDEO_ENDINGS


def _masked(folder: Path) -> Found:
    part = masked_part(folder, "set", ".")
    lines = "no queries" if part.lines is None else count(part.lines, "query", "queries")
    images = count(part.found, "image")
    facts = (f"{lines}, {images} in gallery/", *part.missing)
    if not part.usable:
        problem = f"expected query.json and gallery/ with images, found {lines} and {images}"
        raise InputError(folder, problem, todo="add the missing files")
    return Found("a name-masked set (as in the challenge or in Track 4)", facts, part.commands)


def _image_shards(folder: Path, numbers: list[int]) -> Found:
    """Describe a part of the download, or the folder ``train/``: images without annotations."""
    parts = sorted({part_of(number) for number in numbers})
    facts = (
        f"{count(len(numbers), 'folder')} imgs_N, N from {min(numbers)} to {max(numbers)}",
        f"from part {', '.join(map(str, parts))} of the download: they belong in train/ or Part K/ "
        "of the data root, beside annotation/",
    )
    command = f"python -m pab.layout check {quoted(folder.absolute().parent)}"
    return Found("images of PAB's training shards", facts, (command,))


def _tars(folder: Path, names: list[str]) -> Found:
    """Describe WebDataset shards by the content of the first shard."""
    inside = archive_names(folder / names[0])
    out = f"{quoted(folder)}/unpacked"
    commands = [
        f'mkdir {out} && for f in {quoted(folder)}/*.tar; do tar -xf "$f" -C {out}; done',
        f"python -m pab.layout check {out}",
    ]
    facts = [
        f"{names[0]} holds {counts_by_ending(inside)}",
        "after unpacking: images and any .txt captions",
    ]
    if is_searchable(folder / names[0], inside):
        facts.append("a search can index them without unpacking")
        commands.append(index_command(f"--webdataset {quoted(folder)}"))
    return Found(f"{count(len(names), 'WebDataset tar')}", tuple(facts), tuple(commands))


def _pictures(folder: Path, names: list[str], nested: list[str]) -> Found:
    """Describe images with caption files, or photographs to search."""
    pictures = [name for name in names if is_photo_name(name)] + nested
    facts = [count(len(pictures), "image")]
    place = quoted(folder)
    if is_captioned_folder(folder):
        bad = BadLines()
        ids = [line.image_id for line in captioned_images(folder, folder, TableColumns(), bad)]
        facts += [f"{count(len(ids), 'caption')} (.txt) beside them", *blank_names(ids)]
        score, tune = captioned_commands(folder, folder, TableColumns())
        if bad.total:
            facts.append(f"{count(bad.total, 'image')} that cannot be used: {bad.summary()}")
            facts += [f"  {fault}" for fault in bad.first]
            commands: tuple[str, ...] = (f"{tune} --skip_bad_lines",)  # scoring needs all images
        else:
            commands = (score, tune)
        return Found("a folder of images with captions", tuple(facts), commands)
    recursive = ""
    if nested:
        folders = len({os.path.dirname(name) for name in nested})  # noqa: PTH120
        facts.append(f"{len(nested):,} of them in {count(folders, 'nested folder')}")
        recursive = " --recursive"
    search = f'python -m pab.search --model clip --image_folder {place}{recursive} --query "TEXT"'
    checks: list[str] = []
    videos = _videos(folder, names)
    if videos is not None:
        facts.append(f"{videos.what} beside them")
        checks += videos.commands
    tables = [name for name in names if Path(name).suffix.lower() in TABLE_ENDINGS]
    if tables:
        facts.append(f"{count(len(tables), 'table')} beside them: {', '.join(tables)}")
    checks += [f"python -m pab.layout check {quoted(folder / name)}" for name in tables]
    return Found("a folder of photographs", tuple(facts), (search, *checks))


def _nested_photos(folder: Path) -> list[str]:
    """List the images in subfolders by relative path.

    Hidden folders are skipped, and links to folders are not followed.
    """
    found = []
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if name[0] != ".")
        if Path(place) != folder:
            below = Path(place).relative_to(folder)
            found += [str(below / name) for name in sorted(names) if is_photo_name(name)]
    return found
