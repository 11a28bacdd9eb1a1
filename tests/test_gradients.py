"""Gradients averaged in buckets during the backward pass equal those of one process."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lhp.beit3 import Beit3Retrieval, model_config
from lhp.tokenizer import pad_batch
from lhp.train import pair_vectors
from pab.core import gradients, processes
from pab.core.gradients import GradientAverage
from pab.training.contrastive import gathered_infonce, pair_backward
from pab.training.optim import clip_and_step
from pab.training.pair_data import PairBatch
from tests.test_processes import averaged, run_in

CPU = torch.device("cpu")
PAIRS, BATCHES = 8, 2


class Pairs(nn.Module):
    """Two small towers, a logit scale, and parameters that only one process or none uses."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.scale = nn.Parameter(torch.tensor(2.5))
        self.image = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 6))
        self.text = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6))
        self.unused = nn.Parameter(torch.ones(3))
        self.sometimes = nn.Parameter(torch.ones(6))

    def forward(self, pairs: PairBatch) -> Tensor:
        """Encode B pairs to unit vectors [B, 2, D]."""
        both = torch.stack([self.image(pairs.image), self.text(pairs.text_ids.float())], dim=1)
        if pairs.text_mask.any():
            both = both + pairs.text_mask[..., None] * self.sometimes
        return nn.functional.normalize(both, dim=-1)


def batches(only_in: int | None) -> list[PairBatch]:
    """Return this process's rows of each batch; rows of process ``only_in`` use ``sometimes``."""
    generator = torch.Generator().manual_seed(7)
    count = PAIRS // processes.world_size()
    own = slice(processes.rank() * count, (processes.rank() + 1) * count)
    made = []
    for _ in range(BATCHES):
        image = torch.randn(PAIRS, 5, generator=generator)
        text = torch.randn(PAIRS, 4, generator=generator)
        used = torch.zeros(PAIRS, 1)
        if only_in is not None:
            rows = PAIRS // 2
            used[only_in * rows : (only_in + 1) * rows] = 1
        identity = torch.arange(PAIRS)
        made.append(PairBatch(image[own], text[own], used[own], identity[own]))
    return made


def gradients_of(
    *, chunk: int = 0, update_freq: int = 1, only_in: int | None = None,
    scale: float = 1.0,
) -> dict[str, Any]:  # fmt: skip
    """Return the gradients of one update, and numbers of buckets.

    ``during`` counts the buckets exchanged in the backward pass; ``buckets`` counts all of them.
    """
    gradients.BUCKET_ELEMENTS = 40  # so that this small model needs several buckets
    model = Pairs()
    average = GradientAverage(model.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, enabled=scale != 1.0)
    during = 0
    for number, batch in enumerate(batches(only_in)[:update_freq], 1):
        last = number == update_freq
        pair_backward(
            model, batch, model.scale, chunk=chunk, share=update_freq, scaler=scaler, device=CPU,
            last_backward=average.last_backward if last else nullcontext,
        )  # fmt: skip
        if not last:
            assert not average._started, "only the last backward pass may exchange"
        during = len(average._started)
    found = averaged(model, average)
    if scale != 1.0:
        found = {name: None if g is None else g / scale for name, g in found.items()}
    return {"during": during, "buckets": len(average._buckets), **found}


CASES: dict[str, dict[str, Any]] = {
    "whole": {},
    "accumulated": {"update_freq": 2},
    "chunks": {"chunk": 2},
    "scaled": {"scale": 1024.0},
    "only in process 0": {"only_in": 0},
    "only in process 1": {"only_in": 1},
    "only in process 0, chunks": {"only_in": 0, "chunk": 2},
}


def all_cases(folder: Path) -> dict[str, Any]:
    return {case: gradients_of(**options) for case, options in CASES.items()}


@pytest.mark.distributed
def test_gradients_equal_those_of_one_process(tmp_path: Path) -> None:
    first, second = run_in(2, all_cases, tmp_path)
    for case, options in CASES.items():
        alone = gradients_of(**options)
        uses_all = "only_in" in options
        for result in (first[case], second[case]):
            assert result["buckets"] > 3
            assert result["unused"] is None
            assert (result["sometimes"] is None) == (not uses_all)
            for name, wanted in alone.items():
                if isinstance(wanted, Tensor):
                    # The tolerance is relative, because rounding differs between types of CPU.
                    torch.testing.assert_close(
                        result[name], wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()),
                        msg=lambda text, case=case, name=name: f"{case}, {name}: {text}",
                    )  # fmt: skip
        for name in alone:
            if name != "during":
                torch.testing.assert_close(first[case][name], second[case][name], rtol=0, atol=0)
        user = options.get("only_in", 0)
        assert (first, second)[user][case]["during"] > 0, "no exchange during the backward pass"
        assert abs(float(alone["scale"])) > 1e-3, "gradients near zero would always agree"


def started_order(folder: Path) -> dict[str, Any]:
    """Return the sizes of all exchanges of a step, and the number in the backward pass.

    In process 0, the loss uses one more parameter, so the first bucket is complete there before the
    backward passes of the gathers.
    """
    gradients.BUCKET_ELEMENTS = 6
    model = Pairs()
    model.add_module("last", nn.Linear(7, 1, bias=False))  # the first bucket
    average = GradientAverage(model.parameters())
    sizes: list[int] = []
    true_reduce: Callable[..., Any] = dist.all_reduce

    def recorded(tensor: Tensor, *args: Any, **options: Any) -> Any:
        sizes.append(tensor.numel())
        return true_reduce(tensor, *args, **options)

    dist.all_reduce = recorded  # type: ignore[assignment]
    vectors = model(batches(None)[0])
    loss = gathered_infonce(vectors[:, 0], vectors[:, 1], model.scale)
    if processes.rank() == 0:
        loss = loss + model.get_parameter("last.weight").sum()
    with average.last_backward():
        loss.backward()
    started = len(average._started)
    average.finish(torch.zeros(1))
    dist.all_reduce = true_reduce
    return {"sizes": sizes, "during": started}


def skipped_and_done(folder: Path) -> dict[str, Any]:
    """Take a step that overflows in process 1, then a finite one; ``unused`` must not decay."""
    model = Pairs()
    names, parameters = zip(*model.named_parameters(), strict=True)
    groups = [{"params": list(parameters), "names": list(names)}]
    optimizer = torch.optim.AdamW(groups, lr=0.1, weight_decay=0.5)
    average = GradientAverage(model.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    problems = []
    for bad in (True, False):
        optimizer.zero_grad()
        scaler.scale((model(batches(None)[0]) ** 3).sum()).backward()
        if bad and processes.rank() == 1:
            weight = model.image[0].weight
            assert weight.grad is not None
            weight.grad[0, 0] = torch.inf
        outcome = clip_and_step(
            optimizer, figures=average.finish(torch.tensor([1.0, 5.0 + processes.rank()])),
            scaler=scaler, gradients=average,
        )  # fmt: skip
        problems.append(outcome.problem)
        assert outcome.figures == [1.0, 5.5]
    return {"problems": problems, "loss scale": scaler.get_scale(), **model.state_dict()}


def two_backward_passes(folder: Path) -> dict[str, Any]:
    """Run two backward passes in the block of the last one; return the error."""
    model = nn.Linear(2, 1)
    average = GradientAverage(model.parameters())
    try:
        with average.last_backward():
            for _ in range(2):
                model(torch.ones(1, 2)).sum().backward()
    except RuntimeError as error:
        return {"error": str(error)}
    finally:
        average.finish(torch.zeros(1))
    return {"error": ""}


def exchanged_early_by_lhp(folder: Path) -> dict[str, Any]:
    """Count LHP's buckets: exchanged in the backward pass, before the mask token's, and all.

    The mask token has no gradient, so its bucket and later ones are not exchanged in that pass.
    """
    gradients.BUCKET_ELEMENTS = 5_000
    torch.manual_seed(0)
    model = Beit3Retrieval(model_config("beit3_debug_patch16_64", vocab_size=100))
    average = GradientAverage(model.parameters())
    mask_token = average._bucket_of[id(model.get_parameter("beit3.vision_embed.mask_token"))]
    found = {}
    for chunk in (0, 1):
        ids, mask = pad_batch([[0, 5, 2], [0, 6, 7, 2]])
        pairs = PairBatch(torch.randn(2, 3, 64, 64), ids, mask, torch.arange(2))
        pair_backward(
            partial(pair_vectors, model), pairs, model.logit_scale, chunk=chunk, share=1,
            scaler=torch.amp.GradScaler("cpu", enabled=False), device=CPU,
            last_backward=average.last_backward,
        )  # fmt: skip
        found[chunk] = len(average._started)
        average.finish(torch.zeros(1))
    return {"early": found, "expected": mask_token, "all": len(average._buckets)}


def others(folder: Path) -> list[dict[str, Any]]:
    checks = (skipped_and_done, two_backward_passes, started_order, exchanged_early_by_lhp)
    return [check(folder) for check in checks]


@pytest.mark.distributed
def test_all_processes_exchange_and_skip_alike(tmp_path: Path) -> None:
    results = run_in(2, others, tmp_path)
    (first, twice, order, lhp), (second, _, other_order, _) = results
    assert first["problems"] == second["problems"]
    assert "image.0.weight (inf)" in first["problems"][0]
    assert first["problems"][1] == ""
    assert first["loss scale"] == second["loss scale"] == 2.0
    assert torch.equal(first["unused"], torch.ones(3)), "no gradient, so no weight decay"
    fresh = Pairs().state_dict()
    assert not torch.equal(first["image.0.weight"], fresh["image.0.weight"])
    for name in fresh:
        assert torch.equal(first[name], second[name])
    assert "two backward passes" in twice["error"]
    assert order["sizes"] == other_order["sizes"]
    assert len(order["sizes"]) > 5
    assert order["during"] > 0
    assert lhp["early"] == {0: lhp["expected"], 1: lhp["expected"]}
    assert lhp["expected"] > 0.8 * lhp["all"] > 10


def test_one_process_exchanges_nothing() -> None:
    model = Pairs()
    average = GradientAverage(model.parameters())
    figures = torch.tensor([1.0, 2.0])
    assert average.finish(figures) is figures
    assert average.without_fractions(figures.tolist()) == [1.0, 2.0]
    assert not any(parameter._post_accumulate_grad_hooks for parameter in model.parameters())
