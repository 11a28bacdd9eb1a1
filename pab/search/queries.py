"""Validation of search queries."""

from __future__ import annotations

from pab.core.errors import InputError
from pab.data.captions import has_visible
from pab.encoders.captions import BECOME_BLANKS


def check_query(query: str) -> None:
    """Reject a query without visible text.

    The rule is that of captions (:func:`pab.data.captions.has_visible`), without the punctuation
    that BLIP-2's processor removes. A query is therefore valid for all models or for none.

    Raises:
        InputError: the query is empty, has no visible text, or is not UTF-8.
    """
    if not query:
        raise InputError("--query", "expected words to look for, found an empty text")
    try:
        query.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError("--query", f"expected UTF-8 text, found {query!a}") from error
    if not has_visible(BECOME_BLANKS.sub(" ", query)):
        raise InputError("--query", f"expected words to look for, found none in {query!a}")
