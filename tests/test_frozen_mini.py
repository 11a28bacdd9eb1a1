"""The mini data and the shipped checkpoints are frozen: they must not change.

`checkpoints/mini/frozen.json` contains hashes of the published files and data. The tests hash the
shipped files, the test split and the first 200 training pairs, and compare the hashes.
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


@pytest.mark.skipif(not BUILT.is_file(), reason="needs data/mini")
def test_the_files_in_data_mini_are_the_published_ones() -> None:
    splits = json.loads(BUILT.read_text())["splits"]
    for name, recorded in (("test", "test"), ("train", "whole_train"), ("distractors",) * 2):
        if name in splits:  # the demo builds only the test split
            found = {key: splits[name][key] for key in ("images_sha256", "annotations_sha256")}
            assert found == FROZEN["data"][recorded], name
