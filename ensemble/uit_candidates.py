"""Check that UIT's scores have the number of candidates that the weights were chosen for."""

from __future__ import annotations

from collections.abc import Sequence

from ensemble.members import Member
from pab.core.errors import InputError
from pab.core.notices import notice
from pab.scores import ScoreFile

UIT = "uit"


def candidates_of(members: Sequence[Member], files: Sequence[ScoreFile]) -> int | None:
    """Return the number of candidates per query that UIT's score file names; None if it has none.

    Args:
        members: of the fusion.
        files: their scores, in the same order.
    """
    for member, file in zip(members, files, strict=True):
        found = file.meta.get("k_test")
        if member.name == UIT and isinstance(found, int):
            return found
    return None


def check_candidates(
    members: Sequence[Member], files: Sequence[ScoreFile], expected: int | None
) -> None:
    """Compare the ``k_test`` of UIT's score file with that of the config.

    A weight is valid for one number of candidates, because images beyond them have equal scores.
    Numbers that cover the whole gallery count as equal. A file without the number prints a notice.

    Args:
        members: members of the fusion.
        files: their score files, in the same order.
        expected: candidates per query; None skips the check.

    Raises:
        InputError: UIT's file has another number.
    """
    if expected is None:
        return
    for member, file in zip(members, files, strict=True):
        if member.name != UIT:
            continue
        found = file.meta.get("k_test")
        if not isinstance(found, int):
            notice(
                member.path,
                f"does not record its number of candidates; assumed to be --uit_k {expected}",
            )
        elif min(found, len(file.gallery_ids)) != min(expected, len(file.gallery_ids)):
            raise InputError(
                member.path,
                f"expected {expected} candidates per query (--uit_k), found {found}",
                todo=f"score again with python -m uit.infer --k_test {expected}, or fuse with "
                f"--uit_k {found} (--uit_k none skips this check)",
            )
