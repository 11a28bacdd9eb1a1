"""Four and eight processes train and score as one process does."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from lhp.config import TrainConfig
from lhp.infer import main as score
from lhp.train import train
from pab.core import gradients, processes
from pab.core.config import config_from_args
from pab.scores import load_scores
from pab.training.loop import FINAL
from pab.training.run_log import read_log
from tests.conftest import MODEL
from tests.test_lhp_train import Runs, largest_difference, weights
from tests.test_processes import run_in

PAIRS = 8  # per step, over all processes


def train_and_score(
    data: Path, tokenizer: Path, checkpoint: Path | None, folder: Path
) -> dict[str, Any]:
    """Train and validate one epoch; score the test set with ``checkpoint`` or the new weights."""
    world = processes.world_size()
    if world > 1:  # a single process is pytest's own, and has no buckets
        gradients.BUCKET_ELEMENTS = 10_000  # so that the debug model needs many buckets
    name = f"world-{world}"
    # Each process draws its own dropped paths; a small eps would turn rounding errors into steps.
    argv = Runs(data, tokenizer, folder).argv(
        name, batch_size=PAIRS // world, epochs=1, drop_path=0.0, opt_eps=1e-3, val_pairs=4,
        ema_decay=0.9,
    )  # fmt: skip
    config, _ = config_from_args(TrainConfig, argv, prog="lhp")
    train(config, "lhp")
    masked = data / "name-masked_test-set"
    given = {
        "model": MODEL, "input_size": 64, "tokenizer": tokenizer,
        "checkpoint": checkpoint or folder / name / FINAL,
        "image_folder": masked / "gallery", "annotation": masked / "query.json", "device": "cpu",
        "num_workers": 0, "save_score": folder / f"{name}.pt",
        "output_file": folder / f"{name}.txt", "batch_size": 2,
    }  # fmt: skip
    words = [word for key, value in given.items() for word in (f"--{key}", str(value))]
    score([*words, "--no_feature_cache"])  # comes last, because it leaves the group
    return {"world": world}


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("world", [4, 8])
def test_curve_and_scores_equal_those_of_one_process(
    tiny_data: Path, tokenizer_file: Path, tmp_path: Path, world: int
) -> None:
    train_and_score(tiny_data, tokenizer_file, None, tmp_path)
    alone = tmp_path / "world-1"
    work = partial(train_and_score, tiny_data, tokenizer_file, alone / FINAL)
    assert run_in(world, work, tmp_path) == [{"world": world}] * world
    many = tmp_path / f"world-{world}"
    for kind in ("train", "val"):
        one, other = (read_log(run / "log.jsonl", kind) for run in (alone, many))
        assert len(one) == len(other) > 0
        for name in one[0].keys() - {"seconds", "kind"}:
            assert [row[name] for row in other] == pytest.approx(
                [row[name] for row in one], rel=1e-3, abs=1e-6
            ), name
    assert largest_difference(weights(alone), weights(many)) < 1e-5
    scores, found = (load_scores(tmp_path / f"world-{n}.pt") for n in (1, world))
    assert (found.query_ids, found.gallery_ids) == (scores.query_ids, scores.gallery_ids)
    torch.testing.assert_close(found.scores, scores.scores, rtol=0, atol=1e-6)
    lists = [(tmp_path / f"world-{n}.txt").read_text() for n in (1, world)]
    assert lists[0] == lists[1]
