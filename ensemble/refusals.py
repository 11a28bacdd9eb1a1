"""Refuse test sets in commands that choose settings of the fusion or mine training data."""

from __future__ import annotations

from pathlib import Path

from pab.core.errors import InputError
from pab.data.records import Retrieval

# Folder names of PAB's layout.
MASKED_SET = "name-masked_test-set"
TEST_ANNOTATIONS = ("annotation", "test")
TEST_IMAGES = frozenset(("test", "ucc", MASKED_SET))


def refuse_test_set(
    retrieval: Retrieval, annotation: str, *files: str | None, why: str, todo: str, allowed: bool
) -> bool:
    """Raise an error if an annotation is a test set, unless the user allows it.

    Args:
        retrieval: contents of the annotation.
        annotation: its path.
        files: answer key and image folder.
        why: reason for the refusal, in one clause.
        todo: remedy, in one clause.
        allowed: true with ``--allow_test``.

    Returns:
        True if the annotation is a test set.

    Raises:
        InputError: it is a test set, and the user does not allow it.
    """
    on_test = is_test_set(retrieval, annotation, *files)
    if on_test and not allowed:
        raise InputError(
            annotation, f"is a test set: {why}",
            todo=f"{todo} (see docs/ensemble.md), or pass --allow_test",
        )  # fmt: skip
    return on_test


def is_test_set(retrieval: Retrieval, *files: str | Path | None) -> bool:
    """Return true if the queries belong to a test set of PAB, judging by paths of files and images.

    Args:
        retrieval: queries, with the images of their gallery.
        files: annotation, answer key, image folder.
    """
    given = [Path(file) for file in files if file]
    for path in (*map(Path.absolute, given), *map(Path.resolve, given)):  # as given, and resolved
        if MASKED_SET in path.parts[-3:] or path.parts[-3:-1] == TEST_ANNOTATIONS:
            return True
    images = (image.path.absolute() for image in retrieval.gallery or [])
    return any(TEST_IMAGES & set(path.parts[-4:]) for path in images)
