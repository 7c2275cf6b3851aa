"""Images in shards: read by number like files, from this machine or through a cache of files from elsewhere.

    dataset = open_shards('/data/imagenet/train', cache)              # what tools/pack.py has written
    dataset = open_shards('s3://bucket/imagenet/train', cache)        # the same from elsewhere
    dataset = open_shards('/data/laion-{00000..00099}.tar', cache)    # tar files of WebDataset without a manifest

Whoever can read any image at any time needs no stream: epochs, resumes, ranks, workers and evaluation counts are those
of image folders. What lies elsewhere is fetched shard by shard, ahead of need, in an order that needs few at a time.
"""
import bisect
import contextlib
import hashlib
import json
import logging
import os
import re
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from timm.data import ImageNetInfo
from timm.utils.misc import natural_key

from data.base import ImageDataset
from data.classes import name_some
from data.decode import EXTENSIONS, ImageError
from data.shards.manifest import FORMAT, INDEX, MANIFEST, MEND, Index, Manifest, Shard, key_of
from data.shards.remote import Ahead, Cache, RemoteFile, describe_remote, read_remote, scheme_of
from data.shards.tar import BLOCK, Member, parse_header, refusal, scan_tar
from utils.console import progress_bar
from utils.errors import UserError

_logger = logging.getLogger(__name__)

PREFIX = 'wds:'
"""What a data set's path begins with to say that it consists of shards."""

MAX_OPEN = 128
"""Shards that a process keeps open: twice as many as an order with locality has in use, see samplers."""

NUMBERED = 'tar files without a manifest, whose classes are numbers'
"""The source in a manifest of such: the names of its classes are no names."""

MAX_LABEL = 1 << 20
"""Longer labels, in bytes, are refused."""


class Files(NamedTuple):
    """The tar files of a split: their names for messages, and what has to be fetched, and where to.

    remote: None for files of this machine, whose names are their paths.
    """
    names: list[str]
    remote: tuple[Cache, list[RemoteFile]] | None = None

    def open(self, number: int) -> BinaryIO:
        if self.remote is None:
            return open(self.names[number], 'rb', buffering=0)
        cache, files = self.remote
        return cache.open(files[number])


def remote_files(cache: Cache, files: list[RemoteFile]) -> Files:
    return Files([file.url for file in files], (cache, files))


class Shards(ImageDataset):
    """The images that `manifest` has found in the tar files `files`, in their order there.

    A process opens what it reads, wherever it comes from: it may be forked or started anew. Every image is read with
    the header before it, which has to be that of the index.
    """

    def __init__(self, where: str, manifest: Manifest, files: Files):
        super().__init__(manifest.classes, manifest.index.target)
        self._is_numbered = manifest.source == NUMBERED
        self.folder = where  # as the messages for image folders call it
        self._index, self._files = manifest.index, files
        self._starts = manifest.starts
        self._first = self._starts[:-1].tolist()
        self._open: OrderedDict[int, BinaryIO] = OrderedDict()

    def __getstate__(self) -> dict:
        return {**self.__dict__, '_open': OrderedDict()}

    def __del__(self):
        for file in self.__dict__.get('_open', {}).values():
            file.close()

    def stored(self, index: int) -> bytes:
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

    def starts(self) -> np.ndarray | None:
        return self._starts if self._files.remote else None

    def ahead(self, indices: np.ndarray) -> AbstractContextManager[Callable[[int], None]]:
        if not self._files.remote or not len(indices):
            return super().ahead(indices)
        cache, files = self._files.remote
        return Ahead(cache, files, np.searchsorted(self._starts, indices.ravel(), 'right') - 1)

    def name_numbers(self, classes: Sequence[str] | None, map_source: str) -> None:
        """Gives names to classes that are mere numbers: those of `classes` at their positions; where there are no
        `classes`, to a thousand numbers those of ImageNet.

        map_source: whose class map `classes` is. One number beyond it, and all stays as it is.
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
        # Files that the cache has removed take room until they are closed.
        for number, file in list(self._open.items()):
            if len(self._open) >= MAX_OPEN or not os.fstat(file.fileno()).st_nlink:
                self._open.pop(number).close()
        self._open[shard] = self._files.open(shard)
        return self._open[shard]


def _may_be_named(found: str, name: str) -> bool:
    """Whether a header's own name can be that of `name`: longer ones, or such as are not ASCII, it has only in part."""
    return found == name or len(os.fsencode(name)) > 99 or not name.isascii()


# ---------------------------------------------------------------------------------------------------------------------
# Opening


def is_pattern(path: str) -> bool:
    """Whether a path names tar files rather than a folder of shards."""
    return path.endswith('.tar') or '{' in path


def has_manifest(folder: str) -> bool:
    """Whether a folder of this machine is a split that tools/pack.py has written: others have manifests, too."""
    try:
        with open(os.path.join(folder, MANIFEST), 'rb') as file:
            return FORMAT.encode() in file.read(4096) or bool(list_tars(folder))
    except OSError:
        return False


def list_tars(folder: str) -> list[str]:
    """The tar files in a folder of this machine, in natural order; none where it is no folder."""
    try:
        names = [name for name in os.listdir(folder) if name.endswith('.tar') and not name.startswith('.')]
    except OSError:
        return []
    return [os.path.join(folder, name) for name in sorted(sorted(names), key=natural_key)]


def open_shards(path: str, cache: Cache) -> Shards:
    """The split in shards at `path`: a folder or an address with a manifest, or tar files without one, as a folder of
    this machine or a pattern with braces.

    Raises UserError, before any image is read, for what is missing, of another length than its manifest says, or not
    to be read; Gone where there is nothing at an address.
    """
    remote = bool(scheme_of(path))
    if remote:
        cache.make()
    path = path.removeprefix('file://')
    if is_pattern(path):
        return _open_foreign(expand(path), path, cache)
    if not remote:
        if not has_manifest(path) and (tars := list_tars(path)):
            return _open_foreign(tars, path, cache)
    path = path.rstrip('/') or path
    manifest = Manifest.read(reader(path, cache.opening_patience), path)
    addresses = [f'{path}/{shard.name}' for shard in manifest.shards]
    if remote:
        fetched = [RemoteFile(address, shard.bytes, shard.sha256)
                   for address, shard in zip(addresses, manifest.shards, strict=True)]
        files = remote_files(cache, fetched)
        _check_cache(cache, fetched)
    else:
        _check_lengths(addresses, manifest)
        files = Files(addresses)
    return _reported(Shards(path, manifest, files))


def reader(path: str, patience: float) -> Callable[[str], bytes]:
    """What reads the files of a split by their names, for `Manifest.read`."""
    if scheme_of(path):
        return lambda name: read_remote(f'{path.rstrip("/")}/{name}', patience)

    def read(name: str) -> bytes:
        file = os.path.join(path, name)
        try:
            return Path(file).read_bytes()
        except OSError as error:
            remedy = MEND if name == INDEX else 'give a folder that tools/pack.py has written, or tar files'
            raise UserError(f'{file} cannot be read ({error.strerror}); {remedy}') from None

    return read


def _check_lengths(paths: list[str], manifest: Manifest) -> None:
    """Every shard is there, and as long as the manifest says."""
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


def _reported(dataset: Shards) -> Shards:
    _logger.info('%s: %d images of %d classes in %d shards', dataset.folder, len(dataset), len(dataset.classes),
                 len(dataset._first))
    return dataset


def expand(pattern: str) -> list[str]:
    """'a-{08..10}.tar' → a-08.tar, a-09.tar, a-10.tar; '{a,b}.tar' → a.tar, b.tar; braces may come more than once."""
    match = re.search(r'\{([^{}]*)\}', pattern)
    if not match:
        if '{' in pattern or '}' in pattern:
            raise UserError(f'{pattern}: a brace is left open; write train-{{000000..000146}}.tar')
        return [pattern]
    if ends := re.fullmatch(r'(\d+)\.\.(\d+)', match[1]):
        first, last, width = int(ends[1]), int(ends[2]), len(ends[1])
        if not 0 <= last - first < 1_000_000:
            raise UserError(f'{pattern}: {match[0]} is no range of at most a million, from the smaller to the larger')
        choices = [f'{number:0{width}d}' for number in range(first, last + 1)]
    else:
        choices = match[1].split(',')
    # The inner ones come first, so that of '{a,{b,c}}' there is an a for each of b and c.
    return list(dict.fromkeys(
        path for choice in choices for path in expand(pattern[:match.start()] + choice + pattern[match.end():])))


# ---------------------------------------------------------------------------------------------------------------------
# Tar files without a manifest


def _open_foreign(paths: list[str], where: str, cache: Cache) -> Shards:
    """Reads the headers of tar files from elsewhere, once: what they say is kept in the cache's folder."""
    if scheme_of(paths[0]):
        remote = [describe_remote(path, cache.opening_patience) for path in paths]
        _check_cache(cache, remote)
        files = remote_files(cache, remote)
        marks = [f'{file.url}\n{file.bytes}\n{file.tag}' for file in remote]
    else:
        files = Files(paths)
        marks = [_mark(path) for path in paths]
    kept = cache.folder / 'scans' / hashlib.sha256('\n'.join(marks).encode('utf-8', 'surrogateescape')).hexdigest()
    with contextlib.suppress(UserError):
        return _reported(Shards(where, Manifest.read(reader(str(kept), 0), str(kept)), files))
    manifest = index_shards(files)
    try:
        kept.mkdir(parents=True, exist_ok=True)
        manifest.write(kept)
    except FileNotFoundError:  # another job writes the same at this moment, and has renamed the file
        pass
    except OSError as error:
        _logger.warning('%s cannot be written (%s); the shards will be looked through at every start', kept,
                        error.strerror)
    return _reported(Shards(where, manifest, files))


def _mark(path: str) -> str:
    try:
        status = os.stat(path)
    except OSError as error:
        raise UserError(f'{path}: {error.strerror}; check the path, or the numbers in its braces') from None
    return f'{os.path.abspath(path)}\n{status.st_size}\n{status.st_mtime_ns}'


def index_shards(files: Files) -> Manifest:
    """A manifest of tar files in WebDataset's manner, by their headers: images with their class as .cls, or in a .json.

    Classes are names, in natural order, or numbers from 0; see `Shards.name_numbers` for what those stand for.
    Raises UserError as `scan_tar`, for an image without a class, and for classes that are partly names.
    """
    shards, members, labels = [], [], []
    with progress_bar(desc='looking through shards', total=len(files.names), unit='shard') as bar:
        for number, where in enumerate(files.names):
            try:
                with files.open(number) as file:
                    found = _index_tar(file, where)
                    size = file.seek(0, os.SEEK_END)
            except OSError as error:
                raise UserError(f'{where} cannot be read ({error.strerror or error}); check the file') from None
            shards.append(Shard(_plain_name(number), size, len(found), ''))
            members += [member for member, _ in found]
            labels += [label for _, label in found]
            bar.update()
    if not members:
        raise UserError(f'{files.names[0]}: no images ({", ".join(EXTENSIONS)}) with a class (.cls or .json) in it'
                        f'{f" and {len(shards) - 1} more" if len(shards) > 1 else ""}')
    kinds = {type(label) for label in labels}
    if len(kinds) > 1:
        names = sorted({label for label in labels if isinstance(label, str)})
        raise UserError(f'{files.names[0]}: classes are partly numbers, partly names ({name_some(names)}); '
                        'pack the images again with either')
    if kinds == {int}:
        classes, targets, source = [str(number) for number in range(max(labels) + 1)], labels, NUMBERED
    else:
        source = 'tar files without a manifest'
        classes = sorted(sorted(set(labels)), key=natural_key)
        position = {name: target for target, name in enumerate(classes)}
        targets = [position[label] for label in labels]
    return Manifest(classes, shards, Index.of(members, targets), source)


def _plain_name(number: int) -> str:
    """A name that a manifest may hold: those of files from elsewhere may be anything, and come twice."""
    return f'{number:06d}.tar'


def _index_tar(file: BinaryIO, where: str) -> list[tuple]:
    """The images of a tar file with their labels: [(Member, int or str)]."""
    found, key = [], ''
    done: set[str] = set()
    group: dict[str, Member] = {}
    for member in (*scan_tar(file, where), None):
        next_key, ending = key_of(member.name) if member else ('', '')
        if member and not (ending and os.path.basename(next_key)):  # a hidden file, or without ending, is of no sample
            continue
        if next_key != key:
            if image := _image_of(group, where):
                found.append((image, _label_of(group, file, where, image)))
            done.add(key)
            if member and next_key in done:
                raise refusal(where, member.name, 'apart from the others of its key')
            key, group = next_key, {}
        if member:
            group[ending.lower()] = member
    return found


def _image_of(group: dict, where: str):
    images = [member for ending, member in group.items() if f'.{ending}' in EXTENSIONS]
    if len(images) > 1:
        raise UserError(f'{where}: {images[0].name!r} and {images[1].name!r}: two images of one key; keep one')
    return images[0] if images else None


def _label_of(group: dict, file: BinaryIO, where: str, image) -> int | str:
    """The class of a sample, from its .cls or its .json; a number where it looks like one."""
    label = None
    for ending in ('cls', 'json'):
        if ending in group and label is None:
            member = group[ending]
            if member.size > MAX_LABEL:
                raise refusal(where, member.name, f'{member.size:,} bytes long, which is no label')
            file.seek(member.offset)
            try:
                text = file.read(member.size).decode().strip()
                if ending == 'json':
                    content = json.loads(text)
                    text = next((content[name] for name in ('cls', 'label', 'class') if name in content), '')
            except (ValueError, TypeError, RecursionError):
                raise UserError(f'{where}: {member.name!r} is no label: a number or a name is expected in a .cls, '
                                '{"label": …} in a .json') from None
            label = str(text) if isinstance(text, str | int) and str(text).isprintable() and str(text) else None
    if label is None:
        raise UserError(f'{where}: {image.name!r} has no class, neither as .cls nor as "label" in a .json; '
                        'training and evaluation need one')
    if not label.isdecimal():
        return label
    if len(label) > 100 or int(label) >= 1 << 20:
        raise UserError(f'{where}: {image.name!r} is of class {label[:20]}; numbers of classes begin with 0')
    return int(label)
