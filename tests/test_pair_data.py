"""Training samples: independent of the workers, and errors that name a bad sample."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from lhp.tokenizer import PAD, Tokenizer, pad_batch
from lhp.views import HybridView
from pab.core.errors import InputError
from pab.data.images import recipe
from pab.data.training_set import TrainingSet
from pab.training.data import checked
from pab.training.pair_data import PairBatch, PairCollate, PairDataset
from pab.training.sampling import EpochBatches

PAIRS = 24
collate = PairCollate(pad_batch)


def dataset(root: Path, tokenizer: Tokenizer, seed: int = 16, local_prob: float = 0.5) -> Any:
    view = HybridView(64, local_prob, (0.5, 1.0), (3 / 4, 4 / 3))
    pairs = TrainingSet.open(root)
    return PairDataset(pairs, np.arange(len(pairs)), view, tokenizer.encode, seed)


def batches_of(data: PairDataset, workers: int, *, epoch: int = 0) -> list[PairBatch]:
    order = EpochBatches(len(data), 5, seed=1)
    order.epoch = epoch
    loader: Any = DataLoader(
        data,  # type: ignore[arg-type]
        batch_sampler=order,  # type: ignore[arg-type]
        collate_fn=collate,
        num_workers=workers,
    )
    return list(checked(loader))


def test_samples_do_not_depend_on_the_workers(tiny_data: Path, tokenizer: Tokenizer) -> None:
    data = dataset(tiny_data, tokenizer)
    torch.manual_seed(0)
    alone = batches_of(data, 0)
    torch.manual_seed(99)
    with_workers = batches_of(data, 2)
    assert len(alone) == len(with_workers) == PAIRS // 5
    for one, two in zip(alone, with_workers, strict=True):
        for a, b in zip(one, two, strict=True):
            assert torch.equal(a, b)


def test_views_change_with_epoch_and_seed(tiny_data: Path, tokenizer: Tokenizer) -> None:
    data = dataset(tiny_data, tokenizer)
    for index in range(3):
        assert torch.equal(data[index, 0][0], data[index, 0][0])
    first = torch.stack([data[index, 0][0] for index in range(PAIRS)])
    for other, epoch in ((data, 1), (dataset(tiny_data, tokenizer, seed=17), 0)):
        again = torch.stack([other[index, epoch][0] for index in range(PAIRS)])
        assert not torch.equal(first, again)


def test_a_sample_is_the_pairs_own_image_and_caption(tiny_data: Path, tokenizer: Tokenizer) -> None:
    data = dataset(tiny_data, tokenizer, local_prob=0.0)
    transform = recipe("beit3", 64).transform()
    from PIL import Image

    for index, pair in enumerate(data.pairs):
        pixels, ids, identity = data[index, 0]
        assert torch.equal(pixels, transform(Image.open(tiny_data / pair.image).convert("RGB")))
        assert ids == tokenizer.encode(pair.caption)
        assert identity == index, "every pair of PAB has its own identity"


def test_indices_choose_the_pairs(tiny_data: Path, tokenizer: Tokenizer) -> None:
    data = dataset(tiny_data, tokenizer)
    part = PairDataset(data.pairs, np.array([7, 3]), data.view, tokenizer.encode, 16)
    assert len(part) == 2
    assert torch.equal(part[1, 0][0], data[3, 0][0]), (
        "a view depends on the pair, not on its position"
    )


def test_collate_pads_to_the_longest() -> None:
    image = torch.zeros(3, 8, 8)
    batch = collate([(image, [0, 5, 2], 4), (image + 1, [0, 2], 9)])
    assert isinstance(batch, PairBatch)
    assert batch.image.shape == (2, 3, 8, 8)
    assert batch.text_ids.tolist() == [[0, 5, 2], [0, 2, PAD]]
    assert batch.text_mask.tolist() == [[0, 0, 0], [0, 0, 1]]
    assert batch.identity.tolist() == [4, 9]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_image_is_named_even_in_a_worker(
    data_copy: Path, tokenizer: Tokenizer, workers: int
) -> None:
    image = data_copy / "train/imgs_0/goal/2.jpg"
    image.write_bytes(image.read_bytes()[:300])
    with pytest.raises(InputError, match=r"goal/2\.jpg: expected an image") as error:
        batches_of(dataset(data_copy, tokenizer), workers)
    assert "\n" not in str(error.value)


def test_a_missing_image_is_named(data_copy: Path, tokenizer: Tokenizer) -> None:
    (data_copy / "train/imgs_1/wentwrong/3.jpg").unlink()
    with pytest.raises(InputError, match=r"wentwrong/3\.jpg.*no such file"):
        batches_of(dataset(data_copy, tokenizer), 0)


def test_errors_of_bad_samples_survive_pickling() -> None:
    bad = InputError("a.jpg", "expected an image", item="line 3", todo="replace it")
    received = pickle.loads(pickle.dumps(bad))  # noqa: S301 - our own bytes
    assert type(received) is InputError
    assert vars(received) == vars(bad)
    assert collate([(torch.zeros(3, 8, 8), [0, 2], 0), received]) is received
    with pytest.raises(InputError, match=r"a\.jpg, line 3: expected an image; replace it"):
        next(checked([received]))
