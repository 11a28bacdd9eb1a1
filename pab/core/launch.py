"""Start the processes of one machine with torchrun: `python -m pab.core.launch 4 lhp.train ...`.

To use several machines, run the same command on each, with these environment variables: ``NNODES``
(number of machines), ``NODE_RANK`` (number of this machine, from 0) and ``MASTER_ADDR`` (name or
address of machine 0). If the default port is in use, set ``MASTER_PORT`` to another one.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys

import torch.distributed.run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from pab.core.commands import CommandParser
from pab.core.errors import InputError, run_cli
from pab.core.processes import number_in_environment

PORT = 29_500  # torchrun's default
_HOW = "set NNODES, NODE_RANK and MASTER_ADDR on every machine, or none of them"


def machines() -> int:
    """Read the number of machines from ``NNODES``; 1 if it is not set.

    Raises:
        InputError: it is not a positive integer.
    """
    return number_in_environment("NNODES", 1, default=1, todo=_HOW)


def rendezvous() -> list[str]:
    """Return torchrun's flags for the machines that the environment variables describe.

    Raises:
        InputError: a variable is missing or invalid.
    """
    count = machines()
    own = 0 if count == 1 else None
    number = number_in_environment("NODE_RANK", 0, count - 1, default=own, todo=_HOW)
    if count == 1:
        return ["--standalone"]
    address = os.environ.get("MASTER_ADDR", "")
    if not address or address.split() != [address]:
        problem = f"expected the address of machine 0, found {address!r}"
        raise InputError("MASTER_ADDR", problem, todo=_HOW)
    port = number_in_environment("MASTER_PORT", 1, 65_535, default=PORT, todo=_HOW)
    return [
        "--nnodes", str(count), "--node_rank", str(number),
        "--master_addr", address, "--master_port", str(port),
    ]  # fmt: skip


def start_processes(count: int, module: str, arguments: list[str]) -> None:
    """Run ``count`` processes of a module on this machine; if one fails, exit with its code.

    The exit code is 1 if a signal ended the process, and 128 + N if signal N stopped the launcher.
    Each process reports its own error or how to resume, so torchrun's report is suppressed.

    Raises:
        InputError: a variable that describes the machines is missing or invalid.
    """
    words = [*rendezvous(), "--nproc_per_node", str(count), "-m", module, *arguments]
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)  # torchrun's warnings about signals and threads
    try:
        torch.distributed.run.main(words)
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        sys.exit(max(failure.exitcode, 1))  # the code is negative after a signal
    except SignalException as error:
        sys.exit(128 + error.sigval)
    finally:
        logging.disable(before)


def main(argv: list[str] | None = None) -> None:
    """Read the command line and start the processes."""
    parser = CommandParser(prog="python -m pab.core.launch")
    parser.add_argument("gpus", help="number of processes on this machine, one per GPU")
    parser.add_argument("module", help="module to run, such as lhp.train")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="arguments of the module")
    args = parser.parse_args(argv)
    if not (args.gpus.isascii() and args.gpus.isdigit() and int(args.gpus)):
        raise InputError("GPUS", f"expected a number of GPUs per machine, found {args.gpus!r}")
    start_processes(int(args.gpus), args.module, args.arguments)


if __name__ == "__main__":
    run_cli(main)
