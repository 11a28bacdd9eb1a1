"""MaxSim in blocks, compared with sentence-transformers and with values computed by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from pab.encoders.st import maxsim as module
from pab.encoders.st.extra import sentence_transformers
from pab.encoders.st.maxsim import blocks_of, maxsim, pad_caption, pad_image

WIDTH = 8
CPU = torch.device("cpu")


def ragged(seed: int, count: int, most: int) -> list[Tensor]:
    random = np.random.default_rng(seed)
    sizes = random.integers(1, most + 1, count)
    found = [torch.from_numpy(random.standard_normal((n, WIDTH), np.float32)) for n in sizes]
    return [one / one.norm(dim=1, keepdim=True) for one in found]


def padded(texts: list[Tensor], images: list[Tensor]) -> tuple[Tensor, Tensor]:
    longest, most = max(map(len, texts)), max(map(len, images))
    rows = torch.stack([pad_caption(one, longest) for one in texts])
    return rows, torch.stack([pad_image(one, most) for one in images])


@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize(("image_vectors", "caption_vectors"), [(1, 1), (50, 20), (1024, 1024)])
def test_maxsim_equals_the_library_for_any_block(
    monkeypatch: pytest.MonkeyPatch, mean: bool, image_vectors: int, caption_vectors: int
) -> None:
    similarity = sentence_transformers("util.similarity")
    monkeypatch.setattr(module, "IMAGE_VECTORS", image_vectors)
    monkeypatch.setattr(module, "CAPTION_VECTORS", caption_vectors)
    texts, images = ragged(0, 9, 12), ragged(1, 23, 31)
    images = [one.half() for one in images]
    found = maxsim(*padded(texts, images), WIDTH, mean=mean)
    function = similarity.mean_maxsim if mean else similarity.maxsim
    expected = function(texts, [one.float() for one in images])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_negative_products_and_captions_of_one_vector() -> None:
    image = torch.tensor([[-1.0, 0.0], [-0.6, -0.8]])
    text = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    rows = torch.stack([pad_caption(text, 4), pad_caption(text[:1], 4)])
    columns = torch.stack([pad_image(image, 5), pad_image(image[:1], 5)])
    found = maxsim(rows, columns, 2)
    torch.testing.assert_close(found, torch.tensor([[-0.6 + 0.0, -1.0], [-0.6, -1.0]]))


def test_blocks_can_be_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "IMAGE_VECTORS", 64)
    texts, images = padded(ragged(2, 5, 7), ragged(3, 17, 9))
    blocks = blocks_of(images, WIDTH, CPU)
    assert [place for block in blocks for place in block] == list(range(17))
    assert len(blocks) > 2
    every = maxsim(texts, images, WIDTH)
    part = maxsim(texts, images, WIDTH, blocks=blocks[1::2])
    places = [place for block in blocks[1::2] for place in block]
    assert torch.equal(part, every[:, places])
