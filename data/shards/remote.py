"""Files that are somewhere else, by http(s), S3 or another of SCHEMES: fetched whole into a folder of this machine.

    cache = Cache()
    file = cache.open(RemoteFile('https://host/imagenet/train/shard-000000.tar', bytes, sha256))

One process of a machine fetches a file, the others wait for it (flock). It is fetched in pieces: a connection that
drops costs a piece, a server that is away costs the time it is away, up to `patience` seconds. What has arrived is
checked against its length and its SHA-256 before anybody sees it. Beyond `max_bytes` the files go that were used
longest ago; a process that has such a file open keeps it, another one fetches it again.
"""
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
from utils.errors import UserError

_logger = logging.getLogger(__name__)

NEEDS = {'http': 'aiohttp', 'https': 'aiohttp', 's3': 's3fs', 'gs': 'gcsfs', 'gcs': 'gcsfs', 'az': 'adlfs',
         'abfs': 'adlfs'}

PAUSES = (0.5, 1, 2, 4, 8, 15)
"""Seconds between attempts; the last one stays."""

class RemoteFile(NamedTuple):
    """An address and what is known of the file there. tag: of a file without SHA-256, what changes when it changes."""
    place: Place
    bytes: int
    sha256: str = ''
    tag: str = ''

    @property
    def url(self) -> str:
        return self.place.path

    @property
    def key(self) -> str:
        """The file's name in a cache: equal contents have the same, wherever they come from."""
        return self.sha256 or hashlib.sha256(f'{self.url}\n{self.bytes}\n{self.tag}'.encode()).hexdigest()


class NotFoundError(UserError):
    """There is nothing at an address, or nothing for this user."""


class FetchStopped(Exception):
    """The fetching has been called off."""


def read_remote(place: Place, patience: float) -> bytes:
    """Return the content of a small file. Raises NotFoundError, or UserError after `patience` seconds."""
    return _persist(lambda: filesystem(place).cat_file(place.path), place.path, patience)


def describe_remote(place: Place, patience: float) -> RemoteFile:
    """Return a remote file with its length and tag. Raises as `read_remote`."""
    info = _persist(lambda: filesystem(place).info(place.path), place.path, patience)
    if not isinstance(info.get('size'), int):
        raise UserError(f'{place}: the server does not say how long the file is; put the shards on one that does')
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
            # Its own limit is five minutes for a whole request; a slow line is none that hangs.
            options['headers'] = {'Accept-Encoding': 'identity'}  # parts of a compressed answer would be of no use
            timeout = aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=30)
            options['client_kwargs'] = {'timeout': timeout, 'trust_env': True}  # proxies, as every other program has it
        elif scheme == 's3':
            options['config_kwargs'] = {'connect_timeout': 10, 'read_timeout': 30}
        return fsspec.filesystem(scheme, **options)
    except ImportError:
        package = '-r requirements-shards.txt' if NEEDS[scheme] in ('aiohttp', 's3fs') else NEEDS[scheme]
        raise UserError(f'{place}: to read this, {NEEDS[scheme]} is missing; pip install {package}') from None


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
        warn_rarely(f'{self._url}: {_reason(error)}; trying again, for {waited:.0f} s now')
        if self._stop.wait(pause):
            raise FetchStopped


def _persist(request: Callable, url: str, seconds: float):
    """What `request()` returns, in the end."""
    patience = Patience(url, seconds)
    while True:
        try:
            return request()
        except Exception as error:
            patience.failed(error)


_last_warning = [-np.inf]


def warn_rarely(message: str) -> None:
    """A warning, unless the last one is a moment old: when a server is away all that fetch have the same to say."""
    if time.monotonic() - _last_warning[0] < 2:
        return
    _last_warning[0] = time.monotonic()
    if multiprocessing.parent_process() is None:
        _logger.warning(message)
    elif sys.__stderr__:  # the locks of the console may have been held by another thread when this one was forked
        with contextlib.suppress(OSError):
            os.write(sys.__stderr__.fileno(), f'warning: {message}\n'.encode(errors='replace'))


def causes_of(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or getattr(error, 'os_error', None)


def _explain_for_good(error: Exception, url: str) -> UserError | None:
    """The UserError for what another attempt will not change; None for what it may."""
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
    # fsspec says "not found" of a server that does not answer, too; then the cause tells.
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
    """The HTTP status in an error of aiohttp or botocore."""
    response = getattr(error, 'response', None)
    status = response.get('ResponseMetadata', {}).get('HTTPStatusCode') if isinstance(response, dict) else None
    return next((code for code in (status, getattr(error, 'status', None)) if isinstance(code, int)), None)


def _reason(error: Exception) -> str:
    said = ' '.join(str(error).split())
    return f'{type(error).__name__}: {said}'[:200] if said else type(error).__name__


# ---------------------------------------------------------------------------------------------------------------------
# The cache
