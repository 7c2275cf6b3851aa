"""Shards for tests, and an object store on loopback: a folder by HTTP with ranges, and as much of S3 as reading takes.

    write_shards(folder, samples, ['ant', 'bee'], samples_per_shard=4)

    with Store(folder) as store:
        store.drop_after = 100_000      # bytes of a content after which a connection drops
        open_eval('', f'wds:{store.url}')

The store fails on demand: `drop_after`; `seconds` that each answer takes; `lies`, names whose content has a wrong byte;
`status`, which is all it answers; `ranges`, whether it knows parts of a file; `leave()` and `come_back()`.
"""
import http.server
import os
import re
import threading
import time
import urllib.parse
from collections.abc import Iterable, Sequence
from pathlib import Path

from data.shards.manifest import Index, Manifest, ShardWriter

os.environ.setdefault('no_proxy', '127.0.0.1')


class Store:

    def __init__(self, folder: Path):
        self.folder = folder
        self.drop_after, self.seconds, self.status, self.ranges, self.lies = None, 0, None, True, set()
        self.requests = []
        self._port = 0

    def __enter__(self) -> 'Store':
        self.come_back()
        return self

    def __exit__(self, *exception) -> None:
        self.leave()

    def come_back(self) -> None:
        self._server = http.server.ThreadingHTTPServer(('127.0.0.1', self._port), _Handler)
        self._server.store, self._server.daemon_threads = self, True
        self._port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def leave(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def url(self) -> str:
        return f'http://127.0.0.1:{self._port}'

    def fetched(self, ending: str = '.tar') -> list[str]:
        """The names of the files, in the order in which their first bytes were asked for."""
        return [name for name, start in self.requests if name.endswith(ending) and start == 0]


class _Handler(http.server.BaseHTTPRequestHandler):

    def do_HEAD(self):
        self._answer()

    def do_GET(self):
        self._answer()

    def log_message(self, *_):
        pass

    def _answer(self) -> None:
        store = self.server.store
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path).lstrip('/')
        file = store.folder / path
        time.sleep(store.seconds)
        if store.status or not file.is_file():
            return self._fail(store.status or 404)
        size = file.stat().st_size
        asked = re.fullmatch(r'bytes=(\d+)-(\d+)', self.headers.get('Range', ''))
        is_part = asked and store.ranges
        if is_part and int(asked[1]) >= size:
            return self._fail(416)
        start, end = (int(asked[1]), min(int(asked[2]) + 1, size)) if is_part else (0, size)
        with open(file, 'rb') as opened:
            opened.seek(start)
            content = bytearray(opened.read(end - start))
        if file.name in store.lies and start <= 700 < end:
            content[700 - start] ^= 1
        if self.command == 'GET':
            store.requests.append((file.name, start))
        self.send_response(206 if is_part else 200)
        self.send_header('Content-Length', str(end - start))
        self.send_header('ETag', f'"{size}-{file.stat().st_mtime_ns}"')
        self.send_header('Last-Modified', 'Sat, 01 Jan 2000 00:00:00 GMT')
        if is_part:
            self.send_header('Content-Range', f'bytes {start}-{end - 1}/{size}')
        self.end_headers()
        if self.command == 'GET':
            self.wfile.write(content[:store.drop_after])
            self.close_connection = True

    def _fail(self, status: int) -> None:
        code = {404: 'NoSuchKey', 403: 'AccessDenied'}.get(status, 'SlowDown')
        body = f'<?xml version="1.0"?><Error><Code>{code}</Code><Message>no</Message></Error>'.encode()
        self.send_response(status)
        self.send_header('Content-Length', str(len(body)))
        self.end_headers()
        if self.command == 'GET':
            self.wfile.write(body)


def write_shards(folder: str | os.PathLike, samples: Iterable[tuple[str, bytes, int]], classes: Sequence[str], *,
                 samples_per_shard: int, source: str = '') -> Manifest:
    """Writes a whole split from (name, content, target) in the order of its shards, in one process."""
    samples, shards, parts = list(samples), [], []
    Path(folder).mkdir(parents=True, exist_ok=True)
    for first in range(0, len(samples), samples_per_shard):
        with ShardWriter(folder, len(shards)) as writer:
            for sample in samples[first:first + samples_per_shard]:
                writer.add(*sample)
        shards.append(writer.shard)
        parts.append(writer.index)
    manifest = Manifest(list(classes), shards, Index.joined(parts), source)
    manifest.write(folder)
    return manifest
