"""Files that are somewhere else, by http(s), S3 or another of SCHEMES: fetched whole into a folder of this machine.

    cache = Cache()
    file = cache.open(RemoteFile('https://host/imagenet/train/shard-000000.tar', bytes, sha256))

One process of a machine fetches a file, the others wait for it (flock). It is fetched in pieces: a connection that
drops costs a piece, a server that is away costs the time it is away, up to `patience` seconds. What has arrived is
checked against its length and its SHA-256 before anybody sees it. Beyond `max_bytes` the files go that were used
longest ago; a process that has such a file open keeps it, another one fetches it again.
"""
import contextlib
import fcntl
import hashlib
import logging
import multiprocessing
import os
import re
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, BinaryIO, NamedTuple

import numpy as np

from data.shards.tar import COPY_AGAIN
from utils.errors import UserError

_logger = logging.getLogger(__name__)

SCHEMES = ('http', 'https', 's3', 'gs', 'gcs', 'az', 'abfs')
"""Kinds of addresses. Not every one that fsspec knows: some of those open files of this machine, or run programs."""

NEEDS = {'http': 'aiohttp', 'https': 'aiohttp', 's3': 's3fs', 'gs': 'gcsfs', 'gcs': 'gcsfs', 'az': 'adlfs',
         'abfs': 'adlfs'}

MIN_PIECE, MAX_PIECE = 1 << 16, 1 << 25
"""Bytes fetched by one request; as many as arrive in about `PIECE_SECONDS`."""

PIECE_SECONDS = 1.0
PAUSES = (0.5, 1, 2, 4, 8, 15)
"""Seconds between attempts; the last one stays."""

STALE_SECONDS = 30
"""A file that nobody has claimed for so long may go; whoever will need it soon claims it every third of that."""

ABANDONED_SECONDS = 3600
"""A part of a file that nobody has added to for so long may go: whoever fetched it is no more."""

OPENING_SECONDS = 30
"""Patience at the start, when a mistyped address is likelier than a server that is being restarted."""

FETCHERS = 4
"""Threads that fetch ahead: one connection does not fill a line."""


class RemoteFile(NamedTuple):
    """An address and what is known of the file there. tag: of a file without SHA-256, what changes when it changes."""
    url: str
    bytes: int
    sha256: str = ''
    tag: str = ''

    @property
    def key(self) -> str:
        """The file's name in a cache: equal contents have the same, wherever they come from."""
        return self.sha256 or hashlib.sha256(f'{self.url}\n{self.bytes}\n{self.tag}'.encode()).hexdigest()


class Gone(UserError):
    """There is nothing at an address, or nothing for this user."""


class Stopped(Exception):
    """The fetching has been called off."""


def scheme_of(path: str) -> str:
    """'https' for 'https://host/file', '' for a path of this machine. Raises UserError for a kind that is not read."""
    scheme, separator, _ = path.partition('://')
    if not separator or scheme == 'file':
        return ''
    if scheme.lower() not in SCHEMES:
        raise UserError(f'{path}: addresses of the kind {scheme!r} are not read; give a path, or one of '
                        f'{", ".join(f"{name}://" for name in SCHEMES[:4])}')
    return scheme.lower()


def read_remote(url: str, patience: float) -> bytes:
    """The content of a small file. Raises Gone, or another UserError when `patience` seconds have been in vain."""
    return _persist(lambda: _filesystem(url).cat_file(url), url, patience)


def describe_remote(url: str, patience: float) -> RemoteFile:
    """Length and tag of the file at an address. Raises as `read_remote`."""
    info = _persist(lambda: _filesystem(url).info(url), url, patience)
    if not isinstance(info.get('size'), int):
        raise UserError(f'{url}: the server does not say how long the file is; put the shards on one that does')
    tag = next((str(info[name]) for name in ('ETag', 'etag', 'Last-Modified', 'LastModified', 'mtime') if name in info),
               '')
    return RemoteFile(url, info['size'], tag=tag)


def _filesystem(url: str):
    """fsspec's file system for an address; of each process its own, as connections do not survive a fork."""
    scheme = scheme_of(url)
    options: dict[str, Any] = {}
    try:
        import fsspec
        if scheme in ('http', 'https'):
            import aiohttp
            # Its own limit is five minutes for a whole request; a slow line is none that hangs.
            options['headers'] = {'Accept-Encoding': 'identity'}  # parts of a compressed answer would be of no use
            timeout = aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=30)
            options['client_kwargs'] = {'timeout': timeout, 'trust_env': True}  # proxies, as every other program has it
        elif scheme == 's3':
            options['config_kwargs'] = {'connect_timeout': 10, 'read_timeout': 30}
        return fsspec.filesystem(scheme, **options)
    except ImportError:
        package = '-r requirements-shards.txt' if NEEDS[scheme] in ('aiohttp', 's3fs') else NEEDS[scheme]
        raise UserError(f'{url}: to read this, {NEEDS[scheme]} is missing; pip install {package}') from None


# ---------------------------------------------------------------------------------------------------------------------
# Persistence


class Patience:
    """Of one who asks the server of `url` again and again: pauses and warnings after failures, and an end to them.

    since: when the wait for an answer began, if others have asked before.
    """

    def __init__(self, url: str, seconds: float, stop: threading.Event | None = None, since: float | None = None):
        self._url, self._seconds, self._stop = url, seconds, stop or threading.Event()
        self._failures, self._began = 0, since

    def answered(self) -> None:
        self._failures, self._began = 0, None

    def failed(self, error: Exception) -> None:
        """Waits before another attempt. Raises UserError where that will not help or has been in vain for too long."""
        if isinstance(error, UserError | MemoryError):
            raise error
        if explained := _explain_for_good(error, self._url):
            raise explained from None
        now = time.monotonic()
        self._began = now if self._began is None else self._began
        pause = PAUSES[min(self._failures, len(PAUSES) - 1)]
        waited = now - self._began
        if waited + pause > self._seconds:
            raise UserError(f'{self._url}: no answer for {waited:.0f} s ({_reason(error)}); check the address, the '
                            'server and the network, then start again') from None
        self._failures += 1
        _warn(f'{self._url}: {_reason(error)}; trying again, for {waited:.0f} s now')
        if self._stop.wait(pause):
            raise Stopped


def _persist(request: Callable, url: str, seconds: float):
    """What `request()` returns, in the end."""
    patience = Patience(url, seconds)
    while True:
        try:
            return request()
        except Exception as error:
            patience.failed(error)


_last_warning = [-np.inf]


def _warn(message: str) -> None:
    """A warning, unless the last one is a moment old: when a server is away all that fetch have the same to say."""
    if time.monotonic() - _last_warning[0] < 2:
        return
    _last_warning[0] = time.monotonic()
    if multiprocessing.parent_process() is None:
        _logger.warning(message)
    elif sys.__stderr__:  # the locks of the console may have been held by another thread when this one was forked
        with contextlib.suppress(OSError):
            os.write(sys.__stderr__.fileno(), f'warning: {message}\n'.encode(errors='replace'))


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or getattr(error, 'os_error', None)


def _explain_for_good(error: Exception, url: str) -> UserError | None:
    """The UserError for what another attempt will not change; None for what it may."""
    causes = list(_causes(error))
    status = next(filter(None, map(_status, causes)), None)
    names = {type(cause).__name__ for cause in causes}
    if status in (408, 425, 429) or (status is not None and status >= 500):
        return None
    if any(isinstance(cause, socket.gaierror) and cause.errno == socket.EAI_NONAME for cause in causes):
        return UserError(f'{url}: there is no such server; check the address')
    if 'NoCredentialsError' in names or 'PartialCredentialsError' in names:
        return UserError(f'{url}: no credentials were found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a '
                         'profile of ~/.aws')
    # fsspec says "not found" of a server that does not answer, too; then the cause tells.
    is_missing = isinstance(error, FileNotFoundError) and (status is not None or error.__cause__ is None)
    if status in (404, 410) or (is_missing and status is None) or 'NoSuchBucket' in str(error):
        return Gone(f'{url}: not found')
    if status in (401, 403) or isinstance(error, PermissionError):
        return Gone(f'{url}: access is refused{f" ({status})" if status else ""}')
    if status is not None and 400 <= status < 500:
        return UserError(f'{url}: refused by the server ({status}); check the address')
    if isinstance(error, ValueError | TypeError | AttributeError):
        return UserError(f'{url}: {_reason(error)}; check the address')
    return None


def _status(error: BaseException) -> int | None:
    """The HTTP status in an error of aiohttp or botocore."""
    response = getattr(error, 'response', None)
    status = response.get('ResponseMetadata', {}).get('HTTPStatusCode') if isinstance(response, dict) else None
    return next((code for code in (status, getattr(error, 'status', None)) if isinstance(code, int)), None)


def _reason(error: Exception) -> str:
    said = ' '.join(str(error).split())
    return f'{type(error).__name__}: {said}'[:200] if said else type(error).__name__


# ---------------------------------------------------------------------------------------------------------------------
# The cache


class Cache:
    """Files fetched from elsewhere, in a folder that all processes of a machine share.

    folder: made when it is needed; None for t2t-vit/shards in the user's own cache. max_bytes: what the files may take
    together. patience: seconds without an answer after which fetching is given up. sharers: how many processes of this
    machine fetch ahead of need, each what half of an equal part of `max_bytes` has room for.
    """

    def __init__(self, folder: str | os.PathLike | None = None, *, max_bytes: float = 100e9, patience: float = 300,
                 sharers: int = 1):
        users = os.path.expanduser(os.environ.get('XDG_CACHE_HOME') or '~/.cache')
        if users.startswith('~'):  # the user of a container may have no home
            users = tempfile.gettempdir()
        self.folder = Path(os.path.expanduser(folder or os.path.join(users, 't2t-vit/shards')))
        self.max_bytes, self.patience = max_bytes, patience
        self.ahead_bytes = max_bytes / 2 / sharers

    @property
    def opening_patience(self) -> float:
        return min(self.patience, OPENING_SECONDS)

    def make(self) -> None:
        """Raises UserError where the folder cannot be written."""
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
        """What has arrived of a file so far; its name says how much it will be."""
        return self.folder / f'{file.key}.{file.bytes}.part'

    def open(self, file: RemoteFile) -> BinaryIO:
        """The file, open for reading; fetched first if it is not there. Raises UserError as `fetch`."""
        while True:
            with contextlib.suppress(FileNotFoundError):
                opened = open(self.path(file), 'rb', buffering=0)
                self.claim(file)
                return opened
            self.fetch(file)

    def claim(self, file: RemoteFile) -> bool:
        """Whether the file is here; then it counts as used now."""
        try:
            os.utime(self.path(file))
        except FileNotFoundError:
            return False
        except OSError:  # another user's, which only they can keep; or the disk has become read-only
            pass
        return True

    def fetch(self, file: RemoteFile, *, ahead: bool = False, stop: threading.Event | None = None) -> bool:
        """Gets a file that is not here yet. Returns whether it is here now: `ahead` of need not, if there is no room.

        Raises:
            UserError: the server has not answered in time, has no such file, or not the one that is expected; or
                the disk is full.
            Stopped: `stop` has been set.
        """
        began = time.monotonic()
        try:
            with self._locked(f'{file.key}.lock', stop):
                if self.claim(file):
                    return True
                with self._locked('room.lock', stop):
                    if not self._make_room(file, even_fresh=not ahead):
                        return False
                    self.part(file).touch()  # from here on others count it
                if self._download(file, Patience(file.url, self.patience, stop, began), stop):
                    return True
                _warn(f'{file.url}: what has arrived does not fit its checksum; fetching it again')
                if self._download(file, Patience(file.url, self.patience, stop), stop):
                    return True
        except OSError as error:  # not the server's: those have been dealt with
            raise UserError(f'--shard-cache: {self.folder} cannot be written ({error.strerror or error}); make room, '
                            'give a smaller --shard-cache-size or another folder') from None
        raise UserError(f'{file.url}: its content is not what its manifest says (SHA-256), twice in a row; '
                        f'{COPY_AGAIN} to the server, or pack it anew')

    def _download(self, file: RemoteFile, patience: Patience, stop: threading.Event | None) -> bool:
        """Fetches a file in pieces, from where the last attempt came to. Returns whether its content is right."""
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
                    # Connections may not live long enough for as much.
                    piece = most = max(MIN_PIECE, piece // 2)
                    continue
                patience.answered()
                target.write(content)
                if stop is not None and stop.is_set():
                    raise Stopped
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
        elif file.tag and describe_remote(file.url, self.patience).tag != file.tag:
            part.unlink()
            raise UserError(f'{file.url} has been replaced on the server since it was looked at first; start again')
        os.replace(part, self.path(file))
        self.claim(file)
        return True

    def _piece(self, file: RemoteFile, start: int, end: int) -> bytes:
        """Bytes start to end of a file, or from start on all, which a server that knows no parts sends at a time."""
        system = _filesystem(file.url)
        try:
            content = system.cat_file(file.url, start=start, end=end)
        except Exception as error:
            if 416 not in map(_status, _causes(error)):
                raise
            content = b''  # the part begins behind the end of the file
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
        """Holds a lock among the processes, and threads, of the machine; it is given back however they end."""
        with open(self.folder / name, 'wb', buffering=0) as lock:
            _locks.add(lock)
            try:
                while True:
                    try:
                        fcntl.flock(lock, fcntl.LOCK_EX | (fcntl.LOCK_NB if stop else 0))
                        break
                    except BlockingIOError:
                        if stop and stop.wait(0.1):
                            raise Stopped from None
                    except OSError as error:  # some file systems of clusters have none
                        raise UserError(f'--shard-cache: {self.folder} is where files cannot be locked '
                                        f'({error.strerror}); name a folder on a disk of this machine') from None
                yield
            finally:
                _locks.discard(lock)

    def _make_room(self, file: RemoteFile, *, even_fresh: bool) -> bool:
        """Removes the files used longest ago until `file` fits, or none is left that may go. Returns whether it fits.

        even_fresh: those used a moment ago may go, too, and if that does not help it fits nevertheless.
        """
        entries = []
        for entry in os.scandir(self.folder):
            with contextlib.suppress(FileNotFoundError):
                # Somebody may have named a folder that holds more than this.
                ours = re.fullmatch(r'[0-9a-f]{64}\.(tar|(\d+)\.part)', entry.name)
                if ours and entry.name != self.part(file).name:
                    status = entry.stat()
                    entries.append((status.st_mtime, int(ours[2] or status.st_size), entry.path))
        total = file.bytes + sum(size for _, size, _ in entries)
        for used, size, path in sorted(entries):
            age = time.time() - used
            if total <= self.max_bytes:
                break
            if path.endswith('.tar') and (even_fresh or age > STALE_SECONDS) or age > ABANDONED_SECONDS:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(path)
                total -= size
        return even_fresh or total <= self.max_bytes


_locks: set[IO] = set()


def _leave_locks() -> None:
    """A lock lasts until all who have its file open close it; what a thread of the parent holds is not for a child."""
    for lock in list(_locks):
        lock.close()
    _locks.clear()


os.register_at_fork(after_in_child=_leave_locks)


class Ahead:
    """Fetches the files that samples will need, in the order of need, in threads of this process.

        with Ahead(cache, files, needed) as used:
            used(64)                      # of `needed`, the next 64 have been used

    needed: int64 [n], the number of the file that each sample is in. As many files are claimed as the cache allows.
    What goes wrong here is not said: whoever needs the file meets it, too.
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
        for thread in self._threads:
            thread.join(timeout=5)

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
            except Stopped:
                return
            except (UserError, OSError):
                waiting = None
            if waiting is not None:
                self._stop.wait(1)

    def _next(self) -> int | None:
        """The file to fetch next; None while those that are to be used soon leave no room."""
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
