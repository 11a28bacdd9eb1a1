"""UIT, the unified image-text model: Swin and BERT with heads for ITC, ITM, MLM and MIM.

Source: the method's paper (arXiv 2511.22470). Parameter names match the released checkpoint. The
losses are in `uit/losses.py`; this module computes their inputs.

Shape letters: `B` batch, `N` text tokens, `M` image tokens, `C` image width, `D` text width, `E`
width of the retrieval vectors, `H` `W` rows and columns of the patch grid, `S` side of the image,
`K` mask blocks per side.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pab.core import processes
from pab.core.errors import InputError
from uit.bert import Bert, BertConfig
from uit.swin import Swin, SwinConfig

POOL_BINS = 3  # number of parts over which tokens are averaged
RATE_SCALE = 2.0  # learning-rate factor of the parts in :meth:`Uit.rate_scale`, as released

# Duplicate tensors in a released checkpoint: their prefix, and the prefix of the originals.
HEAD, WORDS = "text_encoder.cls.predictions.", "text_encoder.bert.embeddings.word_embeddings."
REPEATED = (
    ("simmim.encoder.encoder.", "vision_encoder."),
    (f"{HEAD}decoder.weight", f"{WORDS}weight"),
    (f"{HEAD}decoder.bias", f"{HEAD}bias"),
)
UNUSED = ("text_encoder.bert.embeddings.position_ids",)  # position ids 0, 1, 2, ...


@dataclass(frozen=True)
class UitConfig:
    """Sizes of the whole model.

    Attributes:
        swin: sizes of the image encoder.
        bert: sizes of the text tower and the cross encoder.
        embed_dim: width E of the retrieval vectors.
        temperature: initial value of the learned temperature.
        proj_dropout: dropout before the projections to the retrieval vectors.
        sync_batch_norm: whether to compute batch-norm statistics over all processes.
    """

    swin: SwinConfig = field(default_factory=SwinConfig)
    bert: BertConfig = field(default_factory=BertConfig)
    embed_dim: int = 2048
    temperature: float = 0.07
    proj_dropout: float = 0.5
    sync_batch_norm: bool = False


MODELS = {
    "uit_base": UitConfig(),  # published sizes
    "uit_mini": UitConfig(
        SwinConfig(
            image_size=64, embed_dim=48, depths=(2, 2, 3), heads=(2, 4, 8), window=4, drop_path=0.0
        ),
        BertConfig(
            width=128, layers=6, fusion_layer=3, heads=4, ffn_dim=320, positions=80, types=1,
            image_width=192, dropout=0.0,
        ),
        embed_dim=128,
        proj_dropout=0.1,
    ),
    "uit_debug": UitConfig(
        SwinConfig(image_size=32, embed_dim=8, depths=(1, 2), heads=(1, 2), window=4),
        BertConfig(
            width=16, layers=4, fusion_layer=2, heads=2, ffn_dim=32, positions=64, types=1,
            image_width=16,
        ),
        embed_dim=16,
    ),
}  # fmt: skip


def model_config(name: str, input_size: int, window: int) -> UitConfig:
    """Return the named sizes, with the given resolution and window.

    Args:
        name: a key of :data:`MODELS`.
        input_size: side of the square input, pixels.
        window: side of Swin's attention windows, tokens.

    Raises:
        InputError: unknown model, or an input size that the strides or the window do not divide.
    """
    if name not in MODELS:
        raise InputError("--model", f"expected one of {', '.join(MODELS)}, found {name}")
    sizes = MODELS[name]
    swin = replace(sizes.swin, image_size=input_size, window=window)
    swin.check()
    return replace(sizes, swin=swin)


def tensor_names(config: UitConfig) -> frozenset[str]:
    """Return the names of the model's tensors; the vocabulary size does not affect them."""
    with torch.device("meta"):
        return frozenset(Uit(config).state_dict())


class MaskToken(nn.Module):
    """Token that replaces masked patches, with the parameter name of the checkpoints."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))


class MaskedImageModel(nn.Module):
    """SimMIM parts: the mask token, and a decoder from the last tokens to pixels."""

    def __init__(self, config: SwinConfig) -> None:
        super().__init__()
        self.encoder = MaskToken(config.embed_dim)
        stride = config.image_size // config.grids[-1]
        self.decoder = nn.Sequential(
            nn.Conv2d(config.width, 3 * stride**2, kernel_size=1), nn.PixelShuffle(stride)
        )


class Uit(nn.Module):
    """Image and text towers with all heads."""

    def __init__(self, config: UitConfig) -> None:
        super().__init__()
        self.config = config
        c, d = config.swin.width, config.bert.width
        self.vision_encoder = Swin(config.swin)
        self.text_encoder = Bert(config.bert)
        self.temp = nn.Parameter(torch.tensor(config.temperature))
        self.vision_proj = _projection(POOL_BINS * c, config)
        self.text_proj = _projection((1 + POOL_BINS) * d, config)
        self.itm_head = nn.Sequential(
            nn.Linear(d, 2 * d), nn.LayerNorm(2 * d), nn.GELU(), nn.Linear(2 * d, 2)
        )
        self.simmim = MaskedImageModel(config.swin)

    def image_vector(self, tokens: Tensor) -> Tensor:
        """Map image tokens [B, M, C], the mean token first, to unit vectors [B, E]."""
        return F.normalize(self.vision_proj(_pool(tokens[:, 1:])).float(), dim=-1)

    def text_vector(self, tokens: Tensor) -> Tensor:
        """Map text tokens [B, N, D], including padding, to unit vectors [B, E]."""
        pooled = torch.cat([tokens[:, 0], _pool(tokens[:, 1:])], dim=1)
        return F.normalize(self.text_proj(pooled).float(), dim=-1)

    def match_logits(self, fused: Tensor) -> Tensor:
        """Map cross-encoded [CLS] tokens [B, D] to logits of "no match" and "match" [B, 2]."""
        return self.itm_head(fused)

    def hide(self, x: Tensor, hidden: Tensor) -> Tensor:
        """Replace masked blocks of embedded patches with the mask token.

        Args:
            x: output of ``vision_encoder.patch_embed`` [B, H, W, width of the first stage].
            hidden: [K, K], 1 = masked; K must divide the side of the patch grid.
        """
        repeat = x.shape[1] // len(hidden)
        mask = hidden.repeat_interleave(repeat, 0).repeat_interleave(repeat, 1)[None, :, :, None]
        return x * (1 - mask) + self.simmim.encoder.mask_token * mask

    def restore(self, tokens: Tensor) -> Tensor:
        """Decode patch tokens of the last stage [B, M, C] to pixels [B, 3, S, S]."""
        side = self.config.swin.grids[-1]
        return self.simmim.decoder(tokens.transpose(1, 2).reshape(len(tokens), -1, side, side))

    # Parameter groups for the optimizer.

    @staticmethod
    def no_weight_decay(name: str, parameter: Tensor) -> bool:
        """Return true for parameters without weight decay, by their published names.

        "bias" also matches Swin's relative position bias tables. The weights of the batch norms and
        of the match head's norm, and the temperature, have weight decay.
        """
        del parameter
        exempt = ("bias", "LayerNorm.weight", "norm.weight", "norm1.weight", "norm2.weight")
        return any(part in name for part in exempt)

    @staticmethod
    def rate_scale(name: str) -> float:
        """Return :data:`RATE_SCALE` for parts with a higher learning rate, else 1.

        The parts are selected by published name. They are the last two of Swin's four stages, the
        last two of the six layers of the text tower and of the cross encoder, the projections, the
        match head and the language-model head. A smaller model has only some of these names.
        """
        faster = (
            r"vision_encoder\.layers\.[23]\.|text_encoder\.bert\.encoder\.layer\.(4|5|10|11)\.|"
            r"text_encoder\.cls\.|vision_proj\.|text_proj\.|itm_head\."
        )
        return RATE_SCALE if re.match(faster, name) else 1.0


def adapt_state(state: Mapping[str, Tensor], path: str | Path) -> dict[str, Tensor]:
    """Remove duplicate and unused tensors from a released state dict.

    Raises:
        InputError: a duplicate differs from its original.
    """
    kept = {name: tensor for name, tensor in state.items() if name not in UNUSED}
    for copy, original in REPEATED:
        for name in [name for name in kept if name.startswith(copy)]:
            source = original + name.removeprefix(copy)
            if source not in state:
                continue  # strict loading reports the missing tensor
            if not torch.equal(kept.pop(name), state[source]):
                raise InputError(path, f"{name} differs from {source}, expected a copy")
    return kept


class BatchNormOfAll(nn.BatchNorm1d):
    """Batch norm with statistics over the rows of all processes, on CPU or GPU.

    torch's SyncBatchNorm supports only GPUs. Rows are single vectors, so exchanging them is cheap.
    """

    def forward(self, rows: Tensor) -> Tensor:
        """Normalize [B, width]; all processes must have the same number of rows."""
        if not self.training:
            return super().forward(rows)
        start = processes.rank() * len(rows)
        return super().forward(processes.all_gather_with_grad(rows))[start : start + len(rows)]


def _projection(width: int, config: UitConfig) -> nn.Sequential:
    norm = BatchNormOfAll if config.sync_batch_norm else nn.BatchNorm1d
    projection = nn.Linear(width, config.embed_dim)
    return nn.Sequential(norm(width), nn.Dropout(config.proj_dropout), projection)


def _pool(tokens: Tensor) -> Tensor:
    """Average tokens [B, N, D] over :data:`POOL_BINS` parts -> [B, POOL_BINS * D]."""
    if tokens.is_cuda and torch.are_deterministic_algorithms_enabled():
        return _pool_by_slices(tokens)  # adaptive pooling has no deterministic backward pass
    return F.adaptive_avg_pool1d(tokens.transpose(1, 2), POOL_BINS).transpose(1, 2).flatten(1)


def _pool_by_slices(tokens: Tensor) -> Tensor:
    """Compute the result of :func:`_pool`, up to rounding, as the mean of one slice per part."""
    n = tokens.shape[1]
    ends = [(i * n // POOL_BINS, -((i + 1) * n // -POOL_BINS)) for i in range(POOL_BINS)]
    return torch.cat([tokens[:, start:end].mean(dim=1) for start, end in ends], dim=1)
