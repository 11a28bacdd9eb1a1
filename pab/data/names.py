"""Match spellings of image names: with or without extension, composed (NFC) or decomposed (NFD)."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from pab.core.errors import InputError
from pab.core.notices import notice
from pab.data.image_paths import PHOTO_ENDINGS


def without_ending(name: str) -> str:
    """Remove an image extension: ``"a.b.JPG"`` becomes ``"a.b"``; ``"a.b"`` is unchanged."""
    stem, dot, ending = name.rpartition(".")
    return stem if stem and dot + ending.lower() in PHOTO_ENDINGS else name


def plain_names(names: Sequence[str], where: str | Path) -> list[str]:
    """Remove the image extension of every name.

    Args:
        names: distinct names.
        where: file of the names, for the error.

    Raises:
        InputError: two names differ only in their extension.
    """
    plain = [without_ending(name) for name in names]
    if len(set(plain)) < len(plain):
        stem = next(one for one, count in Counter(plain).items() if count > 1)
        twice = [name for name, one in zip(names, plain, strict=True) if one == stem]
        two = f"{twice[0]!r} and {twice[1]!r}"
        problem = f"expected image names that differ in more than the extension, found {two}"
        raise InputError(where, problem, todo="rename one of the two images")
    return plain


def one_spelling(names: Iterable[str]) -> list[str]:
    """Return distinct names without extensions, sorted; of several spellings, keep the first."""
    found: dict[str, str] = {}
    for name in names:
        found.setdefault(_plain(name), without_ending(name))
    return sorted(found.values())


def _plain(name: str, *, endings: bool = True) -> str:
    """Convert a name to Unicode form NFC; with ``endings``, also remove the image extension."""
    return unicodedata.normalize("NFC", without_ending(name) if endings else name)


def respelt(
    names: Iterable[str],
    known: Iterable[str],
    where: str | Path,
    *,
    known_name: str = "the gallery",
    endings: bool = True,
) -> dict[str, str]:
    """Map each name to its spelling among known names.

    A known name is unchanged. Any other name is mapped to the only known name that is equal in
    Unicode form NFC and, with ``endings``, without the image extension. A name with no match or
    several matches is unchanged. A notice reports names that match only in another Unicode form.

    Args:
        names: names in one file.
        known: names to match.
        where: the file, for the notice and the error.
        known_name: source of the known names, for the notice and the error.
        endings: ignore image extensions; set it to false for query ids.

    Raises:
        InputError: two names of the file would be mapped to the same name.
    """
    wanted = list(dict.fromkeys(names))
    known = set(known)
    found = {name: name for name in wanted}
    unknown = [name for name in wanted if name not in known]
    if not unknown:
        return found

    spellings: dict[str, list[str]] = {}
    for name in known:
        spellings.setdefault(_plain(name, endings=endings), []).append(name)
    changed = {}
    for name in unknown:
        match spellings.get(_plain(name, endings=endings)):
            case [only]:
                changed[name] = only
    if not changed:
        return found
    found |= changed
    counts = Counter(found.values())
    for name, spelling in changed.items():
        if counts[spelling] > 1:
            other = next(one for one in wanted if one != name and found[one] == spelling)
            two = f"{other!r} and {name!r}, which both match {spelling!r} of {known_name}"
            raise InputError(where, f"expected distinct names, found {two}")
    other_form = [two for two in changed.items() if len(set(map(without_ending, two))) > 1]
    if other_form:
        example = "{!a} to {!a}".format(*other_form[0])
        what = f"names matched to {known_name} in another Unicode form: {len(other_form)}"
        notice(where, f"{what}, such as {example}")
    return found
