"""``python -m pab.mini --out data/mini``: build the mini data."""

from __future__ import annotations

import os
from pathlib import Path

from pab.core.config import CommandParser
from pab.core.errors import InputError, run_cli
from pab.mini import settings


def main(argv: list[str] | None = None) -> None:
    """Parse the flags and build the requested splits."""
    parser = CommandParser(
        prog="python -m pab.mini",
        description="Draw a small PAB-shaped set of people, with captions, twins and answer keys.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--out", type=Path, default=Path("data/mini"), help="folder to build in")
    add("--seed", type=int, default=settings.SEED, help="everything follows from it")
    add("--train", type=int, default=settings.TRAIN_PAIRS, help="training pairs")
    add("--test", type=int, default=settings.TEST_PAIRS, help="test pairs")
    add(
        "--distractors",
        type=int,
        default=settings.DISTRACTORS,
        help="more gallery images for Track 4",
    )
    add(
        "--ucc",
        type=int,
        default=settings.UCC_PAIRS,
        help="surveillance pairs, part of the test split",
    )
    add(
        "--workers",
        type=int,
        default=len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count() or 1,
        help="processes; the data does not depend on it",
    )
    add("--splits", default="test,train,distractors", help="which parts, with commas between")
    args = parser.parse_args(argv)
    for flag, least in (
        ("seed", 0),
        ("train", 1),
        ("test", 1),
        ("distractors", 1),
        ("ucc", 1),
        ("workers", 1),
    ):
        if getattr(args, flag) < least:
            raise InputError(f"--{flag}", f"expected at least {least}, found {getattr(args, flag)}")

    from pab.mini.build import SPLITS, Plan, build  # after parsing: --help needs no numpy

    splits = args.splits.split(",")
    for name in splits:
        if name not in SPLITS:
            raise InputError("--splits", f"expected some of {', '.join(SPLITS)}, found {name!r}")
    plan = Plan(
        args.out, args.seed, args.train, args.test, args.distractors, args.ucc, args.workers
    )
    build(plan, splits, print)


if __name__ == "__main__":
    run_cli(main)
