"""Which texts can be searched for."""

from __future__ import annotations

from pab.core.errors import InputError
from pab.data.captions import has_visible
from pab.encoders.captions import BECOME_BLANKS


def check_query(query: str) -> None:
    """Refuse a query that describes nothing.

    The rule is that of captions (:func:`pab.data.captions.has_visible`), and the punctuation that
    BLIP-2's processor drops does not count. So a query is good or bad for all models alike.

    Raises:
        InputError: an empty query, one of nothing visible, or one that is not UTF-8.
    """
    if not query:
        raise InputError("--query", "expected words to look for, found an empty text")
    try:
        query.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError("--query", f"expected UTF-8 text, found {query!a}") from error
    if not has_visible(BECOME_BLANKS.sub(" ", query)):
        raise InputError("--query", f"expected words to look for, found none in {query!a}")
