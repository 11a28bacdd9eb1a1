"""UIT on fake CUDA tensors: training losses and re-ranking stay on the device."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from pab.core.devices import autocast
from pab.data.wordpiece import Tokenizer
from pab.scoring.encoding import Compute
from tests.fake_cuda import CUDA, fake_cuda
from tests.test_step_fake_cuda import run_of
from uit.augment import Augmentation, TrainingView
from uit.data import finisher
from uit.encode import UitEncoder
from uit.model import MODELS, Uit
from uit.objective import LossWeights, UitBatch, draw_any, draw_negatives, uit_losses
from uit.rerank import RESERVED, match_scores

ROOT = Path(__file__).resolve().parents[1]
WEIGHTS = LossWeights(eda=0.8, mlm=1.0, mim=1.0, label_smoothing=0.2)


def model_of(name: str, *, saving: bool = False) -> Uit:
    """Return a model on the fake GPU in training mode, with dropout and drop path."""
    sizes = MODELS[name]
    swin = replace(sizes.swin, drop_path=0.1, checkpoint_activations=saving)
    bert = replace(sizes.bert, dropout=0.1, checkpoint_activations=saving)
    return Uit(replace(sizes, swin=swin, bert=bert)).train().to(CUDA)


def batch_of(model: Uit, pairs: int, longest: int = 40, length: int = 56) -> UitBatch:
    """Return a batch on the CPU."""
    side = model.config.swin.image_size
    return UitBatch(
        image=torch.randn(pairs, 3, side, side),
        identity=torch.arange(pairs),
        text_ids=torch.ones(2 * pairs, length, dtype=torch.int64),
        text_mask=torch.ones(2 * pairs, length, dtype=torch.int64),
        masked_ids=torch.ones(pairs, length, dtype=torch.int64),
        positions=torch.ones(pairs, 10, dtype=torch.int64),
        labels=torch.ones(pairs, 10, dtype=torch.int64),
        hidden_blocks=torch.zeros(4, 4),
        longest=longest,
    )


def test_a_planted_cpu_tensor_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    with fake_cuda(monkeypatch):
        model = model_of("uit_debug")
        batch = batch_of(model, 6)
        for name, part in batch._asdict().items():
            if not isinstance(part, torch.Tensor):
                continue
            planted = batch.to(CUDA)._replace(**{name: part})
            with pytest.raises(RuntimeError, match=r"found two different devices|same device"):
                uit_losses(model, planted, WEIGHTS)


class SameThread:
    """Thread pool that works in the calling thread, because other threads have no fake tensors."""

    def __init__(self, threads: int) -> None:
        del threads

    def __enter__(self) -> SameThread:
        return self

    def __exit__(self, *error: object) -> None:
        """Do nothing, because all work is done."""

    def submit(self, work: Callable[[Any], Any], argument: Any) -> Future[Any]:
        """Do the work at once, and return its result."""
        result: Future[Any] = Future()
        result.set_result(work(argument))
        return result


@pytest.fixture
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr("uit.rerank.ThreadPoolExecutor", SameThread)
    return monkeypatch


@pytest.mark.parametrize(
    ("free", "passes"), [(0, 6), (2**30, 3)], ids=["tokens gathered", "tokens kept"]
)
def test_re_ranking_never_waits_for_a_copy(
    fake_gpu: pytest.MonkeyPatch, free: int, passes: int
) -> None:
    """Each pass makes one copy to the CPU, which does not block."""
    queries, images, k = 120, 60, 10
    tokenizer = Tokenizer(ROOT / "checkpoints/mini/bert", 72, 72)
    rows = [tokenizer.encode("a man in a red coat " * (1 + i // 40)) for i in range(queries)]
    chosen = k * (np.arange(queries)[:, None] // 20) + np.arange(k)  # 20 queries share k images
    # A fake tensor would have no values.
    candidates: Any = SimpleNamespace(numpy=lambda: chosen, shape=chosen.shape)
    fake_gpu.setattr("uit.rerank.IMAGES_A_GROUP", k)
    fake_gpu.setattr("uit.rerank.free_memory", lambda _: RESERVED + free)
    with fake_cuda(fake_gpu) as trace:
        model = model_of("uit_mini").eval()
        tokens = torch.randn(images, 5, model.config.swin.width)
        work = partial(match_scores, model, tokenizer, rows, tokens, candidates, device=CUDA)
        trace.reads.clear()
        found = work(dtype=torch.bfloat16)
        assert found.shape == (queries, k)
        assert trace.host_reads == 0, trace.reads
        assert trace.copies == passes
        model.itm_head.cpu()
        with pytest.raises(RuntimeError, match=r"found two different devices|same device"):
            work(dtype=torch.bfloat16)


def test_texts_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = Tokenizer(ROOT / "checkpoints/mini/bert", 72, 72)
    with fake_cuda(monkeypatch) as trace:
        compute = Compute(CUDA, torch.bfloat16, torch.float32, 4, 0)
        encoder = UitEncoder(compute, model_of("uit_mini").eval(), tokenizer)
        trace.reads.clear()
        assert encoder.encode_texts(["a man in a red coat"] * 10).shape == (10, 128)
        assert trace.host_reads == 1, trace.reads


@pytest.mark.parametrize("saving", [False, True])
@pytest.mark.parametrize("draw", [draw_negatives, draw_any])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_and_gradients_read_nothing(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, draw: Any, saving: bool
) -> None:
    with fake_cuda(monkeypatch) as trace:
        model = model_of("uit_debug", saving=saving)
        batch = batch_of(model, 6).to(CUDA)
        trace.reads.clear()
        with autocast(CUDA, dtype):
            losses = uit_losses(model, batch, WEIGHTS, draw)
        losses["loss"].backward()
        assert {loss.device for loss in losses.values()} == {CUDA}
        assert trace.host_reads == 0, trace.reads
        assert trace.launches > 500


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_step_reads_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, dtype: torch.dtype
) -> None:
    """The step covers pixels, losses, gradients, clipping, update, weight average and log."""
    with fake_cuda(monkeypatch) as trace:
        model = model_of("uit_debug")
        run, batch, side = run_of(model, tmp_path, dtype, 1.0), batch_of(model, 6), 32
        pixels = torch.empty(6, 3, side, side, dtype=torch.uint8)
        batch = batch._replace(image=pixels, erased=torch.zeros(6, 4, dtype=torch.int64))
        finish = finisher(TrainingView(side, Augmentation()), CUDA)
        for _ in range(2):  # the first step creates the optimizer's state
            trace.reset()
            loaded = finish(batch.to(CUDA))
            with autocast(CUDA, dtype):
                losses = uit_losses(model, loaded, WEIGHTS)
            with run.gradients.last_backward():
                run.scaler.scale(losses["loss"]).backward()
            run.step({**losses, "temperature": model.temp})
            assert trace.host_reads == 1, trace.reads
        assert run.place.step == 2
        assert run.place.skipped == (0, 0)
