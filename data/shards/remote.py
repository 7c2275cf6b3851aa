"""Remote files, by http(s), S3 or an object store: requests that are repeated until they succeed or cannot."""
import contextlib
import hashlib
import logging
import multiprocessing
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from data.places import Place
from utils.console import printable
from utils.errors import UserError

_logger = logging.getLogger(__name__)

NEEDS = {'http': 'aiohttp', 'https': 'aiohttp', 's3': 's3fs', 'gs': 'gcsfs', 'gcs': 'gcsfs', 'az': 'adlfs',
         'abfs': 'adlfs'}

# A larger description of shards is refused before it fills the memory: 1 GiB is far more than any data set needs.
MAX_SMALL = 1 << 30
# Bytes of an answer that are read at once.
CHUNK = 1 << 20

# Seconds between attempts; the last one is repeated.
PAUSES = (0.5, 1, 2, 4, 8, 15)


class RemoteFile(NamedTuple):
    """A remote file. tag: of a file without SHA-256, a value that changes with the file."""
    place: Place
    bytes: int
    sha256: str = ''
    tag: str = ''

    @property
    def url(self) -> str:
        return self.place.path

    @property
    def key(self) -> str:
        """The file's name in a cache; equal contents have the same name."""
        return self.sha256 or hashlib.sha256(f'{self.url}\n{self.bytes}\n{self.tag}'.encode()).hexdigest()


class NotFoundError(UserError):
    """There is nothing at an address, or this user may not read it."""


class FetchStopped(Exception):
    """The caller has stopped the fetching."""


def read_remote(place: Place, patience: float) -> bytes:
    """Return the content of a small file. Raises NotFoundError, or UserError after `patience` seconds."""
    content = _persist(lambda: read_bytes(place, limit=MAX_SMALL), place.path, patience)
    if len(content) > MAX_SMALL:
        raise UserError(f'{place}: more than {MAX_SMALL >> 20} MiB, which no file of this kind has; check the address')
    return content


def read_bytes(place: Place, start: int | None = None, end: int | None = None, *, limit: int) -> bytes:
    """Return bytes start to end of a file, or whatever else the server answers, but little more than `limit` bytes."""
    system = filesystem(place)
    headers = {} if start is None or end is None else {'Range': f'bytes={start}-{end - 1}'}
    if place.scheme == 's3':
        return _read_s3(system, place.path, headers, limit)
    if place.scheme not in ('http', 'https'):  # their libraries read an answer of any length
        return system.cat_file(place.path, start=start or 0, end=limit + 1 if end is None else end)
    content = bytearray()
    # A stream, since cat_file reads an answer of any length. A size spares a request for it.
    with system.open(place.path, block_size=0, size=1, headers=system.kwargs['headers'] | headers) as answer:
        while len(content) <= limit and (chunk := answer.read(CHUNK)):
            content += chunk
    return bytes(content)


def _read_s3(system, path: str, headers: dict[str, str], limit: int) -> bytes:
    """As read_bytes: s3fs's own cat_file reads an answer of any length."""
    async def read() -> bytes:
        bucket, key, _ = system.split_path(path)
        answer = (await system._call_s3('get_object', Bucket=bucket, Key=key, **headers))['Body']
        content = bytearray()
        try:
            while len(content) <= limit and (chunk := await answer.read(CHUNK)):
                content += chunk
        finally:
            answer.close()
        return bytes(content)

    from fsspec.asyn import sync
    return sync(system.loop, read)


def describe_remote(place: Place, patience: float) -> RemoteFile:
    """Return a remote file with its length and tag. Raises as `read_remote`."""
    info = _persist(lambda: filesystem(place).info(place.path), place.path, patience)
    if not isinstance(info.get('size'), int):
        raise UserError(f'{place}: the server does not report the length of the file; use another server')
    tag = next((str(info[name]) for name in ('ETag', 'etag', 'Last-Modified', 'LastModified', 'mtime') if name in info),
               '')
    return RemoteFile(place, info['size'], tag=tag)


def filesystem(place: Place):
    """Return fsspec's file system for an address, one for each process: connections do not survive a fork."""
    scheme = place.scheme
    options: dict[str, Any] = {}
    try:
        import fsspec
        if scheme in ('http', 'https'):
            import aiohttp
            # aiohttp allows a request five minutes in all; a slow connection is no error.
            options['headers'] = {'Accept-Encoding': 'identity'}  # parts of a compressed answer are useless
            timeout = aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=30)
            options['client_kwargs'] = {'timeout': timeout, 'trust_env': True}  # proxies of the environment
        elif scheme == 's3':
            options['config_kwargs'] = {'connect_timeout': 10, 'read_timeout': 30}
        return fsspec.filesystem(scheme, **options)
    except ImportError:
        package = '-r requirements-shards.txt' if NEEDS[scheme] in ('aiohttp', 's3fs') else NEEDS[scheme]
        raise UserError(f'{place}: to read this, {NEEDS[scheme]} is missing; pip install {package}') from None


class Patience:
    """Pauses and warnings after failed requests to `url`, until `seconds` without an answer.

    since: when the wait for an answer began, if not with the first failure.
    """

    def __init__(self, url: str, seconds: float, stop: threading.Event | None = None, since: float | None = None):
        self._url, self._seconds, self._stop = url, seconds, stop or threading.Event()
        self._failures, self._began = 0, since

    def answered(self) -> None:
        self._failures, self._began = 0, None

    def failed(self, error: Exception) -> None:
        """Wait before another attempt. Raises UserError for a permanent failure, or after too long a wait."""
        if isinstance(error, UserError | MemoryError):
            raise error
        if explained := _explain_permanent(error, self._url):
            raise explained from None
        now = time.monotonic()
        self._began = now if self._began is None else self._began
        pause = PAUSES[min(self._failures, len(PAUSES) - 1)]
        waited = now - self._began
        if waited + pause > self._seconds:
            raise UserError(f'{self._url}: no answer for {waited:.0f} s ({_reason(error)}); check the address, the '
                            'server and the network, then start again') from None
        self._failures += 1
        warn_rarely(f'{self._url}: {_reason(error)}; trying again, for {waited:.0f} s now')
        if self._stop.wait(pause):
            raise FetchStopped


def _persist(request: Callable, url: str, seconds: float):
    """Return what `request()` returns once it succeeds."""
    patience = Patience(url, seconds)
    while True:
        try:
            return request()
        except Exception as error:
            patience.failed(error)


_last_warning = [-np.inf]


def warn_rarely(message: str) -> None:
    """Log a warning, unless the last is recent: all threads that fetch warn when a server is away."""
    if time.monotonic() - _last_warning[0] < 2:
        return
    _last_warning[0] = time.monotonic()
    if multiprocessing.parent_process() is None:
        _logger.warning(message)
    elif sys.__stderr__:  # another thread may have held the console's locks at the fork
        with contextlib.suppress(OSError):
            os.write(sys.__stderr__.fileno(), printable(f'warning: {message}\n').encode(errors='replace'))


def causes_of(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or getattr(error, 'os_error', None)


def _explain_permanent(error: Exception, url: str) -> UserError | None:
    """Return a UserError for a permanent failure; None if a retry may help."""
    causes = list(causes_of(error))
    status = next(filter(None, map(http_status, causes)), None)
    names = {type(cause).__name__ for cause in causes}
    if status in (408, 425, 429) or (status is not None and status >= 500):
        return None
    if any(isinstance(cause, socket.gaierror) and cause.errno == socket.EAI_NONAME for cause in causes):
        return UserError(f'{url}: there is no such server; check the address')
    if 'NoCredentialsError' in names or 'PartialCredentialsError' in names:
        return UserError(f'{url}: no credentials were found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a '
                         'profile of ~/.aws')
    # fsspec also reports "not found" for a server that does not answer; then the cause tells.
    is_missing = isinstance(error, FileNotFoundError) and (status is not None or error.__cause__ is None)
    if status in (404, 410) or (is_missing and status is None) or 'NoSuchBucket' in str(error):
        return NotFoundError(f'{url}: not found')
    if status in (401, 403) or isinstance(error, PermissionError):
        return NotFoundError(f'{url}: access is refused{f" ({status})" if status else ""}')
    if status is not None and 400 <= status < 500:
        return UserError(f'{url}: refused by the server ({status}); check the address')
    if isinstance(error, ValueError | TypeError | AttributeError):
        return UserError(f'{url}: {_reason(error)}; check the address')
    return None


def http_status(error: BaseException) -> int | None:
    """Return the HTTP status in an error of aiohttp or botocore."""
    response = getattr(error, 'response', None)
    status = response.get('ResponseMetadata', {}).get('HTTPStatusCode') if isinstance(response, dict) else None
    return next((code for code in (status, getattr(error, 'status', None)) if isinstance(code, int)), None)


def _reason(error: Exception) -> str:
    said = ' '.join(str(error).split())
    return f'{type(error).__name__}: {said}'[:200] if said else type(error).__name__
