"""Settings of all commands that read an annotation: form of a table, rule of relevance."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, fields
from typing import Any

from pab.core.config import add_config_flags, flag, load_config
from pab.core.errors import InputError
from pab.data.tables import TableColumns


@dataclass(frozen=True)
class TableConfig:
    """Form of a CSV or TSV table; the names and defaults are OpenCLIP's."""

    csv_image_key: str = flag("filepath", "column of a table that holds the image's path")
    csv_caption_key: str = flag("title", "column of a table that holds the caption")
    csv_separator: str = flag(
        r"\t", "separator of a table's columns; comma and semicolon are found by the header too"
    )

    def columns(self) -> TableColumns:
        """The form as the readers take it.

        Raises:
            InputError: the separator is not one character.
        """
        separator = "\t" if self.csv_separator == r"\t" else self.csv_separator
        if len(separator) != 1 or separator in '"\r\n':
            raise InputError(
                "--csv_separator", f"expected one character, found {self.csv_separator!r}"
            )
        return TableColumns(self.csv_image_key, self.csv_caption_key, separator)


@dataclass(frozen=True)
class LabelConfig(TableConfig):
    """Form of a table, and which images of a labelled set are right for a caption."""

    same_caption_counts: bool = flag(
        False, "count every image whose line lists the same caption as right (published: its own)"
    )

    def reading(self) -> dict[str, Any]:
        """Keyword arguments of :func:`pab.data.annotations.read_retrieval`."""
        return {"same_caption_counts": self.same_caption_counts, "columns": self.columns()}


def add_label_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of :class:`LabelConfig` to a command that has no config of its own."""
    add_config_flags(parser, LabelConfig)


def label_config(args: argparse.Namespace) -> LabelConfig:
    """The values of these flags."""
    names = {field.name for field in fields(LabelConfig)}
    return load_config(LabelConfig, None, {k: v for k, v in vars(args).items() if k in names})
