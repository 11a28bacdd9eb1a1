"""Check query texts; define the default number of results on the command line."""

from __future__ import annotations

from pab.core.errors import InputError
from pab.data.captions import has_visible
from pab.encoders.captions import BECOME_BLANKS

TOP_K = 20


def check_query(query: str, flag: str = "--query") -> None:
    """Reject a query without visible text.

    The rule for captions (:func:`pab.data.captions.has_visible`) applies, after the punctuation
    that BLIP-2 ignores is replaced with blanks. The check is the same for all models.

    Raises:
        InputError: the query has no visible text, or cannot be encoded as UTF-8.
    """
    if not query:
        raise InputError(flag, "expected words, found an empty string")
    try:
        query.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(flag, f"expected UTF-8 text, found {query!a}") from error
    if not has_visible(BECOME_BLANKS.sub(" ", query)):
        raise InputError(flag, f"expected words, found none in {query!a}")
