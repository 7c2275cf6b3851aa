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
import os
import shutil
import time
import zipfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from data.base import PathList
from data.classes import name_some
from data.decode import ImageError
from data.places import Place
from data.shards.dataset import reader
from data.shards.manifest import MANIFEST, Index, Manifest, Shard, ShardWriter, shard_name
from data.shards.plan import (
    MEASURED,
    SUBSAMPLING,
    Loss,
    Plan,
    Recipe,
    Source,
    _changed,
    check_options,
    prepare,
    unique_keys,
)
from utils.disk import write_whole
from utils.errors import UserError
from utils.parallel import in_processes

_logger = logging.getLogger(__name__)

STATE = '.packing'
PLAN = 'plan.npz'
ENOUGH = 100
"""So many bad images more than allowed end a packing at once: it is not the images that are at fault."""
LOST = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)


# ---------------------------------------------------------------------------------------------------------------------
# One image


# ---------------------------------------------------------------------------------------------------------------------
# The plan


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
                        content = dataset.read_bytes_or_image(index)
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
    manifest = Manifest.read(reader(Place(str(out)), 0), str(out))
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
