"""Several views of each evaluation image in one batch: for test-time augmentation, and for models of several inputs.

    views = plan_views([config_of_one_model, config_of_another], 'flip')
    transform, prepare = create_views(views, fast=False, device=device)  # an image → uint8 [n] → its views
    views.of[1]                                                          # those of the second model

An image is read and decoded once. The workers crop and resize, exactly as for an evaluation of that view alone; flips
are made on the device.
"""
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from torchvision.transforms import FiveCrop
from torchvision.transforms.functional import five_crop

from data.batch import BatchPreparer
from data.transforms import InputConfig, Transform, create_eval_transform
from utils.errors import UserError

# Test-time augmentation of several sizes: an eighth smaller, the model's own, an eighth larger, in steps of 16 pixels,
# of which T2T-ViT makes one token.
SIZE_STEP = 16


class Views(NamedTuple):
    """Which views a batch has.

    inputs: the transforms' settings, each once, with the number of crops that they give: 1, or 5.
    is_flipped: whether each view is followed by its mirror image.
    of: for each model, the positions of its views.
    """
    inputs: list[tuple[InputConfig, int]]
    is_flipped: bool
    of: list[list[int]]


def plan_views(configs: Sequence[InputConfig], tta: str = '') -> Views:
    """Return the views that models with inputs `configs` need; equal ones are shared.

    tta: '' for one view of each model; 'flip': that and its mirror image; 'five': the four corners and the centre of
        the resized image; 'multi-scale': the evaluation's centre crops of three sizes.
    Raises UserError for an image whose corners are only padding.
    """
    needed = [[(config._replace(img_size=size), 5 if tta == 'five' else 1)
               for size in (scales(config.img_size) if tta == 'multi-scale' else [config.img_size])]
              for config in configs]
    inputs = list(dict.fromkeys(own for of_model in needed for own in of_model))
    if tta == 'five' and any(config.crop_mode == 'border' for config, _ in inputs):
        raise UserError('--tta five: the model takes whole images with a border, which have no corners; say --tta flip')
    starts = [0, *accumulate(crops * (1 + (tta == 'flip')) for _, crops in inputs)]
    positions = {own: range(*ends) for own, ends in zip(inputs, pairwise(starts), strict=True)}
    return Views(inputs, tta == 'flip', [[view for own in of_model for view in positions[own]] for of_model in needed])


def scales(size: tuple[int, int]) -> list[tuple[int, int]]:
    """Return the three sizes of multi-scale evaluation: (224, 224) → 192, 224 and 256 pixels."""
    steps = [max(1, round(edge / 8 / SIZE_STEP)) * SIZE_STEP for edge in size]
    return [(max(SIZE_STEP, size[0] + sign * steps[0]), max(SIZE_STEP, size[1] + sign * steps[1]))
            for sign in (-1, 0, 1)]


def create_views(views: Views, *, fast: bool, device: torch.device,
                 channels_last: bool = False) -> tuple[Transform, 'ViewsPreparer']:
    """Return the transform of an image, and the preparer of its batches; `fast` as for `create_eval_transform`."""

    def create(fast: bool) -> list:
        transforms = [create_eval_transform(config.img_size, crop_pct=config.crop_pct, fast=fast, mean=config.mean,
                                            interpolation=config.interpolation, crop_mode=config.crop_mode)
                      for config, _ in views.inputs]
        return [FiveCrops(transform) if crops == 5 else transform
                for transform, (_, crops) in zip(transforms, views.inputs, strict=True)]

    transforms = create(fast)
    if not all(getattr(transform, 'takes_encoded', False) for transform in transforms):
        transforms = create(fast=False)  # an image comes either encoded or decoded
    preparers = [BatchPreparer(device, mean=config.mean, std=config.std, channels_last=channels_last)
                 for config, _ in views.inputs]
    return ManyTransforms(transforms), ViewsPreparer(device, views, preparers)


class FiveCrops:
    """The four corners and the centre of what an evaluation transform resizes: an image → uint8 [5, 3, h, w].

    transform: of `create_eval_transform`; its first step resizes, its second crops.
    """

    def __init__(self, transform: Any):
        self.takes_encoded = getattr(transform, 'takes_encoded', False)
        self._transform = transform

    def __call__(self, image: Any) -> torch.Tensor:
        if self.takes_encoded:
            return torch.stack(five_crop(self._transform.resized(image), self._transform.crop.size))
        resize, crop, *to_tensor = self._transform.transforms
        views = []
        for view in FiveCrop(crop.size)(resize(image)):
            for step in to_tensor:
                view = step(view)
            views.append(view)
        return torch.stack(views)


class ManyTransforms:
    """The results of several transforms of one image, behind one another: uint8 [n]."""

    def __init__(self, transforms: Sequence[Any]):
        self._transforms = transforms
        self.takes_encoded = getattr(transforms[0], 'takes_encoded', False)

    def __call__(self, image: Any) -> torch.Tensor:
        if self.takes_encoded and len(self._transforms) > 1:
            image = image.whole()
        parts = [transform(image).flatten() for transform in self._transforms]
        return parts[0] if len(parts) == 1 else torch.cat(parts)


class ViewsPreparer(BatchPreparer):
    """Moves a batch of views to the device and normalises each as its model takes it.

    preparers: of each of `views.inputs`.
    """

    def __init__(self, device: torch.device, views: Views, preparers: Sequence[BatchPreparer]):
        super().__init__(device)
        self._views, self._preparers = views, preparers
        self._ends = [0, *accumulate(crops * 3 * config.img_size[0] * config.img_size[1]
                                     for config, crops in views.inputs)]

    def __call__(self, images: torch.Tensor, targets: torch.Tensor) -> tuple[Any, torch.Tensor]:
        """Return the views of `images`, uint8 [B, n], float32 [B, 3, h, w] each, and `targets` [B], on the device."""
        images, targets = self._move(images), self._move(targets)
        views = []
        for (config, crops), prepare, ends in zip(self._views.inputs, self._preparers, pairwise(self._ends),
                                                  strict=True):
            of_input = images[:, slice(*ends)].unflatten(1, (crops, 3, *config.img_size))
            for crop in range(crops):
                view, _ = prepare(of_input[:, crop], targets)
                views += [view, view.flip(3)] if self._views.is_flipped else [view]
        return views, targets
