"""The one error a user can cause, and the way it leaves the program.

Everything wrong with an input ends in :class:`InputError`. Command-line entry points run under
:func:`run_cli`, which prints it as one line on stderr and exits with code 2; every other exception
is a fault of this project and keeps its traceback.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

EXIT_BAD_INPUT = 2


class InputError(Exception):
    """Bad input, described so that its owner can mend it.

    Args:
        where: the file, flag or setting that is wrong.
        problem: what was expected and what was found, in one clause.
        item: the line, key or item inside ``where`` (``"line 17"``, ``"image_id '0_3'"``), if any.
        todo: what to do about it, if it is not plain from the problem.
    """

    def __init__(
        self, where: str | Path, problem: str, *, item: str | None = None, todo: str | None = None
    ) -> None:
        self.where, self.problem, self.item, self.todo = str(where), problem, item, todo
        text = f"{where}, {item}: {problem}" if item else f"{where}: {problem}"
        if todo:
            text = f"{text}; {todo}"
        super().__init__(" ".join(text.split()))  # one line, whatever an item held

    def __reduce__(self) -> tuple[Callable[..., InputError], tuple[str, str]]:
        """Pickled as its parts: an exception is otherwise rebuilt from its one text."""
        again = partial(type(self), item=self.item, todo=self.todo)
        return again, (self.where, self.problem)


class LostProcessError(RuntimeError):
    """The connection to another of the processes that work together is lost."""


def run_cli(main: Callable[[list[str] | None], None], argv: list[str] | None = None) -> None:
    """Run a command-line ``main``; bad input becomes one line on stderr and exit code 2.

    So does the loss of another process, with exit code 1: what was wrong is said by that one.
    """
    try:
        main(argv)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_BAD_INPUT)
    except LostProcessError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except BrokenPipeError:  # the reader of our output (head, less) has gone
        sys.stderr.close()
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
