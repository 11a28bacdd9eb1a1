"""Fine-tuning CLIP and BLIP-2 on the tiny data: trained, frozen and written weights."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import pab.encoders.blip2.finetune
import pab.encoders.clip.finetune
from lhp.views import HybridView
from pab.core.adapters import own_name
from pab.core.checkpoints import model_state, read_checkpoint
from pab.core.errors import InputError
from pab.data.training_set import TrainingSet
from pab.encoders.blip2.model import MODELS, Blip2, load_blip2
from pab.encoders.clip.finetune import LARGEST_SCALE, bounded
from pab.encoders.clip.identity import ARCHITECTURE
from pab.encoders.clip.model import load_clip, new_clip
from pab.encoders.layer_numbers import two_tower_layers
from pab.encoders.train_clip_tokenizer import train_clip_tokenizer
from pab.scores import load_scores
from pab.training.config import ContrastiveConfig
from pab.training.loop import FINAL
from pab.training.optim import parameter_groups
from pab.training.pair_data import PairDataset
from pab.training.pairs import PairModel
from pab.training.resume import LAST, PREVIOUS
from pab.training.run_log import read_log
from scripts import blip2_infer, clip_infer, finetune_blip2, finetune_clip
from tests.test_processes import run_in
from uit.make_vocabulary import make_vocabulary

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
MAINS = {"clip": finetune_clip.main, "blip2": finetune_blip2.main}
SIZES = {
    "embed_dim": 16,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 32, "layers": 3, "width": 32, "patch_size": 16, "head_width": 16},
    "text_cfg": {
        "context_length": 40, "vocab_size": 300, "width": 32, "heads": 2, "layers": 2,
        "hf_tokenizer_name": "here",
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def clip_folder(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny CLIP in OpenCLIP's folder format, without weights."""
    folder = tmp_path_factory.mktemp("clips") / "tiny-clip"
    captions = [
        json.loads(line)["caption"]
        for shard in (tiny_data / "annotation/train").glob("*.json")
        for line in shard.read_text().splitlines()
    ]
    made = train_clip_tokenizer(captions, 300)
    made.save_pretrained(folder)
    text = {**SIZES["text_cfg"], "vocab_size": len(made)}  # type: ignore[dict-item]
    config = {"model_cfg": {**SIZES, "text_cfg": text}, "preprocess_cfg": {}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    return f"local-dir:{folder}"


class Runs:
    """Start short training runs on 24 pairs."""

    def __init__(self, data: Path, clip_folder: str, folder: Path) -> None:
        self.data, self.folder = data, folder
        self.own: dict[str, dict[str, Any]] = {
            "clip": {"model": clip_folder},
            "blip2": {"model": "mini", "text_encoder": ROOT / "checkpoints/mini/bert"},
        }

    def argv(self, kind: str, name: str, *flags: str, **settings: Any) -> list[str]:
        given = {
            "pretrained": "random", "data_path": self.data, "batch_size": 8, "epochs": 2,
            "output_dir": self.folder / name, "lr": 1e-3, "min_lr": 1e-4, "warmup_steps": 2,
            "num_workers": 0, "dtype": "fp32", "device": "cpu", "layer_decay": 1.0,
            "cache_dir": self.folder / "cache", **self.own[kind],
        } | settings  # fmt: skip
        return [*flags, *(word for k, v in given.items() for word in (f"--{k}", str(v)))]

    def __call__(self, kind: str, name: str, *flags: str, **settings: Any) -> Path:
        MAINS[kind](self.argv(kind, name, *flags, **settings))
        return self.folder / name


@pytest.fixture
def runs(tiny_data: Path, clip_folder: str, tmp_path: Path) -> Runs:
    return Runs(tiny_data, clip_folder, tmp_path)


def weights(folder: Path) -> dict[str, Tensor]:
    return model_state(read_checkpoint(folder / FINAL), folder / FINAL)


def changed(one: dict[str, Tensor], two: dict[str, Tensor]) -> set[str]:
    assert one.keys() == two.keys()
    return {name for name in one if not torch.equal(one[name], two[name])}


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in read_log(folder / "log.jsonl", "train")]


def built(runs: Runs, kind: str, **settings: Any) -> tuple[ContrastiveConfig, PairModel]:
    """Build the config and the model as the training command does."""
    module = {"clip": pab.encoders.clip.finetune, "blip2": pab.encoders.blip2.finetune}[kind]
    names = {"pretrained": "random", **runs.own[kind], **settings}
    config = module.TrainConfig(
        **{k: str(v) if k == "text_encoder" else v for k, v in names.items()}
    )
    torch.manual_seed(0)
    return config, module.pair_model(config, HybridView, CPU)


@pytest.mark.parametrize("kind", ["clip", "blip2"])
def test_the_loss_decreases(runs: Runs, kind: str) -> None:
    found = losses(runs(kind, "learn", epochs=30, batch_size=12, lr=2e-3, local_prob=0.0))
    assert sum(found[-4:]) / 4 < 0.7 * found[0]


@pytest.mark.parametrize("kind", ["clip", "blip2"])
@pytest.mark.parametrize("rank", [0, 4])
def test_every_trained_parameter_has_a_gradient(runs: Runs, kind: str, rank: int) -> None:
    from pab.training.contrastive import pooled_infonce
    from pab.training.pair_data import PairBatch

    _, model = built(runs, kind, lora_rank=rank)
    model.module.train()
    side = 32 if kind == "clip" else 64
    captions = ["A woman in a red coat is walking.", "A man falls.", "A man in the park, number 3."]
    pairs = PairBatch(
        torch.randn(3, 3, side, side),
        *model.pad([model.encode_ids(c) for c in captions]),
        torch.arange(3),
    )
    vectors = model.vectors(pairs)
    assert vectors.shape[:2] == (3, 2)
    pooled_infonce(vectors[:, :-1], vectors[:, -1], model.logit_scale()).backward()
    trained = {n: p for n, p in model.module.named_parameters() if p.requires_grad}
    assert [name for name, p in trained.items() if p.grad is None] == []
    if rank:
        others = {own_name(n) for n in trained if "lora_" not in n}
        assert others == {"logit_scale" if kind == "clip" else "temp"}


@pytest.mark.parametrize("kind", ["clip", "blip2"])
def test_low_rank_updates_are_merged_into_the_written_weights(runs: Runs, kind: str) -> None:
    start = runs(kind, "start", epochs=1)
    tuned = runs(
        kind, "tuned", lora_rank=2, lr=1e-2, pretrained=start / FINAL, val_pairs=4, epochs=1
    )
    moved = changed(weights(start), weights(tuned))
    assert moved, "the written weights must contain the updates"
    scale = {"logit_scale", "temp"}
    assert all(".resblocks." in n or ".layer." in n for n in moved - scale), sorted(moved)
    assert any("in_proj_weight" in name for name in moved)
    for name in moved - scale:
        update = weights(tuned)[name] - weights(start)[name]
        assert torch.linalg.matrix_rank(update, atol=1e-5) <= (6 if "in_proj" in name else 2)
    (val,) = read_log(tuned / "log.jsonl", "val")
    assert 0 <= val["R@1"] <= 100


@pytest.mark.parametrize(
    ("kind", "tower"), [("clip", "image"), ("clip", "text"), ("blip2", "image")]
)
@pytest.mark.parametrize("rank", [0, 2])
def test_a_frozen_tower_keeps_its_weights(runs: Runs, kind: str, tower: str, rank: int) -> None:
    start = runs(kind, "start", epochs=1)
    tuned = runs(kind, "tuned", freeze=tower, lora_rank=rank, pretrained=start / FINAL, epochs=1)
    moved = changed(weights(start), weights(tuned))
    image = {name for name in weights(start) if name.startswith(("visual", "ln_vision"))}
    assert moved
    assert not moved & image if tower == "image" else moved <= image | {"logit_scale"}


def test_a_frozen_module_stays_in_evaluation_mode(runs: Runs) -> None:
    _, model = built(runs, "clip", freeze="image")
    model.module.train()
    assert not any(m.training for m in model.module.get_submodule("visual").modules())
    assert model.module.get_submodule("transformer").training


def test_chunks_give_the_loss_of_the_whole_batch(runs: Runs) -> None:
    settings: dict[str, Any] = {"epochs": 1, "freeze": "image", "lr": 1e-4}
    whole = losses(runs("clip", "whole", **settings))
    chunked = losses(runs("clip", "chunked", grad_cache_chunk=3, **settings))
    assert chunked == pytest.approx(whole, abs=1e-4)


def test_activation_checkpointing_changes_no_clip_weight(runs: Runs) -> None:
    plain = weights(runs("clip", "plain", epochs=1))
    saved = weights(runs("clip", "saved", "--checkpoint_activations", epochs=1))
    assert max(float((plain[n] - saved[n]).abs().max()) for n in plain) < 1e-5


@pytest.mark.parametrize("kind", ["clip", "blip2"])
def test_low_rank_updates_with_activation_checkpointing(runs: Runs, kind: str) -> None:
    plain = losses(runs(kind, "plain", lora_rank=2, epochs=1))
    saved = losses(runs(kind, "saved", "--checkpoint_activations", lora_rank=2, epochs=1))
    assert saved == pytest.approx(plain, abs=1e-4)


@pytest.mark.parametrize("kind", ["clip", "blip2"])
@pytest.mark.parametrize("rank", [0, 2])
def test_a_resumed_run_needs_no_initial_weights(
    runs: Runs, kind: str, rank: int, capsys: pytest.CaptureFixture[str]
) -> None:
    start = runs(kind, "start", epochs=1) / FINAL
    settings: dict[str, Any] = {"pretrained": start, "lora_rank": rank, "epochs": 3}
    whole = runs(kind, "whole", **settings)
    runs(kind, "cut", max_steps=4, **settings)
    start.unlink()
    cut = runs(kind, "cut", **settings)
    assert f"note: --pretrained: {start} is missing" in capsys.readouterr().err
    for name in (*(f"checkpoint-{epoch}.pth" for epoch in range(3)), FINAL):
        assert (whole / name).read_bytes() == (cut / name).read_bytes(), name


def test_a_renamed_folder_is_the_same_model(runs: Runs, clip_folder: str, tmp_path: Path) -> None:
    runs("clip", "run", max_steps=2)
    folder = Path(clip_folder.removeprefix("local-dir:"))
    other = tmp_path / "other" / folder.name
    shutil.copytree(folder, other)
    runs("clip", "run", model=f"local-dir:{other}", max_steps=3)
    config = json.loads((other / "open_clip_config.json").read_text())
    config["preprocess_cfg"] = {"mean": [0.5, 0.5, 0.5]}
    (other / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"other settings: model \(was SHA-256 "):
        runs("clip", "run", model=f"local-dir:{other}")


def test_low_rank_updates_do_not_resume_from_merged_weights(runs: Runs) -> None:
    run = runs("clip", "run", lora_rank=2, epochs=2)
    for name in (LAST, PREVIOUS):
        (run / name).unlink()
    with pytest.raises(InputError, match=r"checkpoint-1.pth: its weights do not fit .*--lora_rank"):
        runs("clip", "run", "--resume_from", "newest_good", lora_rank=2, epochs=2)


@pytest.mark.parametrize("ema", [{}, {"ema_decay": 0.5}])
def test_a_training_state_scores_as_the_final_weights(
    runs: Runs, ema: dict[str, float], clip_folder: str, tmp_path: Path
) -> None:
    run = runs("clip", "clip", lr=5e-3, **ema)
    found = [
        score(clip_infer.main, runs.data, tmp_path, model=clip_folder, pretrained=run / name,
              feature_cache_dir=tmp_path / name)
        for name in (FINAL, LAST)
    ]  # fmt: skip
    assert torch.equal(*found)
    run = runs("blip2", "blip2", lr=5e-3, **ema)
    found = [
        score(blip2_infer.main, runs.data, tmp_path, pretrained=run / name, **runs.own["blip2"],
              feature_cache_dir=tmp_path / f"b{name}")
        for name in (FINAL, LAST)
    ]  # fmt: skip
    assert torch.equal(*found)


def test_a_temperature_at_its_bound_can_leave_it() -> None:
    scale = torch.nn.Parameter(torch.tensor(7.0))
    bounded(scale).backward()
    assert float(scale.detach()) == pytest.approx(LARGEST_SCALE)
    assert scale.grad == 1.0
    model = Blip2(MODELS["mini"])
    with torch.no_grad():
        model.temp.fill_(0.0001)
    model.logit_scale().backward()
    assert float(model.temp.detach()) == pytest.approx(0.001)
    assert model.temp.grad is not None
    assert model.temp.grad < 0


@pytest.mark.parametrize("kind", ["clip", "blip2"])
def test_a_data_set_can_be_pickled_for_a_loader_process(
    runs: Runs, kind: str, tiny_data: Path, tmp_path: Path
) -> None:
    _, model = built(runs, kind)
    pairs = TrainingSet.open(tiny_data, cache_dir=tmp_path / "cache")
    data = PairDataset(pairs, np.arange(len(pairs)), model.view, model.encode_ids, 16)
    again = pickle.loads(pickle.dumps(data))  # noqa: S301, pickled here
    (pixels, *others), (pixels_again, *others_again) = data[2, 0], again[2, 0]
    assert torch.equal(pixels, pixels_again)  # type: ignore[arg-type]
    assert others == others_again


def test_written_clip_weights_are_scored(runs: Runs, clip_folder: str, tmp_path: Path) -> None:
    tuned = runs("clip", "tuned", epochs=1)
    assert read_checkpoint(tuned / FINAL)["metadata"][ARCHITECTURE] == "tiny-clip"
    scores = score(
        clip_infer.main, runs.data, tmp_path, model=clip_folder, pretrained=tuned / FINAL
    )
    clip = load_clip(clip_folder, str(tuned / FINAL))
    ids = clip.tokenize(["A man falls."])
    assert scores.shape == (10, 10)
    assert clip.encode_text(ids).shape == (1, 16)


@pytest.mark.parametrize("pooling", ["first", "max"])
def test_written_blip2_weights_are_scored(runs: Runs, pooling: str, tmp_path: Path) -> None:
    tuned = runs("blip2", "tuned", query_pooling=pooling, epochs=1)
    scores = score(
        blip2_infer.main, runs.data, tmp_path, query_pooling=pooling, pretrained=tuned / FINAL,
        **runs.own["blip2"],
    )  # fmt: skip
    assert scores.shape == (10, 10)
    assert isinstance(load_blip2(MODELS["mini"], tuned / FINAL), Blip2)


def _score(kind: str, argv: list[str], folder: Path) -> None:
    {"clip": clip_infer, "blip2": blip2_infer}[kind].main(argv)


@pytest.mark.distributed
@pytest.mark.parametrize("kind", ["clip", "blip2"])
def test_two_processes_score_as_one(runs: Runs, kind: str, tmp_path: Path) -> None:
    tuned = runs(kind, "tuned", epochs=1)
    main = {"clip": clip_infer, "blip2": blip2_infer}[kind].main
    given = {**runs.own[kind], "pretrained": tuned / FINAL, "feature_cache_dir": tmp_path / "f"}
    alone = score(main, runs.data, tmp_path, **given)
    (tmp_path / "ranks").mkdir()
    words = score_argv(runs.data, tmp_path, **given, save_score=tmp_path / "two.pt")
    run_in(2, partial(_score, kind, [*words, "--no_feature_cache"]), tmp_path / "ranks")
    torch.testing.assert_close(load_scores(tmp_path / "two.pt").scores, alone, atol=1e-6, rtol=0)


def score(main: Callable[[list[str]], None], data: Path, out: Path, **settings: Any) -> Tensor:
    main(score_argv(data, out, **settings))
    return load_scores(out / "scores.pt").scores


def score_argv(data: Path, out: Path, **settings: Any) -> list[str]:
    masked = data / "name-masked_test-set"
    given = {
        "image_folder": masked / "gallery", "annotation": masked / "query.json",
        "save_score": out / "scores.pt", "output_file": out / "list.txt", "num_workers": 0,
        "device": "cpu", **settings,
    }  # fmt: skip
    return [word for k, v in given.items() for word in (f"--{k}", str(v))]


# ------------------------------------------------------------------------------------------ layers


def test_last_layers_of_two_towers_have_the_same_number() -> None:
    names = [
        "positional_embedding", "token_embedding.weight", "transformer.resblocks.0.ln_1.weight",
        "transformer.resblocks.1.mlp.c_fc.weight", "ln_final.weight", "logit_scale",
        "visual.class_embedding", "visual.conv1.weight", "visual.ln_pre.weight",
        "visual.transformer.resblocks.0.attn.in_proj_weight",
        "visual.transformer.resblocks.3.attn.in_proj_weight", "visual.ln_post.weight",
        "visual.proj",
    ]  # fmt: skip
    layers, layer_of = two_tower_layers(names, lambda name: name.startswith("visual."))
    assert layers == 4
    assert [layer_of(name) for name in names] == [2, 2, 3, 4, 5, 5, 0, 0, 0, 1, 4, 5, 5]


def test_blip2_numbers_its_tower_below_its_qformer(runs: Runs) -> None:
    _, model = built(runs, "blip2")
    layer = model.layer_of
    assert model.layers == 7
    assert layer("visual_encoder.conv1.weight") == layer("visual_encoder.class_embedding") == 0
    assert layer("visual_encoder.transformer.resblocks.3.ln_1.weight") == 4
    assert layer("query_tokens") == layer("embeddings.word_embeddings.weight") == 4
    assert layer("qformer.encoder.layer.0.attention.attention.query.weight") == 5
    assert layer("qformer.encoder.layer.2.output.dense.weight") == 7
    assert layer("temp") == layer("text_proj.weight") == 8


@pytest.mark.parametrize("kind", ["clip", "blip2"])
def test_learning_rates_decay_downward_and_embeddings_have_no_weight_decay(
    runs: Runs, kind: str
) -> None:
    _, model = built(runs, kind)
    groups = parameter_groups(
        model.module.named_parameters(), weight_decay=0.1, no_decay=model.no_decay,
        layer_of=model.layer_of, n_layers=model.layers, layer_decay=0.5,
    )  # fmt: skip
    scales = {name: group["lr_scale"] for group in groups for name in group["names"]}
    decays = {name: group["weight_decay"] for group in groups for name in group["names"]}
    visual = "visual" if kind == "clip" else "visual_encoder"
    assert scales[f"{visual}.conv1.weight"] < scales[f"{visual}.transformer.resblocks.1.ln_1.bias"]
    assert min(scales.values()) == 0.5 ** (model.layers + 1)
    assert max(scales.values()) == 1.0
    for name, decay in decays.items():
        plain = name.endswith("bias") or "embed" in name or name in ("logit_scale", "query_tokens")
        assert decay == 0.0 or not plain, name
    assert decays[f"{visual}.transformer.resblocks.0.mlp.c_fc.weight"] == 0.1


# --------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("kind", "settings", "expected"),
    [
        ("clip", {"model": "ViT-B-33"}, "nearest names are .*ViT-B-32"),
        ("clip", {"model": "local-dir:nowhere"}, "nowhere"),
        ("clip", {"pretrained": "none.pt"}, "none.pt"),
        ("clip", {"lora_rank": -1}, "--lora_rank"),
        ("clip", {"lora_alpha": 0}, "--lora_alpha"),
        ("clip", {"data_path": "nowhere"}, "nowhere"),
        ("blip2", {"freeze": "text"}, "--freeze"),
        ("blip2", {"pretrained": "none.pth"}, "none.pth"),
        ("blip2", {"text_encoder": "nowhere"}, "nowhere"),
        ("blip2", {"text_encoder": "{other}"}, "the model embeds 692"),
    ],
)
def test_bad_settings_are_refused(
    runs: Runs, kind: str, settings: dict[str, Any], expected: str, refused: Callable[..., str]
) -> None:
    import re

    other = runs.folder / "words"
    make_vocabulary(["a man in a red coat"], other, 60)
    settings = {key: str(value).format(other=other) for key, value in settings.items()}
    printed = refused(MAINS[kind], runs.argv(kind, "bad", **settings))
    assert re.search(expected, printed), printed
    assert not (runs.folder / "bad").exists()


def test_an_incomplete_folder_is_refused(clip_folder: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no weights"):
        load_clip(clip_folder)
    (tmp_path / "open_clip_config.json").write_text("[1]")
    with pytest.raises(InputError, match="expected a JSON object"):
        load_clip(f"local-dir:{tmp_path}")
    (tmp_path / "open_clip_config.json").write_text("{}")
    with pytest.raises(InputError, match="no model_cfg"):
        load_clip(f"local-dir:{tmp_path}")
    (tmp_path / "open_clip_config.json").write_text('{"model_cfg": {}, "preprocess_cfg": null}')
    with pytest.raises(InputError, match="cannot be built"):
        new_clip(f"local-dir:{tmp_path}")


def test_the_dropout_of_the_q_former_is_that_of_the_settings(runs: Runs) -> None:
    for given, wanted in (({}, 0.1), ({"dropout": 0.0}, 0.0)):
        _, pairs = built(runs, "blip2", **given)
        layers = [layer for layer in pairs.module.modules() if isinstance(layer, nn.Dropout)]
        assert {layer.p for layer in layers} == {wanted}
        model = pairs.module.train()
        assert isinstance(model, Blip2)
        ids = torch.arange(1, 9)[None]
        first, again = (model.encode_text(ids, torch.ones_like(ids)) for _ in range(2))
        assert torch.equal(first, again) == (wanted == 0.0)


@pytest.mark.parametrize("kind", ["clip", "blip2"])
def test_losses_in_bf16_are_close_to_float32(runs: Runs, kind: str) -> None:
    given = {"epochs": 1, **({"dropout": 0.0} if kind == "blip2" else {})}
    exact, half = (runs(kind, name, dtype=name, **given) for name in ("fp32", "bf16"))
    assert losses(half) == pytest.approx(losses(exact), rel=2e-2)


@pytest.mark.parametrize("kind", ["clip", "blip2"])
def test_a_table_trains_and_scores(
    runs: Runs, kind: str, data_copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = TrainingSet.open(data_copy, cache_dir=tmp_path / "cache")
    rows = [f'{data_copy}/{pair.image},"{pair.caption}"' for pair in pairs]
    again = rows[0].replace(',"', ',"Again: ')  # a second caption of one image
    table = data_copy / "pairs.csv"
    table.write_text("\n".join(["filepath,title", *rows, again]) + "\n")
    out = runs(
        kind, "table", epochs=1, val_pairs=4, data_path=data_copy, train_shards="pairs.csv"
    )  # fmt: skip
    capsys.readouterr()
    main = {"clip": clip_infer.main, "blip2": blip2_infer.main}[kind]
    main([
        *(word for k, v in runs.own[kind].items() for word in (f"--{k}", str(v))),
        "--pretrained", str(out / FINAL), "--annotation", str(table), "--num_workers", "0",
        "--device", "cpu", "--save_score", "none", "--output_file", "none",
    ])  # fmt: skip
    assert capsys.readouterr().out.splitlines()[1].split()[:2] == ["all", "25"]
