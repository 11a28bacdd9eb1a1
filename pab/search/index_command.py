"""Index images on the command line: `python -m pab.search index`.

The same command updates the index; it then encodes only new and changed images. See docs/search.md.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path

import numpy as np

from pab.core.commands import CommandParser
from pab.core.config import add_config_flags, load_config
from pab.core.counts import counted
from pab.core.errors import InputError
from pab.core.outputs import check_output_folder
from pab.core.progress import write_line
from pab.data.label_config import TableConfig
from pab.search.ann import KINDS, Kind, build_ann, is_current, read_record
from pab.search.build import build_index, locked
from pab.search.index import MANIFEST, UNIT, Index, read_manifest
from pab.search.jobs import BLOCK_ROWS, BuildSettings
from pab.search.libraries import library
from pab.search.members import MemberChoice, Opened, choice_of, split_members
from pab.search.ray_engine import RayEngine, ray_library
from pab.search.results import print_summary, write_unreadable
from pab.search.sources import ArchiveSource, FolderSource, Source, TableSource, VideoSource

FEW_ROWS = 100  # read to find members with several vectors per image
PROG = "python -m pab.search index"
UNREADABLE = "unreadable.txt"
SOURCES = ("image_folder", "csv", "webdataset", "video")


def build_parser() -> CommandParser:
    """Build the parser of the flags, without those of the members."""
    parser = CommandParser(
        prog=PROG, description="Index the images of a folder, a table, archives or videos.",
        epilog="--model NAME adds a member; repeat it to index the images with several members. "
        "The member's flags (--arch, --config, --checkpoint, --device, ...) follow its --model. "
        "Flags of members before the first --model apply to all members.",
    )  # fmt: skip
    data, output = parser.groups["data"], parser.groups["output"]
    data.add_argument("--image_folder", type=Path, metavar="DIR", help="folder of images")
    data.add_argument("--recursive", action="store_true", help="also index nested folders")
    data.add_argument(
        "--csv", type=Path, metavar="FILE",
        help="CSV or TSV table of images; paths are relative to --image_folder (default: the "
        "table's folder)",
    )  # fmt: skip
    add_config_flags(parser, TableConfig)
    data.add_argument(
        "--webdataset", type=Path, nargs="+", metavar="PATH",
        help="WebDataset .tar files, or folders of them",
    )  # fmt: skip
    data.add_argument("--video", type=Path, nargs="+", metavar="FILE", help="video files")
    data.add_argument(
        "--every", type=float, metavar="SECONDS",
        help="interval between the frames of --video to index; 0 indexes every frame (default: 1)",
    )  # fmt: skip
    data.add_argument(
        "--distinct", action="store_true", help="skip frames nearly identical to the last one kept"
    )
    data.add_argument(
        "--check_content", action="store_true",
        help="hash every file, even if its size and modification time are unchanged",
    )  # fmt: skip
    output.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder of the index"
    )
    output.add_argument(
        "--vectors", choices=("float16", "float32"),
        help="type of the stored vectors (default: float16, or that of the index)",
    )  # fmt: skip
    speed = parser.groups["speed"]
    speed.add_argument(
        "--ann", choices=KINDS,
        help="also build an approximate index of the first member, for query --ann: hnsw (builds "
        "slowly, answers fast) or ivf",
    )  # fmt: skip
    speed.add_argument(
        "--block", type=int, default=BLOCK_ROWS, metavar="N",
        help=f"images per block; the index is saved after each block (default: {BLOCK_ROWS})",
    )  # fmt: skip
    speed.add_argument(
        "--engine", choices=("local", "ray"), default="local",
        help="ray: encode with Ray, on all GPUs or cores of one or many machines (default: local)",
    )  # fmt: skip
    speed.add_argument(
        "--ray_address", metavar="ADDRESS",
        help="address of a running Ray cluster, such as auto or 10.0.0.1:6379 "
        "(default: start Ray on this machine)",
    )  # fmt: skip
    speed.add_argument(
        "--ray_workers", type=int, metavar="N",
        help="workers of --engine ray (default: one per GPU, or per core without GPUs)",
    )  # fmt: skip
    return parser


def main(argv: Sequence[str]) -> None:
    """Parse the command line and index the images."""
    args, choices = parse(argv)
    library("pyarrow.parquet", "search indexes")  # before any work
    engine = None
    if args.engine == "ray":
        ray_library("ray")
        engine = RayEngine(args.ray_address, args.ray_workers)
    if args.video is not None:
        library("av", "videos")
    if args.ann is not None:
        library("faiss", "approximate indexes")
    if not _is_update(args.out, choices):
        for choice in choices:  # bad flags fail early; an update with the same flags needs no check
            choice.config(PROG)
    source = source_of(args)
    check_output_folder("--out", args.out)
    if args.vectors is not None and (args.out / MANIFEST).is_file():
        before = read_manifest(args.out).members[0].dtype
        if args.vectors != before:
            problem = f"expected {before}, as the index has, found {args.vectors}"
            raise InputError("--vectors", problem, todo="leave it out, or use another --out")
    settings = BuildSettings(args.vectors or "float16", args.block, args.check_content)
    opener = partial(open_members, choices, ann=args.ann is not None)
    report = build_index(args.out, source, choices, opener, settings, engine)
    listing = args.out / UNREADABLE
    write_unreadable(listing, report.unreadable)
    encoded, removed = counted(report.encoded, "image"), counted(report.removed, "row")
    print(
        f"index: {args.out}: {encoded} encoded, {report.reused} recognized by content, "
        f"{report.kept} unchanged, {removed} removed", file=sys.stderr,
    )  # fmt: skip
    print_summary(report.rows, len(report.unreadable), listing)
    update_ann(args.out, args.ann)


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[MemberChoice]]:
    """Parse the flags of the command and of the members.

    Raises:
        InputError: a flag is invalid or missing.
    """
    # `rest` holds --model and the members' flags, in order.
    args, rest = build_parser().parse_known_args(list(argv))
    if args.every is not None and not (math.isfinite(args.every) and args.every >= 0):
        raise InputError("--every", f"expected seconds, at least 0, found {args.every}")
    if args.block < 1:
        raise InputError("--block", f"must be at least 1, found {args.block}")
    for name in ("ray_address", "ray_workers"):
        if args.engine != "ray" and getattr(args, name) is not None:
            raise InputError(f"--{name}", "is only for --engine ray", todo="remove it")
    if args.ray_workers is not None and args.ray_workers < 1:
        raise InputError("--ray_workers", f"must be at least 1, found {args.ray_workers}")
    given = [name for name in SOURCES if getattr(args, name) is not None]
    if args.csv is not None and "image_folder" in given:
        given.remove("image_folder")  # the folder of the table's paths
    if len(given) != 1:
        shown = ", ".join(f"--{name}" for name in SOURCES)
        found = ", ".join(f"--{name}" for name in given) or "none"
        raise InputError(PROG, f"expected one of {shown}, found {found}")
    needed = {
        "--every": ("video", args.every is not None), "--distinct": ("video", args.distinct),
        "--recursive": ("image_folder", args.recursive),
        **{f"--{one.name}": ("csv", hasattr(args, one.name)) for one in fields(TableConfig)},
    }  # fmt: skip
    for name, (source, is_set) in needed.items():
        if is_set and given != [source]:
            raise InputError(name, f"is only for --{source}", todo="remove it")
    choices, _ = split_members(rest)
    if not choices:
        raise InputError("--model", "expected a member, found none", todo="add --model clip")
    return args, choices


def source_of(args: argparse.Namespace) -> Source:
    """Build the source from the flags.

    Raises:
        InputError: a file of the source is missing, or a setting of the table is invalid.
    """
    if args.csv is not None:
        names = {field.name for field in fields(TableConfig)}
        given = {name: value for name, value in vars(args).items() if name in names}
        columns = load_config(TableConfig, None, given).columns()
        return TableSource(args.csv, columns, args.image_folder)
    if args.webdataset is not None:
        return ArchiveSource(args.webdataset)
    if args.video is not None:
        every = 1.0 if args.every is None else args.every
        return VideoSource(args.video, every, distinct=args.distinct)
    return FolderSource(args.image_folder, recursive=args.recursive)


def update_ann(out: Path, kind: Kind | None) -> None:
    """Build the approximate index; without a kind, print a line if the existing one is outdated.

    Raises:
        InputError: the first member has several vectors per image, or see :func:`build_ann`.
    """
    if kind is not None:
        index = Index.open(out)
        name = index.members[0].name
        first = index.vectors(name, range(min(index.rows, FEW_ROWS))).astype(np.float32)
        if np.any(np.linalg.norm(first, axis=1) > 1 + UNIT):  # stored as one row
            problem = f"member {name} has several vectors per image"
            raise InputError("--ann", problem, todo="leave out --ann")
        with locked(out):
            record = build_ann(out, kind)
        facts = f"{record.rows} vectors of {record.member}, recall@10 {record.recall_at_10:.3f}"
        write_line(f"index: {kind}: {facts}")
        return
    index = Index.open(out)
    found = read_record(index)
    if found is not None and not is_current(index, found):
        why = "does not have the images of this run"
        write_line(f"index: the approximate index {why}; --ann {found.kind} rebuilds it")


def _is_update(out: Path, choices: Sequence[MemberChoice]) -> bool:
    """Return true if ``out`` is an index made with the same members and flags."""
    if not (out / MANIFEST).is_file():
        return False
    return [choice_of(member) for member in read_manifest(out).members] == list(choices)


def open_members(choices: Sequence[MemberChoice], *, ann: bool = False) -> list[Opened]:
    """Load the members.

    Args:
        choices: the members.
        ann: require one vector per image of the first member.

    Raises:
        InputError: settings or weights are invalid, or the first member has several vectors.
    """
    found = [Opened(choice, choice.config(PROG).open()) for choice in choices]
    if ann:
        from pab.search.vectors import check_ann_member  # imports torch

        check_ann_member(found[0].name, found[0].encoder)
    return found
