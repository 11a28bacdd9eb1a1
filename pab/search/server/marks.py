"""Convert marks of right and wrong images to an annotation in JSON lines.

``labelled``: one line per image with the list of its texts, for :mod:`pab.evaluate` and scoring.
``pairs``: one line per image and text, for tuning; the lines of an image with several texts have
the ids ``ID#0``, ``ID#1``, ... (see :attr:`pab.data.records.TrainPair.captioned_image`).

In the field ``wrong``, a line lists the images that were marked wrong for its texts. The readers
ignore this field with a notice. A text without a right image has no line.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any, Literal, NamedTuple

from pab.core.errors import InputError

Form = Literal["labelled", "pairs"]


class NamedMark(NamedTuple):
    """Mark of a named image: right or wrong for a text."""

    text: str
    name: str
    right: bool


def annotation(marks: Iterable[NamedMark], form: Form) -> str:
    """Convert marks to an annotation; of several marks for one text and image, the last counts.

    Raises:
        InputError: no image is marked right.
    """
    last = {(mark.text, mark.name): mark.right for mark in marks}
    texts: dict[str, list[str]] = {}
    wrong: dict[str, list[str]] = {}
    for (text, name), right in last.items():
        if right:
            texts.setdefault(name, []).append(text)
        else:
            wrong.setdefault(text, []).append(name)
    if not texts:
        raise InputError("marks", "expected an image marked right, found none")
    lines: list[dict[str, Any]] = []
    for name, captions in texts.items():
        if form == "labelled":
            lines.append(_line(name, name, captions, wrong))
            continue
        for number, caption in enumerate(captions):
            own = name if len(captions) == 1 else f"{name}#{number}"
            lines.append({**_line(name, own, [caption], wrong), "caption": caption})
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


def _line(
    image: str, image_id: str, captions: list[str], wrong: dict[str, list[str]]
) -> dict[str, Any]:
    line: dict[str, Any] = {"image": image, "image_id": image_id, "caption": captions}
    names = [name for caption in captions for name in wrong.get(caption, ())]
    if names:
        line["wrong"] = list(dict.fromkeys(names))
    return line
