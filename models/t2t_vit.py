"""Build T2T-ViT from the tokens-to-token module and a deep-narrow backbone; register all variants with timm.

    import models, timm
    timm.create_model('t2t_vit_14', num_classes=10, img_size=(192, 256))

Yuan et al., "Tokens-to-Token ViT: Training Vision Transformers from Scratch on ImageNet", ICCV 2021. State dict keys,
shapes and order are those of the authors' released checkpoints.

Dimensions: B images, N grid tokens (1 + N with the class token), C channels of the backbone, H × W grid.
"""
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import calculate_drop_path_rates, resample_abs_pos_embed, to_2tuple
from timm.models import (
    build_model_with_cfg,
    checkpoint,
    generate_default_cfgs,
    register_model,
    resolve_pretrained_cfg,
)
from timm.models._features import feature_take_indices
from torch import nn

from models.layers import Block, sinusoid_table
from models.timm_versions import update_model_input_size
from models.tokens_to_token import TokensToToken, token_grid
from models.weights.loading import fit_to_model, state_dict_of

__all__ = ['T2TViT', 'VARIANTS', 'build_t2t_vit', 'checkpoint_filter_fn']

POOLINGS = ('token', 'avg', '')
FEATURE_CFG = {'out_indices': 3, 'feature_cls': 'getter'}  # of features_only=True; timm changes its copy

# Leaf functions for torch.fx, which cannot trace a comparison of sizes.
torch.fx.wrap('token_grid')
torch.fx.wrap('resample_abs_pos_embed')


class T2TViT(nn.Module):
    """Tokens-to-Token Vision Transformer.

    For images of another size than `img_size` the position embedding is resampled to their grid.

    Args:
        img_size: pixels, one number or (height, width), at least 16 each; fixes the grid of `pos_embed`.
        in_chans: channels of the images.
        num_classes: outputs of the classifier; 0 for none.
        global_pool: input of the classifier: 'token' (class token, as published), 'avg' (mean of the grid tokens),
            or '' (every token).
        embed_dim: channels C of the backbone.
        depth: number of blocks.
        num_heads: attention heads of a block.
        mlp_ratio: hidden channels of a block's MLP over C.
        drop_rate: dropout probability after the position embedding, attention and MLP of the backbone.
        attn_drop_rate: dropout probability of the backbone's attention weights.
        drop_path_rate: stochastic depth of the last block; the rates rise linearly from 0.
        tokens_type: kind of token layers, 'performer' or 'transformer'.
        token_dim: channels D of the token layers (token dimension).
        aux_head: add a second classifier over the grid tokens, as in the release trained by token labeling.
        aux_weight: factor of its maximum over the tokens, which is added to the class token's logits.
        norm_layer: normalisation of the backbone, called with C; LayerNorm with epsilon 1e-5 by default.
        act_layer: activation of the backbone's MLPs; the exact GELU by default.
        block_fn: class of the backbone's blocks, with the arguments of `layers.Block`.
        tokens_fn: class of the tokens-to-token module, with the arguments of `TokensToToken`.

    Raises:
        ValueError: image below 16 pixels, unknown tokens_type or global_pool, C not divisible by num_heads.
    """

    pos_embed: torch.Tensor
    has_constant_width = True  # of the blocks; not in T2TViTDense

    def __init__(
            self,
            img_size: int | tuple[int, int] = 224,
            in_chans: int = 3,
            num_classes: int = 1000,
            global_pool: str = 'token',
            embed_dim: int = 384,
            depth: int = 14,
            num_heads: int = 6,
            mlp_ratio: float = 3.,
            drop_rate: float = 0.,
            attn_drop_rate: float = 0.,
            drop_path_rate: float = 0.,
            tokens_type: str = 'performer',
            token_dim: int = 64,
            aux_head: bool = False,
            aux_weight: float = 0.5,
            norm_layer: Callable[..., nn.Module] | None = None,
            act_layer: type[nn.Module] | None = None,
            block_fn: Callable[..., nn.Module] = Block,
            tokens_fn: Callable[..., nn.Module] = TokensToToken,
            device: torch.device | str | None = None,
            dtype: torch.dtype | None = None,
    ):
        super().__init__()
        dd: dict[str, Any] = {'device': device, 'dtype': dtype}
        norm_layer = norm_layer or nn.LayerNorm
        act_layer = act_layer or nn.GELU
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.global_pool = _checked_pooling(global_pool)
        self.num_features = self.head_hidden_size = self.embed_dim = embed_dim  # timm's three names of C
        self.num_prefix_tokens = 1
        self.grid_size = token_grid(*to_2tuple(img_size))
        self.grad_checkpointing = False

        self.tokens_to_token = tokens_fn(tokens_type, in_chans, embed_dim, token_dim, **dd)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim, **dd))
        num_positions = self.num_prefix_tokens + self.grid_size[0] * self.grid_size[1]
        # A buffer, since it is not trained; saved, as in the released checkpoints.
        self.register_buffer('pos_embed', sinusoid_table(num_positions, embed_dim, **dd))
        self.pos_drop = nn.Dropout(drop_rate)
        self.blocks = nn.ModuleList([
            block_fn(embed_dim, num_heads, mlp_ratio, drop=drop_rate, attn_drop=attn_drop_rate, drop_path=rate,
                     norm_layer=norm_layer, act_layer=act_layer, **dd)
            for rate in calculate_drop_path_rates(drop_path_rate, depth)
        ])
        feature_info: list[dict[str, Any]] = [
            {'module': f'blocks.{i}', 'num_chs': embed_dim, 'reduction': 16} for i in range(depth)
        ]
        self.feature_info = feature_info
        self.norm = norm_layer(embed_dim, **dd)
        self.head = nn.Linear(embed_dim, num_classes, **dd) if num_classes > 0 else nn.Identity()
        self.aux_weight = aux_weight
        self.has_aux_head = aux_head
        self.aux_head = nn.Linear(embed_dim, num_classes, **dd) if aux_head and num_classes > 0 else None

        nn.init.trunc_normal_(self.cls_token, std=.02)
        self.apply(init_weights)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Return the names of parameters with more than one dimension that are exempt from weight decay."""
        return {'cls_token'}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict:
        """Return patterns that order the parameters by depth, for layer-wise learning rates (timm's format)."""
        return {
            'stem': r'^cls_token|^pos_embed|^tokens_to_token',
            'blocks': [(r'^blocks\.(\d+)', None), (r'^norm', (99999,))],
        }

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks' activations in the backward pass instead of keeping them."""
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module | tuple[nn.Module, nn.Module]:
        """Return the classifier: a linear layer, an identity if there are no classes, or (head, aux_head)."""
        return self.head if self.aux_head is None else (self.head, self.aux_head)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a newly initialised one (0 classes for none) and, if given, the pooling."""
        if global_pool is not None:
            self.global_pool = _checked_pooling(global_pool)
        self.num_classes = num_classes
        self.head = self._new_classifier(num_classes) if num_classes > 0 else nn.Identity()
        self.aux_head = self._new_classifier(num_classes) if self.has_aux_head and num_classes > 0 else None

    def _new_classifier(self, num_classes: int) -> nn.Linear:
        """Return an initialised linear layer with the device and dtype of the model."""
        head = nn.Linear(self.num_features, num_classes, device=self.cls_token.device, dtype=self.cls_token.dtype)
        init_weights(head)
        return head

    @torch.jit.ignore
    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Resample the position embedding to another image size once, instead of at each call."""
        grid = token_grid(*to_2tuple(img_size))
        self.pos_embed = resample_abs_pos_embed(
            self.pos_embed, grid, self.grid_size, num_prefix_tokens=self.num_prefix_tokens)
        self.grid_size = grid
        update_model_input_size(self, img_size)  # timm saves the size with the weights

    def _embed(self, x: torch.Tensor, exchanged: torch.Tensor | None = None) -> torch.Tensor:
        """Map images [B, in_chans, height, width] to tokens with positions [B, 1 + N, C]; `exchanged` as below."""
        B, _, height, width = x.shape
        H, W = token_grid(height, width)  # first, since its error for a small image is clear
        x = self.tokens_to_token(x)  # [B, N, C]
        if exchanged is not None:
            x = exchange_tokens(x, exchanged)
        x = torch.cat((self.cls_token.expand(B, -1, -1), x), dim=1)  # [B, 1 + N, C]
        pos_embed = resample_abs_pos_embed(
            self.pos_embed, [H, W], self.grid_size, num_prefix_tokens=self.num_prefix_tokens)
        return self.pos_drop(x + pos_embed)

    def forward_features(self, x: torch.Tensor, exchanged: torch.Tensor | None = None) -> torch.Tensor:
        """Map images [B, in_chans, height, width] to normalised tokens [B, 1 + N, C], class token first.

        exchanged: which tokens take the place of their partner's, bool [N] (see `exchange_tokens`); None for none.
        """
        x = self._embed(x, exchanged)
        for block in self.blocks:
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint(block, x)
            else:
                x = block(x)
        return self.norm(x)

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Map tokens [B, 1 + N, C] to logits [B, num_classes], or to pooled features [B, C] (pre_logits)."""
        pooled = x
        if self.global_pool == 'token':
            pooled = x[:, 0]
        elif self.global_pool == 'avg':
            pooled = x[:, self.num_prefix_tokens:].mean(dim=1)
        if pre_logits:
            return pooled
        logits = self.head(pooled)
        if self.aux_head is not None and self.global_pool != '':
            # In training too, so that the evaluated function is the trained one and every parameter gets a gradient.
            token_logits = self.aux_head(x[:, self.num_prefix_tokens:])  # [B, N, num_classes]
            logits = logits + self.aux_weight * token_logits.amax(dim=1)
        return logits

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map images [B, in_chans, height, width] to logits [B, num_classes]."""
        return self.forward_head(self.forward_features(x))

    def forward_dense(self, x: torch.Tensor, exchanged: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Map images to the logits of their pooled tokens, [B, num_classes], and of each token, [B, N, num_classes].

        This is what token labels train, with both classifiers apart. It needs `aux_head`.

        exchanged: which tokens the images exchange before the blocks, bool [N] (MixToken). The logits of these tokens
            are exchanged back, so that each is that of its own image.
        """
        assert self.aux_head is not None
        x = self.forward_features(x, exchanged)
        token_logits = self.aux_head(x[:, self.num_prefix_tokens:])
        return self.head(self.forward_head(x, pre_logits=True)), exchange_tokens(token_logits, exchanged)

    def forward_intermediates(self, x: torch.Tensor, indices: int | list[int] | None = None,
                              return_prefix_tokens: bool = False, norm: bool = False, stop_early: bool = False,
                              output_fmt: str = 'NCHW', intermediates_only: bool = False,
                              output_dict: bool = False,
                              ) -> list | tuple[torch.Tensor, list] | dict[str, torch.Tensor | list]:
        """Return the outputs of chosen blocks (timm's interface, also used by `features_only=True`).

        Args:
            x: images [B, in_chans, height, width].
            indices: number of last blocks, list of blocks, or None for all.
            return_prefix_tokens: pair each map with its class token, [B, 1, C].
            norm: apply the final norm to each output.
            stop_early: skip the blocks after the last chosen one.
            output_fmt: 'NCHW' for maps [B, C, H, W], 'NLC' for tokens [B, N, C].
            intermediates_only: return the list instead of (final tokens, list).
            output_dict: return a dict of 'image_intermediates', 'image_intermediates_prefix' (with
                `return_prefix_tokens`) and 'image_features' (without `intermediates_only`) instead.
        """
        if output_fmt not in ('NCHW', 'NLC'):
            raise ValueError(f"output_fmt is {output_fmt!r}; choose from 'NCHW', 'NLC'")
        B, _, height, width = x.shape
        H, W = token_grid(height, width)
        chosen, last = feature_take_indices(len(self.blocks), indices)
        x = self._embed(x)
        outputs = []
        for index, block in enumerate(self.blocks[:last + 1] if stop_early else self.blocks):
            x = checkpoint(block, x) if self.grad_checkpointing else block(x)
            if index in chosen:
                outputs.append(self._norm_intermediate(x) if norm else x)

        class_tokens = [y[:, :self.num_prefix_tokens] for y in outputs]
        outputs = [y[:, self.num_prefix_tokens:] for y in outputs]
        if output_fmt == 'NCHW':
            outputs = [y.transpose(1, 2).reshape(B, -1, H, W) for y in outputs]  # [B, C, H, W]
        if output_dict:
            named: dict[str, torch.Tensor | list] = {'image_intermediates': outputs}
            if return_prefix_tokens:
                named['image_intermediates_prefix'] = class_tokens
            return named if intermediates_only else {**named, 'image_features': self._norm_intermediate(x)}
        listed: list = list(zip(outputs, class_tokens, strict=True)) if return_prefix_tokens else outputs
        return listed if intermediates_only else (self._norm_intermediate(x), listed)

    def _norm_intermediate(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the final norm to tokens [B, 1 + N, C] of its width; return narrower ones (T2TViTDense) unchanged."""
        return self.norm(x) if x.shape[-1] == self.num_features else x

    def prune_intermediate_layers(self, indices: int | list[int] = 1, prune_norm: bool = False,
                                  prune_head: bool = True) -> list[int]:
        """Drop the blocks after the last of `indices`; return the indices.

        The norm and the head go too if the arguments say so, or if they fit the last block alone.
        """
        depth = len(self.blocks)
        chosen, last = feature_take_indices(depth, indices)
        still_fit = self.has_constant_width or last + 1 == depth
        self.blocks = self.blocks[:last + 1]
        self.num_features = self.head_hidden_size = self.feature_info[last]['num_chs']
        if prune_norm or not still_fit:
            self.norm = nn.Identity()
        if prune_head or not still_fit:
            self.reset_classifier(0, '')
        return chosen


def exchange_tokens(x: torch.Tensor, exchanged: torch.Tensor) -> torch.Tensor:
    """Exchange the tokens `exchanged`, bool [N], of [B, N, C] between the first and the last image, and so on.

    MixToken (Jiang et al. 2021), which is its own inverse.
    """
    return torch.where(exchanged.unsqueeze(1), x.flip(0), x)


def _checked_pooling(global_pool: str) -> str:
    """Return `global_pool`, or raise ValueError if it is unknown."""
    if global_pool not in POOLINGS:
        raise ValueError(f'global_pool is {global_pool!r}; choose from {", ".join(map(repr, POOLINGS))}')
    return global_pool


def init_weights(module: nn.Module) -> None:
    """Initialise as published: linear layers from a truncated normal (std 0.02), biases 0, norm weights 1."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)


class Variant(NamedTuple):
    """A row of the paper's table of architectures, and the file name of its released weights ('' for none)."""
    tokens_type: str
    embed_dim: int
    depth: int
    num_heads: int
    mlp_ratio: float
    release: str = ''
    aux_head: bool = False


VARIANTS = {
    't2t_vit_7': Variant('performer', 256, 7, 4, 2., '71.7_T2T_ViT_7.pth.tar'),
    't2t_vit_10': Variant('performer', 256, 10, 4, 2., '75.2_T2T_ViT_10.pth.tar'),
    't2t_vit_12': Variant('performer', 256, 12, 4, 2., '76.5_T2T_ViT_12.pth.tar'),
    't2t_vit_14': Variant('performer', 384, 14, 6, 3., '81.5_T2T_ViT_14.pth.tar'),
    't2t_vit_19': Variant('performer', 448, 19, 7, 3., '81.9_T2T_ViT_19.pth.tar'),
    't2t_vit_24': Variant('performer', 512, 24, 8, 3., '82.3_T2T_ViT_24.pth.tar'),
    't2t_vit_t_14': Variant('transformer', 384, 14, 6, 3., '81.7_T2T_ViTt_14.pth.tar'),
    't2t_vit_t_19': Variant('transformer', 448, 19, 7, 3., '82.4_T2T_ViTt_19.pth.tar'),
    't2t_vit_t_24': Variant('transformer', 512, 24, 8, 3., '82.6_T2T_ViTt_24.pth.tar'),
    # Ablations of the paper that differ only in these numbers; t2t_vit_14_resnext has the shapes of t2t_vit_14.
    't2t_vit_14_resnext': Variant('performer', 384, 14, 32, 3.),
    't2t_vit_14_wide': Variant('performer', 768, 4, 12, 3.),
    # The 84.2 % release: trained by token labeling (Jiang et al. 2021), which adds a classifier over the tokens.
    't2t_vit_24_token_labeling': Variant('performer', 512, 24, 8, 3., '84.2_T2T_ViT_24.pth.tar', aux_head=True),
}


def pretrained_cfg(release: str = '', **kwargs) -> dict:
    """Return timm's configuration of a model trained on ImageNet, with weights if there is a `release` file."""
    return {
        'url': f'https://github.com/yitu-opensource/T2T-ViT/releases/download/main/{release}' if release else '',
        'num_classes': 1000, 'input_size': (3, 224, 224), 'fixed_input_size': False,
        'interpolation': 'bicubic', 'crop_pct': 0.9,
        'mean': IMAGENET_DEFAULT_MEAN, 'std': IMAGENET_DEFAULT_STD,
        'classifier': 'head', 'first_conv': (),  # the first layer is a soft split, not a convolution
        'license': 'bsd-3-clause-clear',
        'origin_url': 'https://github.com/yitu-opensource/T2T-ViT',
        'paper_name': 'Tokens-to-Token ViT: Training Vision Transformers from Scratch on ImageNet',
        'paper_ids': 'arXiv:2101.11986',
        **kwargs,
    }


# `register_model` requires this name.
default_cfgs = generate_default_cfgs({
    **{f'{name}.in1k': pretrained_cfg(
        variant.release, classifier=('head', 'aux_head') if variant.aux_head else 'head')
       for name, variant in VARIANTS.items()},
    't2t_vit_14.in1k_384': pretrained_cfg('83.3_T2T_ViT_14.pth.tar', input_size=(3, 384, 384), crop_pct=1.0),
})


def checkpoint_filter_fn(state_dict: dict, model: nn.Module) -> dict:
    """Extract downloaded weights and adapt them to the image size and channels of the model (timm's hook)."""
    # timm may have saved the image size with the weights; otherwise the grid is assumed to be a square.
    saved_size = getattr(model, 'pretrained_model_args', {}).get('img_size')
    return fit_to_model(state_dict_of(state_dict), model, to_2tuple(saved_size) if saved_size else None)[0]


_Model = TypeVar('_Model', bound=T2TViT)


def build_t2t_vit(model_class: type[_Model], name: str, pretrained: bool, given: dict[str, Any],
                  **architecture: Any) -> _Model:
    """Build the registered model `name` of this architecture; `given` overrides the architecture."""
    # Weights trained at 384 pixels have a position embedding of that size.
    weights = resolve_pretrained_cfg(name, given.get('pretrained_cfg'), given.get('pretrained_cfg_overlay'))
    architecture['img_size'] = tuple(weights.input_size[-2:])
    return build_model_with_cfg(
        model_class, name, pretrained, pretrained_filter_fn=checkpoint_filter_fn, feature_cfg=dict(FEATURE_CFG),
        **{**architecture, **given})


def _entrypoint(name: str) -> Callable[..., T2TViT]:
    """Return the function by which timm creates the variant `name`."""
    def entrypoint(pretrained: bool = False, **kwargs) -> T2TViT:
        architecture = VARIANTS[name]._asdict()
        del architecture['release']
        return build_t2t_vit(T2TViT, name, pretrained, kwargs, **architecture)

    entrypoint.__name__ = entrypoint.__qualname__ = name
    entrypoint.__doc__ = f'Build {name}; takes the arguments of `T2TViT`.'
    return entrypoint


for _name in VARIANTS:
    # timm adds the name to __all__, so this module must have the function under that name.
    globals()[_name] = register_model(_entrypoint(_name))
