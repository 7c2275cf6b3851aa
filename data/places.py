"""Where a data set is: a folder, shards, an address, or a name."""
import os
import re

from timm.utils.misc import natural_key

from data.classes import name_some
from data.folders import has_class_folders, require_folder
from data.shards.manifest import FORMAT, MANIFEST
from utils.errors import UserError

PREFIX = 'wds:'
"""What a data set's path begins with to say that it consists of shards."""


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


SCHEMES = ('http', 'https', 's3', 'gs', 'gcs', 'az', 'abfs')
"""Kinds of addresses. Not every one that fsspec knows: some of those open files of this machine, or run programs."""


def scheme_of(path: str) -> str:
    """'https' for 'https://host/file', '' for a path of this machine. Raises UserError for a kind that is not read."""
    scheme, separator, _ = path.partition('://')
    if not separator or scheme == 'file':
        return ''
    if scheme.lower() not in SCHEMES:
        raise UserError(f'{path}: addresses of the kind {scheme!r} are not read; give a path, or one of '
                        f'{", ".join(f"{name}://" for name in SCHEMES[:4])}')
    return scheme.lower()


EVAL_SPLITS = ('val', 'validation', 'test')
"""Folders that are tried, in this order, where no evaluation split is named."""


def _has_splits(root: str) -> bool:
    return any(os.path.isdir(os.path.join(root, split)) for split in ('train', *EVAL_SPLITS))


def _parse_root(root: str | None) -> tuple[str, bool]:
    """The path or address of a data set, and whether it has been said to consist of shards."""
    root = os.fspath(root or '')
    if not root.startswith(PREFIX):
        if '://' in root:
            raise UserError(f'{root}: what is elsewhere is read as shards: give {PREFIX}{root}')
        return os.path.expanduser(root), False
    path = root.removeprefix(PREFIX)
    if not path or path.startswith('pipe:'):
        raise UserError(f'{root}: ' + ('commands are not run' if path else 'no path')
                        + f'; give shards as {PREFIX}/data/imagenet or {PREFIX}https://host/imagenet')
    return path if scheme_of(path) else os.path.expanduser(path.removeprefix('file://')), True


def _check_root(root: str) -> str:
    return root if scheme_of(root) or is_pattern(root) else require_folder(root)


def _join(root: str, split: str) -> str:
    return f'{root.rstrip("/")}/{split}' if scheme_of(root) else os.path.join(root, split)


def _describe_content(root: str) -> str:
    """What to say of a `root` that lacks a split: the usual mistakes, or simply what it holds."""
    if has_manifest(root):
        return f'; it is a split itself: give {os.path.dirname(os.path.abspath(root))!r} instead'
    if has_class_folders(root):
        return f'; it looks like a split itself: give {os.path.dirname(os.path.abspath(root))!r} instead'
    content = sorted(name for name in os.listdir(root) if not name.startswith('.'))
    for name in content:
        if _has_splits(os.path.join(root, name)):
            return f'; did you mean {os.path.join(root, name)!r}?'
    found = name_some(content) if content else 'nothing'
    return f', but {found}; give the folder that holds the splits, or name the split'
