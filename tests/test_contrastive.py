"""InfoNCE compared with a direct sum, and its cached gradient with the ordinary one."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lhp.beit3 import Beit3Retrieval
from pab.training.contrastive import cached_backward, gathered_infonce, symmetric_infonce

CPU = torch.device("cpu")


def unit(rows: int, width: int, seed: int) -> Tensor:
    made = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(made, dim=1)


@pytest.mark.parametrize("rows", [1, 2, 7])
def test_loss_against_a_plain_sum(rows: int) -> None:
    image, text, scale = unit(rows, 5, 0), unit(rows, 5, 1), math.log(1 / 0.07)
    total = 0.0
    for i in range(rows):
        own = math.exp(scale) * float(image[i] @ text[i])
        for logits in ([image[i] @ t for t in text], [v @ text[i] for v in image]):
            total += math.log(sum(math.exp(math.exp(scale) * float(x)) for x in logits)) - own
    loss = symmetric_infonce(image, text, torch.tensor(scale))
    assert float(loss) == pytest.approx(total / (2 * rows), abs=1e-5)


def test_one_process_gathers_its_own_rows() -> None:
    image, text, scale = unit(4, 6, 0), unit(4, 6, 1), torch.tensor(2.0)
    assert torch.equal(gathered_infonce(image, text, scale), symmetric_infonce(image, text, scale))


def test_matching_pairs_have_a_lower_loss() -> None:
    image, scale = unit(6, 16, 0), torch.tensor(math.log(1 / 0.07))
    matched = symmetric_infonce(image, image, scale)
    assert matched < symmetric_infonce(image, image.roll(1, 0), scale)
    assert float(matched) < 0.1


def model_and_batch(
    make: Callable[..., Beit3Retrieval], drop_path: float
) -> tuple[Beit3Retrieval, Tensor, Tensor]:
    model = make().train()
    for block in model.beit3.encoder.layers:
        block.drop_path.p = drop_path
    generator = torch.Generator().manual_seed(4)
    images = torch.randn(7, 3, 64, 64, generator=generator)
    return model, images, torch.randint(4, 70, (7, 6), generator=generator)


def whole_and_chunked(
    make: Callable[..., Beit3Retrieval], drop_path: float, chunk: int, device: torch.device
) -> tuple[list[float], list[list[Tensor]]]:
    """Return losses and gradients of 7 pairs: first ordinary, then with the cached gradient."""
    losses, gradients = [], []
    for cached in (False, True):
        model, images, ids = model_and_batch(make, drop_path)
        model, images, ids = model.to(device), images.to(device), ids.to(device)

        def encode(
            rows: slice, model: Beit3Retrieval = model, images: Tensor = images, ids: Tensor = ids
        ) -> Tensor:
            text = model.encode_text(ids[rows], torch.zeros_like(ids[rows]))
            return torch.stack([model.encode_image(images[rows]), text], dim=1)

        def loss_of(parts: list[Tensor], model: Beit3Retrieval = model) -> Tensor:
            return gathered_infonce(*torch.cat(parts).unbind(dim=1), model.logit_scale)

        # Both variants encode chunk by chunk, so that drop path draws the same numbers.
        chunks = [lambda i=i: encode(slice(i, i + chunk)) for i in range(0, 7, chunk)]  # type: ignore[misc]
        torch.manual_seed(11)
        if cached:
            loss = cached_backward(chunks, loss_of, device=device)
        else:
            loss = loss_of([make() for make in chunks])
            loss.backward()
        losses.append(float(loss.detach()))
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    return losses, gradients


@pytest.mark.parametrize("chunk", [1, 3, 6])
@pytest.mark.parametrize("drop_path", [0.0, 0.5])
def test_the_cached_gradient_is_that_of_the_whole_batch(
    debug_model: Callable[..., Beit3Retrieval], chunk: int, drop_path: float
) -> None:
    losses, gradients = whole_and_chunked(debug_model, drop_path, chunk, CPU)
    assert losses[0] == losses[1]
    assert len(gradients[0]) == len(gradients[1]) > 50
    for plain, own in zip(*gradients, strict=True):
        torch.testing.assert_close(own, plain, atol=1e-6, rtol=1e-4)


def test_the_replay_does_not_change_later_random_numbers(
    debug_model: Callable[..., Beit3Retrieval],
) -> None:
    after = []
    for cached in (False, True):
        model, images, _ = model_and_batch(debug_model, 0.5)
        chunks = [
            lambda m=model, i=i, x=images: m.encode_image(x[i : i + 2]) for i in range(0, 6, 2)
        ]  # type: ignore[misc]
        torch.manual_seed(3)
        if cached:
            cached_backward(chunks, lambda parts: torch.cat(parts).sum(), device=CPU)
        else:
            torch.cat([make() for make in chunks]).sum().backward()
        after.append(torch.rand(4))
    assert torch.equal(after[0], after[1])


def test_scale_reaches_the_gradient_but_not_the_loss() -> None:
    @dataclasses.dataclass
    class Weight:
        value: Tensor

    results = []
    for factor in (1.0, 8.0):
        weight = Weight(torch.ones(3, requires_grad=True))
        chunks = [lambda i=i, w=weight: (w.value * (i + 1))[None] for i in range(2)]  # type: ignore[misc]
        loss = cached_backward(
            chunks,
            lambda parts: torch.cat(parts).square().sum(),
            device=CPU,
            scale=lambda loss, factor=factor: loss * factor,  # type: ignore[misc]
        )
        assert weight.value.grad is not None
        results.append((float(loss), weight.value.grad))
    assert results[0][0] == results[1][0] == 15.0
    torch.testing.assert_close(results[1][1], 8 * results[0][1])
    torch.testing.assert_close(results[0][1], torch.full((3,), 10.0))
