"""The format of shards, written, read and checked in this one place.

A split is a folder (or an address) with

    manifest.json       classes, counts, source, and bytes and SHA-256 of every other file
    index.npz           offset in its shard, length, class and name of every image
    shard-000000.tar …  per sample the image as KEY.jpg (its own ending) and its class number in ASCII as KEY.cls

The webdataset library reads the shards alone. KEY is the image's path in the packed folder, without its ending and with
'_' for '.' in the file's name, because WebDataset's ending begins at the first dot.
"""
import contextlib
import hashlib
import io
import json
import os
import re
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from data.decode import MAX_BYTES
from data.shards.tar import BLOCK, MAX_NAME, Member, check_name, padded, tar_header
from utils.disk import sync_folder, write_whole
from utils.errors import UserError

FORMAT, VERSION = 't2t-shards', 1
MANIFEST, INDEX = 'manifest.json', 'index.npz'
# Characters that are not allowed in names of classes.
CONTROL = re.compile(r'[\x00-\x1f\x7f]')
# The arrays in index.npz, see `Index`.
COLUMNS = {'offset': '<i8', 'size': '<i8', 'target': '<i4', 'name_ends': '<i8', 'names': '|u1'}
# An index that unpacks to more times its length is refused: offsets differ, and do not compress so well.
MAX_COMPRESSION = 100
MEND = 'copy it again, or see what is wrong with python tools/pack.py --verify'


def shard_name(number: int) -> str:
    return f'shard-{number:06d}.tar'


def member_key(path: str) -> str:
    """Return the key of an image by its path in its split: 'ant/a.1.jpg' → 'ant/a_1'. It may not be unique."""
    folder, name = os.path.split(path)
    return os.path.join(folder, os.path.splitext(name)[0].replace('.', '_'))


def key_of(name: str) -> tuple[str, str]:
    """Return key and ending of a member, by its first dot: 'ant/a.seg.png' → ('ant/a', 'seg.png')."""
    folder, slash, file = name.rpartition('/')
    stem, _, ending = file.partition('.')
    return folder + slash + stem, ending


# ---------------------------------------------------------------------------------------------------------------------
# Manifest and index


class Index:
    """Where the images are, shard after shard.

    offset: int64 [N], of the content in its shard. size: int64 [N], bytes. target: int32 [N].
    names: uint8, all members' names, one after the other. name_ends: int64 [N].
    """

    def __init__(self, offset, size, target, name_ends, names):
        self.offset = np.asarray(offset, np.int64)
        self.size = np.asarray(size, np.int64)
        self.target = np.asarray(target, np.int32)
        self.name_ends = np.asarray(name_ends, np.int64)
        self.names = np.asarray(names, np.uint8)

    @classmethod
    def of(cls, members: Sequence[Member], targets: Sequence[int]) -> 'Index':
        names = [os.fsencode(member.name) for member in members]
        ends = np.cumsum([len(name) for name in names], dtype=np.int64)
        return cls([member.offset for member in members], [member.size for member in members], targets, ends,
                   np.frombuffer(b''.join(names), np.uint8))

    @classmethod
    def joined(cls, parts: Sequence['Index']) -> 'Index':
        """Return the index of several shards, in their order."""
        starts = np.cumsum([0] + [len(part.names) for part in parts])
        ends = [part.name_ends + start for part, start in zip(parts, starts[:-1], strict=True)]
        offset, size, target, names = (np.concatenate([getattr(part, name) for part in parts])
                                       for name in ('offset', 'size', 'target', 'names'))
        return cls(offset, size, target, np.concatenate(ends), names)

    def __len__(self) -> int:
        return len(self.offset)

    def name(self, number: int) -> str:
        """Return the name of the sample's image in its shard."""
        start = self.name_ends[number - 1] if number else 0
        return os.fsdecode(self.names[start:self.name_ends[number]].tobytes())

    def to_bytes(self) -> bytes:
        """Return the content of index.npz: the same for the same samples."""
        buffer = io.BytesIO()
        np.savez_compressed(buffer, offset=self.offset, size=self.size, target=self.target, name_ends=self.name_ends,
                            names=self.names)
        return buffer.getvalue()

    @classmethod
    def from_bytes(cls, content: bytes, samples: int, where: str) -> 'Index':
        """Read index.npz without unpickling. Raises UserError if it is not the index of `samples` samples."""
        limits = {'offset': 8, 'size': 8, 'target': 4, 'name_ends': 8, 'names': MAX_NAME}
        try:
            with zipfile.ZipFile(io.BytesIO(content)) as archive:
                # Checked before unpacking: a few kilobytes of zip can unpack to more zeros than the memory holds.
                found = {entry.filename.removesuffix('.npy'): entry.file_size for entry in archive.infolist()}
                if found.keys() != limits.keys():
                    raise ValueError(f'it holds {", ".join(sorted(found)) or "nothing"}')
                if (any(found[name] > samples * limit + 4096 for name, limit in limits.items())
                        or sum(found.values()) > MAX_COMPRESSION * len(content)):
                    raise ValueError(f'it holds more than {samples} samples need')
                index = cls(*(_read_column(archive.read(f'{name}.npy'), kind) for name, kind in COLUMNS.items()))
        except Exception as error:  # damaged files make their readers raise nearly anything
            raise UserError(f'{where} is damaged, or no index of shards ({error}); {MEND}') from None
        lengths = {len(index.offset), len(index.size), len(index.target), len(index.name_ends)}
        ends = np.concatenate([[0], index.name_ends, [len(index.names)]])
        if lengths != {samples} or (ends[1:] < ends[:-1]).any():
            raise UserError(f'{where} disagrees with its manifest: not {samples} samples; {MEND}')
        return index


def _read_column(content: bytes, kind: str) -> np.ndarray:
    """Return the flat array of type `kind` in a .npy file.

    numpy would allocate whatever the header asks for, and convert NaN and large numbers to other numbers.
    """
    file = io.BytesIO(content)
    np.lib.format.read_magic(file)
    shape, _, found = np.lib.format.read_array_header_1_0(file)
    column = np.frombuffer(content, kind, offset=file.tell()).copy()
    if found != kind or shape != column.shape:
        raise ValueError(f'{found} {shape} in place of {kind} {column.shape}')
    return column


@dataclass(frozen=True)
class Shard:
    """A tar file: its name, length, number of samples, and SHA-256 in hexadecimal ('' if unknown)."""
    name: str
    bytes: int
    samples: int
    sha256: str


@dataclass
class Manifest:
    """The content of a split of shards.

    classes: names in the order of the targets. source: what was packed, in words. transcoded: how images were resized,
    such as {'short_side': 256, 'quality': 95, 'filter': 'bicubic'}; None for unchanged images. left_out: [path, reason]
    of every bad image. packing: the options of packing.py, if it wrote the shards.
    """
    classes: list[str]
    shards: list[Shard]
    index: Index
    source: str = ''
    transcoded: dict | None = None
    left_out: list[list[str]] = field(default_factory=list)
    packing: dict | None = None

    @property
    def shard_offsets(self) -> np.ndarray:
        """The first sample of each shard, then the number of samples: int64 [shards + 1]."""
        return np.cumsum([0] + [shard.samples for shard in self.shards], dtype=np.int64)

    def write(self, folder: str | os.PathLike) -> None:
        """Write index.npz and then manifest.json, each atomically, into the folder of the shards.

        Raises UserError for what `read` would refuse.
        """
        folder, index = Path(folder), self.index.to_bytes()
        self._check(f'{folder}/{MANIFEST}', len(self.index))
        self._check_index(f'{folder}/{MANIFEST}')
        write_whole(folder / INDEX, index)
        content = {
            'format': FORMAT, 'version': VERSION, 'classes': self.classes, 'samples': len(self.index),
            'image_bytes': int(self.index.size.sum()), 'transcoded': self.transcoded, 'source': self.source,
            'packing': self.packing, 'left_out': self.left_out,
            'index': {'name': INDEX, 'bytes': len(index), 'sha256': sha256(index)},
            'shards': [asdict(shard) for shard in self.shards]}
        write_whole(folder / MANIFEST, (json.dumps(content, indent=1) + '\n').encode())

    @classmethod
    def read(cls, opener: Callable[[str], bytes], where: str) -> 'Manifest':
        """Read a manifest and its index, and check that they agree; the shards are not read.

        opener: returns the content of a file of the split by its name. where: the split, in messages.
        Raises UserError with the file and what is wrong with it.
        """
        path = f'{where}/{MANIFEST}'
        try:
            content = json.loads(opener(MANIFEST))
            if content['format'] != FORMAT:
                raise ValueError(f'its format is {content["format"]!r}')
            if content['version'] != VERSION:
                raise UserError(f'{path}: version {content["version"]!r} of the format; this program knows {VERSION}')
            entry = content['index']
            manifest = cls([_typed(name, str) for name in _typed(content['classes'], list)],
                           [_read_shard(shard) for shard in content['shards']], Index([], [], [], [], []),
                           _typed(content.get('source', ''), str),
                           _typed(content.get('transcoded') or {}, dict) or None,
                           _typed(content.get('left_out', []), list),
                           _typed(content.get('packing') or {}, dict) or None)
            samples, index_bytes = _typed(content['samples'], int), _typed(entry['bytes'], int)
            index_sha256 = _typed(entry['sha256'], str)
            if entry['name'] != INDEX:
                raise ValueError(f'its index is {entry["name"]!r}')
        except UserError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            reason = f'no {error}' if isinstance(error, KeyError) else str(error)
            raise UserError(f'{path} is damaged, or no manifest of shards ({reason}); {MEND}') from None
        manifest._check(path, samples)
        index = opener(INDEX)
        if len(index) != index_bytes or sha256(index) != index_sha256:
            raise UserError(f'{where}/{INDEX} is not the one that {MANIFEST} was written with: {len(index):,} bytes '
                            f'against {index_bytes:,}, or another checksum; {MEND}')
        manifest.index = Index.from_bytes(index, samples, f'{where}/{INDEX}')
        manifest._check_index(path)
        return manifest

    @staticmethod
    def read_classes(opener: Callable[[str], bytes], where: str) -> list[str]:
        """Return the classes alone, without the index. Raises as `read`."""
        try:
            return [_typed(name, str) for name in _typed(json.loads(opener(MANIFEST))['classes'], list)]
        except UserError:
            raise
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(f'{where}/{MANIFEST} is damaged, or no manifest of shards ({error}); {MEND}') from None

    def _check(self, path: str, samples: int) -> None:
        names = [shard.name for shard in self.shards]
        for name in names:
            if not re.fullmatch(r'[A-Za-z0-9_][A-Za-z0-9_.-]*\.tar', name):
                raise UserError(f'{path}: {name!r} is no name of a shard: a file name that ends in .tar; {MEND}')
        if any(map(CONTROL.search, self.classes)):  # these would reach the console
            raise UserError(f'{path} has classes whose names hold control characters; {MEND}')
        if len(set(names)) < len(names) or len(set(self.classes)) < len(self.classes):
            raise UserError(f'{path} names a shard or a class twice; {MEND}')
        if (total := sum(shard.samples for shard in self.shards)) != samples:
            raise UserError(f'{path} disagrees with itself: {samples:,} samples, {total:,} in its shards; {MEND}')
        if not samples:
            raise UserError(f'{path}: no samples in it; pack the images again')

    def _check_index(self, path: str) -> None:
        """Check that every image has a class, lies in its shard, and has a header between it and the image before."""
        index = self.index
        if ((index.names < 32) | (index.names == 127)).any():  # these would reach the console
            raise UserError(f'{path} has an index with names that hold control characters; {MEND}')
        sizes = np.repeat([shard.bytes for shard in self.shards], [shard.samples for shard in self.shards])
        before = np.concatenate([[0], (index.offset + index.size)[:-1]])
        before[self.shard_offsets[self.shard_offsets < len(index)]] = 0  # for the first image of each shard
        wrong = ((index.offset < before + BLOCK) | (index.offset % BLOCK != 0) | (index.size < 0)
                 | (index.size > MAX_BYTES)
                 | (index.offset > sizes - index.size) | (index.target < 0) | (index.target >= len(self.classes)))
        if wrong.any():
            number = int(wrong.argmax())
            shard = self.shards[int(np.searchsorted(self.shard_offsets, number, 'right')) - 1]
            raise UserError(
                f'{path} disagrees with its index, which has {index.name(number)!r} of class {index.target[number]} at '
                f'byte {index.offset[number]:,}, {index.size[number]:,} long, in {shard.name} of {shard.bytes:,} bytes '
                f'({len(self.classes)} classes); {MEND}')


def _typed(value, kind: type):
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(f'{str(value)[:40]!r} is no {kind.__name__}')
    return value


def _read_shard(entry: dict) -> Shard:
    shard = Shard(*(_typed(entry[name], kind) for name, kind in
                    (('name', str), ('bytes', int), ('samples', int), ('sha256', str))))
    if min(shard.bytes, shard.samples) < 0:
        raise ValueError(f'{shard.name} has {shard.bytes} bytes and {shard.samples} samples')
    if not re.fullmatch(r'([0-9a-f]{64})?', shard.sha256):  # it becomes a file name
        raise ValueError(f'{shard.name} has the SHA-256 {shard.sha256[:80]!r}')
    return shard


class ShardWriter:
    """Writes one shard, which appears under its name when `close` has written all of it to the disk.

        with ShardWriter(folder, 0) as writer:
            writer.add('ant/a.jpg', content, 3)
        shard, index = writer.shard, writer.index

    After an exception there is no file.
    """

    def __init__(self, folder: str | os.PathLike, number: int):
        self.path = Path(folder) / shard_name(number)
        self._temporary = self.path.with_name(f'.{self.path.name}.tmp')
        self._file = open(self._temporary, 'wb')
        self._digest = hashlib.sha256()
        self._position = 0
        self._members: list[Member] = []
        self._targets: list[int] = []
        self._keys: set[str] = set()

    def __enter__(self) -> 'ShardWriter':
        return self

    def __exit__(self, kind, error, trace) -> None:
        try:
            if kind is None:
                self.close()
        finally:
            with contextlib.suppress(OSError):  # closing flushes, and fails again on a full disk
                self._file.close()
            self._temporary.unlink(missing_ok=True)

    def add(self, name: str, content: bytes, target: int) -> None:
        """Add an image as member `name`, KEY.ENDING, and its class. Raises UserError for an invalid name."""
        key, ending = key_of(name)
        check_name(self.path.name, name)
        if not ending or '.' in ending or key in self._keys:
            raise UserError(f'{name!r}: {"its key is there twice" if key in self._keys else "not KEY.ENDING"}')
        self._keys.add(key)
        header = tar_header(name, len(content))
        self._members.append(Member(name, self._position + len(header), len(content)))
        self._targets.append(target)
        label = b'%d' % target
        self._write(header + padded(content) + tar_header(f'{key}.cls', len(label)) + padded(label))

    def close(self) -> None:
        self._write(b'\0' * 2 * BLOCK)
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(self._temporary, self.path)
        sync_folder(self.path.parent)
        self.shard = Shard(self.path.name, self._position, len(self._members), self._digest.hexdigest())
        self.index = Index.of(self._members, self._targets)

    def _write(self, content: bytes) -> None:
        self._file.write(content)
        self._digest.update(content)
        self._position += len(content)

    @property
    def bytes(self) -> int:  # the last method, as it hides the type of the same name
        """The shard's length so far."""
        return self._position


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
