"""Describe a single file for the layout check."""

from __future__ import annotations

import csv
import json
import tarfile
import zipfile
from collections import Counter
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from PIL import Image

from pab.core.errors import InputError
from pab.core.file_kinds import Kind, file_kind
from pab.core.files import DAMAGED_ARCHIVE
from pab.core.text_files import wide_encoding
from pab.data.annotations import read_retrieval
from pab.data.id_lists import read_id_list
from pab.data.image_paths import data_root, is_photo_name
from pab.data.json_lines import entries, head_of, json_object
from pab.data.json_lines import lines as raw_lines
from pab.data.labelled_images import read_labelled_images
from pab.data.masked_queries import read_answers
from pab.data.photos import PHOTO_FORMATS
from pab.data.tables import SEPARATORS, TableColumns
from pab.formats.tables import is_trec_run, separator_of
from pab.layout.found import Found, blank_names, captioned_commands, count, counts_by_ending, quoted
from pab.layout.scores import describe_scores, holds_scores
from pab.layout.weights import explain_checkpoint

TENSOR_ENDINGS = frozenset((".pt", ".pth", ".bin", ".ckpt", ".safetensors"))
VIDEO_ENDINGS = frozenset((
    ".mp4", ".m4v", ".mov", ".mkv", ".avi", ".webm", ".mpg", ".mpeg", ".wmv", ".3gp", ".mts",
    ".m2ts",
))  # fmt: skip
MANIFEST = "manifest.json"  # of a search index
_HEAD = 1 << 16  # bytes of a text file that determine its kind
# Usual column names of a caption table. OpenCLIP's names, which need no flags, come first.
IMAGE_KEYS = ("filepath", "image", "image_path", "path", "file", "filename", "file_name")
CAPTION_KEYS = ("title", "caption", "text", "description")


def explain_file(path: Path) -> Found:
    """Describe a file.

    Raises:
        InputError: the file is of unknown kind or damaged, or one of its lines, ids or scores is
            invalid.
    """
    ending = path.suffix.lower()
    if ending in TENSOR_ENDINGS:
        return _tensors(path)
    if ending in (".npy", ".npz", ".parquet"):
        return describe_scores(path)
    if is_photo_name(path.name):
        return _picture(path)
    if ending in VIDEO_ENDINGS:
        return Found("a video", (), (index_command(f"--video {quoted(path)}"),))
    if path.name == MANIFEST and (index := explain_index(path.parent)) is not None:
        return index
    if ending in (".zip", ".tar"):
        return _archive(path)
    if ending == ".spm":
        command = f"python -m lhp.infer --tokenizer {quoted(path)} --checkpoint FILE"
        return Found("a SentencePiece model (LHP's tokenizer)", (), (command,))
    return _text(path)


def _unknown(path: Path, found: str) -> InputError:
    problem = f"expected annotations, captions, scores, a ranked list or weights, found {found}"
    todo = "see the supported forms in docs/scoring.md and data/README.md"
    return InputError(path, problem, todo=todo)


def _tensors(path: Path) -> Found:
    from pab.core.checkpoints import LET_IN, read_checkpoint  # imports torch
    from pab.core.tensor_files import read_tensors

    if path.suffix != ".safetensors":
        if file_kind(path).kind is Kind.TORCHSCRIPT:
            command = f"python scripts/clip_infer.py --model NAME --pretrained {quoted(path)}"
            return Found(
                "a TorchScript archive, the format of OpenAI's CLIP weights", (), (command,)
            )
        content = read_tensors(path, "scores or weights", mmap=True, also=LET_IN)
        if holds_scores(content):
            return describe_scores(path)
        if not isinstance(content, dict):
            raise _unknown(path, f"a torch.save file that contains a {type(content).__name__}")
    found = explain_checkpoint(path, read_checkpoint(path))
    if found is None:
        raise _unknown(path, "tensors of a model that this project does not have")
    return found


def _picture(path: Path) -> Found:
    try:
        with Image.open(path, formats=PHOTO_FORMATS) as image:
            facts = (f"{image.format}, {image.width} x {image.height} pixels",)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        problem = f"expected an image, found none or a damaged one ({error})"
        raise InputError(path, problem) from error
    place = quoted(path.absolute().parent)
    command = f'python -m pab.search --model clip --image_folder {place} --query "TEXT"'
    return Found("an image", facts, (command,))


def index_command(source: str) -> str:
    """Format the command that indexes images for a search."""
    return f"python -m pab.search index --model clip {source} --out output/index"


def explain_index(folder: Path) -> Found | None:
    """Describe a search index; return None for any other folder.

    Raises:
        InputError: the manifest cannot be read.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_bytes())
        rows = sum(shard["rows"] for shard in found["shards"])
        members = ", ".join(member["name"] for member in found["members"])
        facts = (f"{count(rows, 'image')} of {found['root']}", f"members: {members}")
    except OSError as error:
        raise InputError(path, f"cannot be read: {error.strerror or error}") from error
    except (ValueError, LookupError, TypeError):  # a manifest of something else
        return None
    place = quoted(folder)
    commands = (
        f'python -m pab.search query --index {place} --text "TEXT"',
        f"python -m pab.search serve --index {place}",
    )
    return Found("a search index", facts, commands)


def is_searchable(path: Path, names: Sequence[str]) -> bool:
    """Return true if a search can index an archive: an uncompressed tar file with images."""
    if path.suffix.lower() != ".tar" or not any(map(is_photo_name, names)):
        return False
    try:
        with tarfile.open(path, "r:"):
            return True
    except (OSError, tarfile.TarError):
        return False


def archive_names(path: Path) -> list[str]:
    """List the names in a zip or tar archive; for a tar, only the names of files.

    Raises:
        InputError: the archive cannot be read.
    """
    try:
        if path.suffix.lower() == ".zip":
            with zipfile.ZipFile(path) as packed:
                return packed.namelist()
        with tarfile.open(path) as archive:
            return [member.name for member in archive if member.isfile()]
    except (*DAMAGED_ARCHIVE, tarfile.TarError) as error:
        raise InputError(path, f"cannot be read: {error}") from error


def _archive(path: Path) -> Found:
    """Describe a zipped ranked list, or an archive to unpack."""
    names = archive_names(path)
    if names == ["answer.txt"]:
        command = f"python -m pab.evaluate --predictions {quoted(path)} --annotation FILE"
        return Found("a zipped ranked list for submission", ("holds answer.txt",), (command,))
    out = quoted(path.with_suffix(""))
    unpack = f"tar -xf {quoted(path)} -C"
    if path.suffix.lower() == ".zip":
        unpack = f"unzip -q {quoted(path)} -d"
    commands = [f"mkdir -p {out} && {unpack} {out}", f"python -m pab.layout check {out}"]
    what = "an archive: unpack it first"
    if is_searchable(path, names):
        what = "an archive: unpack it first, or index it as it is for a search"
        commands.append(index_command(f"--webdataset {quoted(path)}"))
    facts = (f"holds {counts_by_ending(names, 'other') or 'nothing'}",)
    return Found(what, facts, tuple(commands))


# ------------------------------------------------------------------------------------ text files


def _text(path: Path) -> Found:
    raw = head_of(path, _HEAD)
    if not raw:
        raise _unknown(path, "an empty file")
    encoding = wide_encoding(raw) or "utf-8-sig"
    try:
        head = raw.decode(encoding, errors="strict" if len(raw) < _HEAD else "ignore").lstrip()
    except UnicodeDecodeError as error:
        raise _unknown(path, "a file that is not text") from error
    if "\0" in head:
        raise _unknown(path, "a file that is not text")
    if {"[PAD]", "[UNK]"} <= set(head.split("\n", 1000)):
        command = f"python -m uit.infer --text_encoder {quoted(path.absolute().parent)}"
        return Found("BERT's vocabulary", (), (command,))
    if head[:1] in ("{", "["):
        return _json(path)
    if path.suffix.lower() in (".csv", ".tsv"):
        return _table(path, head)
    if path.suffix.lower() in (".yaml", ".yml"):
        first = head.splitlines()[0]
        commands = (first[1:].strip(),) if first.startswith("# ") else ()
        return Found("a config", ("its first comment is a command",) * bool(commands), commands)
    return _lines(path, head)


def _lines(path: Path, head: str) -> Found:
    """Describe a TREC run, a list of ids, or a ranked list."""
    lines = [line for line in head.splitlines() if line.strip()]
    if not lines:
        raise _unknown(path, "blank lines")
    whole = lines[:-1] if path.stat().st_size > _HEAD else lines  # the last line may be truncated
    if is_trec_run(whole):
        return describe_scores(path)
    lengths = {len(line.split()) for line in whole}
    if lengths == {1}:
        ids = read_id_list(path)
        command = f"python -m ensemble.run --query_order {quoted(path)} ..."
        facts = (f"{count(len(ids), 'id')}, {ids[0]} ... {ids[-1]}",)
        return Found("a list of ids, one per line", facts, (command,))
    if len(lengths) == 1 and all(len(set(line.split())) == len(line.split()) for line in whole):
        return describe_scores(path)
    raise _unknown(path, f"text that begins {lines[0][:40]!r}")


def _table(path: Path, head: str) -> Found:
    """Describe a table of images and captions, of scores with ids, or with other columns."""
    first = head.splitlines()[0]
    found = [s for s in SEPARATORS if s in first]
    headers = [next(csv.reader([first], delimiter=separator)) for separator in found]
    for separator, columns in zip(found, headers, strict=True):
        images = [name for name in IMAGE_KEYS if name in columns]
        captions = [name for name in CAPTION_KEYS if name in columns]
        if images and captions:
            return _caption_table(path, columns, TableColumns(images[0], captions[0], separator))
    start = b"".join(raw for *_, raw in islice(raw_lines(path), 2))  # the head may end in line 1
    if separator_of(start.decode("utf-8", "replace")) is not None:
        return describe_scores(path)
    columns = headers[0] if headers else [first]
    what = "a table without the usual columns of a caption table"
    command = f"python scripts/clip_infer.py --annotation {quoted(path)} --image_folder FOLDER"
    command += " --csv_image_key COLUMN --csv_caption_key COLUMN"
    return Found(what, (f"columns: {', '.join(columns)}",), (command,))


def _caption_table(path: Path, header: list[str], columns: TableColumns) -> Found:
    found = read_retrieval(path, image_folder=path.parent, columns=columns)
    assert found.gallery is not None
    absent = [str(image.path) for image in found.gallery if not image.path.is_file()]
    facts = [
        f"{count(len(found.gallery), 'image')}, {count(len(found.queries), 'caption')}",
        f"columns: {', '.join(header)}",
    ]
    problems = list(blank_names([image.gallery_id for image in found.gallery]))
    if absent:
        problems.append(f"{count(len(absent), 'image')} not found, the first {absent[0]}")
    commands = captioned_commands(path, path.parent, columns)
    if problems:  # the other commands would reject this table
        commands = (f"python -m pab.layout check {quoted(path)}",)
    what = "a table of images and captions (OpenCLIP's form)"
    return Found(what, (*facts, *problems), commands)


# ------------------------------------------------------------------------------------------ JSON


def _json(path: Path) -> Found:
    """Describe annotations, queries, an answer key, scores, or the source videos' captions."""
    if path.name == "source_caption.json":
        return Found("captions of the source videos (not used)")
    entry = next(entries(path), None)
    first = {} if entry is None else json_object(entry[2], path, f"line {entry[0]}")
    if "query_index" in first and ("topk_gallery" in first or "reranked" in first):
        return describe_scores(path)
    if "query_index" in first:
        return _queries(path)
    if "image" in first or "image_id" in first:
        return _pairs(path)
    values = list(first.values())
    if values and all(isinstance(value, dict) for value in values):
        if all("gallery" in value for value in values):
            return _answers(path)
        if all(type(score) in (int, float) for value in values for score in value.values()):
            return describe_scores(path)
    if values and all(isinstance(value, str) for value in values):
        return _queries(path)
    raise _unknown(path, "JSON of another form")


def _queries(path: Path) -> Found:
    queries = read_retrieval(path).queries
    number = count(len(queries), "query", "queries")
    facts = (f"{number}, {queries[0].query_id} ... {queries[-1].query_id}",)
    gallery = path.absolute().parent / "gallery"
    folder = quoted(gallery) if gallery.is_dir() else "FOLDER"
    command = f"python -m lhp.infer --annotation {quoted(path)} --image_folder {folder}"
    return Found("queries of a name-masked set", facts, (command,))


def _pairs(path: Path) -> Found:
    """Describe training pairs or a labelled test set (one caption or a list of them per line)."""
    lines = list(read_labelled_images(path))
    captions = sum(len(line.captions) for line in lines)
    kinds = Counter(line.is_normal for line in lines)
    facts = [f"{count(len(lines), 'image')}, {count(captions, 'caption')}"]
    if kinds[True] or kinds[False]:
        facts.append(f"{kinds[True]:,} normal, {kinds[False]:,} abnormal")
    twins = sum(line.twin_id is not None for line in lines)
    if twins:
        facts.append(f"{count(twins, 'twin')} (hard_i_id)")
    try:
        root = data_root(path)
    except InputError:  # outside an annotation folder, the user must pass the image folder
        root = None
    folder = "FOLDER" if root is None else quoted(root)
    score = f"python -m lhp.infer --annotation {quoted(path)} --image_folder {folder}"
    if root is not None and path.absolute().is_relative_to(root / "annotation/train"):
        shard = quoted(path.absolute().relative_to(root))
        train = f"python -m lhp.train --config configs/lhp/finetune.yaml --data_path {folder}"
        return Found("annotated images", tuple(facts), (f"{train} --train_shards {shard}", score))
    return Found("annotated images", tuple(facts), (score,))


def _answers(path: Path) -> Found:
    key = read_answers(path)
    normal = sum(answer.is_normal is True for answer in key.values())
    facts = (count(len(key), "answer"), f"{normal:,} normal")
    queries = path.absolute().parent / "query.json"
    annotation = quoted(queries) if queries.is_file() else "QUERIES"
    command = f"python -m pab.evaluate --predictions LIST.txt --annotation {annotation}"
    what = "the answer key of a name-masked set"
    return Found(what, facts, (f"{command} --answers {quoted(path)}",))
