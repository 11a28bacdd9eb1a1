"""BEiT-3 for image-text retrieval.

Source: Wang et al., "Image as a Foreign Language: BEiT Pretraining for All Vision and
Vision-Language Tasks" (arXiv 2208.10442). Parameter names match the checkpoints published with the
paper's code (MIT), so these load strictly, without renaming.

A multiway Transformer: every block has two sets of weights, A for image tokens and B for text
tokens. In retrieval, the modalities do not interact inside the network: an image pass uses only A,
and a text pass only B. Sub-LayerNorm adds one norm before the output projection of the attention
and one before the second linear layer of the feed-forward network.

Deliberate differences from the published code, which change results only by rounding: attention
uses `scaled_dot_product_attention`, padding is masked or removed instead of multiplied by zero,
and the last block computes only the class token.

Shape letters: `B` batch, `N` tokens, `M` leading tokens that a block outputs, `D` width, `H` heads,
`C` head width (D / H), `S` side of the image and `P` side of a patch in pixels.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import StochasticDepth

from pab.core.devices import attention, recomputed
from pab.core.errors import InputError
from pab.core.notices import notice

Modality: TypeAlias = Literal["A", "B"]
IMAGE: Modality = "A"
TEXT: Modality = "B"

POSITION_OFFSET = 2  # both position embeddings start with two unused rows, as in fairseq
READ = 1  # leading tokens that the last block outputs: the class token, which the heads read
LOGIT_SCALE_INIT = math.log(1 / 0.07)  # CLIP's temperature, as in the published code
INIT_STD = 0.02  # truncated normal, as in the published code
# Heads that fine-tuning initializes if a checkpoint (such as a pre-trained one) lacks them.
RETRIEVAL_HEADS = ("language_head.*", "vision_head.*", "logit_scale")
# Heads for pre-training and other tasks of BEiT-3's release; unused in retrieval.
OTHER_HEADS = (
    "head.*", "pooler.*", "fc_norm.*", "mlm_head.*", "mim_head.*", "itm_head.*", "lm_head.*",
)  # fmt: skip
# Standard deviations of embeddings in `start_from_scratch`; not published.
SCRATCH_WORD_STD, SCRATCH_POSITION_STD = 0.3, 0.1


@dataclass(frozen=True)
class Beit3Config:
    """Sizes of one BEiT-3 model.

    Attributes:
        img_size: side of the square input, pixels.
        patch_size: side of a patch, pixels.
        embed_dim: width D of the tokens and of the retrieval vectors.
        heads: number of attention heads.
        ffn_dim: inner width of the feed-forward network.
        layers: number of blocks.
        vocab_size: rows of the word embedding; 64,010 in the published models, whose tokenizer has
            fewer ids.
        text_positions: rows of the text position embedding, including the offset.
        drop_path: stochastic depth rate of the last block; it rises linearly from 0.
        checkpoint_activations: whether to recompute each block in the backward pass to save memory.
        norm_eps: eps of every LayerNorm.
    """

    img_size: int
    patch_size: int
    embed_dim: int
    heads: int
    ffn_dim: int
    layers: int
    vocab_size: int = 64010
    text_positions: int = 1024
    drop_path: float = 0.0
    checkpoint_activations: bool = False
    norm_eps: float = 1e-5

    @property
    def patches(self) -> int:
        """Number of patches per image."""
        return (self.img_size // self.patch_size) ** 2


# name -> (width, heads, feed-forward width, layers); only large and base are published.
SIZES = {
    "large": (1024, 16, 4096, 24),
    "base": (768, 12, 3072, 12),
    "mini": (192, 3, 512, 4),
    "debug": (64, 2, 128, 2),
}


def model_config(
    name: str, *, input_size: int | None = None, vocab_size: int = 64010
) -> Beit3Config:
    """Return the sizes of the model with a name such as ``beit3_large_patch16_384``.

    Args:
        name: ``beit3_SIZE_patchP_RESOLUTION`` with SIZE in :data:`SIZES`; a trailing
            ``_retrieval`` is accepted.
        input_size: resolution in pixels; None uses the resolution in the name.
        vocab_size: rows of the word embedding.

    Raises:
        InputError: unknown name, or a resolution that is not a positive multiple of the patch size.
    """
    match = re.fullmatch(r"beit3_([a-z]+)_patch(\d+)_(\d+)(_retrieval)?", name)
    if match is None or match[1] not in SIZES or int(match[2]) == 0:
        known = ", ".join(f"beit3_{size}_patch16_384" for size in SIZES)
        raise InputError("--model", f"unknown model {name!r}", todo=f"known: {known}")
    width, heads, ffn, layers = SIZES[match[1]]
    patch, size = int(match[2]), int(match[3]) if input_size is None else input_size
    if size <= 0 or size % patch:
        raise InputError("--input_size", f"{size} px cannot be cut into patches of {patch} px")
    return Beit3Config(size, patch, width, heads, ffn, layers, vocab_size)


class Multiway(nn.Module):
    """Apply one of two modules of the same type: A to image tokens, B to text tokens."""

    def __init__(self, a: nn.Module, b: nn.Module) -> None:
        super().__init__()
        self.A = a
        self.B = b

    def forward(self, x: Tensor, modality: Modality) -> Tensor:
        return self.A(x) if modality == IMAGE else self.B(x)


def _linears(d_in: int, d_out: int) -> Multiway:
    return Multiway(nn.Linear(d_in, d_out), nn.Linear(d_in, d_out))


def _norms(width: int, eps: float) -> Multiway:
    return Multiway(nn.LayerNorm(width, eps=eps), nn.LayerNorm(width, eps=eps))


class VisionEmbedding(nn.Module):
    """Embed image patches as tokens and prepend the class token."""

    def __init__(self, config: Beit3Config) -> None:
        super().__init__()
        patch = config.patch_size
        self.proj = nn.Conv2d(3, config.embed_dim, kernel_size=patch, stride=patch)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.embed_dim))
        # Mask token for pre-training: unused in retrieval, but in every published checkpoint.
        self.mask_token = nn.Parameter(torch.zeros(1, 1, config.embed_dim))

    def forward(self, image: Tensor) -> Tensor:
        """Embed images [B, 3, S, S] as tokens [B, 1 + patches, D]."""
        x = self.proj(image).flatten(2).transpose(1, 2)  # [B, D, S/P, S/P] -> [B, patches, D]
        return torch.cat([self.cls_token.expand(len(x), -1, -1).to(x.dtype), x], dim=1)


class Attention(nn.Module):
    """Multi-head self-attention with Sub-LayerNorm before the output projection."""

    def __init__(self, config: Beit3Config) -> None:
        super().__init__()
        width = config.embed_dim
        self.heads = config.heads
        self.k_proj = _linears(width, width)
        self.v_proj = _linears(width, width)
        self.q_proj = _linears(width, width)
        self.out_proj = _linears(width, width)
        self.inner_attn_ln = _norms(width, config.norm_eps)

    def forward(
        self, x: Tensor, modality: Modality, key_mask: Tensor | None, read: int | None = None
    ) -> Tensor:
        """Attend to tokens x [B, N, D]; output the first M = ``read`` tokens or all, [B, M, D].

        ``key_mask`` is None or bool [B, 1, 1, N], true for visible keys.
        """
        d = x.shape[-1]
        q, k, v = (
            proj(tokens, modality).unflatten(-1, (self.heads, d // self.heads)).transpose(1, 2)
            for proj, tokens in ((self.q_proj, x[:, :read]), (self.k_proj, x), (self.v_proj, x))
        )  # [B, H, M, C], twice [B, H, N, C]
        out = attention(q, k, v, key_mask)
        out = out.transpose(1, 2).flatten(2)  # [B, H, M, C] -> [B, M, D]
        return self.out_proj(self.inner_attn_ln(out, modality), modality)


class FeedForward(nn.Module):
    """Two linear layers with exact GELU, and Sub-LayerNorm before the second."""

    def __init__(self, config: Beit3Config) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.embed_dim, config.ffn_dim)
        self.fc2 = nn.Linear(config.ffn_dim, config.embed_dim)
        self.ffn_layernorm = nn.LayerNorm(config.ffn_dim, eps=config.norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.ffn_layernorm(F.gelu(self.fc1(x))))


class Block(nn.Module):
    """Pre-norm Transformer block."""

    def __init__(self, config: Beit3Config, drop_path: float) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.self_attn_layer_norm = _norms(config.embed_dim, config.norm_eps)
        self.ffn = Multiway(FeedForward(config), FeedForward(config))
        self.final_layer_norm = _norms(config.embed_dim, config.norm_eps)
        self.drop_path = StochasticDepth(drop_path, "row")

    def forward(
        self, x: Tensor, modality: Modality, key_mask: Tensor | None, read: int | None = None
    ) -> Tensor:
        """See :class:`Attention`."""
        x = x[:, :read] + self.drop_path(self.attend(x, modality, key_mask, read))
        return x + self.drop_path(self.feed_forward(x, modality))

    def attend(
        self, x: Tensor, modality: Modality, key_mask: Tensor | None, read: int | None
    ) -> Tensor:
        """Compute the attention branch; see :class:`Attention`."""
        return self.self_attn(self.self_attn_layer_norm(x, modality), modality, key_mask, read)

    def feed_forward(self, x: Tensor, modality: Modality) -> Tensor:
        """Compute the feed-forward branch of tokens x [B, N, D]."""
        return self.ffn(self.final_layer_norm(x, modality), modality)


class Encoder(nn.Module):
    """Transformer encoder: position embeddings, blocks, final norm."""

    def __init__(self, config: Beit3Config) -> None:
        super().__init__()
        depth, width = config.layers, config.embed_dim
        image_rows = config.patches + 1 + POSITION_OFFSET
        self.checkpoint_activations = config.checkpoint_activations
        self.embed_positions = Multiway(
            nn.Embedding(image_rows, width), nn.Embedding(config.text_positions, width)
        )
        rates = [config.drop_path * i / max(depth - 1, 1) for i in range(depth)]
        self.layers = nn.ModuleList(Block(config, rate) for rate in rates)
        self.layer_norm = _norms(width, config.norm_eps)

    def forward(
        self,
        x: Tensor,
        modality: Modality,
        key_mask: Tensor | None = None,
        read: int | None = None,
    ) -> Tensor:
        """Add positions to embeddings x [B, N, D], and encode them to [B, M, D].

        The last block computes only the first ``read`` tokens; see :class:`Attention`.
        """
        positions = torch.arange(POSITION_OFFSET, POSITION_OFFSET + x.shape[1], device=x.device)
        x = x + self.embed_positions(positions, modality)
        for number, block in enumerate(self.layers, start=1):
            wanted = read if number == len(self.layers) else None
            x = recomputed(self.checkpoint_activations, block, x, modality, key_mask, wanted)
        return self.layer_norm(x, modality)


class Beit3(nn.Module):
    """Embeddings and encoder, grouped to match the parameter names of checkpoints."""

    def __init__(self, config: Beit3Config) -> None:
        super().__init__()
        self.text_embed = nn.Embedding(config.vocab_size, config.embed_dim)
        self.vision_embed = VisionEmbedding(config)
        self.encoder = Encoder(config)


class Beit3Retrieval(nn.Module):
    """Image and text encoders in one network; both output unit vectors of width D."""

    def __init__(self, config: Beit3Config) -> None:
        super().__init__()
        self.config = config
        self.beit3 = Beit3(config)
        self.language_head = nn.Linear(config.embed_dim, config.embed_dim, bias=False)
        self.vision_head = nn.Linear(config.embed_dim, config.embed_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(LOGIT_SCALE_INIT))
        self.apply(_init_weights)
        for token in (self.beit3.vision_embed.cls_token, self.beit3.vision_embed.mask_token):
            nn.init.trunc_normal_(token, std=INIT_STD)

    def encode_image(self, image: Tensor) -> Tensor:
        """Encode images [B, 3, S, S] to unit vectors [B, D]."""
        x = self.beit3.encoder(self.beit3.vision_embed(image), IMAGE, read=READ)
        return F.normalize(self.vision_head(x[:, 0]).float(), dim=-1)

    def encode_text(self, ids: Tensor, padding_mask: Tensor) -> Tensor:
        """Encode ids [B, N] with padding_mask [B, N] (1 = padding) to unit vectors [B, D].

        Columns that are padding in every row are removed first; they do not affect the results.
        Pass both tensors on the CPU: the host reads the mask, and would have to wait for a GPU.
        """
        device = self.logit_scale.device
        used = int((padding_mask == 0).sum(dim=1).max())
        ids, visible = ids[:, :used], padding_mask[:, :used] == 0
        key_mask = None
        if not bool(visible.all()):
            key_mask = visible[:, None, None, :].to(device, non_blocking=True)  # [B, 1, 1, N]
        tokens = self.beit3.text_embed(ids.to(device, non_blocking=True))
        x = self.beit3.encoder(tokens, TEXT, key_mask, READ)
        return F.normalize(self.language_head(x[:, 0]).float(), dim=-1)

    # Parameter groups of the optimizer.

    @staticmethod
    def no_weight_decay(name: str, parameter: Tensor) -> bool:
        """Return true for parameters without weight decay.

        As in the published recipe, these are vectors and scalars (biases, norms, the logit scale),
        the class token and the image positions. Text positions have weight decay.
        """
        exempt = ("cls_token", "embed_positions.A.weight")
        return parameter.ndim <= 1 or name.endswith(exempt)

    @staticmethod
    def layer_of(name: str, layers: int) -> int:
        """Return a parameter's layer for layer-wise learning-rate decay.

        0 for word, patch and position embeddings, 1 ... ``layers`` for the blocks, ``layers`` + 1
        for the heads, the final norm and the logit scale.
        """
        match = re.match(r"beit3\.encoder\.layers\.(\d+)\.", name)
        if match:
            return int(match[1]) + 1
        embeddings = ("beit3.text_embed.", "beit3.vision_embed.", "beit3.encoder.embed_positions.")
        return 0 if name.startswith(embeddings) else layers + 1


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, (nn.Linear, nn.Embedding, nn.Conv2d)):
        nn.init.trunc_normal_(module.weight, std=INIT_STD)
    if isinstance(module, (nn.Linear, nn.Conv2d)) and module.bias is not None:
        nn.init.zeros_(module.bias)


def start_from_scratch(model: Beit3Retrieval) -> None:
    """Initialize a model in place for training without a checkpoint.

    The published initialization (truncated normal, standard deviation 0.02) is meant for the few
    parts that a checkpoint lacks. It does not suit training from scratch with Sub-LayerNorm. The
    output of the first attention is nearly equal for all tokens, and the norm scales it to unit
    size, which hides the differences. The linear layers therefore start as in "Foundation
    Transformers" (Wang et al., arXiv 2210.06423), but with a smaller gain for queries and keys. The
    embeddings of words and positions start at a comparable magnitude.
    """
    gain = math.sqrt(math.log(2 * model.config.layers))
    for module_name, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        if ".q_proj." in module_name or ".k_proj." in module_name:
            nn.init.xavier_normal_(module.weight, gain=1 / math.sqrt(2))
        elif module_name.startswith("beit3.encoder.layers."):  # values, output and feed-forward
            nn.init.xavier_normal_(module.weight, gain=gain)
        else:  # the two heads
            nn.init.xavier_normal_(module.weight)
    nn.init.normal_(model.beit3.text_embed.weight, std=SCRATCH_WORD_STD)
    for half in (IMAGE, TEXT):
        table = model.beit3.encoder.embed_positions.get_parameter(f"{half}.weight")
        nn.init.normal_(table, std=SCRATCH_POSITION_STD)


def resize_position_table(table: Tensor, patches: int) -> Tensor:
    """Resize the image position embeddings to another resolution.

    The rows before the patches (offset and class token) are copied. The other rows form a square
    grid, which is interpolated (bicubic), as in the published loader.

    Args:
        table: [3 + old patches, D].
        patches: number of patches of the target model.

    Returns:
        [3 + patches, D].
    """
    head = POSITION_OFFSET + 1
    extra, grid = table[:head], table[head:]
    old, new = math.isqrt(len(grid)), math.isqrt(patches)
    if old == new:
        return table
    grid = grid.float().reshape(1, old, old, -1).permute(0, 3, 1, 2)  # [1, D, old, old]
    grid = F.interpolate(grid, size=(new, new), mode="bicubic", align_corners=False)
    grid = grid.permute(0, 2, 3, 1).reshape(new * new, -1)  # [new * new, D]
    return torch.cat([extra, grid.to(table.dtype)])


def adapt_state(
    state: dict[str, Tensor], config: Beit3Config, path: str | Path
) -> dict[str, Tensor]:
    """Resize the image position embeddings of a state dict to the resolution of ``config``.

    Args:
        path: file of the state dict, for the notice.
    """
    name = "beit3.encoder.embed_positions.A.weight"
    table = state.get(name)
    if table is None or table.ndim != 2 or len(table) < POSITION_OFFSET + 2:
        return state  # strict loading raises
    side = math.isqrt(len(table) - POSITION_OFFSET - 1)
    if side * side != len(table) - POSITION_OFFSET - 1:
        return state
    if side * side != config.patches:
        notice(
            path, f"image positions are resized from {side} x {side} patches to "
            f"{config.img_size // config.patch_size} x {config.img_size // config.patch_size}",
        )  # fmt: skip
    return state | {name: resize_position_table(table, config.patches)}


def tensor_names(config: Beit3Config) -> frozenset[str]:
    """Return the names of the model's tensors; they depend only on the number of layers."""
    with torch.device("meta"):
        return frozenset(Beit3Retrieval(config).state_dict())


def config_of_state(state: dict[str, Tensor], config: Beit3Config) -> Beit3Config:
    """Set the vocabulary size and the number of text positions to those of a checkpoint."""
    words = state.get("beit3.text_embed.weight")
    positions = state.get("beit3.encoder.embed_positions.B.weight")
    if words is None or positions is None or words.ndim != 2 or positions.ndim != 2:
        return config  # strict loading raises
    return replace(config, vocab_size=len(words), text_positions=len(positions))
