"""Fixtures shared by several tests: a tiny data set in PAB's layout, a tokenizer and a checkpoint.

The fixtures need no published file: the project's code makes everything from fixed seeds.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import settings
from PIL import Image

import pab.scoring.encoding
from lhp.beit3 import Beit3Retrieval, model_config
from lhp.tokenizer import Tokenizer
from lhp.train_tokenizer import train_tokenizer
from pab.core.errors import run_cli
from pab.core.files import write_json, write_text
from pab.core.notices import forget_notices
from pab.scoring.feature_cache import FeatureCache
from pab.scoring.job import ScoringConfig

settings.register_profile("repeatable", derandomize=True)  # the same examples in every run
settings.load_profile("repeatable")

SHARED = Path(__file__).resolve().parents[2] / "shared"
GOLDEN = SHARED / "golden"
needs_golden = pytest.mark.skipif(
    not GOLDEN.is_dir(), reason="needs the reference vectors of ../shared/golden"
)
MODEL = "beit3_debug_patch16_64"
VIDEOS = 12  # source videos; each has a normal and an abnormal pair
TEST_IMAGES = 10
COLOURS = {
    "red": (200, 30, 30), "green": (30, 160, 40), "blue": (30, 50, 200), "yellow": (220, 210, 40),
    "black": (15, 15, 15), "white": (240, 240, 240),
}  # fmt: skip
SCENES = {"park": (90, 140, 80), "street": (120, 120, 125)}
ACTIONS = {True: "walking", False: "falling"}


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Run PyTorch on one thread, because rounding depends on the number of threads."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _fresh_notices() -> None:
    """Forget the notices of earlier tests, because a process prints each notice only once."""
    forget_notices()


@pytest.fixture(autouse=True)
def _separate_feature_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Use a new default feature cache in each test, so that tests do not share vectors."""
    default = str(ScoringConfig().feature_cache_dir)

    def redirected(folder: str | Path, facts: Mapping[str, str]) -> FeatureCache:
        return FeatureCache(tmp_path / "features" if str(folder) == default else folder, facts)

    monkeypatch.setattr(pab.scoring.encoding, "FeatureCache", redirected)


def draw(path: Path, number: int, normal: bool) -> str:
    """Draw a coloured figure, upright if ``normal``, otherwise lying; return its caption."""
    colour = list(COLOURS)[number % len(COLOURS)]
    scene = list(SCENES)[number // len(COLOURS) % len(SCENES)]
    noise = np.random.default_rng([number, normal]).integers(0, 12, (60, 80, 3))
    canvas = np.full((60, 80, 3), SCENES[scene]) + noise
    rows, columns = (slice(8, 52), slice(32, 48)) if normal else (slice(38, 54), slice(15, 65))
    canvas[rows, columns] = COLOURS[colour]
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(canvas.clip(0, 255).astype(np.uint8)).save(path, quality=95)
    person = ("woman", "man")[number % 2]
    return f"A {person} in a {colour} coat is {ACTIONS[normal]} in the {scene}, number {number}."


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write the rows as JSON lines."""
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def make_data(root: Path) -> None:
    """Write two training shards, a labelled test set, and its name-masked copy with answers."""
    shards: list[list[dict[str, Any]]] = [[], []]
    for video in range(VIDEOS):
        shard = video % 2
        pair = []
        for normal, folder in ((True, "goal"), (False, "wentwrong")):
            image = f"train/imgs_{shard}/{folder}/{video}.jpg"
            caption = draw(root / image, video, normal)
            pair.append(
                {
                    "image": image,
                    "caption": caption,
                    "image_id": f"{shard}_{2 * video + (not normal)}",
                    "source_id": f"{video}_{int(not normal)}",
                }
            )
        for own, twin in (pair, pair[::-1]):
            own["hard_i"] = twin["image"].removeprefix("train/")
            own["hard_c"], own["hard_i_id"] = twin["caption"], twin["image_id"]
        shards[shard] += pair
    for number, rows in enumerate(shards):
        write_lines(root / f"annotation/train/pair_{number}.json", rows)

    masked = root / "name-masked_test-set"
    labelled, queries, answers = [], [], {}
    for number in range(TEST_IMAGES):
        normal = number % 2 == 0
        image = root / f"test/{number}.jpg"
        caption = draw(image, 100 + number, normal)
        kind = "normal" if normal else "anomaly"
        words = [caption, caption.replace("coat", "jacket")][: 1 + number % 2]
        labelled.append(
            {
                "image": f"test/{number}.jpg",
                "image_id": f"t{number}",
                "caption": words,
                kind: ACTIONS[normal],
            }
        )
        name, query = f"G{(number * 7) % TEST_IMAGES:02d}", f"q{(number * 3) % TEST_IMAGES:02d}"
        (masked / "gallery").mkdir(parents=True, exist_ok=True)
        shutil.copy(image, masked / f"gallery/{name}.jpg")
        queries.append({"query_index": query, "caption": caption})
        answers[query] = {"gallery": name, kind: ACTIONS[normal]}
    write_lines(root / "annotation/test/pair.json", labelled)
    write_lines(masked / "query.json", queries)
    write_json(masked / "answers.json", answers)
    write_text(masked / "query_index.txt", "".join(f"{query}\n" for query in sorted(answers)))


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Root of the tiny data set. Tests that modify the data must use ``data_copy``."""
    root = tmp_path_factory.mktemp("data") / "tiny"
    make_data(root)
    return root


@pytest.fixture
def data_copy(tiny_data: Path, tmp_path: Path) -> Path:
    """A copy of the tiny data set that a test may modify."""
    return shutil.copytree(tiny_data, tmp_path / "data", ignore=shutil.ignore_patterns(".cache"))


@pytest.fixture(scope="session")
def tokenizer_file(tiny_data: Path) -> Path:
    """A SentencePiece model trained on the tiny data's captions."""
    captions = [
        json.loads(line)["caption"]
        for shard in sorted((tiny_data / "annotation/train").glob("*.json"))
        for line in shard.read_text().splitlines()
    ]
    path = tiny_data.parent / "tiny.spm"
    train_tokenizer(captions, path, 64)
    return path


@pytest.fixture(scope="session")
def tokenizer(tokenizer_file: Path) -> Tokenizer:
    return Tokenizer(tokenizer_file)


@pytest.fixture(scope="session")
def debug_model() -> Callable[..., Beit3Retrieval]:
    """Return a function that builds a debug-size model with weights from a seed."""

    def make(
        seed: int = 0, name: str = MODEL, vocab_size: int = 70, text_positions: int = 1024
    ) -> Beit3Retrieval:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            config = model_config(name, vocab_size=vocab_size)
            model = Beit3Retrieval(dataclasses.replace(config, text_positions=text_positions))
            # With the default small weights, all vectors are nearly equal.
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    torch.nn.init.normal_(parameter, std=0.2)
        return model

    return make


def save_released(path: Path, model: Beit3Retrieval) -> Path:
    """Save a model like a released checkpoint: weights, epoch, and a Namespace of arguments."""
    arguments = argparse.Namespace(model="beit3_large_patch16_384_retrieval", task="356")
    torch.save({"model": model.state_dict(), "epoch": 3, "args": arguments}, path)
    return path


@pytest.fixture(scope="session")
def debug_checkpoint(
    debug_model: Callable[..., Beit3Retrieval], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    return save_released(tmp_path_factory.mktemp("checkpoint") / "debug.pth", debug_model())


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Return a function that runs a command with bad input and returns its only error line."""

    def run(main: Callable[[list[str] | None], None], argv: list[str]) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            run_cli(main, argv)
        # The progress line of the training index is not an error.
        lines = [
            line
            for line in capsys.readouterr().err.splitlines()
            if not line.startswith("checking and indexing")
        ]
        assert stop.value.code == 2
        assert len(lines) == 1, lines
        assert "error: " in lines[0]
        return lines[0]

    return run
