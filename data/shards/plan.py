"""What is packed and how: sources, the recipe for images, and the plan of shards."""
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

MEASURED = 200
"""Images, at least, whose loss by resizing and saving is measured, evenly spread over those that are packed."""
SUBSAMPLING = '4:2:0'
"""Half the resolution for colours, as nearly all JPEG files have. On photographs at 256 pixels and quality 95 it takes
22 % fewer bytes and 30 % less time to decode than 4:4:4, for 38 in place of 41 dB."""
JPEG_EDGE = 65_500
"""Pixels; libjpeg writes no longer edges."""


@dataclass(frozen=True)
class Recipe:
    """How images become shards; equal images and an equal Recipe give equal bytes.

    short_side: pixels; images with a longer one are resized to it and saved as JPEG with `quality`. None: none are.
    shard_bytes: about so many in a shard; samples: or exactly so many samples.
    seed: of the order. decode: every image is decoded, not only its header read, before it is taken.
    """
    short_side: int | None = None
    quality: int = 95
    shard_bytes: int = 256_000_000
    samples: int | None = None
    seed: int = 0
    decode: bool = False


@dataclass
class Source:
    """Images to be packed. names: paths within the split. size: int64 [N], bytes of each; changed: its time, in ns."""
    dataset: ImageFolder | Archive
    names: Sequence[str]
    size: np.ndarray
    changed: np.ndarray
    text: str


def folder_source(folder: str) -> Source:
    """The images of class folders. Raises UserError as `ImageFolder`, and for names that no manifest takes."""
    dataset = ImageFolder(folder)
    if unprintable := [name for name in dataset.classes if CONTROL.search(name)]:
        raise UserError(f'{folder}: {name_some(unprintable)}: control characters in the name of a class; rename it')
    skipped = len(os.path.join(folder, ''))
    stats = np.zeros((len(dataset), 2), np.int64)
    with progress_bar(total=len(dataset), unit='file', desc='sizes') as bar:
        for index in range(len(dataset)):
            with contextlib.suppress(OSError):  # a link to nowhere is a bad image, found when it is read
                stat = os.stat(dataset.path(index))
                stats[index] = stat.st_size, stat.st_mtime_ns
            bar.update()
    names = PathList([dataset.path(index)[skipped:] for index in range(len(dataset))])
    return Source(dataset, names, stats[:, 0], stats[:, 1], f'folder {os.path.basename(os.path.abspath(folder))}')


def archive_source(archive: Archive) -> Source:
    changed = os.stat(archive.archive).st_mtime_ns
    return Source(archive, archive.names, archive.size, np.full(len(archive), changed),
                  f'archive {os.path.basename(archive.archive)}')


@dataclass
class Loss:
    """What resizing costs: bytes of the images that were resized, before and after; PSNR in dB, summed over `measured`
    of them, against the resized image before it was saved."""
    resized: int = 0
    bytes_before: int = 0
    bytes_after: int = 0
    measured: int = 0
    psnr_sum: float = 0.0

    def add(self, other: 'Loss') -> None:
        for name, value in asdict(other).items():
            setattr(self, name, getattr(self, name) + value)


def prepare(content: bytes, name: str, recipe: Recipe, loss: Loss, *, measure: bool = False) -> tuple[bytes, bool]:
    """The bytes to be packed for an image file's, and whether they are others. Raises ImageError for a bad image.

    Files are copied as they are, unless the image's shorter side is above `recipe.short_side`: these are decoded by the
    rules of data/decode.py, resized once (bicubic, antialiased), and saved as JPEG without anything but pixels, if it
    has room for the longer side.
    """
    size = jpeg_size(content)  # None where only decoding can tell whether it is good
    side = recipe.short_side
    if size is not None and (side is None or min(size) <= side) and not recipe.decode:
        return content, False
    image = decode_rgb(content, name)
    if side is None or min(image.size) <= side or side * max(image.size) > JPEG_EDGE * min(image.size):
        return content, False
    width, height = image.size
    shorter = min(width, height)
    image = image.resize((side * width // shorter, side * height // shorter), Image.Resampling.BICUBIC)
    image.info.clear()  # a comment of the original would be saved too
    buffer = io.BytesIO()
    image.save(buffer, 'JPEG', quality=recipe.quality, subsampling=SUBSAMPLING)
    saved = buffer.getvalue()
    loss.add(Loss(1, len(content), len(saved)))
    if measure:
        difference = np.asarray(image, np.float32) - np.asarray(decode_rgb(saved, name), np.float32)
        loss.add(Loss(measured=1, psnr_sum=10 * math.log10(255 ** 2 / max(1e-3, float(np.square(difference).mean())))))
    return saved, True


class Plan:
    """What a packing does: the order of the images, how many go into a shard, and what they were when it was made.

    names: PathList. order: int64 [N]. samples: per shard. estimate: float64 [N], bytes that each will take in a shard.
    options: the Recipe as a dict. classes: names.
    """

    def __init__(self, source: Source, recipe: Recipe, estimate: np.ndarray, order: np.ndarray, samples: int):
        self.names, self.size, self.changed = source.names, source.size, source.changed
        self.classes, self.options = source.dataset.classes, asdict(recipe)
        self.order, self.samples, self.estimate = order, samples, estimate

    @classmethod
    def make(cls, source: Source, recipe: Recipe) -> 'Plan':
        count = len(source.dataset)
        order = np.random.default_rng(recipe.seed).permutation(count)
        image = source.size.astype(np.float64)
        if recipe.short_side is not None:
            image = image * _trial_ratio(source, recipe)
        estimate = np.ceil(image / BLOCK) * BLOCK + 3 * BLOCK  # two headers, and a block for the class
        shards = max(1, round(estimate.sum() / recipe.shard_bytes))
        return cls(source, recipe, estimate, order, recipe.samples or math.ceil(count / shards))

    def shards(self) -> int:
        return math.ceil(len(self.order) / self.samples)

    def members(self, shard: int) -> np.ndarray:
        """The images of a shard, in its order."""
        return self.order[shard * self.samples:(shard + 1) * self.samples]

    def fingerprint(self) -> dict:
        """What the manifest keeps of it, so that the same command says that it has been done."""
        digest = sha256(json.dumps([self.classes, list(self.names)]).encode() + self.size.tobytes())
        return {**self.options, 'images': len(self.order), 'sha256': digest}

    def save(self, path: Path) -> None:
        buffer = io.BytesIO()
        names = [os.fsencode(name) for name in self.names]
        np.savez(buffer, names=np.frombuffer(b'\0'.join(names), np.uint8), size=self.size, changed=self.changed,
                 order=self.order, estimate=self.estimate,
                 record=np.array(json.dumps({'options': self.options, 'classes': self.classes,
                                             'samples': self.samples})))
        write_whole(path, buffer.getvalue())

    @classmethod
    def load(cls, path: Path) -> 'Plan | None':
        """The plan of a packing that was begun; None where there is none, or it cannot be read."""
        try:
            with np.load(path, allow_pickle=False) as file:
                record = json.loads(str(file['record']))
                plan = cls.__new__(cls)
                plan.names = PathList([os.fsdecode(name) for name in file['names'].tobytes().split(b'\0')])
                plan.size, plan.changed, plan.order, plan.estimate = (
                    file[name] for name in ('size', 'changed', 'order', 'estimate'))
                plan.options, plan.classes, plan.samples = (record[name] for name in ('options', 'classes', 'samples'))
                return plan
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            return None

    def check_same(self, now: Source, recipe: Recipe, out: Path) -> None:
        """Raises UserError naming what differs between this plan and what is to be packed now."""
        check_options(self.options, recipe, out)
        if self.classes != now.dataset.classes:
            differing = sorted(set(self.classes) ^ set(now.dataset.classes)) or self.classes
            raise _changed(out, f'classes: {name_some(differing)}')
        before, after = list(self.names), list(now.names)
        if before != after:
            gone, new = sorted(set(before) - set(after)), sorted(set(after) - set(before))
            raise _changed(out, ' and '.join(part for part in (f'gone: {name_some(gone, 2)}' if gone else '',
                                                               f'new: {name_some(new, 2)}' if new else '') if part))
        differs = (self.size != now.size) | (self.changed != now.changed)
        if differs.any():
            raise _changed(out, 'changed: ' + name_some([before[index] for index in np.flatnonzero(differs)], 2))


OPTIONS = {'short_side': '--short-side', 'quality': '--quality', 'shard_bytes': '--shard-size', 'samples': '--samples',
           'seed': '--seed', 'decode': '--decode'}


def check_options(before: dict, recipe: Recipe, out: Path) -> None:
    """Raises UserError if `out` was packed, or begun, with other options."""
    for name, value in asdict(recipe).items():
        if before.get(name) != value:
            raise UserError(f'{out} was begun {_option(name, before.get(name))}, and is now to go on '
                            f'{_option(name, value)}; give the same options, or begin anew in another folder')


def _option(name: str, value: int | bool | None) -> str:
    if value is None or isinstance(value, bool):
        return f'{"with" if value else "without"} {OPTIONS[name]}'
    return f'with {OPTIONS[name]} {value / 1e6 if name == "shard_bytes" else value:g}'


def _changed(out: Path, what: str) -> UserError:
    return UserError(f'{out} was begun with other images ({what}); restore them, or begin anew in another folder')


def _trial_ratio(source: Source, recipe: Recipe) -> float:
    """Bytes after by bytes before, of some images; bad ones are found later."""
    before = after = 1
    for index in np.linspace(0, len(source.dataset) - 1, 64).astype(int):
        with contextlib.suppress(ImageError):
            content = source.dataset.read_bytes_or_image(int(index))
            before += len(content)
            after += len(prepare(content, '', recipe, Loss())[0])
    return after / before


def unique_keys(names: Sequence[str]) -> list[str]:
    """The key of each image by its path: as `member_key`, numbered where several would be the same."""
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
