"""Reject texts with control tokens, which a tokenizer does not read as text."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pab.core.errors import InputError


def refuse_control_tokens(tokenizer: Any, texts: Iterable[str], where: str) -> None:
    """Reject texts that contain a control token of a model, such as an image placeholder.

    Args:
        tokenizer: tokenizer of the model.
        texts: captions or instructions.
        where: their source, for the error.

    Raises:
        InputError: a text contains a control token; the message names both.
    """
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    control = sorted({token.content for token in added if token.special and token.content})
    for text in texts:
        if word := next((word for word in control if word in text), None):
            raise InputError(
                where, f"contains {word!r}, a control token of the model", item=f"text {text!r}",
                todo="remove it from the text",
            )  # fmt: skip
