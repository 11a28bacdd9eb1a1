"""LAVIS's caption processor for BLIP-2.

Source: `blip_caption` of LAVIS (BSD-3-Clause), in evaluation mode without a prompt.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from pab.data.wordpiece import Tokenizer

MAX_WORDS = 50
BECOME_BLANKS = re.compile(r"[.!\"()*#:;~]")
RUNS_OF_BLANKS = re.compile(r"\s{2,}")


def blip_caption(caption: str, max_words: int = MAX_WORDS) -> str:
    """Lower-case a caption, replace some punctuation with spaces, and cut it to ``max_words``."""
    text = RUNS_OF_BLANKS.sub(" ", BECOME_BLANKS.sub(" ", caption.lower()))
    words = text.rstrip("\n").strip(" ").split(" ")
    return " ".join(words[:max_words])


@dataclass(frozen=True)
class CaptionIds:
    """Convert captions to ids with LAVIS's processor and BERT's vocabulary."""

    tokenizer: Tokenizer

    def __call__(self, caption: str) -> list[int]:
        """Return the ids of a caption, including both special tokens."""
        return self.tokenizer.encode(blip_caption(caption))
