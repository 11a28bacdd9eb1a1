"""Vision-language embedders against sentence-transformers: vectors, scores, cache, commands."""

from __future__ import annotations

import json
import pickle
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

import pab.scoring.members
from pab.core.errors import InputError, run_cli
from pab.data.images import ImageReader, list_gallery, load_image
from pab.data.photos import photo_reader
from pab.encoders.st.extra import sentence_transformers
from pab.encoders.st.infer import InferConfig
from pab.encoders.st.loading import kind_of
from pab.encoders.st.make_small import train_tokenizer
from pab.scores import load_scores
from pab.scoring import load_encoder
from pab.scoring.members import GROUP
from pab.search.__main__ import main as search
from scripts.embed_infer import main
from tests.test_processes import run_in
from tests.vlm import CAPTIONS, images_of_many_sizes, noise, small_vlm, write_colqwen2

ORIENTATION = 0x0112  # EXIF tag; 6: the camera was turned by 90 degrees
Texts = list[dict[str, str]]


def config_of(kind: str, **settings: Any) -> InferConfig:
    given: dict[str, Any] = {
        "model": str(small_vlm(kind)), "device": "cpu", "num_workers": 0, "batch_size": 3,
        "feature_cache": False, **settings,
    }  # fmt: skip
    return InferConfig(**given)


def library_model(kind: str) -> Any:
    name = {"dense": "SentenceTransformer", "late": "MultiVectorEncoder"}[kind]
    return getattr(sentence_transformers(), name)(str(small_vlm(kind)), device="cpu")


def texts_of(captions: Sequence[str]) -> list[dict[str, str]]:
    return [{"text": caption} for caption in captions]


def plain_image(path: Path) -> Image.Image:
    """Read an image without its EXIF entries."""
    return Image.fromarray(np.asarray(load_image(path)))


def pictures_of(images: Sequence[Image.Image]) -> list[dict[str, Image.Image]]:
    return [{"image": image} for image in images]


@pytest.fixture
def gallery(tmp_path: Path) -> Path:
    folder = tmp_path / "gallery"
    folder.mkdir()
    for number, image in enumerate(images_of_many_sizes(7)):
        exif = Image.Exif()
        exif[ORIENTATION] = 6
        image.save(folder / f"G{number}.png", exif=exif)
    return folder


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Register the member `embed`; the entry points of an older installation may lack it."""
    entry = EntryPoint("embed", "pab.encoders.st.infer:InferConfig", GROUP)
    found = pab.scoring.members.entry_points(group=GROUP)
    others = [one for one in found if one.name != "embed"]
    monkeypatch.setattr(pab.scoring.members, "entry_points", lambda group: [*others, entry])


def write_queries(folder: Path, captions: Sequence[str] = CAPTIONS) -> Path:
    lines = [json.dumps({"caption": c, "query_index": f"q{i}"}) for i, c in enumerate(captions)]
    (folder / "query.json").write_text("\n".join(lines) + "\n")
    return folder / "query.json"


def run(folder: Path, gallery: Path, kind: str, *flags: str) -> Tensor:
    """Score the gallery with the command; return the scores of its file."""
    out = folder / "scores.pt"
    main([
        "--model", str(small_vlm(kind)), "--image_folder", str(gallery), "--annotation",
        str(write_queries(folder)), "--device", "cpu", "--num_workers", "0", "--batch_size", "3",
        "--save_score", str(out), "--output_file", str(folder / "list.txt"),
        "--feature_cache_dir", str(folder / "features"), *flags,
    ])  # fmt: skip
    return load_scores(out).scores


# ---------------------------------------------------------------------------------------- parity


@pytest.mark.parametrize("prompt", [None, "Find the person: "])
def test_dense_vectors_and_scores_equal_the_library(gallery: Path, prompt: str | None) -> None:
    encoder = config_of("dense", prompt=prompt, image_prompt=prompt).open()
    model, files = library_model("dense"), list_gallery(gallery)
    images = [plain_image(file.path) for file in files]  # EXIF is not applied
    expected = model.encode_document(pictures_of(images), prompt=prompt, convert_to_tensor=True)
    queries = model.encode_query(texts_of(CAPTIONS), prompt=prompt, convert_to_tensor=True)
    found, texts = encoder.encode_images(files), encoder.encode_texts(CAPTIONS)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(texts, queries, atol=1e-5, rtol=0)
    scores = encoder.similarity(texts, found)
    torch.testing.assert_close(scores, model.similarity(queries, expected), atol=1e-5, rtol=0)


def rows_of(row: Tensor, vectors: Tensor) -> Tensor:
    """Split a row into vectors of the width of ``vectors``."""
    return row.view(-1, vectors.shape[1])


@pytest.mark.parametrize("stored", ["fp32", "fp16"])
def test_late_vectors_and_scores_equal_the_library(gallery: Path, stored: str) -> None:
    encoder, model = config_of("late", vector_dtype=stored).open(), library_model("late")
    files = list_gallery(gallery)
    images = [plain_image(file.path) for file in files]
    expected = model.encode_document(pictures_of(images))
    queries = model.encode_query(texts_of(CAPTIONS))
    found, texts = encoder.encode_images(files), encoder.encode_texts(CAPTIONS)
    assert len({len(vectors) for vectors in expected}) > 1
    assert len({len(vectors) for vectors in queries}) > 1
    assert found.dtype == {"fp32": torch.float32, "fp16": torch.float16}[stored]
    tolerance = 1e-5 if stored == "fp32" else 2**-11  # unit vectors, rounded to 11 bits
    for row, vectors in zip(found.float(), expected, strict=True):
        head, rest = rows_of(row, vectors).split([len(vectors), len(row) // 16 - len(vectors)])
        torch.testing.assert_close(head, vectors, atol=tolerance, rtol=0)
        assert torch.equal(rest, head[:1].expand(len(rest), -1))
    for row, vectors in zip(texts, queries, strict=True):
        head, rest = rows_of(row, vectors).split([len(vectors), len(row) // 16 - len(vectors)])
        torch.testing.assert_close(head, vectors, atol=1e-5, rtol=0)
        assert not rest.any()
    stored_vectors = [
        rows_of(row, vectors)[: len(vectors)]
        for row, vectors in zip(found.float(), expected, strict=True)
    ]
    scores = encoder.similarity(texts, found)
    expected_scores = model.similarity(queries, stored_vectors)
    torch.testing.assert_close(scores, expected_scores, atol=1e-5, rtol=1e-6)


def test_colqwen2_of_transformers_is_a_late_model(
    gallery: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """ColQwen2 is published in the format of transformers; its processor adds the query prefix."""
    write_colqwen2(tmp_path / "model")
    encoder = config_of("late", model=str(tmp_path / "model"), vector_dtype="fp32").open()
    assert "a late-interaction model (--kind late)" in capsys.readouterr().err
    model = sentence_transformers().MultiVectorEncoder(str(tmp_path / "model"), device="cpu")
    files = list_gallery(gallery)
    expected = model.encode_document(pictures_of([plain_image(file.path) for file in files]))
    queries = model.encode_query(texts_of(CAPTIONS))
    found, texts = encoder.encode_images(files), encoder.encode_texts(CAPTIONS)
    scores = encoder.similarity(texts, found)
    torch.testing.assert_close(scores, model.similarity(queries, expected), atol=1e-5, rtol=1e-6)
    assert scores.std(dim=1).min() > 1e-3


def test_meanmaxsim_is_used_if_the_model_says_so(tmp_path: Path) -> None:
    folder = tmp_path / "mean"
    shutil.copytree(small_vlm("late"), folder)
    path = folder / "config_sentence_transformers.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"similarity_fn_name": "meanmaxsim"}))
    encoder, plain = config_of("late", model=str(folder)).open(), config_of("late").open()
    images = images_of_many_sizes(4)
    texts, vectors = encoder.encode_texts(CAPTIONS), encoder.encode_images(images)
    counts = texts.view(len(texts), -1, 16).any(-1).sum(1, keepdim=True)
    found = encoder.similarity(texts, vectors)
    torch.testing.assert_close(found, plain.similarity(texts, vectors) / counts)
    assert encoder.origin.more["similarity"] == "meanmaxsim"


@pytest.mark.parametrize("kind", ["dense", "late"])
def test_results_do_not_depend_on_the_batch_size_and_workers(gallery: Path, kind: str) -> None:
    one, two = (config_of(kind, batch_size=n, num_workers=n // 3).open() for n in (1, 6))
    files = list_gallery(gallery)
    first, second = (encoder.encode_images(files).float() for encoder in (one, two))
    torch.testing.assert_close(first, second, atol=1e-3 if kind == "late" else 1e-5, rtol=0)
    torch.testing.assert_close(one.encode_texts(CAPTIONS), two.encode_texts(CAPTIONS))


def test_dims_keeps_leading_dimensions_with_unit_length(gallery: Path) -> None:
    encoder, model = config_of("dense", dims=8).open(), library_model("dense")
    full = model.encode_query(texts_of(CAPTIONS), convert_to_tensor=True)
    expected = torch.nn.functional.normalize(full[:, :8], dim=1)
    torch.testing.assert_close(encoder.encode_texts(CAPTIONS), expected, atol=1e-5, rtol=0)
    assert encoder.encode_images(list_gallery(gallery)).shape == (7, 8)
    with pytest.raises(InputError, match="--dims: expected at most 48, found 49"):
        config_of("dense", dims=49).open()
    with pytest.raises(InputError, match="--dims: late-interaction models"):
        config_of("late", dims=8).open()


def test_captions_are_never_opened_as_files(tmp_path: Path) -> None:
    """The library would open a plain string that is a path, and download one that is a URL."""
    noise(40, 40, 0).save(tmp_path / "a.png")
    captions = [str(tmp_path / "a.png"), "https://example.invalid/a.png", "a.png"]
    encoder, model = config_of("dense").open(), library_model("dense")
    expected = model.encode_query(texts_of(captions), convert_to_tensor=True)
    torch.testing.assert_close(encoder.encode_texts(captions), expected)
    words = model.encode_query(["x"], convert_to_tensor=True)
    assert not torch.allclose(expected[0], words[0])


# ------------------------------------------------------------------------------- cache and search


@pytest.mark.parametrize("kind", ["dense", "late"])
def test_cached_vectors_are_equal_and_encode_nothing_again(
    gallery: Path, tmp_path: Path, kind: str
) -> None:
    settings: dict[str, Any] = {"feature_cache": True, "feature_cache_dir": str(tmp_path / "c")}
    files = list_gallery(gallery)
    first = config_of(kind, **settings).open()
    texts, images = first.encode_texts(CAPTIONS), first.encode_images(files)
    again = config_of(kind, **settings).open()

    def refused(*_: Any, **__: Any) -> None:
        raise AssertionError("encoded again")

    again.model.encode_document = again.model.encode_query = refused
    assert torch.equal(again.encode_texts(CAPTIONS), texts)
    assert torch.equal(again.encode_images(files), images)
    endings = {path.suffix for path in (tmp_path / "c").rglob("*x*") if path.suffix != ".sha256"}
    assert endings == ({".float32"} if kind == "dense" else {".float32", ".float16"})
    other = config_of(kind, prompt="Find: ", **settings).open()
    assert not torch.equal(other.encode_texts(CAPTIONS), texts)


@pytest.mark.parametrize("kind", ["dense", "late"])
def test_images_that_the_reader_skips_have_zero_rows(gallery: Path, kind: str) -> None:
    (gallery / "G2.png").write_bytes(b"no image")
    encoder, reader = config_of(kind).open(), ImageReader(unreadable={})
    rows = encoder.encode_images(list_gallery(gallery), reader=reader)
    assert list(reader.unreadable or ()) == ["G2"]
    assert not rows[2].any()
    assert rows[[0, 1, 3, 4, 5, 6]].any(dim=1).all()


# --------------------------------------------------------------------------------------- commands


@pytest.mark.parametrize("kind", ["dense", "late"])
def test_the_command_writes_the_librarys_scores(
    gallery: Path, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    found, model = run(tmp_path, gallery, kind), library_model(kind)
    images = [plain_image(file.path) for file in list_gallery(gallery)]
    expected = model.similarity(
        model.encode_query(texts_of(CAPTIONS)), model.encode_document(pictures_of(images))
    )
    torch.testing.assert_close(found, expected, atol=1e-5 if kind == "dense" else 5e-3, rtol=0)
    assert f"(--kind {kind})" in capsys.readouterr().err
    meta = load_scores(tmp_path / "scores.pt").meta
    assert meta["kind"] == kind
    assert len(meta["checkpoint_sha256"]) == 64
    assert len((tmp_path / "list.txt").read_text().splitlines()) == len(CAPTIONS)


@pytest.mark.parametrize("kind", ["dense", "late"])
def test_candidates_get_the_scores_of_a_full_run(gallery: Path, tmp_path: Path, kind: str) -> None:
    every = run(tmp_path, gallery, kind)
    shutil.copy(tmp_path / "scores.pt", tmp_path / "first.pt")
    shutil.rmtree(tmp_path / "features")
    flags = ("--candidates", str(tmp_path / "first.pt"), "--k_test", "2")
    found = run(tmp_path, gallery, kind, *flags)
    best = every.topk(2).indices
    chosen = found.gather(1, best)
    torch.testing.assert_close(chosen, every.gather(1, best), atol=2e-3, rtol=0)
    rest = found.scatter(1, best, torch.inf)
    rest = rest[rest.isfinite()].view(len(found), -1)
    assert (rest < chosen.amin(dim=1, keepdim=True)).all()
    assert (rest == rest[:, :1]).all()


def score_in_this_process(flags: list[str], folder: Path) -> dict[str, bool]:
    main(flags)
    return {"done": True}


@pytest.mark.distributed
def test_two_processes_write_the_same_scores(gallery: Path, tmp_path: Path) -> None:
    """Dense models use code of all members; `test_lhp_infer` tests it with several processes."""
    options = ("--no_feature_cache", "--vector_dtype", "fp32")
    alone = run(tmp_path, gallery, "late", *options)
    flags = [
        "--model", str(small_vlm("late")), "--image_folder", str(gallery), "--annotation",
        str(tmp_path / "query.json"), "--device", "cpu", "--num_workers", "0", "--batch_size", "3",
        "--save_score", str(tmp_path / "two.pt"), "--output_file", str(tmp_path / "two.txt"),
        *options,
    ]  # fmt: skip
    run_in(2, partial(score_in_this_process, flags), tmp_path)
    together = load_scores(tmp_path / "two.pt")
    torch.testing.assert_close(together.scores, alone, atol=1e-5, rtol=0)
    assert (tmp_path / "two.txt").read_text() == (tmp_path / "list.txt").read_text()


def test_photo_search_uses_the_member(
    gallery: Path, tmp_path: Path, registered: None, capsys: pytest.CaptureFixture[str]
) -> None:
    (gallery / "broken.jpg").write_bytes(b"no image")
    for kind in ("dense", "late"):
        search([
            "--model", "embed", "--arch", str(small_vlm(kind)), "--image_folder", str(gallery),
            "--query", CAPTIONS[0], "--device", "cpu", "--num_workers", "0", "--no_feature_cache",
            "--json", str(tmp_path / f"{kind}.json"),
        ])  # fmt: skip
        hits = json.loads((tmp_path / f"{kind}.json").read_text())["queries"][0]["images"]
        encoder = load_encoder("embed", checkpoint=small_vlm(kind), device="cpu", num_workers=0)
        files = [photo for photo in list_gallery(gallery) if photo.gallery_id != "broken"]
        images = encoder.encode_images(files, reader=photo_reader())
        scores = encoder.similarity(encoder.encode_texts(CAPTIONS[:1]), images)[0]
        expected = sorted(zip(scores.tolist(), files, strict=True), key=lambda one: -one[0])
        names = [file.path.name for _, file in expected]
        assert [hit["path"] for hit in hits] == names
    assert "7 images indexed, 1 not readable" in capsys.readouterr().err


# -------------------------------------------------------------------------------------- bad input


def copied(tmp_path: Path, kind: str = "dense") -> Path:
    shutil.copytree(small_vlm(kind), tmp_path / "model")
    return tmp_path / "model"


def refusal(folder: Path | str, **settings: Any) -> str:
    with pytest.raises(InputError) as raised:
        replace(config_of("dense"), model=str(folder), **settings).open()
    return str(raised.value)


def test_a_model_without_image_processor_is_refused(tmp_path: Path) -> None:
    folder = copied(tmp_path)
    (folder / "processor_config.json").unlink()
    assert "image processor" in refusal(folder)


def test_a_text_model_is_refused(tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel

    library, modules = sentence_transformers(), sentence_transformers("base.modules")
    parts = sentence_transformers("sentence_transformer.modules")
    source = tmp_path / "bert"
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertModel(BertConfig(vocab_size=400, intermediate_size=16, **sizes)).save_pretrained(source)
    train_tokenizer(CAPTIONS * 20, 400).save_pretrained(source)
    transformer = modules.Transformer(str(source))
    text_model = library.SentenceTransformer(modules=[transformer, parts.Pooling(16)])
    text_model.save(str(tmp_path / "model"))
    assert "cannot encode images, only text; it is a text model" in refusal(tmp_path / "model")


def test_other_kinds_and_bare_models_are_refused(tmp_path: Path) -> None:
    assert "found a reranker; use scripts/rerank_infer.py" in refusal(small_vlm("reranker"))
    assert refusal(small_vlm("late"), kind="dense").startswith("--kind: expected late")
    assert refusal(small_vlm("dense"), kind="late").startswith("--kind: expected dense")
    folder = copied(tmp_path)
    for name in ("modules.json", "config_sentence_transformers.json"):
        (folder / name).unlink()
    assert "do not specify how the model makes vectors" in refusal(folder)
    assert "do not specify how the model makes vectors" in refusal(folder, kind="late")
    settings = json.loads((folder / "config.json").read_text())
    assert kind_of(folder) == "bare"
    for architecture in ("ColQwen2ForRetrieval", "HF_ColBERT"):
        (folder / "config.json").write_text(
            json.dumps(settings | {"architectures": [architecture]})
        )
        assert kind_of(folder) == "late"
    (folder / "config.json").write_text("[]")
    assert "expected a JSON dict, found list" in refusal(folder)
    (folder / "config.json").unlink()
    assert "found no config.json" in refusal(folder)


def test_missing_and_misshapen_weights_are_refused(tmp_path: Path) -> None:
    """transformers initializes missing weights at random and prints only a warning."""
    folder = copied(tmp_path)
    state = load_file(folder / "model.safetensors")
    name = next(name for name in state if "layers.0" in name)
    save_file({k: v for k, v in state.items() if k != name}, folder / "model.safetensors")
    assert "weights missing or of another shape: 1" in refusal(folder)
    save_file(state | {name: torch.zeros(3)}, folder / "model.safetensors")
    assert "weights missing or of another shape: 1" in refusal(folder)
    (folder / "model.safetensors").write_bytes(b"damaged")
    assert "cannot be loaded" in refusal(folder)


def test_code_of_the_folder_is_not_run(tmp_path: Path) -> None:
    folder = copied(tmp_path)
    modules = json.loads((folder / "modules.json").read_text())
    modules[1]["type"] = "evil.Pooling"
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "evil.py").write_text("raise SystemExit('was run')")
    assert "cannot be loaded" in refusal(folder)


class Touch:
    """Object whose unpickling would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_pickled_code_is_not_run(tmp_path: Path) -> None:
    folder = copied(tmp_path, "late")
    (weights,) = folder.glob("*Dense/model.safetensors")
    weights.unlink()
    made = tmp_path / "made"
    (weights.parent / "pytorch_model.bin").write_bytes(pickle.dumps(Touch(made), protocol=2))
    assert "cannot be loaded" in refusal(folder)
    assert not made.exists()


def test_a_damaged_chat_template_is_refused(tmp_path: Path) -> None:
    folder = copied(tmp_path)
    (folder / "chat_template.jinja").write_text("{% for")
    assert "its processor rejects a plain caption or image" in refusal(folder)


@pytest.mark.parametrize("flag", ["prompt", "image_prompt"])
def test_control_tokens_in_an_instruction_are_refused(flag: str) -> None:
    with pytest.raises(InputError, match=rf"--{flag}, .*contains '<\|image_pad\|>'"):
        config_of("dense", **{flag: "Look at <|image_pad|>"}).open()


@pytest.mark.parametrize("name", ["/no/such/folder", "nobody/nothing"])
def test_a_model_that_is_nowhere_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert refusal(name).startswith(f"--model: {name} is neither a folder nor available on the hub")


def test_a_proxy_that_cannot_be_reached_is_an_input_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """The HTTP client of the hub's library raises errors of its own, which are not OSErrors."""
    import huggingface_hub

    class ProxyError(Exception):
        """Error of an HTTP client."""

    def refuse(*_: object, **__: object) -> None:
        raise ProxyError("403 Forbidden")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    assert "available on the hub (403 Forbidden)" in refusal("nobody/nothing")


@pytest.mark.parametrize("kind", ["dense", "late"])
def test_an_image_that_the_processor_rejects_is_named(gallery: Path, kind: str) -> None:
    noise(900, 3, 1).save(gallery / "G3.png")
    encoder = config_of(kind).open()
    with pytest.raises(
        InputError, match=r"G3\.png: the model cannot process it \(900 x 3 pixels\)"
    ):
        encoder.encode_images(list_gallery(gallery))
    with pytest.raises(InputError, match="image 0: the model cannot process it"):
        encoder.encode_images([noise(900, 3, 1)])
    with pytest.raises(InputError, match="expected a path or a PIL image, found Tensor"):
        encoder.encode_images([torch.rand(3, 8, 8)])


def test_control_tokens_in_a_caption_are_refused() -> None:
    encoder = config_of("dense").open()
    with pytest.raises(InputError, match=r"text 'a <.*: contains '<\|image_pad\|>'"):
        encoder.encode_texts(["a man", "a <|image_pad|> man"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--candidates", "missing.pt"], "missing.pt"),
        (["--dims", "0"], "--dims"),
        (["--kind", "colbert"], "--kind"),
        (["--cache_dir", "/dev/null/x"], "--cache_dir"),
    ],
)
def test_bad_flags_end_with_one_line(
    gallery: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    message: str,
) -> None:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run_cli(lambda _: run(tmp_path, gallery, "late", *flags) and None)
    assert stop.value.code == 2
    (line,) = [one for one in capsys.readouterr().err.splitlines() if one.startswith("error: ")]
    assert message in line
    assert not (tmp_path / "scores.pt").exists()


def test_without_the_library_the_command_that_installs_it_is_named(
    gallery: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(InputError, match=r"\[vlm\]"):
        run(tmp_path, gallery, "dense")
