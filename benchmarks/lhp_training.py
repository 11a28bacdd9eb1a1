"""Measure LHP's training speed and memory: `python benchmarks/lhp_training.py`.

1. Samples per second of one training step (without views) of the large model at batch 4, with
   activation checkpointing: in bfloat16 as in `lhp.train`, and in eager float32. The float32 step
   is measured with this network, and with explicit attention and a complete last block, as in the
   release.
2. Peak memory of one step at an effective batch of 64, with and without `--grad_cache_chunk`. Each
   variant runs in its own process, without the optimizer, whose memory would be equal in both.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from contextlib import nullcontext
from functools import partial

import torch
from machine import describe, flag_parser, in_fresh_process, peak_mib, product_rate
from models import CPU, released_way, samples_per_second
from torch import Tensor

from lhp.beit3 import Beit3Retrieval, model_config
from lhp.train import pair_vectors
from pab.core.devices import DTYPES, autocast, keep_freed_memory, make_scaler, seed_everything
from pab.training.contrastive import pair_backward
from pab.training.pair_data import PairBatch

TEXT_LENGTH = 48


def make_batch(size: int, pixels: int) -> PairBatch:
    """Create random images and ids."""
    ids = torch.randint(4, 64000, (size, TEXT_LENGTH))
    images = torch.randn(size, 3, pixels, pixels)
    return PairBatch(images, ids, torch.zeros_like(ids), torch.arange(size))


def make_model(name: str) -> Beit3Retrieval:
    """Create a model with the recipe's drop path and activation checkpointing."""
    sizes = dataclasses.replace(model_config(name), drop_path=0.16, checkpoint_activations=True)
    return Beit3Retrieval(sizes).train()


def speed(args: argparse.Namespace) -> None:
    """Measure the speed (part 1)."""
    seed_everything(0)
    model = make_model(args.model)
    batch = make_batch(args.batch_size, model.config.img_size)
    rates = {}
    for way, kind in (("as released", "fp32"), ("fp32", "fp32"), ("bf16", "bf16")):
        scaler = make_scaler(CPU, DTYPES[kind])
        if way == "fp32":  # as in `lhp.train`
            keep_freed_memory(CPU)
        step = partial(step_gradient, model, batch, DTYPES[kind], scaler)
        with released_way() if way == "as released" else nullcontext():
            rates[way] = samples_per_second(step, model, args.batch_size, args.steps, scaler)
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

    def encode(pairs: PairBatch) -> Tensor:
        with autocast(CPU, dtype):
            return pair_vectors(model, pairs)

    return pair_backward(
        encode, batch, model.logit_scale, chunk=chunk, share=1, scaler=scaler, device=CPU
    )


def memory_of_step(model_name: str, batch_size: int, chunk: int) -> tuple[float, float, float]:
    """Return peak memory (MiB) before and after one step without update, and the step's seconds."""
    seed_everything(0)
    model = make_model(model_name)
    batch = make_batch(batch_size, model.config.img_size)
    before = peak_mib()
    start = time.perf_counter()
    step_gradient(model, batch, torch.bfloat16, make_scaler(CPU, torch.bfloat16), chunk)
    return before, peak_mib(), time.perf_counter() - start


def memory(args: argparse.Namespace) -> None:
    """Measure the memory (part 2)."""
    for chunk in (0, args.chunk):
        step = (memory_of_step, args.memory_model, args.memory_batch, chunk)
        before, after, seconds = in_fresh_process(*step)
        what = f"chunks of {chunk}" if chunk else "whole batch"
        print(
            f"  {what:12s} peak {after:.0f} MiB ({before:.0f} MiB before the step), {seconds:.1f} s"
        )


def main() -> None:
    args = flag_parser(
        __doc__,
        model="beit3_large_patch16_384",
        batch_size=4,
        steps=2,
        memory_model="beit3_base_patch16_384",
        memory_batch=64,
        chunk=8,
    ).parse_args()
    print(describe())
    print(f"{args.model}, activation checkpointing, batch {args.batch_size}, {TEXT_LENGTH} ids")
    speed(args)
    print(f"{args.memory_model}, effective batch {args.memory_batch}, bf16")
    memory(args)


if __name__ == "__main__":
    main()
