"""UIT trained by several processes: ITC, MLM and MIM losses equal those of one process.

ITM is left out of the gradient: each process draws its own negatives, as in the published code.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pab.core import processes
from pab.core.gradients import GradientAverage
from tests.test_processes import run_in
from uit.masking import NO_LABEL
from uit.model import MODELS, Uit
from uit.objective import LossWeights, UitBatch, uit_losses

PAIRS, STEPS, LENGTH, WORDS = 8, 3, 12, 50
NAMES = ("itc", "mlm", "mim")


def model_of(sync_batch_norm: bool) -> Uit:
    """Return the debug model without dropout and drop path."""
    sizes = MODELS["uit_debug"]
    torch.manual_seed(0)
    return Uit(
        replace(
            sizes,
            swin=replace(sizes.swin, drop_path=0.0),
            bert=replace(sizes.bert, vocab_size=WORDS, dropout=0.0),
            proj_dropout=0.0,
            sync_batch_norm=sync_batch_norm,
        )
    )


def batch(step: int) -> UitBatch:
    """Return eight pairs, the first with more hidden pieces.

    The mean of the processes' means therefore differs from the mean over all pieces.
    """
    generator = torch.Generator().manual_seed(step)
    size = MODELS["uit_debug"].swin.image_size
    labels = torch.full((PAIRS, 4), NO_LABEL)
    for row in range(PAIRS):
        count = max(0, 4 - row)
        labels[row, :count] = torch.randint(WORDS, (count,), generator=generator)
    return UitBatch(
        image=torch.randn(PAIRS, 3, size, size, generator=generator),
        identity=torch.tensor([0, 1, 2, 3, 4, 0, 5, 6]),
        text_ids=torch.randint(1, WORDS, (2 * PAIRS, LENGTH), generator=generator),
        text_mask=torch.ones(2 * PAIRS, LENGTH, dtype=torch.int64),
        masked_ids=torch.randint(1, WORDS, (PAIRS, LENGTH), generator=generator),
        positions=torch.arange(1, 5).expand(PAIRS, -1).contiguous(),
        labels=labels,
        hidden_blocks=torch.eye(4),
        longest=LENGTH,
    )


def own_share(whole: UitBatch) -> UitBatch:
    """Return the rows of this process."""
    count = PAIRS // processes.world_size()
    rows = torch.arange(processes.rank() * count, (processes.rank() + 1) * count)
    both = torch.cat([rows, PAIRS + rows])
    parts = {
        name: getattr(whole, name)[both if name.startswith("text_") else rows]
        for name in UitBatch._fields
        if name not in ("hidden_blocks", "longest", "erased")
    }
    # Each process draws different blocks, but all must hide those of rank 0.
    blocks = whole.hidden_blocks.roll(processes.rank(), dims=0)
    return whole._replace(**parts, hidden_blocks=blocks)


def curve(folder: Path, sync_batch_norm: bool = True) -> dict[str, Tensor]:
    """Train; return each loss at every step, and the final weights."""
    model = model_of(sync_batch_norm).train()
    # A small eps would turn rounding errors of gradients into steps.
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-2)
    average = GradientAverage(model.parameters())
    seen: dict[str, list[Tensor]] = {name: [] for name in NAMES}
    for step in range(STEPS):
        losses = uit_losses(model, own_share(batch(step)), LossWeights(0.8, 1.0, 1.0, 0.1))
        optimizer.zero_grad()
        with average.last_backward():
            (losses["loss"] - losses["itm"]).backward()
        average.without_fractions(average.finish(torch.zeros(0)).tolist())
        optimizer.step()
        for name in NAMES:
            seen[name].append(processes.reduce_mean(losses[name]))
    return {name: torch.stack(values) for name, values in seen.items()} | model.state_dict()


@pytest.mark.distributed
@pytest.mark.parametrize("world", [2, 4])
def test_itc_mlm_and_mim_do_not_depend_on_the_number_of_processes(
    tmp_path: Path, world: int
) -> None:
    alone = curve(tmp_path)
    fresh = model_of(sync_batch_norm=True).state_dict()
    moved = [name for name in fresh if not torch.allclose(fresh[name], alone[name], atol=1e-3)]
    assert len(moved) > len(fresh) / 2, "unchanged weights would be equal anyway"
    for shared in run_in(world, curve, tmp_path):
        assert shared.keys() == alone.keys()
        for name, wanted in alone.items():
            torch.testing.assert_close(
                shared[name], wanted, rtol=1e-4, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}"
            )


@pytest.mark.distributed
def test_without_synchronized_statistics_itc_differs(tmp_path: Path) -> None:
    own = partial(curve, sync_batch_norm=False)
    alone, shared = own(tmp_path), run_in(2, own, tmp_path)[0]
    torch.testing.assert_close(shared["mlm"][0], alone["mlm"][0], rtol=1e-4, atol=1e-5)
    assert abs(float(shared["itc"][0] - alone["itc"][0])) > 1e-3, "the test above would be trivial"
