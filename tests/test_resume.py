"""Building blocks of resuming: comparison of settings, choice of the file to resume, kept files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pab.core.checkpoints import (
    TrainingState,
    load_training_state,
    save_training_state,
    save_weights,
)
from pab.core.errors import InputError
from pab.core.files import sha256_of_file
from pab.core.tensor_files import write_tensors
from pab.training.config import TrainingConfig
from pab.training.resume import (
    LAST,
    PAIRS,
    PREVIOUS,
    RESUME_KEY,
    Position,
    ResumePoint,
    RunIdentity,
    changed_settings,
    check_whole,
    epoch_files,
    epoch_name,
    find_resume_point,
    hash_of_files,
    keep_previous,
    known_content,
    named_files,
    prepare_folder,
    remove_older,
    replace_damaged_last,
    resume_metadata,
)

SETTINGS = {
    "lr": 1e-3, "seed": 16, "clip_grad": None, "finetune": "a.pth", "data_path": "d",
    "train_shards": "*", "output_dir": "o", "num_workers": 4, PAIRS: "24, abc",
}  # fmt: skip
DEFAULTS = {**SETTINGS, "lr": 1e-5, "finetune": "", "max_skipped_steps": 20, "new": 1}


def identity(content: Mapping[str, str | None] | None = None, **settings: Any) -> RunIdentity:
    return RunIdentity({**SETTINGS, **settings}, DEFAULTS, dict(content or {}))


# -------------------------------------------------------------------------------------- comparison


def test_equal_runs_differ_in_nothing() -> None:
    assert changed_settings(identity(), SETTINGS, {}, Path("s.pth")) == {}


@pytest.mark.parametrize(("name", "value"), [("lr", 5e-4), ("clip_grad", 1.0), ("num_workers", 0)])
def test_settings_that_repair_a_run_may_change(name: str, value: Any) -> None:
    changed = changed_settings(identity(**{name: value}), SETTINGS, {}, Path("s.pth"))
    assert changed == {name: (SETTINGS[name], value)}


def test_free_settings_are_not_compared() -> None:
    assert changed_settings(identity(output_dir="p"), SETTINGS, {}, Path("s.pth")) == {}


def test_all_other_settings_are_refused_together() -> None:
    now = identity(seed=3, lr=1e-4, **{PAIRS: "23, abd"})
    with pytest.raises(InputError) as error:
        changed_settings(now, SETTINGS, {}, Path("s.pth"))
    assert "seed (was 16, now 3), training pairs (was 24, abc, now 23, abd)" in str(error.value)
    assert "lr" not in error.value.problem


def test_training_data_are_compared_by_content() -> None:
    now = identity(data_path="/moved", train_shards="pair_*.json")
    assert changed_settings(now, SETTINGS, {}, Path("s.pth")) == {}
    saved = {name: value for name, value in SETTINGS.items() if name != PAIRS}
    with pytest.raises(InputError, match=r"data_path \(was d, now /moved\)"):
        changed_settings(now, saved, {}, Path("s.pth"))


def test_a_setting_missing_from_a_saved_run_counts_as_its_default() -> None:
    now = identity(new=1, max_skipped_steps=5)
    assert changed_settings(now, SETTINGS, {}, Path("s.pth")) == {}
    with pytest.raises(InputError, match=r"new \(was 1, now 2\)"):
        changed_settings(identity(new=2), SETTINGS, {}, Path("s.pth"))


def test_files_are_compared_by_their_hash(capsys: pytest.CaptureFixture[str]) -> None:
    moved = identity({"finetune": "1" * 64}, finetune="moved.pth")
    assert changed_settings(moved, SETTINGS, {"finetune": "1" * 64}, Path("s.pth")) == {}
    other = identity({"finetune": "2" * 64})
    with pytest.raises(InputError, match=r"finetune \(was SHA-256 1{12}, now 2{12}: a.pth\)"):
        changed_settings(other, SETTINGS, {"finetune": "1" * 64}, Path("s.pth"))
    assert capsys.readouterr().err == ""
    gone = identity({"finetune": None})
    assert changed_settings(gone, SETTINGS, {"finetune": "1" * 64}, Path("s.pth")) == {}
    said = "note: --finetune: a.pth is missing; it is neither compared nor needed\n"
    assert capsys.readouterr().err == said


@pytest.mark.parametrize("known", [True, False])
def test_a_run_without_start_weights_is_a_different_run(known: bool) -> None:
    saved = SETTINGS if known else {k: v for k, v in SETTINGS.items() if k != "finetune"}
    with pytest.raises(InputError, match=r"finetune \(was a.* now \)"):
        changed_settings(identity(finetune=""), saved, {"finetune": "1" * 64}, Path("s.pth"))


def test_states_without_hashes_are_compared_by_path() -> None:
    now = identity({"finetune": "1" * 64}, finetune="moved.pth")
    with pytest.raises(InputError, match=r"finetune \(was a.pth, now moved.pth\)"):
        changed_settings(now, SETTINGS, {}, Path("s.pth"))
    assert changed_settings(identity({"finetune": "1" * 64}), SETTINGS, {}, Path("s.pth")) == {}


def test_hashes_of_files(tmp_path: Path) -> None:
    one, two = tmp_path / "1", tmp_path / "2"
    one.write_bytes(b"one")
    two.write_bytes(b"two")
    assert hash_of_files(one) == sha256_of_file(one)
    assert hash_of_files(one, two) != hash_of_files(two, one)
    assert hash_of_files(one, tmp_path / "3") is None
    assert hash_of_files() is None
    assert hash_of_files(tmp_path) is None
    assert {k: v() for k, v in named_files(a=str(one), b="").items()} == {"a": sha256_of_file(one)}


def test_known_hashes_stay_known_when_their_files_are_gone() -> None:
    point = ResumePoint(Path("s"), True, {}, {"finetune": "1", "vocab": "2"}, {})
    assert known_content(identity({"finetune": None, "vocab": "2"}), point) == point.content
    assert known_content(identity({"finetune": None, "vocab": "2"}), None) == {"vocab": "2"}


# --------------------------------------------------------------------------------- choice of a file


def write_state(path: Path, step: int, **settings: Any) -> Path:
    weights = {"w": torch.arange(100.0)}
    state = TrainingState(weights, {}, step, 1, 0, [], {**SETTINGS, **settings})
    save_training_state(path, state)
    return path


def write_epoch(folder: Path, epoch: int, **settings: Any) -> Path:
    position = Position(6 * (epoch + 1), epoch + 1, 0, None)
    metadata = {RESUME_KEY: resume_metadata(identity(**settings), {}, position)}
    path = folder / epoch_name(epoch)
    save_weights(path, {"w": torch.arange(100.0)}, metadata)
    return path


def flip(path: Path, place: int) -> None:
    """Flip one bit of a file."""
    raw = bytearray(path.read_bytes())
    raw[place % len(raw)] ^= 0x10
    path.write_bytes(raw)


def flip_a_weight(path: Path) -> None:
    flip(path, path.read_bytes().index(torch.arange(100.0).numpy().tobytes()) + 41)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two states and the weights of three epochs."""
    write_state(tmp_path / LAST, 20)
    write_state(tmp_path / PREVIOUS, 18)
    for epoch in range(3):
        write_epoch(tmp_path, epoch)
    return tmp_path


def found(folder: Path, **config: Any) -> str | None:
    point = find_resume_point(TrainingConfig(output_dir=str(folder), **config), identity())
    return None if point is None else point.path.name


def test_the_last_state_is_the_one_to_resume(folder: Path) -> None:
    assert found(folder) == found(folder, resume_from="newest_good") == LAST
    assert found(folder, auto_resume=False) is None
    with pytest.raises(InputError, match="--resume_from: contradicts --no_auto_resume"):
        TrainingConfig(auto_resume=False, resume_from="newest_good").check()
    (folder / LAST).unlink()
    assert found(folder) is None, "without the last state, a new run starts"
    assert found(folder / "none", resume_from="newest_good") is None


@pytest.mark.parametrize("damage", [cut, flip_a_weight, empty])
def test_a_damaged_state_is_reported_and_skipped_on_request(
    folder: Path, damage: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    order = [LAST, PREVIOUS, *(epoch_name(epoch) for epoch in (2, 1, 0))]
    for name, following in zip(order, [*order[1:], None], strict=True):
        damage(folder / name)
        with pytest.raises(InputError, match=r"a damaged file .*; use --resume_from newest_good"):
            found(folder)
        if following is None:
            with pytest.raises(InputError, match=r"none of its checkpoints is usable \(5\)"):
                found(folder, resume_from="newest_good")
        else:
            assert found(folder, resume_from="newest_good") == following
            said = capsys.readouterr().err.splitlines()
            assert any(f"/{name}: skipped: expected a checkpoint" in line for line in said)
            alone = any("weights only: optimizer, average and random" in line for line in said)
            assert alone == (following not in (LAST, PREVIOUS))


def test_a_missing_state_counts_as_damaged(folder: Path) -> None:
    (folder / LAST).unlink()
    assert found(folder, resume_from="newest_good") == PREVIOUS


def test_files_of_another_run_are_an_error(folder: Path) -> None:
    write_state(folder / LAST, 20, seed=3)
    with pytest.raises(InputError, match=r"seed \(was 3, now 16\)"):
        found(folder, resume_from="newest_good")
    cut(folder / LAST)
    cut(folder / PREVIOUS)
    write_epoch(folder, 2, seed=3)
    with pytest.raises(InputError, match=r"checkpoint-2.pth: .*seed \(was 3, now 16\)"):
        found(folder, resume_from="newest_good")


def test_weights_of_unknown_origin_are_skipped(folder: Path) -> None:
    (folder / LAST).unlink()
    (folder / PREVIOUS).unlink()
    save_weights(folder / epoch_name(2), {"w": torch.ones(3)}, {})
    assert found(folder, resume_from="newest_good") == epoch_name(1)


def test_weights_alone_report_no_changed_settings(folder: Path) -> None:
    (folder / LAST).unlink()
    (folder / PREVIOUS).unlink()
    config = TrainingConfig(output_dir=str(folder), resume_from="newest_good")
    point = find_resume_point(config, identity(lr=5.0, data_path="elsewhere"))
    assert point is not None
    assert point.record() == {"file": epoch_name(2), "exact": False, "changed": {}}


def test_a_changed_setting_is_reported(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    point = find_resume_point(TrainingConfig(output_dir=str(folder)), identity(lr=5e-4))
    assert point is not None
    assert point.record()["changed"] == {"lr": [1e-3, 5e-4]}
    said = f"note: {folder / LAST}: resumed with other settings: lr 0.001 -> 0.0005\n"
    assert capsys.readouterr().err == said


@given(place=st.integers(min_value=0, max_value=10**6), keep=st.none() | st.integers(0, 10**6))
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_damage_changes_a_state_unnoticed(tmp_path: Path, place: int, keep: int | None) -> None:
    path = write_state(tmp_path / LAST, 20)
    whole = path.read_bytes()
    if keep is None:
        flip(path, place)
    else:
        path.write_bytes(whole[: keep % len(whole)])
    try:
        check_whole(path)
        state = load_training_state(path)
    except InputError:
        return
    # An accepted state is intact: the flipped bit was in padding or in an unused field.
    assert torch.equal(state.model["w"], torch.arange(100.0))
    assert (state.step, state.config) == (20, SETTINGS)


# ----------------------------------------------------------------------------------- files of a run


def test_weights_of_epochs_are_found_in_order(tmp_path: Path) -> None:
    for name in ("checkpoint-10.pth", "checkpoint-9.pth", LAST, "checkpoint-x.pth", "a-1.pth"):
        (tmp_path / name).touch()
    assert [epoch for epoch, _ in epoch_files(tmp_path)] == [9, 10]
    assert epoch_files(tmp_path / "none") == []


@pytest.mark.parametrize(("keep", "left"), [(None, [0, 2, 4, 9]), (1, [4, 9]), (2, [2, 4, 9])])
def test_the_newest_weights_are_kept(tmp_path: Path, keep: int | None, left: list[int]) -> None:
    for epoch in (0, 2, 4, 9):  # epoch 9 is from an earlier run
        (tmp_path / epoch_name(epoch)).touch()
    remove_older(tmp_path, 4, keep)
    assert [epoch for epoch, _ in epoch_files(tmp_path)] == left


def test_the_previous_state_is_kept_without_a_second_write(tmp_path: Path) -> None:
    keep_previous(tmp_path)
    assert not (tmp_path / PREVIOUS).exists()
    for step in (1, 2, 3):
        keep_previous(tmp_path)
        write_state(tmp_path / LAST, step)
    assert load_training_state(tmp_path / PREVIOUS).step == 2
    keep_previous(tmp_path)
    keep_previous(tmp_path)  # as after a run killed while writing its state
    assert (tmp_path / PREVIOUS).samefile(tmp_path / LAST)


def test_without_links_no_previous_state_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    write_state(tmp_path / LAST, 1)
    monkeypatch.setattr("os.link", refuse)
    keep_previous(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [LAST]
    assert "is not kept: Operation not permitted" in capsys.readouterr().err


@pytest.mark.parametrize("links", [True, False])
def test_the_resumed_state_replaces_a_damaged_last_state(
    folder: Path, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    if not links:
        monkeypatch.setattr("os.link", refuse)
    cut(folder / LAST)
    replace_damaged_last(ResumePoint(folder / PREVIOUS, True, {}, {}, {}))
    assert load_training_state(folder / LAST).step == 18
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]
    before = (folder / LAST).read_bytes()
    for name in (LAST, epoch_name(2)):
        replace_damaged_last(ResumePoint(folder / name, name == LAST, {}, {}, {}))
        assert (folder / LAST).read_bytes() == before


def test_files_of_an_earlier_run_are_named(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["checkpoint-best.pth", "checkpoint-final.pth", "train_ids.txt", "val_ids.txt"]
    names += ["val_pairs.json", "skipped.txt"]
    for name in names:
        (folder / name).touch()
    (folder / "model").mkdir()
    prepare_folder(folder, None)
    assert not (folder / LAST).exists()
    epochs = [epoch_name(epoch) for epoch in range(3)]
    said = (
        f"files of an earlier run remain until overwritten: {', '.join([*epochs, *names])}, model"
    )
    assert said in capsys.readouterr().err


def test_states_of_the_first_version_are_read(tmp_path: Path) -> None:
    path = write_state(tmp_path / LAST, 20)
    raw = torch.load(path, weights_only=True)
    for name in ("skipped", "facts", "content"):
        del raw[name]
    write_tensors(path, {**raw, "training_state": 1})
    state = load_training_state(path)
    assert (state.step, state.skipped, state.facts, state.content) == (20, {}, {}, {})
    assert found(tmp_path) == LAST
    write_tensors(path, {**raw, "training_state": 2})
    with pytest.raises(InputError, match="unknown fields: content, facts, skipped"):
        load_training_state(path)
