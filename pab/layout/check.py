"""Describe any path: ``python -m pab.layout check PATH``.

The check reports the kind of a folder or file, its content, and the next command to run. It
recognizes a data root with all or some parts of PAB, name-masked sets, annotations, tables,
photographs, videos, search indexes, scores, ranked lists, archives, configs and weights.
"""

from __future__ import annotations

from pathlib import Path

from pab.core.config import CommandParser
from pab.core.errors import InputError
from pab.layout.files import explain_file
from pab.layout.folders import explain_folder
from pab.layout.parts import FETCH, check_root, is_data_root, report, root_commands


def explain(path: str | Path) -> str:
    """Describe a path in lines of text.

    Raises:
        InputError: the path does not exist, is of unknown kind, or has invalid or unreadable
            content. Bad lines of a folder of captioned images, and of the training and labelled
            annotations of a usable data root, are listed in the text instead.
    """
    path = Path(path)
    if not path.exists():
        todo = f"check its spelling, or {FETCH}"
        raise InputError(path, "expected a file or folder, found neither", todo=todo)
    if not path.is_dir() and not path.is_file():
        raise InputError(path, "expected a file or folder, found a device or pipe")
    if path.name == "annotation" and path.is_dir() and is_data_root(path.absolute().parent):
        path = path.absolute().parent
    if path.is_dir() and is_data_root(path):
        parts = check_root(path)
        lines, commands = report(path, parts), root_commands(path, parts)
    else:
        found = explain_folder(path) if path.is_dir() else explain_file(path)
        lines = [f"{path}: {found.what}", *(f"  {fact}" for fact in found.facts)]
        commands = list(found.commands)
    if commands:
        lines += ["", "run next:", *(f"  {command}" for command in commands)]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Print the description of a path."""
    parser = CommandParser(prog="python -m pab.layout")
    commands = parser.add_subparsers(dest="command", required=True)
    checking = commands.add_parser("check", help="describe a path and suggest the next command")
    checking.add_argument(
        "root", nargs="?", metavar="PATH", default="data/PAB", help="default: data/PAB"
    )
    args = parser.parse_args(argv)
    print(explain(args.root))
