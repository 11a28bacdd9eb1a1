"""Start UIT's fine-tuning or evaluation: `python -m uit.run --task cmp --dist f4`.

`--dist fN` runs one process on each of the first N GPUs; torchrun starts several processes. For
several machines, see the environment variables in `pab/core/launch.py`. All settings of `uit.train`
are also flags; `--bs` and `--epo` are the release's names for batch size and epochs.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from pathlib import Path

import torch

from pab.core.commands import CommandParser, add_debug_flag, names_flag, with_debug
from pab.core.config import config_from_args
from pab.core.errors import InputError, run_cli
from pab.core.files import existing_file
from pab.core.launch import machines, start_processes
from pab.data.tree import labelled_test
from pab.data.wordpiece import Tokenizer
from pab.training.data import training_sources
from pab.training.preflight import check_run_folders
from pab.training.resume import resumable_files
from uit.config import TrainConfig
from uit.infer import main as infer
from uit.outputs import PUBLISHED_K, name_part
from uit.train import main as train
from uit.train import text_draws
from uit.weights import bert_file

DEFAULT_CONFIG = "configs/uit/finetune.yaml"
DEBUG_CONFIG = "configs/uit/debug.yaml"
SHORT = {"--bs": "--batch_size", "--epo": "--epochs"}
SCORING = (
    "model", "input_size", "window", "text_encoder", "max_words", "max_text_length", "batch_size",
    "num_workers", "device",
)  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    """Read the command line, then train or evaluate."""
    given = _words(list(sys.argv[1:] if argv is None else argv))
    config, own = config_from_args(
        TrainConfig, given, prog="python -m uit.run", extra=_add_own_flags
    )
    if own.evaluate:
        # A config names the weights that training starts from, not those to evaluate.
        if not config.checkpoint or not names_flag(given, "--checkpoint"):
            raise InputError(
                "--evaluate", "expected the weights to evaluate, found no --checkpoint flag"
            )
        evaluate(config, own.k_test, same_caption_counts=own.same_caption_counts)
        return
    if own.same_caption_counts:
        raise InputError("--same_caption_counts", "needs --evaluate")
    count = _process_count(own.dist, config)
    passed = _without_own_flags(given)
    if count == 1 and machines() == 1:
        train(passed)
        return
    check_inputs(config)
    if config.device != "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = _first_gpus(count)
    start_processes(count, "uit.train", passed)


def check_inputs(config: TrainConfig) -> None:
    """Reject bad input before torchrun starts, so that one process reports it, not all of them.

    Raises:
        InputError: data, vocabulary or WordNet is missing or invalid, a new run's initial weights
            are missing, or an output folder or TensorBoard cannot be used.
    """
    check_run_folders(config)
    training_sources(config)
    Tokenizer(config.text_encoder, config.max_words, config.max_text_length)
    text_draws(config)
    if resumable_files(config):
        return  # a resumed run does not need its initial weights
    for path in (config.checkpoint, config.swin, config.bert and bert_file(config.bert)):
        if path:
            existing_file(path, "weights to start from")


def evaluate(config: TrainConfig, k_test: int, *, same_caption_counts: bool = False) -> None:
    """Score the labelled test set; print metrics, write a score file and a ranked list.

    Raises:
        InputError: see :func:`pab.scoring.rerank.score_candidates`.
    """
    output, k = Path(config.output_dir), name_part(k_test)
    words = [word for name in SCORING for word in (f"--{name}", str(getattr(config, name)))]
    infer(
        [*words, "--checkpoint", config.checkpoint, "--k_test", str(k_test)]
        + ["--annotation", str(labelled_test(config.data_path))]
        + ["--same_caption_counts"] * same_caption_counts
        + ["--tf32"] * config.tf32
        + ["--deterministic"] * config.deterministic
        + ["--save_score", str(output / f"score_test{k}.pt")]
        + ["--output_file", str(output / f"predictions_test{k}.txt")]
    )


def _words(argv: list[str]) -> list[str]:
    """Expand the release's short flag names; add the config of ``--debug``, or the default."""
    words = []
    for word in argv:
        flag, equals, value = word.partition("=")
        words.append(SHORT.get(flag, flag) + equals + value)
    words = with_debug(words, DEBUG_CONFIG)
    return words if names_flag(words, "--config") else ["--config", DEFAULT_CONFIG, *words]


def _add_own_flags(parser: CommandParser) -> None:
    data, model, training, output, speed = (
        parser.groups[name] for name in ("data", "model", "optimization", "output", "speed")
    )
    speed.add_argument(
        "--dist", default="f1", metavar="fN", help="first N GPUs of each machine (default f1)"
    )
    output.add_argument(
        "--evaluate",
        action="store_true",
        help="score the labelled test set of data_path with --checkpoint instead of training",
    )
    model.add_argument(
        "--k_test", type=int, default=PUBLISHED_K, metavar="N",
        help=f"candidates per query that --evaluate re-ranks (default {PUBLISHED_K})",
    )  # fmt: skip
    data.add_argument(
        "--same_caption_counts", action="store_true",
        help="with --evaluate: every image with the same caption counts as right",
    )  # fmt: skip
    training.add_argument("--bs", metavar="N", help="short for --batch_size")
    training.add_argument("--epo", metavar="N", help="short for --epochs")
    add_debug_flag(parser, DEBUG_CONFIG)


def _without_own_flags(words: list[str]) -> list[str]:
    """Return the arguments for ``uit.train``: all but the flags of this command."""
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    own.add_argument("--dist")
    own.add_argument("--k_test")
    return own.parse_known_args(words)[1]


def _process_count(dist: str, config: TrainConfig) -> int:
    """Parse N from ``fN``.

    Raises:
        InputError: the value is malformed, or asks for more GPUs than there are.
    """
    match = re.fullmatch(r"f([1-9]\d*)", dist)
    if match is None:
        raise InputError("--dist", f"expected f and a number of GPUs, such as f4, found {dist!r}")
    count = int(match[1])
    if count > 1 and config.device != "cpu" and torch.cuda.device_count() < count:
        raise InputError(
            "--dist", f"expected {count} GPUs, found {torch.cuda.device_count()}",
            todo="use at most the number found",
        )  # fmt: skip
    return count


def _first_gpus(count: int) -> str:
    """Return the first visible GPUs, for ``CUDA_VISIBLE_DEVICES``."""
    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    every = shown.split(",") if shown else [str(i) for i in range(count)]
    return ",".join(every[:count])


if __name__ == "__main__":
    run_cli(main)
