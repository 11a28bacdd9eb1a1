"""Reading the members of a fusion: score files, and ranked lists through reciprocal rank.

A ranked list has no ids: line N belongs to query N. So the order of its lines has to be said, and
what it does not name counts nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from ensemble.fuse import RANKED_LIST, Member
from pab.annotations import Retrieval
from pab.errors import InputError
from pab.images import list_gallery
from pab.ranking import read_ranked_list
from pab.scores import ScoreFile, load_scores, tell_other_data

LIST_ENDING = ".txt"


def load_members(
    members: Sequence[Member],
    line_order: Sequence[str] | None = None,
    gallery_ids: Sequence[str] | None = None,
) -> list[ScoreFile]:
    """The members' scores; matrices of score files stay on disk.

    Args:
        members: in the order of the fusion.
        line_order: query ids in the order of ranked lists' lines. None: unknown; lists alone then
            go by line numbers.
        gallery_ids: where no member is a score file; None: the images that a list names.

    Raises:
        InputError: a file that cannot be read, a list beside score files without the order of its
            lines, a wrong number of lines, or a name that is not in the gallery.
    """
    lists = {m.path: read_ranked_list(m.path) for m in members if is_list(m.path)}
    paths = [member.path for member in members if not is_list(member.path)]
    with ThreadPoolExecutor(
        2
    ) as pool:  # one file's ids are read while another's scores are checked
        files = dict(zip(paths, pool.map(load_scores, paths), strict=True))
    tell_other_data({path: file.meta for path, file in files.items()})
    if lists:
        known = next(iter(files.values()), None)
        if known is not None:
            gallery_ids = known.gallery_ids
            if line_order is None:
                raise InputError(
                    next(iter(lists)), "a ranked list does not say which query a line is for",
                    todo="give the order of its lines: --query_order FILE, or --annotation FILE",
                )  # fmt: skip
        elif gallery_ids is None:
            gallery_ids = sorted(
                {name for names in lists.values() for line in names for name in line}
            )
        if line_order is None:
            count = len(next(iter(lists.values())))
            line_order = [f"line {number:0{len(str(count))}d}" for number in range(1, count + 1)]
    for path, names in lists.items():
        assert line_order is not None
        assert gallery_ids is not None
        files[path] = scores_of_list(path, names, line_order, gallery_ids)
        print(
            f"{path}: a ranked list, through reciprocal rank; what it does not name counts nothing",
            file=sys.stderr,
        )
    return [files[member.path] for member in members]


def is_list(path: str) -> bool:
    """Whether a member is a ranked list, by its ending."""
    return Path(path).suffix == LIST_ENDING


def scores_of_list(
    path: str, names: Sequence[Sequence[str]], query_ids: Sequence[str], gallery_ids: Sequence[str]
) -> ScoreFile:
    """A ranked list as scores: 1 / r at the r-th name of a line, 0 elsewhere.

    Args:
        path: of the list, for errors.
        names: its lines.
        query_ids: one a line.
        gallery_ids: sorted.

    Raises:
        InputError: another number of lines, or a name that is not in the gallery.
    """
    if len(names) != len(query_ids):
        raise InputError(
            path, f"expected a line for each of {len(query_ids)} queries, found {len(names)}"
        )
    column_of = {name: column for column, name in enumerate(gallery_ids)}
    columns = []
    for number, line in enumerate(names, start=1):
        unknown = next((name for name in line if name not in column_of), None)
        if unknown is not None:
            raise InputError(
                path, f"the name {unknown!r} is not in the gallery", item=f"line {number}"
            )
        columns.append([column_of[name] for name in line])
    scores = torch.zeros(len(names), len(gallery_ids))
    worth = 1.0 / torch.arange(1, len(columns[0]) + 1, dtype=torch.float32)
    scores.scatter_(1, torch.tensor(columns), worth.expand(len(columns), -1))
    return ScoreFile(scores, list(query_ids), list(gallery_ids), {"model": RANKED_LIST})


def known_gallery(retrieval: Retrieval | None, folder: str | None) -> list[str] | None:
    """Ids of the images that ranked lists may name, where anything says them."""
    if retrieval is not None and retrieval.gallery is not None:
        return [image.gallery_id for image in retrieval.gallery]
    return [image.gallery_id for image in list_gallery(folder)] if folder else None
