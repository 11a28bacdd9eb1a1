"""Number formats: choice of the dtype, autocast, TF32, deterministic algorithms."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lhp.beit3 import Beit3Retrieval, model_config
from lhp.infer import InferConfig as LhpConfig
from lhp.train import main as lhp_train
from pab.core import devices, precision, processes
from pab.core.errors import InputError
from pab.core.notices import recorded
from pab.data.images import list_gallery
from pab.encoders.blip2.model import MODELS as BLIP2_MODELS
from pab.encoders.blip2.model import Blip2
from pab.encoders.clip.model import build
from pab.encoders.clip.model import encode_text as clip_text
from pab.scoring import load_encoder
from pab.scoring.encoding import Compute
from tests.fake_cuda import CUDA, fake_cuda
from uit.model import MODELS as UIT_MODELS
from uit.model import Uit
from uit.rerank import match_scores

CPU, BF16 = torch.device("cpu"), torch.bfloat16
ROOT = Path(__file__).resolve().parents[1]
MINI = ROOT / "checkpoints/mini"
SETTINGS: dict[str, dict[str, Any]] = {
    "lhp": {"config": ROOT / "configs/lhp/mini_infer.yaml"},
    "uit": {"config": ROOT / "configs/uit/mini_infer.yaml"},
    "clip": {"checkpoint": MINI / "clip"},
    "blip2": {"model": "mini", "text_encoder": MINI / "bert", "query_pooling": "max"},
}
CAPTIONS = ["A man in a red coat is falling in the park.", "A woman in a blue coat is walking."]
SLOW, FAST = {"fp32": 290.0, "bf16": 158.0}, {"fp32": 90.0, "bf16": 410.0}  # GFLOP/s


def no_timing() -> dict[str, float]:
    raise AssertionError("measured")


# ----------------------------------------------------------------------------- choice of the dtype


@pytest.mark.parametrize(
    ("rates", "wanted"),
    [(SLOW, torch.float32), (FAST, BF16), ({"fp32": 100.0, "bf16": 105.0}, torch.float32)],
)
def test_the_fastest_dtype_of_a_cpu_is_measured(
    rates: dict[str, float], wanted: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "product_rates", lambda: rates)
    with recorded() as notices:
        assert precision.choose_dtype("fastest", CPU) == wanted
    ((where, text),) = notices
    assert where == "--dtype fastest"
    name = "bf16" if wanted == BF16 else "fp32"
    assert text == (
        f"{name} (products on this CPU: fp32 {rates['fp32']:.0f} GFLOP/s, "
        f"bf16 {rates['bf16']:.0f} GFLOP/s)"
    )


@pytest.mark.parametrize(
    ("device", "capability", "wanted"),
    [("cuda", (9, 0), BF16), ("cuda", (7, 5), torch.float16), ("mps", (0, 0), torch.float32)],
)
def test_the_fastest_dtype_of_a_gpu_is_known(
    device: str, capability: tuple[int, int], wanted: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "product_rates", no_timing)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert precision.choose_dtype("fastest", torch.device(device)) == wanted


def test_all_processes_use_the_choice_of_rank_0(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "product_rates", no_timing)
    monkeypatch.setattr(processes, "is_main", lambda: False)
    monkeypatch.setattr(processes, "broadcast_object", lambda _: ("bf16", "measured by rank 0"))
    assert precision.choose_dtype("fastest", CPU) == BF16


def test_slow_bf16_gives_a_notice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "product_rates", lambda: SLOW)
    with recorded() as notices:
        assert precision.choose_dtype("bf16", CPU) == BF16
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
        assert precision.choose_dtype("bf16", CUDA) == BF16
    on_cpu, on_gpu = (text for _, text in notices)
    assert on_cpu == (
        "slower than fp32 on this CPU (fp32 290 GFLOP/s, bf16 158 GFLOP/s); --dtype fp32 is faster"
    )
    assert on_gpu.startswith("slow on this GPU: compute capability 7.5 has no bf16 units")
    assert on_gpu.endswith("--dtype fp16 is faster")


def test_fast_or_exact_dtypes_give_no_notice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "product_rates", lambda: FAST)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    with recorded() as notices:
        precision.choose_dtype("bf16", CPU)
        precision.choose_dtype("bf16", CUDA)
        monkeypatch.setattr(precision, "product_rates", no_timing)
        precision.choose_dtype("fp32", CPU)
        precision.choose_dtype("fp16", CUDA)
    assert notices == []
    with pytest.raises(InputError, match="fp16 is not supported on a CPU"):
        precision.choose_dtype("fp16", CPU)


def test_measuring_leaves_the_random_state_unchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "PRODUCT", (8, 8, 8))
    monkeypatch.setattr(precision, "SECONDS_PER_DTYPE", 0.0)
    before = torch.get_rng_state()
    rates = precision.product_rates.__wrapped__()
    assert rates.keys() == {"fp32", "bf16"}
    assert all(rate > 0 for rate in rates.values())
    assert torch.equal(torch.get_rng_state(), before)


def test_the_published_default_of_clip_and_blip2_is_not_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(precision, "product_rates", no_timing)
    encoder = load_encoder("clip", **SETTINGS["clip"], device="cpu")
    assert encoder.origin.dtype == "fp32"
    monkeypatch.setattr(precision, "product_rates", lambda: FAST)
    fastest = load_encoder("clip", **SETTINGS["clip"], device="cpu", dtype="fastest")
    assert fastest.origin.dtype == fastest.fingerprint["dtype"] == "bf16"


# ---------------------------------------------------------------------------------------- autocast


def lhp_on(dtype: torch.dtype) -> dict[str, Callable[[], Tensor]]:
    model = Beit3Retrieval(model_config("beit3_debug_patch16_64", vocab_size=70)).eval()
    model.to(CUDA, dtype)
    pixels = torch.empty(4, 3, 64, 64, device=CUDA, dtype=dtype)
    ids = torch.ones(4, 9, dtype=torch.int64, device=CUDA)
    padding = torch.zeros(4, 9, dtype=torch.int64, device=CUDA)
    return {
        "images": lambda: model.encode_image(pixels),
        "texts": lambda: model.encode_text(ids, padding),
    }


def uit_on(dtype: torch.dtype) -> dict[str, Callable[[], Tensor]]:
    model = Uit(UIT_MODELS["uit_mini"]).eval()
    model.to(CUDA, dtype)
    pixels = torch.empty(4, 3, 64, 64, device=CUDA, dtype=dtype)
    ids = torch.ones(4, 9, dtype=torch.int64, device=CUDA)
    mask, bert = torch.ones(4, 9, dtype=torch.int64, device=CUDA), model.text_encoder
    rows = torch.arange(4, device=CUDA)

    def match() -> Tensor:
        memory = bert.image_memory(model.vision_encoder(pixels))
        pairs = bert.fuse_pairs(bert.encode_text(ids, mask), mask, memory, rows, rows)
        return model.match_logits(bert.fused_at(pairs, torch.zeros_like(rows)[:, None])[:, 0])

    return {
        "images": lambda: model.image_vector(model.vision_encoder(pixels)),
        "texts": lambda: model.text_vector(bert.encode_text(ids, mask)),
        "match": lambda: match().float(),
    }


def clip_on(dtype: torch.dtype) -> dict[str, Callable[[], Tensor]]:
    model: Any = build(f"local-dir:{MINI / 'clip'}").eval()
    model.to(CUDA, dtype)
    side = model.visual.image_size[0]
    pixels = torch.empty(4, 3, side, side, device=CUDA, dtype=dtype)
    ids = torch.ones(4, 9, dtype=torch.int64, device=CUDA)
    return {
        "images": lambda: model.encode_image(pixels).float(),
        "texts": lambda: clip_text(model, ids).float(),
    }


def blip2_on(dtype: torch.dtype) -> dict[str, Callable[[], Tensor]]:
    model = Blip2(BLIP2_MODELS["mini"]).eval()
    model.to(CUDA, dtype)
    pixels = torch.empty(4, 3, 64, 64, device=CUDA, dtype=dtype)
    ids, mask = (torch.ones(4, 9, dtype=torch.int64, device=CUDA) for _ in range(2))
    return {
        "images": lambda: model.encode_queries(pixels),
        "texts": lambda: model.encode_text(ids, mask),
    }


@pytest.mark.parametrize("dtype", [BF16, torch.float16])
@pytest.mark.parametrize("member", [lhp_on, uit_on, clip_on, blip2_on])
def test_a_model_held_in_its_dtype_runs_without_autocast_on_a_gpu(
    member: Callable[[torch.dtype], dict[str, Callable[[], Tensor]]], dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    compute = Compute(CUDA, dtype, dtype, 4, 0)
    with fake_cuda(monkeypatch) as trace:

        def counted(encode: Callable[[], Tensor], block: Any) -> tuple[int, int]:
            launches, traffic = trace.launches, trace.traffic
            with torch.inference_mode(), block:
                found = encode()
            assert (found.device, found.dtype) == (CUDA, torch.float32)
            return trace.launches - launches, trace.traffic - traffic

        for encode in member(dtype).values():
            plain = counted(encode, nullcontext())
            assert counted(encode, compute.running("encoding")) == plain
            launches, traffic = counted(encode, torch.autocast("cuda", dtype=dtype))
            assert launches > 1.05 * plain[0]  # the test would notice autocast
            assert traffic > plain[1]


def test_other_models_run_under_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    with fake_cuda(monkeypatch):
        left = torch.empty(2, 2, device=CUDA)
        for dtype in (BF16, torch.float16):  # a model in training: float32 weights
            with Compute(CUDA, dtype, torch.float32, 4, 0).running("encoding"):
                assert (left @ left).dtype == dtype
        with Compute(CUDA, torch.float32, torch.float32, 4, 0).running("encoding"):
            assert (left @ left).dtype == torch.float32


@pytest.mark.parametrize("name", SETTINGS)
def test_vectors_of_a_bf16_model(
    name: str, tiny_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    settings = {**SETTINGS[name], "device": "cpu", "num_workers": 0}
    gallery = list_gallery(tiny_data / "name-masked_test-set/gallery")[:5]
    exact, half = load_encoder(name, **settings), load_encoder(name, **settings, dtype="bf16")
    found = [half.encode_images(gallery), half.encode_texts(CAPTIONS)]
    for one, other in zip(
        found, (exact.encode_images(gallery), exact.encode_texts(CAPTIONS)), strict=True
    ):
        assert one.dtype == torch.float32
        assert torch.cosine_similarity(one, other).min() > 0.999
    # A CPU's autocast changes nothing: its list of float32 operations lacks LayerNorm.
    with torch.autocast("cpu", dtype=BF16):
        again = [half.encode_images(gallery), half.encode_texts(CAPTIONS)]
    assert all(torch.equal(one, other) for one, other in zip(found, again, strict=True))


def test_match_scores_of_a_bf16_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    encoder: Any = load_encoder("uit", **SETTINGS["uit"], device="cpu", num_workers=0)
    rows = encoder.ids(CAPTIONS)
    tokens = torch.randn(6, 17, encoder.model.config.swin.width, generator=torch.Generator())
    candidates = torch.arange(6).expand(2, 6)
    found = {}
    for dtype in (torch.float32, BF16):
        encoder.model.to(dtype)
        found[dtype] = match_scores(
            encoder.model, encoder.tokenizer, rows, tokens, candidates, device=CPU, dtype=dtype
        )
    assert found[BF16].dtype == torch.float32
    error = (found[BF16] - found[torch.float32]).abs().max()
    assert error < 0.1 * found[torch.float32].std()


def test_autocast_is_decided_in_one_place() -> None:
    held = devices.autocast(CPU, BF16, BF16), devices.autocast(CPU, torch.float32)
    assert all(isinstance(block, nullcontext) for block in held)
    with devices.autocast(CPU, BF16, torch.float32):
        assert torch.is_autocast_enabled("cpu")
    for folder in ("pab", "lhp", "uit", "ensemble", "scripts"):
        for path in (ROOT / folder).rglob("*.py"):
            if path != ROOT / "pab/core/devices.py":
                assert "torch.autocast" not in path.read_text(encoding="utf-8"), path


# -------------------------------------------------------------------------------------------- TF32


def tf32() -> tuple[str, ...]:
    cudnn: Any = torch.backends.cudnn
    parts = torch.backends.cuda.matmul, cudnn.conv, cudnn.rnn
    return tuple(part.fp32_precision for part in parts)


def test_tf32_is_off_unless_requested_and_ends_with_the_block() -> None:
    before = tf32()
    assert before[1] == "tf32", "by PyTorch's default, fp32 convolutions use TF32"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        exact = Compute(CUDA, torch.float32, torch.float32, 4, 0)
        fast = Compute(CUDA, torch.float32, torch.float32, 4, 0, tf32=True)
        with exact.running("encoding"):
            assert tf32() == ("ieee",) * 3
            with fast.running("encoding"):
                assert tf32() == ("tf32",) * 3
            assert tf32() == ("ieee",) * 3
        with pytest.raises(ZeroDivisionError), fast.running("encoding"):
            1 / 0  # noqa: B018
    assert tf32() == before
    assert torch.backends.cudnn.allow_tf32  # PyTorch's deprecated attribute can still be read
    assert not torch.backends.cuda.matmul.allow_tf32


def test_tf32_needs_a_gpu_that_has_it(
    refused: Callable[..., str], tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match="--tf32: expected a CUDA GPU, found cpu; leave it out"):
        LhpConfig(device="cpu", tf32=True).compute()
    argv = ["--data_path", str(tiny_data), "--output_dir", str(tmp_path), "--device", "cpu"]
    assert "--tf32: expected a CUDA GPU" in refused(lhp_train, [*argv, "--tf32"])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    with pytest.raises(InputError, match=r"expected compute capability 8\.0, found 7\.5"):
        precision.check_numerics(CUDA, tf32=True, deterministic=False)


def test_vectors_of_other_settings_have_another_cache() -> None:
    made = [
        Compute(CUDA, torch.float32, torch.float32, 4, 0, tf32=fast, deterministic=repeatable)
        for fast in (False, True)
        for repeatable in (False, True)
    ]
    assert len({tuple(one.fingerprint().items()) for one in made}) == 4
    assert made[2].fingerprint() == {
        "device": "cuda", "dtype": "fp32", "tf32": "True", "deterministic": "False",
    }  # fmt: skip
