"""timm's augmentation operations on uint8 tensors: the same draws, the same arguments, PIL's formulas, less time.

    take_tensors(augment)       # a Compose of timm's policies, changed in place
    pixels = augment(pixels)    # uint8 [3, H, W] → the same

timm's own objects draw everything: which operations, whether they are applied, how strong, with what interpolation.
Only the functions that change pixels are replaced, so equal seeds make equal decisions. What is a table of 256 levels
here is one in PIL too and gives the same bytes, and so do colour and sharpness; shearing, moving and turning compute in
float32 what PIL computes in float64, and differ by one level in a few pixels of a thousand. Operations that would gain
little (bicubic rotation, Gaussian blur, AugMix) are handed to PIL.
"""

import math
import random
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image
from timm.data import auto_augment as timm_augment
from torch.nn.functional import grid_sample, pad
from torchvision import transforms

from data.decode import as_array

ROUNDING = 1 / 1024
"""Added before fractions are cut off, as PIL cuts them: sums of weights that should be one are less by 1e-7."""


def take_tensors(augment: transforms.Compose) -> None:
    """Changes timm's augmentation, in place, to take and give uint8 tensors [3, H, W]."""
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
    """Lets timm's policies posterize to no bits at all, which at the highest magnitude they do.

    Pillow gave a black image, as in the published training; from version 13 on it raises ValueError.
    """
    for step in augment.transforms:
        for operation in _operations(step):
            if operation.aug_fn is timm_augment.posterize:
                operation.aug_fn = posterize_through_pil


def posterize_through_pil(image: Image.Image, bits: int, **options) -> Image.Image:
    return timm_augment.posterize(image, bits, **options) if bits > 0 else Image.new(image.mode, image.size)


def _operations(step: Callable) -> list[Any]:
    """What a step of timm's augmentation draws from: AugmentOps, of which a checker takes `aug_fn` for no callable."""
    return [*getattr(step, 'ops', ()), *chain(*getattr(step, 'policy', ()))]


class RandAugment:
    """timm's, which draws by numpy.random.choice, an array of the operations in every call: the same draws, sooner."""

    def __init__(self, ops: Sequence[Callable], num_layers: int):
        self.ops, self.num_layers = ops, num_layers

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        for number in np.random.randint(0, len(self.ops), self.num_layers):
            pixels = self.ops[number](pixels)
        return pixels


class ThroughPil:
    """`function`, which takes and gives PIL images, for tensors."""

    def __init__(self, function: Callable):
        self.function = function

    def __call__(self, pixels: torch.Tensor, *args, **options) -> torch.Tensor:
        return as_array(self.function(as_image(pixels), *args, **options))


def as_image(pixels: torch.Tensor) -> Image.Image:
    """uint8 [3, H, W] as a PIL image of mode RGB."""
    size = pixels.shape[2], pixels.shape[1]
    return Image.merge('RGB', [Image.frombytes('L', size, plane.tobytes()) for plane in pixels.numpy()])


# ---------------------------------------------------------------------------------------------------------------------
# One level for another

def invert(pixels: torch.Tensor, **_) -> torch.Tensor:
    return pixels.bitwise_not()


def posterize(pixels: torch.Tensor, bits: int, **_) -> torch.Tensor:
    """Keeps the highest `bits`; none at all give black, as they did before Pillow 13."""
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
    """What Image.blend makes of every level with `level`, int [256]."""
    return (level + np.float32(factor) * (LEVELS - level).astype(np.float32)).clip(0, 255)


def _look_up(pixels: torch.Tensor, *tables: np.ndarray) -> torch.Tensor:
    """Each level by that of its table: one for all channels, or one for each."""
    as_bytes = [table.astype(np.uint8).tobytes() for table in tables]
    planes = pixels.contiguous().numpy()
    # No indexing in numpy or torch is as fast as translate.
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
    """Blends with PIL's ImageFilter.SMOOTH: (1 1 1, 1 5 1, 1 1 1) / 13, but for the outermost pixels."""
    if min(pixels.shape[1:]) < 3:
        return pixels
    levels = pixels.short()
    rows = levels[:, :-2] + levels[:, 1:-1] + levels[:, 2:]
    sums = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:] + 4 * levels[:, 1:-1, 1:-1]
    smooth = pixels.float()
    smooth[:, 1:-1, 1:-1] = (sums.float() / 13).round_()
    return _blend(smooth, pixels.float(), factor)


LUMA = torch.tensor([19595.0, 38470.0, 7471.0])
"""PIL's weights of red, green and blue, ITU-R 601-2 in 16 bits."""


def _grey(levels: torch.Tensor) -> torch.Tensor:
    """PIL's luma of float32 levels [3, H, W], rounded: float32 [H, W]. All sums are below 2^24, and so exact."""
    return (LUMA @ levels.flatten(1)).add_(0x8000).mul_(2**-16).floor_().view(levels.shape[1:])


def _blend(degenerate: torch.Tensor, levels: torch.Tensor, factor: float) -> torch.Tensor:
    """PIL's Image.blend of float32 levels: `degenerate` at factor 0, `levels` at 1, beyond it above."""
    return _cut_off(torch.add(degenerate, levels - degenerate, alpha=factor))


def _cut_off(levels: torch.Tensor) -> torch.Tensor:
    """float32 → uint8 as PIL does, without fractions; by way of int16, which takes a quarter of the time."""
    return levels.add_(ROUNDING).clamp_(0, 255).short().to(torch.uint8)


# ---------------------------------------------------------------------------------------------------------------------
# Geometry

def shear_x(pixels: torch.Tensor, factor: float, *, resample, fillcolor: Sequence[int]) -> torch.Tensor:
    rows = np.arange(pixels.shape[1])
    return _shift_lines(pixels, 2, factor * (rows + 0.5), resample, fillcolor)


def shear_y(pixels: torch.Tensor, factor: float, *, resample, fillcolor: Sequence[int]) -> torch.Tensor:
    columns = np.arange(pixels.shape[2])
    return _shift_lines(pixels, 1, factor * (columns + 0.5), resample, fillcolor)


def translate_x(pixels: torch.Tensor, shift: float, *, resample, fillcolor: Sequence[int]) -> torch.Tensor:
    return _shift_all(pixels, 2, shift, resample, fillcolor)


def translate_y(pixels: torch.Tensor, shift: float, *, resample, fillcolor: Sequence[int]) -> torch.Tensor:
    return _shift_all(pixels, 1, shift, resample, fillcolor)


def translate_x_by_part(pixels: torch.Tensor, part: float, **options) -> torch.Tensor:
    return translate_x(pixels, part * pixels.shape[2], **options)


def translate_y_by_part(pixels: torch.Tensor, part: float, **options) -> torch.Tensor:
    return translate_y(pixels, part * pixels.shape[1], **options)


def rotate(pixels: torch.Tensor, degrees: float, *, resample, fillcolor: Sequence[int]) -> torch.Tensor:
    """Counterclockwise about the centre; corners that come from outside get `fillcolor`."""
    if (resample := _draw(resample)) != Image.Resampling.BILINEAR:  # torch's cubic is another, and hardly sooner
        return ROTATE_THROUGH_PIL(pixels, degrees, resample=resample, fillcolor=fillcolor)
    height, width = pixels.shape[1:]
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    x, y = torch.arange(0.5 - width / 2, width / 2), torch.arange(0.5 - height / 2, height / 2)[:, None]
    # Where a pixel comes from, from -1 at one edge to 1 at the other.
    x, y = (cos * x - sin * y) * (2 / width), (sin * x + cos * y) * (2 / height)
    moved = _cut_off(grid_sample(pixels.float()[None], torch.stack((x, y), -1)[None], padding_mode='border',
                                 align_corners=False)[0])
    outside = ((x.abs() > 1) | (y.abs() > 1)).numpy()
    for plane, level in zip(moved.numpy(), fillcolor, strict=True):
        np.copyto(plane, level, where=outside)
    return moved


ROTATE_THROUGH_PIL = ThroughPil(timm_augment.rotate)


def _shift_lines(pixels: torch.Tensor, axis: int, shifts: np.ndarray, resample, fillcolor: Sequence[int]
                 ) -> torch.Tensor:
    """Every line along `axis` moved by its own of `shifts`, in pixels: what PIL's affine transform does to lines.

    The taps of a pixel are its neighbours on the line, the outermost repeated beyond the ends; a pixel whose centre
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
               for tap, weight in _tap_weights(shifts - whole, _draw(resample)).items()}
    moved = _weigh(taps, axis, length, weights)
    # Of each line the positions whose centres come from inside are those from `first` up to `end`.
    first, end = (np.ceil(edge - shifts - 0.5).clip(0, length).astype(np.int16)[:, None] for edge in (0, length))
    steps = np.arange(length, dtype=np.int16)
    outside = (steps < first) | (steps >= end)  # [lines, length]
    for plane, level in zip(moved.numpy(), fillcolor, strict=True):
        np.copyto(plane, level, where=outside if axis == 2 else outside.T)
    return moved


def _shift_all(pixels: torch.Tensor, axis: int, shift: float, resample, fillcolor: Sequence[int]) -> torch.Tensor:
    """As `_shift_lines` with one shift for all lines, of which only what remains is computed."""
    length, whole = pixels.shape[axis], math.floor(shift)
    weights = _tap_weights(shift - whole, _draw(resample))
    moved = torch.tensor(fillcolor, dtype=torch.uint8)[:, None, None].repeat(1, *pixels.shape[1:])
    # Of the positions whose centres come from inside, the first and the one after the last.
    first, end = (min(max(math.ceil(edge - shift - 0.5), 0), length) for edge in (0, length))
    if first < end:
        before, behind = first + whole - 1, end + whole + 2
        inside = range(max(before, 0), min(behind, length))
        beyond = (inside.start - before, behind - inside.stop)
        taps = pad(pixels.narrow(axis, inside.start, len(inside)).float(), (0, 0) * (2 - axis) + beyond, 'replicate')
        moved.narrow(axis, first, end - first).copy_(_weigh(taps, axis, end - first, weights))
    return moved


def _draw(resample):
    """One of timm's interpolations where there are several, as timm draws it."""
    return random.choice(resample) if isinstance(resample, (tuple, list)) else resample


def _weigh(taps: torch.Tensor, axis: int, length: int, weights: Mapping[int, torch.Tensor | float]) -> torch.Tensor:
    """Sum of neighbours along `axis`, which is longer than `length` by three, as levels."""
    (tap, weight), *others = weights.items()
    moved = taps.narrow(axis, tap, length) * weight
    for tap, weight in others:
        part = taps.narrow(axis, tap, length)
        if isinstance(weight, torch.Tensor):
            moved.addcmul_(part, weight)
        else:
            moved.add_(part, alpha=weight)
    return _cut_off(moved)


_Fraction = TypeVar('_Fraction', float, np.ndarray)


def _tap_weights(fraction: _Fraction, resample: Image.Resampling) -> dict[int, _Fraction]:
    """Of the pixels at -1, 0, 1 and 2 from where `fraction` counts from, as numbers 0 to 3, those that have a weight.

    The cubic ones are those of PIL's geometry, with a = -1 (its resizing has -0.5).
    """
    d = fraction
    if resample == Image.Resampling.BILINEAR:
        return {1: 1 - d, 2: d}
    assert resample == Image.Resampling.BICUBIC, f'{resample} has no tensor form'
    return {1: 1 - 2 * d**2 + d**3, 2: d + d**2 - d**3, 0: -d + 2 * d**2 - d**3, 3: d**3 - d**2}


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
    timm_augment.shear_x: shear_x,
    timm_augment.shear_y: shear_y,
    timm_augment.solarize: solarize,
    timm_augment.solarize_add: solarize_add,
    timm_augment.translate_x_abs: translate_x,
    timm_augment.translate_x_rel: translate_x_by_part,
    timm_augment.translate_y_abs: translate_y,
    timm_augment.translate_y_rel: translate_y_by_part,
}
"""Ours for timm's; the names in timm's policies are more, for levels that mean different arguments."""
