"""LHP fine-tuning at debug size: learning, determinism, resuming, validation, flags."""

from __future__ import annotations

import json
import math
import re
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lhp.beit3 import Beit3Retrieval
from lhp.train import main
from pab.core.checkpoints import load_training_state, model_state, read_checkpoint
from pab.core.config import load_config
from pab.core.errors import InputError, run_cli
from pab.training.loop import BEST, FINAL
from pab.training.optim import StepOutcome
from pab.training.resume import LAST, PREVIOUS
from pab.training.run_log import read_log
from tests.conftest import MODEL, save_released
from tests.test_processes import run_in

ROOT = Path(__file__).resolve().parents[1]


class Runs:
    """Start training runs on the tiny data: 24 pairs, 6 updates per epoch."""

    def __init__(self, data: Path, tokenizer: Path, folder: Path) -> None:
        self.data, self.tokenizer, self.folder = data, tokenizer, folder

    def argv(self, name: str, *flags: str, **settings: Any) -> list[str]:
        given = {
            "model": MODEL, "input_size": 64, "data_path": self.data, "batch_size": 4,
            "sentencepiece_model": self.tokenizer, "output_dir": self.folder / name, "epochs": 2,
            "lr": 1e-3, "min_lr": 1e-4, "warmup_steps": 2, "drop_path": 0.2, "num_workers": 0,
            "dtype": "fp32", "device": "cpu", "cache_dir": self.folder / "cache",
            "layer_decay": 1.0,
        } | settings  # fmt: skip
        return [*flags, *(word for k, v in given.items() for word in (f"--{k}", str(v)))]

    def __call__(self, name: str, *flags: str, **settings: Any) -> Path:
        main(self.argv(name, *flags, **settings))
        return self.folder / name


@pytest.fixture
def runs(tiny_data: Path, tokenizer_file: Path, tmp_path: Path) -> Runs:
    return Runs(tiny_data, tokenizer_file, tmp_path)


def weights(folder: Path, name: str = FINAL) -> dict[str, Tensor]:
    return model_state(read_checkpoint(folder / name), folder / name)


def assert_same_weights(one: dict[str, Tensor], two: dict[str, Tensor]) -> None:
    assert one.keys() == two.keys()
    assert [name for name in one if not torch.equal(one[name], two[name])] == []


def largest_difference(one: dict[str, Tensor], two: dict[str, Tensor]) -> float:
    return max(float((one[name] - two[name]).abs().max()) for name in one)


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in read_log(folder / "log.jsonl", "train")]


# ---------------------------------------------------------------------------------------- learning


def test_the_loss_goes_down(runs: Runs) -> None:
    settings = {"epochs": 40, "batch_size": 12, "warmup_steps": 10, "lr": 2e-3}
    run = runs("learn", local_prob=0.0, drop_path=0.0, **settings)
    found = losses(run)
    assert len(found) == 80
    assert found[0] == pytest.approx(math.log(12), abs=0.5), "log(12) is the loss of a random guess"
    assert sum(found[-4:]) / 4 < 0.75 * found[0]


def test_same_seed_same_weights_with_any_number_of_workers(runs: Runs) -> None:
    first = weights(runs("a"))
    assert_same_weights(first, weights(runs("b")))
    assert_same_weights(first, weights(runs("c", num_workers=2)))
    other = weights(runs("d", seed=17))
    assert largest_difference(first, other) > 1e-3


def test_the_record_of_a_run(runs: Runs) -> None:
    run = runs("record")
    rows = read_log(run / "log.jsonl", "train")
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert {row["epoch"] for row in rows} == {0, 1}
    assert rows[0]["lr"] < rows[2]["lr"]
    assert rows[-1]["lr"] == pytest.approx(1e-4, rel=0.5)
    assert all(row["grad_norm"] > 0 for row in rows)
    assert (run / "config.yaml").is_file()
    assert json.loads((run / "run.json").read_text())["starts"][0]["seed"] == 16
    assert {path.name for path in run.iterdir()} == {
        "config.yaml", "run.json", "log.jsonl", LAST, PREVIOUS, "checkpoint-0.pth",
        "checkpoint-1.pth", FINAL,
    }  # fmt: skip
    metadata = read_checkpoint(run / FINAL)["metadata"]
    assert metadata["architecture"] == MODEL


def test_activation_checkpointing_changes_no_weight(runs: Runs) -> None:
    plain = weights(runs("plain", epochs=1))
    saved = weights(runs("saved", "--checkpoint_activations", epochs=1))
    assert largest_difference(plain, saved) < 1e-5


@pytest.mark.slow
def test_compiled_blocks_change_only_the_rounding(
    runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = weights(runs("plain", epochs=1, max_steps=2), LAST)
    true_compile, compiled = torch.compile, []

    def without_compiler(function: Any, **options: Any) -> Any:
        compiled.append(function)
        return true_compile(function, **options | {"backend": "aot_eager"})

    monkeypatch.setattr(torch, "compile", without_compiler)
    found = weights(runs("compiled", "--compile", epochs=1, max_steps=2), LAST)
    assert len(compiled) == 2 * 2, "both branches of both blocks"
    assert largest_difference(plain, found) < 1e-5
    monkeypatch.setattr("lhp.encode.CXX", "no-such-compiler")
    with pytest.raises(InputError, match="--compile: needs a C\\+\\+ compiler on a CPU"):
        runs("none", "--compile")


@pytest.mark.parametrize("chunk", [3, 6])
def test_chunked_and_whole_batches_take_the_same_step(runs: Runs, chunk: int) -> None:
    settings = {"batch_size": 8, "drop_path": 0.0, "epochs": 1}
    whole = runs("whole", **settings)
    chunked = runs("chunked", grad_cache_chunk=chunk, **settings)
    assert losses(chunked) == pytest.approx(losses(whole), abs=1e-4)
    # AdamW normalizes gradients, so rounding errors in near-zero gradients become whole steps. Key
    # projections are not compared, because the gradients of their biases are near zero.
    one, two = weights(whole), weights(chunked)
    apart = [n for n in one if "k_proj" not in n and (one[n] - two[n]).abs().mean() > 1e-5]
    assert apart == []


def test_accumulation_counts_updates(runs: Runs) -> None:
    run = runs("accumulate", update_freq=2)
    assert len(losses(run)) == 6, "three updates per epoch instead of six"
    # The loss of an update is the mean over its batches; log(4) is the loss of a random guess.
    assert losses(run)[0] == pytest.approx(math.log(4), abs=0.5)


def _train(argv: list[str], folder: Path) -> None:
    main(argv)


@pytest.mark.distributed
def test_two_processes_train_and_log_as_one(runs: Runs, tmp_path: Path) -> None:
    # Drop path would differ per process. A small eps would turn rounding errors into whole steps.
    settings = {"epochs": 1, "drop_path": 0.0, "opt_eps": 1e-3}
    alone = runs("alone", batch_size=8, **settings)
    (tmp_path / "ranks").mkdir()
    run_in(2, partial(_train, runs.argv("shared", batch_size=4, **settings)), tmp_path / "ranks")
    one, two = (read_log(runs.folder / name / "log.jsonl") for name in ("alone", "shared"))
    assert len(one) == len(two) == 3
    for name in ("loss", "grad_norm", "logit_scale"):
        assert [row[name] for row in two] == pytest.approx([row[name] for row in one], rel=1e-4)
    assert largest_difference(weights(alone), weights(runs.folder / "shared")) < 1e-5


def test_a_diverged_run_ends_with_one_line_of_advice(
    runs: Runs, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = runs.argv("diverged", lr=1e30, warmup_steps=0, num_workers=2, epochs=6)
    with pytest.raises(SystemExit) as stop:
        run_cli(main, argv)
    assert stop.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    found = re.match(r"error: training: skipped steps in a row: 20, the last at step (\d+): ", last)
    assert found is not None, last
    for flag in ("--lr (now 1e+30)", "--clip_grad (now none)", "--dtype fp32 or bf16 (now fp32)"):
        assert flag in last
    assert not (runs.folder / "diverged" / FINAL).exists()
    assert len(losses(runs.folder / "diverged")) == int(found[1]), "every step was logged"


def test_an_incomplete_update_is_dropped(runs: Runs) -> None:
    assert len(losses(runs("odd", update_freq=4))) == 2, (
        "the last two batches of an epoch are dropped"
    )


# ---------------------------------------------------------------------------------------- resuming


@pytest.mark.parametrize(
    ("stop", "settings"),
    [
        (2, {}),
        (6, {}),
        (9, {"dtype": "bf16"}),
        (8, {"ema_decay": 0.9, "clip_grad": 0.5, "update_freq": 1}),
        (2, {"update_freq": 2, "num_workers": 2}),
        (3, {"grad_cache_chunk": 2, "val_pairs": 4}),
    ],
)
def test_a_resumed_run_equals_an_uninterrupted_run(
    runs: Runs, stop: int, settings: dict[str, Any]
) -> None:
    whole = runs("whole", **settings)
    stopped = runs("stopped", max_steps=stop, **settings)
    assert not (stopped / FINAL).exists()
    assert load_training_state(stopped / LAST).step == stop
    runs("stopped", **settings)
    names = [FINAL] + [BEST] * ("val_pairs" in settings)
    for name in names:
        assert_same_weights(weights(whole, name), weights(stopped, name))
    one, two = (load_training_state(run / LAST) for run in (whole, stopped))
    assert one.step == two.step
    assert_same_weights(one.model, two.model)
    assert torch.equal(one.rng[0]["torch"], two.rng[0]["torch"])
    assert losses(whole) == losses(stopped)
    if one.ema is not None and two.ema is not None:
        assert_same_weights(one.ema["shadow"], two.ema["shadow"])


def test_saving_inside_an_epoch(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    import pab.training.loop

    whole = runs("whole")
    steps: list[StepOutcome] = []
    true_step = pab.training.loop.clip_and_step

    def interrupt(*args: Any, **options: Any) -> StepOutcome:
        if len(steps) == 5:
            raise KeyboardInterrupt
        steps.append(true_step(*args, **options))
        return steps[-1]

    with monkeypatch.context() as patch:
        patch.setattr(pab.training.loop, "clip_and_step", interrupt)
        with pytest.raises(KeyboardInterrupt):
            runs("cut", save_every_steps=2)
    assert load_training_state(runs.folder / "cut" / LAST).step == 4
    cut = runs("cut", save_every_steps=3)  # the saving interval may change
    assert_same_weights(weights(whole), weights(cut))
    assert losses(whole) == losses(cut)


def test_a_finished_run_is_not_trained_further(runs: Runs) -> None:
    before = weights(runs("done"))
    assert_same_weights(before, weights(runs("done")))
    assert len(losses(runs.folder / "done")) == 12


def test_max_steps_applies_to_the_second_start(
    runs: Runs, capsys: pytest.CaptureFixture[str]
) -> None:
    runs("twice", max_steps=3)
    run = runs("twice", max_steps=3)
    assert load_training_state(run / LAST).step == 3
    assert "step 3 done" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["seed", "batch_size", "local_prob", "weight_decay", "epochs"])
def test_other_settings_are_refused_on_resume(runs: Runs, name: str) -> None:
    run = runs("first", max_steps=1)
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    value = {"local_prob": 0.25, "weight_decay": 0.01}.get(name, 3)
    with pytest.raises(InputError, match=rf"other settings: {name} \(was "):
        runs("first", **{name: value})
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before


def test_no_auto_resume_starts_over(runs: Runs) -> None:
    runs("again", max_steps=2, seed=3)
    run = runs("again", "--no_auto_resume", epochs=1)
    assert len(losses(run)) == 6
    assert_same_weights(weights(run), weights(runs("fresh", epochs=1)))


def test_a_new_run_leaves_no_state_of_an_earlier_one(runs: Runs) -> None:
    old = runs("again", val_pairs=4)
    done = weights(old)
    words = runs.argv(
        "again", "--no_auto_resume", lr=1e30, warmup_steps=0, epochs=6, save_ckpt_freq=6
    )
    with pytest.raises(SystemExit):
        run_cli(main, words)
    assert not (old / LAST).exists(), "the next start would resume it"
    assert not (old / PREVIOUS).exists()
    assert_same_weights(weights(old), done)


def test_other_data_are_refused_on_resume(runs: Runs, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(runs.data, data)
    runs.data = data
    run = runs("first", max_steps=1)
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    shard = max((data / "annotation/train").glob("pair_*.json"))
    shard.write_text("".join(shard.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(InputError, match=r"other settings: training pairs \(was 24, "):
        runs("first")
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before


@pytest.mark.parametrize("pattern", ["", "/pair_*.json"])
def test_invalid_shard_patterns_are_refused(runs: Runs, pattern: str) -> None:
    with pytest.raises(InputError, match="--train_shards: expected a pattern under"):
        main([*runs.argv("none"), "--train_shards", pattern])


def test_a_batch_that_is_too_large_is_refused_before_files_are_hashed(
    runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pab.training.resume.sha256_of_file", lambda path: pytest.fail("hashed"))
    with pytest.raises(InputError, match=r"--batch_size: 5 x 1 process x update_freq 5 is more"):
        runs("bad", batch_size=5, update_freq=5)


@pytest.mark.parametrize("betas", [("0.9", "1"), ("-0.1", "0.9")])
def test_betas_that_the_optimizer_refuses(runs: Runs, betas: tuple[str, str]) -> None:
    with pytest.raises(InputError, match=r"--opt_betas: must lie in \[0, 1\), found"):
        runs("bad", "--opt_betas", *betas)
    assert not (runs.folder / "bad").exists()


@pytest.mark.parametrize("logged", [False, True])
def test_a_run_stopped_in_validation_resumes_there(
    runs: Runs, monkeypatch: pytest.MonkeyPatch, logged: bool
) -> None:
    import pab.training.loop
    import pab.training.pairs

    whole = runs("whole", val_pairs=4)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if logged:  # stop between validation and the checkpoint that follows it
            patch.setattr(pab.training.loop.Run, "save", interrupt)
        else:
            patch.setattr(pab.training.pairs, "retrieval_metrics", interrupt)
        with pytest.raises(KeyboardInterrupt):
            runs("cut", val_pairs=4)
    state = load_training_state(runs.folder / "cut" / LAST)
    assert (state.epoch, state.step) == (0, state.step_in_epoch)
    cut = runs("cut", val_pairs=4)
    assert losses(whole) == losses(cut), "no step was taken twice"
    seen = [(row["step"], row["R@1"]) for row in read_log(cut / "log.jsonl", "val")]
    assert seen == [(row["step"], row["R@1"]) for row in read_log(whole / "log.jsonl", "val")]
    assert_same_weights(weights(whole), weights(cut))
    assert_same_weights(weights(whole, BEST), weights(cut, BEST))


def test_a_run_resumes_under_a_synonym_of_its_task(runs: Runs) -> None:
    whole = runs("whole", task="pab")
    runs("mixed", task="pab", max_steps=2)
    assert_same_weights(weights(whole), weights(runs("mixed", task="356")))


# -------------------------------------------------------------------------------------- validation


def test_validation_keeps_the_best_weights(runs: Runs) -> None:
    run = runs("val", val_pairs=4, epochs=3, lr=3e-3)
    rows = read_log(run / "log.jsonl", "val")
    assert [row["epoch"] for row in rows] == [0, 1, 2]
    assert all(0 <= row["R@1"] <= row["R@5"] <= row["R@10"] <= 100 for row in rows)
    best = max(rows, key=lambda row: row["R@1"] + 1e-3 * row["mAP"])
    metadata = read_checkpoint(run / BEST)["metadata"]
    assert int(metadata["epoch"]) == best["epoch"]
    assert float(metadata["R@1"]) == best["R@1"]
    train_ids = (run / "train_ids.txt").read_text().split()
    val_ids = (run / "val_ids.txt").read_text().split()
    assert len(val_ids) == 4
    assert len(train_ids) == 20
    assert not set(train_ids) & set(val_ids)
    lines = "".join(
        path.read_text() for path in sorted((runs.data / "annotation/train").iterdir())
    ).splitlines()
    video = {row["image_id"]: row["source_id"].split("_")[0] for row in map(json.loads, lines)}
    assert not {video[i] for i in train_ids} & {video[i] for i in val_ids}, (
        "twins must be in the same part of the split"
    )


def test_a_run_with_ema_saves_the_averaged_weights(runs: Runs) -> None:
    run = runs("ema", ema_decay=0.5, val_pairs=4)
    state = load_training_state(run / LAST)
    assert state.ema is not None
    assert_same_weights(weights(run), state.ema["shadow"])
    assert largest_difference(weights(run), state.model) > 1e-5


def test_without_checkpoints_only_the_record_is_left(runs: Runs) -> None:
    run = runs("none", "--no_save_ckpt", epochs=1, val_pairs=4)
    assert {path.name for path in run.iterdir()} == {
        "config.yaml", "run.json", "log.jsonl", "train_ids.txt", "val_ids.txt",
        "val_pairs.json",
    }  # fmt: skip


# ------------------------------------------------------------------------------------------- flags


def test_finetuning_starts_from_the_checkpoint(
    runs: Runs, debug_model: Callable[..., Beit3Retrieval], tmp_path: Path
) -> None:
    import dataclasses

    from lhp.tokenizer import Tokenizer

    with torch.random.fork_rng(devices=[]):
        config = dataclasses.replace(
            debug_model().config,
            vocab_size=Tokenizer(runs.tokenizer).vocab_size,
            text_positions=66,
            img_size=96,  # the positions are resized for 64 px
        )
        start = Beit3Retrieval(config)
    path = save_released(tmp_path / "start.pth", start)
    run = runs("finetune", finetune=path, epochs=1, lr=1e-9, min_lr=0.0)
    found, given = weights(run), dict(start.state_dict())
    name = "beit3.encoder.embed_positions.A.weight"
    assert found.pop(name).shape == (3 + 16, 64)
    assert given.pop(name).shape == (3 + 36, 64)
    assert largest_difference(found, given) < 1e-6


def test_the_published_command_line_trains(runs: Runs, tmp_path: Path) -> None:
    argv = (
        f"--model {MODEL} --task pab --drop_path 0.16 --checkpoint_activations "
        f"--sentencepiece_model {runs.tokenizer} --weight_decay 0.05 --layer_decay 0.85 "
        f"--batch_size 8 --update_freq 1 --save_ckpt_freq 1 --data_path {runs.data} "
        f"--output_dir {tmp_path / 'out'} --log_dir {tmp_path / 'out/log'} --seed 16 --save_ckpt "
        "--input_size 64 --lr 1e-5 --warmup_steps 440 --epochs 4 --max_steps 1"
    ).split()
    main(argv)
    assert len(losses(tmp_path / "out")) == 1
    assert load_training_state(tmp_path / "out" / LAST).step == 1
    assert any((tmp_path / "out/log").glob("events.*"))


def test_a_run_shorter_than_the_warm_up_follows_the_schedule(
    runs: Runs, capsys: pytest.CaptureFixture[str]
) -> None:
    run = runs("short", warmup_steps=440, epochs=1)
    rates = [row["lr"] for row in read_log(run / "log.jsonl", "train")]
    assert rates == pytest.approx([1e-3 * step / 439 for step in range(6)])
    assert "ends in its warm-up of 440 steps" in capsys.readouterr().err


def test_the_debug_config_trains_within_a_minute(runs: Runs, monkeypatch: Any) -> None:
    monkeypatch.chdir(ROOT)
    folder = runs.folder / "debug"
    started = time.perf_counter()
    main(
        [
            "--debug",
            "--data_path",
            str(runs.data),
            "--sentencepiece_model",
            str(runs.tokenizer),
            "--output_dir",
            str(folder),
            "--batch_size",
            "4",
            "--val_pairs",
            "4",
        ]
    )
    assert time.perf_counter() - started < 60
    assert (folder / FINAL).is_file()
    assert (folder / BEST).is_file()


def test_debug_and_config_contradict() -> None:
    for flags in (["--config", "a.yaml"], ["--config=a.yaml"]):
        with pytest.raises(InputError, match="--debug: contradicts --config"):
            main(["--debug", *flags])


def test_flags_override_the_config_file(runs: Runs, tmp_path: Path) -> None:
    from lhp.config import TrainConfig

    (tmp_path / "c.yaml").write_text("lr: 5.0e-4\nepochs: 1\n")
    words = runs.argv("flags", max_steps=1)
    place = words.index("--epochs")
    del words[place : place + 2]
    main(["--config", str(tmp_path / "c.yaml"), *words])
    config = load_config(TrainConfig, runs.folder / "flags/config.yaml", {})
    assert (config.lr, config.epochs) == (1e-3, 1)
