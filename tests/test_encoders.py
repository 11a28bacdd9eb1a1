"""The common interface of members: image inputs, names, fingerprints, reranking."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

import pab.scoring.members
import uit.rerank
from pab.core.errors import InputError
from pab.data.images import list_gallery, load_image, recipe
from pab.data.records import GalleryImage
from pab.scores import load_scores
from pab.scoring import Encoder, Origin, load_encoder
from pab.scoring.__main__ import main as score
from pab.scoring.members import member_config, members
from pab.scoring.rerank import Reranker, rerank_best
from uit.infer import InferConfig as UitConfig

ROOT = Path(__file__).resolve().parents[1]
ON_CPU: dict[str, Any] = {"device": "cpu", "num_workers": 0}
SETTINGS: dict[str, dict[str, Any]] = {
    "lhp": {"config": ROOT / "configs/lhp/mini_infer.yaml"},
    "uit": {"config": ROOT / "configs/uit/mini_infer.yaml"},
    "clip": {"checkpoint": ROOT / "checkpoints/mini/clip"},
    "blip2": {"model": "mini", "text_encoder": "checkpoints/mini/bert", "query_pooling": "max"},
}
CAPTIONS = ["A man in a red coat is falling in the park.", "A woman in a blue coat is walking."]


@pytest.fixture(scope="module")
def encoders() -> dict[str, Encoder]:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)  # paths in the mini configs are relative to the repository
        return {name: load_encoder(name, **SETTINGS[name], **ON_CPU) for name in SETTINGS}


@pytest.fixture
def gallery(tiny_data: Path) -> list[GalleryImage]:
    return list_gallery(tiny_data / "name-masked_test-set/gallery")[:5]


def preprocessed(encoder: Any, image: Image.Image) -> Tensor:
    if hasattr(encoder, "clip"):
        return encoder.clip.transform(image)
    if hasattr(encoder, "transform"):
        return encoder.transform(image)
    name = "beit3" if "beit3" in encoder.origin.architecture else "uit"
    return recipe(name, 64).transform()(image)


# -------------------------------------------------------------------------------- the four members


@pytest.mark.parametrize("name", SETTINGS)
def test_all_kinds_of_images_give_the_same_vectors(
    name: str, encoders: dict[str, Encoder], gallery: list[GalleryImage]
) -> None:
    encoder, paths = encoders[name], [image.path for image in gallery]
    expected = encoder.encode_images(gallery)
    assert expected.dtype == torch.float32
    assert expected.shape[0] == len(gallery)
    assert expected.std(dim=0).max() > 1e-3, "vectors must differ between images"
    opened = [Image.open(path) for path in paths]
    pixels = [preprocessed(encoder, load_image(path)) for path in paths]
    mixed = [str(paths[0]), paths[1], opened[2], pixels[3], gallery[4]]
    for images in (paths, [str(p) for p in paths], opened, pixels, torch.stack(pixels), mixed):
        assert torch.equal(encoder.encode_images(images), expected)  # type: ignore[arg-type]
    (expected * torch.ones(1, requires_grad=True)).sum().backward()
    alone = encoder.encode_images(paths[0])  # type: ignore[arg-type]
    torch.testing.assert_close(alone, expected[:1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", SETTINGS)
def test_scores_are_those_of_the_scoring_command(
    name: str, encoders: dict[str, Encoder], tiny_data: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(ROOT)
    masked = tiny_data / "name-masked_test-set"
    flags = {
        "image_folder": masked / "gallery", "annotation": masked / "query.json", **ON_CPU,
        "save_score": tmp_path / "s.pt", "output_file": "none", "answers": "none",
        **SETTINGS[name],
    }  # fmt: skip
    if name == "clip":
        flags["model"] = f"local-dir:{flags.pop('checkpoint')}"
    if name == "uit":
        flags |= {"save_itc": tmp_path / "itc.pt", "candidates": "none", "k_test": 3}
    score([name, *(word for key, value in flags.items() for word in (f"--{key}", str(value)))])
    file = load_scores(tmp_path / ("itc.pt" if name == "uit" else "s.pt"))
    encoder = encoders[name]
    assert file.meta["model"] == encoder.origin.architecture
    assert file.meta["checkpoint_sha256"] == encoder.origin.checkpoint_sha256 != ""
    lines = (masked / "query.json").read_text().splitlines()
    texts = encoder.encode_texts([json.loads(line)["caption"] for line in lines])
    images = encoder.encode_images(list_gallery(masked / "gallery"))
    torch.testing.assert_close(encoder.similarity(texts, images), file.scores, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", SETTINGS)
def test_one_caption_is_not_split_into_characters(name: str, encoders: dict[str, Encoder]) -> None:
    texts = encoders[name].encode_texts(CAPTIONS)
    alone = encoders[name].encode_texts(CAPTIONS[1])
    # A probe can be trained on the vectors, because they are not inference tensors.
    (texts * torch.ones(1, requires_grad=True)).sum().backward()
    torch.testing.assert_close(texts.norm(dim=1), torch.ones(2), rtol=0, atol=1e-5)
    torch.testing.assert_close(alone, texts[1:], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_fingerprint_names_all_that_vectors_depend_on(
    name: str, encoders: dict[str, Encoder], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    facts = dict(encoders[name].fingerprint)
    assert encoders[name].origin.checkpoint_sha256 in facts.values()
    assert (facts["device"], facts["dtype"]) == ("cpu", "fp32")
    half = load_encoder(name, **SETTINGS[name], **ON_CPU, dtype="bf16")
    assert dict(half.fingerprint) == {**facts, "dtype": "bf16"}


def test_vectors_are_cached_on_request_and_only_for_files(
    gallery: list[GalleryImage], tmp_path: Path
) -> None:
    def kept() -> int:
        return sum(path.stat().st_size for path in tmp_path.rglob("*.sha256")) // 32

    settings = {**SETTINGS["clip"], **ON_CPU, "feature_cache_dir": str(tmp_path / "f")}
    load_encoder("clip", **settings).encode_images(gallery)
    assert list(tmp_path.iterdir()) == []
    encoder = load_encoder("clip", **settings, feature_cache=True)
    found = [encoder.encode_images([Image.open(image.path) for image in gallery])]
    assert kept() == 0
    found += [encoder.encode_images(gallery), encoder.encode_images(gallery)]
    assert kept() == len(gallery)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[1], found[2])
    (facts,) = tmp_path.rglob("encoder.json")
    assert json.loads(facts.read_text()).items() >= dict(encoder.fingerprint).items()


def test_vectors_of_a_folder_of_weights_are_not_cached(
    gallery: list[GalleryImage], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder of weights has no hash, so the cache could not detect changed weights."""
    monkeypatch.chdir(ROOT)
    (tmp_path / "w").mkdir()
    shutil.copy("checkpoints/mini/blip2.safetensors", tmp_path / "w/model.safetensors")
    settings = {**SETTINGS["blip2"], **ON_CPU, "feature_cache": True}
    settings |= {"feature_cache_dir": str(tmp_path / "f")}
    encoder = load_encoder("blip2", checkpoint=tmp_path / "w", **settings)
    encoder.encode_images(gallery)
    assert not (tmp_path / "f").exists()
    assert encoder.fingerprint["checkpoint"] == str(tmp_path / "w")


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        ("nowhere.jpg", "nowhere.jpg: expected an image, found no such file"),
        (torch.zeros(1, 8, 8), r"position 0: expected a preprocessed tensor \[3, 64, 64\] .*\[1,"),
        (torch.zeros(3, 8, 8, dtype=torch.uint8), r"found torch.uint8 \[3, 8, 8\]"),
        (b"JFIF", "position 0: expected a path, a PIL image or a tensor, found bytes"),
    ],
)
def test_images_that_cannot_be_encoded(
    encoders: dict[str, Encoder], image: Any, expected: str
) -> None:
    with pytest.raises(InputError, match=expected):
        encoders["clip"].encode_images([image])


@pytest.mark.parametrize("name", SETTINGS)
def test_a_tensor_must_have_the_size_of_the_model(name: str, encoders: dict[str, Encoder]) -> None:
    pixels = [torch.zeros(3, 64, 64), torch.zeros(3, 48, 48)]
    expected = r"position 1: expected a preprocessed tensor \[3, 64, 64\].*found .* \[3, 48, 48\]"
    for images in (pixels, [Image.new("RGB", (9, 9)), pixels[1]]):
        with pytest.raises(InputError, match=expected):
            encoders[name].encode_images(images)


@pytest.mark.parametrize("name", SETTINGS)
def test_empty_input_is_refused(name: str, encoders: dict[str, Encoder]) -> None:
    with pytest.raises(InputError, match="images: expected at least one, found none"):
        encoders[name].encode_images([])
    with pytest.raises(InputError, match="captions: expected at least one, found none"):
        encoders[name].encode_texts([])


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize(
    ("caption", "found"),
    [(None, "NoneType"), (float("nan"), "float"), (b"a", "bytes"), ("\ud83d", "surrogate pair")],
)
def test_captions_must_be_texts(
    name: str, encoders: dict[str, Encoder], caption: Any, found: str
) -> None:
    with pytest.raises(InputError, match=f"captions, position 1: expected .*{found}"):
        encoders[name].encode_texts(["a man", caption])


# ------------------------------------------------------------------------------- lookup by name


def test_members_are_found_by_name() -> None:
    assert {"blip2", "clip", "embed", "lhp", "uit"} <= set(members())
    for name in members():
        assert callable(member_config(name).open)
    with pytest.raises(InputError, match=r"one of .*blip2, clip, embed, lhp, uit.*, found 'clap'"):
        load_encoder("clap")


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        ([], r"found none; the installation is outdated; run bash scripts/setup\.sh"),
        (["pab.nothing:A"], r"pab\.nothing:A, member 'x': cannot be imported: No module named"),
        (["pab.scores:Nothing"], r"member 'x': cannot be imported: .*Nothing"),
        (["pab.scores:load_scores"], r"expected a subclass of pab\.scoring\.MemberConfig, found"),
        (["a:A", "b:B"], r"member 'x': two packages define this member: a:A and b:B"),
    ],
)
def test_broken_installations_are_refused(
    entries: list[str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = [EntryPoint("x", value, pab.scoring.members.GROUP) for value in entries]
    monkeypatch.setattr(pab.scoring.members, "entry_points", lambda group: found)
    with pytest.raises(InputError, match=expected):
        load_encoder("x")


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"devise": "cpu"}, "unknown setting 'devise'.*'device'"),
        ({"batch_size": "8"}, "--batch_size: "),
        ({"batch_size": 0}, "--batch_size: "),
        ({"checkpoint": "nothing.pth"}, "nothing.pth"),
        ({"device": "tpu"}, "--device: "),
        ({"annotation": "a.json", "top_k": 3}, "an encoder does not use annotation, top_k"),
        ({"checkpoint": "a.pt", "pretrained": "b.pt"}, "checkpoint='a.pt' also sets pretrained"),
        ({"checkpoint": 3}, "unknown setting 'checkpoint'"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], expected: str) -> None:
    with pytest.raises(InputError, match=expected):
        load_encoder("clip", **settings)


# ------------------------------------------------------------------------------------ reranking


class ByPlace(Reranker):
    """Reranker that scores pairs by the length of the caption and the position of the image."""

    origin = Origin("place")

    def rerank(
        self, captions: Sequence[str], images: Sequence[GalleryImage], candidates: Tensor
    ) -> Tensor:
        lengths = torch.tensor([[float(len(caption))] for caption in captions])
        return lengths - candidates


def test_a_reranker_scores_only_pairs(gallery: list[GalleryImage]) -> None:
    first = torch.tensor([[0.1, 0.9, 0.2, 0.8, 0.3], [0.5, 0.4, 0.3, 0.2, 0.1]])
    found = rerank_best(ByPlace(), ["ten", "a"], gallery, first, 2)
    below = [torch.nextafter(torch.tensor(low), torch.tensor(-torch.inf)) for low in (0.0, 0.0)]
    assert found[0].tolist() == [below[0], 2.0, below[0], 0.0, below[0]]
    assert found[1].tolist() == [1.0, 0.0, below[1], below[1], below[1]]
    with pytest.raises(InputError, match="--candidates: expected a score file or a ranked list"):
        ByPlace().first_scores(["ten", "a"], gallery)


def test_the_cross_encoder_encodes_a_gallery_once(
    gallery: list[GalleryImage], encoders: dict[str, Encoder], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    true_encode = uit.rerank.encode_gallery

    def counting(model: Any, images: Sequence[GalleryImage], *more: Any, **options: Any) -> Any:
        seen.append(len(images))
        return true_encode(model, images, *more, **options)

    monkeypatch.setattr("uit.rerank.encode_gallery", counting)
    monkeypatch.chdir(ROOT)
    bert, weights = "checkpoints/mini/bert", "checkpoints/mini/uit.safetensors"
    config = UitConfig(
        model="uit_mini", input_size=64, window=4, checkpoint=weights, text_encoder=bert,
        max_words=72, max_text_length=72, num_workers=0, device="cpu",
    )  # fmt: skip
    reranker = uit.rerank.open_reranker(config)
    itc = reranker.first_scores(CAPTIONS, gallery)
    torch.testing.assert_close(
        itc, encoders["uit"].encode_texts(CAPTIONS) @ encoders["uit"].encode_images(gallery).T,
        rtol=0, atol=1e-5,
    )  # fmt: skip
    pairs = torch.tensor([[0, 4], [3, 1]])
    both = reranker.rerank(CAPTIONS, gallery, pairs)
    assert seen == [len(gallery)]
    turned = reranker.rerank(CAPTIONS, gallery, pairs.flip(1))
    torch.testing.assert_close(turned, both.flip(1), rtol=0, atol=1e-5)
    assert (both[0] - both[1]).abs().max() > 1e-3
    other = reranker.rerank(CAPTIONS, gallery[::-1], len(gallery) - 1 - pairs)
    assert seen == [len(gallery)] * 2
    torch.testing.assert_close(other, both, rtol=0, atol=1e-5)
