"""Resumed training runs: skipped steps, changed settings, moved files, damaged states."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lhp.infer
import pab.core.progress
import pab.training.pairs
from lhp.beit3 import Beit3Retrieval
from lhp.tokenizer import Tokenizer
from lhp.train import main
from pab.core import processes
from pab.core.checkpoints import TrainingState, load_training_state
from pab.core.errors import InputError, run_cli
from pab.core.tensor_files import write_tensors
from pab.scores import load_scores
from pab.training.loop import FINAL
from pab.training.resume import LAST, PREVIOUS, epoch_name
from pab.training.run_log import read_log
from tests.conftest import MODEL, save_released
from tests.test_lhp_train import Runs, assert_same_weights, losses, weights
from tests.test_processes import run_in

STEPS = 6  # per epoch, without a validation split


@pytest.fixture
def runs(tiny_data: Path, tokenizer_file: Path, tmp_path: Path) -> Runs:
    return Runs(tiny_data, tokenizer_file, tmp_path)


Poison = Callable[..., Any]


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> Iterator[Poison]:
    """Return a function that spoils the loss or a gradient of chosen updates (1: the first)."""
    true_backward = pab.training.pairs.pair_backward

    def spoil(steps: set[int], what: str) -> None:
        count = 0

        def backward(vectors: Any, batch: Any, scale: Tensor, **options: Any) -> Tensor:
            nonlocal count
            count += 1
            loss = true_backward(vectors, batch, scale, **options)
            if count not in steps:
                return loss
            if what == "loss":
                return loss * float("nan")
            assert scale.grad is not None
            scale.grad.fill_(float("inf"))
            return loss

        monkeypatch.setattr(pab.training.pairs, "pair_backward", backward)

    return spoil


def flat(state: TrainingState) -> dict[str, Any]:
    """Return everything that a skipped step must not change, with tensors as lists."""

    def plain(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.tolist()
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items() if key != "lr"}
        return [plain(item) for item in value] if isinstance(value, list | tuple) else value

    return {name: plain(getattr(state, name)) for name in ("model", "optimizer", "ema")}


def record(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "run.json").read_text())
    return found


# ------------------------------------------------------------------------------------ skipped steps


@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_step_that_is_not_finite_changes_nothing(
    runs: Runs, poison: Poison, what: str, dtype: str, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(pab.core.progress, "LINE_EVERY_S", 0.0)  # print progress at once
    settings = {"dtype": dtype, "ema_decay": 0.9, "epochs": 1}
    before = load_training_state(runs("run", max_steps=2, **settings) / LAST)
    poison({1}, what)
    run = runs("run", max_steps=3, **settings)
    after = load_training_state(run / LAST)
    assert (after.step, after.skipped) == (3, {"total": 1, "in_row": 1})
    assert flat(after) == flat(before)
    row = read_log(run / "log.jsonl", "train")[-1]
    assert (row["step"], row["skipped"]) == (3, 1)
    assert record(run)["skipped_steps"] == 1
    said = capsys.readouterr().err
    assert "step 3 skipped, 1 in a row, 1 in all: loss " in said
    assert ", skipped 1" in said
    runs("run", **settings)
    rows = read_log(run / "log.jsonl", "train")
    assert [row.get("skipped") for row in rows] == [None, None, 1, None, None, None]
    rates = [row["lr"] for row in read_log(runs("whole", **settings) / "log.jsonl", "train")]
    assert [row["lr"] for row in rows] == rates, "skipped steps advance the schedule"
    assert load_training_state(run / LAST).skipped == {"total": 1, "in_row": 0}
    assert record(run)["skipped_steps"] == 1


def test_too_many_skipped_steps_in_a_row_end_the_run(
    runs: Runs, poison: Poison, capsys: pytest.CaptureFixture[str]
) -> None:
    limits = {"max_skipped_steps": 3, "clip_grad": 2.0}
    poison({2, 3, 5, 6, 7}, "loss")
    with pytest.raises(SystemExit) as stop:
        run_cli(main, runs.argv("run", **limits))
    assert stop.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: training: skipped steps in a row: 3, the last at step 7: ")
    assert "lower --lr (now 0.001), set --clip_grad (now 2.0)" in last
    assert "--dtype fp32 or bf16 (now fp32)" in last
    rows = read_log(runs.folder / "run/log.jsonl", "train")
    assert [row.get("skipped") for row in rows] == [None, 1, 2, None, 3, 4, 5]
    assert record(runs.folder / "run")["skipped_steps"] == 5


def test_the_count_of_skipped_steps_survives_a_resume(runs: Runs, poison: Poison) -> None:
    poison({1, 2}, "loss")
    runs("run", max_steps=2, max_skipped_steps=3)
    poison({1, 2, 3}, "loss")
    with pytest.raises(InputError, match="skipped steps in a row: 3, the last at step 3"):
        runs("run", max_skipped_steps=3)
    poison({1, 2}, "loss")  # changed settings reset the count
    run = runs("run", max_skipped_steps=3, clip_grad=1.0)
    assert load_training_state(run / LAST).skipped == {"total": 4, "in_row": 0}


@pytest.mark.parametrize(("limit", "taken"), [(3, 20), (25, 25)])
def test_loss_scaling_has_time_to_find_its_scale(
    runs: Runs, poison: Poison, monkeypatch: pytest.MonkeyPatch, limit: int, taken: int
) -> None:
    import pab.training.loop

    scaler = torch.amp.GradScaler("cpu")  # --dtype fp16 is rejected on a CPU
    monkeypatch.setattr(pab.training.loop, "make_scaler", lambda *_: scaler)
    poison(set(range(1, taken)), "gradient")  # one fewer than would end the run
    run = runs("run", epochs=6, max_skipped_steps=limit)
    assert record(run)["skipped_steps"] == taken - 1
    assert scaler.get_scale() == 65536 * 0.5 ** (taken - 1)
    poison(set(range(1, 99)), "gradient")
    with pytest.raises(InputError, match=f"skipped steps in a row: {taken}"):
        runs("other", epochs=6, max_skipped_steps=limit)


def test_a_run_without_skipped_steps_records_zero(runs: Runs) -> None:
    run = runs("run", epochs=1)
    assert record(run)["skipped_steps"] == 0
    assert load_training_state(run / LAST).skipped == {"total": 0, "in_row": 0}


# -------------------------------------------------------------------------------- weights of epochs


def test_each_epochs_weights_are_those_of_a_run_that_never_stopped(runs: Runs) -> None:
    settings = {"epochs": 3, "ema_decay": 0.9, "val_pairs": 4}
    whole = runs("whole", **settings)
    runs("cut", max_steps=3, **settings)
    runs("cut", max_steps=5, **settings)  # stops after the last step of epoch 0
    assert not (runs.folder / "cut" / epoch_name(0)).exists()
    cut = runs("cut", **settings)
    names = [*(epoch_name(epoch) for epoch in range(3)), FINAL]
    assert {p.name for p in whole.glob("*.pth")} == {p.name for p in cut.glob("*.pth")}
    for name in names:
        assert (whole / name).read_bytes() == (cut / name).read_bytes(), name
    assert_same_weights(weights(whole, epoch_name(2)), weights(whole, FINAL))
    first, second = weights(whole, epoch_name(0)), weights(whole, epoch_name(1))
    assert not torch.equal(first["logit_scale"], second["logit_scale"])


def test_weights_of_every_nth_epoch_and_the_newest_of_them(runs: Runs) -> None:
    run = runs("run", epochs=5, save_ckpt_freq=2)
    assert [path.name for path in sorted(run.glob("checkpoint-?.pth"))] == [
        epoch_name(1), epoch_name(3), epoch_name(4)
    ]  # fmt: skip
    run = runs("few", epochs=5, keep_checkpoints=2)
    assert [path.name for path in sorted(run.glob("checkpoint-?.pth"))] == [
        epoch_name(3), epoch_name(4)
    ]  # fmt: skip


def scores(runs: Runs, checkpoint: Path) -> Tensor:
    masked = runs.data / "name-masked_test-set"
    given = {
        "model": MODEL, "input_size": 64, "checkpoint": checkpoint, "tokenizer": runs.tokenizer,
        "image_folder": masked / "gallery", "annotation": masked / "query.json", "device": "cpu",
        "num_workers": 0, "save_score": runs.folder / "s.pt", "output_file": runs.folder / "l.txt",
    }  # fmt: skip
    words = [word for key, value in given.items() for word in (f"--{key}", str(value))]
    lhp.infer.main([*words, "--no_feature_cache"])
    return load_scores(runs.folder / "s.pt").scores


@pytest.mark.parametrize("ema", [{}, {"ema_decay": 0.5}])
def test_every_checkpoint_is_scored(
    runs: Runs, ema: dict[str, float], capsys: pytest.CaptureFixture[str]
) -> None:
    run = runs("run", lr=5e-3, **ema)
    capsys.readouterr()
    final = scores(runs, run / FINAL)
    assert torch.equal(scores(runs, run / epoch_name(1)), final)
    assert "note:" not in capsys.readouterr().err
    assert torch.equal(scores(runs, run / LAST), final)
    kind = "its averaged weights (--ema_decay)" if ema else "its weights"
    assert f"note: {run / LAST}: a training state; {kind} are used" in capsys.readouterr().err
    assert not torch.equal(scores(runs, run / epoch_name(0)), final)


# ---------------------------------------------------------------------------------- other settings


def test_settings_that_repair_a_run_change_on_resume(
    runs: Runs, capsys: pytest.CaptureFixture[str]
) -> None:
    runs("run", max_steps=2)
    capsys.readouterr()
    repaired = {
        "lr": 5e-4, "min_lr": 5e-5, "clip_grad": 0.5, "dtype": "bf16", "grad_cache_chunk": 2,
        "num_workers": 1, "max_skipped_steps": 7,
    }  # fmt: skip
    run = runs("run", max_steps=4, **repaired)
    first, second = record(run)["starts"]
    assert first["resumed_from"] is None
    old = {
        "lr": 1e-3, "min_lr": 1e-4, "clip_grad": None, "dtype": "fp32", "grad_cache_chunk": 0,
        "num_workers": 0, "max_skipped_steps": 20,
    }  # fmt: skip
    changed = {name: [old[name], value] for name, value in repaired.items()}
    assert second["resumed_from"] == {"file": LAST, "exact": True, "changed": changed}
    said = capsys.readouterr().err
    assert f"note: {run / LAST}: resumed with other settings: " in said
    assert "lr 0.001 -> 0.0005" in said
    rates = [row["lr"] for row in read_log(run / "log.jsonl", "train")]
    assert rates[2] == pytest.approx(5e-4)
    assert load_training_state(run / LAST).config["lr"] == 5e-4
    runs("run", **repaired)
    assert record(run)["starts"][2]["resumed_from"]["changed"] == {}


# ----------------------------------------------------------------------------- moved and lost files


@pytest.fixture
def start(runs: Runs, debug_model: Callable[..., Beit3Retrieval], tmp_path: Path) -> Path:
    """Write weights to fine-tune from; return their path."""
    model = debug_model(vocab_size=Tokenizer(runs.tokenizer).vocab_size, text_positions=66)
    return save_released(tmp_path / "start.pth", model)


def moved(runs: Runs, folder: Path) -> Runs:
    """Copy the data and the tokenizer to another folder; return runs that use the copies."""
    shutil.copytree(runs.data, folder / "data", ignore=shutil.ignore_patterns(".cache"))
    shutil.copy(runs.tokenizer, folder / "renamed.model")
    return Runs(folder / "data", folder / "renamed.model", runs.folder)


def test_moved_files_are_the_same_files(runs: Runs, start: Path, tmp_path: Path) -> None:
    whole = runs("whole", finetune=start)
    runs("run", finetune=start, max_steps=4)
    renamed = start.rename(tmp_path / "other_name.pth")
    again = moved(runs, tmp_path / "moved")
    run = again("run", finetune=renamed, train_shards="annotation/*/pair_*.json")
    assert_same_weights(weights(whole), weights(run))
    assert losses(whole) == losses(run)


def test_a_resumed_run_does_not_need_its_start_weights(
    runs: Runs, start: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = runs("whole", finetune=start)
    runs("run", finetune=start, max_steps=2)
    start.unlink()
    for step in (4, 0):  # the hash of the missing file stays in the state
        run = runs("run", finetune=start, max_steps=step)
        said = f"note: --finetune: {start} is missing; it is neither compared nor needed"
        assert said in capsys.readouterr().err
        forget()
    assert_same_weights(weights(whole), weights(run))
    for epoch in range(2):
        name = epoch_name(epoch)
        assert (whole / name).read_bytes() == (run / name).read_bytes()


def forget() -> None:
    from pab.core.notices import forget_notices

    forget_notices()


def test_other_files_at_the_same_place_are_refused(
    runs: Runs, start: Path, debug_model: Callable[..., Beit3Retrieval], tmp_path: Path
) -> None:
    runs("run", finetune=start, max_steps=2)
    model = debug_model(1, vocab_size=Tokenizer(runs.tokenizer).vocab_size, text_positions=66)
    save_released(start, model)
    with pytest.raises(InputError, match=r"other settings: finetune \(was SHA-256 "):
        runs("run", finetune=start)
    with pytest.raises(InputError, match=r"other settings: finetune \(was .*start.pth, now \)"):
        runs("run", finetune="")
    other = moved(runs, tmp_path / "moved")
    with other.tokenizer.open("ab") as file:
        file.write(b"\x5a\x00")
    runs("plain", max_steps=2)
    with pytest.raises(InputError, match=r"other settings: sentencepiece_model \(was SHA-256 "):
        other("plain")


def test_states_of_the_first_version_resume(runs: Runs, start: Path) -> None:
    whole = runs("whole", finetune=start)
    old = runs("old", finetune=start, max_steps=4)
    raw = torch.load(old / LAST, weights_only=True)
    for name in ("skipped", "facts", "content"):
        del raw[name]
    for name in ("keep_checkpoints", "resume_from", "max_skipped_steps"):
        del raw["config"][name]
    write_tensors(old / LAST, {**raw, "training_state": 1})
    with pytest.raises(InputError, match=r"finetune \(was .*start.pth, now .*moved.pth\)"):
        runs("old", finetune=shutil.copy(start, start.with_name("moved.pth")))
    assert_same_weights(weights(whole), weights(runs("old", finetune=start)))
    assert record(old)["starts"][1]["resumed_from"]["changed"] == {}


# ----------------------------------------------------------------------------------- damaged states


def damage(path: Path) -> None:
    """Flip one bit of a weight, as a failing disk does."""
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 0x10
    path.write_bytes(raw)


def separate(path: Path) -> None:
    """Replace a hard link with a copy, so that damage does not reach the other name."""
    raw = path.read_bytes()
    path.unlink()
    path.write_bytes(raw)


def test_a_damaged_state_falls_back_to_the_one_before(runs: Runs) -> None:
    whole = runs("whole", "--ema_decay", "0.9")
    argv = ["--ema_decay", "0.9"]
    run = runs("run", *argv, max_steps=9, save_every_steps=2)
    assert load_training_state(run / PREVIOUS).step == 8
    damage(run / LAST)
    with pytest.raises(InputError, match=r"checkpoint-last.pth: .*; use --resume_from newest_good"):
        runs("run", *argv)
    runs("run", *argv, "--resume_from", "newest_good", max_steps=10)
    assert load_training_state(run / PREVIOUS).step == 8, "the damaged state is not kept"
    runs("run", *argv)
    assert_same_weights(weights(whole), weights(run))
    assert losses(whole) == losses(run)
    came = record(run)["starts"][1]["resumed_from"]
    assert came == {"file": PREVIOUS, "exact": True, "changed": {}}


def test_weights_of_an_epoch_are_the_last_resort(
    runs: Runs, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"epochs": 4, "val_pairs": 4, "ema_decay": 0.5}
    run = runs("run", max_steps=12, **settings)
    for name in (LAST, PREVIOUS):
        separate(run / name)
        damage(run / name)
    kept = weights(run, epoch_name(1))
    best = load_best(run)
    capsys.readouterr()
    runs("run", "--resume_from", "newest_good", max_steps=11, **settings)
    assert "weights only: optimizer, average and random states" in capsys.readouterr().err
    state = load_training_state(run / LAST)
    assert (state.step, state.epoch, state.step_in_epoch) == (11, 2, 1)
    assert next(iter(state.optimizer["state"].values()))["step"] == 1, "the optimizer was reset"
    assert state.best_metric == best
    assert state.ema is not None
    assert state.ema["updates"] == 1
    moved = max(float((state.model[name] - kept[name]).abs().max()) for name in kept)
    assert 0 < moved < 2e-3, "one step away from that epoch's weights"
    came = record(run)["starts"][1]["resumed_from"]
    assert came == {"file": epoch_name(1), "exact": False, "changed": {}}
    runs("run", **settings)
    assert [row["step"] for row in read_log(run / "log.jsonl", "train")] == list(range(1, 21))
    assert (run / FINAL).is_file()


def load_best(run: Path) -> float:
    """Return the best value of the first two validations, as the loop computes it."""
    rows = read_log(run / "log.jsonl", "val")[:2]
    return max(row["R@1"] + 1e-3 * row["mAP"] for row in rows)


def test_a_run_that_resumes_from_weights_leaves_no_damaged_state(
    runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = runs("run")
    damage(run / LAST)
    (run / PREVIOUS).unlink()

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pab.training.pairs, "pair_backward", interrupt)
    (run / epoch_name(1)).unlink()
    with pytest.raises(KeyboardInterrupt):
        runs("run", "--resume_from", "newest_good")
    state = load_training_state(run / LAST)
    assert (state.step, state.epoch) == (STEPS, 1)
    assert_same_weights(state.model, weights(run, epoch_name(0)))


# -------------------------------------------------------------------------------- several processes


def _train_with_one_bad_loss(argv: list[str], folder: Path) -> None:
    """Train; only rank 1 has a loss that is not finite, in its second update."""
    true_backward = pab.training.pairs.pair_backward
    calls: list[int] = []

    def backward(*args: Any, **options: Any) -> Tensor:
        calls.append(1)
        loss = true_backward(*args, **options)
        return loss * float("nan") if processes.rank() == 1 and len(calls) == 2 else loss

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pab.training.pairs, "pair_backward", backward)
        main(argv)


@pytest.mark.distributed
def test_all_processes_skip_a_step_that_is_not_finite_in_one(runs: Runs, tmp_path: Path) -> None:
    (tmp_path / "ranks").mkdir()
    argv = runs.argv("two", batch_size=4, epochs=1)
    run_in(2, partial(_train_with_one_bad_loss, argv), tmp_path / "ranks")
    rows = read_log(runs.folder / "two/log.jsonl", "train")
    assert [row.get("skipped") for row in rows] == [None, 1, None]
    # When two processes resume, both skip the damaged state.
    damage(runs.folder / "two" / LAST)
    again = [*argv, "--resume_from", "newest_good", "--max_steps", "2"]
    run_in(2, partial(_train, again), tmp_path / "ranks")
    assert load_training_state(runs.folder / "two" / LAST).step == 3


def _train(argv: list[str], folder: Path) -> None:
    main(argv)


def test_batch_statistics_are_found() -> None:
    from pab.training.optim import batch_statistics

    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.LayerNorm(2))
    assert [tuple(buffer.shape) for buffer in batch_statistics(model)] == [(2,), (2,), ()]
    assert batch_statistics(nn.BatchNorm1d(2, track_running_stats=False)) == []
