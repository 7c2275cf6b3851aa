"""Tokens-to-token module (T2T-ViT, section 3.1): map an image to tokens on a grid 16 times coarser.

A soft split flattens overlapping patches into tokens. A token layer (Performer or Transformer, one head) applies
attention to them. Re-structurization reshapes the tokens to a map for the next soft split. The module has three soft
splits and two token layers.

Dimensions: B images, C channels, H × W pixels or grid, N tokens, D token dimension, m random features.
"""
import contextlib
import dataclasses
import math
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Mlp, register_notrace_function
from torch import nn

from models.layers import attention

torch.fx.wrap('attention')  # a leaf function in this module too

# (kernel, stride, padding) of the three soft splits; 224 pixels become 56, 28, then 14 tokens a side.
SOFT_SPLITS = ((7, 4, 2), (3, 2, 1), (3, 2, 1))


@register_notrace_function
def token_grid(height: int, width: int) -> tuple[int, int]:
    """Return (rows, columns) of the tokens of an image of height × width pixels; raise ValueError below 16 a side."""
    if height < 16 or width < 16:
        raise ValueError(f'an image of {height} × {width} pixels is too small for T2T-ViT: '
                         'height and width must be at least 16')
    for kernel, stride, padding in ((7, 4, 2), (3, 2, 1), (3, 2, 1)):  # SOFT_SPLITS; TorchScript has no globals
        height = (height + 2 * padding - kernel) // stride + 1
        width = (width + 2 * padding - kernel) // stride + 1
    return height, width


@dataclasses.dataclass(frozen=True)
class Line:
    """Tokens along one side of an image: token k sees `field` pixels around pixel first + step · k."""
    count: int
    first: float = 0.
    step: float = 1.
    field: float = 1.

    def windows(self, kernel: int, stride: int, padding: int, count: int) -> 'Line':
        """Return the line of the `count` windows over these tokens, with `padding` tokens before the first."""
        return Line(count, self.first + self.step * ((kernel - 1) / 2 - padding), self.step * stride,
                    self.field + self.step * (kernel - 1))

    def centre(self, k: float) -> float:
        return self.first + self.step * k

    def nearest(self, pixel: float) -> int:
        """Return the number of the token whose centre is nearest to a pixel."""
        return min(max(math.floor((pixel - self.first) / self.step + 0.5), 0), self.count - 1)


def token_lines(height: int, width: int) -> list[tuple[Line, Line]]:
    """Return where the rows and the columns of tokens lie after each soft split of an image of height × width."""
    lines = [(Line(height), Line(width))]
    for kernel, stride, padding in SOFT_SPLITS:
        grid = SoftSplit(kernel, stride, padding).grid_size(*(line.count for line in lines[-1]))
        rows, columns = (line.windows(kernel, stride, padding, count)
                         for line, count in zip(lines[-1], grid, strict=True))
        lines.append((rows, columns))
    return lines[1:]


def without_autocast(device_type: str) -> contextlib.AbstractContextManager:
    """Return a context without mixed precision, which the meta device does not support."""
    is_on = device_type != 'meta' and torch.is_autocast_enabled(device_type)
    return torch.autocast(device_type, enabled=False) if is_on else contextlib.nullcontext()


def soft_split(x: torch.Tensor, kernel: int, stride: int, padding: int) -> torch.Tensor:
    """Return the patches of a map [B, C, H, W] as tokens [B, N, C · kernel²], each flattened as by nn.Unfold.

    This takes one copy; nn.Unfold puts the patches last, which takes a second copy to make tokens.
    """
    windows = F.pad(x, (padding, padding, padding, padding)).unfold(2, kernel, stride).unfold(3, kernel, stride)
    B, C, H, W, _, _ = windows.shape
    return windows.permute(0, 2, 3, 1, 4, 5).reshape(B, H * W, C * kernel * kernel)  # [B, N, C · k²]


@torch.fx.wrap  # a leaf function, since torch.fx cannot trace a comparison of types; so are those below
@register_notrace_function
def split_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, kernel: int, stride: int,
                 padding: int) -> torch.Tensor:
    """Return `F.linear(patches, weight, bias)` [B, N, rows of weight] for the soft split of a map [B, C, H, W].

    Computed as a convolution, so the patches (kernel² / stride² times the map) are never in memory.
    """
    kernels = weight.reshape(-1, x.shape[1], kernel, kernel)  # [rows, C, kernel, kernel]
    # In channels_last layout a map has the memory layout of its tokens, so nothing is copied.
    x = F.conv2d(x.contiguous(memory_format=torch.channels_last),
                 kernels.contiguous(memory_format=torch.channels_last), bias, stride=stride, padding=padding)
    return x.flatten(2).transpose(1, 2)  # [B, rows, H', W'] -> [B, N, rows]


@torch.fx.wrap
@register_notrace_function
def split_norm_linear(
        x: torch.Tensor, norm_weight: torch.Tensor, norm_bias: torch.Tensor, norm_eps: float, weight: torch.Tensor,
        bias: torch.Tensor | None, kernel: int, stride: int, padding: int) -> torch.Tensor:
    """Return `F.linear(F.layer_norm(patches), weight, bias)` [B, N, rows] for the soft split of a map [B, C, H, W].

    With mean μ and deviation σ of a patch x, W((x − μ)/σ · γ + β) + b equals W'x/σ + (Wβ + b), where W' is W · γ minus
    the mean of each row: a convolution by W', divided by the σ of each patch. The rounding error grows with |μ|/σ, so
    use this for maps with many channels, not for images, which have nearly constant patches.
    """
    if torch.jit.is_scripting():  # TorchScript cannot switch autocast off
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
            # Makes images of any contrast fit float16. Detached, since the result does not depend on it.
            contrast = (maps[1].detach().mean((1, 2)) + norm_eps).sqrt().view(-1, 1, 1, 1)  # [B, 1, 1, 1]
            x, factor = x / contrast, factor * contrast.squeeze(3)
        # Outside of the context, since autocast determines the dtype of the product and of the result.
        x = split_linear(x.to(weight.dtype), centred.to(weight.dtype), None, kernel, stride, padding)
        with without_autocast(x.device.type):
            return torch.addcmul(offset, x, factor).to(x.dtype)


@torch.fx.wrap
@register_notrace_function
def performer_attention(k: torch.Tensor, q: torch.Tensor, v: torch.Tensor, w: torch.Tensor,
                        eps: float = 1e-8) -> torch.Tensor:
    """Return attention in linear time by positive random features (Choromanski et al. 2021), [B, N, D] like v.

    With features φ(x) = exp(w·x − |x|²/2) / √m the result is φ(q) (φ(k)ᵀ v) / (φ(q) · Σ φ(k) + eps).

    Features reach e¹⁶, above float16's 65,504, so the computation is in float32 (float64 for such inputs and in
    TorchScript) even under autocast. The largest exponent of each q, and of all k of an image, is subtracted first.
    These factors cancel between numerator and denominator, as does 1/√m, if eps is divided by them too. Function and
    gradient are exactly the published ones. No entry exceeds the largest |v| of its image.

    Args:
        k, q, v: keys, queries and values, [B, N, D] each.
        w: fixed projections, [m, D].
        eps: published constant that keeps the quotient finite.
    """
    if torch.jit.is_scripting():
        # TorchScript cannot switch autocast off, but autocast does not change float64.
        out = _performer_attention(k.double(), q.double(), v.double(), w.double(), eps)
    else:
        dtype = torch.promote_types(v.dtype, torch.float32)
        with without_autocast(v.device.type):
            out = _performer_attention(k.to(dtype), q.to(dtype), v.to(dtype), w.to(dtype), eps)
    return out.to(v.dtype)


def _performer_attention(k: torch.Tensor, q: torch.Tensor, v: torch.Tensor, w: torch.Tensor,
                         eps: float) -> torch.Tensor:
    """Compute `performer_attention` in the dtype of its inputs, which must be able to hold the features."""
    q_exponent = q @ w.t() - q.square().sum(-1, keepdim=True) / 2  # [B, N, m]
    k_exponent = k @ w.t() - k.square().sum(-1, keepdim=True) / 2  # [B, N, m]
    # Detached, since neither the result nor its gradient depends on the shifts.
    q_shift = q_exponent.detach().amax(dim=2, keepdim=True)  # [B, N, 1], per token
    k_shift = k_exponent.detach().amax(dim=(1, 2), keepdim=True)  # [B, 1, 1], per image
    q_features = torch.exp(q_exponent - q_shift)
    k_features = torch.exp(k_exponent - k_shift)
    # The rescaled epsilon is clamped to exp(±60), well inside float32. The published layers never reach the lower
    # limit: with 32 rows of length √32 no exponent exceeds 16, and log(1e-8) - 2 · 16 > -60. At the upper limit the
    # features underflow, so the published function is 0 too.
    log_eps = math.log(eps * w.shape[0]) - q_shift - k_shift
    shifted_eps = log_eps.clamp(-60., 60.).exp()  # [B, N, 1]

    weighted_values = k_features.transpose(1, 2) @ v  # [B, m, D]
    total_weights = k_features.sum(dim=1).unsqueeze(2)  # [B, m, 1]
    return (q_features @ weighted_values) / (q_features @ total_weights + shifted_eps)  # [B, N, D]


class SoftSplit(nn.Module):
    """Soft split (section 3.1): cut a map into overlapping patches and flatten each into a token.

    This is the definition. `SplitLinear` computes a soft split and the linear layer after it without the patches.
    """

    def __init__(self, kernel: int, stride: int, padding: int):
        super().__init__()
        self.kernel, self.stride, self.padding = kernel, stride, padding

    def grid_size(self, height: int, width: int) -> tuple[int, int]:
        """Return (rows, columns) of the tokens of a map of height × width."""
        margin = 2 * self.padding - self.kernel
        return (height + margin) // self.stride + 1, (width + margin) // self.stride + 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map [B, C, H, W] to tokens [B, N, C · kernel²], row by row."""
        return soft_split(x, self.kernel, self.stride, self.padding)

    def extra_repr(self) -> str:
        return f'kernel={self.kernel}, stride={self.stride}, padding={self.padding}'


class SplitLinear(nn.Linear):
    """Linear layer after a soft split, or after a soft split and LayerNorm, without the patches in memory.

    Args:
        split: (kernel, stride, padding) of the soft split.
        in_chans: channels C of the map.
        out_features: channels of the tokens.
        of_pixels: the map is an image, whose patches are small and are computed (see `split_norm_linear`).
    """

    def __init__(self, split: tuple[int, int, int], in_chans: int, out_features: int, bias: bool = True,
                 of_pixels: bool = False, device=None, dtype=None):
        super().__init__(in_chans * split[0] ** 2, out_features, bias=bias, device=device, dtype=dtype)
        self.kernel, self.stride, self.padding = split
        self.of_pixels = of_pixels

    def forward(self, x: torch.Tensor, norm_weight: torch.Tensor | None = None, norm_bias: torch.Tensor | None = None,
                norm_eps: float = 1e-5) -> torch.Tensor:
        """Map [B, C, H, W] to tokens [B, N, out_features]; apply a LayerNorm of this weight and bias in between."""
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
    """Soft split and token layer with Performer attention, linear in the number of tokens (the published default).

    Args:
        split: (kernel, stride, padding) of the soft split.
        in_chans: channels C of the map.
        token_dim: channels D of the output tokens.
        of_pixels: the map is an image.
        kernel_ratio: random features m over D.
        drop: dropout probability after the attention's projection and after the MLP.
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
        # A Sequential, since the released keys are mlp.0 and mlp.2.
        self.mlp = nn.Sequential(
            nn.Linear(token_dim, token_dim, **dd), nn.GELU(), nn.Linear(token_dim, token_dim, **dd), nn.Dropout(drop))
        features = int(token_dim * kernel_ratio)
        # In float32, since there is no QR decomposition in lower precision.
        w = nn.init.orthogonal_(torch.empty(features, token_dim, device=device)) * math.sqrt(features)
        # A buffer, since it is not trained; saved, since the trained weights depend on it.
        self.register_buffer('w', w.to(dtype))

    def keys_queries_values(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return keys, queries and values, [B, N, D] each, of a map [B, C, H, W]."""
        k, q, v = self.kqv(x, self.norm1.weight, self.norm1.bias, self.norm1.eps).split(self.token_dim, dim=2)
        return k, q, v

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map a map [B, C, H, W] to tokens [B, N, D]."""
        k, q, v = self.keys_queries_values(x)
        # The residual starts at v, since the patches have another width (C · kernel² instead of D).
        x = v + self.dropout(self.proj(performer_attention(k, q, v, self.w)))
        return x + self.mlp(self.norm2(x))


class TokenAttention(nn.Module):
    """One-head attention of `TokenTransformer`, with its arguments; the residual starts at v."""

    def __init__(self, split: tuple[int, int, int], in_chans: int, token_dim: int, of_pixels: bool = False,
                 device=None, dtype=None):
        super().__init__()
        dd: dict[str, Any] = {'device': device, 'dtype': dtype}
        self.qkv = SplitLinear(split, in_chans, 3 * token_dim, bias=False, of_pixels=of_pixels, **dd)
        # As published: from the channels of the patches (147 or 576), not from the 64 of q and k.
        self.scale = self.qkv.in_features ** -0.5
        self.proj = nn.Linear(token_dim, token_dim, **dd)

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Map queries, keys and values, [B, N, D] each, to tokens [B, N, D]."""
        x = attention(q.unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1), scale=self.scale)
        return v + self.proj(x.squeeze(1))  # x was [B, 1, N, D]: one head


class TokenTransformer(nn.Module):
    """Soft split and token layer with full attention, quadratic in the number of tokens (T2T-ViT_t).

    Takes the first four arguments of `TokenPerformer`.
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
        """Return keys, queries and values, [B, N, D] each, of a map [B, C, H, W]."""
        q, k, v = self.attn.qkv(x, self.norm1.weight, self.norm1.bias, self.norm1.eps).chunk(3, dim=2)
        return k, q, v

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map a map [B, C, H, W] to tokens [B, N, D]."""
        k, q, v = self.keys_queries_values(x)
        x = self.attn(q, k, v)
        return x + self.mlp(self.norm2(x))


TOKEN_LAYERS = {'performer': TokenPerformer, 'transformer': TokenTransformer}


class TokensToToken(nn.Module):
    """Tokens-to-token module: twice a soft split, token layer and re-structurization; a soft split; a projection.

    Args:
        tokens_type: kind of token layers, 'performer' or 'transformer' (else ValueError).
        in_chans: channels of the image.
        embed_dim: channels of the backbone.
        token_dim: channels D of the token layers (token dimension).
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
        """Map images [B, C, H, W] to tokens [B, N, embed_dim] on the grid `token_grid(H, W)`."""
        B, _, H, W = x.shape
        x = self.attention1(x)  # [B, N0, D]
        H, W = self.soft_split0.grid_size(H, W)
        x = x.transpose(1, 2).reshape(B, x.shape[2], H, W)  # [B, D, H / 4, W / 4]
        x = self.attention2(x)  # [B, N1, D]
        H, W = self.soft_split1.grid_size(H, W)
        x = x.transpose(1, 2).reshape(B, x.shape[2], H, W)  # [B, D, H / 8, W / 8]
        return self.project(x)  # [B, N, embed_dim]
