"""Order samples and seed their draws, independently of the number of processes and workers.

The order of an epoch depends only on the seed, the epoch, the number of samples and, if set, their
videos. A global batch is split into one slice per process, so W processes with batch B see the same
samples as one process with batch W x B. Each sample has its own random seed, which does not depend
on the worker that loads it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch.utils.data import Sampler

SampleKey = tuple[int, int]  # (index of the sample, epoch)


class EpochBatches(Sampler[list[SampleKey]]):
    """Sample the batches of one process for one epoch; drop the last incomplete global batch.

    Args:
        n: number of training samples.
        batch_size: samples per batch of one process.
        seed: seed of the order.
        rank: rank of this process.
        world_size: number of processes.
        videos: index of each sample's source video. If set, samples of one video are consecutive,
            so most of them share a batch and become hard negatives of each other.

    Set :attr:`epoch` and :attr:`start_batch` before each pass.
    """

    def __init__(
        self,
        n: int,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        videos: np.ndarray | None = None,
    ) -> None:
        self.n, self.batch_size, self.seed = n, batch_size, seed
        self.rank, self.world_size = rank, world_size
        self.videos = videos
        self.epoch = 0
        self.start_batch = 0

    @property
    def batches_per_epoch(self) -> int:
        """Number of global batches per epoch."""
        return self.n // (self.batch_size * self.world_size)

    def __len__(self) -> int:
        return self.batches_per_epoch - self.start_batch

    def __iter__(self) -> Iterator[list[SampleKey]]:
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.n)
        if self.videos is not None:
            # A video takes the position of its first sample in the random order.
            shuffled = self.videos[order]
            _, first, inverse = np.unique(shuffled, return_index=True, return_inverse=True)
            order = order[np.argsort(first[inverse], kind="stable")]
        global_batch = self.batch_size * self.world_size
        for batch in range(self.start_batch, self.batches_per_epoch):
            start = batch * global_batch + self.rank * self.batch_size
            yield [(int(i), self.epoch) for i in order[start : start + self.batch_size]]


@contextmanager
def sample_seed(*key: int) -> Iterator[None]:
    """Seed torch's global CPU generator from ``key`` in the block; restore it afterwards."""
    with torch.random.fork_rng(devices=[]):
        state = np.random.SeedSequence(list(key)).generate_state(1, np.uint64)
        # torch.manual_seed would also seed GPUs, which fork_rng does not restore here.
        torch.default_generator.manual_seed(int(state[0] >> np.uint64(1)))
        yield
