"""Training views as uint8 pixels equal views that are normalized in the loader."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

import lhp.train
import uit.run
from lhp.views import HybridView
from pab.core.checkpoints import model_state, read_checkpoint
from pab.data.images import recipe
from pab.data.pixels import Preprocessing
from pab.training.loop import FINAL
from tests.conftest import MODEL
from tests.fake_cuda import CUDA, fake_cuda
from tests.test_images import noise
from tests.test_uit_train import SIZES, TEXT, vocabulary  # noqa: F401 - a fixture
from uit.augment import (
    ERASED_AREA,
    ERASED_RATIO,
    NOTHING,
    Augmentation,
    TrainingView,
    erase,
    operations,
)
from uit.data import finisher
from uit.objective import UitBatch

CROPS: Any = ((0.5, 1.0), (3 / 4, 4 / 3))


def normalized_in_the_loader(name: str, size: int) -> v2.Compose:
    """Return the preprocessing as one chain of torchvision's transforms."""
    found = recipe(name, size)
    to_float = v2.ToDtype(torch.float32, scale=True)
    colours = v2.Normalize(list(found.mean), list(found.std))
    squash = v2.Resize((size, size), interpolation=v2.InterpolationMode.BICUBIC)
    return v2.Compose([squash, v2.PILToTensor(), to_float, colours])


def test_hybrid_views_are_uint8_and_equal_torchvision_bit_for_bit() -> None:
    view, image = HybridView(16, 0.5, *CROPS), noise(40, 30)
    before = normalized_in_the_loader("beit3", 16)
    for seed in range(20):
        torch.manual_seed(seed)
        found = view(image)
        torch.manual_seed(seed)
        assert view.pixels(image).dtype == torch.uint8
        torch.manual_seed(seed)
        local = float(torch.randn(())) > 0
        assert torch.equal(found, before(view.crop(image) if local else image))


def test_hybrid_views_with_another_models_preprocessing() -> None:
    clip: Any = image_transform_v2(PreprocessCfg(size=16), is_train=False)
    view, image = HybridView(16, 0.0, *CROPS, whole=clip), noise(40, 30)
    assert view.pixels(image).dtype == torch.uint8
    assert torch.equal(view(image), clip(image))

    def other(image: Image.Image) -> Tensor:
        return torch.full((3, 16, 16), 0.25)

    whole = HybridView(16, 0.0, *CROPS, whole=other)
    assert whole.normalization is None
    assert torch.equal(whole.pixels(image), other(image))


def augmented_in_the_loader(size: int, settings: Augmentation) -> Callable[[Image.Image], Tensor]:
    """Return UIT's view as one chain: normalized, then erased by torchvision."""
    resize = v2.Resize((size, size), interpolation=v2.InterpolationMode.BICUBIC)
    flip = v2.RandomHorizontalFlip(settings.flip_prob)
    normalize = normalized_in_the_loader("uit", size)
    erasing = v2.RandomErasing(settings.erasing_prob, ERASED_AREA, ERASED_RATIO)
    assert settings.level is not None
    every = list(operations(settings.level).values())

    def view(image: Image.Image) -> Tensor:
        image = flip(resize(image))
        for i in torch.randint(len(every), (2,)).tolist():
            apply, sign = torch.rand(2).tolist()
            if apply < 0.5:
                image = every[i](image, 1.0 if sign < 0.5 else -1.0)
        return erasing(normalize(image))

    return view


def test_uit_views_equal_erasing_in_the_loader_bit_for_bit() -> None:
    image, settings = noise(40, 30), Augmentation()
    view, before = TrainingView(32, settings), augmented_in_the_loader(32, settings)
    rectangles = []
    for seed in range(60):
        torch.manual_seed(seed)
        expected, later_draw = before(image), torch.rand(())
        torch.manual_seed(seed)
        found = view(image)
        assert torch.equal(found, expected)
        assert torch.equal(torch.rand(()), later_draw), "the sample's other draws are the same"
        torch.manual_seed(seed)
        pixels, rectangle = view.draw(image)
        assert pixels.dtype == torch.uint8
        rectangles.append(rectangle)
    assert 0 < rectangles.count(NOTHING) < len(rectangles)


def test_each_image_of_a_batch_has_its_own_rectangle() -> None:
    rectangles = [(0, 0, 0, 0), (1, 2, 3, 2), (0, 0, 6, 6), (5, 5, 1, 1)]
    expected = torch.ones(4, 3, 6, 6)
    for image, (top, left, height, width) in zip(expected, rectangles, strict=True):
        image[:, top : top + height, left : left + width] = 0
    assert torch.equal(erase(torch.ones(4, 3, 6, 6), torch.tensor(rectangles)), expected)


# ---------------------------------------------------------------------------------- training runs


def weights(folder: Path) -> dict[str, Tensor]:
    return model_state(read_checkpoint(folder / FINAL), folder / FINAL)


def same_weights(one: Path, two: Path) -> bool:
    a, b = weights(one), weights(two)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_lhp_trains_to_the_same_bits_as_with_views_normalized_in_the_loader(
    tiny_data: Path, tokenizer_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(name: str, workers: int) -> Path:
        settings = {
            "model": MODEL, "input_size": 64, "data_path": tiny_data, "batch_size": 4, "epochs": 1,
            "sentencepiece_model": tokenizer_file, "warmup_steps": 2, "num_workers": workers,
            "dtype": "fp32", "device": "cpu", "cache_dir": tmp_path / "cache", "lr": 1e-3,
            "output_dir": tmp_path / name,
        }  # fmt: skip
        lhp.train.main(
            [word for key, value in settings.items() for word in (f"--{key}", str(value))]
        )
        return tmp_path / name

    found = train("uint8", 0)
    assert same_weights(found, train("workers", 2))
    monkeypatch.setattr(
        "pab.training.pairs.in_two_parts", lambda view: Preprocessing(view.__call__, None)
    )
    assert same_weights(found, train("float", 0))


def test_uit_trains_to_the_same_bits_as_with_views_normalized_in_the_loader(
    tiny_data: Path, vocabulary: Path, tmp_path: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(Path(__file__).parents[1])  # the default recipe is read from configs/

    def train(name: str, workers: int) -> Path:
        settings = {
            "text_encoder": vocabulary, "data_path": tiny_data, "bs": 6, "epo": 1, "lr": 1e-3,
            "output_dir": tmp_path / name, "cache_dir": tmp_path / "cache", "warmup_steps": 2,
            "schedule": "linear", "mim_block": 8, "dtype": "fp32", "device": "cpu",
            "num_workers": workers, "checkpoint": "",
        }  # fmt: skip
        words = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
        uit.run.main(["--task", "cmp", *SIZES, *TEXT, "--no_synonyms", *words])
        return tmp_path / name

    found = train("uint8", 0)
    assert same_weights(found, train("workers", 2))

    def draw(view: TrainingView, image: Image.Image) -> Any:
        before = augmented_in_the_loader(view.resize.size[0], Augmentation())
        return before(image), NOTHING

    monkeypatch.setattr(TrainingView, "draw", draw)
    assert same_weights(found, train("float", 0))


def test_views_are_finished_on_a_cuda_device_without_a_host_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    view = TrainingView(32, Augmentation())
    with fake_cuda(monkeypatch) as trace:
        finish = finisher(view, CUDA)
        ids = torch.zeros(2, 4, dtype=torch.int64, device="cuda")
        batch = UitBatch(
            torch.empty(2, 3, 32, 32, dtype=torch.uint8, device="cuda"), ids[:, 0], ids, ids, ids,
            ids, ids, ids, longest=4, erased=ids,
        )  # fmt: skip
        finished = finish(batch)
    assert (finished.image.device, finished.image.dtype) == (CUDA, torch.float32)
    assert finished.erased is None
    assert trace.host_reads == 0
