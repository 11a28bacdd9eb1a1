"""LHP's training speed and memory: `python benchmarks/lhp_training.py`.

1. Samples per second of one training step (without views) of the large model with activation
   checkpointing at batch 4: bfloat16 as in `lhp.train`, against the same step in eager float32,
   with this network's attention and with explicit attention as in the release.
2. Peak memory of one step at an effective batch of 64, with and without `--grad_cache_chunk`. Each
   runs in its own process, without the optimizer, which is the same in both.
"""

from __future__ import annotations

import argparse
import dataclasses
import subprocess
import sys
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
from machine import describe, product_rate
from released_way import released_way
from torch import Tensor

from lhp.beit3 import Beit3Retrieval, model_config
from lhp.train import pair_vectors
from pab.core.devices import DTYPES, keep_freed_memory, make_scaler, seed_everything
from pab.training.contrastive import pair_backward
from pab.training.optim import clip_and_step, make_adamw, parameter_groups, set_lr
from pab.training.pair_data import PairBatch

CPU = torch.device("cpu")
TEXT_LENGTH = 48


def make_batch(size: int, pixels: int) -> PairBatch:
    """Random images and ids."""
    ids = torch.randint(4, 64000, (size, TEXT_LENGTH))
    images = torch.randn(size, 3, pixels, pixels)
    return PairBatch(images, ids, torch.zeros_like(ids), torch.arange(size))


def make_model(name: str) -> Beit3Retrieval:
    """Model with the recipe's drop path and activation checkpointing."""
    sizes = dataclasses.replace(model_config(name), drop_path=0.16, checkpoint_activations=True)
    return Beit3Retrieval(sizes).train()


def speed(args: argparse.Namespace) -> None:
    """Measure part 1."""
    seed_everything(0)
    model = make_model(args.model)
    layers = model.config.layers
    groups = parameter_groups(
        model.named_parameters(),
        weight_decay=0.05,
        no_decay=model.no_weight_decay,
        layer_of=lambda name: model.layer_of(name, layers),
        n_layers=layers,
        layer_decay=0.85,
    )
    optimizer = make_adamw(groups, (0.9, 0.999), 1e-8)
    set_lr(optimizer, 1e-6)
    batch = make_batch(args.batch_size, model.config.img_size)
    rates = {}
    for way, kind in (("as released", "fp32"), ("fp32", "fp32"), ("bf16", "bf16")):
        scaler = make_scaler(CPU, DTYPES[kind])
        released = released_way()
        if way == "fp32":  # as `lhp.train` starts
            keep_freed_memory(CPU)
        times = []
        with released if way == "as released" else nullcontext():
            for _ in range(args.steps + 1):  # the first step is a warm-up
                start = time.perf_counter()
                loss = step_gradient(model, batch, DTYPES[kind], scaler)
                clip_and_step(optimizer, loss=loss, scaler=scaler)
                optimizer.zero_grad(set_to_none=True)
                times.append(time.perf_counter() - start)
        rates[way] = args.batch_size / min(times[1:])
        ceiling = product_rate(DTYPES[kind]) / 1e9
        print(f"  {way}: {rates[way]:.3f} samples/s (matrix products at {ceiling:.0f} GFLOP/s)")
    for base in ("as released", "fp32"):
        print(f"  bf16 over {base}: {rates['bf16'] / rates[base]:.2f}x")


def step_gradient(
    model: Beit3Retrieval,
    batch: PairBatch,
    dtype: torch.dtype,
    scaler: torch.amp.GradScaler,
    chunk: int = 0,
) -> Tensor:
    """Accumulate one batch's gradient as in `lhp.train`; return the loss."""
    encode = partial(pair_vectors, model, device=CPU, dtype=dtype)
    return pair_backward(
        encode, batch, model.logit_scale, chunk=chunk, share=1, scaler=scaler, device=CPU
    )


def memory_of_step(model_name: str, batch_size: int, chunk: int) -> None:
    """Run one backward pass in its own process; print peak memory in MiB and seconds."""
    seed_everything(0)
    model = make_model(model_name)
    batch = make_batch(batch_size, model.config.img_size)
    before = peak_mib()
    start = time.perf_counter()
    step_gradient(model, batch, torch.bfloat16, make_scaler(CPU, torch.bfloat16), chunk)
    seconds = time.perf_counter() - start
    print(f"{before} {peak_mib()} {seconds:.1f}")


def peak_mib() -> int:
    """Peak resident memory of this process, MiB (`getrusage` would include its parent's)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) // 1024


def memory(args: argparse.Namespace) -> None:
    """Measure part 2."""
    for chunk in (0, args.chunk):
        call = ["--one_step", args.memory_model, str(args.memory_batch), str(chunk)]
        done = subprocess.run(
            [sys.executable, __file__, *call], check=True, capture_output=True, text=True
        )
        before, after, seconds = done.stdout.split()
        what = f"chunks of {chunk}" if chunk else "whole batch"
        print(f"  {what:12s} peak {after} MiB ({before} MiB before the step), {seconds} s")


def main() -> None:
    """Read the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--model", default="beit3_large_patch16_384")
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--memory_model", default="beit3_base_patch16_384")
    parser.add_argument("--memory_batch", type=int, default=64)
    parser.add_argument("--chunk", type=int, default=8)
    parser.add_argument("--one_step", nargs=3, metavar=("MODEL", "BATCH", "CHUNK"))
    args = parser.parse_args()
    if args.one_step:
        memory_of_step(args.one_step[0], int(args.one_step[1]), int(args.one_step[2]))
        return
    print(describe())
    print(f"{args.model}, activation checkpointing, batch {args.batch_size}, {TEXT_LENGTH} ids")
    speed(args)
    print(f"{args.memory_model}, effective batch {args.memory_batch}, bf16")
    memory(args)


if __name__ == "__main__":
    main()
