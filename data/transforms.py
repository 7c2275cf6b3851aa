"""From an image to a uint8 tensor [C, H, W]: timm's transforms, with the published recipe as defaults.

The fast transforms make timm's random choices, from the same generators in the same order, but process tensors. Their
pixels are timm's within rounding. They have `takes_encoded`: they take `ImageDataset.encoded` and decode what they
need. timm's own transforms do what the fast ones cannot.

`batch` normalises and erases on the device, because uint8 is a quarter of the bytes to transfer. All randomness comes
from the global generators of `random`, numpy and torch, which `loader` seeds for each sample.
"""
import logging
import math
import random
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import PIL
import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, create_transform
from timm.data.transforms import ResizeKeepRatio, str_to_interp_mode
from torch.nn.functional import interpolate
from torchvision import transforms

from data.augment import allow_zero_bits, take_tensors
from data.decode import EncodedImage
from utils.errors import UserError

_logger = logging.getLogger(__name__)

# From a PIL image of mode RGB, or from an EncodedImage if it has `takes_encoded`, to uint8.
Transform = Callable[[Any], torch.Tensor]

INTERPOLATIONS = ('bicubic', 'bilinear', 'nearest', 'box', 'hamming', 'lanczos')


class InputConfig(NamedTuple):
    """A model's input: size (height, width), crop, interpolation, and mean and standard deviation of the pixels."""
    img_size: tuple[int, int]
    crop_pct: float
    interpolation: str
    crop_mode: str
    mean: tuple[float, ...]
    std: tuple[float, ...]


def create_train_transform(
        img_size: int | tuple[int, int] = 224, *, crop_mode: str = 'rrc', scale: Sequence[float] = (0.08, 1.0),
        ratio: Sequence[float] = (3 / 4, 4 / 3), hflip: float = 0.5, vflip: float = 0.0,
        color_jitter: float | None = 0.4, auto_augment: str | None = 'rand-m9-mstd0.5-inc1',
        interpolation: str = 'random', mean: Sequence[float] = IMAGENET_DEFAULT_MEAN, no_aug: bool = False,
        aug_splits: int = 0, fast: bool = True) -> Transform:
    """Return the training transform: image → uint8 [C, H, W], or [S, C, H, W] with S = `aug_splits` ≥ 2.

    img_size: pixels, an int or (height, width).
    crop_mode: 'rrc' for RandomResizedCrop with `scale` (of the area) and `ratio` (width / height); 'pad', the CIFAR
        recipe, for resizing to `img_size` and a random crop after padding by an eighth of it.
    hflip, vflip: probabilities.
    color_jitter: strength for brightness, contrast and saturation, 0 or None for off; timm ignores it if `auto_augment`
        is used, except for '3a'.
    auto_augment: a timm policy such as 'rand-…', 'augmix-…', 'original', 'v0', '3a'; None or '' for off.
    interpolation: one of INTERPOLATIONS, or 'random': bilinear or bicubic ('pad' and `no_aug`: bilinear).
    mean: of the later normalisation, 0…1; RandAugment fills uncovered corners with it.
    no_aug: only resize and centre crop.
    aug_splits: S versions of one crop, the first without augmentation (AugMix); 0 for off.
    fast: return a FastTrainTransform if it supports the other arguments, else timm's, which takes a PIL image.
    Raises UserError for an invalid value.
    """
    _check_size(img_size)
    _check_choice('interpolation', interpolation, (*INTERPOLATIONS, 'random'))
    _check_choice('crop_mode', crop_mode, ('rrc', 'pad'))
    _check_range('scale', scale)
    if scale[1] > 1:
        raise UserError(f'scale {tuple(scale)}; a crop has at most the area of the image, 1')
    _check_range('ratio', ratio)
    if aug_splits < 0 or aug_splits == 1 or (aug_splits and no_aug):
        raise UserError(f'--aug-splits {aug_splits}; use 0, or 2 and more, and not with --no-aug')
    mean = per_channel('mean', mean)
    if no_aug:
        return create_transform(img_size, is_training=True, no_aug=True, interpolation=interpolation,
                                use_prefetcher=True)
    try:
        crop, augment, to_tensor = create_transform(
            img_size, is_training=True, use_prefetcher=True, separate=True, scale=(scale[0], scale[1]),
            ratio=(ratio[0], ratio[1]), hflip=hflip, vflip=vflip,
            color_jitter=color_jitter or None,  # type: ignore[arg-type]  # timm takes None, though it does not say so
            auto_augment=auto_augment or None, interpolation=interpolation, mean=mean)
    # timm's answers to an invalid policy.
    except (AssertionError, ValueError, KeyError, TypeError, IndexError) as error:
        raise UserError(f'--aa {auto_augment!r} is no policy of timm ({error}); '
                        "use for instance 'rand-m9-mstd0.5-inc1'") from None
    allow_zero_bits(augment)
    if fast and _has_fast_form('training', crop_mode=(crop_mode, ['rrc']), aug_splits=(aug_splits, [0]),
                               interpolation=(interpolation, [*FAST_INTERPOLATIONS, 'random'])):
        take_tensors(augment)
        return FastTrainTransform(crop, augment)
    if crop_mode == 'pad':
        crop = _padded_crop(img_size, interpolation, hflip, vflip)
    if aug_splits:
        return SplitTransform(crop, augment, to_tensor, aug_splits)
    return transforms.Compose([*crop.transforms, *augment.transforms, *to_tensor.transforms])


def create_eval_transform(
        img_size: int | tuple[int, int] = 224, *, crop_pct: float = 0.9, interpolation: str = 'bicubic',
        crop_mode: str = 'center', mean: Sequence[float] = IMAGENET_DEFAULT_MEAN, fast: bool = False) -> Transform:
    """Return timm's evaluation transform: PIL RGB image → uint8 [C, H, W], deterministic.

    It resizes so that `img_size` (int, or (height, width)) is the fraction `crop_pct` of the result, then crops the
    centre.

    crop_mode: 'center' fits the shorter edge, 'squash' both edges, 'border' the longer one, padded by `mean`.
    fast: return a FastEvalTransform, which takes an EncodedImage, if it supports the other arguments.
    Raises UserError for an invalid value.
    """
    _check_size(img_size)
    _check_choice('interpolation', interpolation, INTERPOLATIONS)
    _check_choice('crop_mode', crop_mode, ('center', 'squash', 'border'))
    mean = per_channel('mean', mean)
    if not 0 < crop_pct <= 1:
        raise UserError(f'--crop-pct {crop_pct}; give a fraction above 0 and up to 1')
    timms = create_transform(img_size, is_training=False, use_prefetcher=True, crop_pct=crop_pct,
                             crop_mode=crop_mode, interpolation=interpolation, mean=mean)
    if fast and _has_fast_form('evaluation', crop_mode=(crop_mode, ['center', 'squash']),
                               interpolation=(interpolation, FAST_INTERPOLATIONS),
                               resize=(type(timms.transforms[0]), [transforms.Resize])):
        return FastEvalTransform(*timms.transforms[:2])
    return timms


def _has_fast_form(task: str, **conditions: tuple[object, Sequence]) -> bool:
    """Return whether the value of each condition is among those that the fast form supports; if not, log which one."""
    for name, (value, known) in conditions.items():
        if value not in known:
            _logger.info("images for %s are transformed by timm's own code, which is slower: there is no fast form "
                         'for %s %s', task, name, getattr(value, '__name__', value))
            return False
    return True


class Placement(NamedTuple):
    """Where in an image a transform found what it returned.

    box: top, left, height and width of the crop, as shares of the flipped image.
    flips: the axes along which it flipped, among −1 and −2.
    """
    box: tuple[float, float, float, float]
    flips: tuple[int, ...]


class FastTrainTransform:
    """Crop, resize, flip and augmentation: an EncodedImage → uint8 [3, h, w].

    crop: timm's first stage, the random crop and flips. augment: timm's second stage after `take_tensors`.
    """
    takes_encoded = True

    def __init__(self, crop: transforms.Compose, augment: transforms.Compose):
        self.crop, *flips = crop.transforms
        # Calling a module takes longer than flipping an image.
        self.flips = [(step.p, -1 if isinstance(step, transforms.RandomHorizontalFlip) else -2) for step in flips]
        self.augment = augment

    def __call__(self, image: EncodedImage) -> torch.Tensor:
        return self.located(image)[0]

    def located(self, image: EncodedImage) -> tuple[torch.Tensor, Placement]:
        """Return the result, and where it lies in the image.

        Rotations, shears and translations of the augmentation, which come last, do not count.
        """
        crop = self.crop
        top, left, height, width = draw_crop(image.height, image.width, crop.scale, crop.ratio)
        mode = crop.interpolation
        mode = random.choice(mode) if isinstance(mode, (tuple, list)) else mode
        pixels = image.pixels(top + height)[:, top:top + height, left:left + width]
        pixels = _resize(pixels, crop.size, mode)
        flips = tuple(axis for probability, axis in self.flips if torch.rand(1).item() < probability)
        for axis in flips:
            pixels = pixels.flip(axis)
        return self.augment(pixels), _place((top, left, height, width), (image.height, image.width), flips)


def _place(crop: tuple[int, int, int, int], size: tuple[int, int], flips: tuple[int, ...]) -> Placement:
    """Return the placement of a crop, in pixels, that was made before the flips."""
    top, left, height, width = crop
    top = size[0] - top - height if -2 in flips else top
    left = size[1] - left - width if -1 in flips else left
    return Placement((top / size[0], left / size[1], height / size[0], width / size[1]), flips)


def draw_crop(height: int, width: int, scale: Sequence[float], ratio: Sequence[float]) -> tuple[int, int, int, int]:
    """Return top, left, height and width of a random crop: timm's choice for the same random numbers
    (RandomResizedCropAndInterpolation.get_params), in a quarter of its time."""
    for _ in range(10):
        area = random.uniform(*scale) * (width * height)
        aspect = math.exp(random.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = int(round(math.sqrt(area * aspect))), int(round(math.sqrt(area / aspect)))
        if w <= width and h <= height:
            return random.randint(0, height - h), random.randint(0, width - w), h, w
    # If no such crop fits, take the largest in the centre.
    w, h = min(width, int(round(height * max(ratio)))), min(height, int(round(width / min(ratio))))
    return (height - h) // 2, (width - w) // 2, h, w


class FastEvalTransform:
    """Resizing and centre crop: an EncodedImage → uint8 [3, h, w].

    resize: torchvision's, whose `size` is the shorter edge, or both. crop: torchvision's.
    """
    takes_encoded = True

    def __init__(self, resize: transforms.Resize, crop: transforms.CenterCrop):
        self.resize, self.crop = resize, crop

    def __call__(self, image: EncodedImage) -> torch.Tensor:
        return self.crop(self.resized(image))

    def resized(self, image: EncodedImage) -> torch.Tensor:
        """Return the whole image, resized: uint8 [3, H, W]."""
        height, width = image.height, image.width
        size = self.resize.size
        if isinstance(size, int):  # torchvision rounds down
            longer = int(size * max(height, width) / min(height, width))
            size = (size, longer) if height <= width else (longer, size)
        return _resize(image.pixels(), size, self.resize.interpolation)


# From version 13 on, PIL resizes tall images along columns first: those that lose more than twice as many rows as
# columns. Levels are rounded between the two directions, so the order shows.
COLUMNS_FIRST = int(PIL.__version__.partition('.')[0]) >= 13
# Those that torch has for uint8, with PIL's filters and PIL's rounding between the two directions.
FAST_INTERPOLATIONS = ('bicubic', 'bilinear')


def _resize(pixels: torch.Tensor, size: Sequence[int], mode: transforms.InterpolationMode) -> torch.Tensor:
    """Resize uint8 [3, H, W] to [3, h, w], antialiased."""
    if not pixels.numel():  # the crop of a tiny image can round to no pixels; PIL makes it black
        return pixels.new_zeros(3, *size)
    resize = partial(interpolate, mode=mode.value, antialias=True)
    (height, width), (rows, columns) = size, pixels.shape[1:]
    if COLUMNS_FIRST and rows - height > max(0, 2 * (columns - width)):
        pixels = resize(pixels[None], size=(height, columns))[0]  # torch alone would begin with the rows
    return resize(pixels[None], size=(height, width))[0]


class SplitTransform:
    """One crop of an image, unchanged and augmented `num_splits` − 1 times: PIL image → uint8 [S, C, H, W]."""

    def __init__(self, crop: Callable, augment: Callable, to_tensor: Callable, num_splits: int):
        self.crop, self.augment, self.to_tensor, self.num_splits = crop, augment, to_tensor, num_splits

    def __call__(self, image: Image.Image) -> torch.Tensor:
        image = self.crop(image)
        augmented = [self.augment(image) for _ in range(self.num_splits - 1)]
        return torch.stack([self.to_tensor(split) for split in (image, *augmented)])


def _padded_crop(img_size: int | tuple[int, int], interpolation: str, hflip: float, vflip: float) -> transforms.Compose:
    """Return the CIFAR recipe: resize the shorter edge, pad by an eighth, crop at random, flip."""
    height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
    interpolation = 'bilinear' if interpolation == 'random' else interpolation
    if height == width:
        resize: Callable = transforms.Resize(height, str_to_interp_mode(interpolation))
    else:
        resize = ResizeKeepRatio((height, width), interpolation=interpolation)
    steps: list[Callable] = [resize, transforms.RandomCrop((height, width), padding=(width // 8, height // 8))]
    if hflip:
        steps.append(transforms.RandomHorizontalFlip(hflip))
    if vflip:
        steps.append(transforms.RandomVerticalFlip(vflip))
    return transforms.Compose(steps)


def per_channel(name: str, values: Sequence[float]) -> tuple[float, float, float]:
    """Return three values from one or three. Raises UserError, which calls them `name`, for any other number."""
    if len(values) not in (1, 3):
        raise UserError(f'{name} {tuple(values)}; give one value, or three for red, green and blue')
    red, green, blue = (*values,) * (3 // len(values))
    return red, green, blue


def _check_size(img_size: int | tuple[int, int]):
    sizes = (img_size,) if isinstance(img_size, int) else tuple(img_size)
    if len(sizes) not in (1, 2) or min(sizes) < 1:
        raise UserError(f'img_size {img_size}; give one number of pixels, or height and width')


def _check_choice(name: str, value: str, choices: Sequence[str]):
    if value not in choices:
        raise UserError(f'{name} {value!r}; choose from {", ".join(choices)}')


def _check_range(name: str, bounds: Sequence[float]):
    if len(bounds) != 2 or not 0 < bounds[0] <= bounds[1]:
        raise UserError(f'{name} {tuple(bounds)}; give a lower and an upper bound above 0')
