"""Data sets that are arrays in memory: the embedded digits, CIFAR, and synthetic images.

data/digits.npz holds 1,797 handwritten digits of 8 × 8 pixels; data/digits.LICENSE has licence and source. It was made
from scikit-learn's `digits = load_digits()` by numpy.savez_compressed(file, images=…, targets=…, is_val=…): `images` is
`digits.images` as uint8 [1797, 8, 8] with ink from 0 to 16, `targets` is `digits.target` as uint8. `is_val` marks a
fixed fifth of each class: for class k, of its n indices in order, permuted by `numpy.random.RandomState(k)`, the first
round(n / 5).
"""
import os
from collections.abc import Sequence

import numpy as np
from PIL import Image
from torchvision.datasets import CIFAR10, CIFAR100

from data.base import ImageDataset, Request
from utils.errors import UserError

CIFAR = {'cifar10': CIFAR10, 'cifar100': CIFAR100}


class ArrayImages(ImageDataset):
    """Images in an array: uint8 [N, H, W, 3], or [N, H, W] for greyscale. Messages call it `name`."""

    def __init__(self, name: str, images: np.ndarray, classes: Sequence[str], targets: Sequence[int]):
        super().__init__(classes, targets)
        self._name = name
        self._images = images

    def read_bytes_or_image(self, index: int) -> Image.Image:
        image = Image.fromarray(self._images[index])
        return image if image.mode == 'RGB' else image.convert('RGB')

    def path(self, index: int) -> str:
        return f'{self._name}[{index}]'


class SyntheticImages(ImageDataset):
    """Random pictures: smooth fields of colours with noise, each from a generator seeded by (seed, index).

    image_size: pixels, an int or (height, width). num_classes: image k is of class k modulo this.
    """

    def __init__(self, num_images: int = 1024, image_size: int | Sequence[int] = 224, num_classes: int = 1000,
                 seed: int = 0):
        if min(num_images, num_classes, *np.atleast_1d(image_size)) < 1:
            raise UserError(f'synthetic data of {num_images} images, {image_size} pixels, {num_classes} '
                            'classes; each must be at least 1')
        super().__init__([f'class{k}' for k in range(num_classes)], np.arange(num_images) % num_classes)
        self._size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
        self._seed = seed

    def read_bytes_or_image(self, index: int) -> Image.Image:
        if not 0 <= index < len(self):
            raise IndexError(index)
        random = np.random.default_rng((self._seed, int(index)))
        height, width = self._size
        coarse = Image.fromarray(random.integers(0, 224, (8, 8, 3), dtype=np.uint8))
        field = np.asarray(coarse.resize((width, height), Image.Resampling.BILINEAR))
        return Image.fromarray(field + random.integers(0, 32, (height, width, 3), dtype=np.uint8))

    def path(self, index: int) -> str:
        return f'synthetic[{index}]'


def open_synthetic(request: Request) -> SyntheticImages:
    return SyntheticImages(request.num_images, request.image_size, request.num_classes, seed=int(not request.is_train))


def open_digits(request: Request) -> ArrayImages:
    """Return the embedded digits, 1,438 to train on or 359 to evaluate with; ink 0…16 becomes 0…255."""
    with np.load(os.path.join(os.path.dirname(__file__), 'digits.npz'), allow_pickle=False) as file:
        chosen = file['is_val'] != request.is_train
        images, targets = file['images'][chosen], file['targets'][chosen]
    images = np.rint(images * (255 / 16)).astype(np.uint8)
    return ArrayImages(f'digits/{"train" if request.is_train else "val"}', images, list('0123456789'), targets)


def open_cifar(request: Request) -> ArrayImages:
    """Return CIFAR from torchvision, which checks the MD5 of its pickled files before it reads them."""
    name, root = request.name, request.folder
    if not root:
        raise UserError(f'dataset {name!r} needs a data folder; give one that holds it or is to hold it')
    try:
        source = CIFAR[name](root, train=request.is_train, download=request.download)
    except (RuntimeError, OSError) as error:  # not found, damaged; no network, no right to write
        if request.download:
            raise UserError(f'dataset {name!r} could not be downloaded to {root} ({error}); download '
                            f'{CIFAR[name].url} elsewhere and unpack it there') from None
        folder = os.path.join(root, CIFAR[name].base_folder)
        state = 'damaged or incomplete' if os.path.isdir(folder) else 'missing, and there is no train/ either'
        raise UserError(f'dataset {name!r}: {folder} is {state}; check the data folder or allow the download') from None
    return ArrayImages(f'{name}/{"train" if request.is_train else "test"}', source.data, source.classes, source.targets)
