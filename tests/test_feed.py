"""The data feed: loader processes, uint8 pixels, files opened once, results read a batch later."""

from __future__ import annotations

import math
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

import lhp.infer
from pab.core import processes
from pab.core.errors import InputError
from pab.data import loader
from pab.data.image_loader import ImageBatch, ImageLoader
from pab.data.images import ImageReader, ImageTransform, in_two_parts, list_gallery, recipe
from pab.data.loader import MOST_WORKERS, needed_workers, resolve_workers
from pab.data.pixels import Preprocessing
from pab.data.records import GalleryImage
from pab.scores import load_scores
from pab.scoring import encoding
from pab.scoring.batches import refilled
from pab.scoring.encoding import Compute
from pab.scoring.feature_cache import FeatureCache
from tests.conftest import MODEL
from tests.fake_cuda import CUDA, fake_cuda
from tests.test_images import noise
from tests.test_processes import run_in

CPU = torch.device("cpu")
IMAGES = 12


@pytest.fixture
def gallery(tmp_path: Path) -> Path:
    folder = tmp_path / "gallery"
    folder.mkdir()
    for number in range(IMAGES):
        noise(40, 30, number).save(folder / f"G{number:02}.png")
    return folder


# ------------------------------------------------------------------------------ loader processes


@pytest.mark.parametrize(
    ("cores", "local", "expected"),
    [(1, "1", 1), (8, "1", 8), (64, "1", MOST_WORKERS), (64, "8", 8), (4, "8", 1), (7, "2", 3)],
)
def test_auto_divides_the_cores_among_the_processes(
    cores: int, local: str, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader, "available_cores", lambda: cores)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", local)
    assert resolve_workers("auto") == expected
    assert resolve_workers(5) == 5
    assert resolve_workers(0) == 0


def test_auto_counts_the_cores_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 5, 9}, raising=False)
    monkeypatch.setattr(loader, "cpu_quota", lambda: math.inf)
    assert resolve_workers("auto") == 3
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert resolve_workers("auto") == 1


V2, V1 = "0::/job/step\n", "3:cpuset:/\n4:cpu,cpuacct:/job/step\n0::/\n"


@pytest.mark.parametrize(
    ("own", "files", "expected"),
    [
        (V2, {}, math.inf),
        (V2, {"cpu.max": "max 100000\n"}, math.inf),
        (V2, {"cpu.max": "250000 100000\n"}, 2.5),  # a container sees its own cgroup as the root
        (V2, {"job/cpu.max": "400000 100000\n", "job/step/cpu.max": "max 100000\n"}, 4.0),
        (V2, {"job/cpu.max": "400000 100000\n", "job/step/cpu.max": "50000 100000\n"}, 0.5),
        (V2, {"job/other/cpu.max": "50000 100000\n"}, math.inf),
        (V1, {"cpu.max": "100000 100000\n"}, 1.0),
        (V1, {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, math.inf),
        (
            V1,
            {
                "cpu/job/cpu.cfs_quota_us": "300000\n", "cpu/job/cpu.cfs_period_us": "100000\n",
                "cpu/cpu.cfs_quota_us": "800000\n", "cpu/cpu.cfs_period_us": "100000\n",
            },
            3.0,
        ),
        (None, {"cpu.max": "100000 100000\n"}, math.inf),  # not Linux
    ],
)  # fmt: skip
def test_the_quota_of_a_container_or_job(
    own: str | None,
    files: dict[str, str],
    expected: float,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, text in files.items():
        path = tmp_path / "fs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    if own is not None:
        (tmp_path / "own").write_text(own)
    assert loader.cpu_quota(tmp_path / "fs", tmp_path / "own") == expected
    quota = min(expected, 64)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(9)), raising=False)
    monkeypatch.setattr(loader, "cpu_quota", lambda: quota)
    assert resolve_workers("auto") == min(9, math.ceil(quota))


@pytest.mark.parametrize("value", ["0", "two", "-1", ""])
def test_an_impossible_number_of_local_processes(
    value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", value)
    with pytest.raises(InputError, match=f"LOCAL_WORLD_SIZE: .*found '{value}'"):
        resolve_workers("auto")


def test_small_inputs_need_few_workers(gallery: Path) -> None:
    assert [needed_workers(16, batches) for batches in (0, 1, 2, 3, 100)] == [0, 0, 2, 3, 16]
    assert needed_workers(0, 5) == 0
    images = ImageLoader(list_gallery(gallery), recipe("beit3", 8), 5, 16)
    assert images._loader.num_workers == 3
    assert len(images) == 3


def test_every_command_defaults_to_auto() -> None:
    from lhp.config import TrainConfig
    from pab.encoders.clip.infer import InferConfig

    assert TrainConfig().num_workers == "auto"
    assert InferConfig().num_workers == "auto"
    assert InferConfig(device="cpu").compute().num_workers == resolve_workers("auto")


# ------------------------------------------------------------------------------------ uint8 pixels


@pytest.mark.parametrize("name", ["beit3", "clip", "blip2", "uit"])
def test_normalized_batches_equal_torchvision_to_the_bit(name: str) -> None:
    """The batch contains all 256 values of each channel."""
    found = recipe(name, 16)
    ramp = torch.arange(256, dtype=torch.uint8).view(16, 16)
    batch = torch.stack([ramp.expand(3, 16, 16), ramp.flip(0).expand(3, 16, 16)])
    to_float = v2.ToDtype(torch.float32, scale=True)
    expected = v2.Compose([to_float, v2.Normalize(list(found.mean), list(found.std))])(batch)
    normalized = found.transform().normalization.on(CPU)(batch)
    assert normalized.dtype == torch.float32
    assert torch.equal(normalized, expected)
    assert batch.dtype == torch.uint8, "the input is unchanged"


@pytest.mark.parametrize("mode", ["shortest", "squash", "longest"])
def test_openclip_transforms_give_equal_pixels_in_two_parts(mode: Any) -> None:
    transform = image_transform_v2(PreprocessCfg(size=32, resize_mode=mode), is_train=False)
    parts = in_two_parts(transform)
    assert isinstance(parts, Preprocessing)
    for image in (noise(61, 47), noise(32, 90, 1)):
        assert parts.pixels(image).dtype == torch.uint8
        assert torch.equal(parts(image), transform(image))


def mean_of_rows(image: Image.Image) -> Tensor:
    """Convert an image with a transform that is not torchvision's."""
    return torch.from_numpy(np.asarray(image.resize((4, 4)), dtype=np.float32)).permute(2, 0, 1)


@pytest.mark.parametrize("workers", [0, 2])
def test_other_transforms_run_whole_in_the_loader(gallery: Path, workers: int) -> None:
    images = list_gallery(gallery)
    batches = ImageLoader(images, mean_of_rows, 5, workers)
    assert batches.normalization is None
    pixels = torch.cat([batch.pixels for batch in batches])
    assert torch.equal(pixels, torch.stack([mean_of_rows(Image.open(i.path)) for i in images]))


def test_preprocessed_tensors_may_be_mixed_with_files(gallery: Path) -> None:
    images, transform = list_gallery(gallery)[:4], recipe("clip", 8).transform()
    expected = torch.stack([transform(Image.open(image.path)) for image in images])
    mixed = [images[0], expected[1], Image.open(images[2].path), images[3]]
    (batch,) = ImageLoader(mixed, transform, 4)
    assert torch.equal(batch.pixels, expected)


def vectors_of(
    images: list[GalleryImage], transform: ImageTransform, compute: Compute
) -> tuple[Tensor, list[Tensor]]:
    """Return vectors, and the pixels that the encoder received."""
    seen: list[Tensor] = []

    def encode(pixels: Tensor) -> Tensor:
        seen.append(pixels)
        return pixels.float().mean(dim=(2, 3))

    return compute.images(encode, images, transform), seen


def test_the_encoder_receives_normalized_pixels_in_the_weights_dtype(gallery: Path) -> None:
    images, transform = list_gallery(gallery), recipe("uit", 8).transform()
    expected = torch.stack([transform(Image.open(image.path)) for image in images])
    for dtype in (torch.float32, torch.bfloat16):
        _, seen = vectors_of(images, transform, Compute(CPU, dtype, dtype, 5, 0))
        assert [len(pixels) for pixels in seen] == [5, 5, 2]
        assert torch.equal(torch.cat(seen), expected.to(dtype))


# ---------------------------------------------------------------------------- one opening per file


class Opened:
    """Record of the files that this process and its loader processes open.

    An audit hook cannot be removed, so one hook writes to the current record. Workers inherit the
    hook and append to the same file.
    """

    current: int | None = None

    def __init__(self, folder: Path) -> None:
        self.folder, self.log = str(folder), folder.parent / "opened.txt"

    def __enter__(self) -> Opened:
        Opened.current = os.open(self.log, os.O_CREAT | os.O_TRUNC | os.O_WRONLY | os.O_APPEND)
        return self

    def __exit__(self, *_: object) -> None:
        assert Opened.current is not None
        os.close(Opened.current)
        Opened.current = None

    def counts(self) -> Counter[str]:
        """Count how often each file in the folder was opened."""
        lines = self.log.read_text().splitlines()
        return Counter(line for line in lines if line.startswith(self.folder))


def _hook(event: str, args: tuple[Any, ...]) -> None:
    if event == "open" and Opened.current is not None and isinstance(args[0], (str, Path)):
        os.write(Opened.current, f"{args[0]}\n".encode())


sys.addaudithook(_hook)


def once_each(folder: Path) -> dict[str, int]:
    return {str(path): 1 for path in folder.iterdir() if path.is_file()}


def test_the_record_counts(gallery: Path) -> None:
    with Opened(gallery) as opened:
        for _ in range(2):
            Image.open(gallery / "G00.png").load()
        (gallery / "G01.png").read_bytes()
    assert opened.counts() == {str(gallery / "G00.png"): 2, str(gallery / "G01.png"): 1}


@pytest.fixture
def score(
    tiny_data: Path, gallery: Path, debug_checkpoint: Path, tokenizer_file: Path, tmp_path: Path
) -> Callable[..., Tensor]:
    """Return a function that scores the gallery with `lhp.infer`."""

    def run(*flags: str, workers: int = 0) -> Tensor:
        lhp.infer.main(
            ["--model", MODEL, "--checkpoint", str(debug_checkpoint)]
            + ["--tokenizer", str(tokenizer_file), "--image_folder", str(gallery)]
            + ["--annotation", str(tiny_data / "name-masked_test-set/query.json")]
            + ["--save_score", str(tmp_path / "s.pt"), "--output_file", "none", "--device", "cpu"]
            + ["--feature_cache_dir", str(tmp_path / "features"), "--batch_size", "4"]
            + ["--num_workers", str(workers), *flags]
        )
        return load_scores(tmp_path / "s.pt").scores

    return run


@pytest.mark.parametrize("workers", [0, 2])
def test_scoring_opens_every_image_once(
    score: Callable[..., Tensor], gallery: Path, workers: int
) -> None:
    found = []
    for flags in (["--no_feature_cache"], [], []):  # no cache, an empty cache, a filled cache
        with Opened(gallery) as opened:
            found.append(score(*flags, workers=workers))
        assert opened.counts() == once_each(gallery), flags
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_images_with_cached_vectors_are_not_decoded(
    gallery: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, transform = list_gallery(gallery), recipe("clip", 8).transform()
    plain = Compute(CPU, torch.float32, torch.float32, 5, 0)
    expected, _ = vectors_of(images, transform, plain)

    def cached() -> tuple[Tensor, list[Tensor]]:
        cache = FeatureCache(tmp_path / "c", {"weights": "abc"})
        return vectors_of(images, transform, replace(plain, cache=cache))

    def no_decoding(*_: object) -> Image.Image:
        raise AssertionError("an image was decoded")

    _, seen = cached()
    assert sum(map(len, seen)) == IMAGES
    for number in (0, 3, 6, 9):
        noise(40, 30, 99 + number).save(gallery / f"G{number:02}.png")
    found, seen = cached()
    assert [len(pixels) for pixels in seen] == [4], "images from several batches share one"
    assert torch.equal(found, vectors_of(images, transform, plain)[0])
    assert not torch.equal(found, expected)
    monkeypatch.setattr(ImageReader, "decode", no_decoding)
    assert torch.equal(cached()[0], found)


def test_incomplete_batches_are_refilled_in_order() -> None:
    rows = torch.arange(10, dtype=torch.uint8).view(10, 1, 1, 1)

    def batch(*positions: int) -> ImageBatch:
        keys = [bytes([one]) for one in positions]
        return ImageBatch(rows[list(positions)], list(positions), keys, {}, {})

    batches = [batch(0, 1, 2), batch(3), batch(), batch(4, 5, 6), batch(7, 8), batch(9)]
    found = list(refilled(batches, 3))
    assert [one.positions for one in found] == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9]]
    for one in found:
        assert one.pixels.flatten().tolist() == one.positions
        assert one.keys == [bytes([position]) for position in one.positions]


def shared_scoring(folder: Path) -> Any:
    """Encode this process's part of the gallery; return openings, vectors and any error."""
    opened = Opened(folder / "gallery")
    opened.log = folder / f"opened{processes.rank()}.txt"
    error, vectors = "", torch.empty(0)
    with opened:
        images = list_gallery(folder / "gallery")
        compute = Compute(CPU, torch.float32, torch.float32, 2, 0)
        try:
            vectors, _ = vectors_of(images, recipe("clip", 8).transform(), compute)
        except InputError as raised:
            error = str(raised)
    return dict(opened.counts()), vectors, error


@pytest.mark.distributed
def test_processes_open_their_own_images_and_name_all_bad_ones(
    gallery: Path, tmp_path: Path
) -> None:
    (one, vectors, _), (two, same, _) = run_in(2, shared_scoring, tmp_path)
    assert {**one, **two} == once_each(gallery)
    assert not one.keys() & two.keys()
    assert torch.equal(vectors, same)
    for number in (2, 3, 7):
        (gallery / f"G{number:02}.png").write_text("text")
    (*_, error), (*_, other) = run_in(2, shared_scoring, tmp_path)
    assert error == other
    assert error.startswith(f"3 of {IMAGES} images: cannot be read: {gallery}/G02.png (not a JPEG")
    assert error.count("not a JPEG, PNG, WebP or BMP image") == 3


# ------------------------------------------------------------------------------------ late results


class FakeEvent:
    """Stand-in for a CUDA event; it records when the host waits for it."""

    made = 0
    log: ClassVar[list[str]] = []

    def __init__(self) -> None:
        self.number, FakeEvent.made = FakeEvent.made, FakeEvent.made + 1

    def record(self) -> None:
        FakeEvent.log.append(f"queued {self.number}")

    def synchronize(self) -> None:
        FakeEvent.log.append(f"read {self.number}")


class FakeLoader:
    """Stand-in for :class:`ImageLoader` that yields batches of fake uint8 pixels."""

    made: ClassVar[list[tuple[int, bool]]] = []  # processes and page-locking of each loader

    def __init__(self, images: Any, transform: Any, size: int, workers: int, **more: Any) -> None:
        self.images, self.size = images, size
        self.normalization = transform.normalization
        FakeLoader.made.append((workers, more["pin_memory"]))

    def __len__(self) -> int:
        return -(-len(self.images) // self.size)

    def __iter__(self) -> Iterator[ImageBatch]:
        for start in range(0, len(self.images), self.size):
            places = list(range(len(self.images)))[start : start + self.size]
            pixels = torch.empty(len(places), 3, 8, 8, dtype=torch.uint8)
            yield ImageBatch(pixels, places, [], {}, {})


def test_no_blocking_copy_on_a_cuda_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "ImageLoader", FakeLoader)
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(FakeEvent, "made", 0)
    monkeypatch.setattr(FakeEvent, "log", [])
    monkeypatch.setattr(FakeLoader, "made", [])
    sources: list[tuple[str, Any]] = []
    images = [GalleryImage(str(number), Path(str(number))) for number in range(7)]
    with fake_cuda(monkeypatch) as trace:
        compute = Compute(CUDA, torch.bfloat16, torch.bfloat16, 2, 4)
        weight = torch.empty(192, 5, device="cuda", dtype=torch.bfloat16)

        def encode(pixels: Tensor) -> Tensor:
            sources.append((pixels.device.type, pixels.dtype))
            return pixels.flatten(1) @ weight

        rows = compute.image_rows(
            encode, images, recipe("beit3", 8).transform(), ImageReader(unreadable={})
        )
        copies = []
        for _, found in rows:
            assert found.device == CPU
            assert found.dtype == torch.float32
            copies.append(trace.copies)
    assert trace.host_reads == 0
    assert trace.copies == 4
    assert copies == [2, 3, 4, 4], "a batch is read when the next one is queued"
    expected = ["queued 0", "queued 1", "read 0", "queued 2", "read 1", "queued 3", "read 2"]
    assert FakeEvent.log == [*expected, "read 3"]
    assert FakeLoader.made == [(4, True)]
    assert sources == [("cuda", torch.bfloat16)] * 4


def test_tensors_on_the_device_stay_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such tensors cannot be page-locked or read by another process."""
    monkeypatch.setattr(encoding, "ImageLoader", FakeLoader)
    monkeypatch.setattr(FakeLoader, "made", [])
    with fake_cuda(monkeypatch):
        compute = Compute(CUDA, torch.float32, torch.float32, 2, 4)
        tensors = [torch.empty(3, 8, 8, device="cuda") for _ in range(3)]
        transform = recipe("beit3", 8).transform()
        found = list(compute.image_rows(lambda x: x.flatten(1), tensors, transform, ImageReader()))
    assert [len(rows) for _, rows in found] == [2, 1]
    assert FakeLoader.made == [(0, False)]


def test_captions_are_read_late_too(monkeypatch: pytest.MonkeyPatch) -> None:
    with fake_cuda(monkeypatch) as trace:
        compute = Compute(CUDA, torch.bfloat16, torch.bfloat16, 2, 0)
        monkeypatch.setattr(processes, "assemble", lambda order, rows, total, device: rows)
        found = compute.captions(
            lambda places: torch.empty(len(places), 5, device="cuda"), [[1, 2]] * 6, longest=2
        )
    assert found.shape == (6, 5)
    assert trace.host_reads == 0
    assert trace.copies == 3


def test_pinned_batches_are_copied_without_blocking(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, bool]] = []
    true_to = Tensor.to

    def to(self: Tensor, *args: Any, **options: Any) -> Tensor:
        if options.get("non_blocking") is not None:
            asked.append((args[0], options["non_blocking"]))
        return true_to(self, *args, **options)

    monkeypatch.setattr(Tensor, "to", to)
    with fake_cuda(monkeypatch):
        fake = torch.empty(2, 3, 8, 8, dtype=torch.uint8)
        Compute(CUDA, torch.float32, torch.float32, 2, 0)._on_device(fake)
    Compute(CPU, torch.float32, torch.float32, 2, 0)._on_device(torch.zeros(2))
    assert asked == [(CUDA, True), (CPU, False)]
