"""Faster OpenCLIP transformer blocks with the same parameter names.

The vectors are equal up to rounding. Attention uses :func:`pab.core.devices.attention` instead of
torch's slower module (docs/log.md). QuickGELU works in place. If only the class token of an image
is needed, the last block computes only that token.

Shape letters: `B` batch, `H` heads, `N` tokens, `M` query tokens, `D` width.
"""

from __future__ import annotations

from typing import Any

import torch
from open_clip.transformer import QuickGELU, ResidualAttentionBlock, VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from pab.core.devices import attention

SLOPE = 1.702  # constant of QuickGELU


class SelfAttention(nn.MultiheadAttention):
    """Self-attention of torch for queries, keys and values from one input; batch first."""

    def forward(  # type: ignore[override]
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        **rest: Any,
    ) -> tuple[Tensor, None]:
        """Compute multi-head self-attention.

        Args:
            query: [B, M, D], ``key`` or its first M tokens.
            key: [B, N, D].
            value: must be ``key``.
            attn_mask: added to the logits, [M, N] or [B * H, M, N].
            rest: ``need_weights=False``, which the blocks pass.

        Returns:
            Output [B, M, D], and None for the attention weights.
        """
        assert key is value, "unexpected call from an OpenCLIP block"
        assert rest == {"need_weights": False}, "unexpected call from an OpenCLIP block"
        qkv = F.linear(key, self.in_proj_weight, self.in_proj_bias)
        # [B, N, 3 * D] -> three tensors [B, H, N, D / H]; contiguous copies are faster to read
        qkv = qkv.unflatten(-1, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.contiguous()
        if attn_mask is not None and attn_mask.ndim == 3:
            attn_mask = attn_mask.unflatten(0, (-1, self.num_heads))
        out = attention(q[:, :, : query.shape[1]], k, v, attn_mask)
        return self.out_proj(out.transpose(1, 2).flatten(2)), None


class InPlaceQuickGELU(QuickGELU):
    """Compute ``x * sigmoid(1.702 * x)`` in place if no gradient is needed.

    No other module reads the input, the output of a matrix product (9 MB per image at 336 px).
    Float16 is computed out of place, because 1.702 times the largest values would overflow.
    """

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() or x.dtype == torch.float16:
            return super().forward(x)
        return F.silu(x.mul_(SLOPE), inplace=True).mul_(1 / SLOPE)


class ClassTokenBlock(ResidualAttentionBlock):
    """Last block of a tower; computes only the class token, which is the first token."""

    def forward(self, q_x: Tensor, *rest: Any, **names: Any) -> Tensor:
        """Map tokens [B, N, D] to the class token [B, 1, D]."""
        x = self.ln_1(q_x)
        first = q_x[:, :1] + self.ls_1(self.attn(x[:, :1], x, x, need_weights=False)[0])
        return first + self.ls_2(self.mlp(self.ln_2(first)))


def use_fused_blocks(model: nn.Module) -> None:
    """Replace self-attention and QuickGELU in OpenCLIP's blocks, in place; keep the weights.

    Towers of other libraries, OpenCLIP's custom blocks and cross-attention are unchanged.
    """
    for block in model.modules():
        if isinstance(block, ResidualAttentionBlock) and not hasattr(block, "ln_1_kv"):
            attn = block.attn
            assert isinstance(attn, nn.MultiheadAttention)
            if attn.batch_first:
                attn.__class__ = SelfAttention
            if isinstance(block.mlp.gelu, QuickGELU):
                block.mlp.gelu.__class__ = InPlaceQuickGELU


def read_class_token_only(model: nn.Module) -> None:
    """Restrict the last block of OpenCLIP's image tower to the class token, in place.

    Call it after :func:`use_fused_blocks`. Towers that use other tokens are unchanged.
    """
    tower = getattr(model, "visual", None)
    if not isinstance(tower, VisionTransformer) or tower.output_tokens:
        return
    last = tower.transformer.resblocks[-1]
    is_plain = isinstance(last, ResidualAttentionBlock) and isinstance(last.attn, SelfAttention)
    if is_plain and tower.pool_type == "tok" and tower.attn_pool is None:
        last.__class__ = ClassTokenBlock
