"""BLIP-2 with ViT-g (`pretrain`): the model of transformers behind the ViT-L port's interface."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Blip2ForImageTextRetrieval

from pab.core.counts import counted
from pab.core.errors import InputError
from pab.core.weight_folders import Family, weight_folder


class Blip2VitG(nn.Module):
    """ViT-g model with the methods and shape letters of :class:`pab.encoders.blip2.model.Blip2`."""

    def __init__(self, inner: Blip2ForImageTextRetrieval) -> None:
        super().__init__()
        self.inner = inner

    def encode_queries(self, pixels: Tensor) -> Tensor:
        """Encode images [B, 3, S, S] to a unit vector per query token, [B, K, E]."""
        inner = self.inner
        image = inner.vision_model(pixel_values=pixels).last_hidden_state
        queries = inner.query_tokens.expand(len(pixels), -1, -1)
        found = inner.qformer(query_embeds=queries, encoder_hidden_states=image).last_hidden_state
        weights = inner.vision_projection.weight.dtype
        return F.normalize(inner.vision_projection(found.to(weights)).float(), dim=-1)

    def encode_text(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Encode ids with their mask [B, N] (1 = a token) to unit vectors [B, E]."""
        inner = self.inner
        found = inner.qformer(
            query_embeds=inner.embeddings(input_ids=ids), query_length=0, attention_mask=mask
        ).last_hidden_state
        weights = inner.text_projection.weight.dtype
        return F.normalize(inner.text_projection(found[:, 0].to(weights)).float(), dim=-1)


def load_vit_g(source: str) -> Blip2VitG:
    """Load the model from a folder saved by transformers, or from the hub by id.

    Raises:
        InputError: the source is a file or another model's folder, the model cannot be read, or
            some of its weights are missing.
    """
    path = Path(source)
    found = ""
    if path.is_file():
        found = "a file"
    elif path.is_dir() and weight_folder(path).family is not Family.BLIP2:
        found = weight_folder(path).family.value
    if found:
        raise InputError(
            "--pretrained", f"{source}: expected the folder of a BLIP-2 model of transformers, "
            f"found {found}",
            todo="use --model pretrain_vitL for LAVIS's checkpoints of ViT-L",
        )  # fmt: skip
    try:
        loaded: Any = Blip2ForImageTextRetrieval.from_pretrained(
            source, output_loading_info=True, dtype=torch.float32
        )
    except Exception as error:  # errors of HTTP clients share no base class
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(
            "--pretrained", f"{source} cannot be read as a BLIP-2 retrieval model: {line[:160]}",
            todo="pass the folder of a downloaded model, with its config.json" if not
            Path(source).exists() else "the folder needs config.json and model.safetensors",
        ) from error  # fmt: skip
    inner, report = loaded
    missing = sorted(report["missing_keys"])
    if missing:
        raise InputError(
            "--pretrained", f"{source} lacks {counted(len(missing), 'tensor')} of the model, such "
            f"as {missing[0]}",
            todo="use a model that was trained for image-text retrieval",
        )  # fmt: skip
    return Blip2VitG(inner.eval())
