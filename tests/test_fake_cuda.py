"""Scoring and training on fake CUDA tensors: devices, host reads, kernels, memory traffic.

`tests/test_uit_fake_cuda.py` tests UIT's losses and re-ranking. `tests/test_step_fake_cuda.py`
counts the host reads of a whole training step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DynamicOutputShapeException

from lhp.beit3 import Beit3Retrieval, model_config
from lhp.encode import LhpEncoder
from lhp.tokenizer import Tokenizer as SentencePiece
from pab.core.devices import dtype_of, make_scaler
from pab.data.images import recipe
from pab.data.wordpiece import Tokenizer
from pab.encoders.blip2.encoder import Blip2Encoder
from pab.encoders.blip2.model import MODELS, Blip2
from pab.encoders.clip.encoder import ClipEncoder
from pab.encoders.clip.model import new_clip
from pab.scoring.encoding import BatchEncoder, Compute
from pab.training.contrastive import symmetric_infonce
from pab.training.optim import Ema, make_adamw
from tests.fake_cuda import CUDA, Trace, fake_cuda
from tests.recipe_memory import ROOT, recipe_step, update
from uit.encode import UitEncoder, with_vocabulary
from uit.model import Uit
from uit.model import model_config as uit_config

# DataLoader warns that page-locked memory needs a GPU.
pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument")
MINI = ROOT / "checkpoints/mini"
CAPTIONS = ["A man in a red coat is falling.", "A woman is walking in the park with a dog."]
BATCH = 32  # images
PICTURES = [Image.new("RGB", (80, 60))] * BATCH
TWO_DEVICES = "found at least two devices, cuda:0 and cpu"
SLACK = 1.05  # bound of kernels and traffic of scoring, relative to the model without autocast


class Member(NamedTuple):
    """Member of the ensemble at two sizes, with its kernels and memory traffic.

    Both were counted by `tests/fake_cuda.py` for 32 images at the published size in bf16, with
    torch 2.14, transformers 5.23 and OpenCLIP 3.3.

    Attributes:
        small, full: create the encoder, at the size of the mini models and at the published size.
        image_weight, text_weight: name of a parameter in the first block of each tower.
        kernels: number of kernels per batch of images without autocast.
        traffic: bytes read and written by these kernels.
    """

    small: Callable[[Compute], BatchEncoder]
    full: Callable[[Compute], BatchEncoder]
    image_weight: str
    text_weight: str
    kernels: int
    traffic: float


def lhp(name: str, compute: Compute) -> LhpEncoder:
    model = Beit3Retrieval(model_config(name)).eval().to(CUDA, compute.weights)
    return LhpEncoder(compute, model, SentencePiece(MINI / "lhp.spm", 64))


def uit(name: str, size: int, window: int, compute: Compute) -> UitEncoder:
    tokenizer = Tokenizer(MINI / "bert", max_words=56, max_length=56)
    model = Uit(with_vocabulary(uit_config(name, size, window), tokenizer))
    return UitEncoder(compute, model.eval().to(CUDA, compute.weights), tokenizer)


def clip(name: str, compute: Compute) -> ClipEncoder:
    found = new_clip(name)
    found.model.eval().to(CUDA, compute.weights)
    return ClipEncoder(compute, found)


def blip2(name: str, compute: Compute) -> Blip2Encoder:
    sizes = MODELS[name]
    tokenizer = Tokenizer(MINI / "bert", max_words=50, max_length=64)
    model = Blip2(sizes).eval().to(CUDA, compute.weights)
    transform = recipe("blip2", sizes.image_size).transform()
    return Blip2Encoder(compute, model, tokenizer, transform, "first")


MEMBERS = {
    "lhp": Member(
        partial(lhp, "beit3_mini_patch8_64"),
        partial(lhp, "beit3_large_patch16_384"),
        "beit3.encoder.layers.0.ffn.A.fc1.bias",
        "beit3.encoder.layers.0.ffn.B.fc1.bias",
        kernels=348, traffic=44.7e9,
    ),
    "uit": Member(
        partial(uit, "uit_mini", 64, 4),
        partial(uit, "uit_base", 224, 7),
        "vision_encoder.layers.0.blocks.0.mlp.fc1.bias",
        "text_encoder.bert.encoder.layer.0.output.dense.bias",
        kernels=397, traffic=9.9e9,
    ),
    "clip": Member(
        partial(clip, f"local-dir:{MINI / 'clip'}"),
        partial(clip, "ViT-L-14-336-quickgelu"),
        "visual.transformer.resblocks.0.mlp.c_fc.bias",
        "transformer.resblocks.0.mlp.c_fc.bias",
        kernels=345, traffic=55.4e9,
    ),
    "blip2": Member(
        partial(blip2, "mini"),
        partial(blip2, "pretrain_vitL"),
        "visual_encoder.transformer.resblocks.0.mlp.c_fc.bias",
        "qformer.encoder.layer.0.attention.attention.query.bias",
        kernels=491, traffic=24.2e9,
    ),
}  # fmt: skip
of_members = pytest.mark.parametrize("member", MEMBERS.values(), ids=MEMBERS)


@pytest.fixture
def trace(monkeypatch: pytest.MonkeyPatch) -> Iterator[Trace]:
    """Run the test with fake CUDA tensors; booleans that the host reads are False."""
    with fake_cuda(monkeypatch) as found:
        found.truth = False
        yield found


def bf16_compute(dtype: torch.dtype = torch.bfloat16) -> Compute:
    """Return settings that compute in bf16, with weights in ``dtype``."""
    return Compute(CUDA, torch.bfloat16, dtype, BATCH, num_workers=0)


def network(encoder: BatchEncoder) -> nn.Module:
    found = encoder.clip.model if isinstance(encoder, ClipEncoder) else encoder.model  # type: ignore[attr-defined]
    assert isinstance(found, nn.Module)
    return found


# ---- Scoring


@of_members
def test_images_are_encoded_on_the_device_without_a_host_read(member: Member, trace: Trace) -> None:
    encoder = member.small(bf16_compute())
    encode, transform = encoder.image_encoder()
    outputs = []

    def observed(pixels: Tensor) -> Tensor:
        trace.reset()
        outputs.append(encode(pixels))
        assert trace.host_reads == 0
        return outputs[-1]

    vectors = encoder.compute.images(observed, PICTURES, transform)
    assert [out.device for out in outputs] == [CUDA]
    assert trace.host_reads == 0
    assert trace.copies == 1  # the result
    assert (vectors.device.type, vectors.dtype, len(vectors)) == ("cpu", torch.float32, BATCH)


@of_members
def test_captions_are_encoded_on_the_device(member: Member, trace: Trace) -> None:
    encoder = member.small(bf16_compute())
    trace.reset()
    vectors = encoder.encode_texts(CAPTIONS)
    assert trace.launches > 50
    assert trace.host_reads + trace.copies == 1  # the result
    assert (vectors.device.type, vectors.dtype, len(vectors)) == ("cpu", torch.float32, 2)


@of_members
def test_weight_left_on_the_cpu_is_found(member: Member, trace: Trace) -> None:
    encoder = member.small(bf16_compute())
    commands = {
        member.image_weight: partial(encoder.encode_images, PICTURES),
        member.text_weight: partial(encoder.encode_texts, CAPTIONS),
    }
    for name, encode in commands.items():
        encode()
        owner, _, last = name.rpartition(".")
        part = network(encoder).get_submodule(owner)._parameters
        on_device = part[last]
        assert on_device is not None
        part[last] = nn.Parameter(on_device.detach().cpu())
        with pytest.raises(RuntimeError, match=TWO_DEVICES):
            encode()


@of_members
def test_kernels_and_traffic_of_the_model(member: Member, trace: Trace) -> None:
    encoder = member.full(bf16_compute())
    encode, transform = encoder.image_encoder()
    pixels: list[Tensor] = []
    encoder.compute.images(
        lambda batch: pixels.append(batch) or batch[:, 0, 0], PICTURES, transform
    )
    trace.reset()
    with torch.inference_mode():
        encode(pixels[0])
    assert trace.launches == pytest.approx(member.kernels, rel=0.02)
    assert trace.traffic == pytest.approx(member.traffic, rel=0.02)


@of_members
def test_model_in_bf16_is_scored_without_autocast(member: Member, trace: Trace) -> None:
    """Autocast would compute norms in float32, which adds kernels and traffic."""
    encoder = member.full(bf16_compute())
    trace.reset()
    encoder.encode_images(PICTURES)
    assert trace.launches <= SLACK * member.kernels
    assert trace.traffic <= SLACK * member.traffic


@of_members
def test_model_in_float32_is_scored_with_autocast(member: Member, trace: Trace) -> None:
    """Validation in training scores with the float32 weights."""
    encoder = member.small(bf16_compute(torch.float32))
    trace.reset()
    encoder.encode_images(PICTURES)
    encoder.encode_texts(CAPTIONS)
    assert trace.dtypes["aten.addmm.default"] == {torch.bfloat16}


# ---- Training


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("recipe_name", ["lhp", "clip", "blip2"])
def test_training_step(recipe_name: str, dtype: str, trace: Trace, tmp_path: Path) -> None:
    """Compute the gradients, and update the weights and their average."""
    config, step = recipe_step(f"{recipe_name}/mini", ["--dtype", dtype], tmp_path)
    trace.reset()
    loss = step.backward()
    assert trace.host_reads == 0
    assert loss.device == CUDA
    trained = [p for name, p in step.module.named_parameters() if not name.endswith("mask_token")]
    gradients = [parameter.grad for parameter in trained if parameter.requires_grad]
    assert {(g.device, g.dtype) for g in gradients if g is not None} == {(CUDA, torch.float32)}
    assert not any(gradient is None for gradient in gradients)
    assert trace.dtypes["aten.addmm.default"] == {dtype_of(dtype)}  # forward pass under autocast

    optimizer = make_adamw(step.groups, config.opt_betas, config.opt_eps)
    scaler = make_scaler(CUDA, dtype_of(dtype))
    scaler.scale(loss)  # creates the scaler's state, as in a training step
    update(optimizer, loss, 1.0, scaler)  # creates the optimizer's state
    trace.reset()
    update(optimizer, loss, 1.0, scaler)
    assert trace.host_reads == 1  # the loss and the gradients' norm together
    assert trace.kernels["aten._fused_adamw_.default"] == len(optimizer.param_groups)
    assert trace.launches <= 4 * len(optimizer.param_groups) + 20  # no loop over the parameters

    average = Ema(step.module, 0.99, warmup=True)
    trace.reset()
    average.update(step.module)
    assert trace.host_reads == 0
    assert {tensor.device for tensor in average.shadow.values()} == {CUDA}


def test_loss_with_a_tensor_on_the_cpu_is_found(trace: Trace) -> None:
    vectors = torch.empty(4, 8, device=CUDA)
    scale, identity = torch.zeros((), device=CUDA), torch.arange(4)
    symmetric_infonce(vectors, vectors, scale, identity.to(CUDA))
    with pytest.raises(RuntimeError, match=TWO_DEVICES):
        symmetric_infonce(vectors, vectors, scale, identity)


# ---- The trace itself


def test_kernels_and_traffic_are_counted(trace: Trace) -> None:
    x = torch.ones(256, 4, device=CUDA)
    trace.reset()
    y = x.view(4, 256).T[1:]
    assert (trace.launches, trace.traffic) == (0, 0)
    y + 1
    assert (trace.launches, trace.traffic) == (1, 2 * 255 * 4 * 4)
    x.expand(8, 256, 4) + x
    assert trace.traffic - 2 * 255 * 4 * 4 == (1 + 1 + 8) * 256 * 4 * 4
    torch.ones(256) + 1  # on the CPU
    assert trace.launches == 2


def test_host_reads_are_counted(trace: Trace) -> None:
    x = torch.ones(4, device=CUDA)
    trace.reset()
    reads = [
        lambda: x[0].item(), lambda: float(x[0]), lambda: bool(x[0] > 0), lambda: x.tolist(),
        lambda: x.cpu(), lambda: torch.zeros(4).copy_(x),
    ]  # fmt: skip
    for number, read in enumerate(reads, start=1):
        read()
        assert trace.host_reads == number
    x.to("cpu", non_blocking=True)
    assert (trace.host_reads, trace.copies) == (len(reads), 1)
    torch.ones(4).tolist()
    torch.ones(4, device=CUDA) + torch.ones(4).to(CUDA)
    assert trace.host_reads == len(reads)


@pytest.mark.parametrize("read", [Tensor.nonzero, lambda x: x[x > 0], Tensor.unique])
def test_shape_that_depends_on_values_is_found(
    read: Callable[[Tensor], object], trace: Trace
) -> None:
    """On a GPU, the host would wait for the shape."""
    with pytest.raises(DynamicOutputShapeException):
        read(torch.ones(4, device=CUDA))


def test_memory_is_counted_until_it_is_freed(trace: Trace) -> None:
    before = trace.memory.live
    x = torch.ones(1000, device=CUDA)
    view = x[:10]
    y = x + 1
    del x, y
    assert (trace.memory.live - before, trace.memory.peak - before) == (4096, 8192)
    del view
    assert trace.memory.live == before
