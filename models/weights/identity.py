"""Find the registered models that have the keys and shapes of a state dict, and their image size and classes.

    identify(state_dict_of(read_checkpoint('model.pth'))).names     # ('t2t_vit_14', 't2t_vit_14_resnext')
"""
import functools
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import timm
import torch
from torch import nn

from models.tokens_to_token import SOFT_SPLITS, token_grid

MAX_CLASSIFIER_KEYS = 4  # a head and an auxiliary head, weight and bias


@dataclass(frozen=True)
class Architecture:
    """Result of `identify`; None for properties that the weights do not determine."""
    names: tuple[str, ...]  # our registered models with these keys and shapes, which several may share
    description: str  # in words
    grid: tuple[int, int] | None  # (rows, columns) of the position embedding
    img_size: tuple[int, int] | None  # (height, width) of the images in pixels
    num_classes: int | None
    in_chans: int | None


def identify(weights: Mapping[str, torch.Tensor], img_size: tuple[int, int] | None = None) -> Architecture:
    """Return the architecture of weights, for any image size, classes and channels.

    Args:
        weights: state dict with our keys, as returned by `state_dict_of`.
        img_size: recorded (height, width) of the images in pixels. Without it, or if it does not give the number of
            positions in the weights, images are assumed to be square.
    """
    names = tuple(name for name in our_models() if _fits(weights, name))
    grid, img_size = _grid_and_size(weights, names, img_size)
    head = weights.get('head.weight')
    return Architecture(names, _described(weights, names), grid, img_size,
                        head.shape[0] if head is not None and head.dim() == 2 else None, _in_chans(weights, names))


def our_models() -> list[str]:
    """Return the registered models of this package, without tags."""
    return [name for name in timm.list_models() if timm.model_entrypoint(name).__module__.startswith('models.')]


def grid_of(positions: int, img_size: tuple[int, int] | None = None,
            patch_size: tuple[int, int] | None = None) -> tuple[int, int] | None:
    """Return (rows, columns) of a grid of `positions` = rows · columns, or None if there is no such grid.

    Args:
        positions: number of grid tokens.
        img_size: (height, width) of the images in pixels, whose grid is returned; without it, a square.
        patch_size: (height, width) of the patches of a ViT, which must divide img_size; None for the tokens-to-token
            module.
    """
    if positions < 1:
        return None
    if img_size is None:
        side = math.isqrt(positions)
        return (side, side) if side ** 2 == positions else None
    height, width = img_size
    if patch_size is None:
        if min(img_size) < 16:
            return None  # token_grid raises
        rows, columns = token_grid(height, width)
    elif min(patch_size) < 1 or height % patch_size[0] or width % patch_size[1]:
        return None
    else:
        rows, columns = height // patch_size[0], width // patch_size[1]
    return (rows, columns) if rows * columns == positions else None


def patch_size_of(positions: int, img_size: tuple[int, int]) -> tuple[int, int]:
    """Return the size of square patches that may divide images into `positions`; `grid_of` checks it."""
    side = math.isqrt(math.prod(img_size) // positions) if positions > 0 else 0
    return side, side


@functools.cache
def _shapes(name: str, **kwargs: Any) -> dict[str, torch.Size]:
    """Return the keys and shapes of a registered model, built on the meta device."""
    with torch.device('meta'):
        model: nn.Module = timm.create_model(name, **kwargs)
    return {key: tensor.shape for key, tensor in model.state_dict().items()}


def _fits(weights: Mapping[str, torch.Tensor], name: str) -> bool:
    """Return whether weights belong to the model `name`, for any image size, classes and channels.

    Two models of different sizes show which lengths may vary; a model without classes shows the keys of classifiers,
    which are optional.
    """
    published = _shapes(name)
    if len(published.keys() ^ weights.keys()) > MAX_CLASSIFIER_KEYS:
        return False  # without building the second model
    other = _shapes(name, img_size=64, in_chans=1, num_classes=0)
    classifiers = published.keys() - other.keys()
    given = classifiers & weights.keys()
    if weights.keys() - given != other.keys() or (given and given != classifiers):
        return False
    for key, shape in other.items():
        if len(weights[key].shape) != len(shape):
            return False
        for length, one, two in zip(weights[key].shape, published[key], shape, strict=True):
            if one == two and length != one:
                return False
    return all(weights[key].shape[1:] == published[key][1:] for key in given)


def _grid_and_size(weights: Mapping[str, torch.Tensor], names: tuple[str, ...], img_size: tuple[int, int] | None
                   ) -> tuple[tuple[int, int] | None, tuple[int, int] | None]:
    """Return the grid of the position embedding and the image size, consistent with each other.

    For an unknown model the pixels of a token are unknown, so its image size is the recorded one, or None.
    """
    if 'pos_embed' not in weights or weights['pos_embed'].dim() != 3:
        return None, img_size
    positions = weights['pos_embed'].shape[1] - sum(key in weights for key in ('cls_token', 'dist_token'))
    is_t2t = any(key.startswith('tokens_to_token.') for key in weights)
    token_size = (math.prod(stride for _, stride, _ in SOFT_SPLITS),) * 2 if is_t2t else None
    if names and not is_t2t:
        height, width = weights['patch_embed.proj.weight'].shape[-2:]
        token_size = height, width
    if img_size is not None:
        patch_size = None if is_t2t else token_size or patch_size_of(positions, img_size)
        if (grid := grid_of(positions, img_size, patch_size)) is not None:
            return grid, img_size
    grid = grid_of(positions)
    if grid is None:
        return None, None if token_size else img_size  # an unknown model may have other prefix tokens
    return grid, (grid[0] * token_size[0], grid[1] * token_size[1]) if token_size else None


def _in_chans(weights: Mapping[str, torch.Tensor], names: tuple[str, ...]) -> int | None:
    """Return the channels of the images, from the first soft split or the patches of our ViTs, or None."""
    norm = weights.get('tokens_to_token.attention1.norm1.weight')
    if norm is not None:
        return norm.numel() // SOFT_SPLITS[0][0] ** 2 or None
    firsts = ('tokens_to_token.soft_split0.weight', *(['patch_embed.proj.weight'] if names else []))
    return next((weights[key].shape[1] for key in firsts if key in weights and weights[key].dim() == 4), None)


def _described(weights: Mapping[str, torch.Tensor], names: tuple[str, ...]) -> str:
    """Return the names of the models, else the dimensions of a T2T-ViT, else the number of tensors."""
    if names:
        return ' or '.join(names) + (' (of equal shapes: only you can tell)' if len(names) > 1 else '')
    depth = len({match[1] for key in weights if (match := re.match(r'blocks\.(\d+)\.', key))})
    project = weights.get('tokens_to_token.project.weight')
    if project is None or project.dim() != 2:
        return f'an architecture not known here ({len(weights)} tensors, the first {next(iter(weights))})'
    tokens = 'performer' if 'tokens_to_token.attention1.w' in weights else 'transformer'
    return f'a T2T-ViT with {tokens} tokens, embed_dim {project.shape[0]} and depth {depth}'
