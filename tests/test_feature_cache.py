"""The feature cache: cached and new vectors, damaged files, other encoders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pab.core.errors import InputError
from pab.core.files import sha256_of_file
from pab.data.images import list_gallery, recipe
from pab.scoring.encoding import Compute
from pab.scoring.feature_cache import HASHES, VECTORS, FeatureCache, code_versions
from tests.conftest import draw

CPU = torch.device("cpu")
FACTS = {"checkpoint": "abc", "dtype": "fp32"}


class Encoder:
    """Encoder that counts the images it encodes."""

    def __init__(self) -> None:
        self.seen = 0

    def __call__(self, pixels: Tensor) -> Tensor:
        self.seen += len(pixels)
        return pixels.mean(dim=(2, 3)) + torch.tensor([0.0, 1.0, 2.0])


@pytest.fixture
def gallery(tmp_path: Path) -> Path:
    for number in range(7):
        draw(tmp_path / f"g/p{number}.png", number, normal=True)
    return tmp_path / "g"


def vectors(folder: Path, caches: Path | None, facts: dict[str, str] = FACTS) -> tuple[Tensor, int]:
    """Return the vectors of a folder's images, and how many images were encoded."""
    encoder = Encoder()

    def run(cache: FeatureCache | None) -> Tensor:
        compute = Compute(CPU, torch.float32, torch.float32, 3, 0, cache=cache)
        return compute.images(encoder, list_gallery(folder), recipe("clip", 8))

    if caches is None:
        return run(None), encoder.seen
    return run(FeatureCache(caches, facts)), encoder.seen


def test_vectors_without_their_hashes_are_not_used(gallery: Path, tmp_path: Path) -> None:
    plain, _ = vectors(gallery, None)
    vectors(gallery, tmp_path / "c")
    (left,) = (tmp_path / "c").rglob(f"*{VECTORS}")
    left.with_suffix(HASHES).unlink()
    left.write_bytes(bytes(left.stat().st_size))
    first, _ = vectors(gallery, tmp_path / "c")
    again, encoded = vectors(gallery, tmp_path / "c")
    assert encoded == 0
    assert torch.equal(first, plain)
    assert torch.equal(again, plain)


def test_a_second_run_encodes_nothing(gallery: Path, tmp_path: Path) -> None:
    plain, _ = vectors(gallery, None)
    first, encoded = vectors(gallery, tmp_path / "c")
    assert encoded == 7
    again, encoded = vectors(gallery, tmp_path / "c")
    assert encoded == 0
    assert torch.equal(first, plain)
    assert torch.equal(again, plain)


def test_only_what_is_new_or_changed_is_encoded(gallery: Path, tmp_path: Path) -> None:
    vectors(gallery, tmp_path / "c")
    draw(gallery / "p3.png", 9, normal=False)  # changed
    (gallery / "p0.png").rename(gallery / "z.png")  # renamed: found by its content
    draw(gallery / "p99.png", 11, normal=True)  # new
    found, encoded = vectors(gallery, tmp_path / "c")
    assert encoded == 2
    plain, _ = vectors(gallery, None)
    assert torch.equal(found, plain)
    assert vectors(gallery, tmp_path / "c")[1] == 0, "both runs' vectors are found"


def test_another_encoder_has_its_own_cache(gallery: Path, tmp_path: Path) -> None:
    vectors(gallery, tmp_path / "c")
    assert vectors(gallery, tmp_path / "c", {**FACTS, "dtype": "bf16"})[1] == 7
    assert vectors(gallery, tmp_path / "c", {**FACTS, "checkpoint": "abd"})[1] == 7
    assert vectors(gallery, tmp_path / "c")[1] == 0


@pytest.mark.parametrize("ending", [HASHES, VECTORS])
@pytest.mark.parametrize("cut", [1, 40])
def test_incomplete_entries_of_a_killed_run_are_ignored(
    gallery: Path, tmp_path: Path, ending: str, cut: int
) -> None:
    plain, _ = vectors(gallery, tmp_path / "c")
    (part,) = (tmp_path / "c").rglob(f"*{ending}")
    part.write_bytes(part.read_bytes()[:-cut])
    found, encoded = vectors(gallery, tmp_path / "c")
    assert torch.equal(found, plain)
    assert (
        encoded == {(HASHES, 1): 1, (HASHES, 40): 2, (VECTORS, 1): 1, (VECTORS, 40): 4}[ending, cut]
    )
    assert vectors(gallery, tmp_path / "c")[1] == 0


def test_vectors_of_an_interrupted_run_are_kept(gallery: Path, tmp_path: Path) -> None:
    digests = [bytes.fromhex(sha256_of_file(path)) for path in sorted(gallery.iterdir())]
    FeatureCache(tmp_path / "c", FACTS).keep(digests[:2], torch.rand(2, 3))
    cache = FeatureCache(tmp_path / "c", FACTS)
    assert len(cache) == 2
    assert cache.split(dict(enumerate(digests))) == ([0, 1], [2, 3, 4, 5, 6])


def test_a_folder_that_cannot_be_created(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="--no_feature_cache"):
        FeatureCache(tmp_path / "file/c", FACTS)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_reported_and_later_vectors_are_intact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a failed write, a new part must start, because a partial row would shift later rows."""
    cache = FeatureCache(tmp_path / "c", FACTS)
    rows = torch.rand(3, 3)
    cache.keep([b"a" * 32], rows[:1])
    with monkeypatch.context() as patch:
        true_open = Path.open

        def full(path: Path, mode: str = "r") -> Any:
            if path.suffix == HASHES:  # vectors are written, but not their hashes
                raise OSError(28, "No space left on device")
            return true_open(path, mode)

        patch.setattr(Path, "open", full)
        with pytest.raises(InputError, match="No space left on device"):
            cache.keep([b"b" * 32], rows[1:2])
        (part,) = (tmp_path / "c").rglob(f"*{VECTORS}")
        patch.setattr(Path, "open", lambda path, mode: true_open(Path("/dev/full"), mode))
        with pytest.raises(InputError, match=f"{part.parent}.*No space left on device"):
            cache.keep([b"b" * 32], rows[1:2])
    cache.keep([b"c" * 32], rows[2:])
    for one in (cache, FeatureCache(tmp_path / "c", FACTS)):
        assert len(one) == 2
        assert torch.equal(one.vectors([b"a" * 32, b"c" * 32]), rows[[0, 2]])


def test_other_code_or_libraries_make_another_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    before = code_versions()
    assert before == code_versions()
    assert "torch" in before
    monkeypatch.setattr("pab.scoring.feature_cache.version", lambda name: "0.0")
    assert code_versions() != before


def test_vectors_are_read_back_while_more_are_written(tmp_path: Path) -> None:
    rows = torch.rand(6, 4, generator=torch.Generator().manual_seed(0))
    digests = [bytes([number]) * 32 for number in range(6)]
    cache = FeatureCache(tmp_path, FACTS)
    for start in (0, 2, 4):
        cache.keep(digests[start : start + 2], rows[start : start + 2])
        assert torch.equal(cache.vectors(digests[: start + 2]), rows[: start + 2])
    assert torch.equal(FeatureCache(tmp_path, FACTS).vectors(digests[::-1]), rows.flip(0))


CAPTIONS = [[1, 5, 6, 2], [1, 7, 2], [1, 56, 2], [1, 2]]


def texts(rows: list[list[int]], caches: Path) -> tuple[Tensor, list[int]]:
    """Return the vectors of captions, and the positions of the encoded ones."""
    seen: list[int] = []

    def encode(positions: list[int]) -> Tensor:
        seen.extend(positions)
        return torch.tensor([[float(sum(rows[i])), float(len(rows[i]))] for i in positions])

    cache = FeatureCache(caches, FACTS)
    compute = Compute(CPU, torch.float32, torch.float32, 2, 0, cache=cache)
    found = compute.captions(encode, rows, longest=3)
    return found, sorted(seen)


def test_captions_are_found_by_their_token_ids(gallery: Path, tmp_path: Path) -> None:
    vectors(gallery, tmp_path / "c")  # the cache also has vectors of another width
    first, encoded = texts(CAPTIONS, tmp_path / "c")
    assert encoded == [0, 1, 2, 3]
    grown = [[1, 56, 2, 2], *CAPTIONS[::-1]]
    again, encoded = texts(grown, tmp_path / "c")
    assert encoded == [0]
    assert torch.equal(again[1:], first.flip(0))
    assert again[0].tolist() == [61.0, 4.0]
    assert vectors(gallery, tmp_path / "c")[1] == 0


def test_vectors_of_any_width_and_of_half_precision(tmp_path: Path) -> None:
    random = torch.Generator().manual_seed(0)
    rows = [torch.rand(width, generator=random).half() for width in (4, 6, 4, 2, 6)]
    digests = [bytes([number]) * 32 for number in range(5)]
    cache = FeatureCache(tmp_path, FACTS)
    cache.keep_rows(digests[:3], rows[:3])
    cache.keep_rows(digests[3:], rows[3:])
    full = torch.rand(1, 4, generator=random)
    cache.keep([b"f" * 32], full)  # as wide as some float16 rows
    for one in (cache, FeatureCache(tmp_path, FACTS)):
        for found, expected in zip(one.rows(digests), rows, strict=True):
            assert found.dtype == torch.float16
            assert torch.equal(found, expected)
        assert torch.equal(one.vectors([b"f" * 32]), full)
    parts = sorted(path.suffix for path in tmp_path.rglob("*x*") if path.suffix != HASHES)
    assert parts == [".float16"] * 3 + [VECTORS]
