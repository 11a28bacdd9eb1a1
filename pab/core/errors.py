"""The error type for bad input, and its handling on the command line.

Bad input raises :class:`InputError`. Commands run under :func:`run_cli`, which prints this error as
one line on stderr and exits with code 2. An exception that :func:`run_cli` does not handle is a bug
in this project and keeps its traceback.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

from pab.core.progress import closing_bars

EXIT_BAD_INPUT = 2


class InputError(Exception):
    """Bad input, described so that the user can fix it.

    Args:
        where: the file, flag or setting that is wrong.
        problem: what was expected and what was found, in one clause.
        item: the line, key or item inside ``where`` (``"line 17"``, ``"image_id '0_3'"``), if any.
        todo: the remedy, if it does not follow from the problem.
    """

    def __init__(
        self, where: str | Path, problem: str, *, item: str | None = None, todo: str | None = None
    ) -> None:
        self.where, self.problem, self.item, self.todo = str(where), problem, item, todo
        text = f"{where}, {item}: {problem}" if item else f"{where}: {problem}"
        if todo:
            text = f"{text}; {todo}"
        super().__init__(" ".join(text.split()))  # one line, even if an item contains line breaks

    def __reduce__(self) -> tuple[Callable[..., InputError], tuple[str, str]]:
        """Pickle the parts; by default, an exception is rebuilt from its single message."""
        rebuild = partial(type(self), item=self.item, todo=self.todo)
        return rebuild, (self.where, self.problem)


Fault = Callable[..., InputError]  # partial of InputError with `where`, and perhaps `item`


def first_line(error: Exception) -> str:
    """Shorten a library's error to its first line, 200 characters at most."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


class LostProcessError(RuntimeError):
    """The connection to another process of the group is lost."""


def run_cli(main: Callable[[list[str] | None], None], argv: list[str] | None = None) -> None:
    """Run a command-line ``main``; bad input prints one line on stderr and exits with code 2.

    Device errors that :mod:`pab.core.device_errors` describes are reported like bad input. The exit
    code is 1 for a lost connection to another process or a closed output pipe, and 130 for Ctrl-C.
    """
    # Warnings about metadata and large images; loader processes inherit the filter.
    warnings.filterwarnings("ignore", module="PIL")
    try:
        with closing_bars():
            main(argv)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_BAD_INPUT)
    except LostProcessError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except (MemoryError, RuntimeError) as error:
        from pab.core.device_errors import one_line  # imports torch

        line = one_line(error)
        if line is None:
            raise
        print(f"error: {line}", file=sys.stderr)
        sys.exit(EXIT_BAD_INPUT)
    except BrokenPipeError:  # the reader of the output (head, less) has exited
        sys.stderr.close()
        sys.exit(1)
    except KeyboardInterrupt as stop:  # its text, if any, reports the saved state
        if os.environ.get("RANK", "0") == "0":  # one line, also from several processes
            print(str(stop) or "interrupted", file=sys.stderr)
        sys.exit(130)
