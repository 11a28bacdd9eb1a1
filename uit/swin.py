"""Swin Transformer: UIT's image encoder.

Source: Liu et al., "Swin Transformer: Hierarchical Vision Transformer using Shifted Windows" (arXiv
2103.14030). Parameter names match the checkpoints published with its code (MIT).

Deliberate differences from the published code, which change results only by rounding: attention
uses `scaled_dot_product_attention` with one additive mask (position bias plus window mask), and
tokens keep their grid shape in all stages.

Shape letters: `B` batch, `I` side of the image, `H` `W` rows and columns of the token grid, `T`
tokens of the last stage, `C` width of a stage, `S` side of a window, `N` = S * S, `M` windows per
image, `K` heads.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import StochasticDepth

from pab.core.devices import attention, recomputed
from pab.core.errors import InputError

INIT_STD = 0.02  # truncated normal, as in the published code
MASKED = -100.0  # added to attention logits between different image regions, as published


@dataclass(frozen=True)
class SwinConfig:
    """Sizes of a Swin Transformer; the defaults are Swin-B at 224 px.

    Attributes:
        image_size: side of the square input, pixels.
        patch_size: side of a patch, pixels.
        embed_dim: width of the first stage; each later stage doubles it.
        depths: number of blocks per stage.
        heads: number of attention heads per stage.
        window: side of a window, tokens.
        mlp_ratio: inner width of the feed-forward network divided by the stage's width.
        drop_path: stochastic depth rate of the last block; it rises linearly from 0.
        norm_eps: eps of every LayerNorm.
        checkpoint_activations: whether to recompute each block in the backward pass to save memory.
    """

    image_size: int = 224
    patch_size: int = 4
    embed_dim: int = 128
    depths: tuple[int, ...] = (2, 2, 18, 2)
    heads: tuple[int, ...] = (4, 8, 16, 32)
    window: int = 7
    mlp_ratio: int = 4
    drop_path: float = 0.1
    norm_eps: float = 1e-5
    checkpoint_activations: bool = False

    @property
    def grids(self) -> tuple[int, ...]:
        """Return the side of the token grid per stage."""
        first = self.image_size // self.patch_size
        return tuple(first >> stage for stage in range(len(self.depths)))

    @property
    def width(self) -> int:
        """Return the width of the last stage."""
        return self.embed_dim << (len(self.depths) - 1)

    def check(self) -> None:
        """Reject image sizes whose token grids cannot be merged or split into windows.

        Raises:
            InputError: the image size does not fit.
        """
        deepest = self.patch_size << (len(self.depths) - 1)
        if self.image_size % deepest:
            raise InputError(
                "--input_size", f"{self.image_size} px is not a multiple of {deepest} px, the last "
                "stage's stride",
                todo=f"use a multiple of {deepest}",
            )  # fmt: skip
        for side in self.grids:
            if side > self.window and side % self.window:
                raise InputError(
                    "--input_size",
                    f"{self.image_size} px gives a {side} x {side} token grid, and {side} is not "
                    f"divisible by the window size {self.window}",
                    todo="change --window or --input_size",
                )


def relative_position_index(window: int) -> Tensor:
    """Return the row of the bias table for every pair of tokens in a window, int64 [N, N]."""
    rows, columns = torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")
    at = torch.stack([rows.flatten(), columns.flatten()])  # [2, N]
    apart = at[:, :, None] - at[:, None, :] + window - 1  # [2, N, N], each 0 ... 2 S - 2
    return apart[0] * (2 * window - 1) + apart[1]


def shifted_window_mask(side: int, window: int, shift: int) -> Tensor:
    """Return the mask of shifted windows, [M, N, N]: 0 within a region, ``MASKED`` between regions.

    After the cyclic shift, a window at the border holds tokens from opposite sides of the image.
    """
    region = torch.zeros(side, side)
    parts = (slice(0, -window), slice(-window, -shift), slice(-shift, None))
    for i, rows in enumerate(parts):
        for j, columns in enumerate(parts):
            region[rows, columns] = 3 * i + j
    regions = to_windows(region[None, :, :, None], window).squeeze(-1)  # [M, N]
    return (regions[:, None, :] != regions[:, :, None]).float() * MASKED


def to_windows(x: Tensor, window: int) -> Tensor:
    """Split a grid into windows: [B, H, W, C] -> [B * M, N, C]."""
    b, h, w, c = x.shape
    x = x.view(b, h // window, window, w // window, window, c)
    return x.permute(0, 1, 3, 2, 4, 5).reshape(-1, window * window, c)


def from_windows(windows: Tensor, window: int, side: int) -> Tensor:
    """Join windows into a grid: [B * M, N, C] -> [B, H, W, C] with H = W = ``side``."""
    per_side, c = side // window, windows.shape[-1]
    x = windows.view(-1, per_side, per_side, window, window, c)
    return x.permute(0, 1, 3, 2, 4, 5).reshape(-1, side, side, c)


class WindowAttention(nn.Module):
    """Multi-head self-attention per window, with a learned bias for relative positions."""

    def __init__(self, width: int, heads: int, window: int) -> None:
        super().__init__()
        self.heads, self.window = heads, window
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, heads))
        self.register_buffer("relative_position_index", relative_position_index(window))
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def bias(self) -> Tensor:
        """Look up the relative position bias, [1, K, N, N]."""
        n = self.window**2
        index = self.get_buffer("relative_position_index").flatten()
        table = self.relative_position_bias_table[index].view(n, n, self.heads)
        return table.permute(2, 0, 1)[None]

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Attend within windows: x [B * M, N, C], mask [M, N, N] or None -> [B * M, N, C]."""
        bm, n, c = x.shape
        q, k, v = self.qkv(x).view(bm, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        bias = self.bias()
        if mask is not None:
            bias = bias + mask[:, None]  # [M, K, N, N]
            bias = bias.repeat(bm // len(mask), 1, 1, 1)  # [B * M, K, N, N]
        out = attention(q, k, v, bias)  # [B * M, K, N, C / K]
        return self.proj(out.transpose(1, 2).reshape(bm, n, c))


class Mlp(nn.Module):
    """Two linear layers with exact GELU."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, inner)
        self.fc2 = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class SwinBlock(nn.Module):
    """Pre-norm block over windows, optionally shifted by half a window."""

    def __init__(
        self, config: SwinConfig, width: int, heads: int, side: int, shift: bool, drop_path: float
    ) -> None:
        super().__init__()
        self.window = min(config.window, side)
        # A window as large as the grid covers everything, so no shift is needed.
        self.shift = config.window // 2 if shift and side > config.window else 0
        mask = shifted_window_mask(side, self.window, self.shift) if self.shift else None
        self.register_buffer("attn_mask", mask)
        self.norm1 = nn.LayerNorm(width, eps=config.norm_eps)
        self.attn = WindowAttention(width, heads, self.window)
        self.norm2 = nn.LayerNorm(width, eps=config.norm_eps)
        self.mlp = Mlp(width, config.mlp_ratio * width)
        self.drop_path = StochasticDepth(drop_path, "row")

    def forward(self, x: Tensor) -> Tensor:
        """Transform tokens [B, H, W, C]; the shape is unchanged."""
        side = x.shape[1]
        shifted = self.norm1(x)
        if self.shift:
            shifted = torch.roll(shifted, (-self.shift, -self.shift), dims=(1, 2))
        mask = self.get_buffer("attn_mask") if self.shift else None
        attended = self.attn(to_windows(shifted, self.window), mask)
        attended = from_windows(attended, self.window, side)
        if self.shift:
            attended = torch.roll(attended, (self.shift, self.shift), dims=(1, 2))
        x = x + self.drop_path(attended)
        return x + self.drop_path(self.mlp(self.norm2(x)))


class PatchMerging(nn.Module):
    """Merge four neighbouring tokens into one of twice the width."""

    def __init__(self, width: int, norm_eps: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * width, eps=norm_eps)
        self.reduction = nn.Linear(4 * width, 2 * width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Merge 2 x 2 tokens: [B, H, W, C] -> [B, H / 2, W / 2, 2 C]."""
        b, h, w, c = x.shape
        # Channel order as published: upper left, lower left, upper right, lower right.
        fours = x.view(b, h // 2, 2, w // 2, 2, c).permute(0, 1, 3, 4, 2, 5)
        return self.reduction(self.norm(fours.reshape(b, h // 2, w // 2, 4 * c)))


class PatchEmbed(nn.Module):
    """Embed image patches as tokens."""

    def __init__(self, config: SwinConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, config.embed_dim, config.patch_size, config.patch_size)
        self.norm = nn.LayerNorm(config.embed_dim, eps=config.norm_eps)

    def forward(self, image: Tensor) -> Tensor:
        """Embed images: [B, 3, I, I] -> [B, H, W, C]."""
        return self.norm(self.proj(image).permute(0, 2, 3, 1))


class Stage(nn.Module):
    """Blocks of one width; all stages but the last end with patch merging."""

    def __init__(self, config: SwinConfig, stage: int, drop_path: list[float]) -> None:
        super().__init__()
        width, side = config.embed_dim << stage, config.grids[stage]
        self.checkpoint_activations = config.checkpoint_activations
        self.blocks = nn.ModuleList(
            SwinBlock(config, width, config.heads[stage], side, block % 2 == 1, rate)
            for block, rate in enumerate(drop_path)
        )
        last = stage == len(config.depths) - 1
        self.downsample = None if last else PatchMerging(width, config.norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the stage: [B, H, W, C] -> [B, H / 2, W / 2, 2 C] (last stage: same shape)."""
        for block in self.blocks:
            x = recomputed(self.checkpoint_activations, block, x)
        return x if self.downsample is None else self.downsample(x)


class Swin(nn.Module):
    """Image encoder: patch tokens of the last stage, preceded by their mean."""

    def __init__(self, config: SwinConfig) -> None:
        super().__init__()
        config.check()
        self.config = config
        self.patch_embed = PatchEmbed(config)
        total = sum(config.depths)
        rates = [config.drop_path * i / max(total - 1, 1) for i in range(total)]
        starts = [sum(config.depths[:stage]) for stage in range(len(config.depths))]
        self.layers = nn.ModuleList(
            Stage(config, stage, rates[start : start + depth])
            for stage, (start, depth) in enumerate(zip(starts, config.depths, strict=True))
        )
        self.norm = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.apply(_init_weights)
        for module in self.modules():
            if isinstance(module, WindowAttention):
                nn.init.trunc_normal_(module.relative_position_bias_table, std=INIT_STD)

    def forward(self, image: Tensor) -> Tensor:
        """Encode images: [B, 3, I, I] -> [B, 1 + T, C], the mean token first."""
        return with_mean(self.encode(self.patch_embed(image)))

    def encode(self, x: Tensor) -> Tensor:
        """Apply all stages: embedded patches [B, H, W, C] -> tokens of the last stage [B, T, C]."""
        for stage in self.layers:
            x = stage(x)
        return self.norm(x.flatten(1, 2))


def with_mean(tokens: Tensor) -> Tensor:
    """Prepend the mean to patch tokens: [B, T, C] -> [B, 1 + T, C]."""
    return torch.cat([tokens.mean(dim=1, keepdim=True), tokens], dim=1)


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=INIT_STD)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
