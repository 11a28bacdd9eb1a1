"""Pair scores of a small vision-language model: parity with sentence-transformers, answer tokens,
chat templates without pair roles, and folders of other models."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from pab.core.errors import InputError
from pab.encoders.st.pair_inputs import PROMPT, QUESTION, PairModel, read_settings
from pab.encoders.st.reranker import LibraryPairModel
from tests.small_reranker import CAPTIONS, make_reranker

SIZES = [(50, 100), (60, 60), (200, 90), (33, 80)]  # width, height
USER_ONLY = """\
{%- for message in messages -%}{%- if message.role in ('system', 'user') -%}
{%- for part in message.content -%}{%- if part.type == 'image' -%}
<|vision_start|><|image_pad|><|vision_end|>{%- else -%}{{ part.text }}{%- endif -%}
{%- endfor -%}{%- endif -%}{%- endfor -%}"""
TEXT_ONLY = """\
{%- for message in messages -%}{%- for part in message.content -%}
{{ part.text }}{%- endfor -%}{%- endfor -%}"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a small reranker whose scores differ between pairs."""
    return make_reranker(tmp_path_factory.mktemp("vlm") / "reranker")


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    """Return a copy of the model's folder that a test may change."""
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def pictures() -> list[Image.Image]:
    """Draw an image of random pixels per size."""
    draw = np.random.default_rng(3)
    return [
        Image.fromarray(draw.integers(0, 255, (height, width, 3), np.uint8))
        for width, height in SIZES
    ]


def single(model: PairModel) -> Tensor:
    """Score the pairs one by one, without padding."""
    pairs = zip(CAPTIONS, pictures(), strict=True)
    with torch.inference_mode():
        return torch.cat([model.scores(model.inputs([text], [image])) for text, image in pairs])


def batched(model: PairModel) -> Tensor:
    """Score the pairs in one batch, with padding."""
    with torch.inference_mode():
        return model.scores(model.inputs(CAPTIONS, pictures()))


def test_scores_are_the_logits_of_a_plain_forward_pass(folder: Path) -> None:
    """Single, batched, left-padded and mixed-size pairs have the logits of the library's model."""
    from sentence_transformers import CrossEncoder

    model, library = PairModel.open(folder), CrossEncoder(str(folder), device="cpu")
    inputs = model.inputs(CAPTIONS, pictures())
    assert not inputs["attention_mask"][:, 0].all(), "no row is padded"
    assert len(inputs["image_grid_thw"].unique(dim=0)) > 1, "all images have the same size"
    pairs = [
        ({"text": text}, {"image": image}) for text, image in zip(CAPTIONS, pictures(), strict=True)
    ]
    wanted = library.predict(
        pairs, prompt=PROMPT, activation_fn=torch.nn.Identity(), convert_to_tensor=True
    )
    assert wanted.std() > 0.05
    torch.testing.assert_close(batched(model), wanted, rtol=0, atol=1e-4)
    torch.testing.assert_close(single(model), wanted, rtol=0, atol=1e-4)


def test_answers_are_single_tokens_of_the_tokenizer(folder: Path) -> None:
    """The folder's ids are those of "yes" and "no"; the flags replace them."""
    model = PairModel.open(folder)
    assert model.processor.tokenizer.encode("yes") == [model.tokens.yes]
    assert model.processor.tokenizer.encode("no") == [model.tokens.no]
    swapped = PairModel.open(folder, yes_token="no", no_token="yes")
    torch.testing.assert_close(batched(swapped), -batched(model))


def test_scores_have_gradients(folder: Path) -> None:
    """Fine-tuning computes its loss from the same scores."""
    model = PairModel.open(folder)
    model.scores(model.inputs(CAPTIONS[:1], pictures()[:1])).sum().backward()
    assert all(p.grad is not None for p in model.model.get_input_embeddings().parameters())


@pytest.mark.parametrize("word", [" yes", "", "yes and no"])
def test_an_answer_of_several_tokens_is_refused(folder: Path, word: str) -> None:
    """An answer of several tokens has no logit of its own."""
    with pytest.raises(InputError, match=r"^--yes_token: expected the text of one token"):
        PairModel.open(folder, yes_token=word)


def test_equal_answers_are_refused(folder: Path) -> None:
    """The difference of their logits would always be 0."""
    with pytest.raises(InputError, match=r"^--yes_token: is the same token as --no_token"):
        PairModel.open(folder, yes_token="no")


def test_without_settings_the_usual_answers_are_assumed(
    copy: Path, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A plain vision-language model has no modules.json."""
    (copy / "modules.json").unlink()
    torch.testing.assert_close(batched(PairModel.open(copy)), batched(PairModel.open(folder)))
    assert "note: --yes_token: the model's configuration names no answer" in capfd.readouterr().err


def test_a_template_without_pair_roles_gets_one_user_message(copy: Path) -> None:
    """The instruction, the caption and the image all reach the model."""
    (copy / "chat_template.jinja").write_text(USER_ONLY)
    model = PairModel.open(copy)
    assert not model.pair_roles
    inputs = model.inputs(CAPTIONS[:1], pictures()[:1])
    text = model.processor.tokenizer.decode(inputs["input_ids"][0])
    assert PROMPT in text
    assert QUESTION in text
    assert CAPTIONS[0] in text
    assert "<|image_pad|>" in text
    other = model.inputs(CAPTIONS[:1], pictures()[1:2])
    assert not torch.equal(model.scores(inputs), model.scores(other))


def test_a_template_without_images_is_refused(copy: Path) -> None:
    """Otherwise, the score would not depend on the image."""
    (copy / "chat_template.jinja").write_text(TEXT_ONLY)
    with pytest.raises(InputError, match=r"chat template renders no image"):
        PairModel.open(copy)


def test_another_kind_of_model_is_refused(copy: Path) -> None:
    """An embedder's modules do not answer with a token."""
    modules = json.loads((copy / "modules.json").read_text())
    modules[1]["type"] = "sentence_transformers.sentence_transformer.modules.pooling.Pooling"
    (copy / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(InputError, match=r"modules.json: expected a reranker .*found .*Pooling"):
        PairModel.open(copy)


def test_a_model_of_text_alone_is_refused(tmp_path: Path, copy: Path) -> None:
    """Such a model cannot read the image."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=400, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "text")
    AutoTokenizer.from_pretrained(copy).save_pretrained(tmp_path / "text")
    with pytest.raises(InputError, match=r"expected a model of images and text, found Llama"):
        PairModel.open(tmp_path / "text")


@pytest.mark.parametrize("name", ["processor_config.json", "tokenizer.json", "chat_template.jinja"])
def test_a_missing_part_of_the_processor_is_named(copy: Path, name: str) -> None:
    """Pairs cannot be prepared without it."""
    (copy / name).unlink()
    with pytest.raises(InputError, match=r"expected a model with|the model cannot be loaded"):
        PairModel.open(copy)


@pytest.mark.parametrize("kind", [PairModel, LibraryPairModel])
def test_a_missing_weight_is_named(copy: Path, kind: type[PairModel]) -> None:
    """transformers would initialize it at random, with only a warning."""
    from safetensors.torch import load_file, save_file

    weights = load_file(copy / "model.safetensors")
    name = next(name for name in weights if "mlp" in name)
    del weights[name]
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        InputError, match=r"weight '.*mlp.*': weights missing or of another shape: 1"
    ):
        kind.open(copy)


@pytest.mark.parametrize("kind", [PairModel, LibraryPairModel])
@pytest.mark.parametrize("name", ["modules.json", "config.json", "sentence_bert_config.json"])
def test_a_damaged_file_is_named(copy: Path, kind: type[PairModel], name: str) -> None:
    (copy / name).write_text("{")
    with pytest.raises(InputError, match=str(copy)):
        kind.open(copy)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config_sentence_transformers.json", {"prompts": ["a"]}),
        ("config_sentence_transformers.json", {"prompts": {"tuned": 3}}),
        ("modules.json", ["Transformer", 2]),
        ("1_LogitScore/config.json", {"true_token_id": "yes"}),
        ("sentence_bert_config.json", {"processing_kwargs": [1]}),
        ("sentence_bert_config.json", {"processing_kwargs": {"chat_template": 1}}),
    ],
)
def test_a_setting_of_another_type_is_named(copy: Path, name: str, content: object) -> None:
    assert (copy / name).is_file()
    (copy / name).write_text(json.dumps(content))
    with pytest.raises(InputError, match=rf"{copy / name}: .*expected"):
        read_settings(copy)


@pytest.mark.parametrize("kind", [PairModel, LibraryPairModel])
def test_settings_that_the_processor_rejects_are_named(copy: Path, kind: type[PairModel]) -> None:
    """Otherwise, the error would blame every image."""
    path = copy / "sentence_bert_config.json"
    settings = json.loads(path.read_text())
    settings["processing_kwargs"]["image"] = {"size": "x"}
    path.write_text(json.dumps(settings))
    with pytest.raises(InputError, match=f"{copy}: its processor rejects a plain"):
        kind.open(copy)


def test_a_control_token_in_the_instruction_is_named(folder: Path) -> None:
    with pytest.raises(InputError, match=r"--prompt, text .*: contains '<\|image_pad\|>'"):
        PairModel.open(folder, prompt="Look at <|image_pad|>.")


def test_an_unknown_name_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The name is neither a folder nor in the hub's local cache."""
    from pab.encoders.st.folders import model_folder

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=r"--model: nobody/nothing is neither a folder"):
        model_folder("nobody/nothing")
    with pytest.raises(InputError, match=r"--model: .* is neither a folder"):
        model_folder("no such folder")
