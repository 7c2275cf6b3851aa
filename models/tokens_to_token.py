"""The Tokens-to-Token module (T2T-ViT, section 3.1): from an image to tokens on a 16 times coarser grid.

A soft split cuts overlapping patches and flattens each into one token, so that neighbours share what they
see. A token layer (Performer or Transformer, 64 channels, one head) lets the tokens look at each other, and
re-structurization lays them back on their grid for the next soft split. There are three splits, two layers.

Dimensions: B images, C channels, H × W pixels or grid, N tokens, D token dimension, m random features.
"""
import contextlib
import math
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Mlp, register_notrace_function
from torch import nn

from models.layers import attention

torch.fx.wrap('attention')  # a leaf in this module too

# (kernel, stride, padding) of the three soft splits; 224 pixels become 56, 28, then 14 tokens a side.
SOFT_SPLITS = ((7, 4, 2), (3, 2, 1), (3, 2, 1))


@register_notrace_function
def token_grid(height: int, width: int) -> tuple[int, int]:
    """Return rows and columns of the module's tokens for an image of height × width pixels.

    Raises ValueError below 16 pixels a side.
    """
    if height < 16 or width < 16:
        raise ValueError(f'an image of {height} × {width} pixels is too small for T2T-ViT: '
                         'height and width must be at least 16')
    for kernel, stride, padding in ((7, 4, 2), (3, 2, 1), (3, 2, 1)):  # SOFT_SPLITS: TorchScript sees no globals
        height = (height + 2 * padding - kernel) // stride + 1
        width = (width + 2 * padding - kernel) // stride + 1
    return height, width


def _has_autocast(device_type: str) -> bool:
    """Return whether mixed precision is on; the meta device knows none."""
    return device_type != 'meta' and torch.is_autocast_enabled(device_type)


def without_autocast(device_type: str) -> contextlib.AbstractContextManager:
    """Return a context without mixed precision."""
    return torch.autocast(device_type, enabled=False) if _has_autocast(device_type) else contextlib.nullcontext()


def soft_split(x: torch.Tensor, kernel: int, stride: int, padding: int) -> torch.Tensor:
    """Return the windows of a map [B, C, H, W], each flattened as nn.Unfold has it, [B, N, C · kernel²].

    By one copy, where nn.Unfold's, which puts windows last, needs a second one to lay them out as tokens.
    """
    windows = F.pad(x, (padding, padding, padding, padding)).unfold(2, kernel, stride).unfold(3, kernel, stride)
    B, C, H, W, _, _ = windows.shape
    return windows.permute(0, 2, 3, 1, 4, 5).reshape(B, H * W, C * kernel * kernel)  # [B, N, C · k²]


@torch.fx.wrap  # leaves to torch.fx, like all functions here that look at types
@register_notrace_function
def split_linear(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        kernel: int,
        stride: int,
        padding: int,
) -> torch.Tensor:
    """Return `F.linear(patches, weight, bias)` of the soft split of a map [B, C, H, W], [B, N, rows of weight].

    A convolution: the patches, kernel² / stride² times the map, are never in memory.
    """
    kernels = weight.reshape(-1, x.shape[1], kernel, kernel)  # [rows, C, kernel, kernel]
    # In this layout a map is its tokens, so that nothing is copied before or behind.
    x = F.conv2d(x.contiguous(memory_format=torch.channels_last),
                 kernels.contiguous(memory_format=torch.channels_last), bias, stride=stride, padding=padding)
    return x.flatten(2).transpose(1, 2)  # [B, rows, H', W'] -> [B, N, rows]


@torch.fx.wrap
@register_notrace_function
def split_norm_linear(
        x: torch.Tensor,
        norm_weight: torch.Tensor,
        norm_bias: torch.Tensor,
        norm_eps: float,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        kernel: int,
        stride: int,
        padding: int,
) -> torch.Tensor:
    """Return `F.linear(F.layer_norm(patches), weight, bias)` of the soft split of a map [B, C, H, W], [B, N, rows].

    With mean μ and deviation σ of a patch x, W((x − μ)/σ · γ + β) + b is W'x/σ + (Wβ + b), where W' is W · γ less the
    mean of each of its rows: a convolution by W', divided by the σ of each window. Rounding grows with |μ|/σ: this is
    for maps of many channels, not for images, where a patch of sky is all but flat.
    """
    if torch.jit.is_scripting():  # which cannot switch autocast off
        patches = soft_split(x, kernel, stride, padding)  # [B, N, C · kernel²]
        return F.linear(F.layer_norm(patches, norm_weight.shape, norm_weight, norm_bias, norm_eps), weight, bias)
    else:
        with without_autocast(x.device.type):
            dtype = torch.promote_types(weight.dtype, torch.float32)
            x, wide = x.to(dtype), weight.to(dtype)
            scaled = wide * norm_weight
            centred = scaled - scaled.mean(dim=1, keepdim=True)  # [rows, C · kernel²]
            offset = (wide * norm_bias).sum(dim=1)  # [rows]
            if bias is not None:
                offset = offset + bias
            maps = torch.stack((x.mean(1), x.square().mean(1)))  # [2, B, H, W]
            mean, square = F.avg_pool2d(maps, kernel, stride, padding).flatten(2).unsqueeze(3)  # [B, N, 1] each
            factor = ((square - mean.square()).clamp(min=0) + norm_eps).rsqrt()  # 1/σ, [B, N, 1]
            # Images of any contrast fit into float16 this way. Detached, for the result does not depend on it.
            contrast = (maps[1].detach().mean((1, 2)) + norm_eps).sqrt().view(-1, 1, 1, 1)  # [B, 1, 1, 1]
            x, factor = x / contrast, factor * contrast.squeeze(3)
        # Only now autocast, which says what is multiplied, and so what comes out.
        x = split_linear(x.to(weight.dtype), centred.to(weight.dtype), None, kernel, stride, padding)
        with without_autocast(x.device.type):
            return torch.addcmul(offset, x, factor).to(x.dtype)


@torch.fx.wrap
@register_notrace_function
def performer_attention(
        k: torch.Tensor,
        q: torch.Tensor,
        v: torch.Tensor,
        w: torch.Tensor,
        eps: float = 1e-8,
) -> torch.Tensor:
    """Attention in linear time by positive random features (Choromanski et al. 2021), as T2T-ViT uses it.

    With features φ(x) = exp(w·x − |x|²/2) / √m the result is φ(q) (φ(k)ᵀ v) / (φ(q) · Σ φ(k) + eps).

    Features reach e¹⁶, far above float16's 65,504. So all of this is float32 (float64 where the inputs are, and
    in TorchScript), whatever autocast says, and the largest exponent of each q, and of all k of an image, is
    subtracted first, so that activations of any size are safe. These factors cancel between numerator and
    denominator if eps is divided by them too, and so does 1/√m: function and gradient are exactly the
    published ones.

    Args:
        k, q, v: keys, queries and values, [B, N, D] each.
        w: fixed projections, [m, D].
        eps: published constant that keeps the quotient finite.

    Returns:
        [B, N, D] in the dtype of v, which can hold it: no entry exceeds the largest |v| of its image.
    """
    if torch.jit.is_scripting():
        # TorchScript cannot switch autocast off, but autocast leaves float64 alone.
        out = _performer_attention(k.double(), q.double(), v.double(), w.double(), eps)
    else:
        dtype = torch.promote_types(v.dtype, torch.float32)
        with without_autocast(v.device.type):
            out = _performer_attention(k.to(dtype), q.to(dtype), v.to(dtype), w.to(dtype), eps)
    return out.to(v.dtype)


def _performer_attention(
        k: torch.Tensor,
        q: torch.Tensor,
        v: torch.Tensor,
        w: torch.Tensor,
        eps: float,
) -> torch.Tensor:
    """Compute `performer_attention` in the dtype of its inputs, which must hold the features' range."""
    q_exponent = q @ w.t() - q.square().sum(-1, keepdim=True) / 2  # [B, N, m]
    k_exponent = k @ w.t() - k.square().sum(-1, keepdim=True) / 2  # [B, N, m]
    # Detached: the result does not depend on the shifts, so nor does its gradient.
    q_shift = q_exponent.detach().amax(dim=2, keepdim=True)  # [B, N, 1], per token
    k_shift = k_exponent.detach().amax(dim=(1, 2), keepdim=True)  # [B, 1, 1], per image
    q_features = torch.exp(q_exponent - q_shift)
    k_features = torch.exp(k_exponent - k_shift)
    # The rescaled epsilon stays between exp(-60) and exp(60), well inside float32. Its lower end is out of reach of
    # the published layers: with 32 rows of length √32 no exponent exceeds 16, and log(1e-8) - 2 · 16 > -60. At its
    # upper end the features underflow: the published function is 0 like ours.
    log_eps = math.log(eps * w.shape[0]) - q_shift - k_shift
    shifted_eps = log_eps.clamp(-60., 60.).exp()  # [B, N, 1]

    weighted_values = k_features.transpose(1, 2) @ v  # [B, m, D]
    total_weights = k_features.sum(dim=1).unsqueeze(2)  # [B, m, 1]
    return (q_features @ weighted_values) / (q_features @ total_weights + shifted_eps)  # [B, N, D]


class SoftSplit(nn.Module):
    """Overlapping patches of a map, each flattened into one token (section 3.1, "soft split").

    This is the definition. The layers behind a split are `SplitLinear`, which for maps needs no patches.
    """

    def __init__(self, kernel: int, stride: int, padding: int):
        super().__init__()
        self.kernel, self.stride, self.padding = kernel, stride, padding

    def grid_size(self, height: int, width: int) -> tuple[int, int]:
        """Return rows and columns of the tokens of a map of height × width."""
        margin = 2 * self.padding - self.kernel
        return (height + margin) // self.stride + 1, (width + margin) // self.stride + 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map [B, C, H, W] to tokens [B, N, C · kernel²], row by row."""
        return soft_split(x, self.kernel, self.stride, self.padding)

    def extra_repr(self) -> str:
        return f'kernel={self.kernel}, stride={self.stride}, padding={self.padding}'


class SplitLinear(nn.Linear):
    """A linear layer behind a soft split, or behind a soft split and LayerNorm, with no patches of maps in memory.

    Args:
        split: kernel, stride and padding of the soft split.
        in_chans: channels C of the map.
        out_features: channels of the tokens.
        of_pixels: the map is an image, whose patches, of few channels, are made (see `split_norm_linear`).
    """

    def __init__(self, split: tuple[int, int, int], in_chans: int, out_features: int, bias: bool = True,
                 of_pixels: bool = False, device=None, dtype=None):
        super().__init__(in_chans * split[0] ** 2, out_features, bias=bias, device=device, dtype=dtype)
        self.kernel, self.stride, self.padding = split
        self.of_pixels = of_pixels

    def forward(
            self,
            x: torch.Tensor,
            norm_weight: torch.Tensor | None = None,
            norm_bias: torch.Tensor | None = None,
            norm_eps: float = 1e-5,
    ) -> torch.Tensor:
        """Map [B, C, H, W] to tokens [B, N, out_features]; with the weight and bias of a LayerNorm, through it."""
        if norm_weight is None or norm_bias is None:
            return split_linear(x, self.weight, self.bias, self.kernel, self.stride, self.padding)
        if self.of_pixels:
            patches = soft_split(x, self.kernel, self.stride, self.padding)
            return F.linear(F.layer_norm(patches, norm_weight.shape, norm_weight, norm_bias, norm_eps),
                            self.weight, self.bias)
        return split_norm_linear(x, norm_weight, norm_bias, norm_eps, self.weight, self.bias,
                                 self.kernel, self.stride, self.padding)

    def extra_repr(self) -> str:
        return f'{super().extra_repr()}, kernel={self.kernel}, stride={self.stride}, padding={self.padding}'


class TokenPerformer(nn.Module):
    """Soft split and token layer with Performer attention: the published default, linear in the number of tokens.

    Args:
        split: kernel, stride and padding of the soft split.
        in_chans: channels C of the map.
        token_dim: channels D of the outgoing tokens.
        of_pixels: the map is an image.
        kernel_ratio: random features m over D.
        drop: dropout probability after the attention's projection and after the MLP, active in training.
    """

    w: torch.Tensor

    def __init__(self, split: tuple[int, int, int], in_chans: int, token_dim: int, of_pixels: bool = False,
                 kernel_ratio: float = 0.5, drop: float = 0.1, device=None, dtype=None):
        super().__init__()
        dd: dict[str, Any] = {'device': device, 'dtype': dtype}
        self.token_dim = token_dim
        self.kqv = SplitLinear(split, in_chans, 3 * token_dim, of_pixels=of_pixels, **dd)
        self.proj = nn.Linear(token_dim, token_dim, **dd)
        self.dropout = nn.Dropout(drop)
        self.norm1 = nn.LayerNorm(self.kqv.in_features, **dd)
        self.norm2 = nn.LayerNorm(token_dim, **dd)
        # A Sequential for the sake of the released keys, mlp.0 and mlp.2.
        self.mlp = nn.Sequential(
            nn.Linear(token_dim, token_dim, **dd), nn.GELU(), nn.Linear(token_dim, token_dim, **dd), nn.Dropout(drop))
        features = int(token_dim * kernel_ratio)
        # Drawn in float32: there is no QR decomposition in lower precision.
        w = nn.init.orthogonal_(torch.empty(features, token_dim, device=device)) * math.sqrt(features)
        # Never trained, so a buffer; saved, because the trained weights belong to this draw.
        self.register_buffer('w', w.to(dtype))

    def keys_queries_values(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return k, q and v of a map [B, C, H, W], [B, N, D] each."""
        k, q, v = self.kqv(x, self.norm1.weight, self.norm1.bias, self.norm1.eps).split(self.token_dim, dim=2)
        return k, q, v

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map a map [B, C, H, W] to tokens [B, N, D]."""
        k, q, v = self.keys_queries_values(x)
        # The width changes from C · kernel² to D, so the residual starts at v instead of the patches.
        x = v + self.dropout(self.proj(performer_attention(k, q, v, self.w)))
        return x + self.mlp(self.norm2(x))


class TokenAttention(nn.Module):
    """One-head attention of a Transformer token layer, whose arguments it takes; the residual is taken from v."""

    def __init__(self, split: tuple[int, int, int], in_chans: int, token_dim: int, of_pixels: bool = False,
                 device=None, dtype=None):
        super().__init__()
        dd: dict[str, Any] = {'device': device, 'dtype': dtype}
        self.qkv = SplitLinear(split, in_chans, 3 * token_dim, bias=False, of_pixels=of_pixels, **dd)
        # As published: of the incoming channels (147 or 576), not of the 64 that q and k have.
        self.scale = self.qkv.in_features ** -0.5
        self.proj = nn.Linear(token_dim, token_dim, **dd)

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Map queries, keys and values, [B, N, D] each, to tokens [B, N, D]."""
        x = attention(q.unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1), scale=self.scale)
        return v + self.proj(x.squeeze(1))  # x was [B, 1, N, D]: one head


class TokenTransformer(nn.Module):
    """Soft split and token layer with full attention: more accurate, quadratic in the number of tokens (T2T-ViT_t).

    Args:
        split: kernel, stride and padding of the soft split.
        in_chans: channels C of the map.
        token_dim: channels D of the outgoing tokens.
        of_pixels: the map is an image.
    """

    def __init__(self, split: tuple[int, int, int], in_chans: int, token_dim: int, of_pixels: bool = False,
                 device=None, dtype=None):
        super().__init__()
        dd: dict[str, Any] = {'device': device, 'dtype': dtype}
        self.norm1 = nn.LayerNorm(in_chans * split[0] ** 2, **dd)
        self.attn = TokenAttention(split, in_chans, token_dim, of_pixels, **dd)
        self.norm2 = nn.LayerNorm(token_dim, **dd)
        self.mlp = Mlp(token_dim, **dd)

    def keys_queries_values(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return k, q and v of a map [B, C, H, W], [B, N, D] each."""
        q, k, v = self.attn.qkv(x, self.norm1.weight, self.norm1.bias, self.norm1.eps).chunk(3, dim=2)
        return k, q, v

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map a map [B, C, H, W] to tokens [B, N, D]."""
        k, q, v = self.keys_queries_values(x)
        x = self.attn(q, k, v)
        return x + self.mlp(self.norm2(x))


TOKEN_LAYERS = {'performer': TokenPerformer, 'transformer': TokenTransformer}


class TokensToToken(nn.Module):
    """Soft split, token layer, re-structurization, twice; a last soft split; projection to the backbone.

    Args:
        tokens_type: 'performer' or 'transformer' (ValueError otherwise).
        in_chans: channels of the image.
        embed_dim: channels of the backbone.
        token_dim: channels D of the token layers.
    """

    def __init__(self, tokens_type: str, in_chans: int, embed_dim: int, token_dim: int, device=None, dtype=None):
        super().__init__()
        dd: dict[str, Any] = {'device': device, 'dtype': dtype}
        if tokens_type not in TOKEN_LAYERS:
            raise ValueError(f'tokens_type is {tokens_type!r}; choose from {", ".join(TOKEN_LAYERS)}')
        token_layer = TOKEN_LAYERS[tokens_type]
        self.soft_split0, self.soft_split1, self.soft_split2 = (SoftSplit(*split) for split in SOFT_SPLITS)
        self.attention1 = token_layer(SOFT_SPLITS[0], in_chans, token_dim, of_pixels=True, **dd)
        self.attention2 = token_layer(SOFT_SPLITS[1], token_dim, token_dim, **dd)
        self.project = SplitLinear(SOFT_SPLITS[2], token_dim, embed_dim, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map images [B, C, H, W] to tokens [B, N, embed_dim] on the grid that `token_grid(H, W)` tells."""
        B, _, H, W = x.shape
        x = self.attention1(x)  # [B, N0, D]
        H, W = self.soft_split0.grid_size(H, W)
        x = x.transpose(1, 2).reshape(B, x.shape[2], H, W)  # [B, D, H / 4, W / 4]
        x = self.attention2(x)  # [B, N1, D]
        H, W = self.soft_split1.grid_size(H, W)
        x = x.transpose(1, 2).reshape(B, x.shape[2], H, W)  # [B, D, H / 8, W / 8]
        return self.project(x)  # [B, N, embed_dim]
