"""timm's augmentation operations on uint8 tensors: the same random choices and arguments, PIL's formulas, less time.

    take_tensors(augment)       # a Compose of timm's policies, changed in place
    pixels = augment(pixels)    # uint8 [3, H, W] → the same

timm's own objects choose the operations, their strength and interpolation. Only the functions that change pixels are
replaced, so equal seeds give equal choices. Tables of 256 levels, colour and sharpness give PIL's bytes. Shearing,
translation and rotation compute in float32 instead of float64, and differ by one level in a few pixels of a thousand.
PIL does the operations that would gain little (bicubic rotation, Gaussian blur, AugMix).
"""
import math
import random
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import chain
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image
from timm.data import auto_augment as timm_augment
from torch.nn.functional import grid_sample, pad
from torchvision import transforms

from data.decode import as_array

# Added before rounding down as PIL does: sums of weights that should be one are less by 1e-7.
ROUNDING = 1 / 1024


def take_tensors(augment: transforms.Compose) -> None:
    """Change timm's augmentation, in place, to take and return uint8 tensors [3, H, W]."""
    for number, step in enumerate(augment.transforms):
        operations = _operations(step)
        if not operations or isinstance(step, timm_augment.AugMixAugment):
            augment.transforms[number] = ThroughPil(step)
            continue
        for operation in operations:
            operation.aug_fn = OPERATIONS.get(operation.aug_fn) or ThroughPil(operation.aug_fn)
        if isinstance(step, timm_augment.RandAugment) and step.choice_weights is None:
            augment.transforms[number] = RandAugment(step.ops, step.num_layers)


def allow_zero_bits(augment: transforms.Compose) -> None:
    """Let timm's policies posterize to no bits at all, as they do at the highest magnitude.

    Pillow returned a black image, as in the published training; from version 13 on it raises ValueError.
    """
    for step in augment.transforms:
        for operation in _operations(step):
            if operation.aug_fn is timm_augment.posterize:
                operation.aug_fn = posterize_through_pil


def posterize_through_pil(image: Image.Image, bits: int, **options) -> Image.Image:
    return timm_augment.posterize(image, bits, **options) if bits > 0 else Image.new(image.mode, image.size)


def _operations(step: Callable) -> list[Any]:
    """Return the AugmentOps that a step of timm's augmentation chooses from; Any, as mypy rejects their `aug_fn`."""
    return [*getattr(step, 'ops', ()), *chain(*getattr(step, 'policy', ()))]


class RandAugment:
    """timm's with the same choices, without numpy.random.choice, which makes an array of the operations per call."""

    def __init__(self, ops: Sequence[Callable], num_layers: int):
        self.ops, self.num_layers = ops, num_layers

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        for number in np.random.randint(0, len(self.ops), self.num_layers):
            pixels = self.ops[number](pixels)
        return pixels


class ThroughPil:
    """`function`, which takes and returns PIL images, for tensors."""

    def __init__(self, function: Callable):
        self.function = function

    def __call__(self, pixels: torch.Tensor, *args, **options) -> torch.Tensor:
        return as_array(self.function(as_image(pixels), *args, **options))


def as_image(pixels: torch.Tensor) -> Image.Image:
    """Return uint8 [3, H, W] as a PIL image of mode RGB."""
    size = pixels.shape[2], pixels.shape[1]
    return Image.merge('RGB', [Image.frombytes('L', size, plane.tobytes()) for plane in pixels.numpy()])


# ---------------------------------------------------------------------------------------------------------------------
# Levels

def invert(pixels: torch.Tensor, **_) -> torch.Tensor:
    return pixels.bitwise_not()


def posterize(pixels: torch.Tensor, bits: int, **_) -> torch.Tensor:
    """Keep the highest `bits`; none give black, as before Pillow 13."""
    return pixels.bitwise_and(256 - 2 ** (8 - min(max(bits, 0), 8)))


def solarize(pixels: torch.Tensor, threshold: int, **_) -> torch.Tensor:
    return _look_up(pixels, np.where(LEVELS < threshold, LEVELS, 255 - LEVELS))


def solarize_add(pixels: torch.Tensor, add: int, thresh: int = 128, **_) -> torch.Tensor:
    return _look_up(pixels, np.where(LEVELS < thresh, np.minimum(LEVELS + add, 255), LEVELS))


def auto_contrast(pixels: torch.Tensor, **_) -> torch.Tensor:
    planes = pixels.flatten(1)
    tables = []
    for low, high in zip(planes.amin(1).tolist(), planes.amax(1).tolist(), strict=True):
        scale = 255 / (high - low) if high > low else 1
        tables.append((LEVELS * scale - low * scale * (high > low)).clip(0, 255).astype(np.uint8))
    return _look_up(pixels, *tables)


def equalize(pixels: torch.Tensor, **_) -> torch.Tensor:
    tables = []
    for plane in pixels:
        histogram = torch.bincount(plane.flatten(), minlength=256).numpy()
        brightest = histogram[histogram.nonzero()[0][-1]]
        step = (histogram.sum() - brightest) // 255
        below = histogram.cumsum() - histogram
        tables.append(((step // 2 + below) // step).clip(max=255) if step else LEVELS)
    return _look_up(pixels, *tables)


def brightness(pixels: torch.Tensor, factor: float, **_) -> torch.Tensor:
    return _look_up(pixels, _blended_levels(0, factor))


def contrast(pixels: torch.Tensor, factor: float, **_) -> torch.Tensor:
    mean = int(_grey(pixels.float()).double().mean().item() + 0.5)
    return _look_up(pixels, _blended_levels(mean, factor))


LEVELS = np.arange(256)


def _blended_levels(level: int, factor: float) -> np.ndarray:
    """Return what Image.blend makes of every level with `level`, [256]."""
    return (level + np.float32(factor) * (LEVELS - level).astype(np.float32)).clip(0, 255)


def _look_up(pixels: torch.Tensor, *tables: np.ndarray) -> torch.Tensor:
    """Replace each level by its entry in the table: one table for all channels, or one for each."""
    as_bytes = [table.astype(np.uint8).tobytes() for table in tables]
    planes = pixels.contiguous().numpy()
    # translate is faster than any indexing in numpy or torch.
    if len(as_bytes) == 1:
        levels = bytearray(planes).translate(as_bytes[0])
    else:
        parts = zip(planes, as_bytes, strict=True)
        levels = bytearray().join(bytearray(plane).translate(table) for plane, table in parts)
    return torch.frombuffer(levels, dtype=torch.uint8).view(pixels.shape)


# ---------------------------------------------------------------------------------------------------------------------
# Colour and sharpness

def color(pixels: torch.Tensor, factor: float, **_) -> torch.Tensor:
    levels = pixels.float()
    return _blend(_grey(levels), levels, factor)


def sharpness(pixels: torch.Tensor, factor: float, **_) -> torch.Tensor:
    """Blend with PIL's ImageFilter.SMOOTH: (1 1 1, 1 5 1, 1 1 1) / 13, except for the outermost pixels."""
    if min(pixels.shape[1:]) < 3:
        return pixels
    levels = pixels.short()
    rows = levels[:, :-2] + levels[:, 1:-1] + levels[:, 2:]
    sums = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:] + 4 * levels[:, 1:-1, 1:-1]
    smooth = pixels.float()
    smooth[:, 1:-1, 1:-1] = (sums.float() / 13).round_()
    return _blend(smooth, pixels.float(), factor)


# PIL's weights of red, green and blue, ITU-R 601-2 in 16 bits.
LUMA = torch.tensor([19595.0, 38470.0, 7471.0])


def _grey(levels: torch.Tensor) -> torch.Tensor:
    """Return PIL's luma of float32 levels [3, H, W], rounded: float32 [H, W]. Sums below 2^24 are exact."""
    return (LUMA @ levels.flatten(1)).add_(0x8000).mul_(2**-16).floor_().view(levels.shape[1:])


def _blend(degenerate: torch.Tensor, levels: torch.Tensor, factor: float) -> torch.Tensor:
    """Return PIL's Image.blend of float32 levels: `degenerate` at factor 0, `levels` at 1, extrapolated above."""
    return _to_levels(torch.add(degenerate, levels - degenerate, alpha=factor))


def _to_levels(levels: torch.Tensor) -> torch.Tensor:
    """Convert float32 to uint8, rounding down as PIL does; by way of int16, which takes a quarter of the time."""
    return levels.add_(ROUNDING).clamp_(0, 255).short().to(torch.uint8)


# ---------------------------------------------------------------------------------------------------------------------
# Geometry

def _shear(axis: int, pixels: torch.Tensor, factor: float, *, resample, fillcolor: Sequence[int]) -> torch.Tensor:
    return _shift_lines(pixels, axis, factor * (np.arange(pixels.shape[3 - axis]) + 0.5), resample, fillcolor)


def _translate_by_part(axis: int, pixels: torch.Tensor, part: float, **options) -> torch.Tensor:
    return _translate(axis, pixels, part * pixels.shape[axis], **options)


def rotate(pixels: torch.Tensor, degrees: float, *, resample, fillcolor: Sequence[int]) -> torch.Tensor:
    """Rotate counterclockwise about the centre; corners from outside get `fillcolor`."""
    if (resample := _choose(resample)) != Image.Resampling.BILINEAR:  # torch's cubic differs, and is hardly faster
        return ROTATE_THROUGH_PIL(pixels, degrees, resample=resample, fillcolor=fillcolor)
    height, width = pixels.shape[1:]
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    x, y = torch.arange(0.5 - width / 2, width / 2), torch.arange(0.5 - height / 2, height / 2)[:, None]
    # The origin of each pixel, from -1 at one edge to 1 at the other.
    x, y = (cos * x - sin * y) * (2 / width), (sin * x + cos * y) * (2 / height)
    moved = _to_levels(grid_sample(pixels.float()[None], torch.stack((x, y), -1)[None], padding_mode='border',
                                 align_corners=False)[0])
    outside = ((x.abs() > 1) | (y.abs() > 1)).numpy()
    for plane, level in zip(moved.numpy(), fillcolor, strict=True):
        np.copyto(plane, level, where=outside)
    return moved


ROTATE_THROUGH_PIL = ThroughPil(timm_augment.rotate)


def _shift_lines(pixels: torch.Tensor, axis: int, shifts: np.ndarray, resample, fillcolor: Sequence[int]
                 ) -> torch.Tensor:
    """Move every line along `axis` by its shift in pixels, as PIL's affine transform does.

    The taps of a pixel are its neighbours on the line; the outermost are repeated beyond the ends. A pixel whose centre
    comes from outside gets `fillcolor`.
    """
    length, width = pixels.shape[axis], pixels.shape[2]
    whole = np.floor(shifts)
    steps = np.arange(-1, length + 2)
    positions = (whole.astype(np.intp)[:, None] + steps).clip(0, length - 1)  # [lines, length + 3]
    lines = np.arange(len(shifts))[:, None]
    index = positions + lines * width if axis == 2 else np.ascontiguousarray((positions * width + lines).T)
    taps = torch.from_numpy(np.take(pixels.reshape(3, -1).numpy(), index, axis=1)).float()
    weights = {tap: torch.from_numpy(np.asarray(weight, np.float32)).unsqueeze(axis - 1)
               for tap, weight in _tap_weights(shifts - whole, _choose(resample)).items()}
    moved = _weigh(taps, axis, length, weights)
    # In each line, centres from inside are those from `first` up to `end`.
    first, end = (np.ceil(edge - shifts - 0.5).clip(0, length).astype(np.int16)[:, None] for edge in (0, length))
    steps = np.arange(length, dtype=np.int16)
    outside = (steps < first) | (steps >= end)  # [lines, length]
    for plane, level in zip(moved.numpy(), fillcolor, strict=True):
        np.copyto(plane, level, where=outside if axis == 2 else outside.T)
    return moved


def _translate(axis: int, pixels: torch.Tensor, shift: float, *, resample, fillcolor: Sequence[int]) -> torch.Tensor:
    """Do as `_shift_lines` with one shift for all lines, and compute only the pixels that remain."""
    length, whole = pixels.shape[axis], math.floor(shift)
    weights = _tap_weights(shift - whole, _choose(resample))
    moved = torch.tensor(fillcolor, dtype=torch.uint8)[:, None, None].repeat(1, *pixels.shape[1:])
    # The first position whose centre comes from inside, and the one after the last.
    first, end = (min(max(math.ceil(edge - shift - 0.5), 0), length) for edge in (0, length))
    if first < end:
        before, behind = first + whole - 1, end + whole + 2
        inside = range(max(before, 0), min(behind, length))
        beyond = (inside.start - before, behind - inside.stop)
        taps = pad(pixels.narrow(axis, inside.start, len(inside)).float(), (0, 0) * (2 - axis) + beyond, 'replicate')
        moved.narrow(axis, first, end - first).copy_(_weigh(taps, axis, end - first, weights))
    return moved


def _choose(resample):
    """Return one of several interpolations, as timm chooses it."""
    return random.choice(resample) if isinstance(resample, (tuple, list)) else resample


def _weigh(taps: torch.Tensor, axis: int, length: int, weights: Mapping[int, torch.Tensor | float]) -> torch.Tensor:
    """Return the weighted sum of neighbours along `axis`, which is longer than `length` by three, as levels."""
    (tap, weight), *others = weights.items()
    moved = taps.narrow(axis, tap, length) * weight
    for tap, weight in others:
        part = taps.narrow(axis, tap, length)
        if isinstance(weight, torch.Tensor):
            moved.addcmul_(part, weight)
        else:
            moved.add_(part, alpha=weight)
    return _to_levels(moved)


_Fraction = TypeVar('_Fraction', float, np.ndarray)


def _tap_weights(fraction: _Fraction, resample: Image.Resampling) -> dict[int, _Fraction]:
    """Return the weights of the pixels at -1, 0, 1 and 2 (keys 0 to 3) for an origin at `fraction`.

    The cubic weights are those of PIL's geometry, with a = -1 (its resizing has -0.5).
    """
    d = fraction
    if resample == Image.Resampling.BILINEAR:
        return {1: 1 - d, 2: d}
    assert resample == Image.Resampling.BICUBIC, f'{resample} has no tensor form'
    return {1: 1 - 2 * d**2 + d**3, 2: d + d**2 - d**3, 0: -d + 2 * d**2 - d**3, 3: d**3 - d**2}


# Ours for timm's. timm's policies have more names, for levels that mean different arguments.
OPERATIONS: dict[Callable, Callable] = {
    timm_augment.auto_contrast: auto_contrast,
    timm_augment.brightness: brightness,
    timm_augment.color: color,
    timm_augment.contrast: contrast,
    timm_augment.equalize: equalize,
    timm_augment.invert: invert,
    timm_augment.posterize: posterize,
    posterize_through_pil: posterize,
    timm_augment.rotate: rotate,
    timm_augment.sharpness: sharpness,
    timm_augment.shear_x: partial(_shear, 2),
    timm_augment.shear_y: partial(_shear, 1),
    timm_augment.solarize: solarize,
    timm_augment.solarize_add: solarize_add,
    timm_augment.translate_x_abs: partial(_translate, 2),
    timm_augment.translate_x_rel: partial(_translate_by_part, 2),
    timm_augment.translate_y_abs: partial(_translate, 1),
    timm_augment.translate_y_rel: partial(_translate_by_part, 1),
}
