"""Format numbers with their nouns."""

from __future__ import annotations


def counted(number: int, noun: str, plural: str = "", spec: str = "") -> str:
    """Format a number with its noun, such as "1 image" or "2 images".

    Args:
        number: the number.
        noun: the noun for the number 1.
        plural: the noun for other numbers; by default ``noun`` with an s.
        spec: format of the number: "," separates thousands.
    """
    return f"{number:{spec}} {noun if number == 1 else plural or noun + 's'}"
