"""Command line of the fine-tuning recipes."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from functools import partial
from typing import TypeVar

from pab.core import processes
from pab.core.commands import add_debug_flag, with_debug
from pab.core.config import config_from_args
from pab.core.device_errors import explaining_memory
from pab.core.devices import pick_device
from pab.core.precision import check_numerics, numerics
from pab.training.config import TrainingConfig

Config = TypeVar("Config", bound=TrainingConfig)


def training_command(
    cls: type[Config],
    train: Callable[[Config, str], None],
    argv: list[str] | None,
    *,
    prog: str,
    debug_config: str | None = None,
) -> None:
    """Parse a command line, run the recipe, and leave the process group.

    For the end of the process group, see :func:`pab.core.processes.leaving_together`.

    Args:
        cls: dataclass of the recipe's settings.
        train: recipe; called with the settings and the full command line.
        argv: arguments without the program's name; None reads ``sys.argv[1:]``.
        prog: name of the command, for usage, messages and the recorded command line.
        debug_config: path of the config that ``--debug`` selects; None omits the flag.

    Raises:
        InputError: a setting is invalid, the device cannot be used, or the recipe raises it.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    config, _ = config_from_args(
        cls,
        argv if debug_config is None else with_debug(argv, debug_config),
        prog=prog,
        extra=None if debug_config is None else partial(add_debug_flag, path=debug_config),
    )
    device = pick_device(config.device)
    settings = {"tf32": config.tf32, "deterministic": config.deterministic}
    check_numerics(device, **settings)
    with (
        explaining_memory(device, "training", memory_remedy(config)),
        numerics(device, **settings),
        processes.leaving_together(),
    ):
        train(config, shlex.join([*prog.split(), *argv]))


def memory_remedy(config: TrainingConfig) -> str:
    """List the recipe's settings that reduce the memory of a training step."""
    now = vars(config)
    chunk, updates = now.get("grad_cache_chunk"), now.get("update_freq")
    ways = [f"lower --batch_size (now {config.batch_size})"]
    if chunk:  # cannot be combined with --update_freq
        ways = [f"lower --grad_cache_chunk (now {chunk})"]
    elif updates is not None:
        ways[0] += " and raise --update_freq"
    if chunk == 0 and updates == 1:
        ways.append("set --grad_cache_chunk")
    if now.get("checkpoint_activations") is False:
        ways.append("set --checkpoint_activations")
    if config.dtype == "fp32":
        ways.append("use --dtype bf16")
    return ", or ".join(ways)
