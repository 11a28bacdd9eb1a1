"""Score a gallery with any member: `python -m pab.scoring NAME`, then the member's flags."""

from __future__ import annotations

import sys

from pab.core.commands import CommandParser
from pab.core.errors import run_cli
from pab.scoring.job import scoring_command
from pab.scoring.members import member_config, members

PROG = "python -m pab.scoring"


def main(argv: list[str] | None = None) -> None:
    """Parse the command line and score the gallery."""
    words = sys.argv[1:] if argv is None else argv
    parser = CommandParser(
        prog=PROG,
        epilog=f"{PROG} NAME --help lists the flags of a member.",
    )
    parser.add_argument("name", metavar="NAME", choices=members(), help=", ".join(members()))
    name = parser.parse_args(words[:1]).name
    scoring_command(member_config(name), words[1:], prog=f"{PROG} {name}")


if __name__ == "__main__":
    run_cli(main)
