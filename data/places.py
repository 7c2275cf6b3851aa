"""Where a data set is. The only module that asks what an address means: all others carry the `Place` it returns.

    place = parse_place('wds:https://host/imagenet')
    place.join('train')       # Place(path='https://host/imagenet/train', scheme='https', …)
"""
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

from timm.utils.misc import natural_key

from data.classes import name_some
from data.folders import describe_other_formats, has_class_folders, list_classes, require_folder
from data.shards.manifest import FORMAT, MANIFEST
from utils.console import plural
from utils.errors import UserError

# An address with this prefix consists of shards.
PREFIX = 'wds:'
# Not all that fsspec knows: some of those open files of this machine, or run programs.
SCHEMES = ('http', 'https', 's3', 'gs', 'gcs', 'az', 'abfs')
# Folders that are tried, in this order, if no evaluation split is named.
EVAL_SPLITS = ('val', 'valid', 'validation', 'test')
SPLITS = ('train', *EVAL_SPLITS)


@dataclass(frozen=True)
class Place:
    """A data set, a split of it, or one of its files.

    path: a path on this machine, or an address with its scheme.
    scheme: of a remote address, such as 'https'; '' on this machine.
    is_pattern: `path` names tar files, possibly with braces, and not a folder.
    is_shards: the user said that it consists of shards.
    files: the paths of the tar files of a split that lie beside those of other splits; `path` is for messages alone.
    """
    path: str
    scheme: str = ''
    is_pattern: bool = False
    is_shards: bool = False
    files: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.path

    @property
    def is_remote(self) -> bool:
        return bool(self.scheme)

    @property
    def shards_address(self) -> str:
        """What the user gives to read this place as shards."""
        return PREFIX + self.path

    def join(self, name: str) -> 'Place':
        """Return the split, file or pattern `name` in this place."""
        name = name.rstrip('/')
        if name in ('', '.'):
            return self
        path = f'{self.path}/{name}' if self.scheme else os.path.join(self.path, name)
        return replace(self, path=path, is_pattern=_is_pattern(name))

    def with_files(self, split: str, names: Iterable[str]) -> 'Place':
        """Return the split whose tar files `names` lie in this place."""
        return replace(self, path=f'{self.path} ({split})', is_pattern=True, is_shards=True,
                       files=tuple(self.join(name).path for name in names))

    def is_folder(self) -> bool:
        """Return whether this is a folder on this machine."""
        return not self.scheme and os.path.isdir(self.path)

    def require(self) -> None:
        """Raise UserError if this place should be a folder on this machine and is not."""
        if not (self.scheme or self.is_pattern):
            require_folder(self.path)

    def has_splits(self) -> bool:
        return any(self.join(split).is_folder() for split in SPLITS)

    def has_manifest(self) -> bool:
        """Return whether this is a split on this machine that tools/pack.py wrote; other data sets have manifests, too.
        """
        try:
            with open(os.path.join(self.path, MANIFEST), 'rb') as file:
                return FORMAT.encode() in file.read(4096) or bool(self.tars())
        except OSError:
            return False

    def tars(self) -> list['Place']:
        """Return the tar files of a pattern in its order, or those in a folder on this machine in natural order."""
        if self.is_pattern:
            return [replace(self, path=path, files=()) for path in self.files or expand(self.path)]
        try:
            names = [name for name in os.listdir(self.path) if name.endswith('.tar') and not name.startswith('.')]
        except OSError:
            return []
        return [self.join(name) for name in sorted(sorted(names), key=natural_key)]

    def tars_without_manifest(self) -> list['Place']:
        """Return the tar files of a split if it has no manifest, else nothing."""
        return self.tars() if self.is_pattern or not (self.scheme or self.has_manifest()) else []

    def holds_shards(self) -> bool:
        """Return whether this split is read as shards, not as class folders."""
        return bool(self.scheme or self.is_pattern or self.has_manifest() or (self.is_shards and self.tars()))

    def is_class_folders(self) -> bool:
        """Return whether this is a split of class folders on this machine, not a folder of splits.

        A class may have the name of a split, and a split may hold images outside of class folders.
        """
        splits = [folder.path for split in SPLITS if (folder := self.join(split)).is_folder()]
        return self.is_folder() and has_class_folders(self.path) and not any(map(has_class_folders, splits))

    def describe_content(self) -> str:
        """Return what to say of a folder that lacks a split: the usual mistake, or what it holds."""
        if self.has_manifest() or self.is_class_folders():
            above, name = os.path.split(os.path.abspath(self.path))
            if name in SPLITS and any(os.path.isdir(os.path.join(above, split)) for split in SPLITS if split != name):
                looks = 'is' if self.has_manifest() else 'looks like'
                return f'; it {looks} a split itself: give {above!r} instead'
            found = 'the shards of one split'
            if not self.has_manifest():
                classes = list_classes(self.path)
                found = f'{plural(len(classes), "class folder")} ({name_some(classes, 3)})'
            return f', but {found}; to hold out a tenth of the images for evaluation give --val-fraction 0.1'
        if not self.is_shards and (tars := self.tars()):
            return f', but {plural(len(tars), "tar file")}; to read them as shards give {self.shards_address}'
        if other := describe_other_formats(self.path):
            return f', but {other}'
        content = sorted(name for name in os.listdir(self.path) if not name.startswith('.'))
        for inner in map(self.join, content):
            if inner.has_splits():
                return f'; did you mean {inner.path!r}?'
        found = name_some(content) if content else 'nothing'
        return f', but {found}; give the folder that holds the splits, or name them (--train-split, --val-split)'


def parse_place(address: str | os.PathLike | Place | None, *, is_shards: bool = False) -> Place:
    """Return the place of a data set as the user gives it: a folder, a pattern of tar files, or 'wds:' and either.

    is_shards: `address` consists of shards even without the prefix.
    Raises UserError for an address that is not read.
    """
    if isinstance(address, Place):
        return address
    address = os.fspath(address or '')
    path = address.removeprefix(PREFIX)
    is_shards = is_shards or path != address
    if not is_shards and '://' in path:
        raise UserError(f'{path}: remote data sets are read as shards: give {PREFIX}{path}')
    if is_shards and (not path or path.startswith('pipe:')):
        raise UserError(f'{address}: ' + ('commands are not run' if path else 'no path')
                        + f'; give shards as {PREFIX}/data/imagenet or {PREFIX}https://host/imagenet')
    place = parse_folder(path)
    return replace(place, is_pattern=_is_pattern(path), is_shards=is_shards)


def address_of_shards(path: str) -> str:
    """Return the address of the shards that `path`, which was given as an image, names; '' if it names none."""
    return PREFIX + path.removeprefix(PREFIX) if path.startswith(PREFIX) or path.endswith('.tar') else ''


def is_same_place(one: str, other: str) -> bool:
    """Return whether two addresses of data sets, as users give them, lead to the same place."""
    places = [parse_place(address) for address in (one, other)]
    first, second = (place.path if place.is_remote else os.path.realpath(place.path) for place in places)
    return first == second


def parse_folder(address: str) -> Place:
    """Return the place of a folder, or of an address of shards, whose name may have braces of its own.

    Raises UserError for an address that is not read.
    """
    path = address.removeprefix(PREFIX)
    if not (scheme := _scheme_of(path)):
        path = os.path.expanduser(path.removeprefix('file://'))
    return Place(path.rstrip('/') or path, scheme, is_shards=True)


def _scheme_of(path: str) -> str:
    """Return 'https' for 'https://host/file', '' for a path on this machine."""
    scheme, separator, _ = path.partition('://')
    if not separator or scheme == 'file':
        return ''
    if scheme.lower() not in SCHEMES:
        raise UserError(f'{path}: addresses of the kind {scheme!r} are not read; give a path, or one of '
                        f'{", ".join(f"{name}://" for name in SCHEMES[:4])}')
    return scheme.lower()


def _is_pattern(path: str) -> bool:
    return path.endswith('.tar') or '{' in path


def expand(pattern: str) -> list[str]:
    """Return the paths of a pattern with braces: 'a-{08..10}.tar' → a-08.tar, a-09.tar, a-10.tar; '{a,b}' → a, b."""
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
    # Inner braces are expanded first: '{a,{b,c}}' gives a once for each of b and c.
    return list(dict.fromkeys(
        path for choice in choices for path in expand(pattern[:match.start()] + choice + pattern[match.end():])))
