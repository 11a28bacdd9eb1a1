"""Read the members of a fusion: scores in any form, and ranked lists as reciprocal ranks.

A form without scores (a ranked list, rankings) gets score 1 / r for its r-th image and 0 for images
that it does not name. A ranked list has no ids: line N belongs to query N, so the order of its
lines must be given.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from ensemble.fuse import RANKED_LIST, Member
from pab.core.errors import InputError
from pab.core.notices import notice
from pab.data.annotations import Retrieval
from pab.data.images import list_gallery
from pab.data.names import one_spelling
from pab.formats.contents import Listing
from pab.formats.forms import read_form
from pab.ranking import some
from pab.scores import (
    ScoreFile,
    listed_in_part,
    only_named,
    read_gallery_ids,
    read_query_ids,
    respell,
    tell_other_data,
    to_score_file,
    with_all_images,
)


def load_members(
    members: Sequence[Member],
    line_order: Sequence[str] | None = None,
    gallery_ids: Sequence[str] | None = None,
    *,
    queries: str | Path | None = None,
    gallery: str | Path | None = None,
) -> list[ScoreFile]:
    """Load the members' scores; matrices of score files stay on disk.

    Ids are matched to the first member's spelling.

    Args:
        members: members in fusion order.
        line_order: query ids in the line order of ranked lists. None if unknown; fusing only ranked
            lists then uses line numbers.
        gallery_ids: the gallery, if no member holds all of it. None uses the images that the
            members name.
        queries: file of query ids for members without ids: rows of matrices, lines of ranked lists.
        gallery: file of gallery ids, or the gallery's folder, for members without ids.

    Raises:
        InputError: an unreadable file, ids that are missing or do not match, a run that lacks
            queries, or a ranked list beside other members without its line order.
    """
    rows = read_query_ids(queries) if queries else None
    columns = read_gallery_ids(gallery) if gallery else None

    def read(path: str) -> ScoreFile | Listing:
        found = read_form(path)
        if isinstance(found, Listing):
            return found
        return to_score_file(found, path, query_ids=rows, gallery_ids=columns)

    paths = list(dict.fromkeys(member.path for member in members))
    with ThreadPoolExecutor(2) as pool:  # read one file's ids while checking another's
        contents = dict(zip(paths, pool.map(read, paths), strict=True))
    listings = {path: found for path, found in contents.items() if isinstance(found, Listing)}
    files = {path: found for path, found in contents.items() if isinstance(found, ScoreFile)}
    tell_other_data({path: file.meta for path, file in files.items()})
    complete = next((file for file in files.values() if file.listed is None), None)
    images = complete.gallery_ids if complete is not None else columns or gallery_ids
    if images is None:
        images = _named_by(files, listings)
    lines = rows if rows is not None else line_order
    if lines is None:
        lines = _line_numbers(contents)
    for path, listing in listings.items():
        files[path] = to_score_file(
            listing,
            path,
            query_ids=lines if listing.query_ids is None else line_order,
            gallery_ids=images,
        )
    first = complete if complete is not None else files[paths[0]]
    asked = first.query_ids if line_order is None else line_order
    return [_as_member(files[member.path], member.path, asked, images) for member in members]


def _named_by(files: dict[str, ScoreFile], listings: dict[str, Listing]) -> list[str]:
    """Union of the named images, if every member lists only some images."""
    names = [name for file in files.values() for name in file.gallery_ids]
    names += [name for found in listings.values() for listed in found.names for name in listed]
    gallery_ids = one_spelling(names)
    notice(next(iter([*listings, *files])), only_named(len(gallery_ids)))
    return gallery_ids


def _line_numbers(contents: dict[str, ScoreFile | Listing]) -> list[str] | None:
    """Ids for the lines of ranked lists; None without ranked lists.

    Raises:
        InputError: another member has query ids.
    """
    bare = [path for path, found in contents.items() if found.query_ids is None]
    if not bare:
        return None
    if len(bare) < len(contents):
        raise InputError(
            bare[0], "a ranked list does not say which query a line is for",
            todo="give the order of its lines: --query_order FILE, --annotation FILE or "
            "--queries FILE",
        )  # fmt: skip
    found = contents[bare[0]]
    assert isinstance(found, Listing)
    count = len(found.names)
    return [f"line {number:0{len(str(count))}d}" for number in range(1, count + 1)]


def _as_member(
    file: ScoreFile, path: str, query_ids: Sequence[str], gallery_ids: Sequence[str]
) -> ScoreFile:
    """Adapt a member's scores to the fusion: common id spelling, whole gallery.

    Raises:
        InputError: a run lacks queries.
    """
    file = respell(file, query_ids, gallery_ids, where=path, known_name="the other members")
    if file.listed is None:
        return file
    missing = [query_id for query_id in query_ids if query_id not in file.listed]
    if missing:
        raise InputError(
            path,
            f"expected all {len(query_ids)} queries, found none of the {len(missing)}: "
            f"{some(missing)}",
            todo="complete it: a fusion needs every query of every member (pab.evaluate counts "
            "missing ones as misses)",
        )
    listed = file.listed
    file = with_all_images(file, gallery_ids)
    if not file.is_order_alone:
        if min(listed.values()) < len(gallery_ids):
            notice(path, listed_in_part(file))
        return file
    notice(path, "a ranked list, through reciprocal rank; what it does not name counts nothing")
    least = 1.0 / file.listed_counts().float()
    scores = torch.where(file.scores >= least[:, None], file.scores, 0.0)
    return ScoreFile(scores, file.query_ids, file.gallery_ids, {**file.meta, "model": RANKED_LIST})


def known_gallery(retrieval: Retrieval | None, folder: str | None) -> list[str] | None:
    """Ids of the images that ranked lists may name; None if unknown."""
    if retrieval is not None and retrieval.gallery is not None:
        return [image.gallery_id for image in retrieval.gallery]
    return [image.gallery_id for image in list_gallery(folder)] if folder else None
