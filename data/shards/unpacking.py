"""Unpack shards into class folders."""
import logging
import os
from pathlib import Path

from data.shards.packing import _check_room, _full_disk_explained
from data.shards.plan import Source
from utils.errors import UserError
from utils.parallel import in_processes

_logger = logging.getLogger(__name__)


CHUNK = 500
"""Files that one process writes before it takes the next ones."""


def unpack(source: Source, out: Path, *, jobs: int) -> int:
    """Writes the images of `source` as files into class folders in `out`; returns how many there are.

    They come into a hidden folder beside it, which is renamed when all are there; started again, it goes on.
    Raises UserError if `out` is there without all of them, or if there is not enough room.
    """
    if out.exists():
        if not all(_is_whole(out / name, size) for name, size in zip(source.names, source.size, strict=True)):
            raise UserError(f'{out} is there already, without all of the images; name another folder, or remove it')
        _logger.info('%s: unpacked already', out)
        return len(source.dataset)
    partial = out.with_name(f'.{out.name}.partial')
    with _full_disk_explained(out):
        for name in source.dataset.classes:
            (partial / name).mkdir(parents=True, exist_ok=True)
        written = sum(entry.stat().st_size for name in source.dataset.classes for entry in os.scandir(partial / name))
        _check_room(partial, float(source.size.sum() - written))
        chunks = [range(first, min(first + CHUNK, len(source.dataset)))
                  for first in range(0, len(source.dataset), CHUNK)]
        for _ in in_processes(_Unpacker(source, partial), chunks, jobs=jobs, total=len(source.dataset), desc=out.name):
            pass
        os.sync()
        partial.rename(out)
    return len(source.dataset)


def _is_whole(path: Path, size: int) -> bool:
    return path.exists() and path.stat().st_size == size


class _Unpacker:
    def __init__(self, source: Source, folder: Path):
        self.source, self.folder = source, folder

    def __call__(self, chunk: range, tick) -> None:
        with _full_disk_explained(self.folder):
            for index in chunk:
                path = self.folder / self.source.names[index]
                size = int(self.source.size[index])
                if not _is_whole(path, size):
                    temporary = path.with_name(f'.{path.name}.tmp')
                    try:
                        temporary.write_bytes(self.source.dataset.read_bytes_or_image(index))
                        temporary.replace(path)
                    finally:
                        temporary.unlink(missing_ok=True)
                tick(1, size)
