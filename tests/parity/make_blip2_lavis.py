"""Make `blip2_lavis.pt`, the reference vectors that LAVIS computes with a small random BLIP-2.

Run once in LAVIS's own environment (`bash scripts/setup_lavis.sh`), from the repository root:

    .venv-lavis/bin/python tests/parity/make_blip2_lavis.py

The model is LAVIS's `Blip2Qformer` in a small size. It is assembled from LAVIS's modules, because
its constructor supports only the published sizes and downloads files. The vectors come from
its `extract_features`, and the captions and ids from LAVIS's processor and tokenizer.
"""

from __future__ import annotations

from pathlib import Path

import torch
from blip2_lavis_captions import CAPTIONS
from lavis.models.blip2_models.blip2 import LayerNorm
from lavis.models.blip2_models.blip2_qformer import Blip2Qformer
from lavis.models.blip2_models.Qformer import BertLMHeadModel
from lavis.models.clip_vit import VisionTransformer
from lavis.processors.blip_processors import BlipCaptionProcessor, BlipImageEvalProcessor
from PIL import Image
from torch import nn
from transformers import BertConfig, BertTokenizer

HERE = Path(__file__).resolve().parent
VOCABULARY = HERE.parents[1] / "checkpoints/mini/bert/vocab.txt"
SIDE, PATCH, IMAGE_WIDTH, IMAGE_LAYERS, IMAGE_HEADS = 28, 14, 32, 2, 2
QUERIES, WIDTH, LAYERS, HEADS, FFN, POSITIONS, EMBED = 4, 32, 4, 2, 64, 80, 8


def small_model() -> Blip2Qformer:
    """Build LAVIS's model with random weights, large enough that every layer affects the vectors.

    The heads for image-text matching and captioning do not affect them.
    """
    torch.manual_seed(16)
    model = Blip2Qformer.__new__(Blip2Qformer)
    nn.Module.__init__(model)
    model.tokenizer = BertTokenizer(str(VOCABULARY))
    model.tokenizer.add_special_tokens({"bos_token": "[DEC]"})
    # LAVIS builds one block fewer than requested.
    model.visual_encoder = VisionTransformer(
        SIDE, PATCH, IMAGE_WIDTH, IMAGE_LAYERS + 1, IMAGE_HEADS, use_grad_checkpointing=False
    )
    model.ln_vision = LayerNorm(IMAGE_WIDTH)
    config = BertConfig(
        vocab_size=len(model.tokenizer), hidden_size=WIDTH, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, intermediate_size=FFN, max_position_embeddings=POSITIONS,
    )  # fmt: skip
    config.encoder_width, config.query_length = IMAGE_WIDTH, QUERIES
    config.add_cross_attention, config.cross_attention_freq = True, 2
    model.Qformer = BertLMHeadModel(config)
    model.query_tokens = nn.Parameter(torch.zeros(1, QUERIES, WIDTH))
    model.vision_proj, model.text_proj = nn.Linear(WIDTH, EMBED), nn.Linear(WIDTH, EMBED)
    model.itm_head = nn.Linear(WIDTH, 2)
    model.temp = nn.Parameter(0.07 * torch.ones([]))
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.2)
        elif parameter.ndim:  # biases, and norm weights around 1
            parameter.data.add_(torch.randn_like(parameter), alpha=0.2)
    return model.eval()


@torch.no_grad()
def main() -> None:
    """Write the reference vectors beside this script."""
    model = small_model()
    image = Image.effect_mandelbrot((90, 50), (-2, -1, 1, 1), 50).convert("RGB")
    pixels = torch.stack(
        [BlipImageEvalProcessor(SIDE)(turned) for turned in (image, image.rotate(90))]
    )
    captions = [BlipCaptionProcessor()(caption) for caption in CAPTIONS]
    found = model.extract_features({"image": pixels}, mode="image")
    texts = model.extract_features({"text_input": captions}, mode="text")
    # Similarity of every query token and caption; LAVIS's loss uses the maximum over tokens.
    best = torch.einsum("gke,qe->qgk", found.image_embeds_proj, texts.text_embeds_proj[:, 0])
    torch.save(
        {
            "model": dict(model.state_dict()),
            "pixels": pixels,
            "captions": captions,
            "ids": model.tokenizer(captions).input_ids,
            "image": found.image_embeds_proj,
            "text": texts.text_embeds_proj[:, 0],
            "first": best[..., 0],
            "max": best.amax(dim=-1),
        },
        HERE / "blip2_lavis.pt",
    )


if __name__ == "__main__":
    main()
