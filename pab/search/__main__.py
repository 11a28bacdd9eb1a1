"""Search photographs on the command line: `python -m pab.search`.

The first word selects a command. Without a command, a folder is searched once.
"""

from __future__ import annotations

import sys
from importlib import import_module

from pab.core.errors import run_cli

COMMANDS = {
    "index": "pab.search.index_command",
    "query": "pab.search.query_command",
    "serve": "pab.search.server.command",
    "export": "pab.search.export_command",
}
ONCE = "pab.search.once"


def main(argv: list[str] | None = None) -> None:
    """Run a command; the modules of the other commands are not imported."""
    words = sys.argv[1:] if argv is None else argv
    if words and words[0] in COMMANDS:
        import_module(COMMANDS[words[0]]).main(words[1:])
    else:
        import_module(ONCE).main(words)


if __name__ == "__main__":
    run_cli(main)
