"""Parts of the T2T-ViT backbone: sinusoid table, multi-head attention, transformer block (the MLP is timm's).

Dimensions: B images, N tokens, C channels, h heads, d = C / h channels of a head.
"""
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Mlp, register_notrace_function
from torch import nn

HAS_MATRIX_UNITS = torch.cpu._is_amx_tile_supported()  # whether this CPU has AMX


def sinusoid_table(num_positions: int, dim: int, device=None, dtype=None) -> torch.Tensor:
    """Return the fixed position embedding of Vaswani et al. 2017 (section 3.5), [1, num_positions, dim].

    Even channels i are sin(position / 10000^(2⌊i/2⌋/dim)), odd channels the cosine of the same angle. In T2T-ViT,
    position 0 belongs to the class token; the grid follows row by row.
    """
    positions = torch.arange(num_positions, dtype=torch.float64)
    channels = torch.arange(dim, dtype=torch.float64)
    wavelengths = 10000 ** (2 * torch.div(channels, 2, rounding_mode='floor') / dim)
    # In float64, since in float32 the error of a large angle exceeds the rounding of the result.
    angles = positions[:, None] / wavelengths  # [num_positions, dim]
    table = torch.where(channels % 2 == 0, angles.sin(), angles.cos())
    return table.unsqueeze(0).to(device=device, dtype=dtype or torch.get_default_dtype())


@torch.fx.wrap  # a leaf function, since torch.fx cannot trace a comparison of types
@register_notrace_function
def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, dropout: float = 0.) -> torch.Tensor:
    """Return softmax(scale · q kᵀ) v, all [B, h, N, d], by torch's fused kernel.

    In bfloat16 on a CPU without matrix units the fused kernel is twice as slow as the written-out formula, which is
    used there for up to 1,024 tokens (for more, the memory of the weights makes it slower).
    """
    if not torch.jit.is_scripting():
        if q.dtype == torch.bfloat16 and q.device.type == 'cpu' and not HAS_MATRIX_UNITS and k.shape[2] <= 1024:
            weights = (q * scale @ k.transpose(2, 3)).softmax(dim=3)  # [B, h, N, N]
            return F.dropout(weights, dropout) @ v
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scale)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, num_heads: int, dropout: float) -> torch.Tensor:
    """Return multi-head attention [B, N, C] of q, k and v, [B, N, C] each, with `dropout` of the weights.

    A function instead of a method, since TorchScript does not support `super().forward`.
    """
    B, N, C = v.shape
    q = q.reshape(B, N, num_heads, C // num_heads).transpose(1, 2)  # [B, h, N, d]
    k = k.reshape(B, N, num_heads, C // num_heads).transpose(1, 2)  # [B, h, N, d]
    v = v.reshape(B, N, num_heads, C // num_heads).transpose(1, 2)  # [B, h, N, d]
    x = attention(q, k, v, scale=(C // num_heads) ** -0.5, dropout=dropout)
    return x.transpose(1, 2).reshape(B, N, C)  # [B, h, N, d] -> [B, N, C]


class Attention(nn.Module):
    """Multi-head self-attention of the backbone (T2T-ViT, section 3.2), without bias for q, k and v.

    Args:
        dim: channels C of the tokens.
        num_heads: number of heads h; raises ValueError unless it divides C.
        attn_drop: dropout probability of the attention weights.
        proj_drop: dropout probability after the output projection.
    """

    def __init__(self, dim: int, num_heads: int, attn_drop: float = 0., proj_drop: float = 0.,
                 device=None, dtype=None):
        super().__init__()
        dd: dict[str, Any] = {'device': device, 'dtype': dtype}
        if dim % num_heads:
            raise ValueError(f'embed_dim {dim} is not divisible by num_heads {num_heads}')
        self.num_heads = num_heads
        self.attn_drop_rate = attn_drop
        self.qkv = nn.Linear(dim, 3 * dim, bias=False, **dd)
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map tokens [B, N, C] to tokens [B, N, C]."""
        q, k, v = self.qkv(x).chunk(3, dim=2)  # each [B, N, C]
        x = attend(q, k, v, self.num_heads, self.attn_drop_rate if self.training else 0.)
        return self.proj_drop(self.proj(x))


class DropPath(nn.Module):
    """Stochastic depth: in training, drop a residual branch for some images and scale it up for the others.

    Unlike timm's, the rate is a tensor, so torch.compile makes one graph for all blocks. For a number, torch 2.11
    makes a graph for each value. `drop_prob`, the probability of dropping, must be below 1.
    """

    keep: torch.Tensor

    def __init__(self, drop_prob: float, device: torch.device | str | None = None):
        super().__init__()
        self.drop_prob = drop_prob
        self.register_buffer('keep', torch.empty((), device=device), persistent=False)
        self.init_non_persistent_buffers()

    def init_non_persistent_buffers(self) -> None:
        """Fill the buffer that is not saved; timm calls this after creating layers on the meta device."""
        self.keep.fill_(1. - self.drop_prob)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map [B, N, C] to [B, N, C]."""
        if not self.training:
            return x
        kept = torch.rand([x.shape[0], 1, 1], device=x.device) < self.keep  # [B, 1, 1]
        return x * (kept / self.keep).to(x.dtype)

    def extra_repr(self) -> str:
        return f'drop_prob={self.drop_prob:.3f}'


class Block(nn.Module):
    """Pre-norm transformer block: x + attention(norm(x)), then x + mlp(norm(x)).

    Args:
        dim: channels C of the tokens.
        num_heads: attention heads.
        mlp_ratio: hidden channels of the MLP over C.
        drop: dropout probability after the attention's projection and in the MLP.
        attn_drop: dropout probability of the attention weights.
        drop_path: probability of dropping a residual branch for one image (stochastic depth).
        norm_layer: called with C, and device and dtype by name.
        act_layer: activation of the MLP.
    """

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, drop: float = 0., attn_drop: float = 0.,
                 drop_path: float = 0., norm_layer: Callable[..., nn.Module] = nn.LayerNorm,
                 act_layer: type[nn.Module] = nn.GELU, device=None, dtype=None):
        super().__init__()
        dd: dict[str, Any] = {'device': device, 'dtype': dtype}
        self.norm1 = norm_layer(dim, **dd)
        # Subclasses replace these modules; TorchScript does not allow class annotations of them.
        self.attn: nn.Module = Attention(dim, num_heads, attn_drop=attn_drop, proj_drop=drop, **dd)
        self.drop_path = DropPath(drop_path, device=device) if drop_path > 0. else nn.Identity()
        self.norm2 = norm_layer(dim, **dd)
        self.mlp: nn.Module = Mlp(dim, int(dim * mlp_ratio), act_layer=act_layer, drop=drop, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map tokens [B, N, C] to tokens [B, N, C]."""
        x = x + self.drop_path(self.attn(self.norm1(x)))
        x = x + self.drop_path(self.mlp(self.norm2(x)))
        return x
