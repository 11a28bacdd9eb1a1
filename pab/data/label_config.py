"""Settings for reading annotations: table format and relevance rule."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from pab.core.commands import CommandParser
from pab.core.config import add_config_flags, data_flag, load_config
from pab.core.errors import InputError
from pab.data.tables import TableColumns


@dataclass(frozen=True)
class TableConfig:
    """Format of a CSV or TSV table; the defaults are those of OpenCLIP."""

    csv_image_key: str = data_flag("filepath", "table column with the image path")
    csv_caption_key: str = data_flag("title", "table column with the caption")
    csv_separator: str = data_flag(
        r"\t", "column separator of a table; comma and semicolon are also detected from the header"
    )

    def columns(self) -> TableColumns:
        """Return the table format for the readers.

        Raises:
            InputError: the separator is not a single character, or is a quote or a line end.
        """
        separator = "\t" if self.csv_separator == r"\t" else self.csv_separator
        if len(separator) != 1 or separator in '"\r\n':
            problem = f"expected one character, found {self.csv_separator!r}"
            raise InputError("--csv_separator", problem)
        return TableColumns(self.csv_image_key, self.csv_caption_key, separator)


@dataclass(frozen=True)
class LabelConfig(TableConfig):
    """Table format and relevance rule of a labelled set."""

    same_caption_counts: bool = data_flag(
        False, "images with the same caption count as right (published: only the captioned image)"
    )

    def reading(self) -> dict[str, Any]:
        """Return keyword arguments for :func:`pab.data.annotations.read_retrieval`."""
        return {"same_caption_counts": self.same_caption_counts, "columns": self.columns()}


def add_label_flags(parser: CommandParser) -> None:
    """Add the flags of :class:`LabelConfig` to a command without a config."""
    add_config_flags(parser, LabelConfig)


def add_path_flags(parser: argparse._ActionsContainer, flags: Mapping[str, str]) -> None:
    """Add optional flags with a path as value; ``flags`` maps flag -> help text."""
    for flag, text in flags.items():
        parser.add_argument(flag, type=Path, help=text)


def label_config(args: argparse.Namespace) -> LabelConfig:
    """Build the settings from the flags that :func:`add_label_flags` added."""
    names = {field.name for field in fields(LabelConfig)}
    return load_config(LabelConfig, None, {k: v for k, v in vars(args).items() if k in names})
