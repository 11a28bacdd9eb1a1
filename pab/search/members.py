"""Parse the flags of the member that photo search uses; see :mod:`pab.scoring.members`."""

from __future__ import annotations

from pab.core.commands import names_flag
from pab.core.config import config_from_args
from pab.core.errors import InputError
from pab.core.notices import notice
from pab.scoring.job import MemberConfig
from pab.scoring.members import member_config

INSTEAD = {
    "model": "--model names the member; --arch names its architecture",
    "annotation": "set queries with --query",
    "answers": "photographs have no labels, so no metrics are printed",
    "query_order": "results come in the order of --query",
    "save_score": "no score file is written; --json FILE writes names and scores",
    "output_file": "no ranked list is written; --json FILE writes names and scores",
}


def read_member(name: str, architecture: str | None, argv: list[str], *, prog: str) -> MemberConfig:
    """Parse a member's settings from a command line; ignore settings for data and outputs.

    Args:
        name: name of the member.
        architecture: architecture of the member (its ``--model``); None keeps the default.
        argv: other flags of the member, including ``--config``.
        prog: name of the command, for usage and messages.

    Raises:
        InputError: an unknown or invalid setting, or a flag that only benchmark scoring has.
    """
    cls = member_config(name)
    unused = cls.ignored()
    for setting in unused:
        if names_flag(argv, f"--{setting}") or names_flag(argv, f"--no_{setting}"):
            words = INSTEAD.get(setting, "it is for scoring a benchmark")
            problem = f"photo search has no such flag: {words}"
            raise InputError(f"--{setting}", problem, todo="remove it")
    if architecture is not None:
        argv = ["--model", architecture, *argv]
    config, rest = config_from_args(cls, argv, prog=prog)
    if rest.config is not None:
        default = cls()
        ignored = [one for one in unused if getattr(config, one) != getattr(default, one)]
        if ignored:
            notice(rest.config, f"photo search ignores its {', '.join(ignored)}")
    return config
