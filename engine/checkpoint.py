"""Checkpoint files: where they lie, how they are written whole, and which one is the latest. Knows dicts, not models.

A run's folder holds

    checkpoint-00001234.pth.tar    the newest few, by optimizer step
    last.pth.tar                   the newest of them
    model_best.pth.tar             the one with the best metric
    .lock                          which process writes here

A file gets its name only when all of it is on the disk; `last.pth.tar` points to it only after that. Every file ends in
its own checksum (utils.checkpoint_reader.verify_checksum). A run resumes from the newest file that fits its checksum.
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
from utils.weight_sources import BEST, LAST, NUMBERED

_logger = logging.getLogger(__name__)

LOCK = '.lock'
TEMPORARY = '.*.pth.tar.tmp'
# Ends the names of checkpoints that are later than the one from which their run resumed.
ASIDE = '.aside'
# If one file turns out to be damaged, another one remains.
KEEP_AT_LEAST = 2
# Where tests break a save, in the order in which it passes them; `removing` once per removed file.
SAVE_POINTS = ('save.started', 'save.opened', 'save.half', 'save.written', 'save.synced', 'save.linked_best',
               'save.renamed', 'save.shown', 'save.linked_last', 'save.removing', 'save.removed')


# --- One file --------------------------------------------------------------------------------------------------------

class _SealedFile:
    """What torch.save writes to: an unbuffered file that ends in the checksum of its content.

    Hashing while writing costs less than reading the file again. It also covers the bytes that were meant, not those
    that the disk made of them.
    """

    def __init__(self, raw, expected_bytes: int):
        self._raw, self._half = raw, max(1, expected_bytes // 2)
        self._digest = hashlib.sha256()
        self._kept = b''  # the last two bytes, which the length of the checksum replaces
        self._count = 0
        self.error: OSError | None = None  # torch turns it into a RuntimeError

    def write(self, data) -> int:
        view = memoryview(data)
        if len(view) < 2:
            view = memoryview(self._kept + bytes(view))
        else:
            self._pass_on(memoryview(self._kept))
        self._pass_on(view[:-2])
        self._kept = bytes(view[-2:])
        return len(data)

    def _pass_on(self, data: memoryview) -> None:
        self._digest.update(data)
        try:
            while data:  # the system may take less than all of it
                count = self._raw.write(data[:self._half - self._count] if self._count < self._half else data)
                self._count += count
                data = data[count:]
                if self._count == self._half:
                    fault_point('save.half')
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        pass

    def finish(self) -> None:
        assert self._kept == b'\0\0', 'torch.save writes a zip archive without a comment'
        self._pass_on(memoryview(seal(self._digest.hexdigest())))


@contextlib.contextmanager
def _written(content: dict, path: Path) -> Iterator[Path]:
    """Write all of `content` to a temporary file beside `path`, which is removed at the end unless it was renamed."""
    temporary = _temporary(path)
    try:
        # Unbuffered: the parts are large, and closing the file never writes what a full disk refused before.
        temporary.unlink(missing_ok=True)  # a link there would lead the content elsewhere
        with open(temporary, 'xb', buffering=0) as raw:
            fault_point('save.opened')
            file = _SealedFile(raw, _count_bytes(content))
            try:
                torch.save(content, file)  # type: ignore[arg-type]  # it needs only `write` and `flush`
            except RuntimeError:
                # torch says where in its writer it failed; the file system says why.
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


def _temporary(path: Path) -> Path:
    return path.with_name(f'.{path.name}.tmp')


def _count_bytes(value) -> int:
    """Return the bytes of all tensors in `value`."""
    if isinstance(value, torch.Tensor):
        return value.nbytes
    if isinstance(value, dict):
        return sum(map(_count_bytes, value.values()))
    return sum(map(_count_bytes, value)) if isinstance(value, list | tuple) else 0


def _point(link: Path, target: Path) -> None:
    """Make `link` another name of the file `target`, atomically; a copy if the file system has no hard links."""
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
    """Save the newest checkpoint of a run, on rank 0. Keep the `keep` newest ones, at least two, and the best.

    The best is linked before the newest appears. In the other order, a run killed in between would resume from the
    newest and never know that it was the best. As it is, the run saves this state a second time.

    Raises:
        OSError: something could not be written; all earlier files are intact.
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
    """Make a checkpoint of `folder` the latest one there, and set later ones aside."""
    step = _step(resumed)
    if step is None:
        step = read_checkpoint(resumed).get('global_step', 0)
    set_aside_later(folder, step)
    last = folder / LAST
    if resumed.name != LAST and not (last.is_file() and last.samefile(resumed)):
        _point(last, resumed)
        sync_folder(folder)


def copy_best(folder: Path, resumed: Path, *, best_epoch: int) -> bool:
    """Give the folder in which a run goes on the best checkpoint so far, and tell whether it has one.

    Args:
        resumed: the checkpoint that the run resumes from. It is the best one itself, or has it beside it.
        best_epoch: the epoch of the best one.
    """
    if (folder / BEST).exists():
        return True
    for path in (resumed, resumed.parent / BEST):
        with contextlib.suppress(UserError):
            content = read_checkpoint(path, verified=True)
            if (content.get('epoch'), content.get('step')) == (best_epoch + 1, 0):
                _point(folder / BEST, path)
                sync_folder(folder)
                return True
    return False


def set_aside_later(folder: Path, global_step: int) -> None:
    """Rename the checkpoints of later steps. A run that went back left them, and must not resume from them."""
    for path in (path for path in newest_first(folder) if (_step(path) or 0) > global_step):
        aside = path.with_name(path.name + ASIDE)
        os.replace(path, aside)
        _logger.warning('%s is of a later step than %d, where this run resumes; renamed to %s', path, global_step,
                        aside.name)


def remove_all(folder: Path, pattern: str) -> None:
    """Remove the files of a pattern: TEMPORARY, which a killed save leaves, or NUMBERED + ASIDE."""
    for path in folder.glob(pattern):
        path.unlink(missing_ok=True)


def newest_first(folder: Path) -> list[Path]:
    """List the numbered checkpoints of a folder, newest first by step, since copying changes the times of files."""
    steps = {path: step for path in folder.glob(NUMBERED) if (step := _step(path)) is not None}
    return sorted(steps, key=steps.__getitem__, reverse=True)


def _step(path: Path) -> int | None:
    number = path.name.removeprefix('checkpoint-').removesuffix('.pth.tar')
    return int(number) if number.isdecimal() else None


def find_checkpoint(folder: Path) -> Path | None:
    """Return the newest checkpoint of a run's folder that fits its checksum, or None if there is no checkpoint.

    A warning names each damaged one; the next older one takes its place. The best one comes last.

    Raises:
        UserError: there are checkpoints, but all are damaged.
    """
    damaged = []
    for path in _candidates(folder):
        try:
            verify_checksum(path)
        except UserError as error:
            damaged.append((path, error))
            continue
        for bad, reason in damaged:
            _logger.warning('%s; going back from %s to %s', reason, bad.name, path)
        return path
    if damaged:
        raise UserError(f'{folder}: none of its checkpoints is whole ({", ".join(path.name for path, _ in damaged)}); '
                        'start a new run under another --experiment, or restore a copy of one of them')
    return None


def _candidates(folder: Path) -> list[Path]:
    """List the checkpoints of a folder, newest first, each file under one name."""
    numbered = newest_first(folder)
    # LAST is another name of the newest, unless the user moved the others away or brought only this one.
    last = [path for path in (folder / LAST,) if path.is_file() and not any(_same(path, p) for p in numbered)]
    best = [path for path in (folder / BEST,) if path.is_file() and not any(_same(path, p) for p in numbered + last)]
    if last and numbered:
        try:
            step = read_checkpoint(last[0], verified=True).get('global_step', 0)
        except UserError:
            step = _step(numbered[0])  # it is damaged, so only its name is known
        older = [path for path in numbered if _step(path) < step]
        numbered, last = [path for path in numbered if path not in older], last + older
    return numbered + last + best


def _same(one: Path, other: Path) -> bool:
    """Tell whether two names are of one file, which a running process may remove meanwhile."""
    try:
        return one.samefile(other)
    except FileNotFoundError:
        return False
