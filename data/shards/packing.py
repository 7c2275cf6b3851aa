"""Pack images into shards, in several processes, resumable after an interruption: the work of tools/pack.py.

    images = folder_input('/data/imagenet/train')
    manifest = pack(images, Path('/shards/imagenet/train'), Recipe(short_side=256), jobs=16)

The plan, which says which image goes into which shard under what name, is kept in OUT/.packing until the end. A shard
always gets the same bytes, so complete shards are kept. The manifest is written last; a folder without one is no data
set yet.
"""
import contextlib
import errno
import fcntl
import logging
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from data.base import PathList
from data.classes import name_some
from data.decode import ImageError
from data.places import Place
from data.shards.dataset import reader
from data.shards.manifest import MANIFEST, Index, Manifest, Shard, ShardWriter, shard_name
from data.shards.plan import (
    MEASURED,
    SUBSAMPLING,
    UNREADABLE,
    Loss,
    PackingInput,
    Plan,
    Recipe,
    check_options,
    fingerprint,
    load_arrays,
    other_images_error,
    prepare,
    save_arrays,
    unique_keys,
)
from utils.errors import UserError
from utils.parallel import in_processes

_logger = logging.getLogger(__name__)

STATE = '.packing'
PLAN = 'plan.npz'
# So many bad images more than allowed end a packing at once: then the images are not the problem.
ENOUGH = 100
FULL_DISK = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)


@dataclass
class _PackedShard:
    """A complete shard, kept until the manifest is written."""
    shard: Shard
    index: Index
    left_out: list[list[str]] = field(default_factory=list)
    loss: Loss = field(default_factory=Loss)

    def save(self, path: Path) -> None:
        record = {'shard': asdict(self.shard), 'left_out': self.left_out, 'loss': asdict(self.loss)}
        save_arrays(path, record, **vars(self.index))

    @classmethod
    def load(cls, path: Path, folder: Path) -> '_PackedShard | None':
        """Return None if the shard is missing or incomplete."""
        try:
            record, arrays = load_arrays(path)
            packed = cls(Shard(**record['shard']), Index(**arrays), record['left_out'], Loss(**record['loss']))
            return packed if os.path.getsize(folder / packed.shard.name) == packed.shard.bytes else None
        except UNREADABLE:
            return None


def pack(images: PackingInput, out: Path, recipe: Recipe, *, jobs: int, max_bad_images: int = 0) -> Manifest:
    """Pack `images` into the folder `out`, or continue with it, and return the manifest.

    Raises UserError if there is not enough room, if another process is packing into `out`, or if `out` was packed with
    other options or images. It is raised at the end if more than `max_bad_images` are bad: the shards stay, and the
    same command with a higher number ends at once.
    """
    state = out / STATE
    if (out / MANIFEST).exists():
        manifest = _read_packed(images, out, recipe)
        shutil.rmtree(state, ignore_errors=True)
        return manifest
    with _locked(out):
        plan = Plan.load(state / PLAN)
        if plan:
            plan.check_same(images, recipe, out)
        else:
            if strange := sorted(path.name for path in out.iterdir() if path.name != STATE):
                shutil.rmtree(state)  # leave nothing in a folder of somebody else
                raise UserError(f'{out} holds {name_some(strange)}, and no packing that could go on; '
                                'name an empty folder')
            plan = Plan.make(images, recipe)
        shards = {number: _PackedShard.load(state / f'{number:06d}.npz', out) for number in range(plan.shards())}
        pending = [number for number, shard in shards.items() if shard is None]
        check_room(out, float(sum(plan.estimate[plan.members(number)].sum() for number in pending)))
        with explain_full_disk(out), _without_leftovers(out):
            plan.save(state / PLAN)
            packer = _Packer(images, plan, out, recipe, max_bad_images)
            done = sum(len(plan.members(number)) for number in shards if shards[number])
            bad = sum(len(shard.left_out) for shard in shards.values() if shard)
            work = in_processes(packer, pending, jobs=jobs, total=len(plan.order), done=done, desc=out.name)
            with contextlib.closing(work):
                for number, left_out in work:
                    shards[number] = _PackedShard.load(state / f'{number:06d}.npz', out)
                    if shards[number] is None:
                        raise UserError(f'{out / shard_name(number)} has gone since it was written; '
                                        'the same command goes on')
                    bad += left_out
                    if bad > max_bad_images + ENOUGH:
                        break
            packed = [shard for _, shard in sorted(shards.items()) if shard]
            left_out = sorted(pair for shard in packed for pair in shard.left_out)
            if bad > max_bad_images:
                raise _too_many(images, left_out, max_bad_images)
            manifest = Manifest(plan.classes, [each.shard for each in packed],
                                Index.joined([each.index for each in packed]), images.text,
                                _describe_loss(recipe, packed), left_out, fingerprint(images, recipe))
            manifest.write(out)
        shutil.rmtree(state)
        return manifest


class _Packer:
    """Writes one shard, in a process of its own."""

    def __init__(self, images: PackingInput, plan: Plan, out: Path, recipe: Recipe, max_bad_images: int):
        self.images, self.plan, self.out, self.recipe = images, plan, out, recipe
        self.keys = PathList(unique_keys(plan.names))
        self.enough = max_bad_images + ENOUGH
        self.every = max(1, len(plan.order) // MEASURED)

    def __call__(self, number: int, tick) -> tuple[int, int]:
        """Write shard `number`; return it and how many images were left out of it."""
        loss, left_out, dataset = Loss(), [], self.images.dataset
        with explain_full_disk(self.out):
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
                            raise _too_many(self.images, left_out, self.enough - ENOUGH) from None
                    else:
                        ending = 'jpg' if is_resized else os.path.splitext(name)[1][1:].lower()
                        writer.add(f'{self.keys[index]}.{ending}', content, int(dataset.targets[index]))
                    tick(1, size)
            _PackedShard(writer.shard, writer.index, left_out, loss).save(self.out / STATE / f'{number:06d}.npz')
        return number, len(left_out)


def _describe_loss(recipe: Recipe, packed: list[_PackedShard]) -> dict | None:
    """Return what the manifest says about resized images."""
    if recipe.short_side is None:
        return None
    loss = Loss()
    for shard in packed:
        loss.add(shard.loss)
    return {'short_side': recipe.short_side, 'quality': recipe.quality, 'filter': 'bicubic',
            'subsampling': SUBSAMPLING, 'images': loss.resized, 'bytes_before': loss.bytes_before,
            'bytes_after': loss.bytes_after, 'psnr_images': loss.measured,
            'psnr_db': round(loss.psnr_sum / loss.measured, 2) if loss.measured else None}


def _read_packed(images: PackingInput, out: Path, recipe: Recipe) -> Manifest:
    """Return the manifest in `out`. Raises UserError if it was packed from other images or with other options."""
    manifest = Manifest.read(reader(Place(str(out)), 0), str(out))
    before = manifest.packing
    if not before:
        raise UserError(f'{out} holds shards already, of {manifest.source or "unknown source"!r}; name another folder')
    check_options(before, recipe, out)
    if fingerprint(images, recipe) != before:
        raise other_images_error(out, f'{before.get("images")} then, {len(images.dataset)} now')
    _logger.info('%s: packed already', out)
    return manifest


def _too_many(images: PackingInput, left_out: list, allowed: int) -> UserError:
    reasons = ', '.join(f'{name!r} ({reason.partition(";")[0]})' for name, reason in left_out[:3])
    more = f' and {len(left_out) - 3} more' if len(left_out) > 3 else ''
    return UserError(f'{images.text}: {len(left_out)} bad images, {allowed} allowed: {reasons}{more}; the same command '
                     f'with --max-bad-images {len(left_out)} leaves them out')


def check_room(folder: Path, needed: float) -> None:
    """Raise UserError if the disk has fewer than `needed` bytes free."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(f'{folder}: {needed / 1e9:,.2f} GB are needed and {free / 1e9:,.2f} GB free; make room, or '
                        'name a folder on another disk')


@contextlib.contextmanager
def explain_full_disk(out: Path) -> Iterator[None]:
    """Turn an OSError into a UserError with a remedy."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL_DISK:
            raise UserError(f'{error.filename or out}: {error.strerror or error}; check the disk') from None
        raise UserError(f'{out}: {error.strerror}; what is whole stays: make room, and the same command goes '
                        'on') from None


@contextlib.contextmanager
def _without_leftovers(out: Path) -> Iterator[None]:
    """Remove incomplete shards of an earlier packing, and of this one if processes are killed."""
    try:
        _remove_leftovers(out)
        yield
    finally:
        _remove_leftovers(out)


def _remove_leftovers(out: Path) -> None:
    for leftover in out.glob('.shard-*.tmp'):
        leftover.unlink()


@contextlib.contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Create `out` and keep other processes from packing into it."""
    try:
        (out / STATE).mkdir(parents=True, exist_ok=True)
        file = open(out / STATE / 'lock', 'w')
    except OSError as error:
        raise UserError(f'{out} cannot be written ({error.strerror}); name another folder') from None
    with file:
        for attempt in range(50):  # workers of a killed packing need a moment to end
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                if attempt == 49:
                    raise UserError(f'{out} is being packed by another process; wait for it, or name another '
                                    'folder') from None
                time.sleep(0.1)
        yield
