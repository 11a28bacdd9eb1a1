"""Two simulated machines: processes whose output, cache and data folders are not shared.

They must work as one process would, or both must stop with the same error. They must never hang.
"""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from lhp.config import TrainConfig
from lhp.infer import InferConfig
from lhp.train import train
from pab.core import processes
from pab.core.checkpoints import load_training_state, model_state, read_checkpoint
from pab.core.config import config_from_args
from pab.core.errors import InputError
from pab.scores import load_scores
from pab.training.resume import LAST
from tests.conftest import MODEL, TEST_IMAGES
from tests.test_lhp_train import Runs, assert_same_weights
from tests.test_processes import run_in

SHARD = "annotation/train/pair_1.json"
STATES = ("resumed.pth", f"whole/{LAST}")  # of rank 0, after three steps
IMAGE = "train/imgs_1/wentwrong/3.jpg"


class Machine:
    """The files of one process, as on a machine of its own."""

    def __init__(self, data: Path, tokenizer: Path, folder: Path) -> None:
        os.environ["LOCAL_RANK"] = "0"  # the only process of its machine
        self.folder = folder / f"machine-{processes.rank()}"
        self.data = self.folder / "data"
        shutil.copytree(data, self.data, ignore=shutil.ignore_patterns(".cache"))
        self.tokenizer = Path(shutil.copy(tokenizer, self.folder / "words.spm"))
        self.runs = Runs(self.data, self.tokenizer, self.folder)

    def start(self, name: str = "run", *flags: str, **settings: Any) -> str:
        """Train for a few steps; return the error, or an empty string."""
        settings = {"max_steps": 2, "drop_path": 0.0, **settings}
        config, _ = config_from_args(
            TrainConfig, self.runs.argv(name, *flags, **settings), prog="lhp"
        )
        try:
            train(config, "lhp")
        except InputError as error:
            return str(error)
        return ""


def in_process(number: int, change: Callable[[], object]) -> None:
    """Change files in one process; the others wait."""
    if processes.rank() == number:
        change()
    processes.barrier()


def copied(source: Path, target: Path) -> None:
    target.parent.mkdir(exist_ok=True)
    shutil.copy(source, target)


def flip_a_byte(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def checkpoints(data: Path, tokenizer: Path, folder: Path) -> dict[str, Any]:
    """Return the outcome of each start: an error, or an empty string."""
    machine = Machine(data, tokenizer, folder)
    first, second = (folder / f"machine-{i}/run" / LAST for i in range(2))
    found: dict[str, Any] = {"new": machine.start()}
    found["missing in 1"] = machine.start(max_steps=3)
    found["written by 1"] = sorted(path.name for path in second.parent.glob("*"))
    processes.barrier()
    in_process(1, lambda: copied(first, second))
    found["copied"] = machine.start(max_steps=3)
    in_process(0, lambda: shutil.copy(first, folder / "machine-0" / STATES[0]))
    found["older in 1"] = machine.start(max_steps=4)
    in_process(0, first.unlink)
    found["missing in 0"] = machine.start()
    in_process(0, lambda: copied(second, first))
    in_process(1, partial(flip_a_byte, second))
    found["damaged in 1"] = machine.start()
    found["new anyway"] = machine.start("run", "--no_auto_resume", max_steps=1)
    found["whole"] = machine.start("whole", max_steps=3)
    return found


def inputs(data: Path, tokenizer: Path, folder: Path) -> dict[str, Any]:
    """Return the outcome of each start with other files or settings in process 1."""
    machine = Machine(data, tokenizer, folder)
    second = processes.rank() == 1
    found: dict[str, Any] = {"settings": machine.start("a", batch_size=4 - second)}
    shard, image = machine.data / SHARD, machine.data / IMAGE
    in_process(1, lambda: image.rename(image.with_suffix(".away")))
    found["missing image"] = machine.start("b")
    in_process(1, lambda: image.with_suffix(".away").rename(image))
    text = shard.read_text()
    in_process(1, lambda: shard.write_text(text[: text.rindex("{")]))
    found["fewer pairs"] = machine.start("c")
    in_process(1, shard.unlink)
    found["missing shard"] = machine.start("d", train_shards="1")
    in_process(1, lambda: shard.write_text(text))
    # An unknown field, which SentencePiece ignores
    in_process(1, lambda: machine.tokenizer.open("ab").write(b"\x78\x01"))
    found["tokenizer"] = machine.start("e")
    return found


def scoring(data: Path, tokenizer: Path, weights: Path, folder: Path) -> dict[str, Any]:
    """Return the outcome of scoring with other data or weights in process 1."""
    machine = Machine(data, tokenizer, folder)
    masked, own = machine.data / "name-masked_test-set", machine.folder / "weights.pth"
    shutil.copy(weights, own)
    settings = {
        "model": MODEL, "input_size": 64, "checkpoint": own, "tokenizer": machine.tokenizer,
        "image_folder": masked / "gallery", "annotation": masked / "query.json", "device": "cpu",
        "num_workers": 0, "save_score": folder / "scores.pt", "output_file": "none",
        "feature_cache_dir": machine.folder / "features",
    }  # fmt: skip
    argv = [str(word) for key, value in settings.items() for word in (f"--{key}", value)]
    config, _ = config_from_args(InferConfig, argv, prog="lhp")

    def score() -> str:
        try:
            config.score()
        except InputError as error:
            return str(error)
        return ""

    found = {"same": score()}
    # Cloned, because loaded tensors are mapped from their file, which is overwritten below.
    state = {name: part.clone() for name, part in model_state(read_checkpoint(own), own).items()}
    state["logit_scale"] += 1
    in_process(1, lambda: torch.save({"model": state}, own))
    found["weights"] = score()
    in_process(1, lambda: shutil.copy(weights, own))
    query = masked / "query.json"
    in_process(1, lambda: query.write_text(query.read_text().replace("woman", "person")))
    found["captions"] = score()
    return found


@pytest.mark.distributed
def test_machines_score_the_same_model_and_data_or_not_at_all(
    tiny_data: Path, tokenizer_file: Path, debug_checkpoint: Path, tmp_path: Path
) -> None:
    work = partial(scoring, tiny_data, tokenizer_file, debug_checkpoint)
    first, second = run_in(2, work, tmp_path)
    assert first == second
    assert first["same"] == ""
    assert len(load_scores(tmp_path / "scores.pt").query_ids) == TEST_IMAGES
    assert first["weights"].startswith("--checkpoint: differs between processes: ")
    assert first["captions"].startswith("--annotation: differs between processes: 10 images, 10 q")


@pytest.mark.distributed
def test_machines_with_different_checkpoints_train_as_one_or_not_at_all(
    tiny_data: Path, tokenizer_file: Path, tmp_path: Path
) -> None:
    found = run_in(2, partial(checkpoints, tiny_data, tokenizer_file), tmp_path)
    seen = found[0]
    assert seen.pop("written by 1") == found[1].pop("written by 1") == []
    assert seen == found[1]
    assert seen["new"] == seen["copied"] == seen["new anyway"] == seen["whole"] == ""
    refused = "--output_dir: differs between processes: "
    host = socket.gethostname()
    for name, (one, other) in {
        "missing in 1": ("checkpoint-last.pth of step 2", "no checkpoint"),
        "older in 1": ("checkpoint-last.pth of step 3", "checkpoint-last.pth of step 2"),
        "missing in 0": ("no checkpoint", "checkpoint-last.pth of step 2"),
    }.items():
        assert seen[name].startswith(f"{refused}{one}"), seen[name]
        assert f" in process 0 on {host}; {other}" in seen[name]
        assert "use an --output_dir that all machines share" in seen[name]
    assert (
        "machine-1/run/checkpoint-last.pth: expected a checkpoint, found a damaged"
        in (seen["damaged in 1"])
    )
    resumed, whole = (load_training_state(tmp_path / "machine-0" / name) for name in STATES)
    assert resumed.step == whole.step == 3
    assert_same_weights(resumed.model, whole.model)


@pytest.mark.distributed
def test_machines_with_different_inputs_are_refused(
    tiny_data: Path, tokenizer_file: Path, tmp_path: Path
) -> None:
    first, second = run_in(2, partial(inputs, tiny_data, tokenizer_file), tmp_path)
    assert first == second
    assert first["settings"].startswith("--batch_size: differs between processes: 4 in process 0")
    assert "machine-1/data: missing training images (1 of 24)" in first["missing image"]
    assert first["fewer pairs"].startswith("--data_path: differs between processes: 24 pairs")
    assert "machine-1/data" in first["missing shard"]
    assert "--train_shards: no such shards" in first["missing shard"]
    assert first["tokenizer"].startswith("--sentencepiece_model: differs between processes: SHA")
