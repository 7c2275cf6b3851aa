"""The Tokens-to-Token module (T2T-ViT, section 3.1): from an image to tokens on a 16 times coarser grid.

A soft split cuts overlapping patches and flattens each into one token, so that neighbours share what they
see. A token layer (Performer or Transformer, 64 channels, one head) lets the tokens look at each other, and
re-structurization lays them back on their grid for the next soft split. There are three splits, two layers.

Dimensions: B images, C channels, H × W pixels or grid, N tokens, D token dimension, m random features.
"""
import contextlib
import math

import torch
import torch.nn.functional as F
from timm.layers import Mlp, register_notrace_function
from torch import nn

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
        height = (height + 2 * padding - kernel + stride) // stride
        width = (width + 2 * padding - kernel + stride) // stride
    return height, width


class SoftSplit(nn.Module):
    """Overlapping patches of a map, each flattened into one token (section 3.1, "soft split")."""

    def __init__(self, kernel: int, stride: int, padding: int):
        super().__init__()
        self.kernel, self.stride, self.padding = kernel, stride, padding

    def grid_size(self, height: int, width: int) -> tuple[int, int]:
        """Return rows and columns of the tokens of a map of height × width."""
        # In the form in which torch.export knows unfold's output, so that it sees them equal for any size of image.
        margin = 2 * self.padding - self.kernel + self.stride
        return (height + margin) // self.stride, (width + margin) // self.stride

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map [B, C, H, W] to tokens [B, N, C · kernel²], row by row."""
        return F.unfold(x, self.kernel, stride=self.stride, padding=self.padding).transpose(1, 2)

    def extra_repr(self) -> str:
        return f'kernel={self.kernel}, stride={self.stride}, padding={self.padding}'


def _without_autocast(device_type: str) -> contextlib.AbstractContextManager:
    """Return a context without mixed precision; the meta device, which knows none, is left as it is."""
    if device_type == 'meta':
        return contextlib.nullcontext()
    return torch.autocast(device_type, enabled=False)


@torch.fx.wrap  # a leaf to torch.fx, which cannot record the autocast context
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
        with _without_autocast(v.device.type):
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


class TokenPerformer(nn.Module):
    """Token layer with Performer attention: the published default, linear in the number of tokens.

    Args:
        dim: channels of the incoming tokens.
        token_dim: channels D of the outgoing tokens.
        kernel_ratio: random features m over D.
        drop: dropout probability after the attention's projection and after the MLP, active in training.
    """

    def __init__(self, dim: int, token_dim: int, kernel_ratio: float = 0.5, drop: float = 0.1,
                 device=None, dtype=None):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.token_dim = token_dim
        self.kqv = nn.Linear(dim, 3 * token_dim, **dd)
        self.proj = nn.Linear(token_dim, token_dim, **dd)
        self.dropout = nn.Dropout(drop)
        self.norm1 = nn.LayerNorm(dim, **dd)
        self.norm2 = nn.LayerNorm(token_dim, **dd)
        # A Sequential for the sake of the released keys, mlp.0 and mlp.2.
        self.mlp = nn.Sequential(
            nn.Linear(token_dim, token_dim, **dd), nn.GELU(), nn.Linear(token_dim, token_dim, **dd), nn.Dropout(drop))
        features = int(token_dim * kernel_ratio)
        # Drawn in float32: there is no QR decomposition in lower precision.
        w = nn.init.orthogonal_(torch.empty(features, token_dim, device=device)) * math.sqrt(features)
        # Never trained, so a buffer; saved, because the trained weights belong to this draw.
        self.register_buffer('w', w.to(dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map tokens [B, N, dim] to tokens [B, N, D]."""
        k, q, v = self.kqv(self.norm1(x)).split(self.token_dim, dim=2)
        # The width changes from dim to D, so the residual starts at v instead of x.
        x = v + self.dropout(self.proj(performer_attention(k, q, v, self.w)))
        return x + self.mlp(self.norm2(x))


class TokenAttention(nn.Module):
    """One-head attention from dim to token_dim channels, with the residual taken from v."""

    def __init__(self, dim: int, token_dim: int, device=None, dtype=None):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        # As published: of the incoming channels (147 or 576), not of the 64 that q and k have.
        self.scale = dim ** -0.5
        self.qkv = nn.Linear(dim, 3 * token_dim, bias=False, **dd)
        self.proj = nn.Linear(token_dim, token_dim, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map tokens [B, N, dim] to tokens [B, N, D]."""
        q, k, v = self.qkv(x).unsqueeze(1).chunk(3, dim=3)  # each [B, 1, N, D]
        x = F.scaled_dot_product_attention(q, k, v, scale=self.scale)
        return (v + self.proj(x)).squeeze(1)  # [B, N, D]


class TokenTransformer(nn.Module):
    """Token layer with full attention: more accurate, quadratic in the number of tokens (T2T-ViT_t).

    Args:
        dim: channels of the incoming tokens.
        token_dim: channels D of the outgoing tokens.
    """

    def __init__(self, dim: int, token_dim: int, device=None, dtype=None):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.norm1 = nn.LayerNorm(dim, **dd)
        self.attn = TokenAttention(dim, token_dim, **dd)
        self.norm2 = nn.LayerNorm(token_dim, **dd)
        self.mlp = Mlp(token_dim, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map tokens [B, N, dim] to tokens [B, N, D]."""
        x = self.attn(self.norm1(x))
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
        dd = {'device': device, 'dtype': dtype}
        if tokens_type not in TOKEN_LAYERS:
            raise ValueError(f'tokens_type is {tokens_type!r}; choose from {", ".join(TOKEN_LAYERS)}')
        token_layer = TOKEN_LAYERS[tokens_type]
        (kernel0, _, _), (kernel1, _, _), (kernel2, _, _) = SOFT_SPLITS
        self.soft_split0, self.soft_split1, self.soft_split2 = (SoftSplit(*split) for split in SOFT_SPLITS)
        self.attention1 = token_layer(in_chans * kernel0 ** 2, token_dim, **dd)
        self.attention2 = token_layer(token_dim * kernel1 ** 2, token_dim, **dd)
        self.project = nn.Linear(token_dim * kernel2 ** 2, embed_dim, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map images [B, C, H, W] to tokens [B, N, embed_dim] on the grid that `token_grid(H, W)` tells."""
        B, _, H, W = x.shape
        x = self.attention1(self.soft_split0(x))  # [B, N0, D]
        H, W = self.soft_split0.grid_size(H, W)
        x = x.transpose(1, 2).reshape(B, x.shape[2], H, W)  # [B, D, H / 4, W / 4]
        x = self.attention2(self.soft_split1(x))  # [B, N1, D]
        H, W = self.soft_split1.grid_size(H, W)
        x = x.transpose(1, 2).reshape(B, x.shape[2], H, W)  # [B, D, H / 8, W / 8]
        return self.project(self.soft_split2(x))  # [B, N, embed_dim]
