"""What is packed and how: the images, the recipe for them, and the plan of the shards."""
import contextlib
import io
import json
import math
import os
import re
import zipfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data.base import PathList
from data.classes import name_some
from data.decode import ImageError, decode_rgb, jpeg_size
from data.folders import ImageFolder
from data.shards.ilsvrc import Archive
from data.shards.manifest import CONTROL, member_key, sha256
from data.shards.tar import BLOCK
from utils.console import progress_bar
from utils.disk import write_whole
from utils.errors import UserError

# The loss by resizing is measured for at least so many images, evenly spaced.
MEASURED = 200
# Half the resolution for colours, as in nearly all JPEG files. On photographs at 256 pixels and quality 95 it takes
# 22 % fewer bytes and 30 % less time to decode than 4:4:4, at 38 instead of 41 dB.
SUBSAMPLING = '4:2:0'
# Pixels; libjpeg writes no longer edges.
JPEG_EDGE = 65_500
# What reading a damaged or missing .npz file raises.
UNREADABLE = (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile)
# The option for each field of a Recipe.
OPTIONS = {'short_side': '--short-side', 'quality': '--quality', 'shard_bytes': '--shard-size', 'samples': '--samples',
           'seed': '--seed', 'decode': '--decode'}


@dataclass(frozen=True)
class Recipe:
    """How images become shards; equal images and an equal Recipe give equal bytes.

    short_side: pixels; larger images are resized to it and saved as JPEG with `quality`. None: no image is resized.
    shard_bytes: approximate size of a shard. samples: exact number of images in a shard, instead.
    seed: of the order. decode: decode every image completely, not only its header.
    """
    short_side: int | None = None
    quality: int = 95
    shard_bytes: int = 256_000_000
    samples: int | None = None
    seed: int = 0
    decode: bool = False


@dataclass
class PackingInput:
    """Images to pack. names: paths in the split. size: int64 [N], bytes. changed: int64 [N], modification times in ns.

    text: what the manifest calls them.
    """
    dataset: ImageFolder | Archive
    names: Sequence[str]
    size: np.ndarray
    changed: np.ndarray
    text: str


def folder_input(folder: str) -> PackingInput:
    """Return the images of class folders. Raises UserError as `ImageFolder`, and for names not allowed in manifests."""
    dataset = ImageFolder(folder)
    if unprintable := [name for name in dataset.classes if CONTROL.search(name)]:
        raise UserError(f'{folder}: {name_some(unprintable)}: control characters in the name of a class; rename it')
    skipped = len(os.path.join(folder, ''))
    stats = np.zeros((len(dataset), 2), np.int64)
    with progress_bar(total=len(dataset), unit='file', desc='sizes') as bar:
        for index in range(len(dataset)):
            with contextlib.suppress(OSError):  # a broken link is a bad image, found when it is read
                stat = os.stat(dataset.path(index))
                stats[index] = stat.st_size, stat.st_mtime_ns
            bar.update()
    names = PathList([dataset.path(index)[skipped:] for index in range(len(dataset))])
    text = f'folder {os.path.basename(os.path.abspath(folder))}'
    return PackingInput(dataset, names, stats[:, 0], stats[:, 1], text)


def archive_input(archive: Archive) -> PackingInput:
    changed = os.stat(archive.archive).st_mtime_ns
    return PackingInput(archive, archive.names, archive.size, np.full(len(archive), changed),
                        f'archive {os.path.basename(archive.archive)}')


@dataclass
class Loss:
    """What resizing costs: bytes of the resized images before and after, and the PSNR of JPEG in dB, summed over
    `measured` of them."""
    resized: int = 0
    bytes_before: int = 0
    bytes_after: int = 0
    measured: int = 0
    psnr_sum: float = 0.0

    def add(self, other: 'Loss') -> None:
        for name, value in asdict(other).items():
            setattr(self, name, getattr(self, name) + value)


def prepare(content: bytes, name: str, recipe: Recipe, loss: Loss, *, measure: bool = False) -> tuple[bytes, bool]:
    """Return the bytes to pack for an image file, and whether it was resized. Raises ImageError for a bad image.

    Files are copied unchanged unless the image's shorter side is above `recipe.short_side`. Larger images are decoded
    as in data/decode.py, resized once (bicubic, antialiased), and saved as JPEG without metadata, if its longest edge
    allows it.
    """
    size = jpeg_size(content)  # None if only decoding can tell whether it is good
    side = recipe.short_side
    if size is not None and (side is None or min(size) <= side) and not recipe.decode:
        return content, False
    image = decode_rgb(content, name)
    if side is None or min(image.size) <= side or side * max(image.size) > JPEG_EDGE * min(image.size):
        return content, False
    width, height = image.size
    shorter = min(width, height)
    image = image.resize((side * width // shorter, side * height // shorter), Image.Resampling.BICUBIC)
    image.info.clear()  # else a comment of the original is saved, too
    buffer = io.BytesIO()
    image.save(buffer, 'JPEG', quality=recipe.quality, subsampling=SUBSAMPLING)
    saved = buffer.getvalue()
    loss.add(Loss(1, len(content), len(saved)))
    if measure:
        difference = np.asarray(image, np.float32) - np.asarray(decode_rgb(saved, name), np.float32)
        loss.add(Loss(measured=1, psnr_sum=10 * math.log10(255 ** 2 / max(1e-3, float(np.square(difference).mean())))))
    return saved, True


@dataclass
class Plan:
    """The order of the images, how many go into a shard, and what the images were when the plan was made.

    names: paths. size, changed: as of a PackingInput. order: int64 [N]. estimate: float64 [N], bytes that each image
    will take in a shard. options: the Recipe as a dict. classes: names. samples: per shard.
    """
    names: Sequence[str]
    size: np.ndarray
    changed: np.ndarray
    order: np.ndarray
    estimate: np.ndarray
    options: dict
    classes: list[str]
    samples: int

    @classmethod
    def make(cls, images: PackingInput, recipe: Recipe) -> 'Plan':
        count = len(images.dataset)
        order = np.random.default_rng(recipe.seed).permutation(count)
        size = images.size.astype(np.float64)
        if recipe.short_side is not None:
            size *= _trial_ratio(images, recipe)
        estimate = np.ceil(size / BLOCK) * BLOCK + 3 * BLOCK  # two headers, and a block for the class
        shards = max(1, round(estimate.sum() / recipe.shard_bytes))
        return cls(images.names, images.size, images.changed, order, estimate, asdict(recipe), images.dataset.classes,
                   recipe.samples or math.ceil(count / shards))

    def shards(self) -> int:
        return math.ceil(len(self.order) / self.samples)

    def members(self, shard: int) -> np.ndarray:
        """Return the images of a shard, in its order."""
        return self.order[shard * self.samples:(shard + 1) * self.samples]

    def save(self, path: Path) -> None:
        names = np.frombuffer(b'\0'.join(os.fsencode(name) for name in self.names), np.uint8)
        record = {'options': self.options, 'classes': self.classes, 'samples': self.samples}
        save_arrays(path, record, names=names,
                    size=self.size, changed=self.changed, order=self.order, estimate=self.estimate)

    @classmethod
    def load(cls, path: Path) -> 'Plan | None':
        """Return the plan of an interrupted packing, or None if there is none or it is unreadable."""
        try:
            record, arrays = load_arrays(path)
            names = PathList([os.fsdecode(name) for name in arrays['names'].tobytes().split(b'\0')])
            fields: dict[str, Any] = {**record, **arrays, 'names': names}
            return cls(**fields)
        except UNREADABLE:
            return None

    def check_same(self, now: PackingInput, recipe: Recipe, out: Path) -> None:
        """Raise UserError with what differs between this plan and what is to be packed now."""
        check_options(self.options, recipe, out)
        if self.classes != now.dataset.classes:
            differing = sorted(set(self.classes) ^ set(now.dataset.classes)) or self.classes
            raise other_images_error(out, f'classes: {name_some(differing)}')
        before, after = list(self.names), list(now.names)
        if before != after:
            gone, new = sorted(set(before) - set(after)), sorted(set(after) - set(before))
            raise other_images_error(out, ' and '.join(
                f'{what}: {name_some(names, 2)}' for what, names in (('gone', gone), ('new', new)) if names))
        differs = (self.size != now.size) | (self.changed != now.changed)
        if differs.any():
            changed = [before[index] for index in np.flatnonzero(differs)]
            raise other_images_error(out, f'changed: {name_some(changed, 2)}')


def fingerprint(images: PackingInput, recipe: Recipe) -> dict:
    """Return what the manifest keeps of a packing, so that the same command finds that it is done."""
    digest = sha256(json.dumps([images.dataset.classes, list(images.names)]).encode() + images.size.tobytes())
    return {**asdict(recipe), 'images': len(images.dataset), 'sha256': digest}


def save_arrays(path: Path, record: dict, **arrays: np.ndarray) -> None:
    """Write arrays and a JSON record into a .npz file, atomically."""
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, record=np.array(json.dumps(record)), **arrays)
    write_whole(path, buffer.getvalue())


def load_arrays(path: Path) -> tuple[dict, dict[str, np.ndarray]]:
    """Return record and arrays that `save_arrays` wrote. Raises one of UNREADABLE."""
    with np.load(path, allow_pickle=False) as file:
        arrays = dict(file)
    return json.loads(str(arrays.pop('record'))), arrays


def check_options(before: dict, recipe: Recipe, out: Path) -> None:
    """Raise UserError if `out` was packed, or begun, with other options."""
    for name, value in asdict(recipe).items():
        if before.get(name) != value:
            raise UserError(f'{out} was begun {_option(name, before.get(name))}, and is now to go on '
                            f'{_option(name, value)}; give the same options, or begin anew in another folder')


def _option(name: str, value: int | bool | None) -> str:
    if value is None or isinstance(value, bool):
        return f'{"with" if value else "without"} {OPTIONS[name]}'
    return f'with {OPTIONS[name]} {value / 1e6 if name == "shard_bytes" else value:g}'


def other_images_error(out: Path, what: str) -> UserError:
    return UserError(f'{out} was begun with other images ({what}); restore them, or begin anew in another folder')


def _trial_ratio(images: PackingInput, recipe: Recipe) -> float:
    """Return bytes after resizing by bytes before, measured on some images; bad ones are found later."""
    before = after = 1
    for index in np.linspace(0, len(images.dataset) - 1, 64).astype(int):
        with contextlib.suppress(ImageError):
            content = images.dataset.read_bytes_or_image(int(index))
            before += len(content)
            after += len(prepare(content, '', recipe, Loss())[0])
    return after / before


def unique_keys(names: Sequence[str]) -> list[str]:
    """Return the key of each image by its path: its `member_key`, with a number if several are the same."""
    seen, keys = set(), []
    for name in names:
        plain = re.sub(r'[\\\x00-\x1f\x7f]', '_', member_key(name))
        key, number = plain, 1
        while key in seen:
            number += 1
            key = f'{plain}_{number}'
        seen.add(key)
        keys.append(key)
    return keys
