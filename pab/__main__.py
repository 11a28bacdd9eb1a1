"""List all commands: `python -m pab`."""

from __future__ import annotations

from pab.core.commands import COMMANDS, CommandParser
from pab.core.errors import run_cli


def main(argv: list[str] | None = None) -> None:
    """Print one line per command."""
    CommandParser(prog="python -m pab").parse_args(argv)
    width = max(len(command) for part in COMMANDS.values() for command in part)
    for title, part in COMMANDS.items():
        print(f"{title}:")
        for command, sentence in part.items():
            print(f"  {command:{width}}  {sentence}")
    print("\nEach command has --help. Commands of scripts/ run from the root of a clone.")


if __name__ == "__main__":
    run_cli(main)
