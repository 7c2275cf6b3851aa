"""Which folder a run writes, which checkpoint it goes on from, and the lock that keeps other runs out."""
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
from utils.disk import make_folder
from utils.distributed import World, gather, raise_on_all_ranks
from utils.errors import UserError

_logger = logging.getLogger(__name__)


def resolve_run(*, output: str, kind: str, experiment: str, resume: str, name: str,
                restarted: bool = False) -> tuple[Path, Path | None]:
    """The folder of this run, and the checkpoint it continues from (None for a new run). Creates nothing. Rank 0 only.

    With `resume` a path, the run goes on in that checkpoint's folder, unless `experiment` names another. With
    'auto' it goes on from the newest whole checkpoint of output/kind/experiment, or, where no experiment is named, of
    the newest run called `*-name`; where there is none, it starts a new run. A new run is named after the time, that of
    the launcher where there is one, so that processes started again find their folder.

    Args:
        restarted: these processes take the place of others that have crashed: the run goes on from the newest whole
            checkpoint of its own folder, whatever `resume` says, once it has one.
    Raises:
        UserError: the path to resume from is no whole checkpoint, or a new run would overwrite another.
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
    """The folder in which a run goes on, as it was chosen when it first started."""
    if experiment or resume in ('', 'auto'):
        return new
    path = Path(resume).expanduser()  # which the run itself may have removed since, after newer ones
    return (path if path.is_dir() else path.parent).resolve()


def check_resume(resume: str) -> Path:
    """The folder of --resume PATH, without reading what is in it, for a check before the data is scanned.

    Raises:
        UserError: no checkpoint is there.
    """
    path = Path(resume).expanduser()
    folder = path if path.is_dir() else path.parent
    if not path.is_file() and not ((path.is_dir() or path.name == LAST) and _has_checkpoint(folder)):
        raise UserError(f"--resume {resume}: no such checkpoint; give a file such as {LAST}, or 'auto'")
    return folder.resolve()


def _asked_for(resume: str) -> Path:
    """The checkpoint of --resume PATH: that file; of a folder, or for its LAST, the newest whole one in it."""
    path, folder = Path(resume).expanduser(), check_resume(resume)
    if path.is_dir() or path.name == LAST:
        if newest := find_checkpoint(path if path.is_dir() else path.parent):
            return newest
        raise UserError(f'--resume {resume}: its last checkpoint has just been removed')
    try:
        verify_checksum(path)
    except UserError as e:
        try:
            found = find_checkpoint(folder)
        except UserError:
            found = None
        beside = f'; the newest whole one beside it is {found}' if found else ''
        raise UserError(f'--resume {resume}: {e}{beside}') from None
    return path


def _has_checkpoint(folder: Path) -> bool:
    return bool(newest_first(folder)) or any((folder / name).is_file() for name in (LAST, BEST))


def _changed(folder: Path) -> int:
    """When the newest checkpoint of a folder was written."""
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
    """Raises BlockingIOError where another holds the lock for `patience` seconds."""
    end = time.monotonic() + patience
    while True:
        try:
            return fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= end:
                raise
        time.sleep(0.5)


class RunLock:
    """One run, one folder: held from here until `release` or the end of this process, however it ends. Rank 0 only.

    The folder is made where it is missing. The file stays; what is in it counts only while a process holds it.

    Args:
        patience: seconds to wait for the holder to let go.
    Raises:
        UserError: another run writes into the folder, or nothing can be written there.
    """

    def __init__(self, folder: Path, *, patience: float = 0):
        make_folder(folder, '--output')
        self._handle = None
        path = folder / LOCK
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as e:
            self._warn(path, e)
            return
        try:
            _lock(handle, patience)
        except BlockingIOError:
            holder = os.read(handle, 300).decode(errors='replace').strip() or 'unknown'
            os.close(handle)
            raise UserError(f'{folder}: another run writes here ({holder}); wait for it or end it, or start this one '
                            'under another --experiment') from None
        except OSError as e:
            os.close(handle)
            self._warn(path, e)
            return
        self._handle = handle
        # A loader process that outlives this one must not keep the lock that it was born with.
        os.register_at_fork(after_in_child=self.release)
        with contextlib.suppress(OSError):  # the name of the holder is a help; a full disk must not stop a run
            os.truncate(handle, 0)
            os.write(handle, f'host {socket.gethostname()}, process {os.getpid()}\n'.encode())

    @staticmethod
    def _warn(path: Path, error: OSError) -> None:
        _logger.warning('%s cannot be locked (%s): nothing keeps a second run from writing into this folder', path,
                        error.strerror)

    def release(self) -> None:
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None


LOCK_TIMEOUT_SECONDS = 120  # seconds; a file server gives the lock of a machine that it has lost away after 90
VISIBILITY_FILE = '.seen'  # a file that all machines must see
VISIBILITY_SECONDS = 10  # for a network file system to show what another machine has written


def lock_patience(args) -> float:
    """Seconds for what is left of a machine that was lost to let go of the run's folder; the other ranks wait, too."""
    return min(LOCK_TIMEOUT_SECONDS, args.timeout / 2)


def check_all_see(folder: Path, world: World) -> None:
    """Raises UserError on every rank where a machine does not see the run's folder as that of rank 0 does.

    Each goes on from a checkpoint there, and rank 0 may be on another one after a restart.
    """
    hosts = gather(socket.gethostname() if world.local_rank == 0 else None)
    if len(hosts) - hosts.count(None) < 2:
        return
    token = folder / VISIBILITY_FILE
    with raise_on_all_ranks():
        try:
            if world.is_main:
                token.touch()
        except OSError as e:
            raise UserError(f'{token} cannot be written ({e.strerror})') from None
    end = time.monotonic() + VISIBILITY_SECONDS
    while not token.exists() and time.monotonic() < end:
        time.sleep(0.1)
        with contextlib.suppress(OSError):
            os.listdir(folder)  # has a network file system look again
    seen = gather(token.exists())
    if world.is_main:
        token.unlink(missing_ok=True)
    blind = [str(host) for host, sees in zip(hosts, seen, strict=True) if host is not None and not sees]
    if blind:
        raise UserError(f"the run's folder {folder} is not the same on every machine ({', '.join(blind)} does not see "
                        'what rank 0 writes there); give an --output that all machines share')
