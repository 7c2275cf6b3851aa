"""A folder of fetched shards that all processes of a machine share.

    cache = Cache()
    file = cache.open(RemoteFile(parse_place('wds:https://host/imagenet/train/shard-000000.tar'), bytes, sha256))

One process fetches a file while the others wait for it (flock). It is fetched in pieces: a dropped connection costs a
piece, and a server may be away for up to `patience` seconds. Length and SHA-256 are checked before a file is used.
Above `max_bytes` the files used longest ago are removed; a process that has one open keeps it.

fsspec's own caches do not promise this. None verifies a checksum, fetches a file once for all processes, resumes half a
file, or bounds the size of its folder; and over http they fail at the first dropped connection.
"""
import contextlib
import fcntl
import hashlib
import os
import re
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, BinaryIO, NamedTuple

import numpy as np

from data.shards.remote import (
    FetchStopped,
    Patience,
    RemoteFile,
    causes_of,
    describe_remote,
    filesystem,
    http_status,
    read_bytes,
    warn_rarely,
)
from data.shards.tar import COPY_AGAIN
from utils.errors import UserError

# Bytes of one request; it adapts to what arrives in about `PIECE_SECONDS`.
MIN_PIECE, MAX_PIECE = 1 << 16, 1 << 25
PIECE_SECONDS = 1.0
# A file that no process has claimed for so long may be removed; one that is needed soon is claimed every third of that.
STALE_SECONDS = 30
# A part of a file that no process has added to for so long may be removed: its process is gone.
ABANDONED_SECONDS = 3600
# Patience at the start, when a mistyped address is likelier than a restarting server.
OPENING_SECONDS = 30
# Threads that fetch ahead: one connection does not use the whole bandwidth.
FETCHERS = 4

# Locks that this process holds or waits for.
_locks: set[IO] = set()


class Cache:
    """Fetched files in a folder that all processes of a machine share.

    folder: created when needed; None for t2t-vit/shards in the user's cache folder. max_bytes: bound on all files
    together. patience: seconds without an answer before an error. sharers: how many processes of this machine fetch
    ahead, each up to half of its equal share of `max_bytes`.
    """

    def __init__(self, folder: str | os.PathLike | None = None, *, max_bytes: float = 100e9, patience: float = 300,
                 sharers: int = 1):
        users = os.path.expanduser(os.environ.get('XDG_CACHE_HOME') or '~/.cache')
        if users.startswith('~'):  # in a container there may be no home
            users = tempfile.gettempdir()
        self.folder = Path(os.path.expanduser(folder or os.path.join(users, 't2t-vit/shards')))
        self.max_bytes, self.patience = max_bytes, patience
        self.ahead_bytes = max_bytes / 2 / sharers

    @property
    def opening_patience(self) -> float:
        return min(self.patience, OPENING_SECONDS)

    def make(self) -> None:
        """Create the folder. Raises UserError if it cannot be written."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.folder):
                pass
        except OSError as error:
            raise UserError(f'--shard-cache: {self.folder} cannot be written ({error.strerror}); name another '
                            'folder') from None

    def path(self, file: RemoteFile) -> Path:
        return self.folder / f'{file.key}.tar'

    def part(self, file: RemoteFile) -> Path:
        """Return the path of what has arrived of a file; its name contains the final length."""
        return self.folder / f'{file.key}.{file.bytes}.part'

    def open(self, file: RemoteFile) -> BinaryIO:
        """Open a file for reading, after fetching it if necessary. Raises UserError as `fetch`."""
        while True:
            with contextlib.suppress(FileNotFoundError):
                opened = open(self.path(file), 'rb', buffering=0)
                self.claim(file)
                return opened
            self.fetch(file)

    def claim(self, file: RemoteFile) -> bool:
        """Return whether the file is here, and mark it as used now."""
        try:
            os.utime(self.path(file))
        except FileNotFoundError:
            return False
        except OSError:  # another user's file, or a read-only disk
            pass
        return True

    def fetch(self, file: RemoteFile, *, ahead: bool = False, stop: threading.Event | None = None) -> bool:
        """Fetch a file unless it is here. Return whether it is here now; `ahead` of need it may lack room.

        Raises UserError if the server has not answered in time or has another file or none, or if the disk is full;
        FetchStopped if `stop` is set.
        """
        began = time.monotonic()
        try:
            with self._locked(f'{file.key}.lock', stop):
                if self.claim(file):
                    return True
                with self._locked('room.lock', stop):
                    if not self._make_room(file, even_fresh=not ahead):
                        return False
                    self.part(file).touch()  # now other processes count it
                if self._download(file, Patience(file.url, self.patience, stop, began), stop):
                    return True
                warn_rarely(f'{file.url}: what has arrived does not fit its checksum; fetching it again')
                if self._download(file, Patience(file.url, self.patience, stop), stop):
                    return True
        except OSError as error:  # the disk's; the server's are handled above
            raise UserError(f'--shard-cache: {self.folder} cannot be written ({error.strerror or error}); make room, '
                            'give a smaller --shard-cache-size or another folder') from None
        raise UserError(f'{file.url}: its content is not what its manifest says (SHA-256), twice in a row; '
                        f'{COPY_AGAIN} to the server, or pack it anew')

    def _download(self, file: RemoteFile, patience: Patience, stop: threading.Event | None) -> bool:
        """Fetch a file in pieces, continuing the last attempt. Return whether its content is right."""
        part = self.part(file)
        piece, most = 1 << 20, MAX_PIECE
        with open(part, 'ab') as target:
            if target.tell() > file.bytes:
                target.truncate(target.seek(0))
            while (position := target.tell()) < file.bytes:
                began = time.monotonic()
                try:
                    content = self._piece(file, position, min(position + piece, file.bytes))
                except Exception as error:
                    patience.failed(error)
                    # Connections may be too short-lived for more.
                    piece = most = max(MIN_PIECE, piece // 2)
                    continue
                patience.answered()
                target.write(content)
                if stop is not None and stop.is_set():
                    raise FetchStopped
                speed = len(content) / max(time.monotonic() - began, 1e-3)
                piece = int(min(most, 2 * piece, max(MIN_PIECE, speed * PIECE_SECONDS)))
            target.flush()
            os.fsync(target.fileno())
        if file.sha256:
            with open(part, 'rb') as written:
                is_right = hashlib.file_digest(written, 'sha256').hexdigest() == file.sha256
            if not is_right:
                part.unlink()
                return False
        elif file.tag and describe_remote(file.place, self.patience).tag != file.tag:
            part.unlink()
            raise UserError(f'{file.url} has been replaced on the server since it was looked at first; start again')
        os.replace(part, self.path(file))
        self.claim(file)
        return True

    def _piece(self, file: RemoteFile, start: int, end: int) -> bytes:
        """Return bytes start to end of a file; all from start on if the server does not support ranges."""
        system = filesystem(file.place)
        try:
            content = read_bytes(file.place, start, end, limit=file.bytes)
        except Exception as error:
            if 416 not in map(http_status, causes_of(error)):
                raise
            content = b''  # start is behind the end of the file
        if len(content) == file.bytes:
            return content[start:]
        if len(content) != end - start:
            size = system.info(file.url).get('size')
            if size not in (None, file.bytes):
                what = 'ends early' if size < file.bytes else 'is too long'
                known = 'in its manifest' if file.sha256 else 'when it was looked at first'
                raise UserError(f'{file.url} {what}: {size:,} bytes, {file.bytes:,} {known}; {COPY_AGAIN} to the '
                                'server')
            raise OSError(f'{len(content)} bytes instead of {end - start}')
        return content

    @contextlib.contextmanager
    def _locked(self, name: str, stop: threading.Event | None = None) -> Iterator[None]:
        """Hold a lock among all processes and threads of the machine; it is released however they end."""
        with open(self.folder / name, 'wb', buffering=0) as lock:
            _locks.add(lock)
            try:
                while True:
                    try:
                        fcntl.flock(lock, fcntl.LOCK_EX | (fcntl.LOCK_NB if stop else 0))
                        break
                    except BlockingIOError:
                        if stop and stop.wait(0.1):
                            raise FetchStopped from None
                    except OSError as error:  # some cluster file systems have no locks
                        raise UserError(f'--shard-cache: {self.folder} is where files cannot be locked '
                                        f'({error.strerror}); name a folder on a disk of this machine') from None
                yield
            finally:
                _locks.discard(lock)

    def _make_room(self, file: RemoteFile, *, even_fresh: bool) -> bool:
        """Remove the files used longest ago until `file` fits. Return whether it fits.

        even_fresh: recently used files may be removed, too; the result is then always True.
        """
        entries = []
        for entry in os.scandir(self.folder):
            with contextlib.suppress(FileNotFoundError):
                # The user's folder may contain other files.
                ours = re.fullmatch(r'[0-9a-f]{64}\.(tar|(\d+)\.part)', entry.name)
                if ours and entry.name != self.part(file).name:
                    status = entry.stat()
                    entries.append((status.st_mtime, int(ours[2] or status.st_size), entry.path, not ours[2]))
        total = file.bytes + sum(size for _, size, _, _ in entries)
        for used, size, path, is_whole in sorted(entries):
            age = time.time() - used
            if total <= self.max_bytes:
                break
            if is_whole and (even_fresh or age > STALE_SECONDS) or age > ABANDONED_SECONDS:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(path)
                total -= size
        return even_fresh or total <= self.max_bytes


def _close_locks() -> None:
    """Close the parent's locks in a forked child: a lock lasts until every process has closed its file."""
    for lock in list(_locks):
        lock.close()
    _locks.clear()


os.register_at_fork(after_in_child=_close_locks)


class Prefetcher:
    """Fetches the files of the next samples, in their order, in threads of this process.

        with Prefetcher(cache, files, needed) as used:
            used(64)                      # the next 64 of `needed` have been used

    needed: int64 [n], each sample's file number. It claims as many files as the cache allows. Errors are silent: the
    reader of the file meets them, too.
    """

    def __init__(self, cache: Cache, files: Sequence[RemoteFile], needed: np.ndarray):
        self._cache, self._files = cache, files
        numbers, first = np.unique(needed, return_index=True)
        last = len(needed) - 1 - np.unique(needed[::-1], return_index=True)[1]
        order = np.argsort(first)
        self._pending = numbers[order].tolist()[::-1]
        self._last = dict(zip(numbers.tolist(), last.tolist(), strict=True))
        self._claimed: list[int] = []
        self._used = 0
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._run, name=f'shards-{k}', daemon=True)
                         for k in range(min(FETCHERS, len(self._pending)))]

    def __enter__(self) -> Callable[[int], None]:
        for thread in self._threads:
            thread.start()
        return self._advance

    def __exit__(self, *exception) -> None:
        self._stop.set()
        end = time.monotonic() + 5
        for thread in self._threads:
            thread.join(timeout=max(0, end - time.monotonic()))

    def _advance(self, count: int) -> None:
        self._used += count

    def _run(self) -> None:
        claimed_at = -np.inf
        waiting: int | None = None
        while not self._stop.is_set():
            if time.monotonic() - claimed_at > STALE_SECONDS / 3:
                claimed_at = time.monotonic()
                for claimed in list(self._claimed):
                    self._cache.claim(self._files[claimed])
            number = self._next() if waiting is None else waiting
            if number is None:
                if not self._pending and not self._claimed:
                    return
                self._stop.wait(0.2)
                continue
            try:
                waiting = None if self._cache.fetch(self._files[number], ahead=True, stop=self._stop) else number
            except FetchStopped:
                return
            except (UserError, OSError):
                waiting = None
            if waiting is not None:
                self._stop.wait(1)

    def _next(self) -> int | None:
        """Return the number of the file to fetch next; None while the claimed ones leave no room."""
        with self._lock:
            self._claimed = [number for number in self._claimed if self._last[number] >= self._used]
            while self._pending and self._last[self._pending[-1]] < self._used:
                self._pending.pop()
            if not self._pending:
                return None
            total = sum(self._files[number].bytes for number in (*self._claimed, self._pending[-1]))
            if self._claimed and total > self._cache.ahead_bytes:
                return None
            self._claimed.append(self._pending.pop())
            return self._claimed[-1]


class Files(NamedTuple):
    """The tar files of a split: their names for messages, and the cache that fetches them.

    remote: None for files on this machine, whose names are their paths.
    """
    names: list[str]
    remote: tuple[Cache, list[RemoteFile]] | None = None

    def open(self, number: int) -> BinaryIO:
        if self.remote is None:
            return open(self.names[number], 'rb', buffering=0)
        cache, files = self.remote
        return cache.open(files[number])

    @classmethod
    def fetched(cls, cache: Cache, files: list[RemoteFile]) -> 'Files':
        return cls([file.url for file in files], (cache, files))
