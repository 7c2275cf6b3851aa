"""Tar headers, written reproducibly and read without trust.

A foreign tar file may be hostile: `scan_tar` refuses everything but plain files under plain names, and pickles. Members
are never extracted, and nothing in them is run.

Python's tarfile cannot replace this. Its headers differ between versions of Python, but equal images must give equal
shards. It silently accepts what `scan_tar` refuses: repeated names, contradicting headers, data after the end.
"""
import os
import re
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from data.decode import MAX_BYTES
from utils.errors import UserError

# Bytes of a block: a header is one block, and contents are padded to whole blocks.
BLOCK = 512
# Endings of members that readers of WebDataset unpickle, which runs code.
PICKLES = ('.pkl', '.pickle', '.pyd', '.pt', '.pth', '.joblib', '.dill', '.cloudpickle')
# Longer names, in bytes, are refused.
MAX_NAME = 4096
COPY_AGAIN = 'copy or download it again'


# ---------------------------------------------------------------------------------------------------------------------
# Headers


def tar_header(name: str, size: int) -> bytes:
    """Return the blocks before a member's content, without date or owner, so that equal arguments give equal bytes.

    A name that does not fit (100 bytes, or 155 of folders and 100 of file) gets a block before it, as in GNU tar.
    """
    encoded = os.fsencode(name)
    if len(encoded) <= 100:
        return _header_block(encoded, b'', size, b'0')
    for cut in (i for i, byte in enumerate(encoded) if byte == ord('/')):
        if cut <= 155 and 0 < len(encoded) - cut - 1 <= 100:
            return _header_block(encoded[cut + 1:], encoded[:cut], size, b'0')
    long_name = _header_block(b'././@LongLink', b'', len(encoded) + 1, b'L') + padded(encoded + b'\0')
    return long_name + _header_block(encoded[:100], b'', size, b'0')


def _header_block(name: bytes, prefix: bytes, size: int, kind: bytes) -> bytes:
    if size >= 8 ** 11:
        raise UserError(f'{os.fsdecode(name)}: {size} bytes; a member of a tar file cannot have more than 8 GiB')
    fields = (name.ljust(100, b'\0') + b'0000644\0' + b'0000000\0' * 2 + b'%011o\0' % size + b'%011o\0' % 0
              + b' ' * 8 + kind + b'\0' * 100 + b'ustar\x0000' + b'\0' * 64 + b'0000000\0' * 2
              + prefix.ljust(155, b'\0') + b'\0' * 12)
    return fields[:148] + b'%06o\0 ' % sum(fields) + fields[156:]


def padded(content: bytes) -> bytes:
    return content + b'\0' * (-len(content) % BLOCK)


class Header(NamedTuple):
    """One header block: the member's name in it, bytes of content, kind (b'0': a file)."""
    name: str
    size: int
    kind: bytes


def parse_header(block: bytes) -> Header | None:
    """Return the content of a header block; None if it is truncated, damaged, or of another format."""
    if len(block) != BLOCK:
        return None
    try:
        checksum = int(block[148:156].strip(b' \0') or b'0', 8)
        # Sums of signed bytes, a mistake of old programs, are not accepted.
        if checksum != sum(block) - sum(block[148:156]) + 8 * ord(' '):
            return None
        digits = block[124:136]
        if digits[0] & 0x80:  # GNU tar's sizes from 8 GiB on
            size = int.from_bytes(digits[1:], 'big') + ((digits[0] & 0x7F) << 88)
        else:
            size = int(b'0' + digits.strip(b' \0'), 8)  # the 0 leaves no place for a sign
    except ValueError:
        return None
    name = block[:100].partition(b'\0')[0]
    prefix = block[345:500].partition(b'\0')[0] if block[257:263] == b'ustar\0' else b''
    kind = block[156:157]
    return Header(os.fsdecode(prefix + b'/' + name if prefix else name), size, b'0' if kind in b'\x007' else kind)


# ---------------------------------------------------------------------------------------------------------------------
# Foreign tar files


class Member(NamedTuple):
    """A plain file in a tar file: its name, and offset and bytes of its content."""
    name: str
    offset: int
    size: int


KINDS = {b'1': 'a hard link', b'2': 'a link', b'3': 'a device', b'4': 'a device', b'6': 'a pipe',
         b'K': 'a link', b'S': 'a sparse file', b'M': 'a part of a file', b'V': 'a volume label', b'D': 'a listing'}


def scan_tar(file: BinaryIO, where: str, *, start: int = 0, end: int | None = None,
             max_bytes: int = MAX_BYTES) -> Iterator[Member]:
    """Yield the plain files of a tar file, in order, from its headers. About 10 µs each.

    file: can seek; messages call it `where`. start, end: where in it the tar file is. max_bytes: the longest member.
    Raises UserError with the tar file and the member for links, devices and sparse files; names that are absolute,
    repeated or ambiguous, contain '..', backslashes or control characters, or look like a command or an address;
    pickles and arrays of Python objects; members of more than `max_bytes`; a truncated, compressed or damaged file.
    """
    file.seek(0, os.SEEK_END)
    end = file.tell() if end is None else end
    position, seen = start, set()
    extended: dict[str, str] = {}
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
            if twice := extended.keys() & more.keys():  # programs differ in which one they use
                raise refusal(where, name, f'a second {min(twice)} for one member')
            extended |= more
            position = after
            continue
        name = _resolve_name(where, name, extended.get('path'))
        if int(extended.get('size', header.size)) != header.size:
            raise refusal(where, name, 'of two different sizes')
        extended = {}
        check_name(where, name)
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
    """Check that only zeros follow the end of the archive: some programs would read more, others not."""
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
    """Return path and size from the records 'LENGTH KEY=VALUE' of an extended header; `everywhere`: of all members."""
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
    """Return a member's name. The one in its header is checked too, as some programs know no other."""
    if full is None:
        return name
    check_name(where, name)
    # A name that fits into the header must be the same there: another one would deceive other programs.
    fits = len(full) <= 99 and full.isascii()
    if fits and full.rstrip('/') != name.rstrip('/'):
        raise refusal(where, name, f'also named {full[:100]!r}')
    return full


def check_name(where: str, name: str) -> None:
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
