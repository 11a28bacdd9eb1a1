"""Check that a caption has visible text for every text encoder.

The normalizers of BERT and SentencePiece remove control characters, format characters and most
combining marks. OpenCLIP's cleaning decodes HTML entities and repairs broken encodings. A caption
of which nothing visible may remain is rejected for all models, so all models score the same
captions.
"""

from __future__ import annotations

import html
import re
import unicodedata

FEWEST_WORDS = 50  # word limit of BLIP-2's published processor, the smallest of all models
# Characters without text that Unicode classifies as letters or symbols: Hangul fillers, Braille
# blank, SentencePiece's mark for a space, and the replacement character.
_BLANK = frozenset("\u115f\u1160\u3164\uffa0\u2800\u2581\ufffd")
_DROPPED = frozenset(("Cc", "Cf", "Co", "Cs", "Zs", "Zl", "Zp", "Mn", "Mc", "Me"))
_ORDINARY = re.compile("[0-9A-Za-z]")


def has_visible(caption: str) -> bool:
    """Return true if the first 50 words and the cleaned caption each have a visible character."""
    found = _ORDINARY.search(caption)
    # The 51st word starts at character 100 or later: each word before it is followed by a blank.
    if found and found.start() < 2 * FEWEST_WORDS and "&" not in caption and "\x1b" not in caption:
        return True
    head = " ".join(caption.split()[:FEWEST_WORDS])
    return _shows(head) and _shows(_cleaned_for_clip(caption))


def _shows(text: str) -> bool:
    return any(
        character not in _BLANK and unicodedata.category(character) not in _DROPPED
        for character in text
    )


def _cleaned_for_clip(text: str) -> str:
    """Clean a text as OpenCLIP's tokenizer does."""
    import ftfy  # the import takes 0.1 s, and few captions need it

    return html.unescape(html.unescape(ftfy.fix_text(text)))
