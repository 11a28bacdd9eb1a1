"""Find out which part of a query a member refuses, after a search has failed."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from functools import partial

from pab.core.errors import InputError
from pab.scoring.encoder import Encoder
from pab.search.query import Query


def refusal(query: Query, encoders: Mapping[str, Encoder], models: threading.Lock) -> str | None:
    """Encode each part of a query alone, and describe the first one that a member refuses.

    The description is for the client, so it leaves out the file that the member's error names.

    Args:
        query: the query.
        encoders: name of each member -> its encoder.
        models: lock of all models; held while a part is encoded.

    Returns:
        One sentence, or None if the members accept all parts.
    """
    for name, encoder in encoders.items():
        for part, encode in _parts(query, encoder):
            try:
                with models:
                    encode()
            except InputError as error:
                return f"{part}: member {name} cannot use it: {error.problem}"
    return None


def _parts(query: Query, encoder: Encoder) -> list[tuple[str, Callable[[], object]]]:
    parts: list[tuple[str, Callable[[], object]]] = []
    if query.text is not None:
        parts.append(("text", partial(encoder.encode_texts, [query.text])))
    parts += [("minus", partial(encoder.encode_texts, [text])) for text in query.minus]
    if query.image is not None:
        parts.append(("image", partial(encoder.encode_images, [query.image])))
    return parts
