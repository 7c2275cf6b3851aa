"""Data sets that are arrays in memory: the embedded digits, CIFAR, and synthetic images."""
import os
from collections.abc import Sequence

import numpy as np
from PIL import Image
from torchvision.datasets import CIFAR10, CIFAR100

from data.base import ImageDataset
from data.places import EVAL_SPLITS
from utils.errors import UserError

_CIFAR = {'cifar10': CIFAR10, 'cifar100': CIFAR100}


class ArrayImages(ImageDataset):
    """Images in an array: uint8 [N, H, W, 3], or [N, H, W] for greyscale. `name` is for messages."""

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
    """Random pictures: smooth fields of colours with noise on them, each from a generator of (seed, index).

    image_size: pixels, an int or (height, width). num_classes: targets go round through them.
    """

    def __init__(
        self,
        num_images: int = 1024,
        image_size: int | Sequence[int] = 224,
        num_classes: int = 1000,
        seed: int = 0,
    ):
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


def _open_part(name: str, root: str, split: str | None, download: bool, synthetic: tuple) -> ImageDataset:
    """A part of a dataset without folders: for training if `split` is 'train', else for evaluation."""
    if split not in (None, 'train', *EVAL_SPLITS):
        raise UserError(f'dataset {name!r} has no split {split!r}; choose train or val')
    is_train = split == 'train'
    if name == 'synthetic':
        num_images, image_size, num_classes = synthetic
        return SyntheticImages(num_images, image_size, num_classes, seed=0 if is_train else 1)
    if name == 'digits':
        return open_digits(is_train)
    return _open_cifar(name, root, is_train, download)


def open_digits(is_train: bool) -> ArrayImages:
    """The embedded digits: 1,438 images to train on or 359 to evaluate with; ink 0…16 becomes 0…255."""
    with np.load(os.path.join(os.path.dirname(__file__), 'digits.npz'), allow_pickle=False) as file:
        chosen = file['is_val'] != is_train
        images, targets = file['images'][chosen], file['targets'][chosen]
    images = np.rint(images * (255 / 16)).astype(np.uint8)
    return ArrayImages(f'digits/{"train" if is_train else "val"}', images, list('0123456789'), targets)


def _open_cifar(name: str, root: str, is_train: bool, download: bool) -> ArrayImages:
    """CIFAR from torchvision, which checks the MD5 of the files, pickles all of them, before reading them."""
    if not root:
        raise UserError(f'dataset {name!r} needs a data folder; give one that holds it or is to hold it')
    try:
        source = _CIFAR[name](root, train=is_train, download=download)
    except (RuntimeError, OSError) as error:  # not found, damaged; no network, no right to write
        if download:
            raise UserError(f'dataset {name!r} could not be downloaded to {root} ({error}); download '
                            f'{_CIFAR[name].url} elsewhere and unpack it there') from None
        folder = os.path.join(root, _CIFAR[name].base_folder)
        state = 'damaged or incomplete' if os.path.isdir(folder) else 'missing, and there is no train/ either'
        remedy = 'check the data folder or allow the download'
        raise UserError(f'dataset {name!r}: {folder} is {state}; {remedy}') from None
    part = 'train' if is_train else 'test'
    return ArrayImages(f'{name}/{part}', source.data, source.classes, source.targets)
