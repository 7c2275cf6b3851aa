"""Checks a split of shards against its manifest and its index, to the last byte: the work of tools/pack.py --verify.

    manifest, faults = verify('/shards/imagenet/train', jobs=16, decode=False)
    for file, what in faults: …
"""
import hashlib
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import BinaryIO

from utils.errors import UserError
from utils.parallel import in_processes

from .classes import name_some
from .decode import ImageError, decode_rgb
from .manifest import MANIFEST, Index, Manifest, Member, key_of, scan_tar

Fault = tuple[str, str]
"""A file of the split, and what is wrong with it."""


def verify(folder: str, *, jobs: int, decode: bool) -> tuple[Manifest | None, list[Fault]]:
    """Reads all of a split; the manifest (None if it cannot be read itself) and what is wrong, empty if nothing is.

    Shards are compared with the manifest by bytes and SHA-256, their headers with the index, and class members with
    its targets. decode: every image is decoded too.
    Raises UserError if there is no manifest.
    """
    path = Path(folder)
    if not (path / MANIFEST).is_file():
        raise UserError(f'{folder}: no {MANIFEST} in it; a packing that was begun ends with one: start the same '
                        'command again. Shards made elsewhere get one with --index')
    try:
        manifest = Manifest.read(lambda name: (path / name).read_bytes(), folder)
    except (UserError, OSError) as error:
        return None, [(MANIFEST, str(error))]
    known = {shard.name for shard in manifest.shards}
    faults = [(name, 'is not in the manifest') for name in sorted(os.listdir(path))
              if name.endswith('.tar') and name not in known]
    check = _Check(manifest, lambda name: open(path / name, 'rb'), decode)
    for found in in_processes(check, range(len(manifest.shards)), jobs=jobs, total=len(manifest.index), desc=path.name):
        faults += found
    return manifest, sorted(faults)


class _Check:
    """Checks one shard, in a process of its own; `opener` gives a file that can seek, by its name."""

    def __init__(self, manifest: Manifest, opener: Callable[[str], BinaryIO], decode: bool):
        self.manifest, self.opener, self.decode = manifest, opener, decode
        self.starts = manifest.starts

    def __call__(self, number: int, tick) -> list[Fault]:
        shard = self.manifest.shards[number]
        samples = range(int(self.starts[number]), int(self.starts[number + 1]))
        try:
            with self.opener(shard.name) as file:
                faults = list(self._sums(file, shard))
                try:
                    members = list(scan_tar(file, shard.name))
                except UserError as error:
                    faults.append(str(error).removeprefix(f'{shard.name} '))
                    members = []  # what cannot be walked through has been said; the rest would follow from it
                if members:
                    faults += self._members(file, {member.name: member for member in members}, samples)
                if members and self.decode:
                    faults += self._images(file, samples, tick)
                else:
                    tick(len(samples), shard.bytes)
        except OSError as error:
            faults = [f'cannot be read ({error.strerror or error})']
        return [(shard.name, fault) for fault in faults]

    def _sums(self, file: BinaryIO, shard) -> Iterable[str]:
        size = file.seek(0, os.SEEK_END)
        if size != shard.bytes:
            yield f'has {size:,} bytes, in the manifest {shard.bytes:,}'
            return
        file.seek(0)
        # '' is the sum of a shard that nobody has computed it of.
        if shard.sha256 and hashlib.file_digest(file, 'sha256').hexdigest() != shard.sha256:
            yield 'has another checksum than in the manifest: its content has changed'

    def _members(self, file: BinaryIO, members: dict[str, Member], samples: range) -> Iterable[str]:
        """The shard's members against the index, in words for each kind of difference."""
        index: Index = self.manifest.index
        missing, misplaced, unlabelled, mislabelled = [], [], [], []
        labels = {key_of(name)[0]: member for name, member in members.items() if name.endswith('.cls')}
        for sample in samples:
            name = index.name(sample)
            member = members.get(name)
            if member is None:
                missing.append(name)
                continue
            if (member.offset, member.size) != (index.offset[sample], index.size[sample]):
                misplaced.append(name)
            label = labels.get(key_of(name)[0])
            if self.manifest.packing is None:
                continue  # elsewhere classes are written in other ways
            if label is None:
                unlabelled.append(name)
            elif _content(file, label) != b'%d' % index.target[sample]:
                mislabelled.append(name)
        for names, what in ((missing, 'are in the index, not in it'), (misplaced, 'lie elsewhere than in the index'),
                            (unlabelled, 'have no class'), (mislabelled, 'have another class than in the index')):
            if names:
                yield f'{len(names)} images {what}: {name_some(names, 2)}'
        if self.manifest.packing is not None and len(members) > 2 * len(samples):
            yield f'has {len(members)} members, of which the index knows {2 * len(samples)}'

    def _images(self, file: BinaryIO, samples: range, tick) -> Iterable[str]:
        bad, index = [], self.manifest.index
        for sample in samples:
            name = index.name(sample)
            content = _content(file, Member(name, int(index.offset[sample]), int(index.size[sample])))
            try:
                decode_rgb(content, name)
            except ImageError as error:
                bad.append(str(error).removeprefix('image '))
            tick(1, len(content))
        if bad:
            yield f'{len(bad)} bad images: {", ".join(bad[:2])}' + (' and others' if len(bad) > 2 else '')


def _content(file: BinaryIO, member: Member) -> bytes:
    file.seek(member.offset)
    return file.read(member.size)
