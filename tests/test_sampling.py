"""Order of samples: independent of the number of processes and of where a run resumes."""

from __future__ import annotations

import random
from itertools import chain, groupby

import numpy as np
import pytest
import torch

from pab.training.sampling import EpochBatches, sample_seed


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


def test_each_epoch_has_its_own_order_and_passes_its_number() -> None:
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


# Source video of each sample: pairs far apart, adjacent pairs, two triples and two single samples.
VIDEOS = np.array([0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5, 6, 6, 6, 7, 8, 8, 9, 9, 10, 10, 10, 11])


def test_samples_of_a_video_follow_one_another() -> None:
    for seed in range(20):
        order = [*chain(*indices(EpochBatches(len(VIDEOS), 1, seed, videos=VIDEOS)))]
        assert sorted(order) == list(range(len(VIDEOS))), "every sample once"
        seen = [video for video, _ in groupby(VIDEOS[order])]
        assert len(seen) == len(set(seen)), "the samples of a video are adjacent"


def test_without_videos_twins_are_apart() -> None:
    order = [*chain(*indices(EpochBatches(len(VIDEOS), 1, seed=0)))]
    assert len([*groupby(VIDEOS[order])]) > len(set(VIDEOS)), "twins would be adjacent anyway"


def test_videos_and_samples_in_them_are_shuffled_each_epoch() -> None:
    batches = EpochBatches(len(VIDEOS), 4, seed=3, videos=VIDEOS)
    of_videos, of_twins = set(), set()
    for batches.epoch in range(8):
        order = [*chain(*indices(batches))]
        assert [*chain(*indices(batches))] == order, "an epoch's order is always the same"
        of_videos.add(tuple(video for video, _ in groupby(VIDEOS[order])))
        of_twins.add(order.index(0) < order.index(6))
    assert len(of_videos) == 8
    assert of_twins == {True, False}, "either twin may come first"


@pytest.mark.parametrize("world", [2, 4])
def test_processes_share_one_order_of_videos(world: int) -> None:
    def make(size: int, rank: int = 0, world: int = 1) -> list[list[int]]:
        return indices(EpochBatches(len(VIDEOS), size, 3, rank, world, VIDEOS))

    parts = [make(8 // world, rank, world) for rank in range(world)]
    assert [[*chain(*batch)] for batch in zip(*parts, strict=True)] == make(8)


def test_a_run_can_start_inside_an_epoch_of_videos() -> None:
    batches = EpochBatches(len(VIDEOS), 4, seed=3, videos=VIDEOS)
    whole = indices(batches)
    batches.start_batch = 2
    assert indices(batches) == whole[2:]


def test_sample_seed_restores_the_outer_generator() -> None:
    torch.manual_seed(9)
    random.seed(9)
    expected = torch.rand(3)
    torch.manual_seed(9)
    with sample_seed(16, 0, 5):
        first = torch.rand(2)
    assert torch.equal(torch.rand(3), expected), "the outer generator is restored"
    with sample_seed(16, 0, 5):
        assert torch.equal(torch.rand(2), first)
    others = []
    for key in ((16, 0, 6), (16, 1, 5), (17, 0, 5)):
        with sample_seed(*key):
            others.append(torch.rand(2))
    assert not any(torch.equal(first, other) for other in others)


def test_sample_seed_leaves_gpus_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def seeded(_: int) -> None:
        raise AssertionError("a GPU's generator was seeded and would not be restored")

    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded)
    with pytest.raises(AssertionError, match="a GPU's generator"):
        torch.manual_seed(1)
    with sample_seed(16, 0, 5):
        torch.rand(1)


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
