"""Host reads and kernels of a training step on a GPU, counted with fake CUDA tensors.

Autograd's backward pass is not counted: tests set the gradients instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import open_clip
import pytest
import torch
from torch import Tensor, nn

import pab.training.contrastive
from lhp.beit3 import Beit3Retrieval, model_config
from lhp.config import TrainConfig
from lhp.encode import LhpEncoder
from lhp.tokenizer import pad_batch
from lhp.train import pair_vectors
from pab.core.devices import autocast
from pab.encoders.blip2.finetune import pair_vectors as blip2_vectors
from pab.encoders.blip2.model import MODELS, Blip2
from pab.encoders.clip.finetune import bounded
from pab.encoders.clip.model import encode_text, read_class_token_only, use_fused_blocks
from pab.scoring.encoding import Compute
from pab.training.contrastive import pair_backward
from pab.training.loop import Run
from pab.training.optim import Ema, make_adamw, parameter_groups
from pab.training.pair_data import PairBatch
from pab.training.resume import RunIdentity
from pab.training.sampling import EpochBatches
from pab.training.setup import Setup
from tests.fake_cuda import CUDA, Trace, fake_cuda

MODEL = "beit3_debug_patch16_64"
PAIRS, LENGTH = 8, 12
ROWS = [[0, *range(4, 4 + 2 + number % 5), 2] for number in range(PAIRS)]  # ids of unequal length


@pytest.fixture
def trace(monkeypatch: pytest.MonkeyPatch) -> Iterator[Trace]:
    with fake_cuda(monkeypatch) as trace:
        yield trace


def set_gradients(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.empty_like(parameter)


def run_of(model: nn.Module, folder: Path, dtype: torch.dtype, clip_grad: float | None) -> Run:
    """Return a run of the model whose log and progress are discarded."""
    config = TrainConfig(output_dir=str(folder), clip_grad=clip_grad, ema_decay=0.99)
    groups = parameter_groups(
        model.named_parameters(), weight_decay=0.1, no_decay=lambda name, value: value.ndim < 2
    )
    batches = EpochBatches(64, PAIRS, seed=0)
    nothing: Any = None
    setup = Setup(config, "", CUDA, dtype, nothing, batches, RunIdentity({}, {}, {}), None)
    run = Run(
        setup, model=model, optimizer=make_adamw(groups, (0.9, 0.98), 1e-8), batches=batches,
        loader=nothing, rates=[1e-3] * 8, warmup_steps=0, facts={}, scoring="",
    )  # fmt: skip
    silent: Any = SimpleNamespace(log=lambda *_: None, update=lambda **_: None)
    run.log = run.progress = silent
    run._before_step()
    return run


def lhp() -> Beit3Retrieval:
    model: Any = Beit3Retrieval(model_config(MODEL, vocab_size=100)).to(CUDA)
    return model


def batch(side: int = 64) -> PairBatch:
    """Return a batch as the loader yields it, on the CPU."""
    image = torch.empty(PAIRS, 3, side, side)
    return PairBatch(image, *pad_batch(ROWS), torch.arange(PAIRS))


@pytest.mark.parametrize("clip_grad", [None, 1.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_step_reads_once_after_its_backward_pass(
    trace: Trace, tmp_path: Path, dtype: torch.dtype, clip_grad: float | None
) -> None:
    model = lhp()
    run = run_of(model, tmp_path, dtype, clip_grad)
    for _ in range(2):  # the first step creates the optimizer's state
        set_gradients(model)
        before = trace.host_reads
        run.scaler.scale(torch.empty((), device=CUDA))  # part of the backward pass
        run.step({"loss": torch.empty((), device=CUDA), "scale": model.logit_scale.exp()})
        assert trace.reads["item"] == 0
        assert trace.host_reads - before == 1, trace.reads
    assert run.place.step == 2
    assert run.place.skipped == (0, 0)


def test_a_skipped_step_names_its_gradients_with_one_more_read(
    trace: Trace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = lhp()
    run = run_of(model, tmp_path, torch.bfloat16, None)
    run.log.count_skipped = lambda total: None  # type: ignore[method-assign]
    set_gradients(model)
    monkeypatch.setattr("pab.training.optim.math.isfinite", lambda value: False)
    before = trace.host_reads
    run.step({"loss": torch.empty((), device=CUDA)})
    assert run.place.skipped == (1, 1)
    assert trace.host_reads - before == 2, trace.reads


def test_average_and_optimizer_take_few_kernels(trace: Trace) -> None:
    model = lhp()
    ema = Ema(model, 0.9)
    count = len(list(model.parameters()))
    before = trace.launches
    ema.update(model)
    assert trace.launches - before <= 2 < count


def steps_of_pairs(
    trace: Trace, run: Run, vectors: Callable[[PairBatch], Tensor], scale: Callable[[], Tensor],
    chunk: int, side: int, monkeypatch: pytest.MonkeyPatch,
) -> int:  # fmt: skip
    """Count the host reads of a contrastive step, except those of autograd's backward pass."""
    calls = []

    def backward(self: Tensor, gradient: Tensor | None = None) -> None:
        assert self.device == CUDA
        calls.append(1)
        set_gradients(run.model)

    monkeypatch.setattr(Tensor, "backward", backward)
    leaves = Tensor.requires_grad_

    def with_gradient(self: Tensor, wanted: bool = True) -> Tensor:
        leaf = leaves(self, wanted)
        leaf.grad = torch.empty_like(leaf)
        return leaf

    monkeypatch.setattr(Tensor, "requires_grad_", with_gradient)

    def encode(pairs: PairBatch) -> Tensor:
        with autocast(CUDA, torch.bfloat16):
            return vectors(pairs)

    loaded = batch(side)
    before = trace.host_reads
    loss = pair_backward(
        encode, loaded.on(CUDA), scale(), chunk=chunk, share=1, scaler=run.scaler, device=CUDA
    )
    run.step({"loss": loss, "logit_scale": scale().exp()})
    assert len(calls) == (1 + -(-PAIRS // chunk) if chunk else 1)
    return trace.host_reads - before


def clip() -> Any:
    """Return a small CLIP with a causal text tower, as in OpenAI's models."""
    model = open_clip.CLIP(
        embed_dim=32,
        vision_cfg={"image_size": 32, "layers": 1, "width": 64, "patch_size": 16, "head_width": 32},
        text_cfg={"context_length": LENGTH, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1},
    )
    use_fused_blocks(model)
    read_class_token_only(model)
    return model.to(CUDA)


# Model, functions that return the vectors of pairs and the logit scale, and side of the images.
Parts = tuple[Any, Callable[[PairBatch], Tensor], Callable[[], Tensor], int]


def lhp_parts() -> Parts:
    model = lhp()
    return model, partial(pair_vectors, model), partial(getattr, model, "logit_scale"), 64


def blip2_parts() -> Parts:
    model: Any = Blip2(MODELS["mini"]).to(CUDA)
    return model, partial(blip2_vectors, model, pooling="max"), model.logit_scale, 64


def clip_parts() -> Parts:
    model = clip()

    def vectors(pairs: PairBatch) -> Tensor:
        text = encode_text(model, pairs.text_ids)
        return torch.stack([model.encode_image(pairs.image), text], dim=1)

    return model, vectors, partial(bounded, model.logit_scale), 32


@pytest.mark.parametrize("chunk", [0, 2])
@pytest.mark.parametrize("parts", [lhp_parts, blip2_parts, clip_parts])
def test_a_step_reads_once(
    trace: Trace,
    tmp_path: Path,
    parts: Callable[[], Parts],
    chunk: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, vectors, scale, side = parts()
    run = run_of(model, tmp_path, torch.bfloat16, 1.0)
    assert steps_of_pairs(trace, run, vectors, scale, chunk, side, monkeypatch) == 1, trace.reads
    assert pab.training.contrastive.torch_rng_state(CUDA).keys() == {"torch", "cuda"}


class Event:
    """An event of a device that has finished all its work."""

    def record(self) -> None: ...

    def synchronize(self) -> None: ...


def test_encoding_captions_of_lhp_reads_only_the_results(
    trace: Trace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "Event", Event)
    model = lhp()
    tokenizer: Any = SimpleNamespace(encode=lambda caption: ROWS[int(caption)])
    compute = Compute(CUDA, torch.bfloat16, torch.bfloat16, 2, 0)
    encoder = LhpEncoder(compute=compute, model=model, tokenizer=tokenizer)
    batches = []
    true_encode = model.encode_text

    def counted(ids: Tensor, mask: Tensor) -> Tensor:
        before = trace.host_reads
        found = true_encode(ids, mask)
        batches.append(trace.host_reads - before)
        return found

    model.encode_text = counted  # type: ignore[method-assign]
    assert encoder.encode_texts([str(i) for i in range(PAIRS)]).shape == (PAIRS, 64)
    assert set(batches) == {0}
    assert trace.host_reads == 0
    assert trace.copies == len(batches) > 1
