"""UIT's fine-tuning, scoring and initial weights, end to end, at debug size."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import uit.rerank
import uit.train
from pab.core import processes
from pab.core.checkpoints import load_training_state, model_state, read_checkpoint
from pab.core.config import load_config
from pab.core.devices import autocast
from pab.core.errors import InputError, run_cli
from pab.data.records import Retrieval
from pab.data.training_set import TrainingSet
from pab.data.wordpiece import VOCABULARY, Tokenizer
from pab.formats.export import export
from pab.ranking import ranked_names, write_ranked_list
from pab.scores import ScoreFile, load_scores, save_scores
from pab.scoring.encoding import Compute
from pab.scoring.rerank import choose_candidates, fill
from pab.training.config import TrainingConfig
from pab.training.data import checked, open_training_data, training_loader, validation_retrieval
from pab.training.loop import BEST, FINAL
from pab.training.resume import LAST
from pab.training.run_log import read_log
from pab.training.sampling import EpochBatches
from tests.conftest import draw
from tests.test_processes import run_in
from uit.augment import LEVELS, Augmentation, TrainingView, operations
from uit.config import TrainConfig
from uit.data import Collate, TextDraws, UitDataset, finisher
from uit.encode import UitEncoder, encode_gallery, load_model
from uit.infer import main as infer
from uit.make_vocabulary import make_vocabulary
from uit.masking import NO_LABEL, WordMasking
from uit.model import MODELS, Uit, model_config
from uit.objective import LossWeights, UitBatch, draw_any, draw_negatives, uit_losses
from uit.rerank import match_scores
from uit.run import main as run
from uit.train import build_model
from uit.weights import load_bert, load_swin, load_uit

CPU = torch.device("cpu")
LENGTH = 24
SIZES = ["--model", "uit_debug", "--input_size", "32", "--window", "4"]
TEXT = ["--max_words", "20", "--max_text_length", str(LENGTH)]


@pytest.fixture(scope="session")
def vocabulary(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bert")
    shards = sorted((tiny_data / "annotation/train").glob("*.json"))
    lines = [line for shard in shards for line in shard.read_text().splitlines()]
    captions = [json.loads(line)["caption"] for line in lines] + ["a jacket"]
    make_vocabulary(captions, folder, 200)
    return folder


@pytest.fixture
def tokenizer(vocabulary: Path) -> Tokenizer:
    return Tokenizer(vocabulary, 20, LENGTH)


class Runs:
    """Start training runs on the tiny data: 24 pairs, 4 updates per epoch."""

    def __init__(self, data: Path, vocabulary: Path, folder: Path) -> None:
        self.data, self.vocabulary, self.folder = data, vocabulary, folder

    def argv(self, name: str, *flags: str, **settings: Any) -> list[str]:
        given = {
            "text_encoder": self.vocabulary, "data_path": self.data, "bs": 6, "epo": 2,
            "output_dir": self.folder / name, "cache_dir": self.folder / "cache", "lr": 1e-3,
            "schedule": "linear", "warmup_steps": 2, "mim_block": 8, "dtype": "fp32",
            "num_workers": 0, "device": "cpu", "checkpoint": "",
        } | settings  # fmt: skip
        words = [word for key, value in given.items() for word in (f"--{key}", str(value))]
        return ["--task", "cmp", *SIZES, *TEXT, "--no_synonyms", *flags, *words]

    def __call__(self, name: str, *flags: str, **settings: Any) -> Path:
        run(self.argv(name, *flags, **settings))
        return self.folder / name


@pytest.fixture
def runs(
    tiny_data: Path, vocabulary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Runs:
    monkeypatch.chdir(Path(__file__).parents[1])  # the default recipe is read from configs/
    return Runs(tiny_data, vocabulary, tmp_path)


def weights(folder: Path, name: str = FINAL) -> dict[str, Tensor]:
    return model_state(read_checkpoint(folder / name), folder / name)


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


# ---------------------------------------------------------------------------------------- samples


def dataset(data: Path, tokenizer: Tokenizer, tmp_path: Path) -> UitDataset:
    pairs = TrainingSet.open(data, cache_dir=tmp_path / "cache")
    draws = TextDraws(0.1, None, WordMasking())
    view = TrainingView(32, Augmentation())
    return UitDataset(pairs, np.arange(len(pairs)), view, tokenizer, draws, 16)


def batch_of(data: UitDataset, *, workers: int = 0, size: int = 6) -> UitBatch:
    batches = EpochBatches(len(data), size, 16)
    config = TrainingConfig(num_workers=workers)
    collate = Collate(data.tokenizer, 10, 4, 0.5)
    loaded = next(checked(training_loader(data, batches, collate, config, CPU)))
    assert loaded.image.dtype == torch.uint8
    return finisher(data.view, CPU)(loaded)


def test_a_batch(tiny_data: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    batch = batch_of(dataset(tiny_data, tokenizer, tmp_path))
    assert batch.image.shape == (6, 3, 32, 32)
    assert len(set(batch.identity.tolist())) == 6
    assert batch.text_ids.shape == batch.text_mask.shape == (12, LENGTH)
    assert batch.masked_ids.shape == (6, LENGTH)
    assert batch.positions.shape == batch.labels.shape == (6, 10)
    assert int(batch.hidden_blocks.sum()) == 8
    assert batch.longest == int(batch.text_mask.sum(dim=1).max()) < LENGTH
    hidden = batch.labels != NO_LABEL
    assert hidden.any(dim=1).all()
    for row in range(6):
        at = batch.positions[row][hidden[row]]
        assert torch.equal(batch.text_ids[row][at], batch.labels[row][hidden[row]])
        rest = torch.ones(LENGTH, dtype=torch.bool)
        rest[at] = False
        assert torch.equal(batch.masked_ids[row][rest], batch.text_ids[row][rest])


def test_draws_do_not_depend_on_workers(
    tiny_data: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    data = dataset(tiny_data, tokenizer, tmp_path)
    one, two = batch_of(data), batch_of(data, workers=2)
    assert one.longest == two.longest
    assert one.erased is None
    assert two.erased is None
    for name in set(UitBatch._fields) - {"longest", "erased"}:
        assert torch.equal(getattr(one, name), getattr(two, name)), name


def test_the_ten_operations() -> None:
    from PIL import Image

    pixels = np.random.default_rng(0).integers(40, 200, (32, 32, 3)).astype(np.uint8)
    image = Image.fromarray(pixels)
    every = operations(7)
    assert len(every) == LEVELS
    for name, operation in every.items():
        one, other = (np.asarray(operation(image, sign)) for sign in (1.0, -1.0))
        assert one.shape == pixels.shape
        assert (name == "identity") == np.array_equal(one, pixels)
        mirrored = name.startswith(("shear", "translate", "rotate"))
        assert mirrored == (not np.array_equal(one, other)), name
    right = np.asarray(every["translate_x"](image, 1.0))
    assert np.array_equal(right[:, 7:], pixels[:, :-7])
    assert (right[:, :7] == 128).all()
    sheared = np.asarray(every["shear_x"](image, 1.0))  # the upper left corner stays
    moved = np.abs(sheared.astype(int) - pixels).mean(axis=(1, 2))
    assert moved[0] < 15 < moved[-1]


def test_views_follow_the_seed() -> None:
    from PIL import Image

    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 30, 3)).astype(np.uint8))
    view = TrainingView(32, Augmentation())

    def seen(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return view(image)

    assert torch.equal(seen(1), seen(1))
    assert len({tuple(seen(seed).flatten()[:50].tolist()) for seed in range(20)}) > 10
    plain = TrainingView(32, Augmentation(0.0, None, 0.0))
    torch.manual_seed(0)
    first = plain(image)
    assert torch.equal(first, plain(image))


# ----------------------------------------------------------------------------------------- losses


WEIGHTS = LossWeights(eda=0.8, mlm=1.0, mim=1.0, label_smoothing=0.2)


def small_model(tokenizer: Tokenizer) -> Uit:
    import dataclasses

    torch.manual_seed(0)
    sizes = model_config("uit_debug", 32, 4)
    bert = dataclasses.replace(sizes.bert, vocab_size=tokenizer.vocab_size, dropout=0.0)
    swin = dataclasses.replace(sizes.swin, drop_path=0.0)
    return Uit(dataclasses.replace(sizes, bert=bert, swin=swin, proj_dropout=0.0))


def test_every_parameter_has_a_gradient(
    tiny_data: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    model = small_model(tokenizer).train()
    batch = batch_of(dataset(tiny_data, tokenizer, tmp_path))
    losses = uit_losses(model, batch, WEIGHTS)
    assert set(losses) == {"loss", "itc", "itm", "mlm", "mim"}
    total = losses["itc"] + losses["itm"] + losses["mlm"] + losses["mim"]
    torch.testing.assert_close(losses["loss"], total)
    losses["loss"].backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    assert len(list(model.named_parameters())) > 80


@pytest.mark.parametrize("off", ["eda", "mlm", "mim"])
def test_disabled_losses(tiny_data: Path, tokenizer: Tokenizer, tmp_path: Path, off: str) -> None:
    model = small_model(tokenizer).eval()
    batch = batch_of(dataset(tiny_data, tokenizer, tmp_path))
    each = {"eda": 0.8, "mlm": 1.0, "mim": 2.0}

    def best(allowed: Tensor) -> Tensor:
        return allowed.argmax(dim=1)

    whole = uit_losses(model, batch, LossWeights(**each, label_smoothing=0.2), best)
    if off == "eda":
        batch = batch._replace(text_ids=batch.text_ids[:6], text_mask=batch.text_mask[:6])
    less = uit_losses(model, batch, LossWeights(**{**each, off: 0.0}, label_smoothing=0.2), best)
    assert off not in less
    for name in ("mlm", "mim"):
        if name != off:
            torch.testing.assert_close(less[name], whole[name])
    assert (less["itc"] < whole["itc"]) == (off == "eda")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recomputed_activations_give_the_same_gradients(
    tiny_data: Path, tokenizer: Tokenizer, tmp_path: Path, dtype: torch.dtype
) -> None:
    """Dropout and drop path are on; the backward pass repeats their draws."""
    batch = batch_of(dataset(tiny_data, tokenizer, tmp_path))
    gradients: list[dict[str, Tensor | None]] = []
    stored: list[int] = []
    for saving in (False, True):
        config = TrainConfig(
            model="uit_debug", input_size=32, window=4, mim_block=8, drop_path=0.3, dropout=0.2,
            max_words=20, max_text_length=LENGTH, checkpoint_activations=saving,
        )  # fmt: skip
        torch.manual_seed(0)
        model = build_model(config, tokenizer).train()
        sizes: list[int] = []

        def keep(tensor: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(tensor.nbytes)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            with autocast(CPU, dtype):
                loss = uit_losses(model, batch, WEIGHTS)["loss"]
            loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
        stored.append(sum(sizes))
    for name, plain in gradients[0].items():
        assert plain is not None, name
        assert torch.equal(plain, gradients[1][name]), name  # type: ignore[arg-type]
    assert stored[1] < 0.4 * stored[0]


def test_bf16_losses_are_close(tiny_data: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = small_model(tokenizer).eval()
    batch = batch_of(dataset(tiny_data, tokenizer, tmp_path))
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        with autocast(CPU, dtype):
            found.append(uit_losses(model, batch, WEIGHTS, lambda allowed: allowed.argmax(dim=1)))
    for name, exact in found[0].items():
        assert found[1][name].dtype == torch.float32
        torch.testing.assert_close(found[1][name], exact, rtol=0.02, atol=0.02)


def test_negatives_are_drawn_by_their_weights() -> None:
    torch.manual_seed(0)
    shares = torch.tensor([[0.0, 1.0, 3.0, 0.0], [2.0, 0.0, 0.0, 2.0]])
    drawn = torch.stack([draw_negatives(shares) for _ in range(10_000)])
    first, second = (Counter(column.tolist()) for column in drawn.T)
    assert set(first) == {1, 2}
    assert first[2] / 10_000 == pytest.approx(0.75, abs=0.02)
    assert set(second) == {0, 3}
    assert second[0] / 10_000 == pytest.approx(0.5, abs=0.02)


def test_easy_negatives_are_drawn_uniformly() -> None:
    torch.manual_seed(0)
    shares = torch.tensor([[0.0, 1.0, 1e-5, 0.0, 3.0]])
    drawn = Counter(int(draw_any(shares)) for _ in range(10_000))
    assert set(drawn) == {1, 2, 4}
    assert all(count / 10_000 == pytest.approx(1 / 3, abs=0.02) for count in drawn.values())


def test_draws_are_those_of_multinomial() -> None:
    shares = torch.rand(50, 30).masked_fill(torch.rand(50, 30) < 0.3, 0.0)
    torch.manual_seed(1)
    expected = [torch.multinomial(shares, 1).squeeze(1) for _ in range(3)]
    torch.manual_seed(1)
    assert all(torch.equal(draw_negatives(shares), one) for one in expected)


def test_a_diverged_model_still_draws_negatives() -> None:
    shares = torch.tensor([[torch.nan] * 3, [0.0, torch.inf, 0.0]])
    drawn = torch.stack([draw_negatives(shares) for _ in range(100)])
    assert set(drawn[:, 0].tolist()) == {0, 1, 2}
    assert set(drawn[:, 1].tolist()) == {1}


def test_a_batch_of_one_identity(
    tiny_data: Path, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = dataset(tiny_data, tokenizer, tmp_path)
    monkeypatch.setattr(TrainingSet, "identity", lambda *_: 7)
    with pytest.raises(InputError, match="all 6 pairs have identity 7: no negative pair exists"):
        batch_of(data)


# --------------------------------------------------------------------------------------- training


def test_the_loss_goes_down(runs: Runs) -> None:
    folder = runs("learn", epo=30, lr=3e-3, flip_prob=0.0, augment_level="none", erasing_prob=0.0)
    rows = read_log(folder / "log.jsonl", "train")
    assert len(rows) == 120
    assert {"loss", "itc", "itm", "mlm", "mim", "temperature", "lr"} <= set(rows[0])
    for name in ("itc", "mlm", "mim"):
        first, last = (np.mean([r[name] for r in part]) for part in (rows[:10], rows[-10:]))
        assert last < 0.9 * first, name


def test_same_seed_same_weights_and_exact_resuming(runs: Runs) -> None:
    whole = weights(runs("whole"))
    assert same(whole, weights(runs("again")))
    assert not same(whole, weights(runs("other", seed=17)))
    runs("cut", max_steps=3, save_every_steps=1)
    assert load_training_state(runs.folder / "cut" / LAST).step == 3
    assert not (runs.folder / "cut" / FINAL).exists()
    assert same(whole, weights(runs("cut")))


def test_recomputed_activations_give_the_same_weights(runs: Runs) -> None:
    plain = weights(runs("plain", epo=1))
    assert same(plain, weights(runs("saved", "--checkpoint_activations", epo=1)))


def test_a_skipped_step_does_not_change_batch_statistics(
    runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"ema_decay": 0.9, "epo": 1}
    before = load_training_state(runs("run", max_steps=2, **settings) / LAST)
    true_losses = uit.train.uit_losses

    def of_a_bad_image(model: Uit, batch: UitBatch, *others: Any) -> dict[str, Tensor]:
        return true_losses(model, batch._replace(image=batch.image * torch.nan), *others)

    with monkeypatch.context() as patch:
        patch.setattr(uit.train, "uit_losses", of_a_bad_image)
        folder = runs("run", max_steps=3, **settings)
    after = load_training_state(folder / LAST)
    assert (after.step, after.skipped["total"]) == (3, 1)
    assert any(name.endswith("running_mean") for name in after.model)
    assert same(before.model, after.model)
    assert before.ema is not None
    assert after.ema is not None
    for kind in ("shadow", "buffers"):
        assert same(before.ema[kind], after.ema[kind])
    runs("run", **settings)
    assert all(bool(value.isfinite().all()) for value in weights(folder).values())


def test_epochs_are_kept_and_scored(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    folder = runs("run", epo=3, keep_checkpoints=2, ema_decay=0.5, lr=5e-3)
    assert sorted(path.name for path in folder.glob("checkpoint-?.pth")) == [
        "checkpoint-1.pth", "checkpoint-2.pth"
    ]  # fmt: skip

    def scored(name: str) -> Tensor:
        runs("eval", "--evaluate", checkpoint=folder / name, k_test=5)
        return load_scores(runs.folder / "eval/score_test_k5.pt").scores

    final = scored(FINAL)
    assert torch.equal(scored("checkpoint-2.pth"), final)
    capsys.readouterr()
    assert torch.equal(scored(LAST), final)
    said = "a training state; its averaged weights (--ema_decay) are used"
    assert f"note: {folder / LAST}: {said}" in capsys.readouterr().err
    assert not torch.equal(scored("checkpoint-1.pth"), final)


def test_a_resumed_run_compares_files_by_content(
    runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = runs("start", epo=1) / FINAL
    whole = weights(runs("whole", checkpoint=start))
    runs("cut", checkpoint=start, max_steps=3)
    words = runs.folder / "words"
    shutil.copytree(runs.vocabulary, words)
    with monkeypatch.context() as patch:  # a resumed run needs no initial weights
        patch.setattr(torch.distributed.run, "main", lambda _: None)
        runs("cut", dist="f2", checkpoint="gone.pth", text_encoder=words)
        with pytest.raises(InputError, match=r"gone\.pth: expected weights"):
            runs("new", dist="f2", checkpoint="gone.pth", text_encoder=words)
    with (words / VOCABULARY).open("a") as file:
        file.write("more\n")
    with pytest.raises(InputError, match=r"text_encoder \(was SHA-256 "):
        runs("cut", checkpoint="gone.pth", text_encoder=words)
    shutil.copy(runs.vocabulary / VOCABULARY, words / VOCABULARY)
    assert same(whole, weights(runs("cut", checkpoint="gone.pth", text_encoder=words)))
    with pytest.raises(InputError, match=r"checkpoint \(was .*, now \)"):
        runs("cut")


def test_validation_keeps_the_best_weights(runs: Runs) -> None:
    folder = runs("val", val_pairs=6, k_val=4)
    rows = read_log(folder / "log.jsonl", "val")
    assert len(rows) == 2
    assert {"R@1", "mAP", "itc R@1", "itc mAP"} <= set(rows[0])
    best = max(rows, key=lambda row: row["R@1"] + 1e-3 * row["mAP"])
    facts = read_checkpoint(folder / BEST)
    assert str(best["epoch"]) in json.dumps(facts.get("metadata", {}), default=str)
    pairs = [json.loads(line) for line in (folder / "val_pairs.json").read_text().splitlines()]
    assert [p["image_id"] for p in pairs] == (folder / "val_ids.txt").read_text().split()


@pytest.mark.parametrize(
    ("settings", "flags", "expected"),
    [
        ({"mim_block": 5}, (), "--mim_block"),
        ({"mim_block": 2}, (), "--mim_block"),
        ({"bs": 1}, (), "--batch_size"),
        ({"input_size": 36}, (), "--input_size"),
        ({"ngram_words": 1}, (), "--ngram_words"),
        ({"mlm_share": 1.5}, (), "--mlm_share"),
        ({"temperature": 0}, (), "--temperature"),
        ({"augment_level": 11}, (), "--augment_level"),
        ({"checkpoint": "a.pth", "bert": "b"}, (), "--checkpoint"),
        ({"checkpoint": "nowhere.pth"}, (), "nowhere.pth"),
        ({"wordnet": "x"}, (), "--wordnet"),
        ({"dist": "4"}, (), "--dist"),
        ({"dist": "f0"}, (), "--dist"),
        ({"text_encoder": "nowhere"}, (), "nowhere"),
        ({"max_text_length": 65, "max_words": 65}, (), "--max_text_length"),
        ({}, ("--evaluate",), "--checkpoint"),
        ({}, ("--debug", "--config", "c.yaml"), "--debug"),
    ],
)
def test_invalid_settings_are_refused(
    runs: Runs, settings: dict[str, Any], flags: tuple[str, ...], expected: str
) -> None:
    with pytest.raises(InputError) as error:
        runs("bad", *flags, **settings)
    assert expected in str(error.value)
    assert not (runs.folder / "bad").exists()


def test_a_vocabulary_of_other_words_is_refused_before_training(runs: Runs) -> None:
    """Validation would also refuse such a vocabulary, but only after an epoch."""
    words = runs.folder / "words"
    make_vocabulary(["xyzzy zyxxy"] * 9, words, 20)
    with pytest.raises(
        InputError, match=r"\[UNK\] in this vocabulary: \d+ of \d+ pieces of the captions"
    ):
        runs("bad", text_encoder=words, val_pairs=6)
    assert not (runs.folder / "bad").exists()


@pytest.mark.usefixtures("runs")
def test_evaluation_does_not_score_the_initial_weights() -> None:
    with pytest.raises(InputError, match="expected the weights to evaluate"):
        run(["--evaluate"])  # the default recipe sets only initial weights


def test_more_gpus_than_exist_are_refused(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(InputError, match="expected 4 GPUs, found 2"):
        runs("bad", dist="f4", device="auto")


def test_bert_may_be_a_folder_for_several_processes(
    runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    monkeypatch.setattr(torch.distributed.run, "main", seen.extend)
    with pytest.raises(InputError, match="expected BERT's weights in it"):
        runs("none", dist="f2", bert=runs.vocabulary)
    assert not seen
    folder = runs.folder / "bert"
    folder.mkdir()
    (folder / "model.safetensors").touch()
    runs("some", dist="f2", bert=folder)
    assert seen[seen.index("--bert") + 1] == str(folder)


def test_torchrun_gets_the_same_settings(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    monkeypatch.setattr(torch.distributed.run, "main", seen.append)
    runs("many", dist="f3")
    words = seen[0]
    assert words[words.index("--nproc_per_node") + 1] == "3"
    passed = words[words.index("uit.train") + 1 :]
    assert "--dist" not in passed
    assert passed[passed.index("--batch_size") + 1] == "6"


def _run(argv: list[str], folder: Path) -> None:
    run(argv)


@pytest.mark.distributed
def test_two_processes_begin_as_one(runs: Runs, tmp_path: Path) -> None:
    # Only the first step is compared, because each process draws its own negatives for ITM.
    fixed = {"drop_path": 0, "dropout": 0, "proj_dropout": 0, "epo": 1}
    alone = runs("alone", "--sync_batch_norm", bs=6, **fixed)
    (tmp_path / "ranks").mkdir()
    run_in(
        2, partial(_run, runs.argv("two", "--sync_batch_norm", bs=3, **fixed)), tmp_path / "ranks"
    )
    one, two = (read_log(folder / "log.jsonl")[0] for folder in (alone, runs.folder / "two"))
    for name in ("itc", "mlm", "mim"):
        assert two[name] == pytest.approx(one[name], rel=1e-4), name


def _run_and_keep_scores(argv: list[str], folder: Path) -> dict[str, Tensor]:
    """Train; return the scores that validation evaluates."""
    kept: list[Tensor] = []
    metrics = uit.train.retrieval_metrics

    def keep(retrieval: Retrieval, scores: Tensor) -> dict[str, float]:
        kept.append(scores.clone())
        return metrics(retrieval, scores)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(uit.rerank, "IMAGES_A_GROUP", 2)
        patch.setattr(uit.train, "retrieval_metrics", keep)
        run(argv)
    return dict(zip(("match", "itc"), kept, strict=True))


@pytest.mark.distributed
@pytest.mark.parametrize("ema", [{}, {"ema_decay": 0.5}])
def test_two_processes_validate_what_is_written(
    runs: Runs, tmp_path: Path, ema: dict[str, Any]
) -> None:
    # Training leaves each process with its own batch statistics; validation must use those of
    # rank 0.
    settings = {"val_pairs": 8, "epo": 1, "lr": 1e-2, "k_val": 3, **ema}
    (tmp_path / "ranks").mkdir()
    argv = runs.argv("two", bs=2, **settings)
    validated = run_in(2, partial(_run_and_keep_scores, argv), tmp_path / "ranks")
    config = load_config(TrainConfig, runs.folder / "two/config.yaml", {})
    tokenizer = Tokenizer(runs.vocabulary, 20, LENGTH)
    model = build_model(config, tokenizer).eval()
    load_uit(model, runs.folder / "two" / FINAL)
    retrieval = validation_retrieval(open_training_data(config))
    assert retrieval.gallery is not None
    captions = [query.caption for query in retrieval.queries]
    rows = [tokenizer.encode(caption) for caption in captions]
    compute = Compute(CPU, torch.float32, torch.float32, 4, 0)
    features = encode_gallery(model, retrieval.gallery, compute)
    itc = UitEncoder(compute, model, tokenizer).encode_texts(captions) @ features.vectors.T
    candidates = choose_candidates(itc, 3)
    logits = match_scores(
        model, tokenizer, rows, features.tokens, candidates, device=CPU, dtype=torch.float32
    )
    match = fill(logits, candidates, len(retrieval.gallery))
    for found in validated:
        torch.testing.assert_close(found["itc"], itc, rtol=0, atol=1e-5)
        torch.testing.assert_close(found["match"], match, rtol=0, atol=1e-4)


def test_missing_data_is_an_error_before_processes_start(
    runs: Runs, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        run_cli(run, runs.argv("none", dist="f2", data_path=runs.folder / "nowhere"))
    assert stop.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_diverged_run_ends_with_one_line_of_advice(
    runs: Runs, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        run_cli(run, runs.argv("diverged", lr=1e30, warmup_steps=0, epo=8))
    assert stop.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert "error: training: skipped steps in a row: 20, the last at step" in last


@pytest.mark.distributed
@pytest.mark.slow
def test_two_processes_train(runs: Runs) -> None:
    folder = runs.folder / "two"
    subprocess.run(
        [sys.executable, "-m", "uit.run", *runs.argv("two", dist="f2", bs=3, epo=1)], check=True
    )
    assert len(read_log(folder / "log.jsonl", "train")) == 4
    assert json.loads((folder / "run.json").read_text())["starts"][0]["processes"] == 2


# ---------------------------------------------------------------------------------------- scoring


@pytest.fixture(scope="session")
def checkpoint(vocabulary: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = small_model(Tokenizer(vocabulary, 20, LENGTH))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2, generator=generator)
    path = tmp_path_factory.mktemp("uit") / "uit.pth"
    torch.save({"model": model.state_dict()}, path)
    return path


class Scoring:
    """Start scoring runs on the tiny test set."""

    def __init__(self, data: Path, vocabulary: Path, checkpoint: Path, folder: Path) -> None:
        self.given: dict[str, Any] = {
            "text_encoder": vocabulary, "checkpoint": checkpoint, "k_test": 4, "num_workers": 0,
            "annotation": data / "annotation/test/pair.json", "device": "cpu", "batch_size": 3,
            "save_score": folder / "s.pt", "output_file": folder / "l.txt", "cache_dir": folder,
        }  # fmt: skip
        self.folder = folder

    def argv(self, *flags: str, **settings: Any) -> list[str]:
        given = self.given | settings
        words = [word for key, value in given.items() for word in (f"--{key}", str(value))]
        return [*SIZES, *TEXT, *flags, *words]

    def __call__(self, *flags: str, **settings: Any) -> ScoreFile:
        infer(self.argv(*flags, **settings))
        return load_scores((self.given | settings)["save_score"])


@pytest.fixture
def scoring(tiny_data: Path, vocabulary: Path, checkpoint: Path, tmp_path: Path) -> Scoring:
    return Scoring(tiny_data, vocabulary, checkpoint, tmp_path)


def test_itc_chooses_and_itm_scores(scoring: Scoring, tiny_data: Path) -> None:
    itc_file = scoring.folder / "itc.pt"
    found = scoring(save_itc=itc_file)
    itc = load_scores(itc_file)
    assert found.scores.shape == itc.scores.shape == (15, 10)
    assert (found.meta["kind"], itc.meta["kind"]) == ("itm", "itc")
    assert (found.meta["k_test"], found.meta["candidates"]) == (4, "itc")
    candidates = choose_candidates(itc.scores, 4)
    mask = torch.zeros_like(itc.scores, dtype=torch.bool).scatter_(1, candidates, True)
    for row in range(15):
        low = found.scores[row][mask[row]].min()
        rest = found.scores[row][~mask[row]]
        assert (rest == torch.nextafter(low, torch.tensor(-torch.inf))).all()
    assert sorted(p.name for p in scoring.folder.iterdir()) == ["itc.pt", "l.txt", "s.pt"]
    # The same candidates from a file whose rows are in another order
    order = torch.randperm(15, generator=torch.Generator().manual_seed(0)).tolist()
    ids = [itc.query_ids[i] for i in order]
    save_scores(itc_file, ScoreFile(itc.scores[order].contiguous(), ids, itc.gallery_ids, {}))
    again = scoring(candidates=itc_file)
    torch.testing.assert_close(again.scores, found.scores, atol=1e-6, rtol=0)
    assert again.meta["candidates"] == str(itc_file)


def test_lists_choose_candidates(
    scoring: Scoring, tiny_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    itc_file = scoring.folder / "itc.pt"
    found = scoring(save_itc=itc_file)
    lines = scoring.folder / "itc.txt"
    itc = load_scores(itc_file)
    write_ranked_list(lines, ranked_names(itc.scores, itc.gallery_ids, 4))
    export(itc, "rankings", scoring.folder / "itc.jsonl", top_k=4)
    for path in (lines, scoring.folder / "itc.jsonl"):
        again = scoring(candidates=path)
        torch.testing.assert_close(again.scores, found.scores, atol=1e-6, rtol=0)
    bare = scoring.folder / "bare.pt"
    torch.save(itc.scores, bare)
    capsys.readouterr()
    for path, k, message in (
        (lines, 5, "found 4; use --k_test 4, or a file that lists more"),
        (bare, 4, "python -m pab.scores import"),
    ):
        assert message in refused(scoring.argv(candidates=path, k_test=k), capsys)


def match_one_by_one(model: Uit, tokenizer: Tokenizer, rows: list[list[int]], tokens: Tensor,
                     candidates: Tensor) -> Tensor:  # fmt: skip
    """Score each query's candidates: repeat the text, run all layers on all tokens."""
    bert, scores = model.text_encoder, []
    for row, chosen in zip(rows, candidates, strict=True):
        ids, mask = tokenizer.pad_rows([row], tokenizer.max_length)
        text = bert.encode_text(ids, mask).expand(len(chosen), -1, -1)
        fused = bert.fuse(text, mask.expand(len(chosen), -1), bert.image_memory(tokens[chosen]))
        scores.append(model.match_logits(fused[:, 0])[:, 1])
    return torch.stack(scores)


@pytest.mark.parametrize("k", [1, 3, 10])
@pytest.mark.parametrize("small", [False, True])
@torch.inference_mode()
def test_shared_work_changes_nothing(
    tokenizer: Tokenizer, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, k: int, small: bool
) -> None:
    if small:  # several groups, and several passes per query
        monkeypatch.setattr("uit.rerank.IMAGES_A_GROUP", 4)
        monkeypatch.setattr("uit.rerank.PAIRS_A_PASS", 2)
    model = load_model("uit_debug", 32, 4, str(checkpoint), tokenizer)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randn(10, 17, 16, generator=generator)
    captions = ["a man in a red coat", "a woman", "a man is falling in the park, number 3", "red"]
    rows = [tokenizer.encode(caption) for caption in captions]
    candidates = torch.stack([torch.randperm(10, generator=generator)[:k] for _ in rows])
    found = match_scores(
        model, tokenizer, rows, tokens, candidates, device=CPU, dtype=torch.float32
    )
    expected = match_one_by_one(model, tokenizer, rows, tokens, candidates)
    assert found.std() > 1e-3 or k == 1
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("gigabytes", [0.0, 2.2, 100.0])
@torch.inference_mode()
def test_groups_from_free_memory_give_the_same_scores(
    tokenizer: Tokenizer, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, gigabytes: float
) -> None:
    """As on a GPU, groups are larger, and tokens stay on the device if they fit."""
    monkeypatch.setattr("uit.rerank.IMAGES_A_GROUP", 4)
    model = load_model("uit_debug", 32, 4, str(checkpoint), tokenizer)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randn(30, 17, 16, generator=generator).bfloat16()
    rows = [tokenizer.encode(f"a man in a red coat, number {i}") for i in range(12)]
    candidates = torch.stack([torch.randperm(30, generator=generator)[:3] for _ in rows])
    run = partial(match_scores, model, tokenizer, rows, tokens, candidates)
    expected = run(device=CPU, dtype=torch.float32)
    plans: list[uit.rerank._Plan] = []
    group_tokens = uit.rerank._group_tokens

    def keep(tokens: Tensor, plan: uit.rerank._Plan, *others: Any) -> Iterator[Tensor]:
        plans.append(plan)
        return group_tokens(tokens, plan, *others)

    monkeypatch.setattr("uit.rerank._group_tokens", keep)
    monkeypatch.setattr("uit.rerank.free_memory", lambda _: int(gigabytes * 2**30))
    found = run(device=CPU, dtype=torch.float32)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    (plan,) = plans
    assert sorted(plan.order) == list(range(12))
    assert plan.keeps_tokens == (gigabytes > 0)
    assert len(plan.groups) == 1 if gigabytes else len(plan.groups) > 5


def test_rows_are_gathered_ahead_in_order() -> None:
    tokens = torch.arange(20.0).view(10, 2)
    parts = [np.array([3, 1]), np.array([9]), np.array([0, 5, 5])]
    found = list(uit.rerank._ahead(tokens, parts, CPU))
    for block, part in zip(found, parts, strict=True):
        assert torch.equal(block, tokens[torch.from_numpy(part)])


def test_the_result_does_not_depend_on_batch_or_workers(scoring: Scoring) -> None:
    plain = scoring()
    other = scoring(batch_size=10, num_workers=2, save_score=scoring.folder / "o.pt")
    torch.testing.assert_close(plain.scores, other.scores, atol=1e-5, rtol=0)
    half = scoring(cache_dtype="bf16", save_score=scoring.folder / "h.pt")
    torch.testing.assert_close(plain.scores, half.scores, atol=0.05, rtol=0.05)


def test_filling() -> None:
    match, candidates = torch.tensor([[3.0, -1.0]]), torch.tensor([[4, 1]])
    found = fill(match, candidates, 5)[0]
    assert found[4] == 3.0
    assert found[1] == -1.0
    assert (found[[0, 2, 3]] < -1.0).all()
    assert (found[[0, 2, 3]] == np.nextafter(np.float32(-1), np.float32(-2))).all()


def refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stop:
        run_cli(infer, words)
    assert stop.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1
    return error[0]


@pytest.fixture
def odd(scoring: Scoring, vocabulary: Path, checkpoint: Path) -> dict[str, Any]:
    """Map words of the expected message to the bad setting."""
    folder = scoring.folder
    scores = ScoreFile(torch.rand(15, 10), [f"x{i}" for i in range(15)],
                       [f"t{i}" for i in range(10)], {})  # fmt: skip
    save_scores(folder / "ids.pt", scores)
    words = folder / "words"
    shutil.copytree(vocabulary, words)
    with (words / VOCABULARY).open("a") as file:
        file.write("more\n")
    empty = folder / "empty"
    empty.mkdir()
    other = model_state(read_checkpoint(checkpoint), checkpoint)
    name = "text_encoder.bert.embeddings.LayerNorm.weight"
    torch.save({"model": other | {name: torch.full_like(other[name], torch.nan)}}, folder / "n.pth")
    torch.save({"model": {k: v for k, v in other.items() if k != name}}, folder / "m.pth")
    return {
        "equal to 1": {"k_test": 0},
        "'t0#0'": {"candidates": folder / "ids.pt"},
        "no_such.pt": {"candidates": folder / "no_such.pt"},
        "vocab.txt": {"text_encoder": empty}, "word vectors": {"text_encoder": words},
        "NaN": {"checkpoint": folder / "n.pth"}, "1 missing": {"checkpoint": folder / "m.pth"},
        "--save_itc": {"candidates": folder / "ids.pt", "save_itc": folder / "i.pt"},
        "--input_size": {"input_size": 36}, "--max_words": {"max_words": 0},
        "--model": {"model": "uit_huge"}, "--cache_dtype": {"cache_dtype": "int8"},
    }  # fmt: skip


@pytest.mark.parametrize(
    "expected",
    [
        "equal to 1", "'t0#0'", "no_such.pt", "vocab.txt", "word vectors", "NaN",
        "1 missing", "--save_itc", "--input_size", "--max_words", "--model", "--cache_dtype",
    ],
)  # fmt: skip
def test_bad_input(
    scoring: Scoring, odd: dict[str, Any], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert expected in refused(scoring.argv(**odd[expected]), capsys)
    assert not (scoring.folder / "s.pt").exists()
    assert not (scoring.folder / "l.txt").exists()


def test_evaluation_of_the_labelled_test_set(runs: Runs, checkpoint: Path) -> None:
    runs("eval", "--evaluate", checkpoint=checkpoint, k_test=5)
    found = load_scores(runs.folder / "eval/score_test_k5.pt")
    assert found.meta["k_test"] == 5
    assert len((runs.folder / "eval/predictions_test_k5.txt").read_text().splitlines()) == 15


def test_a_k_larger_than_the_gallery_means_all_images(
    runs: Runs, checkpoint: Path, data_copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs("all", "--evaluate", checkpoint=checkpoint, k_test=10)
    runs.data = data_copy
    pair = data_copy / "annotation/test/pair.json"
    pair.rename(pair.with_name("attr.json"))
    capsys.readouterr()
    runs("more", "--evaluate", checkpoint=checkpoint, k_test=99)
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]
    assert said == [
        f"note: {pair}: not found; reading attr.json, which has the same contents",
        "note: --k_test: 99 exceeds the size of the gallery (10): all images are candidates",
    ]
    files = ("all/score_test.pt", "more/score_test_k99.pt")
    one, two = (load_scores(runs.folder / name) for name in files)
    assert torch.equal(one.scores, two.scores)
    assert (one.meta["k_test"], two.meta["k_test"]) == (10, 99)


# -------------------------------------------------------------------------------- initial weights


def test_swin_with_the_names_of_timm_and_microsoft(tmp_path: Path) -> None:
    import timm

    torch.manual_seed(0)
    theirs = timm.models.swin_transformer.SwinTransformer(
        img_size=32, patch_size=4, embed_dim=8, depths=(1, 2), num_heads=(1, 2), window_size=4,
        num_classes=3,
    ).eval()  # fmt: skip
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    image = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = theirs.forward_features(image).flatten(1, 2)
    torch.save(theirs.state_dict(), tmp_path / "timm.pth")
    microsoft = {
        name.replace("layers.1.downsample", "layers.0.downsample").replace("head.fc", "head"): t
        for name, t in theirs.state_dict().items()
    }
    torch.save({"model": microsoft}, tmp_path / "microsoft.pth")
    for name in ("timm", "microsoft"):
        model = Uit(MODELS["uit_debug"]).eval()
        load_swin(model, tmp_path / f"{name}.pth")
        with torch.no_grad():
            found = model.vision_encoder(image)[:, 1:]
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_bias_tables_for_larger_windows(tokenizer: Tokenizer, tmp_path: Path) -> None:
    small = small_model(tokenizer)
    torch.save({"model": small.state_dict()}, tmp_path / "small.pth")
    sizes = model_config("uit_debug", 64, 8)
    import dataclasses

    bert = dataclasses.replace(sizes.bert, vocab_size=tokenizer.vocab_size)
    large = Uit(dataclasses.replace(sizes, bert=bert))
    load_uit(large, tmp_path / "small.pth")
    name = "vision_encoder.layers.0.blocks.0.attn.relative_position_bias_table"
    old, new = small.state_dict()[name], large.state_dict()[name]
    assert (old.shape, new.shape) == ((49, 1), (225, 1))
    torch.testing.assert_close(new.mean(), old.mean(), atol=5e-3, rtol=0)
    torch.testing.assert_close(new.view(15, 15)[7, 7], old.view(7, 7)[3, 3], atol=5e-3, rtol=0)


def test_bert_with_the_names_of_hugging_face(tokenizer: Tokenizer, tmp_path: Path) -> None:
    from transformers import BertConfig, BertForPreTraining

    sizes = MODELS["uit_debug"].bert
    torch.manual_seed(0)
    theirs = BertForPreTraining(
        BertConfig(
            vocab_size=tokenizer.vocab_size, hidden_size=sizes.width,
            num_hidden_layers=sizes.layers, num_attention_heads=sizes.heads,
            intermediate_size=sizes.ffn_dim, max_position_embeddings=sizes.positions,
            type_vocab_size=sizes.types,
        )
    ).eval()  # fmt: skip
    state = theirs.state_dict()
    renamed = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    old = dict(state)
    for new_name, old_name in renamed.items():
        old = {name.replace(new_name, old_name): tensor for name, tensor in old.items()}
    torch.save(state, tmp_path / "pytorch_model.bin")
    torch.save(old, tmp_path / "old.bin")
    ids, mask = tokenizer.pad_rows([tokenizer.encode("a man in a red coat"), tokenizer.encode("a")])
    with torch.no_grad():
        hidden = theirs.bert(ids, mask, output_hidden_states=True).hidden_states
    for path in (tmp_path, tmp_path / "old.bin"):
        model = small_model(tokenizer).eval()
        report = load_bert(model, path)
        assert all("crossattention" in name for name in report.missing)
        with torch.no_grad():
            found = model.text_encoder.encode_text(ids, mask)
        visible = mask.bool()
        torch.testing.assert_close(
            found[visible], hidden[sizes.fusion_layer][visible], atol=1e-5, rtol=1e-5
        )
    with pytest.raises(InputError, match="expected BERT's weights"):
        load_bert(small_model(tokenizer), tokenizer.path.parent)


def test_a_person_search_checkpoint(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """The towers are required; heads may be missing or have another shape."""
    state = small_model(tokenizer).state_dict()
    state["vision_proj.2.weight"] = torch.zeros(7, 3)
    state["queue"] = torch.zeros(4)
    del state["text_proj.2.bias"]
    torch.save({"model": state}, tmp_path / "search.pth")
    model = small_model(tokenizer)
    report = load_uit(model, tmp_path / "search.pth", start=True)
    assert set(report.missing) == {"vision_proj.2.weight", "text_proj.2.bias"}
    assert report.unexpected == ("queue",)
    with pytest.raises(InputError, match="of another shape"):
        load_uit(model, tmp_path / "search.pth")
    del state["vision_encoder.norm.weight"]
    torch.save({"model": state}, tmp_path / "no_tower.pth")
    with pytest.raises(InputError, match=r"vision_encoder\.norm\.weight"):
        load_uit(model, tmp_path / "no_tower.pth", start=True)


def test_defaults_are_the_released_recipe() -> None:
    config = TrainConfig()
    assert (config.batch_size, config.epochs, config.lr, config.schedule) == (84, 30, 1e-4, "step")
    assert config.mim_weight == pytest.approx(0.1356 * 84)


@pytest.mark.parametrize("cache_dtype", ["fp32", "bf16"])
def test_cached_tokens_are_not_encoded_again(
    data_copy: Path, vocabulary: Path, checkpoint: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, cache_dtype: str,
) -> None:  # fmt: skip
    scoring = Scoring(data_copy, vocabulary, checkpoint, tmp_path)
    seen: list[int] = []
    plain = Uit.image_vector

    def counted(self: Uit, tokens: Tensor) -> Tensor:
        seen.append(len(tokens))
        return plain(self, tokens)

    monkeypatch.setattr(Uit, "image_vector", counted)
    settings = {"cache_dtype": cache_dtype, "save_itc": scoring.folder / "itc.pt"}

    def score(flag: str) -> tuple[Tensor, Tensor, int]:
        seen.clear()
        found = scoring(flag, **settings).scores
        return found, load_scores(scoring.folder / "itc.pt").scores, sum(seen)

    first, first_itc, encoded = score("--feature_cache")
    assert encoded == first.shape[1]
    again, again_itc, encoded = score("--feature_cache")
    assert encoded == 0
    assert torch.equal(again, first)
    assert torch.equal(again_itc, first_itc)
    draw(data_copy / "test/3.jpg", 55, normal=True)
    changed, changed_itc, encoded = score("--feature_cache")
    assert encoded == 1
    plain, plain_itc, _ = score("--no_feature_cache")
    torch.testing.assert_close(changed, plain, rtol=0, atol=1e-5)
    torch.testing.assert_close(changed_itc, plain_itc, rtol=0, atol=1e-5)
    assert not torch.allclose(changed_itc, first_itc, rtol=0, atol=1e-3)


def _infer(argv: list[str], nodes: bool, folder: Path) -> None:
    own = ["--cache_dir", str(folder / f"node{processes.rank()}")] if nodes else []
    infer([*argv, *own])


@pytest.mark.distributed
@pytest.mark.parametrize(("world", "nodes"), [(2, False), (2, True), (3, False)])
def test_several_processes_score_as_one(
    scoring: Scoring, tmp_path: Path, world: int, nodes: bool
) -> None:
    """With ``nodes``, each process has its own features, as on nodes without a shared folder."""
    plain = scoring(save_itc=scoring.folder / "itc.pt")
    (tmp_path / "ranks").mkdir()
    outputs = {"save_score": scoring.folder / "o.pt", "save_itc": scoring.folder / "o_itc.pt"}
    run_in(world, partial(_infer, scoring.argv(**outputs), nodes), tmp_path / "ranks")
    for name, other in (("itc.pt", "o_itc.pt"), ("s.pt", "o.pt")):
        one, two = load_scores(scoring.folder / name), load_scores(scoring.folder / other)
        assert (one.query_ids, one.gallery_ids) == (two.query_ids, two.gallery_ids)
        torch.testing.assert_close(two.scores, one.scores, atol=1e-6, rtol=0)
    assert plain.meta == {**load_scores(outputs["save_score"]).meta}
    assert not list(scoring.folder.glob(".features-*"))
