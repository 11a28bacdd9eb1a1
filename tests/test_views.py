"""Local and global views: how often each is drawn, and the region that each shows."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from lhp.views import HybridView, local_threshold
from pab.data.images import recipe

SCALE, RATIO = (0.5, 1.0), (3 / 4, 4 / 3)
DRAWS = 2000


def gradient_image(width: int = 64, height: int = 64) -> Image.Image:
    """Draw red rising to the right and green rising downward, so that colours locate a crop."""
    x = np.broadcast_to(np.linspace(0, 255, width), (height, width))
    y = np.broadcast_to(np.linspace(0, 255, height)[:, None], (height, width))
    return Image.fromarray(np.stack([x, y, np.zeros_like(x)], axis=2).astype(np.uint8))


def view(local_prob: float, size: int = 16) -> HybridView:
    return HybridView(size, local_prob, SCALE, RATIO)


def count_local(local_prob: float, draws: int) -> int:
    """Count the views that are not the whole image."""
    hybrid, image = view(local_prob, 8), gradient_image(32, 32)
    whole = recipe("beit3", 8).transform()(image)
    torch.manual_seed(0)
    return sum(not torch.equal(hybrid(image), whole) for _ in range(draws))


@pytest.mark.parametrize("local_prob", [0.2, 0.5, 0.9])
def test_share_of_local_views(local_prob: float) -> None:
    count = count_local(local_prob, DRAWS)
    # A local crop is almost never the whole image.
    assert abs(count - DRAWS * local_prob) < 4 * math.sqrt(DRAWS * local_prob * (1 - local_prob))


def test_only_global_and_only_local() -> None:
    assert count_local(0.0, DRAWS) == 0
    assert count_local(1.0, DRAWS) > 0.98 * DRAWS


def test_thresholds() -> None:
    assert local_threshold(0.5) == pytest.approx(0.5)
    assert local_threshold(0.0) == math.inf
    assert local_threshold(1.0) == -math.inf
    assert local_threshold(0.1) > local_threshold(0.9)


def test_the_global_view_is_the_whole_image_as_in_scoring() -> None:
    image = gradient_image(90, 40)
    assert torch.equal(view(0.0)(image), recipe("beit3", 16).transform()(image))


def edges(pixels: Tensor, width: int, height: int) -> tuple[float, float, float, float]:
    """Return left, right, top and bottom of a crop (pixels), computed from its colours."""
    red, green = ((pixels[c] + 1) / 2 for c in (0, 1))  # undo mean = std = 0.5
    size = pixels.shape[1]
    across, down = red.mean(dim=0), green.mean(dim=1)
    # Measured between pixels 1 and -2; the edges are 1.5 pixels further out.
    step_x = float(across[-2] - across[1]) / (size - 3)
    step_y = float(down[-2] - down[1]) / (size - 3)
    left, right = float(across[1]) - 1.5 * step_x, float(across[-2]) + 1.5 * step_x
    top, bottom = float(down[1]) - 1.5 * step_y, float(down[-2]) + 1.5 * step_y
    return left * width, right * width, top * height, bottom * height


def test_crops_have_the_published_area_and_shape_and_are_never_mirrored() -> None:
    size = 128
    hybrid, image = view(1.0, 32), gradient_image(size, size)
    torch.manual_seed(1)
    areas, ratios = [], []
    for _ in range(300):
        left, right, top, bottom = edges(hybrid(image), size, size)
        assert right > left, "mirrored"
        assert bottom > top, "upside down"
        assert -3 < left < right < size + 3
        assert -3 < top < bottom < size + 3
        areas.append((right - left) * (bottom - top) / size**2)
        ratios.append((right - left) / (bottom - top))
    assert 0.47 < min(areas) < 0.56
    assert 0.92 < max(areas) < 1.03
    assert 0.72 < min(ratios) < 0.85
    assert 1.18 < max(ratios) < 1.38
    assert np.mean(areas) == pytest.approx(0.72, abs=0.05)


def test_the_same_seed_gives_the_same_view() -> None:
    hybrid, image = view(0.5), gradient_image()
    views = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        views.append(torch.stack([hybrid(image) for _ in range(6)]))
    assert torch.equal(views[0], views[1])
    assert not torch.equal(views[0], views[2])
