"""Images in shards, read by number like files, from this machine or through a cache of remote files.

    dataset = open_shards('/data/imagenet/train', cache)              # written by tools/pack.py
    dataset = open_shards('s3://bucket/imagenet/train', cache)        # the same from an object store
    dataset = open_shards('/data/laion-{00000..00099}.tar', cache)    # tar files of WebDataset without a manifest

Any image can be read at any time, so epochs, resumes, ranks, workers and evaluation counts are those of image folders.
Remote shards are fetched ahead of need, in an order that uses few at a time.
"""
import bisect
import contextlib
import hashlib
import logging
import os
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import BinaryIO

import numpy as np
from timm.data import ImageNetInfo

from data.base import ImageDataset
from data.decode import ImageError
from data.places import Place, parse_place
from data.shards.cache import Cache, Files, Prefetcher
from data.shards.foreign import NUMBERED, index_shards
from data.shards.manifest import INDEX, MEND, Manifest
from data.shards.remote import RemoteFile, describe_remote, read_remote
from data.shards.tar import BLOCK, parse_header
from utils.errors import UserError

_logger = logging.getLogger(__name__)

# Shards that a process keeps open: twice as many as an order with locality uses, see samplers.
MAX_OPEN = 128


class Shards(ImageDataset):
    """The images of `manifest` in the tar files `files`, in their order there.

    Every process opens its own files, forked or not. Every image is read with the header before it, which must agree
    with the index.
    """

    def __init__(self, where: str, manifest: Manifest, files: Files):
        super().__init__(manifest.classes, manifest.index.target)
        self._is_numbered = manifest.source == NUMBERED
        self.folder = where  # the name of the same attribute of ImageFolder
        self._index, self._files = manifest.index, files
        self._starts = manifest.shard_offsets
        self._first = self._starts[:-1].tolist()
        self._open: OrderedDict[int, BinaryIO] = OrderedDict()

    def __getstate__(self) -> dict:
        return {**self.__dict__, '_open': OrderedDict()}

    def __del__(self):
        for file in self.__dict__.get('_open', {}).values():
            file.close()

    def read_bytes_or_image(self, index: int) -> bytes:
        shard = self._shard(index)
        offset, size = int(self._index.offset[index]), int(self._index.size[index])
        try:
            read = os.pread(self._file(shard).fileno(), BLOCK + size, offset - BLOCK)
        except OSError as error:
            raise ImageError(f'image {self.path(index)}: {error.strerror or error}') from None
        header = parse_header(read[:BLOCK])
        if len(read) < BLOCK + size:
            raise ImageError(f'image {self.path(index)}: the shard ends early; {MEND}')
        if header is None or header.size != size or not _may_be_named(header.name, self._index.name(index)):
            found = f'{header.name[:80]!r} of {header.size:,} bytes' if header else 'no member'
            raise ImageError(f'image {self.path(index)}: there is {found} in its place; {MEND}')
        return read[BLOCK:]

    def path(self, index: int) -> str:
        return f'{self._files.names[self._shard(index)]}::{self._index.name(index)}'

    def name(self, index: int) -> str:
        return self._index.name(index)

    def _names(self):
        return self._index.name_ends.tobytes(), self._index.names.tobytes()

    def shard_offsets(self) -> np.ndarray | None:
        return self._starts if self._files.remote else None

    def ahead(self, indices: np.ndarray) -> AbstractContextManager[Callable[[int], None]]:
        if not self._files.remote or not len(indices):
            return super().ahead(indices)
        cache, files = self._files.remote
        return Prefetcher(cache, files, np.searchsorted(self._starts, indices.ravel(), 'right') - 1)

    def name_numbers(self, classes: Sequence[str] | None, map_source: str) -> None:
        """Name numbered classes by position in `classes`; without `classes`, name a thousand of them as in ImageNet.

        Numbers stay if one is beyond `classes`. map_source: the owner of `classes`, for the log.
        """
        if not self._is_numbered or len(self.classes) > len(classes or self.classes):
            return
        if classes is None and len(np.unique(self.targets)) == 1000:
            classes, map_source = ImageNetInfo('imagenet-1k').label_names(), 'ImageNet'
        if classes is not None and len(self.classes) <= len(classes):
            _logger.info('%s: its classes are numbers, taken for positions in the class map of %s', self.folder,
                         map_source)
            self.classes = list(classes)

    def _shard(self, index: int) -> int:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return bisect.bisect_right(self._first, index) - 1

    def _file(self, shard: int) -> BinaryIO:
        if shard in self._open:
            self._open.move_to_end(shard)
            return self._open[shard]
        # Files that the cache has removed take space until they are closed.
        for number, file in list(self._open.items()):
            if len(self._open) >= MAX_OPEN or not os.fstat(file.fileno()).st_nlink:
                self._open.pop(number).close()
        self._open[shard] = self._files.open(shard)
        return self._open[shard]


def _may_be_named(found: str, name: str) -> bool:
    """Return whether a header can belong to `name`: it holds long names, or names beyond ASCII, only in part."""
    return found == name or len(os.fsencode(name)) > 99 or not name.isascii()


# ---------------------------------------------------------------------------------------------------------------------
# Opening


def open_shards(place: Place | str, cache: Cache) -> Shards:
    """Return the split in shards at `place`: a folder or address with a manifest, or tar files without one, as a folder
    on this machine or a pattern with braces.

    Raises UserError, before any image is read, for shards that are missing, unreadable, or of another length than in
    their manifest; NotFoundError if there is nothing at an address.
    """
    place = parse_place(place, is_shards=True)
    if place.is_remote:
        cache.make()
    if tars := place.tars_without_manifest():
        return _open_foreign(tars, str(place), cache)
    manifest = Manifest.read(reader(place, cache.opening_patience), str(place))
    if place.is_remote:
        fetched = [RemoteFile(place.join(shard.name), shard.bytes, shard.sha256) for shard in manifest.shards]
        files = Files.fetched(cache, fetched)
        _check_cache(cache, fetched)
    else:
        files = Files([str(place.join(shard.name)) for shard in manifest.shards])
        _check_lengths(files.names, manifest)
    return _log(Shards(str(place), manifest, files))


def open_without_classes(files: Files) -> Shards:
    """Return the images of tar files without a manifest whose classes nobody knows: all targets are -1."""
    dataset = Shards(f'{len(files.names)} tar files', index_shards(files, with_classes=False), files)
    dataset.classes, dataset.targets = [], np.full(len(dataset), -1)
    _logger.info('%s: %d images without classes', dataset.folder, len(dataset))
    return dataset


def reader(place: Place, patience: float) -> Callable[[str], bytes]:
    """Return a function that reads the files of a split by their names, for `Manifest.read`."""
    if place.is_remote:
        return lambda name: read_remote(place.join(name), patience)

    def read(name: str) -> bytes:
        file = place.join(name)
        try:
            return Path(file.path).read_bytes()
        except OSError as error:
            remedy = MEND if name == INDEX else 'give a folder that tools/pack.py has written, or tar files'
            raise UserError(f'{file} cannot be read ({error.strerror}); {remedy}') from None

    return read


def _check_lengths(paths: list[str], manifest: Manifest) -> None:
    """Raise UserError unless every shard is there, with the length in the manifest."""
    wrong = []
    for path, shard in zip(paths, manifest.shards, strict=True):
        try:
            size = os.stat(path).st_size
        except OSError as error:
            wrong.append(f'{path} is missing' if isinstance(error, FileNotFoundError) else f'{path}: {error.strerror}')
            continue
        if size != shard.bytes:
            wrong.append(f'{path} {"ends early" if size < shard.bytes else "is too long"}: {size:,} bytes, '
                         f'{shard.bytes:,} in its manifest')
    if wrong:
        more = f' (and {len(wrong) - 1} more such shards)' if len(wrong) > 1 else ''
        raise UserError(f'{wrong[0]}{more}; {MEND}')


def _check_cache(cache: Cache, files: Sequence[RemoteFile]) -> None:
    largest, total = max(file.bytes for file in files), sum(file.bytes for file in files)
    if largest > cache.max_bytes:
        raise UserError(f'--shard-cache-size {cache.max_bytes / 1e9:g}: a shard takes {largest / 1e9:.3g} GB; '
                        'give room for 64 of them at least, or for all')
    if min(total, 64 * largest) > cache.max_bytes:
        in_use = f', 64 of them, as an epoch has in use at a time, {64 * largest / 1e9:.3g}' if len(files) > 64 else ''
        _logger.warning('--shard-cache-size %g: all shards take %.3g GB%s; some will be fetched more than once',
                        cache.max_bytes / 1e9, total / 1e9, in_use)


def _log(dataset: Shards) -> Shards:
    _logger.info('%s: %d images of %d classes in %d shards', dataset.folder, len(dataset), len(dataset.classes),
                 len(dataset._first))
    return dataset


# ---------------------------------------------------------------------------------------------------------------------
# Tar files without a manifest


def _open_foreign(tars: list[Place], where: str, cache: Cache) -> Shards:
    """Read the headers of tar files once; their index is kept in the cache's folder."""
    if tars[0].is_remote:
        remote = [describe_remote(tar, cache.opening_patience) for tar in tars]
        _check_cache(cache, remote)
        files = Files.fetched(cache, remote)
        marks = [f'{file.url}\n{file.bytes}\n{file.tag}' for file in remote]
    else:
        files = Files([tar.path for tar in tars])
        marks = [_mark(path) for path in files.names]
    kept = cache.folder / 'scans' / hashlib.sha256('\n'.join(marks).encode('utf-8', 'surrogateescape')).hexdigest()
    with contextlib.suppress(UserError):
        return _log(Shards(where, Manifest.read(reader(Place(str(kept)), 0), str(kept)), files))
    manifest = index_shards(files)
    try:
        kept.mkdir(parents=True, exist_ok=True)
        manifest.write(kept)
    except FileNotFoundError:  # another job is writing the same, and has renamed the file
        pass
    except OSError as error:
        _logger.warning('%s cannot be written (%s); the shards will be scanned at every start', kept,
                        error.strerror)
    return _log(Shards(where, manifest, files))


def _mark(path: str) -> str:
    try:
        status = os.stat(path)
    except OSError as error:
        raise UserError(f'{path}: {error.strerror}; check the path, or the numbers in its braces') from None
    return f'{os.path.abspath(path)}\n{status.st_size}\n{status.st_mtime_ns}'
