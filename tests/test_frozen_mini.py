"""The mini data and the shipped checkpoints are frozen: later work must not retune them.

`checkpoints/mini/frozen.json` holds what was published: hashes of the shipped files, of the test
split and of the first 200 training pictures, made again here with the settings' own seed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pab.core.files import sha256_of_file
from pab.mini.build import MANIFEST, Plan, build

ROOT = Path(__file__).parents[1]
MINI, BUILT = ROOT / "checkpoints/mini", ROOT / "data/mini" / MANIFEST
FROZEN: dict[str, Any] = json.loads((MINI / "frozen.json").read_text(encoding="utf-8"))


def test_shipped_files_are_the_published_ones() -> None:
    shipped = {str(path.relative_to(MINI)) for path in MINI.rglob("*") if path.is_file()}
    assert FROZEN["files"].keys() == shipped - {"frozen.json"}
    for name, digest in FROZEN["files"].items():
        assert sha256_of_file(MINI / name) == digest, name


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("frozen") / "mini"
    build(Plan(out, train=FROZEN["data"]["train_sample"], workers=2), ("test", "train"), print)
    splits: dict[str, Any] = json.loads((out / MANIFEST).read_text())["splits"]
    return splits


@pytest.mark.parametrize("split", ["test", "train"])
@pytest.mark.parametrize("kind", ["images_sha256", "annotations_sha256"])
def test_the_data_are_the_published_ones(made: dict[str, Any], split: str, kind: str) -> None:
    assert made[split][kind] == FROZEN["data"][split][kind]


@pytest.mark.skipif(not BUILT.is_file(), reason="data/mini has not been built here")
def test_what_is_built_here_is_the_published_set() -> None:
    splits = json.loads(BUILT.read_text())["splits"]
    for name, recorded in (("test", "test"), ("train", "whole_train"), ("distractors",) * 2):
        if name in splits:  # the demo builds the test split alone
            found = {key: splits[name][key] for key in ("images_sha256", "annotations_sha256")}
            assert found == FROZEN["data"][recorded], name
