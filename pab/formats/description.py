"""Describe score files in lines of text."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import torch

from pab.core.counts import counted
from pab.core.notices import notice
from pab.formats.contents import Listing, Matrix
from pab.formats.conversion import to_score_file
from pab.formats.forms import read_form
from pab.formats.score_file import ScoreFile


def only_named(count: int) -> str:
    """Format the notice for a listing without a known gallery."""
    return (
        f"the gallery is assumed to be the listed images ({count}); pass the whole gallery with "
        "--gallery FILE or FOLDER"
    )


def listed_in_part(score_file: ScoreFile) -> str:
    """Format the notice for scores that list only some images per query."""
    counts = list((score_file.listed or {}).values())
    return (
        f"lists {_listed_text(counts)} of {len(score_file.gallery_ids)} per query; the others "
        "score just below the listed ones"
    )


def describe(path: str | Path, found: Matrix | Listing, score_file: ScoreFile | None) -> str:
    """Describe a file of scores in lines of text.

    Args:
        path: the file.
        found: the parsed content.
        score_file: the content as a score file; None if ids are missing.
    """
    lines = [f"file      {path}", f"form      {found.form}"]
    if score_file is None:
        flags = {"rows": "--queries FILE"} if found.query_ids is None else {}  # of axes without ids
        if isinstance(found, Matrix):
            if found.gallery_ids is None:
                flags["columns"] = "--gallery FILE"
            rows, columns = found.scores.shape
            dtype = str(found.scores.dtype).removeprefix("torch.")
            size = f"{counted(rows, 'row')} x {counted(columns, 'column')}"
            lines.append(f"scores    {size}, {dtype}")
            lines.append(_range_line(ScoreFile(found.scores, [], [])))
        else:
            counts = _listed_text([len(names) for names in found.names])
            lines.append(f"lists     {counted(len(found.names), 'line')} of {counts}")
        given = " ".join(flags.values())
        command = f"python -m pab.scores import {shlex.quote(str(path))} {given} --out FILE"
        axes = " and ".join(flags)
        return "\n".join([*lines, f"ids       none for the {axes}; add them with: {command}"])
    scores = score_file.scores
    lines += [
        f"scores    {counted(scores.shape[0], 'query', 'queries')} x "
        f"{counted(scores.shape[1], 'image')}, float32, "
        f"{scores.nbytes / 2**20:.1f} MiB",
        _range_line(score_file),
        f"queries   {_first_and_last(score_file.query_ids)}",
        f"gallery   {_first_and_last(score_file.gallery_ids)}",
    ]
    if score_file.listed is not None:
        lines.append(f"listed    {_listed_text(list(score_file.listed.values()))} per query")
    meta = {key: value for key, value in score_file.meta.items() if key != "listed"}
    lines += ["meta", *(f"  {key}: {json.dumps(meta[key], default=str)}" for key in meta)]
    return "\n".join(lines)


def _range_line(score_file: ScoreFile) -> str:
    low, high = score_file.bounds
    mean = score_file.scores.mean(dtype=torch.float64).item()
    return f"range     {low:.6g} to {high:.6g}, mean {mean:.6g}"


def _listed_text(counts: list[int]) -> str:
    low, high = min(counts), max(counts)
    return counted(low, "image") if low == high else f"{low} to {high} images"


def _first_and_last(ids: list[str]) -> str:
    return ids[0] if len(ids) == 1 else f"{ids[0]} ... {ids[-1]}"


def show(path: str | Path, found: Matrix | Listing | None = None) -> str:
    """Describe a file of scores in any form, with or without ids.

    Args:
        path: the file.
        found: its parsed content; None reads the file.

    Raises:
        InputError: the file cannot be read, or the ids or scores of a file with ids are invalid
            (see :func:`pab.formats.conversion.to_score_file`).
    """
    path = Path(path)
    found = read_form(path) if found is None else found
    ids = [found.query_ids, *([found.gallery_ids] if isinstance(found, Matrix) else [])]
    if None not in ids:
        return describe(path, found, to_score_file(found, path))
    for remark in found.remarks:
        notice(path, remark)
    return describe(path, found, None)
