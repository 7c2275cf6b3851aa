"""Packs images into shards, in processes, so that whoever is interrupted goes on: the work of tools/pack.py.

    source = folder_source('/data/imagenet/train')
    manifest = pack(source, Path('/shards/imagenet/train'), Recipe(short_side=256), jobs=16)

What is to be done is planned first and kept in OUT/.packing until it is: which image goes into which shard, under what
name. A shard is the same to the byte whoever writes it and when, so that those that are whole are kept. The manifest is
written last; a folder without one is no data set yet.
"""
import contextlib
import errno
import fcntl
import io
import json
import logging
import math
import os
import re
import shutil
import time
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from data.base import PathList
from data.classes import name_some
from data.decode import ImageError, decode_rgb, jpeg_size
from data.folders import ImageFolder
from data.shards.dataset import reader
from data.shards.ilsvrc import Archive
from data.shards.manifest import CONTROL, MANIFEST, Index, Manifest, Shard, ShardWriter, member_key, sha256, shard_name
from data.shards.tar import BLOCK
from utils.console import progress_bar
from utils.disk import write_whole
from utils.errors import UserError
from utils.parallel import in_processes

_logger = logging.getLogger(__name__)

STATE = '.packing'
PLAN = 'plan.npz'
MEASURED = 200
"""Images, at least, whose loss by resizing and saving is measured, evenly spread over those that are packed."""
ENOUGH = 100
"""So many bad images more than allowed end a packing at once: it is not the images that are at fault."""
SUBSAMPLING = '4:2:0'
"""Half the resolution for colours, as nearly all JPEG files have. On photographs at 256 pixels and quality 95 it takes
22 % fewer bytes and 30 % less time to decode than 4:4:4, for 38 in place of 41 dB."""
JPEG_EDGE = 65_500
"""Pixels; libjpeg writes no longer edges."""
LOST = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)


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


# ---------------------------------------------------------------------------------------------------------------------
# One image


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


# ---------------------------------------------------------------------------------------------------------------------
# The plan


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
            content = source.dataset.stored(int(index))
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


# ---------------------------------------------------------------------------------------------------------------------
# Packing


@dataclass
class _Part:
    """A whole shard, as it is remembered until the manifest is written."""
    shard: Shard
    index: Index
    left_out: list[list[str]] = field(default_factory=list)
    loss: Loss = field(default_factory=Loss)

    def save(self, path: Path) -> None:
        buffer = io.BytesIO()
        record = {'shard': asdict(self.shard), 'left_out': self.left_out, 'loss': asdict(self.loss)}
        np.savez(buffer, **vars(self.index), record=np.array(json.dumps(record)))
        write_whole(path, buffer.getvalue())

    @classmethod
    def load(cls, path: Path, folder: Path) -> '_Part | None':
        """None if the shard is not there as a whole."""
        try:
            with np.load(path, allow_pickle=False) as file:
                record = json.loads(str(file['record']))
                index = Index(*(file[name] for name in ('offset', 'size', 'target', 'name_ends', 'names')))
            part = cls(Shard(**record['shard']), index, record['left_out'], Loss(**record['loss']))
            return part if os.path.getsize(folder / part.shard.name) == part.shard.bytes else None
        except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile):
            return None


def pack(source: Source, out: Path, recipe: Recipe, *, jobs: int, max_bad_images: int = 0) -> Manifest:
    """Packs `source` into the folder `out`, or goes on with it, and returns the manifest of what is then there.

    Raises UserError if there is not enough room; if `out` is being packed by somebody else, or was with other options
    or images; and, at the end, if more than `max_bad_images` cannot be used: the shards stay, and the same command with
    a higher number is done at once.
    """
    state = out / STATE
    if (out / MANIFEST).exists():
        manifest = _packed_already(source, out, recipe)
        shutil.rmtree(state, ignore_errors=True)
        return manifest
    with _locked(out):
        plan = Plan.load(state / PLAN)
        if plan:
            plan.check_same(source, recipe, out)
        else:
            if strange := sorted(path.name for path in out.iterdir() if path.name != STATE):
                shutil.rmtree(state)  # whoever owns the folder finds nothing of ours in it
                raise UserError(f'{out} holds {name_some(strange)}, and no packing that could go on; '
                                'name an empty folder')
            plan = Plan.make(source, recipe)
        parts = {number: _Part.load(state / f'{number:06d}.npz', out) for number in range(plan.shards())}
        pending = [number for number, part in parts.items() if part is None]
        _check_room(out, float(sum(plan.estimate[plan.members(number)].sum() for number in pending)))
        with _full_disk_explained(out), _tidied(out):
            plan.save(state / PLAN)
            packer = _Packer(source, plan, out, recipe, max_bad_images)
            done = sum(len(plan.members(number)) for number in parts if parts[number])
            bad = sum(len(part.left_out) for part in parts.values() if part)
            work = in_processes(packer, pending, jobs=jobs, total=len(plan.order), done=done, desc=out.name)
            with contextlib.closing(work):
                for number, left_out in work:
                    parts[number] = _Part.load(state / f'{number:06d}.npz', out)
                    if parts[number] is None:
                        raise UserError(f'{out / shard_name(number)} has gone since it was written; '
                                        'the same command goes on')
                    bad += left_out
                    if bad > max_bad_images + ENOUGH:
                        break
            left_out = sorted(pair for part in parts.values() if part for pair in part.left_out)
            if bad > max_bad_images:
                raise _too_many(source, left_out, max_bad_images)
            manifest = _manifest_of(source, plan, recipe, [part for _, part in sorted(parts.items()) if part], left_out)
            manifest.write(out)
        shutil.rmtree(state)
        return manifest


class _Packer:
    """Writes one shard, in a process of its own."""

    def __init__(self, source: Source, plan: Plan, out: Path, recipe: Recipe, max_bad_images: int):
        self.source, self.plan, self.out, self.recipe = source, plan, out, recipe
        self.keys = PathList(unique_keys(plan.names))
        self.enough = max_bad_images + ENOUGH
        self.every = max(1, len(plan.order) // MEASURED)

    def __call__(self, number: int, tick) -> tuple[int, int]:
        """Writes shard `number`; returns it and how many images were left out of it."""
        loss, left_out, dataset = Loss(), [], self.source.dataset
        with _full_disk_explained(self.out):
            with ShardWriter(self.out, number) as writer:
                for index in map(int, self.plan.members(number)):
                    name, path, size = self.plan.names[index], dataset.path(index), 0
                    try:
                        content = dataset.stored(index)
                        size = len(content)
                        content, is_resized = prepare(content, path, self.recipe, loss, measure=index % self.every == 0)
                    except ImageError as error:
                        left_out.append([name, str(error).removeprefix(f'image {path}: ')])
                        if len(left_out) > self.enough:
                            raise _too_many(self.source, left_out, self.enough - ENOUGH) from None
                    else:
                        ending = 'jpg' if is_resized else os.path.splitext(name)[1][1:].lower()
                        writer.add(f'{self.keys[index]}.{ending}', content, int(dataset.targets[index]))
                    tick(1, size)
            _Part(writer.shard, writer.index, left_out, loss).save(self.out / STATE / f'{number:06d}.npz')
        return number, len(left_out)


def _manifest_of(source: Source, plan: Plan, recipe: Recipe, parts: list[_Part], left_out: list) -> Manifest:
    transcoded = None
    if recipe.short_side is not None:
        loss = Loss()
        for part in parts:
            loss.add(part.loss)
        transcoded = {'short_side': recipe.short_side, 'quality': recipe.quality, 'filter': 'bicubic',
                      'subsampling': SUBSAMPLING, 'images': loss.resized, 'bytes_before': loss.bytes_before,
                      'bytes_after': loss.bytes_after, 'psnr_images': loss.measured,
                      'psnr_db': round(loss.psnr_sum / loss.measured, 2) if loss.measured else None}
    return Manifest(plan.classes, [part.shard for part in parts], Index.joined([part.index for part in parts]),
                    source.text, transcoded, left_out, plan.fingerprint())


def _packed_already(source: Source, out: Path, recipe: Recipe) -> Manifest:
    """The manifest of `out`. Raises UserError if it is of other images or options."""
    manifest = Manifest.read(reader(str(out), 0), str(out))
    before = manifest.packing
    if not before:
        raise UserError(f'{out} holds shards already, of {manifest.source or "unknown source"!r}; name another folder')
    check_options(before, recipe, out)
    plan = Plan(source, recipe, source.size, np.arange(len(source.dataset)), 1)
    if plan.fingerprint() != before:
        raise _changed(out, f'{before.get("images")} then, {len(source.dataset)} now')
    _logger.info('%s: packed already', out)
    return manifest


def _too_many(source: Source, left_out: list, allowed: int) -> UserError:
    reasons = ', '.join(f'{name!r} ({reason.partition(";")[0]})' for name, reason in left_out[:3])
    more = f' and {len(left_out) - 3} more' if len(left_out) > 3 else ''
    return UserError(f'{source.text}: {len(left_out)} bad images, {allowed} allowed: {reasons}{more}; the same command '
                     f'with --max-bad-images {len(left_out)} leaves them out')


def _check_room(folder: Path, needed: float) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(f'{folder}: {needed / 1e9:,.2f} GB are needed and {free / 1e9:,.2f} GB free; make room, or '
                        'name a folder on another disk')


@contextlib.contextmanager
def _full_disk_explained(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in LOST:
            raise UserError(f'{error.filename or out}: {error.strerror or error}; check the disk') from None
        raise UserError(f'{out}: {error.strerror}; what is whole stays: make room, and the same command goes '
                        'on') from None


@contextlib.contextmanager
def _tidied(out: Path) -> Iterator[None]:
    """Removes shards that were not completed, of an earlier packing and, if processes are ended, of this one."""
    try:
        for leftover in out.glob('.shard-*.tmp'):
            leftover.unlink()
        yield
    finally:
        for leftover in out.glob('.shard-*.tmp'):
            leftover.unlink()


@contextlib.contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Makes `out` and keeps others from packing into it."""
    try:
        (out / STATE).mkdir(parents=True, exist_ok=True)
        file = open(out / STATE / 'lock', 'w')
    except OSError as error:
        raise UserError(f'{out} cannot be written ({error.strerror}); name another folder') from None
    with file:
        for attempt in range(50):  # the processes of one that was killed need a moment to notice
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                if attempt == 49:
                    raise UserError(f'{out} is being packed by another process; wait for it, or name another '
                                    'folder') from None
                time.sleep(0.1)
        yield


# ---------------------------------------------------------------------------------------------------------------------
# Folders


CHUNK = 500
"""Files that one process writes before it takes the next ones."""


def unpack(source: Source, out: Path, *, jobs: int) -> int:
    """Writes the images of `source` as files into class folders in `out`; returns how many there are.

    They come into a hidden folder beside it, which is renamed when all are there; started again, it goes on.
    Raises UserError if `out` is there without all of them, or if there is not enough room.
    """
    if out.exists():
        if not all(_is_whole(out / name, size) for name, size in zip(source.names, source.size, strict=True)):
            raise UserError(f'{out} is there already, without all of the images; name another folder, or remove it')
        _logger.info('%s: unpacked already', out)
        return len(source.dataset)
    partial = out.with_name(f'.{out.name}.partial')
    with _full_disk_explained(out):
        for name in source.dataset.classes:
            (partial / name).mkdir(parents=True, exist_ok=True)
        written = sum(entry.stat().st_size for name in source.dataset.classes for entry in os.scandir(partial / name))
        _check_room(partial, float(source.size.sum() - written))
        chunks = [range(first, min(first + CHUNK, len(source.dataset)))
                  for first in range(0, len(source.dataset), CHUNK)]
        for _ in in_processes(_Unpacker(source, partial), chunks, jobs=jobs, total=len(source.dataset), desc=out.name):
            pass
        os.sync()
        partial.rename(out)
    return len(source.dataset)


def _is_whole(path: Path, size: int) -> bool:
    return path.exists() and path.stat().st_size == size


class _Unpacker:
    def __init__(self, source: Source, folder: Path):
        self.source, self.folder = source, folder

    def __call__(self, chunk: range, tick) -> None:
        with _full_disk_explained(self.folder):
            for index in chunk:
                path = self.folder / self.source.names[index]
                size = int(self.source.size[index])
                if not _is_whole(path, size):
                    temporary = path.with_name(f'.{path.name}.tmp')
                    try:
                        temporary.write_bytes(self.source.dataset.stored(index))
                        temporary.replace(path)
                    finally:
                        temporary.unlink(missing_ok=True)
                tick(1, size)
