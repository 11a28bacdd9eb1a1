"""OpenCLIP's transformer blocks, computed faster: the same weights, names and vectors.

Attention goes through :func:`pab.core.devices.attention`, where torch's own module spells it out
(images) or copies its matrix for every row of a batch (captions in bfloat16 on a CPU); QuickGELU
works in place; and where only an image's class token is read, the last block computes no other.

Shape letters: `B` batch, `H` heads, `N` tokens, `D` width.
"""

from __future__ import annotations

from typing import Any

import torch
from open_clip.transformer import QuickGELU, ResidualAttentionBlock, VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from pab.core.devices import attention

SLOPE = 1.702  # QuickGELU's


class SelfAttention(nn.MultiheadAttention):
    """torch's attention where queries, keys and values come from one input; batch first."""

    def forward(  # type: ignore[override]
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        **rest: Any,
    ) -> tuple[Tensor, None]:
        """Attend.

        Args:
            query: [B, M, D]: ``key``, or its first M tokens.
            key: [B, N, D].
            value: ``key`` itself.
            attn_mask: added to the logits: [M, N], or [B * H, M, N].
            rest: ``need_weights=False``, as the blocks ask for.

        Returns:
            [B, M, D], and no weights.
        """
        assert key is value, "not how a block calls"
        assert rest == {"need_weights": False}, "not how a block calls"
        qkv = F.linear(key, self.in_proj_weight, self.in_proj_bias)
        # [B, N, 3 * D] -> three of [B, H, N, D / H]; copied, for heads apart are read slowly
        qkv = qkv.unflatten(-1, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.contiguous()
        if attn_mask is not None and attn_mask.ndim == 3:
            attn_mask = attn_mask.unflatten(0, (-1, self.num_heads))
        out = attention(q[:, :, : query.shape[1]], k, v, attn_mask)
        return self.out_proj(out.transpose(1, 2).flatten(2)), None


class InPlaceQuickGELU(QuickGELU):
    """``x * sigmoid(1.702 * x)`` in one pass over its input's memory, where no gradient needs it.

    Its input, a matrix product's output, is read by nothing else; at 336 px it is 9 MB an image.
    Float16 is left as it is: 1.702 times its largest numbers would be infinite.
    """

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() or x.dtype == torch.float16:
            return super().forward(x)
        return F.silu(x.mul_(SLOPE), inplace=True).mul_(1 / SLOPE)


class ClassTokenBlock(ResidualAttentionBlock):
    """The last block of a tower of which only the class token, the first, is read."""

    def forward(self, q_x: Tensor, *rest: Any, **names: Any) -> Tensor:
        """[B, N, D] -> [B, 1, D]."""
        x = self.ln_1(q_x)
        first = q_x[:, :1] + self.ls_1(self.attn(x[:, :1], x, x, need_weights=False)[0])
        return first + self.ls_2(self.mlp(self.ln_2(first)))


def use_fused_blocks(model: nn.Module) -> None:
    """Change self-attention and QuickGELU of OpenCLIP's blocks in a model; its weights stay.

    Towers of other libraries, OpenCLIP's custom blocks and cross attention are left alone.
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
    """Change the last block of OpenCLIP's image tower, in place, where its class token is all.

    After :func:`use_fused_blocks`; other towers are left alone.
    """
    tower = getattr(model, "visual", None)
    if not isinstance(tower, VisionTransformer) or tower.output_tokens:
        return
    last = tower.transformer.resblocks[-1]
    is_plain = isinstance(last, ResidualAttentionBlock) and isinstance(last.attn, SelfAttention)
    if is_plain and tower.pool_type == "tok" and tower.attn_pool is None:
        last.__class__ = ClassTokenBlock
