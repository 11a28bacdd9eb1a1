"""A folder is written completely, or the older folder stays."""

from __future__ import annotations

from pathlib import Path

import pytest

from pab.core.errors import InputError
from pab.core.files import write_folder


def write_as(text: str, folder: str) -> None:
    Path(folder).mkdir()
    (Path(folder) / "a.txt").write_text(text)


def test_a_folder_replaces_an_older_one(tmp_path: Path) -> None:
    target = tmp_path / "made/model"
    write_folder(target, lambda folder: write_as("first", folder))
    write_folder(target, lambda folder: write_as("second", folder))
    assert (target / "a.txt").read_text() == "second"
    assert [path.name for path in target.parent.iterdir()] == ["model"], "nothing left behind"


@pytest.mark.parametrize("failing", [1, 2])
def test_the_older_folder_stays_if_a_move_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    target = tmp_path / "model"
    write_as("first", str(target))
    moves, rename = list[Path](), Path.rename

    def fail_once(self: Path, other: Path) -> Path:
        moves.append(self)
        if len(moves) == failing:
            raise OSError(28, "No space left on device")
        return rename(self, other)

    monkeypatch.setattr(Path, "rename", fail_once)
    with pytest.raises(InputError, match=r"model: cannot be written: No space left on device"):
        write_folder(target, lambda folder: write_as("second", folder))
    assert (target / "a.txt").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["model"], "nothing left behind"
