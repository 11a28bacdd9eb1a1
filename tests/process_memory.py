"""Print the counted and the measured memory growth of a training step on a CPU, in bytes.

Start it in a new process on Linux. The variable makes the C library return freed memory to the
system.

    MALLOC_MMAP_THRESHOLD_=65536 python -m tests.process_memory [MODEL] [BATCH]
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor

from lhp.beit3 import Beit3Retrieval, model_config
from lhp.train import pair_vectors
from pab.training.contrastive import symmetric_infonce
from pab.training.optim import make_adamw, parameter_groups
from pab.training.pair_data import PairBatch
from tests.allocations import RecordAllocations


def resident(field: str) -> int:
    """Return a field of ``/proc/self/status``, in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024


def main(name: str = "beit3_mini_patch8_64", batch: int = 64) -> None:
    """Take two steps; print the counted and the measured peak growth of memory in the second."""
    torch.set_num_threads(1)
    with RecordAllocations("cpu") as record:
        model = Beit3Retrieval(model_config(name, vocab_size=1000)).train()
        side = model.config.img_size
        ids = torch.ones(batch, 64, dtype=torch.int64)
        pairs = PairBatch(torch.ones(batch, 3, side, side), ids, ids * 0, torch.arange(batch))
        groups = parameter_groups(
            model.named_parameters(), weight_decay=0.1, no_decay=model.no_weight_decay
        )
        optimizer = make_adamw(groups, (0.9, 0.999), 1e-8)

        def step() -> None:
            vectors: Tensor = pair_vectors(model, pairs)
            symmetric_infonce(vectors[:, 0], vectors[:, 1], model.logit_scale).backward()
            del vectors
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        step()  # loads libraries and creates the optimizer's state
        memory = record.memory
        memory.peak = counted = memory.live
        measured = resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets VmHWM
        step()
        print(memory.peak - counted, resident("VmHWM") - measured)


if __name__ == "__main__":
    main(*sys.argv[1:2], *map(int, sys.argv[2:3]))
