"""Checkpoint files: where they are, how they come to be whole, and which one is the latest. Knows dicts, never models.

A run's folder holds

    checkpoint-00001234.pth.tar    the newest few, by optimizer step
    last.pth.tar                   the newest of them
    model_best.pth.tar             the one with the best metric
    .lock                          who writes here

A file appears under its name only when it is whole and on the disk, and `last.pth.tar` points to it only after that.
Every file ends in its own checksum (utils.checkpoint_reader.verify_checksum). A run goes on from the newest file
that fits its checksum.
"""
import contextlib
import hashlib
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch

from utils.checkpoint_reader import read_checkpoint, seal, verify_checksum
from utils.disk import sync_folder
from utils.errors import UserError
from utils.faults import fault_point

_logger = logging.getLogger(__name__)

LAST = 'last.pth.tar'
BEST = 'model_best.pth.tar'
LOCK = '.lock'
NUMBERED = 'checkpoint-*.pth.tar'
TEMPORARY = '.*.pth.tar.tmp'
# Added to the name of a checkpoint of a later point than the one from which its run went on.
ASIDE = '.aside'
# A file that turns out to be damaged must have another beside it.
KEEP_AT_LEAST = 2
# Where tests break a save, in the order in which it passes them; `removing` once for every file to remove.
SAVE_POINTS = ('save.started', 'save.opened', 'save.half', 'save.written', 'save.synced', 'save.linked_best',
               'save.renamed', 'save.shown', 'save.linked_last', 'save.removing', 'save.removed')


# --- One file --------------------------------------------------------------------------------------------------------

class _SealedFile:
    """What torch.save writes to: passes everything on to `file`, and at last the checksum of it.

    Hashing on the way costs less than reading the file again, and sees what was meant, not what the disk made of it.
    """

    def __init__(self, file, expected_bytes: int):
        self._file, self._half = file, expected_bytes // 2
        self._digest = hashlib.sha256()
        self._kept = b''  # the last two bytes, which the length of the checksum replaces
        self._count = 0
        self.error: OSError | None = None  # the OSError that torch makes a RuntimeError of

    def write(self, data) -> int:
        try:
            self._write(memoryview(data))
        except OSError as e:
            self.error = e
            raise
        return len(data)

    def _write(self, data: memoryview) -> None:
        if len(data) < 2:
            data = memoryview(self._kept + bytes(data))
        else:
            self._pass_on(self._kept)
        self._pass_on(data[:-2])
        self._kept = bytes(data[-2:])

    def _pass_on(self, data) -> None:
        before, self._count = self._count, self._count + len(data)
        if before <= self._half < self._count:
            cut = self._half - before
            self._file.write(data[:cut])
            self._digest.update(data[:cut])
            self._file.flush()
            fault_point('save.half')
            data = data[cut:]
        self._file.write(data)
        self._digest.update(data)

    def flush(self) -> None:
        self._file.flush()

    def finish(self) -> None:
        assert self._kept == b'\0\0', 'torch.save writes a zip archive without a comment'
        self._file.write(seal(self._digest.hexdigest()))
        self._file.flush()


@contextlib.contextmanager
def _written(content: dict, path: Path) -> Iterator[Path]:
    """A temporary file beside `path` with all of `content`, on the disk; gone at the end, unless it was renamed."""
    temporary = _temporary(path)
    try:
        # Not buffered: the parts are large, and no byte that a full disk refused is left to be written at the closing.
        with open(temporary, 'wb', buffering=0) as raw:
            fault_point('save.opened')
            file = _SealedFile(_WholeWrites(raw), _count_bytes(content))
            try:
                torch.save(content, file)  # type: ignore[arg-type]  # of a file it needs `write` and `flush` alone
            except RuntimeError:
                # torch says where in its writer it failed; the file system has said why.
                if file.error:
                    raise file.error from None
                raise
            file.finish()
            fault_point('save.written')
            os.fsync(raw.fileno())
        fault_point('save.synced')
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


class _WholeWrites:
    """A raw file whose `write` writes everything or raises OSError; the system may take less at a time."""

    def __init__(self, raw):
        self._raw = raw

    def write(self, data) -> None:
        data = memoryview(data)
        while data:
            data = data[self._raw.write(data):]

    def flush(self) -> None:
        pass


def _temporary(path: Path) -> Path:
    return path.with_name(f'.{path.name}.tmp')


def _count_bytes(value) -> int:
    """Bytes of all tensors in `value`."""
    if isinstance(value, torch.Tensor):
        return value.nbytes
    if isinstance(value, dict):
        return sum(map(_count_bytes, value.values()))
    return sum(map(_count_bytes, value)) if isinstance(value, list | tuple) else 0


def _point(link: Path, target: Path) -> None:
    """Makes `link` another name of the file `target`, atomically; a copy where the file system has no hard links."""
    temporary = _temporary(link)
    temporary.unlink(missing_ok=True)
    try:
        try:
            os.link(target, temporary)
        except OSError:
            shutil.copyfile(target, temporary)
            with open(temporary, 'rb') as file:
                os.fsync(file.fileno())
        os.replace(temporary, link)
    finally:
        temporary.unlink(missing_ok=True)


# --- The checkpoints of a folder -------------------------------------------------------------------------------------

def save_checkpoint(content: dict, folder: Path, *, global_step: int, keep: int, is_best: bool) -> Path:
    """Saves the newest checkpoint of a run, advertises it, and removes all older but the `keep` newest, at least two.

    Rank 0 only. The best is linked before the newest appears: were it the other way round, a run killed in between
    would go on from the newest and never know that it was the best. As it is, it saves this state a second time.

    Raises:
        OSError: something could not be written; what was there before is still there.
    """
    path = checkpoint_path(folder, global_step)
    fault_point('save.started')
    with _written(content, path) as temporary:
        if is_best:
            _point(folder / BEST, temporary)
            fault_point('save.linked_best')
        os.replace(temporary, path)
    fault_point('save.renamed')
    sync_folder(folder)
    fault_point('save.shown')
    set_aside_later(folder, global_step)
    _point(folder / LAST, path)
    sync_folder(folder)
    fault_point('save.linked_last')
    for old in newest_first(folder)[max(keep, KEEP_AT_LEAST):]:
        fault_point('save.removing')
        old.unlink(missing_ok=True)
    fault_point('save.removed')
    return path


def checkpoint_path(folder: Path, global_step: int) -> Path:
    return folder / f'checkpoint-{global_step:08d}.pth.tar'


def go_on_from(resumed: Path, folder: Path) -> None:
    """Makes a checkpoint of `folder` the latest there, which it may not have been: later ones are set aside."""
    step = _step(resumed)
    if step is None:
        step = read_checkpoint(resumed).get('global_step', 0)
    set_aside_later(folder, step)
    last = folder / LAST
    if resumed.name != LAST and not (last.is_file() and last.samefile(resumed)):
        _point(last, resumed)
        sync_folder(folder)


def set_aside_later(folder: Path, global_step: int) -> None:
    """Renames the checkpoints of later steps: a run that went back has left them, and must not go on from them."""
    for path in (path for path in newest_first(folder) if (_step(path) or 0) > global_step):
        aside = path.with_name(path.name + ASIDE)
        os.replace(path, aside)
        _logger.warning('%s is of a later step than %d, from which this run goes on; it is now %s', path, global_step,
                        aside.name)


def remove_aside(folder: Path) -> None:
    """Removes what was set aside, once there are as many checkpoints of the run as it went on."""
    for path in folder.glob(NUMBERED + ASIDE):
        path.unlink(missing_ok=True)


def remove_leftovers(folder: Path) -> None:
    """Removes what a save that was killed has left, where no other one is under way."""
    for path in folder.glob(TEMPORARY):
        path.unlink(missing_ok=True)


def newest_first(folder: Path) -> list[Path]:
    """The numbered checkpoints of a folder, by their steps: times of files do not survive copying."""
    steps = {path: step for path in folder.glob(NUMBERED) if (step := _step(path)) is not None}
    return sorted(steps, key=steps.__getitem__, reverse=True)


def _step(path: Path) -> int | None:
    number = path.name.removeprefix('checkpoint-').removesuffix('.pth.tar')
    return int(number) if number.isdecimal() else None


def find_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint of a run's folder, or None where it has none at all.

    Each is held against its checksum. A damaged one is named in a warning, and the next older one taken; the best
    one is the last resort.

    Raises:
        UserError: there are checkpoints, and none is whole.
    """
    damaged = []
    for path in _candidates(folder):
        try:
            verify_checksum(path)
        except UserError as e:
            damaged.append((path, e))
            continue
        for bad, error in damaged:
            _logger.warning('%s; going back from %s to %s', error, bad.name, path)
        return path
    if damaged:
        raise UserError(f'{folder}: none of its checkpoints is whole ({", ".join(path.name for path, _ in damaged)}); '
                        'start a new run under another --experiment, or bring back a copy of one of them')
    return None


def _candidates(folder: Path) -> list[Path]:
    """The checkpoints of a folder, newest first, each file under one name."""
    numbered = newest_first(folder)
    # Usually another name of the newest; alone where the user has taken the others away, or brought only this one.
    last = [path for path in (folder / LAST,) if path.is_file() and not any(_same(path, p) for p in numbered)]
    best = [path for path in (folder / BEST,) if path.is_file() and not any(_same(path, p) for p in numbered + last)]
    if last and numbered:
        try:
            step = read_checkpoint(last[0], verified=True).get('global_step', 0)
        except UserError:
            step = _step(numbered[0])  # damaged: no more than its name is known
        older = [path for path in numbered if _step(path) < step]
        numbered, last = [path for path in numbered if path not in older], last + older
    return numbered + last + best


def _same(one: Path, other: Path) -> bool:
    """Whether two names are of one file, which a run that is still at work may be about to remove."""
    try:
        return one.samefile(other)
    except FileNotFoundError:
        return False


# --- Where a run goes ------------------------------------------------------------------------------------------------
