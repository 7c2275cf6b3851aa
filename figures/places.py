"""Where tokens lie in an image: from (row, column) on a grid of tokens to pixels, for every picture of tokens.

    places = token_places(model, images)
    y, x = places.centre((3, 5))

Pixels are counted from 0, and their centres are whole numbers. A token of T2T-ViT is centred at pixel 16 k + 1 of its
row and column, since the soft splits overlap; a token of a ViT with patches of 16 pixels at 16 k + 7.5.
"""
import dataclasses
import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from timm.layers import to_2tuple
from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.pooling import _AvgPoolNd, _MaxPoolNd

from models.tokens_to_token import Line, token_lines
from utils.errors import UserError

Grid = tuple[int, int]


class NotSeen(UserError):
    """The model does not have what was to be shown; another model may have it."""


class Places(NamedTuple):
    """Where the tokens of a grid lie in an image."""
    rows: Line
    columns: Line

    @property
    def grid(self) -> Grid:
        return self.rows.count, self.columns.count

    def centre(self, token: tuple[int, int]) -> tuple[float, float]:
        """Return the pixel (y, x) at the centre of a token (row, column)."""
        return self.rows.centre(token[0]), self.columns.centre(token[1])

    def nearest(self, pixel: tuple[float, float]) -> tuple[int, int]:
        """Return the token (row, column) whose centre is nearest to a pixel (y, x)."""
        return self.rows.nearest(pixel[0]), self.columns.nearest(pixel[1])

    def spread(self, values: np.ndarray, size: Grid, *, smooth: bool = True) -> np.ndarray:
        """Return values of tokens [H, W] or [H, W, channels] as values of the pixels of an image of `size`.

        Args:
            smooth: interpolate linearly between the centres of tokens; else give each pixel its nearest token's value.
                Pixels beyond the outermost centres have the value of the nearest token.
        """
        for axis, (line, pixels) in enumerate(zip(self, size, strict=True)):
            if smooth:
                centres = [line.centre(k) for k in range(line.count)]
                weights = [np.interp(range(pixels), centres, unit) for unit in np.eye(line.count)]  # [tokens, pixels]
                values = np.moveaxis(np.tensordot(np.transpose(weights), values, (1, axis)), 0, axis)
            else:
                values = np.take(values, [line.nearest(pixel) for pixel in range(pixels)], axis)
        return values


def split_places(size: Grid) -> list[Places]:
    """Return where the tokens lie after each of the three soft splits of an image of size (height, width)."""
    return [Places(*lines) for lines in token_lines(*size)]


def has_soft_splits(model: nn.Module) -> bool:
    """Return whether the model has a tokens-to-token module, of soft splits or of convolutions."""
    return hasattr(model, 'tokens_to_token')


@torch.no_grad()
def token_places(model: nn.Module, images: torch.Tensor) -> Places:
    """Return where the tokens of the backbone lie in images [B, C, height, width].

    In a T2T-ViT the token layers are left out, which let every token see the whole image; in a hybrid, norms that
    average over the image.

    Raises:
        NotSeen: the model has no grid of tokens.
    """
    height, width = images.shape[-2:]
    if has_soft_splits(model):
        return split_places((height, width))[-1]
    patches: Any = getattr(model, 'patch_embed', None)
    if not hasattr(model, 'blocks') or not hasattr(patches, 'patch_size'):
        raise NotSeen(f'model {model_name(model)} has no attention that can be shown; use a T2T-ViT or a ViT')
    if hasattr(patches, 'dynamic_feat_size'):  # of timm's layers; includes the strides of a hybrid's convolutions
        grid = patches.dynamic_feat_size((height, width))
    else:
        grid = tuple(side // patch for side, patch in zip((height, width), to_2tuple(patches.patch_size), strict=True))

    lines = [Line(height), Line(width)]

    def pass_windows(layer, inputs, output):
        for axis, (kernel, stride, padding, before, after) in enumerate(zip(
                to_2tuple(layer.kernel_size), to_2tuple(layer.stride), to_2tuple(layer.padding), inputs[0].shape[-2:],
                output.shape[-2:], strict=True)):
            if getattr(layer, 'same_pad', type(layer).__name__.endswith('Same')):  # as TensorFlow pads
                padding = max((after - 1) * stride + kernel - before, 0) // 2
            lines[axis] = lines[axis].windows(kernel, stride, padding, after)

    hooks = [layer.register_forward_hook(pass_windows) for layer in _main_path(patches)]
    try:
        patches(images[:1])
    finally:
        for hook in hooks:
            hook.remove()
    return Places(*(dataclasses.replace(line, count=cells) if side // line.step <= cells <= math.ceil(side / line.step)
                    else _evenly(cells, side)  # patches that a linear layer embeds
                    for line, cells, side in zip(lines, grid, (height, width), strict=True)))


def _evenly(count: int, side: int) -> Line:
    """Return the line of patches beside one another that cover a side of `side` pixels."""
    step = side / count
    return Line(count, (step - 1) / 2, step, step)


def _main_path(patches: nn.Module) -> Iterable[nn.Module]:
    """Return the layers with windows, without those of timm's shortcuts, whose windows lie within the main path's."""
    return [layer for name, layer in patches.named_modules()
            if isinstance(layer, _ConvNd | _MaxPoolNd | _AvgPoolNd)
            and not {'downsample', 'shortcut'} & set(name.split('.'))]


def model_name(model: nn.Module) -> str:
    """Return the model's name for people."""
    return getattr(model, 'pretrained_cfg', {}).get('architecture') or type(model).__name__
