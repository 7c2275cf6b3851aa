"""The folder that a run writes, the checkpoint it resumes from, and the lock that keeps other runs out."""
import contextlib
import fcntl
import logging
import os
import socket
import time
from datetime import datetime
from pathlib import Path

from engine.checkpoint import BEST, LAST, LOCK, NUMBERED, find_checkpoint, newest_first
from utils import job
from utils.checkpoint_reader import verify_checksum
from utils.disk import make_folder, require_own
from utils.distributed import World, gather, raise_on_all_ranks
from utils.errors import UserError

_logger = logging.getLogger(__name__)

# Seconds to wait for a lock. A file server takes about 90 to free the lock of a machine that it lost.
LOCK_TIMEOUT_SECONDS = 120
# A file that all machines must see, and the seconds a network file system may take to show it.
VISIBILITY_FILE = '.seen'
VISIBILITY_SECONDS = 10


def resolve_run(*, output: str, kind: str, experiment: str, resume: str, name: str,
                restarted: bool = False) -> tuple[Path, Path | None]:
    """Return the folder of this run, and the checkpoint it resumes from or None. Rank 0 only; creates nothing.

    A new run is named after the time. Restarted processes get the launcher's start time, so they find their folder.

    Args:
        resume: a path: resume in that checkpoint's folder, or in the new run `experiment`. 'auto': resume from the
            newest whole checkpoint of output/kind/experiment or, without `experiment`, of the newest run called
            `*-name`; start a new run if there is none.
        restarted: these processes replace others that crashed. The run resumes from the newest whole checkpoint of its
            own folder, if it has one, whatever `resume` says.
    Raises:
        UserError: the path to resume from is not a whole checkpoint, or a new run would overwrite another.
    """
    runs = Path(output).expanduser() / kind
    started = job.start_time() or f'{datetime.now():%Y%m%d-%H%M%S}'
    new = runs / (experiment or f'{started}-{name}')
    if restarted:
        own = _folder_of_resume(resume, experiment, new)
        found = find_checkpoint(own)
        if found:
            return own, found
    if not resume:
        if not restarted:
            _refuse_to_overwrite(new)
        return new, None
    if resume == 'auto':
        folders = [new] if experiment else [folder for folder in runs.glob(f'*-{name}') if _has_checkpoint(folder)]
        folder = max(folders, key=_changed, default=new)
        found = find_checkpoint(folder)
        if found:
            return folder, found
        _logger.info('--resume auto: no checkpoint in %s, starting a new run', new if experiment else runs)
        return new, None
    path = _asked_for(resume)
    if not experiment or new.resolve() == path.resolve().parent:
        return path.resolve().parent, path
    if not restarted:
        _refuse_to_overwrite(new)
    return new, path


def _folder_of_resume(resume: str, experiment: str, new: Path) -> Path:
    """Return the folder of a restarted run, as its first start chose it."""
    if experiment or resume in ('', 'auto'):
        return new
    path = Path(resume).expanduser()  # the run may have removed it since, after saving newer ones
    return (path if path.is_dir() else path.parent).resolve()


def check_resume(resume: str) -> Path:
    """Return the folder of --resume PATH, without reading any file; a check before the data is scanned.

    Raises:
        UserError: there is no checkpoint.
    """
    path = Path(resume).expanduser()
    folder = path if path.is_dir() else path.parent
    if not path.is_file() and not ((path.is_dir() or path.name == LAST) and _has_checkpoint(folder)):
        raise UserError(f"--resume {resume}: no such checkpoint; give a file such as {LAST}, or 'auto'")
    return folder.resolve()


def _asked_for(resume: str) -> Path:
    """Return the checkpoint of --resume PATH: that file, or the newest whole one of a folder or of its LAST."""
    path, folder = Path(resume).expanduser(), check_resume(resume)
    if path.is_dir() or path.name == LAST:
        if newest := find_checkpoint(path if path.is_dir() else path.parent):
            return newest
        raise UserError(f'--resume {resume}: its last checkpoint has just been removed')
    try:
        verify_checksum(path)
    except UserError as error:
        found = None
        with contextlib.suppress(UserError):
            found = find_checkpoint(folder)
        beside = f'; the newest whole one beside it is {found}' if found else ''
        raise UserError(f'--resume {resume}: {error}{beside}') from None
    return path


def _has_checkpoint(folder: Path) -> bool:
    return bool(newest_first(folder)) or any((folder / name).is_file() for name in (LAST, BEST))


def _changed(folder: Path) -> int:
    """Return the time at which the newest checkpoint of a folder was written."""
    times = [0]
    for path in (folder / LAST, *folder.glob(NUMBERED)):
        with contextlib.suppress(FileNotFoundError):
            times.append(path.stat().st_mtime_ns)
    return max(times)


def _refuse_to_overwrite(folder: Path) -> None:
    if (folder / LAST).exists() or newest_first(folder):
        raise UserError(f'--experiment {folder.name}: that run exists in {folder.parent}; --resume auto continues it, '
                        'another name starts a new one')


def _lock(handle: int, patience: float) -> None:
    """Take the lock, or raise BlockingIOError if another process still holds it after `patience` seconds."""
    end = time.monotonic() + patience
    while True:
        try:
            return fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= end:
                raise
        time.sleep(0.5)


class RunLock:
    """Locks a run's folder for one process, until `release` or the end of the process. Rank 0 only.

    Creates the folder if it is missing. The lock file stays; its content counts only while a process holds it.

    Args:
        patience: seconds to wait for the holder to let go.
    Raises:
        UserError: another run writes into the folder, or the folder cannot be written.
    """

    def __init__(self, folder: Path, *, patience: float = 0):
        make_folder(folder, '--output')
        self._handle: int | None = None
        path = folder / LOCK
        require_own(path)
        try:
            self._handle = handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            _lock(handle, patience)
        except BlockingIOError:
            holder = os.read(handle, 300).decode(errors='replace').strip() or 'unknown'
            self.release()
            raise UserError(f'{folder}: another run writes here ({holder}); wait for it or end it, or start this one '
                            'under another --experiment') from None
        except OSError as error:
            self.release()
            _logger.warning('%s cannot be locked (%s): nothing keeps a second run from writing into this folder', path,
                            error.strerror)
            return
        # A loader process that outlives this one must not keep the lock.
        os.register_at_fork(after_in_child=self.release)
        with contextlib.suppress(OSError):  # the holder's name only informs; a full disk must not stop a run
            os.truncate(handle, 0)
            os.write(handle, f'host {socket.gethostname()}, process {os.getpid()}\n'.encode())

    def release(self) -> None:
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None


def lock_patience(args) -> float:
    """Return the seconds to wait for a lost machine's lock; less than --timeout, since the other ranks wait too."""
    return min(LOCK_TIMEOUT_SECONDS, args.timeout / 2)


def check_all_see(folder: Path, world: World) -> None:
    """Raise UserError on every rank if a machine does not see the same run's folder as rank 0.

    Every machine resumes from a checkpoint there, and after a restart rank 0 may run on another machine.
    """
    hosts = gather(socket.gethostname() if world.local_rank == 0 else None)
    if len(hosts) - hosts.count(None) < 2:
        return
    token = folder / VISIBILITY_FILE
    with raise_on_all_ranks():
        try:
            if world.is_main:
                token.touch()
        except OSError as error:
            raise UserError(f'{token} cannot be written ({error.strerror}); check the disk of --output') from None
    end = time.monotonic() + VISIBILITY_SECONDS
    while not token.exists() and time.monotonic() < end:
        time.sleep(0.1)
        with contextlib.suppress(OSError):
            os.listdir(folder)  # makes a network file system look again
    seen = gather(token.exists())
    if world.is_main:
        token.unlink(missing_ok=True)
    blind = [str(host) for host, sees in zip(hosts, seen, strict=True) if host is not None and not sees]
    if blind:
        raise UserError(f"the run's folder {folder} is not the same on every machine ({', '.join(blind)} does not see "
                        'what rank 0 writes there); give an --output that all machines share')
