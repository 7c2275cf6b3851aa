"""The format of shards: tar files of images that say what is in them, written, read and checked in this one place.

A split is a folder (or an address) with

    manifest.json       classes, counts, where it came from, and bytes and SHA-256 of every other file
    index.npz           of every sample: where its image lies in its shard, how long it is, its class, its name
    shard-000000.tar …  per sample the image as KEY.jpg (its own ending) and its class number in ASCII as KEY.cls

The shards alone are what the webdataset library reads. KEY is the image's path in the folder that was packed, without
its ending and with '_' for '.' in the file's name, because WebDataset takes what follows the first dot for the ending.

A tar file from elsewhere is hostile until its headers have been read: `scan_tar` refuses whatever is not a plain file
under a plain name, and pickles. Members are never extracted, and nothing in them is run.
"""
import contextlib
import hashlib
import io
import json
import os
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from utils.errors import UserError

from .decode import MAX_BYTES

FORMAT, VERSION = 't2t-shards', 1
MANIFEST, INDEX = 'manifest.json', 'index.npz'
BLOCK = 512
"""Bytes that tar counts in: a header is one block, what follows is padded to whole ones."""

PICKLES = ('.pkl', '.pickle', '.pyd', '.pt', '.pth', '.joblib', '.dill', '.cloudpickle')
"""Endings of members that readers of WebDataset unpickle, which runs whatever they contain."""

MAX_NAME = 4096
"""Longer names, in bytes, are refused."""


# ---------------------------------------------------------------------------------------------------------------------
# Names and tar headers


def shard_name(number: int) -> str:
    return f'shard-{number:06d}.tar'


def member_key(path: str) -> str:
    """The key of an image by its path in the folder of its split: 'ant/a.1.jpg' → 'ant/a_1'. Not always unique."""
    folder, name = os.path.split(path)
    return os.path.join(folder, os.path.splitext(name)[0].replace('.', '_'))


def key_of(name: str) -> tuple[str, str]:
    """('ant/a', 'seg.png') for the member 'ant/a.seg.png': its key and what follows, by WebDataset's first-dot rule."""
    folder, slash, file = name.rpartition('/')
    stem, _, ending = file.partition('.')
    return folder + slash + stem, ending


def tar_header(name: str, size: int) -> bytes:
    """The blocks before a member's content: the same for equal arguments, with no date, owner or permission of note.

    A name beyond what fits (100 bytes, or 155 of folders and 100 of file) goes before it, in GNU's manner.
    """
    encoded = os.fsencode(name)
    if len(encoded) <= 100:
        return _header_block(encoded, b'', size, b'0')
    for cut in (i for i, byte in enumerate(encoded) if byte == ord('/')):
        if cut <= 155 and 0 < len(encoded) - cut - 1 <= 100:
            return _header_block(encoded[cut + 1:], encoded[:cut], size, b'0')
    long_name = _header_block(b'././@LongLink', b'', len(encoded) + 1, b'L') + _padded(encoded + b'\0')
    return long_name + _header_block(encoded[:100], b'', size, b'0')


def _header_block(name: bytes, prefix: bytes, size: int, kind: bytes) -> bytes:
    if size >= 8 ** 11:
        raise UserError(f'{os.fsdecode(name)}: {size} bytes; a member of a tar file cannot have more than 8 GiB')
    fields = (name.ljust(100, b'\0') + b'0000644\0' + b'0000000\0' * 2 + b'%011o\0' % size + b'%011o\0' % 0
              + b' ' * 8 + kind + b'\0' * 100 + b'ustar\x0000' + b'\0' * 64 + b'0000000\0' * 2
              + prefix.ljust(155, b'\0') + b'\0' * 12)
    return fields[:148] + b'%06o\0 ' % sum(fields) + fields[156:]


def _padded(content: bytes) -> bytes:
    return content + b'\0' * (-len(content) % BLOCK)


class Header(NamedTuple):
    """One header block: the member's name as the block has it, bytes of content, kind (b'0': a file)."""
    name: str
    size: int
    kind: bytes


def parse_header(block: bytes) -> Header | None:
    """What a header block says; None for one that is no header: cut off, damaged, of another format."""
    if len(block) != BLOCK:
        return None
    try:
        checksum = int(block[148:156].strip(b' \0') or b'0', 8)
        # Negative sums, of signed bytes, are a mistake of old programs which none made in the age of shards.
        if checksum != sum(block) - sum(block[148:156]) + 8 * ord(' '):
            return None
        digits = block[124:136]
        if digits[0] & 0x80:  # GNU's way for sizes from 8 GiB
            size = int.from_bytes(digits[1:], 'big') + ((digits[0] & 0x7F) << 88)
        else:
            size = int(b'0' + digits.strip(b' \0'), 8)  # which leaves no place for a sign
    except ValueError:
        return None
    name = block[:100].partition(b'\0')[0]
    prefix = block[345:500].partition(b'\0')[0] if block[257:263] == b'ustar\0' else b''
    kind = block[156:157]
    return Header(os.fsdecode(prefix + b'/' + name if prefix else name), size, b'0' if kind in b'\x007' else kind)


# ---------------------------------------------------------------------------------------------------------------------
# Tar files from elsewhere


class Member(NamedTuple):
    """A plain file in a tar file: its name, where its content begins, and how many bytes it has."""
    name: str
    offset: int
    size: int


KINDS = {b'1': 'a hard link', b'2': 'a link', b'3': 'a device', b'4': 'a device', b'6': 'a pipe',
         b'K': 'a link', b'S': 'a sparse file', b'M': 'a part of a file', b'V': 'a volume label', b'D': 'a listing'}


def scan_tar(file: BinaryIO, where: str, *, start: int = 0, end: int | None = None,
             max_bytes: int = MAX_BYTES) -> Iterator[Member]:
    """The plain files of a tar file, in order, by its headers; contents are skipped. About 10 µs each.

    file: can seek; `where` names it in messages. start, end: the bytes that the tar file takes in it, if not all.
    max_bytes: the longest member.
    Raises UserError naming the tar file and the member for links, devices, sparse files; names that are absolute, have
    '..', a backslash or control characters, or look like a command or an address; pickles, and arrays of Python
    objects; two names for one member; a name that comes twice; a member of more than `max_bytes`; and for a file that
    ends early, is compressed or damaged.
    """
    file.seek(0, os.SEEK_END)
    end = file.tell() if end is None else end
    position, extended, seen = start, {}, set()
    while True:
        file.seek(position)
        block = file.read(min(BLOCK, max(0, end - position)))
        if len(block) == BLOCK and not any(block):
            _check_end(file, where, position, end)
            return
        header = _checked_header(block, where, position, start)
        name = header.name
        data, after = position + BLOCK, position + BLOCK + header.size + -header.size % BLOCK
        if header.kind in b'LxXg':
            if header.size > 1 << 20:
                raise refusal(where, name, f'a name of {header.size:,} bytes')
            if after > end:
                raise UserError(f'{where} ends early, within the header of a member; {COPY_AGAIN}')
            content = file.read(header.size)
            if header.kind == b'L':
                more = {'path': os.fsdecode(content.rstrip(b'\0'))}
            else:
                more = _read_pax(content, where, name, everywhere=header.kind == b'g')
            if twice := extended.keys() & more.keys():  # programs differ in which of them counts
                raise refusal(where, name, f'a second {min(twice)} for one member')
            extended |= more
            position = after
            continue
        name = _resolve_name(where, name, extended.get('path'))
        if int(extended.get('size', header.size)) != header.size:
            raise refusal(where, name, 'of two different sizes')
        extended = {}
        _check_name(where, name)
        if header.kind in KINDS:
            raise refusal(where, name, KINDS[header.kind])
        if header.kind not in b'05':
            raise refusal(where, name, f'of the unknown kind {header.kind!r}')
        if header.size > max_bytes:
            raise refusal(where, name, f'{header.size:,} bytes long, more than the {max_bytes:,} allowed')
        if after > end:
            raise UserError(f'{where} ends early, within {name!r}; {COPY_AGAIN}')
        if header.kind == b'0':
            if name in seen:
                raise refusal(where, name, 'there twice')
            seen.add(name)
            if name.lower().endswith('.npy') and b"'|O'" in file.read(min(header.size, 1 << 16)):
                raise refusal(where, name, 'an array of Python objects, which is a pickle')
            yield Member(name, data, header.size)
        position = after


COPY_AGAIN = 'copy or download it again'


def refusal(where: str, name: str, what: str) -> UserError:
    return UserError(f'{where}: member {name!r} is {what}; shards with such members are not read')


def _checked_header(block: bytes, where: str, position: int, start: int) -> Header:
    if header := parse_header(block):
        return header
    if len(block) < BLOCK:
        empty = ' (it is empty)' if position == start and not block else ''
        raise UserError(f'{where} ends early, without the end of an archive{empty}; {COPY_AGAIN}')
    if position > start:
        raise UserError(f'{where} is damaged at byte {position:,}: no header of a member; {COPY_AGAIN}')
    compressed = block.startswith((b'\x1f\x8b', b'BZh', b'\xfd7zXZ', b'\x28\xb5\x2f\xfd', b'PK\3\4'))
    raise UserError(f'{where} is ' + ('compressed; unpack it to a plain .tar first' if compressed
                                      else f'no tar file; {COPY_AGAIN}'))


def _check_end(file: BinaryIO, where: str, position: int, end: int) -> None:
    """Behind the end of an archive there are zeros: what stood there some programs would read, others not."""
    file.seek(position)
    if end - position < 2 * BLOCK:
        raise UserError(f'{where} ends early, without the end of an archive; {COPY_AGAIN}')
    while position < end:
        chunk = file.read(min(1 << 20, end - position))
        if not chunk or any(chunk):
            raise UserError(f'{where} has data behind its end, at byte {position:,}: damaged, or two tar files in '
                            f'one; {COPY_AGAIN}')
        position += len(chunk)


def _read_pax(content: bytes, where: str, name: str, *, everywhere: bool) -> dict[str, str]:
    """The records 'LENGTH KEY=VALUE' of an extended header that matter here; `everywhere`: it holds for all members."""
    records, position = {}, 0
    while position < len(content) and content[position]:
        match = re.compile(rb'(\d{1,7}) ([^=]+)=').match(content, position)
        length = int(match[1]) if match else 0
        if not match or position + length > len(content) or content[position + length - 1:position + length] != b'\n':
            raise refusal(where, name, 'an extended header that cannot be read')
        key = match[2].decode('utf-8', 'replace')
        if key == 'linkpath' or key.startswith('GNU.sparse'):
            raise refusal(where, name, 'a link' if key == 'linkpath' else 'a sparse file')
        if key in ('path', 'size'):
            value = os.fsdecode(content[match.end():position + length - 1])
            if everywhere or (key == 'size' and not re.fullmatch(r'\d{1,20}', value)):
                raise refusal(where, name, f'an extended header that gives the {key} of other members')
            records[key] = value
        position += length
    return records


def _resolve_name(where: str, name: str, full: str | None) -> str:
    """A member's one name. The one in its header is checked too, for programs that know no other."""
    if full is None:
        return name
    _check_name(where, name)
    # What the header itself has room for it also says: another name there is meant for somebody else.
    fits = len(full) <= 99 and full.isascii()
    if fits and full.rstrip('/') != name.rstrip('/'):
        raise refusal(where, name, f'also named {full[:100]!r}')
    return full


def _check_name(where: str, name: str) -> None:
    parts = name.split('/')
    problem = None
    if not name or len(os.fsencode(name)) > MAX_NAME:
        problem = 'without a name' if not name else 'named at too great length'
    elif name.startswith('/'):
        problem = 'named by an absolute path'
    elif '..' in parts:
        problem = "named by a path with '..'"
    elif re.search(r'[\\\x00-\x1f\x7f]', name):
        problem = 'named with a backslash or control characters'
    elif re.match(r'\s*(pipe:|[a-z][a-z0-9+.-]*:/)', name, re.IGNORECASE):
        problem = 'named like a command or an address'
    elif name.lower().endswith(PICKLES):
        problem = 'a pickle, which could run code'
    if problem:
        raise refusal(where, name[:200], problem)


# ---------------------------------------------------------------------------------------------------------------------
# Manifest and index


class Index:
    """Where the samples are, shard after shard: int64 offset [N] of the image's content in its shard, int64 size [N]
    in bytes, int32 target [N], and the names of the images' members, one block of memory for all."""

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
        """The index of several shards, in their order."""
        starts = np.cumsum([0] + [len(part.names) for part in parts])
        ends = [part.name_ends + start for part, start in zip(parts, starts[:-1], strict=True)]
        columns = ([getattr(part, name) for part in parts] for name in ('offset', 'size', 'target'))
        return cls(*map(np.concatenate, columns), np.concatenate(ends), np.concatenate([part.names for part in parts]))

    def __len__(self) -> int:
        return len(self.offset)

    def name(self, number: int) -> str:
        """The name of the sample's image in its shard."""
        start = self.name_ends[number - 1] if number else 0
        return os.fsdecode(self.names[start:self.name_ends[number]].tobytes())

    def to_bytes(self) -> bytes:
        """The content of index.npz: the same for the same samples."""
        buffer = io.BytesIO()
        np.savez_compressed(buffer, offset=self.offset, size=self.size, target=self.target, name_ends=self.name_ends,
                            names=self.names)
        return buffer.getvalue()

    @classmethod
    def from_bytes(cls, content: bytes, samples: int, where: str) -> 'Index':
        """Reads index.npz. Raises UserError if it is not the index of `samples` samples; unpickles nothing."""
        limits = {'offset': 8, 'size': 8, 'target': 4, 'name_ends': 8, 'names': MAX_NAME}
        try:
            with zipfile.ZipFile(io.BytesIO(content)) as archive:
                # Looked at before it is unpacked: a few kilobytes of zip can hold all the zeros of a full memory.
                found = {entry.filename.removesuffix('.npy'): entry.file_size for entry in archive.infolist()}
            if found.keys() != limits.keys():
                raise ValueError(f'it holds {", ".join(sorted(found)) or "nothing"}')
            if any(found[name] > samples * limit + 4096 for name, limit in limits.items()):
                raise ValueError(f'it holds more than {samples} samples need')
            with np.load(io.BytesIO(content), allow_pickle=False) as file:
                index = cls(*(file[name] for name in limits))
        except (ValueError, TypeError, KeyError, OSError, EOFError, zipfile.BadZipFile, NotImplementedError) as error:
            raise UserError(f'{where} is damaged, or no index of shards ({error}); {MEND}') from None
        lengths = {len(index.offset), len(index.size), len(index.target), len(index.name_ends)}
        ends = np.concatenate([[0], index.name_ends, [len(index.names)]])
        is_flat = all(column.ndim == 1 for column in vars(index).values())
        if lengths != {samples} or not is_flat or (np.diff(ends) < 0).any():
            raise UserError(f'{where} disagrees with its manifest: not {samples} samples; {MEND}')
        return index


MEND = 'copy it again, or see what is wrong with python tools/pack.py --verify'


@dataclass(frozen=True)
class Shard:
    """A tar file: its name, its bytes, its samples, its SHA-256 in hexadecimal ('' where nobody has computed it)."""
    name: str
    bytes: int
    samples: int
    sha256: str


@dataclass
class Manifest:
    """What a split of shards consists of.

    classes: names in the order of the targets. transcoded: None for images as they were, or how they were resized,
    such as {'short_side': 256, 'quality': 95, 'filter': 'bicubic'}. source: what was packed, in words.
    left_out: [path, reason] of every image that was not packed. packing: the options of data/packing.py, if by it.
    """
    classes: list[str]
    shards: list[Shard]
    index: Index
    source: str = ''
    transcoded: dict | None = None
    left_out: list[list[str]] = field(default_factory=list)
    packing: dict | None = None

    @property
    def starts(self) -> np.ndarray:
        """int64 [shards + 1]: the number of each shard's first sample, and of all samples."""
        return np.cumsum([0] + [shard.samples for shard in self.shards], dtype=np.int64)

    def write(self, folder: str | os.PathLike) -> None:
        """Writes index.npz and then manifest.json, each whole or not at all, into the folder of the shards.

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
        """Reads a manifest and its index, and checks that they agree; the shards themselves are not looked at.

        opener: gives the content of a file of the split by its name. where: the split, in messages.
        Raises UserError that names the file and what is wrong with it.
        """
        path = f'{where}/{MANIFEST}'
        try:
            content = json.loads(opener(MANIFEST))
            if content['format'] != FORMAT:
                raise ValueError(f'its format is {content["format"]!r}')
            if content['version'] != VERSION:
                raise UserError(f'{path}: version {content["version"]!r} of the format; this program knows {VERSION}')
            entry = content['index']
            manifest = cls([_typed(name, str) for name in content['classes']],
                           [_read_shard(shard) for shard in content['shards']], Index([], [], [], [], []),
                           _typed(content.get('source', ''), str), content.get('transcoded'),
                           list(content.get('left_out', [])), content.get('packing'))
            samples, index_bytes = _typed(content['samples'], int), _typed(entry['bytes'], int)
            if entry['name'] != INDEX:
                raise ValueError(f'its index is {entry["name"]!r}')
        except UserError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            reason = f'no {error}' if isinstance(error, KeyError) else str(error)
            raise UserError(f'{path} is damaged, or no manifest of shards ({reason}); {MEND}') from None
        manifest._check(path, samples)
        index = opener(INDEX)
        if len(index) != index_bytes or sha256(index) != entry['sha256']:
            raise UserError(f'{where}/{INDEX} is not the one that {MANIFEST} was written with: {len(index):,} bytes '
                            f'against {index_bytes:,}, or another checksum; {MEND}')
        manifest.index = Index.from_bytes(index, samples, f'{where}/{INDEX}')
        manifest._check_index(path)
        return manifest

    @staticmethod
    def read_classes(opener: Callable[[str], bytes], where: str) -> list[str]:
        """The classes alone, without the index. Raises as `read`."""
        try:
            return [_typed(name, str) for name in json.loads(opener(MANIFEST))['classes']]
        except UserError:
            raise
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(f'{where}/{MANIFEST} is damaged, or no manifest of shards ({error}); {MEND}') from None

    def _check(self, path: str, samples: int) -> None:
        names = [shard.name for shard in self.shards]
        for name in names:
            if not re.fullmatch(r'[A-Za-z0-9_][A-Za-z0-9_.-]*\.tar', name):
                raise UserError(f'{path}: {name!r} is no name of a shard: a file name that ends in .tar; {MEND}')
        if len(set(names)) < len(names) or len(set(self.classes)) < len(self.classes):
            raise UserError(f'{path} names a shard or a class twice; {MEND}')
        if (total := sum(shard.samples for shard in self.shards)) != samples:
            raise UserError(f'{path} disagrees with itself: {samples:,} samples, {total:,} in its shards; {MEND}')
        if not samples:
            raise UserError(f'{path}: no samples in it; pack the images again')

    def _check_index(self, path: str) -> None:
        """Every image lies within its shard, behind a header, and has a class."""
        index = self.index
        if ((index.names < 32) | (index.names == 127)).any():  # they would reach the console
            raise UserError(f'{path} has an index with names that hold control characters; {MEND}')
        sizes = np.repeat([shard.bytes for shard in self.shards], [shard.samples for shard in self.shards])
        wrong = ((index.offset < BLOCK) | (index.offset % BLOCK != 0) | (index.size < 0) | (index.size > MAX_BYTES)
                 | (index.offset > sizes - index.size) | (index.target < 0) | (index.target >= len(self.classes)))
        if wrong.any():
            number = int(wrong.argmax())
            shard = self.shards[int(np.searchsorted(self.starts, number, 'right')) - 1]
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
    if not re.fullmatch(r'([0-9a-f]{64})?', shard.sha256):  # which becomes the name of a file
        raise ValueError(f'{shard.name} has the SHA-256 {shard.sha256[:80]!r}')
    return shard


class ShardWriter:
    """Writes one shard; nobody sees it before `close` has written all of it to the disk.

        with ShardWriter(folder, 0) as writer:
            writer.add('ant/a.jpg', content, 3)
        shard, index = writer.shard, writer.index

    A block that is left by an error leaves no file.
    """

    def __init__(self, folder: str | os.PathLike, number: int):
        self.path = Path(folder) / shard_name(number)
        self._temporary = self.path.with_name(f'.{self.path.name}.tmp')
        self._file = open(self._temporary, 'wb')
        self._digest = hashlib.sha256()
        self._position = 0
        self._members, self._targets, self._keys = [], [], set()

    def __enter__(self) -> 'ShardWriter':
        return self

    def __exit__(self, kind, error, trace) -> None:
        try:
            if kind is None:
                self.close()
        finally:
            with contextlib.suppress(OSError):  # closing writes what is left, which a full disk refuses again
                self._file.close()
            self._temporary.unlink(missing_ok=True)

    @property
    def bytes(self) -> int:
        """The shard's length so far."""
        return self._position

    def add(self, name: str, content: bytes, target: int) -> None:
        """Adds an image as member `name`, KEY.ENDING, and its class. Raises UserError for a name of another kind."""
        key, ending = key_of(name)
        _check_name(self.path.name, name)
        if not ending or '.' in ending or key in self._keys:
            raise UserError(f'{name!r}: {"its key is there twice" if key in self._keys else "not KEY.ENDING"}')
        self._keys.add(key)
        header = tar_header(name, len(content))
        self._members.append(Member(name, self._position + len(header), len(content)))
        self._targets.append(target)
        label = b'%d' % target
        self._write(header + _padded(content) + tar_header(f'{key}.cls', len(label)) + _padded(label))

    def close(self) -> None:
        self._write(b'\0' * 2 * BLOCK)
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(self._temporary, self.path)
        _sync_folder(self.path.parent)
        self.shard = Shard(self.path.name, self._position, len(self._members), self._digest.hexdigest())
        self.index = Index.of(self._members, self._targets)

    def _write(self, content: bytes) -> None:
        self._file.write(content)
        self._digest.update(content)
        self._position += len(content)


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file to the disk under another name and renames it: whoever finds it finds all of it."""
    temporary = path.with_name(f'.{path.name}.tmp')
    try:
        with open(temporary, 'wb') as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Makes a rename last through a loss of power."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
