"""Order of samples: the same however it is cut into processes, and wherever it is taken up."""

from __future__ import annotations

import random
from itertools import chain

import pytest
import torch

from pab.sampling import EpochBatches, sample_seed


def indices(batches: EpochBatches) -> list[list[int]]:
    return [[index for index, _ in batch] for batch in batches]


@pytest.mark.parametrize("world", [1, 2, 4])
def test_processes_share_one_order(world: int) -> None:
    alone = indices(EpochBatches(37, 8, seed=3))
    parts = [indices(EpochBatches(37, 8 // world, 3, rank, world)) for rank in range(world)]
    together = [[*chain(*batch)] for batch in zip(*parts, strict=True)]
    assert together == alone


def test_an_epoch_visits_every_sample_at_most_once() -> None:
    batches = EpochBatches(37, 8, seed=3)
    visited = [*chain(*indices(batches))]
    assert len(batches) == batches.batches_per_epoch == 4
    assert len(visited) == len(set(visited)) == 32
    assert set(visited) <= set(range(37))


def test_each_epoch_has_its_own_order_and_says_so() -> None:
    batches = EpochBatches(40, 8, seed=3)
    first = indices(batches)
    assert indices(batches) == first
    batches.epoch = 1
    assert indices(batches) != first
    assert {epoch for batch in batches for _, epoch in batch} == {1}
    assert indices(EpochBatches(40, 8, seed=4)) != first


@pytest.mark.parametrize("start", [0, 1, 4, 5])
def test_a_run_can_start_inside_an_epoch(start: int) -> None:
    batches = EpochBatches(40, 8, seed=3)
    whole = indices(batches)
    batches.start_batch = start
    assert len(batches) == 5 - start
    assert indices(batches) == whole[start:]


def test_dropped_samples_change_from_epoch_to_epoch() -> None:
    batches = EpochBatches(11, 4, seed=0)
    left_out = set()
    for batches.epoch in range(40):
        left_out |= set(range(11)) - {*chain(*indices(batches))}
    assert left_out == set(range(11))


def test_sample_seed_is_private() -> None:
    torch.manual_seed(9)
    random.seed(9)
    expected = torch.rand(3)
    torch.manual_seed(9)
    with sample_seed(16, 0, 5):
        first = torch.rand(2)
    assert torch.equal(torch.rand(3), expected), "draws outside go on as if nothing had been drawn"
    with sample_seed(16, 0, 5):
        assert torch.equal(torch.rand(2), first)
    others = []
    for key in ((16, 0, 6), (16, 1, 5), (17, 0, 5)):
        with sample_seed(*key):
            others.append(torch.rand(2))
    assert not any(torch.equal(first, other) for other in others)


def test_sample_seed_after_an_error() -> None:
    torch.manual_seed(2)
    expected = torch.rand(1)
    torch.manual_seed(2)
    with pytest.raises(RuntimeError, match="shape"), sample_seed(1):
        torch.rand(5).view(7)
    assert torch.equal(torch.rand(1), expected)


def test_large_indices() -> None:
    with sample_seed(2**31, 3, 1_013_604):
        assert torch.rand(()).item() < 1
    assert len(set(next(iter(EpochBatches(1_013_605, 184, 16))))) == 184
