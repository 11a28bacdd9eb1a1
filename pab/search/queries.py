"""Which texts can be searched for."""

from __future__ import annotations

import unicodedata

from pab.encoders.captions import BECOME_BLANKS
from pab.errors import InputError

# Letters and symbols that are drawn as a blank, and the mark of an unreadable character.
BLANK_FILLERS = frozenset("\u115f\u1160\u2800\u3164\uffa0\ufffd")


def check_query(query: str) -> None:
    """Refuse a query that describes nothing.

    Characters that no tokenizer keeps do not count: controls, separators, marks without a letter,
    blank fillers, and punctuation that BLIP-2's processor drops. So a query is good or bad for all
    models alike.

    Raises:
        InputError: an empty query, one of nothing visible, or one that is not UTF-8.
    """
    if not query:
        raise InputError("--query", "expected words to look for, found an empty text")
    try:
        query.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError("--query", f"expected UTF-8 text, found {query!a}") from error
    kept = [
        character
        for character in BECOME_BLANKS.sub(" ", query)
        if unicodedata.category(character)[0] not in "CMZ" and character not in BLANK_FILLERS
    ]
    if not kept:
        raise InputError("--query", f"expected words to look for, found none in {query!a}")
