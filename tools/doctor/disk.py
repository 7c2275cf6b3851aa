"""Disk: the size of a checkpoint, the time of a save, and the room for all of them."""
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from engine.checkpoint import KEEP_AT_LEAST, save_checkpoint
from engine.run_folder import RunLock
from tools.doctor.findings import LOOK, OK, STOP, Finding, NotMeasured, gib
from tools.doctor.speed import RATES
from utils.errors import UserError

if TYPE_CHECKING:
    from tools.doctor.case import Case


def checkpoint_of(case: 'Case') -> dict:
    """Saves a checkpoint of this run once, where the run would; its bytes and seconds, and what the folder can do."""
    if case.saved is None:
        output = Path(case.args.output).expanduser().absolute()
        existing = next(path for path in (output, *output.parents) if path.exists())
        try:
            with tempfile.TemporaryDirectory(prefix='.doctor-', dir=existing) as folder:
                case.saved = {'folder': existing, **_save_once(case, Path(folder))}
        except OSError as error:
            case.saved = {'folder': existing, 'bytes': 0, 'seconds': 0.0, 'problem': error.strerror or str(error)}
    return case.saved


def _save_once(case: 'Case', folder: Path) -> dict:
    """Raises OSError where something could not be written."""
    lock, is_locked = RunLock(folder), False
    try:
        RunLock(folder).release()
    except UserError:
        is_locked = True
    content = case.state.state_dict()
    started = time.perf_counter()
    path = save_checkpoint(content, folder, global_step=0, keep=KEEP_AT_LEAST, is_best=True)
    seconds = time.perf_counter() - started
    has_links = path.stat().st_nlink > 1
    lock.release()
    return {'bytes': path.stat().st_size, 'seconds': seconds, 'locks': is_locked, 'links': has_links, 'problem': ''}


def look_at_disk(case: 'Case'):
    """Whether the checkpoints fit, and whether the folder can do what they need."""
    if not hasattr(case, 'state'):
        raise NotMeasured(f'there is no model to save, see "{RATES}"')
    saved = checkpoint_of(case)
    if saved['problem']:
        yield Finding(STOP, 'Checkpoints', f'A checkpoint cannot be written in {saved["folder"]} ({saved["problem"]})',
                      'Make room, get the right to write there, or name another --output.')
        return
    # The newest ones, the best, and the one that is being written while all others are still there.
    kept = max(case.args.checkpoint_hist, KEEP_AT_LEAST) + 2
    need, free = kept * saved['bytes'], shutil.disk_usage(saved['folder']).free
    speed = saved['bytes'] / max(saved['seconds'], 1e-6)
    figure = (f'{gib(saved["bytes"])} each, up to {kept} at a time: {gib(need)}; {saved["folder"]} has {gib(free)} '
              f'free; written in {saved["seconds"]:.1f} s ({speed / 1e6:,.0f} MB/s)')
    numbers = {'bytes': saved['bytes'], 'needed': need, 'free': free, 'seconds': saved['seconds']}
    if need > free:
        yield Finding(STOP, 'Checkpoints', figure, f'Make room for {gib(need - free)}, or name another --output.',
                      numbers=numbers)
    elif free < 2 * need:
        yield Finding(LOOK, 'Checkpoints', figure, 'That is close: make room, or name another --output.',
                      numbers=numbers)
    else:
        yield Finding(OK, 'Checkpoints', figure, numbers=numbers)
    lacks = ['locks, so nothing keeps two runs out of one folder'] * (not saved['locks']) + [
        'hard links, so the best and the last are written twice'] * (not saved['links'])
    inodes = os.statvfs(saved['folder'])
    if inodes.f_files and inodes.f_favail < 1000:
        lacks.append(f'room for more than {inodes.f_favail} files')
    if lacks:
        yield Finding(LOOK, 'File system', f'{saved["folder"]} has no {"; no ".join(lacks)}',
                      'Name an --output on another disk, or start one run at a time and leave it room.')
    else:
        yield Finding(OK, 'File system', 'Files can be written, renamed, linked and locked')
