"""Unpack ImageNet's archives into class folders."""
import logging
import os
from pathlib import Path

from data.shards.packing import check_room, explain_full_disk
from data.shards.plan import PackingInput
from utils.errors import UserError
from utils.parallel import in_processes

_logger = logging.getLogger(__name__)

# Files that one process writes before it takes the next ones.
CHUNK = 500


def unpack(images: PackingInput, out: Path, *, jobs: int) -> int:
    """Write `images` as files into class folders in `out`; return how many there are.

    They are written into a hidden folder beside it, which is renamed at the end; another call continues with it.
    Raises UserError if `out` exists and is incomplete, or if there is not enough room.
    """
    count, classes = len(images.dataset), images.dataset.classes
    if out.exists():
        if not all(_is_whole(out / name, size) for name, size in zip(images.names, images.size, strict=True)):
            raise UserError(f'{out} is there already, without all of the images; name another folder, or remove it')
        _logger.info('%s: unpacked already', out)
        return count
    partial = out.with_name(f'.{out.name}.partial')
    with explain_full_disk(out):
        for name in classes:
            (partial / name).mkdir(parents=True, exist_ok=True)
        written = sum(entry.stat().st_size for name in classes for entry in os.scandir(partial / name))
        check_room(partial, float(images.size.sum() - written))
        chunks = [range(first, min(first + CHUNK, count)) for first in range(0, count, CHUNK)]
        for _ in in_processes(_Unpacker(images, partial), chunks, jobs=jobs, total=count, desc=out.name):
            pass
        os.sync()
        partial.rename(out)
    return count


def _is_whole(path: Path, size: int) -> bool:
    return path.exists() and path.stat().st_size == size


class _Unpacker:
    """Writes a chunk of the images, in a process of its own."""

    def __init__(self, images: PackingInput, folder: Path):
        self.images, self.folder = images, folder

    def __call__(self, chunk: range, tick) -> None:
        with explain_full_disk(self.folder):
            for index in chunk:
                path = self.folder / self.images.names[index]
                size = int(self.images.size[index])
                if not _is_whole(path, size):
                    temporary = path.with_name(f'.{path.name}.tmp')
                    try:
                        temporary.write_bytes(self.images.dataset.read_bytes_or_image(index))
                        temporary.replace(path)
                    finally:
                        temporary.unlink(missing_ok=True)
                tick(1, size)
