"""What a data set is: a numbered list of images with targets, and the names of the classes."""
import contextlib
import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple

import numpy as np
from PIL import Image

from data.decode import EncodedImage, decode_rgb


class ImageDataset(ABC):
    """Base of all data sets.

    A subclass implements `read_bytes_or_image` and `path`. Both return the same for an index at any time and in any
    process.

    classes: list of class names; a target is a position in it. targets: int64 array [len].
    """

    def __init__(self, classes: Sequence[str], targets: Sequence[int] | np.ndarray):
        self.classes = list(classes)
        self.targets = np.asarray(targets, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.targets)

    def image(self, index: int) -> Image.Image:
        """Return sample `index` as a PIL image of mode RGB. Raises ImageError for a bad file."""
        stored = self.read_bytes_or_image(index)
        return decode_rgb(stored, self.path(index)) if isinstance(stored, bytes) else stored

    def encoded(self, index: int) -> EncodedImage:
        """Return sample `index` for decoding as far as needed. Raises ImageError for a bad file."""
        return EncodedImage(self.read_bytes_or_image(index), self.path(index))

    @abstractmethod
    def read_bytes_or_image(self, index: int) -> bytes | Image.Image:
        """Return the content of an image file, or a PIL image of mode RGB. Raises ImageError for an unreadable file."""

    @abstractmethod
    def path(self, index: int) -> str:
        """Return where sample `index` is, for messages."""

    def name(self, index: int) -> str:
        """Return what sample `index` is called in its data set, wherever that is."""
        return self.path(index)

    def fingerprint(self) -> str:
        """Return the number of images, with a checksum of their names and targets in their order.

        It is the same for the same data set at another place, and tells whether two runs read the same images.
        """
        digest = hashlib.sha256(self.targets.tobytes())
        for part in self._names():
            digest.update(part)
        return f'{len(self)} images with the checksum {digest.hexdigest()[:16]}'

    def _names(self) -> Iterable[bytes]:
        """Return what tells the images and their order, in parts; nothing if their numbers alone do."""
        return ()

    def shard_offsets(self) -> np.ndarray | None:
        """Return the first sample of each shard to be fetched, then the number of samples: int64 [shards + 1].

        None: nothing is fetched, and any order of samples is equally fast.
        """
        return None

    def ahead(self, indices: np.ndarray) -> AbstractContextManager[Callable[[int], None]]:
        """Return a context that fetches ahead what the samples `indices`, int64 [n], need, in their order.

        Its value is a function to call after every batch with the number of samples used.
        """
        return contextlib.nullcontext(lambda used: None)


class Request(NamedTuple):
    """What the opener of a data set in options/datasets.py is asked for.

    name: the data set's. folder: the user's DIR, '' if none was given. download: fetch files that are missing in it.
    num_images, image_size, num_classes: of generated images. is_train: the training split, not the evaluation split.
    """
    name: str
    folder: str
    download: bool = False
    num_images: int = 1024
    image_size: int | Sequence[int] = 224
    num_classes: int = 1000
    is_train: bool = False


class Part(ImageDataset):
    """The images of `dataset` at `indices`, in that order."""

    def __init__(self, dataset: ImageDataset, indices: Sequence[int] | np.ndarray):
        self._dataset = dataset
        self._indices = np.asarray(indices, dtype=np.int64)
        super().__init__(dataset.classes, dataset.targets[self._indices])

    def read_bytes_or_image(self, index: int) -> bytes | Image.Image:
        return self._dataset.read_bytes_or_image(int(self._indices[index]))

    def path(self, index: int) -> str:
        return self._dataset.path(int(self._indices[index]))

    def name(self, index: int) -> str:
        return self._dataset.name(int(self._indices[index]))

    def _names(self) -> Iterable[bytes]:
        return (*self._dataset._names(), self._indices.tobytes())

    def shard_offsets(self) -> np.ndarray | None:
        starts = self._dataset.shard_offsets()
        is_in_order = bool((np.diff(self._indices) >= 0).all())
        return np.searchsorted(self._indices, starts) if starts is not None and is_in_order else None

    def ahead(self, indices: np.ndarray) -> AbstractContextManager[Callable[[int], None]]:
        return self._dataset.ahead(self._indices[indices])


class ClassView(Part):
    """The images of `dataset` whose class is in `classes`, numbered by position in it.

    A name in `classes` that `dataset` lacks has no images.
    """

    def __init__(self, dataset: ImageDataset, classes: Sequence[str]):
        position = {name: target for target, name in enumerate(classes)}
        renumbered = np.array([position.get(name, -1) for name in dataset.classes], dtype=np.int64)
        targets = renumbered[dataset.targets]
        super().__init__(dataset, np.flatnonzero(targets >= 0))
        self.classes, self.targets = list(classes), targets[self._indices]


def evenly_spaced(dataset: ImageDataset, count: int) -> ImageDataset:
    """Return up to `count` images of `dataset`, evenly spaced."""
    if count >= len(dataset):
        return dataset
    return Part(dataset, [k * len(dataset) // count for k in range(count)])


class Numbered(Part):
    """The images of `dataset`, each with its own number as target, so that a loader's batches name their images."""

    def __init__(self, dataset: ImageDataset):
        super().__init__(dataset, range(len(dataset)))
        self.targets = np.arange(len(dataset))


class Joined(ImageDataset):
    """The images of several data sets, whose classes are the same, behind one another.

    starts: the number of the first image of each data set, then that of all images: int64 [data sets + 1].
    """

    def __init__(self, datasets: Sequence[ImageDataset]):
        self._datasets = list(datasets)
        self.starts = np.cumsum([0, *map(len, datasets)])
        super().__init__(datasets[0].classes, np.concatenate([dataset.targets for dataset in datasets]))

    def _find(self, index: int) -> tuple[ImageDataset, int]:
        number = int(np.searchsorted(self.starts, index, side='right')) - 1
        return self._datasets[number], int(index - self.starts[number])

    def read_bytes_or_image(self, index: int) -> bytes | Image.Image:
        dataset, own = self._find(index)
        return dataset.read_bytes_or_image(own)

    def path(self, index: int) -> str:
        dataset, own = self._find(index)
        return dataset.path(own)

    def _names(self) -> Iterable[bytes]:
        return (part for dataset in self._datasets for part in dataset._names())


class PathList(Sequence[str]):
    """A read-only list of paths in one block of memory.

    Worker processes copy a million str objects page by page, because reading them changes their reference counts. Two
    blocks are shared.
    """

    def __init__(self, paths: Sequence[str]):
        encoded = [os.fsencode(path) for path in paths]
        self._ends = np.cumsum([0] + [len(path) for path in encoded])
        self._bytes = b''.join(encoded)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def parts(self) -> tuple[bytes, bytes]:
        """Return where the paths end, int64 [paths + 1], and their bytes."""
        return self._ends.tobytes(), self._bytes

    def __getitem__(self, index):
        return os.fsdecode(self._bytes[self._ends[index]:self._ends[index + 1]])
