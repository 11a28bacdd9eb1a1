"""Members of a fusion: parse their flags, check them, and read their scores in any form.

In a form without scores (such as a ranked list), the r-th image of a query scores 1 / r. Images
that are not listed score 0. A ranked list has no query ids, so the order of its lines must be
known unless all members are ranked lists.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from pab.core.counts import counted
from pab.core.errors import InputError
from pab.core.notices import notice
from pab.data.id_lists import read_gallery_ids, read_query_ids
from pab.data.images import list_gallery
from pab.data.names import one_spelling, respelt
from pab.data.records import Retrieval
from pab.formats.contents import Listing
from pab.formats.conversion import to_score_file
from pab.formats.description import listed_in_part, only_named
from pab.formats.forms import read_form
from pab.ranking import rows_in_order, some
from pab.scores import ScoreFile, respell, warn_on_data_mismatch, with_all_images

Rule = Literal["iterative", "sum", "reciprocal_rank"]
UIT = "uit"  # name of the member whose number of candidates is checked
SUM_TOLERANCE = 1e-6
FILE_FLAGS = ("annotation", "answers", "query_order", "queries", "gallery", "decode_bank")
RANKED_LIST = "ranked list"  # `model` in the meta of a ranked list; its score 0 means "not listed"


@dataclass(frozen=True)
class Member:
    """Input score file of a fusion, and its weight from 0 to 1.

    In iterative fusion, the running sum keeps this weight when the member is added (unused for the
    first member). In a ``sum``, the weight is the member's share.
    """

    name: str  # shown in tables
    path: str  # score file, or scores in any other form
    weight: float


def named_numbers(flag: str, texts: Sequence[str]) -> dict[str, float]:
    """Parse the ``NAME:NUMBER`` entries of a flag.

    Raises:
        InputError: an entry without a name, a colon or a number, or a duplicate name.
    """
    found: dict[str, float] = {}
    for text in texts:
        name, colon, number = text.rpartition(":")
        if not colon or not name:
            raise InputError(flag, f"expected NAME:NUMBER, found {text!r}")
        if name in found:
            raise InputError(flag, f"expected distinct names, found {name!r} twice")
        try:
            found[name] = float(number)
        except ValueError as error:
            raise InputError(flag, f"expected a number for {name!r}, found {number!r}") from error
    return found


MEMBER = re.compile(r"([^=]+)=(.+?)(?::([^:/\\]+))?")


def without_weight(text: str) -> str:
    """Reduce a ``--member`` to ``NAME=FILE``; malformed text is unchanged."""
    match = MEMBER.fullmatch(text)
    return text if match is None else f"{match[1]}={match[2]}"


def parse_member(
    text: str, weights: Mapping[str, float] | None = None, default: float | None = None
) -> Member:
    """Parse ``NAME=FILE:WEIGHT``, or ``NAME=FILE`` with a weight from another setting.

    Args:
        text: value of the flag.
        weights: name -> weight, for members without a weight in ``text``.
        default: weight for members without a weight; None raises an error for them.

    Raises:
        InputError: malformed, no weight, or two weights.
    """
    match = MEMBER.fullmatch(text)
    if match is None:
        raise InputError("--member", f"expected NAME=FILE:WEIGHT, found {text!r}")
    name, path, weight = match.groups()
    weights = weights or {}
    if weight is None:
        found = weights.get(name, default)
        if found is None:
            raise InputError("--member", f"expected NAME=FILE:WEIGHT, found no weight for {name!r}")
        return Member(name, path, found)
    if name in weights:
        raise InputError("--member", f"the weight of {name!r} is also set by --member_weights")
    return Member(name, path, named_numbers("--member", [f"{name}:{weight}"])[name])


def check_members(members: Sequence[Member], rule: Rule = "iterative") -> None:
    """Reject members that cannot be fused.

    Raises:
        InputError: no member, a duplicate name, a weight outside [0, 1], or shares that do not sum
            to 1.
    """
    if not members:
        raise InputError(
            "ensemble", "expected score files to fuse, found none",
            todo="pass --beit3_score FILE or --member NAME=FILE:WEIGHT",
        )  # fmt: skip
    names = [member.name for member in members]
    for member in members:
        if names.count(member.name) > 1:
            raise InputError("--member", f"expected distinct names, found {member.name!r} twice")
        if not 0.0 <= member.weight <= 1.0:
            raise InputError(
                f"weight of {member.name}", f"must lie in [0, 1], found {member.weight}"
            )
    total = sum(member.weight for member in members)
    if rule == "sum" and abs(total - 1.0) > SUM_TOLERANCE:
        raise InputError("--shares", f"must add up to 1, found {total:g}")


def load_members(
    members: Sequence[Member],
    line_order: Sequence[str] | None = None,
    gallery_ids: Sequence[str] | None = None,
    *,
    queries: str | Path | None = None,
    gallery: str | Path | None = None,
    loaded: Mapping[str, ScoreFile] | None = None,
    label_names: Sequence[str] | None = None,
    id_flags: bool = True,
) -> list[ScoreFile]:
    """Load the members' scores; matrices of score files stay on disk.

    Image ids take the spelling of ``gallery_ids``, else of ``label_names``, else of the first
    member that scores the whole gallery. Query ids take the spelling of ``line_order`` or, if it is
    None, of one of the members.

    Args:
        members: members in fusion order.
        line_order: query ids in the line order of ranked lists, unless ``queries`` gives it. If
            both are None, line numbers are used, provided that all members are ranked lists.
        gallery_ids: ids of the gallery, used if no member has the whole gallery and ``gallery`` is
            None. If both are None, the gallery consists of the images that the members list.
        queries: file of query ids for members without ids: rows of matrices, lines of ranked lists.
        gallery: file of gallery ids, or the gallery's folder, for members without ids.
        loaded: validated scores by member path, for members that are already in memory.
        label_names: ids of the right images, whose spelling is used if ``gallery_ids`` is None.
        id_flags: true if the command has the flags ``--queries`` and ``--gallery``, so that an
            error may recommend them.

    Raises:
        InputError: a file cannot be read, ids or queries are missing or do not match, or the line
            order of a ranked list is unknown.
    """
    rows = read_query_ids(queries) if queries else None
    columns = read_gallery_ids(gallery) if gallery else None

    def read(path: str) -> ScoreFile | Listing:
        if loaded and path in loaded:
            return loaded[path]
        found = read_form(path)
        if isinstance(found, Listing):
            return found
        return to_score_file(found, path, query_ids=rows, gallery_ids=columns, id_flags=id_flags)

    paths = list(dict.fromkeys(member.path for member in members))
    with ThreadPoolExecutor(2) as pool:  # read the ids of one file while checking another
        contents = dict(zip(paths, pool.map(read, paths), strict=True))
    listings = {path: found for path, found in contents.items() if isinstance(found, Listing)}
    files = {path: found for path, found in contents.items() if isinstance(found, ScoreFile)}
    warn_on_data_mismatch({path: file.meta for path, file in files.items()})
    complete = next((file for file in files.values() if file.listed is None), None)
    images = complete.gallery_ids if complete is not None else columns or gallery_ids
    if images is None:
        images = _named_by(files, listings)
    spelling = gallery_ids if gallery_ids is not None else label_names
    if spelling is not None:
        where = next((path for path, file in files.items() if file is complete), paths[0])
        spelt = respelt(images, spelling, where)
        images = [spelt[name] for name in images]
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
    """Return the union of the members' images, for members that all list only some images."""
    names = [name for file in files.values() for name in file.gallery_ids]
    names += [name for found in listings.values() for listed in found.names for name in listed]
    gallery_ids = one_spelling(names)
    notice(next(iter([*listings, *files])), only_named(len(gallery_ids)))
    return gallery_ids


def _line_numbers(contents: dict[str, ScoreFile | Listing]) -> list[str] | None:
    """Return line numbers as query ids of ranked lists; None if every member has query ids."""
    bare = [path for path, found in contents.items() if found.query_ids is None]
    if not bare:
        return None
    if len(bare) < len(contents):
        raise InputError(
            bare[0], "a ranked list does not name the queries of its lines",
            todo="pass the order of the lines with --query_order FILE, --annotation FILE or "
            "--queries FILE",
        )  # fmt: skip
    found = contents[bare[0]]
    assert isinstance(found, Listing)
    count = len(found.names)
    return [f"line {number:0{len(str(count))}d}" for number in range(1, count + 1)]


def _as_member(
    file: ScoreFile, path: str, query_ids: Sequence[str], gallery_ids: Sequence[str]
) -> ScoreFile:
    """Convert a member's scores to the common id spelling and gallery; check its queries."""
    file = respell(file, query_ids, gallery_ids, where=path, known_name="the other members")
    if file.listed is None:
        return file
    missing = [query_id for query_id in query_ids if query_id not in file.listed]
    if missing:
        found = len(query_ids) - len(missing)
        raise InputError(
            path,
            f"expected all {len(query_ids)} queries, found {found}; missing: {some(missing)}",
            todo="complete the file: each member must score every query (pab.evaluate "
            "counts missing queries as misses)",
        )
    listed = file.listed
    file = with_all_images(file, gallery_ids)
    if not file.is_order_alone:
        if min(listed.values()) < len(gallery_ids):
            notice(path, listed_in_part(file))
        return file
    notice(path, "a ranked list: rank r scores 1 / r, and images that are not listed score 0")
    least = 1.0 / file.listed_counts().float()
    scores = torch.where(file.scores >= least[:, None], file.scores, 0.0)
    return ScoreFile(scores, file.query_ids, file.gallery_ids, {**file.meta, "model": RANKED_LIST})


def candidates_of(members: Sequence[Member], files: Sequence[ScoreFile]) -> int | None:
    """Return the number of candidates (``k_test``) in UIT's score file; None if not recorded.

    Args:
        members: members of the fusion.
        files: their score files, in the same order.
    """
    for member, file in zip(members, files, strict=True):
        found = file.meta.get("k_test")
        if member.name == UIT and isinstance(found, int):
            return found
    return None


def check_candidates(
    members: Sequence[Member], files: Sequence[ScoreFile], expected: int | None
) -> None:
    """Check that UIT's score file has the expected number of candidates (``k_test``).

    Weights tuned for one number do not transfer to another, because all images of a query that are
    not candidates have equal scores. Numbers that cover the whole gallery count as equal. A notice
    reports a file without a number.

    Args:
        members: members of the fusion.
        files: their score files, in the same order.
        expected: candidates per query; None skips the check.

    Raises:
        InputError: UIT's score file has another number.
    """
    if expected is None:
        return
    for member, file in zip(members, files, strict=True):
        if member.name != UIT:
            continue
        found = candidates_of([member], [file])
        if found is None:
            notice(
                member.path,
                f"does not record its number of candidates; assumed to be --uit_k {expected}",
            )
        elif min(found, len(file.gallery_ids)) != min(expected, len(file.gallery_ids)):
            raise InputError(
                member.path,
                f"expected {counted(expected, 'candidate')} per query (--uit_k), found {found}",
                todo=f"score again with python -m uit.infer --k_test {expected}, or fuse with "
                f"--uit_k {found} (--uit_k none skips this check)",
            )


def check_gallery(
    members: Sequence[Member],
    files: Sequence[ScoreFile],
    gallery_ids: Sequence[str] | None,
    name: str = "the gallery",
) -> None:
    """Check that the members score the whole gallery, and no other image.

    Members that all list only some images per query may lack images.

    Args:
        members: members of the fusion.
        files: their score files, with equal gallery ids.
        gallery_ids: ids of the gallery; None skips the check.
        name: name of the gallery, for the error.

    Raises:
        InputError: an image is missing or unknown.
    """
    if gallery_ids is None:
        return
    for member, file in zip(members, files, strict=True):
        if file.listed is None:
            wanted = sorted(gallery_ids)
            rows_in_order(file.gallery_ids, wanted, where=member.path, order_name=name)
            return
    unknown = sorted(set(files[0].gallery_ids) - set(gallery_ids))
    if unknown:
        raise InputError(members[0].path, f"expected images of {name}, found {some(unknown)}")


def label_names(retrieval: Retrieval | None) -> list[str] | None:
    """Return the ids of the right images of all queries; None without labels."""
    if retrieval is None or retrieval.relevant is None:
        return None
    return sorted(frozenset().union(*retrieval.relevant.values()))


def scored_counts(file: ScoreFile, query_ids: Sequence[str]) -> Tensor:
    """Count the images per query that have their own score, int64 [Q].

    The others share one lower score: images that a file does not list, and those outside the
    candidates of a reranker (``k_test``).
    """
    counts, candidates = file.listed_counts(query_ids), file.meta.get("k_test")
    return counts.clamp_max(candidates) if type(candidates) is int and candidates > 0 else counts


def inputs_of(config: object, members: Sequence[Member]) -> dict[str, str | None]:
    """Return the files that a command reads, by flag or member name."""
    named = {name: getattr(config, name, None) for name in FILE_FLAGS}
    return {**named, **{member.name: member.path for member in members}}


def known_gallery(retrieval: Retrieval | None, folder: str | None) -> list[str] | None:
    """Return the ids of the gallery, from an annotation or a folder; None if unknown."""
    if retrieval is not None and retrieval.gallery is not None:
        return [image.gallery_id for image in retrieval.gallery]
    return [image.gallery_id for image in list_gallery(folder)] if folder else None
