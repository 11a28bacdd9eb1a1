"""List of all commands, their common parser, and the flag ``--debug``."""

from __future__ import annotations

import argparse
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn

from pab.core import __version__
from pab.core.errors import EXIT_BAD_INPUT, InputError
from pab.core.outputs import check_inputs_are_kept

Group = Literal["data", "model", "optimization", "output", "speed", "advanced"]

GROUPS: tuple[Group, ...] = typing.get_args(Group)  # in the order of --help
# Section -> command -> description, printed by `python -m pab` and by --help of a Python command.
COMMANDS = {
    "Whole runs": {
        "bash scripts/demo.sh": "Install, build the mini data, score, fuse, evaluate and report.",
        "bash scripts/infer_all.sh": "Score with all members, then fuse, as published.",
        "bash scripts/reproduce.sh": "Score the published checkpoints and compare with the paper.",
    },
    "Score": {
        "python -m lhp.infer": "Score a gallery with a fine-tuned BEiT-3.",
        "python -m uit.infer": "Score each query's candidates with a fine-tuned UIT.",
        "python scripts/clip_infer.py": "Score a gallery with CLIP, zero-shot or fine-tuned.",
        "python scripts/blip2_infer.py": "Score a gallery with BLIP-2, zero-shot or fine-tuned.",
        "python scripts/embed_infer.py": "Score a gallery with a vision-language embedder.",
        "python scripts/rerank_infer.py": "Score candidates with a vision-language model.",
        "python -m pab.scoring": "Score a gallery with any member, selected by name.",
    },
    "Fuse": {
        "python -m ensemble.run": "Fuse score files into a ranked list.",
        "python -m ensemble.search": "Choose weights and decoding parameters on validation data.",
        "python -m ensemble.mine": "Mine training questions for a reranker from a ranking.",
        "python -m ensemble.protocol": "Check an answer file against an evaluation protocol.",
        "bash scripts/iterative_ensemble.sh": "Score LHP's candidates with UIT, then fuse.",
    },
    "Evaluate": {
        "python -m pab.evaluate": "Print the metrics of scores or of a ranked list.",
        "python -m pab.compare": "Compare two ranked lists of the same queries.",
        "python -m ensemble.report": "Write an HTML report of one or more score files.",
        "python -m ensemble.published": "Compare a score file's metrics with the paper's.",
    },
    "Search": {
        "python -m pab.search": "Search images by text; subcommands: index, query, serve, export.",
    },
    "Fine-tune": {
        "python -m lhp.train": "Fine-tune BEiT-3 with the local-global hybrid perspective.",
        "python -m uit.run": "Fine-tune UIT, or evaluate it on the labelled test set.",
        "python -m uit.train": "Fine-tune UIT without the launcher uit.run.",
        "python scripts/finetune_clip.py": "Fine-tune CLIP with LHP's views.",
        "python scripts/finetune_blip2.py": "Fine-tune BLIP-2 with LHP's views.",
        "python scripts/finetune_embedder.py": "Fine-tune a late-interaction embedder.",
        "python scripts/finetune_reranker.py": "Fine-tune a vision-language reranker.",
        "bash scripts/finetune_lhp.sh": "Fine-tune LHP as published.",
        "bash scripts/finetune_uit.sh": "Fine-tune UIT as published.",
        "python -m pab.core.launch": "Start training processes on one or several machines.",
        "python -m lhp.train_tokenizer": "Train a SentencePiece model on training captions.",
        "python -m uit.make_vocabulary": "Make a WordPiece vocabulary from training captions.",
        "python -m pab.encoders.train_clip_tokenizer": "Train a tokenizer for a new CLIP model.",
        "python -m pab.encoders.st.make_small": "Make a small, untrained Qwen3-VL.",
    },
    "Data and files": {
        "python -m pab.layout": "Explain a file or folder, and name the command to run next.",
        "python -m pab.scores": "Convert, show, export and merge scores in all forms.",
        "python -m pab.fetch": "Download public checkpoints.",
        "python -m pab.export_weights": "Export only the weights of a checkpoint.",
        "python -m pab.mini": "Draw the mini data set.",
        "python -m pab.mini.contact_sheet": "Make a page of the mini data's images.",
        "python -m pab": "List all commands.",
    },
}


class CommandParser(argparse.ArgumentParser):
    """Argument parser with grouped flags, ``--version``, and one-line errors.

    The description of a command comes from :data:`COMMANDS` if it is listed there. Subparsers are
    of this class too.
    """

    def __init__(self, **options: Any) -> None:
        known = {prog: text for part in COMMANDS.values() for prog, text in part.items()}
        sentence = known.get(options.get("prog", ""), options.get("description"))
        super().__init__(**{"allow_abbrev": False, **options, "description": sentence})
        version = f"person-anomaly-retrieval {__version__}"
        self.add_argument(
            "--version", action="version", version=version, help="show the version and exit"
        )
        self.groups = {name: self.add_argument_group(name) for name in GROUPS}

    def parse_known_args(  # type: ignore[override]  # argparse overloads it by namespace types
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Parse as argparse does; refuse an output file that is also an input.

        Outputs are the flags of the group ``output`` whose values are paths.

        Raises:
            InputError: see :func:`pab.core.outputs.check_inputs_are_kept`.
        """
        found, rest = super().parse_known_args(args, namespace)
        outputs: dict[str, object] = {}
        inputs: dict[str, object] = {}
        writes = self.groups["output"]._group_actions
        for action in self._actions:
            value = getattr(found, action.dest, None)
            if action not in writes:
                positional = f"the argument {action.metavar or action.dest}"
                inputs[action.option_strings[-1] if action.option_strings else positional] = value
            elif isinstance(value, Path):
                outputs[action.dest] = value
        check_inputs_are_kept(outputs, inputs)
        return found, rest

    def error(self, message: str) -> NoReturn:
        """Print one line on stderr and exit with code 2."""
        words = " ".join(message.split())  # a value may contain line breaks
        self.exit(EXIT_BAD_INPUT, f"error: {words}; see {self.prog} --help\n")


def add_debug_flag(parser: CommandParser, path: str) -> None:
    """Add ``--debug`` to ``--help``; :func:`with_debug` replaces the flag before parsing."""
    parser.groups["advanced"].add_argument(
        "--debug", action="store_true", help=f"short for --config {path}"
    )


def names_flag(argv: Sequence[str], name: str) -> bool:
    """Return true if a command line contains a flag, such as ``--config``."""
    return any(word.split("=")[0] == name for word in argv)


def with_debug(argv: Sequence[str], path: str) -> list[str]:
    """Replace ``--debug`` in a command line with ``--config PATH``.

    Raises:
        InputError: the command line also contains ``--config``.
    """
    if "--debug" not in argv:
        return list(argv)
    if names_flag(argv, "--config"):
        raise InputError("--debug", f"contradicts --config, because it sets --config {path}")
    return ["--config", path, *(word for word in argv if word != "--debug")]
