"""BERT split into UIT's text tower and cross encoder, with a language-model head.

Source: Devlin et al., "BERT: Pre-training of Deep Bidirectional Transformers for Language
Understanding" (arXiv 1810.04805). Cross-attention in the upper half follows Li et al., "Align
before Fuse" (arXiv 2107.07651). Parameter names match the published checkpoints.

Layers below ``fusion_layer`` read only text. Each later layer adds cross-attention from the text to
an image's tokens, between self-attention and feed-forward. The keys and values of cross-attention
depend only on the image. They are therefore computed once per image (:meth:`Bert.image_memory`),
for all texts.

Deliberate differences from the published code, which change results only by rounding: attention
uses `scaled_dot_product_attention`, and padding is excluded by a boolean mask instead of a bias of
-10,000.

Shape letters: `B` batch, `N` text tokens, `M` image tokens (in self-attention: N), `D` width, `H`
heads, `C` head width, `P` text-image pairs, `T` texts, `K` positions per text, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pab.core.devices import attention, in_autocast_format, recomputed

INIT_STD = 0.02  # normal, as in the published code
ImageMemory: TypeAlias = list[tuple[Tensor, Tensor]]  # per fusion layer: keys, values [B, H, M, C]


class FusedPairs(NamedTuple):
    """Pairs of texts and images before the last layer; see :meth:`Bert.fuse_pairs`.

    Attributes:
        text: [P, N, D].
        visible: attention mask, bool [P, 1, 1, N].
        images: [P], index into the images of ``keys`` and ``values``.
        keys, values: [B, H, M, C] of all images, for the last layer.
    """

    text: Tensor
    visible: Tensor
    images: Tensor
    keys: Tensor
    values: Tensor

    def part(self, rows: slice) -> FusedPairs:
        """Return a slice of the pairs."""
        return self._replace(
            text=self.text[rows], visible=self.visible[rows], images=self.images[rows]
        )


@dataclass(frozen=True)
class BertConfig:
    """Sizes of a BERT; the defaults are BERT-base, with cross-attention to Swin-B.

    Attributes:
        vocab_size: rows of the word embedding.
        width: width D of the tokens.
        layers: number of layers of text tower and cross encoder together.
        fusion_layer: first layer with cross-attention.
        heads: number of attention heads.
        ffn_dim: inner width of the feed-forward network.
        positions: rows of the position embedding.
        types: rows of the token type embedding; only the first is used.
        image_width: width of the image tokens.
        dropout: dropout rate of embeddings, attention weights and branches.
        norm_eps: eps of every LayerNorm.
        checkpoint_activations: whether to recompute each layer in the backward pass to save memory.
    """

    vocab_size: int = 30522
    width: int = 768
    layers: int = 12
    fusion_layer: int = 6
    heads: int = 12
    ffn_dim: int = 3072
    positions: int = 512
    types: int = 2
    image_width: int = 1024
    dropout: float = 0.1
    norm_eps: float = 1e-12
    checkpoint_activations: bool = False


class Embeddings(nn.Module):
    """Word, position and token type embeddings; only one token type is used."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        # Row 0 is [PAD]: padding positions do not train it, as published.
        self.word_embeddings = nn.Embedding(config.vocab_size, config.width, padding_idx=0)
        self.position_embeddings = nn.Embedding(config.positions, config.width)
        self.token_type_embeddings = nn.Embedding(config.types, config.width)
        self.LayerNorm = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, ids: Tensor) -> Tensor:
        """Embed token ids: [B, N] -> [B, N, D]."""
        x = self.word_embeddings(ids) + self.token_type_embeddings.weight[0]
        x = x + self.position_embeddings.weight[: ids.shape[1]]
        return self.dropout(in_autocast_format(self.LayerNorm(x)))


class Projections(nn.Module):
    """Project text to queries, and text or image tokens to keys and values."""

    def __init__(self, config: BertConfig, source_width: int) -> None:
        super().__init__()
        self.heads = config.heads
        self.query = nn.Linear(config.width, config.width)
        self.key = nn.Linear(source_width, config.width)
        self.value = nn.Linear(source_width, config.width)

    def split(self, x: Tensor) -> Tensor:
        """Split the width into heads: [B, N, D] -> [B, H, N, C]."""
        b, n, d = x.shape
        return x.view(b, n, self.heads, d // self.heads).transpose(1, 2)

    def keys_and_values(self, source: Tensor) -> tuple[Tensor, Tensor]:
        """Project source tokens [B, M, source width] to keys and values [B, H, M, C]."""
        return self.split(self.key(source)), self.split(self.value(source))


class BranchOutput(nn.Module):
    """Apply a linear layer and dropout, add the residual, and normalize (post-norm)."""

    def __init__(self, config: BertConfig, inner: int) -> None:
        super().__init__()
        self.dense = nn.Linear(inner, config.width)
        self.LayerNorm = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, branch: Tensor, x: Tensor) -> Tensor:
        return self.LayerNorm(x + self.dropout(self.dense(branch)))


class AttentionBlock(nn.Module):
    """Attention from text tokens to text or image tokens, with residual and LayerNorm."""

    def __init__(self, config: BertConfig, source_width: int) -> None:
        super().__init__()
        self.weight_dropout = config.dropout
        self.self = Projections(config, source_width)  # published name, also of cross-attention
        self.output = BranchOutput(config, config.width)

    def forward(self, x: Tensor, memory: tuple[Tensor, Tensor], mask: Tensor | None) -> Tensor:
        """Attend from x [B, N, D] to the keys and values of ``memory``, each [B, H, M, C].

        ``mask`` is None or bool [B, 1, 1, M], true for visible keys. The result is [B, N, D].
        """
        query = self.self.split(self.self.query(x))
        dropout = self.weight_dropout if self.training else 0.0
        out = attention(query, *memory, mask, dropout)  # [B, H, N, C]
        return self.output(out.transpose(1, 2).reshape(x.shape), x)


class Intermediate(nn.Module):
    """First linear layer of the feed-forward network, with exact GELU."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.width, config.ffn_dim)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.dense(x))


class Layer(nn.Module):
    """Self-attention, cross-attention to the image (only in the cross encoder), feed-forward."""

    def __init__(self, config: BertConfig, fuses: bool) -> None:
        super().__init__()
        self.attention = AttentionBlock(config, config.width)
        self.crossattention = AttentionBlock(config, config.image_width) if fuses else None
        self.intermediate = Intermediate(config)
        self.output = BranchOutput(config, config.ffn_dim)

    def attend(self, x: Tensor, mask: Tensor | None, at: Tensor | None = None) -> Tensor:
        """Apply only self-attention, which does not read the image tokens.

        Args:
            x: [B, N, D].
            mask: None or bool [B, 1, 1, N].
            at: [B, K], positions to compute; None computes all.

        Returns:
            [B, K, D] or [B, N, D].
        """
        wanted = x if at is None else x.gather(1, at[..., None].expand(-1, -1, x.shape[-1]))
        return self.attention(wanted, self.attention.self.keys_and_values(x), mask)

    def finish(self, x: Tensor, memory: tuple[Tensor, Tensor] | None) -> Tensor:
        """Apply cross-attention to ``memory`` (in fusion layers), then the feed-forward network."""
        if self.crossattention is not None:
            assert memory is not None
            x = self.crossattention(x, memory, None)
        return self.output(self.intermediate(x), x)


class Encoder(nn.Module):
    """Container of the layers, with the parameter name of the checkpoints."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.layer = nn.ModuleList(
            Layer(config, fuses=i >= config.fusion_layer) for i in range(config.layers)
        )


class BertBody(nn.Module):
    """Container of embeddings and layers, with the parameter name of the checkpoints."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config)


class LanguageTransform(nn.Module):
    """Transform tokens in the language-model head, before the vocabulary projection."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.width, config.width)
        self.LayerNorm = nn.LayerNorm(config.width, eps=config.norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        return self.LayerNorm(F.gelu(self.dense(x)))


class LanguagePredictions(nn.Module):
    """Compute logits over the vocabulary; the output matrix is tied to the word embedding."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.transform = LanguageTransform(config)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, x: Tensor, words: Tensor) -> Tensor:
        """Project tokens [..., D] onto word embeddings [V, D] -> logits [..., V]."""
        return F.linear(self.transform(x), words, self.bias)


class LanguageHead(nn.Module):
    """Container of the language-model head, with the parameter name of the checkpoints."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.predictions = LanguagePredictions(config)


class Bert(nn.Module):
    """Text tower, cross encoder and language-model head."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.config = config
        self.bert = BertBody(config)
        self.cls = LanguageHead(config)
        self.apply(_init_weights)

    @property
    def tower(self) -> list[Layer]:
        """Layers that read only text."""
        return list(self.bert.encoder.layer[: self.config.fusion_layer])  # type: ignore[arg-type]

    @property
    def fusion(self) -> list[Layer]:
        """Layers that also read an image."""
        return list(self.bert.encoder.layer[self.config.fusion_layer :])  # type: ignore[arg-type]

    def encode_text(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Encode token ids [B, N] with mask [B, N] (1 = token, 0 = padding) to [B, N, D]."""
        x, visible = self.bert.embeddings(ids), key_mask(mask)
        for layer in self.tower:
            x = self._run(_read_text, layer, x, visible)
        return x

    def image_memory(self, image: Tensor) -> ImageMemory:
        """Compute keys and values of image tokens [B, M, image width] for every fusion layer."""
        blocks = (layer.crossattention for layer in self.fusion)
        return [block.self.keys_and_values(image) for block in blocks if block is not None]

    def fuse(self, text: Tensor, mask: Tensor, memory: ImageMemory) -> Tensor:
        """Run the cross encoder on pairs.

        Args:
            text: [B, N, D], from :meth:`encode_text`.
            mask: [B, N], 1 = token, 0 = padding.
            memory: keys and values of each text's image, from :meth:`image_memory`.

        Returns:
            [B, N, D].
        """
        visible = key_mask(mask)
        for layer, image in zip(self.fusion, memory, strict=True):
            text = layer.finish(layer.attend(text, visible), image)
        return text

    def fuse_pairs(
        self, text: Tensor, mask: Tensor, memory: ImageMemory, rows: Tensor, images: Tensor
    ) -> FusedPairs:
        """Run the cross encoder on pairs of texts and images, up to its last layer.

        Shared computations run once: the first layer's self-attention per text, and the keys and
        values of cross-attention per image.

        Args:
            text: T texts [T, N, D], from :meth:`encode_text`.
            mask: [T, N], 1 = token, 0 = padding.
            memory: keys and values of all images, from :meth:`image_memory`.
            rows: [P], index into the texts.
            images: [P], index into the images.
        """
        x, visible = text, key_mask(mask)
        for i, layer in enumerate(self.fusion[:-1]):  # the first layer reads texts, others pairs
            x = self._run(_read_image, layer, x, visible, *memory[i], images, None if i else rows)
            visible = visible if i else visible[rows]
        if len(self.fusion) == 1:
            x, visible = x[rows], visible[rows]
        return FusedPairs(x, visible, images, *memory[-1])

    def fused_at(self, pairs: FusedPairs, at: Tensor) -> Tensor:
        """Apply the last layer of the cross encoder at the positions ``at`` [P, K] -> [P, K, D]."""
        return self._run(_read_image_at, self.fusion[-1], *pairs, at)

    def _run(self, function: Callable[..., Tensor], *args: object) -> Tensor:
        """Apply a layer; if configured, store only its inputs for the backward pass."""
        return recomputed(self.config.checkpoint_activations, function, *args)

    def word_logits(self, x: Tensor) -> Tensor:
        """Compute logits over the vocabulary [..., V] from cross-encoded tokens [..., D]."""
        return self.cls.predictions(x, self.bert.embeddings.word_embeddings.weight)


def _read_text(layer: Layer, x: Tensor, visible: Tensor) -> Tensor:
    """Apply a layer of the text tower: [B, N, D] -> [B, N, D]."""
    return layer.finish(layer.attend(x, visible), None)


def _read_image(
    layer: Layer,
    x: Tensor,
    visible: Tensor,
    keys: Tensor,
    values: Tensor,
    images: Tensor,
    rows: Tensor | None,
) -> Tensor:
    """Apply a layer of the cross encoder to P pairs -> [P, N, D]; see :meth:`Bert.fuse_pairs`.

    Args:
        layer: layer with cross-attention.
        x: pairs [P, N, D], or with ``rows``, texts [T, N, D].
        visible: bool [P or T, 1, 1, N].
        keys: [B, H, M, C], of all images.
        values: [B, H, M, C].
        images: [P], index into the images.
        rows: [P], index into the texts; None if ``x`` already holds pairs.
    """
    attended = layer.attend(x, visible)
    attended = attended if rows is None else attended[rows]
    return layer.finish(attended, (keys[images], values[images]))


def _read_image_at(
    layer: Layer,
    x: Tensor,
    visible: Tensor,
    images: Tensor,
    keys: Tensor,
    values: Tensor,
    at: Tensor,
) -> Tensor:
    """Apply the last layer at the positions ``at`` [P, K] -> [P, K, D]; see :func:`_read_image`."""
    return layer.finish(layer.attend(x, visible, at), (keys[images], values[images]))


def key_mask(mask: Tensor) -> Tensor:
    """Convert a mask [B, N] (1 = token) to bool [B, 1, 1, N] for attention."""
    return mask[:, None, None, :] != 0


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=INIT_STD)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
