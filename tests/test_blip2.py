"""The port of BLIP-2: LAVIS's parameter names, poolings, captions, and the ViT-g model."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import Blip2Config as HubBlip2Config
from transformers import Blip2ForImageTextRetrieval, Blip2QFormerConfig, Blip2VisionConfig

from pab.core.errors import InputError
from pab.encoders.blip2.model import Blip2, Blip2Config, load_blip2, renamed
from pab.encoders.blip2.vit_g import load_vit_g
from pab.encoders.captions import blip_caption
from pab.encoders.pooling import pooled_similarity
from scripts import blip2_infer

ROOT = Path(__file__).resolve().parents[1]
TINY = Blip2Config(
    image_size=28, image_width=32, image_layers=2, image_heads=2, queries=4, width=32, layers=4,
    heads=2, ffn_dim=64, vocab_size=60, positions=24, embed_dim=8,
)  # fmt: skip


@pytest.fixture(scope="module")
def model() -> Blip2:
    torch.manual_seed(0)
    made = Blip2(TINY).eval()
    for parameter in made.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return made


def lavis_state(model: Blip2) -> dict[str, Tensor]:
    """Return the weights under LAVIS's names, with the unused entries of its checkpoints."""
    state = {}
    for name, tensor in model.state_dict().items():
        if name == "temp":
            continue
        name = name.replace("qformer.layernorm.", "Qformer.bert.embeddings.LayerNorm.")
        name = name.replace("qformer.encoder.", "Qformer.bert.encoder.")
        name = name.replace("attention.attention.", "attention.self.")
        if name.startswith("embeddings."):
            name = f"Qformer.bert.{name}"
        state[name] = tensor
    state["Qformer.bert.embeddings.position_ids"] = torch.arange(TINY.positions)[None]
    state["Qformer.cls.predictions.bias"] = torch.zeros(TINY.vocab_size)
    state["itm_head.weight"] = torch.zeros(2, TINY.width)
    return state


def test_lavis_names_load_strictly(model: Blip2, tmp_path: Path) -> None:
    state = lavis_state(model)
    assert "Qformer.bert.encoder.layer.2.crossattention.self.key.weight" in state
    assert "Qformer.bert.encoder.layer.1.intermediate_query.dense.weight" in state
    assert renamed(state).keys() == model.state_dict().keys() - {"temp"}
    torch.save({"model": state}, tmp_path / "lavis.pth")
    loaded = load_blip2(TINY, tmp_path / "lavis.pth")
    pixels, ids = torch.randn(3, 3, 28, 28), torch.randint(0, 60, (2, 7))
    mask = torch.ones_like(ids)
    with torch.inference_mode():
        assert torch.equal(loaded.encode_queries(pixels), model.encode_queries(pixels))
        assert torch.equal(loaded.encode_text(ids, mask), model.encode_text(ids, mask))
    del state["ln_vision.weight"]
    torch.save({"model": state}, tmp_path / "short.pth")
    with pytest.raises(InputError, match=r"1 missing: ln_vision\.weight"):
        load_blip2(TINY, tmp_path / "short.pth")


def test_a_checkpoint_without_its_frozen_image_tower(model: Blip2, tmp_path: Path) -> None:
    state = lavis_state(model)
    tower = {n.removeprefix("visual_encoder."): t for n, t in state.items() if "visual_enc" in n}
    beyond = {"transformer.resblocks.21.ln_1.weight": torch.ones(32), "proj": torch.ones(32, 8)}
    torch.save({"model": {n: t for n, t in state.items() if "visual_enc" not in n}}, tmp_path / "q")
    torch.save({**tower, **beyond}, tmp_path / "tower.pth")
    loaded = load_blip2(TINY, tmp_path / "q", tmp_path / "tower.pth")
    pixels = torch.randn(2, 3, 28, 28)
    with torch.inference_mode():
        assert torch.equal(loaded.encode_queries(pixels), model.encode_queries(pixels))
    with pytest.raises(InputError, match=r"missing: visual_encoder\.class_embedding"):
        load_blip2(TINY, tmp_path / "q")
    with pytest.raises(InputError, match="no_tower"):
        load_blip2(TINY, tmp_path / "q", tmp_path / "no_tower.pth")
    del tower["conv1.weight"]
    torch.save(tower, tmp_path / "short.pth")
    with pytest.raises(InputError, match=r"short.*1 missing: conv1\.weight"):
        load_blip2(TINY, tmp_path / "q", tmp_path / "short.pth")


def test_padding_changes_no_text_vector(model: Blip2) -> None:
    ids = torch.randint(1, 60, (2, 7))
    longer = torch.cat([ids, torch.zeros(2, 5, dtype=torch.int64)], dim=1)
    mask = (torch.arange(12) < 7).long().expand(2, -1)
    with torch.inference_mode():
        short, padded = (
            model.encode_text(ids, torch.ones_like(ids)),
            model.encode_text(longer, mask),
        )
    torch.testing.assert_close(short, padded, rtol=0, atol=1e-5)


def test_poolings() -> None:
    torch.manual_seed(0)
    images, texts = torch.randn(5, 4, 8), torch.randn(3, 8)
    every = torch.einsum("qe,gke->qgk", texts, images)
    torch.testing.assert_close(pooled_similarity(images, texts, "first"), every[..., 0])
    torch.testing.assert_close(pooled_similarity(images, texts, "max"), every.amax(dim=-1))


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("A Man falls.", "a man falls"),
        ('He said: "Stop!" (twice) #1 * ~ ; done', "he said stop twice 1 done"),
        ("red-and-blue, isn't it?", "red-and-blue, isn't it?"),
        ("  two  blanks\t\tand a line\n\n", "two blanks and a line"),
        (" ".join(f"w{i}" for i in range(60)), " ".join(f"w{i}" for i in range(50))),
    ],
)
def test_captions(caption: str, expected: str) -> None:
    assert blip_caption(caption) == expected


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--backend", "lavis"], r"LAVIS is not installed .*bash scripts/setup_lavis\.sh"),
        (["--backend", "lavis", "--model", "mini"], "LAVIS has no mini model"),
        (["--backend", "lavis", "--dtype", "bf16"], "expected auto: LAVIS"),
        (["--model", "mini", "--pretrained", "nothing.pth"], r"nothing\.pth"),
        (["--model", "pretrain_vitL"], r"692 pieces, but the model embeds 30523"),
        (["--model", "pretrain_vitG"], "pretrain_vitG"),
    ],
)
def test_bad_flags_are_refused(
    tiny_data: Path, flags: list[str], expected: str, refused: Callable[..., str], tmp_path: Path
) -> None:
    masked = tiny_data / "name-masked_test-set"
    bert = ["--text_encoder", str(ROOT / "checkpoints/mini/bert"), "--device", "cpu"]
    data = ["--image_folder", str(masked / "gallery"), "--annotation", str(masked / "query.json")]
    outputs = ["--save_score", str(tmp_path / "s.pt"), "--output_file", str(tmp_path / "l.txt")]
    assert re.search(expected, refused(blip2_infer.main, [*data, *bert, *outputs, *flags]))
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def vit_g(tmp_path_factory: pytest.TempPathFactory) -> tuple[Blip2ForImageTextRetrieval, Path]:
    """A small random model in the format of the hub's ViT-g, and the folder it is saved in."""
    qformer = Blip2QFormerConfig(
        vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=24, encoder_hidden_size=24,
        use_qformer_text_input=True,
    )  # fmt: skip
    vision = Blip2VisionConfig(
        hidden_size=24, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        image_size=28, patch_size=14,
    )  # fmt: skip
    config = HubBlip2Config(
        vision_config=vision.to_dict(), qformer_config=qformer.to_dict(), num_query_tokens=4,
        image_text_hidden_size=8,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Blip2ForImageTextRetrieval(config).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    folder = tmp_path_factory.mktemp("vit_g")
    model.save_pretrained(folder)
    return model, folder


@torch.inference_mode()
def test_vit_g_gives_the_vectors_of_transformers(
    vit_g: tuple[Blip2ForImageTextRetrieval, Path],
) -> None:
    theirs, folder = vit_g
    ours = load_vit_g(str(folder))
    pixels, ids = torch.randn(3, 3, 28, 28), torch.randint(1, 60, (2, 7))
    mask = (torch.arange(7) < torch.tensor([[7], [5]])).long()
    images, texts = ours.encode_queries(pixels), ours.encode_text(ids, mask)
    expected = theirs(pixel_values=pixels, input_ids=ids, attention_mask=mask)
    torch.testing.assert_close(images, expected.image_embeds, rtol=0, atol=1e-6)
    torch.testing.assert_close(texts, expected.text_embeds, rtol=0, atol=1e-6)
    best = pooled_similarity(images, texts, "max")
    torch.testing.assert_close(best, expected.logits_per_text, rtol=0, atol=1e-6)
    assert (images[0, 0] - images[0, 1]).abs().max() > 0.01


def test_an_incomplete_or_missing_vit_g_is_refused(
    vit_g: tuple[Blip2ForImageTextRetrieval, Path], tmp_path: Path
) -> None:
    theirs, _ = vit_g
    state = {n: t for n, t in theirs.state_dict().items() if not n.startswith("text_projection")}
    theirs.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(InputError, match=r"lacks 2 tensors .*text_projection"):
        load_vit_g(str(tmp_path))
    with pytest.raises(InputError, match="cannot be read as a BLIP-2"):
        load_vit_g(str(tmp_path / "nowhere"))
