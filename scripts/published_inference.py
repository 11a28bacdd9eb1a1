"""Run the published inference: score the members, re-rank LHP's candidates with UIT, and fuse.

`scripts/iterative_ensemble.sh` runs the last command of the release: UIT and fusion.
`scripts/infer_all.sh` first scores with LHP, BLIP-2 and CLIP. A flag is passed to UIT or to the
fusion; a flag that both have (such as ``--annotation``) is passed to all steps.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from ensemble.run import RunConfig
from pab.core.commands import CommandParser
from pab.core.config import add_config_flags, load_config
from pab.core.errors import InputError, run_cli
from pab.core.files import existing_file
from pab.scoring.job import QUERIES
from uit.infer import InferConfig

# Score flag of the fusion -> the command that writes the file.
MEMBERS = {
    "beit3_score": ["-m", "lhp.infer"],
    "blip2_score": ["scripts/blip2_infer.py"],
    "clip_score": ["scripts/clip_infer.py"],
}
# Settings of UIT that are derived from other flags, belong to the fusion or are not offered.
NOT_UIT = {"candidates", "save_itc", "save_score", "output_file", "top_k"}
UIT = {field.name for field in fields(InferConfig)} - NOT_UIT
FUSION = {field.name for field in fields(RunConfig)} - {"uit_score"}


def commands(script: str, argv: list[str]) -> list[list[str]]:
    """Check the settings of UIT and of the fusion; return the Python arguments of each command.

    Args:
        script: ``infer_all`` or ``iterative_ensemble``.
        argv: the command line.

    Raises:
        InputError: a setting is invalid, or a score file is missing.
    """
    prog = f"bash scripts/{script}.sh"
    parser = CommandParser(prog=prog, usage=f"{prog} [--config FILE] [--SETTING VALUE ...]")
    text = "settings of UIT; flags override the file (default: %(default)s)"
    parser.add_argument("--config", default="configs/uit/infer.yaml", metavar="FILE", help=text)
    text = "folder of UIT's score file and ranked list (default: %(default)s)"
    parser.groups["output"].add_argument("--output_dir", default="output", metavar="DIR", help=text)
    parser.groups["advanced"].add_argument("--task", default="cmp", help="task name: cmp")
    add_config_flags(parser, InferConfig, omit=NOT_UIT)
    add_config_flags(parser, RunConfig, omit={*UIT, "uit_score"})
    given = vars(parser.parse_args(argv))
    config, task, output = given.pop("config"), given.pop("task"), Path(given.pop("output_dir"))
    if task != "cmp":
        raise InputError("--task", f"expected cmp, found {task}")
    if given.get("answers") is not None:  # the fusion has no default annotation
        given.setdefault("annotation", QUERIES)

    unscored = [name for name in MEMBERS if name not in given] if script == "infer_all" else []
    for name in MEMBERS:
        member = name.removesuffix("_score")
        file = given.setdefault(name, f"sims_score/score_{member}_reproduce.pt")
        if file is not None and name not in unscored:
            existing_file(file, "a score file")
    uit: dict[str, Any] = {name: value for name, value in given.items() if name in UIT}
    fusion: dict[str, Any] = {name: value for name, value in given.items() if name in FUSION}
    data = {name: value for name, value in uit.items() if name in FUSION}
    uit["candidates"] = given["beit3_score"]
    uit["save_score"] = fusion["uit_score"] = str(output / "score_uit.pt")
    uit["output_file"] = str(output / "predictions_uit.txt")
    load_config(InferConfig, config, uit).check()
    load_config(RunConfig, None, fusion).check()
    return [
        *([*MEMBERS[name], *words(data)] for name in unscored),
        ["-m", "uit.infer", "--config", config, *words(uit)],
        ["-m", "ensemble.run", *words(fusion)],
    ]


def words(settings: Mapping[str, Any]) -> list[str]:
    """Convert settings to command-line flags."""
    found = []
    for name, value in settings.items():
        if isinstance(value, bool):
            found.append(f"--{name}" if value else f"--no_{name}")
            continue
        values = value if isinstance(value, list) else [value]
        found += [f"--{name}", *("none" if one is None else str(one) for one in values)]
    return found


def main(argv: list[str] | None = None) -> None:
    """Run the steps of the script named by the first argument; stop at the first failure."""
    script, *given = sys.argv[1:] if argv is None else argv
    for command in commands(script, given):
        code = subprocess.run([sys.executable, *command], check=False).returncode
        if code:
            sys.exit(code if code > 0 else 128 - code)  # shell exit code of a signal


if __name__ == "__main__":
    run_cli(main)
