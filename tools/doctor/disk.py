"""Disk: the size of a checkpoint, the time of a save, and the room for all of them."""
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from engine.checkpoint import KEEP_AT_LEAST, save_checkpoint
from engine.run_folder import RunLock
from tools.doctor.case import Case, Saved, Setup
from tools.doctor.findings import LOOK, OK, STOP, Finding, gib
from utils.errors import UserError


def save_once(case: Case, setup: Setup) -> Saved:
    """Save a checkpoint in a temporary folder below --output, or below the nearest folder above it that exists."""
    output = Path(case.args.output).expanduser().absolute()
    existing = next(path for path in (output, *output.parents) if path.exists())
    try:
        with tempfile.TemporaryDirectory(prefix='.doctor-', dir=existing) as name:
            folder = Path(name)
            lock, has_locks = RunLock(folder), False
            try:
                RunLock(folder).release()
            except UserError:
                has_locks = True
            content = setup.state.state_dict()
            started = time.perf_counter()
            path = save_checkpoint(content, folder, global_step=0, keep=KEEP_AT_LEAST, is_best=True)
            seconds, status = time.perf_counter() - started, path.stat()
            lock.release()
            return Saved(existing, status.st_size, seconds, has_locks, has_links=status.st_nlink > 1)
    except OSError as error:
        return Saved(existing, problem=error.strerror or str(error))


def look_at_disk(case: Case, setup: Setup, saved: Saved | None) -> Iterator[Finding]:
    """Check whether the checkpoints fit, and whether the file system supports what they need."""
    saved = saved or save_once(case, setup)
    if saved.problem:
        yield Finding(STOP, 'Checkpoints', f'A checkpoint cannot be written in {saved.folder} ({saved.problem})',
                      'Make room, get the right to write there, or name another --output.')
        return
    # The newest ones, the best, and the one that is being written while all others still exist.
    kept = max(case.args.checkpoint_hist, KEEP_AT_LEAST) + 2
    need, free = kept * saved.bytes, shutil.disk_usage(saved.folder).free
    speed = saved.bytes / max(saved.seconds, 1e-6)
    figure = (f'{gib(saved.bytes)} each, up to {kept} at a time: {gib(need)}; {saved.folder} has {gib(free)} free; '
              f'written in {saved.seconds:.1f} s ({speed / 1e6:,.0f} MB/s)')
    mark, remedy = OK, ''
    if need > free:
        mark, remedy = STOP, f'Make room for {gib(need - free)}, or name another --output.'
    elif free < 2 * need:
        mark, remedy = LOOK, 'That is close: make room, or name another --output.'
    yield Finding(mark, 'Checkpoints', figure, remedy,
                  numbers={'bytes': saved.bytes, 'needed': need, 'free': free, 'seconds': saved.seconds})
    lacks = ['locks, so nothing keeps two runs out of one folder'] * (not saved.has_locks) + [
        'hard links, so the best and the last are written twice'] * (not saved.has_links)
    inodes = os.statvfs(saved.folder)
    if inodes.f_files and inodes.f_favail < 1000:
        lacks.append(f'room for more than {inodes.f_favail} files')
    if lacks:
        yield Finding(LOOK, 'File system', f'{saved.folder} has no {"; no ".join(lacks)}',
                      'Name an --output on another disk, or start one run at a time and leave it room.')
    else:
        yield Finding(OK, 'File system', 'Files can be written, renamed, linked and locked')
