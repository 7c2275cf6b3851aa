"""Build the ablations and baselines of the paper: CNN designs in T2T-ViT and ViT, convolutions instead of soft splits.

Published at 224 pixels (section 4.2, Table 6; section 4.3, Table 7). The last column is counted on these models.

| model | design | depth × channels | top-1 | parameters | MACs | counted |
|---|---|---|---|---|---|---|
| t2t_vit_14_se | squeeze-excitation | 14 × 384 | 81.6 | 21.9 M | 4.9 G | 21.80 M, 4.78 G |
| t2t_vit_dense | dense connections | 19 × 128 to 584 | 80.6 | 23.7 M | 5.5 G | 23.65 M, 5.28 G |
| t2t_vit_16_ghost | ghost operations | 16 × 384 | 79.5 | 16.3 M | 3.7 G | 16.25 M, 3.80 G |
| t2t_vit_c_14 | convolution tokens | 14 × 384 | 80.8 | 21.3 M | 4.6 G | 21.42 M, 4.59 G |
| vit_s_16 | ViT, the baseline | 8 × 768 | 78.1 | 48.6 M | 10.1 G | 48.75 M, 9.89 G |
| vit_se | squeeze-excitation | 8 × 768 | 78.4 | 49.2 M | 10.2 G | 49.34 M, 9.89 G |
| vit_dn | deep-narrow | 16 × 384 | 79.0 | 24.5 M | 5.5 G | 24.41 M, 5.18 G |

The published parameters of t2t_vit_c_14, vit_s_16 and vit_se exclude class token and position embedding. The formulas
behind the published MACs are unknown. The first three models have exactly the parameters of the authors' code.

t2t_vit_14_resnext (81.5, 21.5 M, 4.8 G) and t2t_vit_14_wide (77.9, 25.1 M, 5.0 G) are rows of `VARIANTS` in t2t_vit.py.
The authors released no weights of the ablations. The T2T-ViTs have the state dict keys, shapes and order of their code.

Dimensions: B images, N tokens, C channels, H × W pixels or grid, D token dimension.
"""
from collections.abc import Callable, Sequence
from typing import Any

import torch
from timm.layers import calculate_drop_path_rates
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import (
    Block as ViTBlock,
    VisionTransformer,
    checkpoint_filter_fn as vit_checkpoint_filter_fn,
)
from torch import nn

from models.layers import Attention, Block, attend
from models.t2t_vit import FEATURE_CFG, T2TViT, build_t2t_vit, init_weights, pretrained_cfg
from models.tokens_to_token import SOFT_SPLITS

__all__ = ['ConvolutionTokens', 'DenseBlock', 'GhostBlock', 'SEBlock', 'SEViTBlock', 'T2TViTDense', 'Transition']


# --- Squeeze-excitation -----------------------------------------------------------------------------------------------

class SqueezeExcitation(nn.Module):
    """Weight each channel by a gate computed from the channel means over all tokens (Hu et al. 2018), reduction 16."""

    def __init__(self, dim: int, device=None, dtype=None):
        super().__init__()
        dd: dict[str, Any] = {'device': device, 'dtype': dtype}
        # A Sequential, since the published keys are fc.0 and fc.2.
        self.fc = nn.Sequential(
            nn.Linear(dim, dim // 16, bias=False, **dd), nn.ReLU(),
            nn.Linear(dim // 16, dim, bias=False, **dd), nn.Sigmoid())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map tokens [B, N, C] to tokens [B, N, C]."""
        return x * self.fc(x.mean(dim=1, keepdim=True))  # [B, N, C] * [B, 1, C]


class SEAttention(Attention):
    """Attention of the backbone with squeeze-excitation after its output projection; takes `Attention`'s arguments."""

    def __init__(self, dim: int, num_heads: int, attn_drop: float = 0., proj_drop: float = 0., device=None, dtype=None):
        super().__init__(dim, num_heads, attn_drop, proj_drop, device=device, dtype=dtype)
        self.se_layer = SqueezeExcitation(dim, device=device, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map tokens [B, N, C] to tokens [B, N, C]."""
        q, k, v = self.qkv(x).chunk(3, dim=2)  # each [B, N, C]
        x = attend(q, k, v, self.num_heads, self.attn_drop_rate if self.training else 0.)
        return self.proj_drop(self.se_layer(self.proj(x)))


class SEBlock(Block):
    """Block of the backbone with `SEAttention`; takes the arguments of `Block`."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, drop: float = 0., attn_drop: float = 0.,
                 device=None, dtype=None, **kwargs: Any):
        super().__init__(dim, num_heads, mlp_ratio, drop, attn_drop, device=device, dtype=dtype, **kwargs)
        self.attn = SEAttention(dim, num_heads, attn_drop, drop, device=device, dtype=dtype)


class SEViTBlock(ViTBlock):
    """timm's ViT block with squeeze-excitation after the attention's output projection; takes the same arguments."""

    def __init__(self, dim: int, num_heads: int, device=None, dtype=None, **kwargs: Any):
        super().__init__(dim, num_heads, device=device, dtype=dtype, **kwargs)
        # LayerScale also weights channels right after the attention, so this module takes its place.
        self.register_module('ls1', SqueezeExcitation(dim, device=device, dtype=dtype))


# --- Ghost operations -------------------------------------------------------------------------------------------------

class CheapOperation(nn.Module):
    """Multiply each channel by a learned factor: the "cheap linear operation" of GhostNet (Han et al. 2020) on tokens.

    The published code uses a depth-wise convolution over single tokens, hence the weight's shape [C, 1, 1].
    """

    def __init__(self, dim: int, device=None, dtype=None):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim, 1, 1, device=device, dtype=dtype))
        nn.init.uniform_(self.weight, -1., 1.)  # as torch initialises a convolution of one input

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map tokens [B, N, C] to tokens [B, N, C] of the same dtype, also under autocast, as a convolution does."""
        return x * self.weight.flatten().to(x.dtype)


class GhostAttention(nn.Module):
    """Multi-head self-attention with half of the channels of q, k and v computed, the others cheap copies of those.

    Takes the arguments of `Attention`. Raises ValueError unless `dim` is divisible by num_heads and by 2.
    """

    def __init__(self, dim: int, num_heads: int, attn_drop: float = 0., proj_drop: float = 0., device=None, dtype=None):
        super().__init__()
        dd: dict[str, Any] = {'device': device, 'dtype': dtype}
        if dim % num_heads or dim % 2:
            raise ValueError(f'embed_dim {dim} is not divisible by num_heads {num_heads} and by 2')
        self.num_heads = num_heads
        self.attn_drop_rate = attn_drop
        self.q = nn.Linear(dim, dim // 2, bias=False, **dd)
        self.k = nn.Linear(dim, dim // 2, bias=False, **dd)
        self.v = nn.Linear(dim, dim // 2, bias=False, **dd)
        self.cheap_operation_q = CheapOperation(dim // 2, **dd)
        self.cheap_operation_k = CheapOperation(dim // 2, **dd)
        self.cheap_operation_v = CheapOperation(dim // 2, **dd)
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map tokens [B, N, C] to tokens [B, N, C]."""
        q, k, v = self.q(x), self.k(x), self.v(x)  # each [B, N, C / 2]
        # Joined before the split into heads: the first heads are the computed ones, the last their copies.
        q = torch.cat((q, self.cheap_operation_q(q)), dim=2)  # [B, N, C]
        k = torch.cat((k, self.cheap_operation_k(k)), dim=2)  # [B, N, C]
        v = torch.cat((v, self.cheap_operation_v(v)), dim=2)  # [B, N, C]
        x = attend(q, k, v, self.num_heads, self.attn_drop_rate if self.training else 0.)
        return self.proj_drop(self.proj(x))


class GhostMlp(nn.Module):
    """MLP with 3 C hidden channels: C computed ones and two cheap copies of them."""

    def __init__(self, dim: int, act_layer: type[nn.Module] = nn.GELU, drop: float = 0., device=None, dtype=None):
        super().__init__()
        dd: dict[str, Any] = {'device': device, 'dtype': dtype}
        self.fc1 = nn.Linear(dim, dim, **dd)
        self.act = act_layer()
        self.fc2 = nn.Linear(3 * dim, dim, **dd)
        self.drop = nn.Dropout(drop)
        self.cheap_operation2 = CheapOperation(dim, **dd)
        self.cheap_operation3 = CheapOperation(dim, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map tokens [B, N, C] to tokens [B, N, C]."""
        x = self.act(self.fc1(x))  # activations, copied below and activated once more
        x = torch.cat((x, self.act(self.cheap_operation2(x)), self.act(self.cheap_operation3(x))), dim=2)  # [B, N, 3 C]
        return self.drop(self.fc2(self.drop(x)))


class GhostBlock(Block):
    """Block of the backbone with ghost operations in attention and MLP; takes `Block`'s arguments, mlp_ratio 3 only."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, drop: float = 0., attn_drop: float = 0.,
                 act_layer: type[nn.Module] = nn.GELU, device=None, dtype=None, **kwargs: Any):
        if mlp_ratio != 3:
            raise ValueError(f'mlp_ratio is {mlp_ratio}; the ghost MLP has 3 times the channels, so give 3')
        dd: dict[str, Any] = {'device': device, 'dtype': dtype}
        super().__init__(dim, num_heads, mlp_ratio, drop, attn_drop, act_layer=act_layer, **dd, **kwargs)
        self.attn = GhostAttention(dim, num_heads, attn_drop, drop, **dd)
        self.mlp = GhostMlp(dim, act_layer, drop, **dd)


# --- Dense connections ------------------------------------------------------------------------------------------------

class DenseBlock(Block):
    """Block of the backbone that appends `growth_rate` channels, projected from its output, to its input."""

    def __init__(self, growth_rate: int, dim: int, num_heads: int, mlp_ratio: float, device=None, dtype=None,
                 **kwargs: Any):
        super().__init__(dim, num_heads, mlp_ratio, device=device, dtype=dtype, **kwargs)
        self.dense_linear = nn.Linear(dim, growth_rate, device=device, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map tokens [B, N, C] to tokens [B, N, C + growth_rate]."""
        new = x + self.drop_path(self.attn(self.norm1(x)))
        new = new + self.drop_path(self.mlp(self.norm2(new)))
        return torch.cat((x, self.dense_linear(new)), dim=2)


class Transition(nn.Module):
    """Transition between two stages: halve the channels, then apply the activation."""

    def __init__(self, dim: int, act_layer: type[nn.Module] = nn.GELU, device=None, dtype=None):
        super().__init__()
        self.act = act_layer()
        self.linear = nn.Linear(dim, dim // 2, device=device, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map tokens [B, N, C] to tokens [B, N, C / 2]."""
        return self.act(self.linear(x))


class T2TViTDense(T2TViT):
    """T2T-ViT with a backbone in stages of `DenseBlock`s, after DenseNet (Huang et al. 2017).

    `embed_dim` is the width of the tokens, `num_features` that of the final norm and the classifier. A transition
    counts as a block in `forward_intermediates` and for layer-wise learning rates.

    Args:
        growth_rate: channels that each block adds.
        block_config: blocks of each stage; a transition follows each stage except the last.
        drop_path_rate: stochastic depth of the last stage; the rates of the stages rise linearly from 0. The
            published code uses a schedule of 12 blocks, so its 0.1 is 0.1 · 3 / 11 here.
        kwargs: arguments of `T2TViT` except depth and block_fn. The arguments not listed here are the same.

    Raises:
        ValueError: as `T2TViT`, for the channels of any block.
    """

    has_constant_width = False

    def __init__(self, embed_dim: int = 128, num_heads: int = 8, mlp_ratio: float = 2., growth_rate: int = 64,
                 block_config: Sequence[int] = (3, 6, 6, 4), drop_rate: float = 0., attn_drop_rate: float = 0.,
                 drop_path_rate: float = 0., norm_layer: Callable[..., nn.Module] | None = None,
                 act_layer: type[nn.Module] | None = None, device: torch.device | str | None = None,
                 dtype: torch.dtype | None = None, **kwargs: Any):
        dd: dict[str, Any] = {'device': device, 'dtype': dtype}
        norm_layer = norm_layer or nn.LayerNorm
        act_layer = act_layer or nn.GELU
        super().__init__(embed_dim=embed_dim, depth=0, drop_rate=drop_rate, norm_layer=norm_layer, **dd, **kwargs)
        # The parent has built the modules before the blocks; the ones after them need the final width.
        dim = embed_dim
        self.feature_info = []
        rates = calculate_drop_path_rates(drop_path_rate, len(block_config))
        for stage, (depth, rate) in enumerate(zip(block_config, rates, strict=True)):
            if stage > 0:
                self._append(Transition(dim, act_layer, **dd), dim // 2)
                dim //= 2
            for _ in range(depth):
                self._append(DenseBlock(
                    growth_rate, dim, num_heads, mlp_ratio, drop=drop_rate, attn_drop=attn_drop_rate,
                    drop_path=rate, norm_layer=norm_layer, act_layer=act_layer, **dd,
                ), dim + growth_rate)
                dim += growth_rate
        self.blocks.apply(init_weights)
        self.num_features = self.head_hidden_size = dim
        self.norm = norm_layer(dim, **dd)
        self.reset_classifier(self.num_classes)

    def _append(self, block: nn.Module, dim: int) -> None:
        """Append a block with an output of `dim` channels."""
        self.feature_info.append({'module': f'blocks.{len(self.blocks)}', 'num_chs': dim, 'reduction': 16})
        self.blocks.append(block)


# --- Convolution tokens -----------------------------------------------------------------------------------------------

class ConvolutionTokens(nn.Module):
    """Three convolutions with the kernels and strides of the soft splits (section 4.3), without token layers.

    Takes the arguments of `TokensToToken`; raises ValueError unless tokens_type is 'convolution'.
    """

    def __init__(self, tokens_type: str, in_chans: int, embed_dim: int, token_dim: int, device=None, dtype=None):
        super().__init__()
        if tokens_type != 'convolution':
            raise ValueError(f"tokens_type is {tokens_type!r}; convolution tokens have no token layers, so give "
                             "'convolution'")
        widths = (in_chans, token_dim, token_dim, embed_dim)
        self.soft_split0, self.soft_split1, self.project = (
            nn.Conv2d(widths[i], widths[i + 1], kernel, stride, padding, device=device, dtype=dtype)
            for i, (kernel, stride, padding) in enumerate(SOFT_SPLITS))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map images [B, C, H, W] to tokens [B, N, embed_dim] on the grid `token_grid(H, W)`."""
        x = self.soft_split1(self.soft_split0(x))  # [B, D, H / 8, W / 8]
        return self.project(x).flatten(2).transpose(1, 2)  # [B, N, embed_dim]


# --- Registration with timm -------------------------------------------------------------------------------------------

_VIT: dict[str, Any] = {'first_conv': 'patch_embed.proj', 'fixed_input_size': True}

# `register_model` requires this name.
default_cfgs = generate_default_cfgs({
    't2t_vit_14_se.in1k': pretrained_cfg(),
    't2t_vit_dense.in1k': pretrained_cfg(),
    't2t_vit_16_ghost.in1k': pretrained_cfg(),
    't2t_vit_c_14.in1k': pretrained_cfg(first_conv='tokens_to_token.soft_split0'),
    'vit_s_16.in1k': pretrained_cfg(**_VIT),
    'vit_se.in1k': pretrained_cfg(**_VIT),
    'vit_dn.in1k': pretrained_cfg(**_VIT),
})


def _build_vit(name: str, pretrained: bool, given: dict[str, Any], **architecture: Any) -> VisionTransformer:
    """Build timm's ViT as the paper trained it, with LayerNorm epsilon 1e-6; `given` overrides the architecture.

    As other ViTs of timm, it takes only images of `img_size` unless built with `dynamic_img_size`.
    """
    shared = {'patch_size': 16, 'mlp_ratio': 3., 'qkv_bias': False}
    return build_model_with_cfg(
        VisionTransformer, name, pretrained, pretrained_filter_fn=vit_checkpoint_filter_fn,
        feature_cfg=dict(FEATURE_CFG), **{**shared, **architecture, **given})


@register_model
def t2t_vit_14_se(pretrained: bool = False, **kwargs: Any) -> T2TViT:
    """Build T2T-ViT-14 with squeeze-excitation in its attention; takes the arguments of `T2TViT`."""
    return build_t2t_vit(T2TViT, 't2t_vit_14_se', pretrained, kwargs, block_fn=SEBlock)


@register_model
def t2t_vit_dense(pretrained: bool = False, **kwargs: Any) -> T2TViTDense:
    """Build T2T-ViT with dense connections; takes the arguments of `T2TViTDense`."""
    return build_t2t_vit(T2TViTDense, 't2t_vit_dense', pretrained, kwargs)


@register_model
def t2t_vit_16_ghost(pretrained: bool = False, **kwargs: Any) -> T2TViT:
    """Build T2T-ViT of 16 blocks with ghost operations; takes the arguments of `T2TViT`."""
    return build_t2t_vit(T2TViT, 't2t_vit_16_ghost', pretrained, kwargs, depth=16, block_fn=GhostBlock)


@register_model
def t2t_vit_c_14(pretrained: bool = False, **kwargs: Any) -> T2TViT:
    """Build T2T-ViT-14 on convolution tokens; takes the arguments of `T2TViT`."""
    return build_t2t_vit(
        T2TViT, 't2t_vit_c_14', pretrained, kwargs, tokens_type='convolution', tokens_fn=ConvolutionTokens)


@register_model
def vit_s_16(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """Build ViT-S/16, the paper's baseline; takes the arguments of timm's `VisionTransformer`."""
    return _build_vit('vit_s_16', pretrained, kwargs, embed_dim=768, depth=8, num_heads=8)


@register_model
def vit_se(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """Build ViT-S/16 with squeeze-excitation; takes the arguments of timm's `VisionTransformer`."""
    return _build_vit('vit_se', pretrained, kwargs, embed_dim=768, depth=8, num_heads=8, block_fn=SEViTBlock)


@register_model
def vit_dn(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """Build the deep and narrow ViT; takes the arguments of timm's `VisionTransformer`.

    The paper does not state the number of heads; 6 is that of its T2T-ViTs of the same width.
    """
    return _build_vit('vit_dn', pretrained, kwargs, embed_dim=384, depth=16, num_heads=6)
