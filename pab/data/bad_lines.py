"""Collect the bad lines of a data set: count them by kind of fault, and raise one error.

The kind of a fault is the part of its message before ``, found``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pab.core.errors import InputError

NAMED = 20  # maximum number of bad lines named in an error


class BadLines:
    """Collect the faults in the lines of a data set.

    Args:
        listed: function that is called with the one-line message of each fault.

    Attributes:
        kinds: kind of fault -> number of lines.
        first: the first :data:`NAMED` faults.
    """

    def __init__(self, listed: Callable[[str], object] | None = None) -> None:
        self.kinds: Counter[str] = Counter()
        self.first: list[InputError] = []
        self._listed = listed

    @property
    def total(self) -> int:
        """Number of bad lines."""
        return self.kinds.total()

    def add(self, error: InputError) -> None:
        """Count a fault."""
        self.kinds[error.problem.partition(", found")[0]] += 1
        if len(self.first) < NAMED:
            self.first.append(error)
        if self._listed is not None:
            self._listed(str(error))

    def summary(self) -> str:
        """Format the number of faults per kind, most frequent first."""
        return "; ".join(f"{count} x {kind}" for kind, count in self.kinds.most_common())

    def error(self, where: str | Path, todo: str | None = None) -> InputError:
        """Combine all faults in one error; a single fault keeps its location and its problem.

        Args:
            where: the data set, for the error.
            todo: the remedy; a single fault that names its own remedy keeps it.
        """
        if self.total == 1:
            only = self.first[0]
            return InputError(only.where, only.problem, item=only.item, todo=only.todo or todo)
        shown = [str(error) for error in self.first]
        if self.total > len(shown):
            shown.append(f"and {self.total - len(shown)} more")
        found = f"{self.total} bad ones ({self.summary()}): {'; '.join(shown)}"
        return InputError(where, f"expected only valid lines, found {found}", todo=todo)

    def check(self, where: str | Path) -> None:
        """Raise one error for all bad lines, if there are any.

        Raises:
            InputError: see :meth:`error`.
        """
        if self.total:
            raise self.error(where)

    def as_plain(self) -> dict[str, Any]:
        """Convert to JSON values; :meth:`from_plain` converts them back."""
        first = [[e.where, e.problem, e.item, e.todo] for e in self.first]
        return {"kinds": dict(self.kinds), "first": first}

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> BadLines:
        """Restore the counts and first faults from the result of :meth:`as_plain`."""
        bad = cls()
        bad.kinds.update(plain["kinds"])
        bad.first = [
            InputError(where, problem, item=item, todo=todo)
            for where, problem, item, todo in plain["first"]
        ]
        return bad
