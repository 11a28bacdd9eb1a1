"""The command line of a fine-tuning recipe."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import TypeVar

from pab.core import processes
from pab.core.config import add_debug_flag, config_from_args, with_debug
from pab.training.config import TrainingConfig

Config = TypeVar("Config", bound=TrainingConfig)


def training_command(
    cls: type[Config],
    train: Callable[[Config, list[str]], None],
    argv: list[str] | None,
    *,
    prog: str,
    description: str,
    debug_config: str | None = None,
) -> None:
    """Read a recipe's command line, run it, and leave the group of processes whatever happens.

    Args:
        cls: the recipe's settings.
        train: runs it with them and the command line as typed.
        argv: arguments without the program's name; None = ``sys.argv[1:]``.
        prog: name of the command, as the user types it.
        description: one sentence for ``--help``.
        debug_config: what ``--debug`` stands for; None has no such flag.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    config, _ = config_from_args(
        cls,
        argv if debug_config is None else with_debug(argv, debug_config),
        prog=prog,
        description=description,
        extra=None if debug_config is None else partial(add_debug_flag, path=debug_config),
    )
    with processes.leaving_together():
        train(config, argv)
