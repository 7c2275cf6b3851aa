"""Check every byte of a split against its manifest and index, and make a manifest for shards without one.

    manifest, faults = verify_shards('/shards/imagenet/train', jobs=16, decode=False)    # tools/pack.py --verify
    for file, what in faults: …
    manifest = index_folder('/shards/from_elsewhere', jobs=16)                    # tools/pack.py --index
"""
import contextlib
import hashlib
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import BinaryIO

from data.classes import name_some
from data.decode import ImageError, decode_rgb
from data.places import Place, parse_place
from data.shards.cache import Cache, Files
from data.shards.dataset import reader
from data.shards.foreign import NUMBERED, index_shards
from data.shards.manifest import MANIFEST, Index, Manifest, Shard, key_of
from data.shards.remote import NotFoundError, RemoteFile
from data.shards.tar import Member, scan_tar
from data.shards.together import splits_together
from utils.errors import UserError
from utils.parallel import in_processes

# A file of the split, and what is wrong with it.
Fault = tuple[str, str]


def verify_shards(place: Place | str, *, jobs: int, decode: bool, patience: float = 300
                  ) -> tuple[Manifest | None, list[Fault]]:
    """Read all of a split; return the manifest (None if it is unreadable) and what is wrong.

    Length and SHA-256 of shards are compared with the manifest, headers and class members with the index.

    place: a folder, or an address; each of `jobs` fetches shards one by one, never from a cache.
    decode: also decode every image. patience: seconds for which a server may be away.
    Raises UserError if there is no manifest.
    """
    place = parse_place(place, is_shards=True)
    if not has_split(place, patience):
        raise UserError(f'{place}: no {MANIFEST} in it; if a packing was interrupted, start the same command '
                        'again; for shards made elsewhere, write one with --index')
    try:
        manifest = Manifest.read(reader(place, patience), str(place))
    except UserError as error:
        return None, [(MANIFEST, str(error))]
    known = {shard.name for shard in manifest.shards}
    tars = [os.path.basename(tar.path) for tar in place.tars()]
    faults = [(name, 'is not in the manifest') for name in tars if name not in known]
    with _opener(place, patience) as opener:
        for found in in_processes(_Check(manifest, opener, decode), range(len(manifest.shards)), jobs=jobs,
                                  total=len(manifest.index), desc=os.path.basename(place.path)):
            faults += found
    return manifest, sorted(faults)


def has_split(place: Place, patience: float) -> bool:
    """Return whether a manifest is there."""
    if not place.is_remote:
        return os.path.isfile(os.path.join(place.path, MANIFEST))
    try:
        return bool(reader(place, patience)(MANIFEST))
    except NotFoundError:
        return False


@contextlib.contextmanager
def _opener(place: Place, patience: float) -> Iterator[Callable]:
    """Return a function that opens a shard; a remote shard is on this machine only while it is open."""
    if not place.is_remote:
        yield lambda shard: open(os.path.join(place.path, shard.name), 'rb')
        return
    with tempfile.TemporaryDirectory() as folder:
        cache = Cache(folder, max_bytes=float('inf'), patience=patience)

        @contextlib.contextmanager
        def fetched(shard: Shard) -> Iterator[BinaryIO]:
            remote = RemoteFile(place.join(shard.name), shard.bytes, shard.sha256)
            with cache.open(remote) as file:
                yield file
            cache.path(remote).unlink()

        yield fetched


class _Check:
    """Checks one shard, in a process of its own."""

    def __init__(self, manifest: Manifest, opener: Callable, decode: bool):
        self.manifest, self.opener, self.decode = manifest, opener, decode
        self.starts = manifest.shard_offsets

    def __call__(self, number: int, tick) -> list[Fault]:
        shard = self.manifest.shards[number]
        samples = range(int(self.starts[number]), int(self.starts[number + 1]))
        try:
            with self.opener(shard) as file:
                faults = list(self._sums(file, shard))
                try:
                    members = list(scan_tar(file, shard.name))
                except UserError as error:
                    faults.append(str(error).removeprefix(f'{shard.name} '))
                    members = []  # any other fault would follow from this one
                if members:
                    faults += self._members(file, {member.name: member for member in members}, samples)
                if members and self.decode:
                    faults += self._images(file, samples, tick)
                else:
                    tick(len(samples), shard.bytes)
        except OSError as error:
            faults = [f'cannot be read ({error.strerror or error})']
        except UserError as error:  # it cannot be fetched
            faults = [str(error)]
        return [(shard.name, fault) for fault in faults]

    def _sums(self, file, shard) -> Iterable[str]:
        size = file.seek(0, os.SEEK_END)
        if size != shard.bytes:
            yield f'has {size:,} bytes, in the manifest {shard.bytes:,}'
            return
        file.seek(0)
        # The checksum of a shard may be unknown, ''.
        if shard.sha256 and hashlib.file_digest(file, 'sha256').hexdigest() != shard.sha256:
            yield 'has another checksum than in the manifest: its content has changed'

    def _members(self, file: BinaryIO, members: dict[str, Member], samples: range) -> Iterable[str]:
        """Yield each kind of difference between the shard's members and the index."""
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
                continue  # shards made elsewhere may store classes in another way
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


# ---------------------------------------------------------------------------------------------------------------------
# Shards made elsewhere


def index_folder(place: Place | str, *, jobs: int, classes: Sequence[str] | None = None) -> Manifest:
    """Write manifest and index of the tar files in the folder `place`, which stay unchanged.

    classes: names for numbered classes.
    Raises UserError for tar files that `scan_tar` refuses, or if there are none, if there is a manifest already, or if
    none can be written.
    """
    place = parse_place(place, is_shards=True)
    if os.path.exists(os.path.join(place.path, MANIFEST)):
        raise UserError(f'{place} has a {MANIFEST} already; remove it first if it is to be made anew')
    if len(splits := splits_together(place, reader(place, 0))) > 1:
        raise UserError(f'{place}: tar files of {len(splits)} splits ({", ".join(splits)}) lie together, and a '
                        'manifest is for one; move those of each split into a folder of its own, or use them as they '
                        f'are: {place.shards_address}')
    paths = [tar.path for tar in place.tars()]
    if not paths:
        raise UserError(f'{place}: no .tar files in it; give the folder of the shards themselves')
    manifest = index_shards(Files(paths))
    if classes is not None:
        if manifest.source != NUMBERED or len(classes) < len(manifest.classes):
            has = f'numbers up to {len(manifest.classes) - 1}' if manifest.source == NUMBERED else 'names'
            raise UserError(f'--class-map: it has {len(classes)} classes, and the classes of the shards are {has}; '
                            'give one that fits, or none')
        manifest.classes, manifest.source = list(classes), 'tar files from elsewhere'
    sums = dict(in_processes(lambda number, tick: _sum(number, paths[number], manifest.shards[number], tick),
                             range(len(paths)), jobs=jobs, total=len(manifest.index), desc='checksums'))
    manifest.shards = [replace(shard, name=os.path.basename(paths[number]), sha256=sums[number])
                       for number, shard in enumerate(manifest.shards)]
    try:
        manifest.write(place.path)
    except OSError as error:
        raise UserError(f'{place} cannot be written ({error.strerror or error}); copy the shards to a folder that '
                        'can') from None
    return manifest


def _sum(number: int, path: str, shard: Shard, tick) -> tuple[int, str]:
    with open(path, 'rb') as file:
        digest = hashlib.file_digest(file, 'sha256').hexdigest()
    tick(shard.samples, shard.bytes)
    return number, digest
