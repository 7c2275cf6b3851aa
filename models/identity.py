"""What a state dict is of: which registered models have its keys and shapes, for which images and classes.

    identify(state_dict_of(read_checkpoint('model.pth'))).names     ('t2t_vit_14', 't2t_vit_14_resnext')
"""
import functools
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import timm
import torch
from torch import nn

from .tokens_to_token import SOFT_SPLITS

MAX_CLASSIFIER_KEYS = 4  # a head and an auxiliary head, weight and bias


@dataclass(frozen=True)
class Identity:
    """What `identify` found out; None for what the weights do not tell."""
    names: tuple[str, ...]  # registered models of ours with these keys and shapes: several where those are equal
    description: str  # in words
    grid: tuple[int, int] | None  # rows and columns of the position embedding
    img_size: tuple[int, int] | None  # height and width of the images, in pixels
    num_classes: int | None
    in_chans: int | None


def identify(weights: Mapping[str, torch.Tensor], img_size: tuple[int, int] | None = None) -> Identity:
    """Tell what weights are of, whatever the image size, classes and channels they were made for.

    Args:
        weights: state dict under our keys, as `state_dict_of` returns it.
        img_size: height and width of the images, where the checkpoint records them; else squares are assumed.
    """
    names = tuple(name for name in our_models() if _fits(weights, name))
    grid = None
    if 'pos_embed' in weights and weights['pos_embed'].dim() == 3:
        positions = weights['pos_embed'].shape[1] - ('cls_token' in weights)
        grid = grid_of(positions, img_size) or grid_of(positions)
    if grid is not None and img_size is None and (side := _token_size(weights)):
        img_size = grid[0] * side, grid[1] * side
    head = weights.get('head.weight')
    return Identity(names, _described(weights, names), grid, img_size,
                    None if head is None else head.shape[0], _in_chans(weights))


def our_models() -> list[str]:
    """Return the registered models that this package defines, without tags."""
    package = __name__.split('.')[0]
    return [name for name in timm.list_models()
            if timm.model_entrypoint(name).__module__.split('.')[0] == package]


def grid_of(positions: int, size: tuple[int, int] | None = None) -> tuple[int, int] | None:
    """Return the rows and columns of a grid of `positions`, None where there is no such grid.

    Args:
        positions: rows times columns.
        size: height and width of the images, or of the grid, in any unit; None for a square.
    """
    if positions < 1:
        return None
    if size is None:
        side = math.isqrt(positions)
        return (side, side) if side ** 2 == positions else None

    def deviation(rows: int) -> float:
        return abs(math.log(rows ** 2 / positions * size[1] / size[0]))

    divisors = [n for n in range(1, math.isqrt(positions) + 1) if positions % n == 0]
    rows = min({*divisors, *(positions // n for n in divisors)}, key=deviation)
    # Rounding to whole tokens changes the ratio, but hardly by half; a prime number is no grid of these images.
    return (rows, positions // rows) if deviation(rows) < math.log(1.5) else None


@functools.cache
def _shapes(name: str, **kwargs: int) -> dict[str, torch.Size]:
    """Return the keys and shapes of a registered model, without its memory."""
    with torch.device('meta'):
        model: nn.Module = timm.create_model(name, **kwargs)
    return {key: tensor.shape for key, tensor in model.state_dict().items()}


def _fits(weights: Mapping[str, torch.Tensor], name: str) -> bool:
    """Tell whether weights are of the model `name`, for images and classes of any kind.

    What changes between two such models is free; what one without classes lacks is a classifier, and optional.
    """
    published = _shapes(name)
    if len(published.keys() ^ weights.keys()) > MAX_CLASSIFIER_KEYS:
        return False  # before a second model is built
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


def _in_chans(weights: Mapping[str, torch.Tensor]) -> int | None:
    """Return the channels of the images: from the first soft split, else from the first convolution."""
    norm = weights.get('tokens_to_token.attention1.norm1.weight')
    if norm is not None:
        return norm.numel() // SOFT_SPLITS[0][0] ** 2
    return next((tensor.shape[1] for tensor in weights.values() if tensor.dim() == 4), None)


def _token_size(weights: Mapping[str, torch.Tensor]) -> int | None:
    """Return the pixels from one token to the next: of the tokens-to-token module, or the patches of a ViT."""
    if any(key.startswith('tokens_to_token.') for key in weights):
        return math.prod(stride for _, stride, _ in SOFT_SPLITS)
    patches = weights.get('patch_embed.proj.weight')
    return patches.shape[-1] if patches is not None and patches.dim() == 4 else None


def _described(weights: Mapping[str, torch.Tensor], names: tuple[str, ...]) -> str:
    """Say what weights are of: the model's name, its dimensions where it has none, or only how many there are."""
    if names:
        return ' or '.join(names) + (' (of equal shapes: only you can tell)' if len(names) > 1 else '')
    depth = len({match[1] for key in weights if (match := re.match(r'blocks\.(\d+)\.', key))})
    project = weights.get('tokens_to_token.project.weight')
    if project is None or project.dim() != 2:
        return f'an architecture not known here ({len(weights)} tensors, the first {next(iter(weights))})'
    tokens = 'performer' if 'tokens_to_token.attention1.w' in weights else 'transformer'
    return f'a T2T-ViT with {tokens} tokens, embed_dim {project.shape[0]} and depth {depth}'
