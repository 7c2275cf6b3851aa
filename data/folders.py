"""Images in class folders, split/class/…/image.jpg, found in one scan; and images by their paths."""
import logging
import os
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from timm.utils.misc import natural_key

from data.base import ImageDataset, PathList
from data.classes import name_some
from data.decode import EXTENSIONS, read_file
from utils.console import plural
from utils.disk import read_text
from utils.errors import UserError

_logger = logging.getLogger(__name__)

# Tiny-ImageNet's evaluation images lie in one folder; this file, beside it, has their classes.
ANNOTATIONS, ANNOTATED = 'val_annotations.txt', 'images'
# Forms of data sets that are not read, by the endings of their files, and what to do with them.
SAVE = 'save the images as files in class folders (docs/data.md shows how)'
UNPACK = 'unpack them first'
OTHER_FORMATS = {'.parquet': ('Parquet', SAVE), '.arrow': ('Arrow', SAVE), '.tfrecord': ('TFRecord', SAVE),
                 '.mdb': ('LMDB', SAVE), '.h5': ('HDF5', SAVE), '.hdf5': ('HDF5', SAVE), '.zip': ('ZIP', UNPACK),
                 '.tar.gz': ('tar.gz', UNPACK), '.tgz': ('tar.gz', UNPACK)}


class ImageFolder(ImageDataset):
    """The images below the class folders of one split, ordered by class and then by path.

    Classes are in natural order ('9' before '10'), as in the published code. An empty class folder keeps its number.
    Hidden folders, hidden files and files without the ending of an image are ignored. Links are followed, unless they
    lead back to themselves. The log reports empty class folders, links that are not followed and the number of ignored
    files.

    Tiny-ImageNet's val/ is read as if its images lay in folders of the classes that val_annotations.txt gives them.

    Raises UserError if `folder` cannot be read, has no class folders, or has no images in them.
    """

    def __init__(self, folder: str):
        self.folder = require_folder(folder)
        if is_annotated(self.folder):
            classes, paths, targets = _read_annotated(self.folder)
            super().__init__(classes, targets)
            self._paths, self.num_ignored = PathList(paths), 0
            _logger.info('%s: %d images of %d classes, as %s has them', self.folder, len(self), len(classes),
                         ANNOTATIONS)
            return
        classes, loose = _list_split(self.folder)
        if not classes:
            raise UserError(_explain_no_classes(self.folder, loose))
        paths, targets, empty = [], [], []
        loops = [name for name in loose if os.path.isdir(os.path.join(self.folder, name))]
        ignored = [name for name in loose if name not in loops]
        for target, name in enumerate(classes):
            found = scan_class(self.folder, name)
            ignored += found.others
            paths += found.images
            targets += [target] * len(found.images)
            loops += found.loops
            if not found.images:
                empty.append(name)
        if not paths:
            other = describe_other_formats(self.folder)
            raise UserError(f'{self.folder}: no images in its {len(classes)} folders ({name_some(classes)})' + (
                f', but {other}' if other else
                f'; class folders with {", ".join(EXTENSIONS)} files are expected directly in it'))
        super().__init__(classes, targets)
        self._paths, self.num_ignored = PathList(paths), len(ignored)
        _logger.info('%s: %d images of %d classes', self.folder, len(self), len(classes))
        if ignored:
            _logger.warning('%s: ignored %d files that are no images or lie outside of class folders: %s',
                            self.folder, len(ignored), _count_endings(ignored))
        _warn_of_loops(self.folder, loops)
        if empty:
            _logger.warning('%s: %d class folders without images: %s', self.folder, len(empty), name_some(empty))

    def read_bytes_or_image(self, index: int) -> bytes:
        return read_file(self.path(index))

    def path(self, index: int) -> str:
        return os.path.join(self.folder, self._paths[index])

    def name(self, index: int) -> str:
        return self._paths[index]

    def _names(self):
        return self._paths.parts()


class ImageFiles(ImageDataset):
    """Images by their paths: files as given, and all images below folders. There are no classes; all targets are -1.

    Raises UserError if a path does not exist, or if a folder holds no image.
    """

    def __init__(self, paths: Sequence[str | os.PathLike]):
        files = []
        for path in (os.path.expanduser(os.fspath(path)) for path in paths):
            if not os.path.isdir(path):
                if not os.path.lexists(path):
                    raise UserError(f'image {path!r} does not exist; check the path')
                files.append(path)
                continue
            found = scan_class(path, '')
            if not found.images:
                raise UserError(f'folder {path!r} holds no images ({", ".join(EXTENSIONS)})')
            _warn_of_loops(path, found.loops)
            if found.others:
                _logger.warning('%s: ignored %d files that are no images: %s', path, len(found.others),
                                _count_endings(found.others))
            files += [os.path.join(path, name) for name in found.images]
        super().__init__([], np.full(len(files), -1))
        self._paths = PathList(files)

    def read_bytes_or_image(self, index: int) -> bytes:
        return read_file(self.path(index))

    def path(self, index: int) -> str:
        return self._paths[index]


def require_folder(folder: str) -> str:
    """Return `folder`. Raises UserError if it is not a folder."""
    if not folder:
        raise UserError('no data folder given; give the folder that holds train/ and val/')
    if not os.path.lexists(folder):
        raise UserError(f'data folder {folder!r} does not exist; check the path')
    if not os.path.isdir(folder):
        raise UserError(f'data folder {folder!r} is not a folder; give the folder that holds train/ and val/')
    return folder


def is_annotated(folder: str) -> bool:
    """Return whether `folder` is laid out as Tiny-ImageNet's val/."""
    return (os.path.isfile(os.path.join(folder, ANNOTATIONS))
            and os.path.isdir(os.path.join(folder, ANNOTATED)))


def _read_annotated(folder: str) -> tuple[list[str], list[str], list[int]]:
    """Return classes in natural order, and paths and targets of the images, ordered by class and then by path."""
    file = os.path.join(folder, ANNOTATIONS)
    try:
        lines = [line.split('\t') for line in read_text(file).split('\n') if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f'{file}: {getattr(error, "strerror", None) or "not UTF-8 text"}; copy it again') from None
    if bad := next((line for line in lines if len(line) < 2 or not all(_is_plain(part) for part in line[:2])), None):
        raise UserError(f'{file}: {" ".join(bad)[:80]!r} is no image and its class, separated by a tab; copy it again')
    class_of = {line[0]: line[1] for line in lines}
    images = scan_class(folder, ANNOTATED).images
    if unknown := [path for path in images if os.path.relpath(path, ANNOTATED) not in class_of]:
        raise UserError(f'{file} has no class for {plural(len(unknown), "image")} ({name_some(unknown, 2)}); copy it '
                        'again, or take them away')
    if not images:
        raise UserError(f'{folder}: no images in its folder {ANNOTATED!r}; copy them again')
    classes = sorted(sorted(set(class_of.values())), key=natural_key)
    number = {name: target for target, name in enumerate(classes)}
    pairs = sorted((number[class_of[os.path.relpath(path, ANNOTATED)]], path) for path in images)
    return classes, [path for _, path in pairs], [target for target, _ in pairs]


def _is_plain(name: str) -> bool:
    return bool(name) and name.isprintable() and '/' not in name


def list_classes(folder: str) -> list[str]:
    """Return the names of the class folders of a split, in the order of their numbers."""
    return _list_split(folder)[0]


def describe_other_formats(folder: str) -> str:
    """Return what to say of files of OTHER_FORMATS in `folder` or the folders in it; '' if there are none."""
    folders, files = _list_split(folder)
    files = files + [name for inner in folders for name in _list_split(os.path.join(folder, inner))[1]]
    for ending, (format_name, remedy) in OTHER_FORMATS.items():
        if count := sum(name.lower().endswith(ending) for name in files):
            return f'{plural(count, "file")} in the {format_name} format, which is not read; {remedy}'
    return ''


def has_class_folders(folder: str) -> bool:
    """Return whether a folder in `folder` holds an image directly, as in a split, not in a whole data set."""
    classes, _ = _list_split(folder)
    return any(_is_image(entry.name) for name in classes for entry in _entries(os.path.join(folder, name)))


def _entries(folder: str) -> list[os.DirEntry]:
    """Return what is in `folder`. Raises UserError if it cannot be listed."""
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        raise UserError(f'folder {folder!r} cannot be read ({error.strerror}); check its permissions') from None


def _list_split(folder: str) -> tuple[list[str], list[str]]:
    """Return the names of the visible folders in `folder`, in natural order, and those of its files and of links that
    lead back to it.
    """
    classes, files = [], []
    for entry in _entries(folder):
        if not entry.is_dir() or entry.is_symlink() and _lies_in(os.path.realpath(folder), os.path.realpath(entry)):
            files.append(entry.name)
        elif not entry.name.startswith('.'):  # .ipynb_checkpoints is no class
            classes.append(entry.name)
    # Plain order first: natural_key does not tell names that differ only in case.
    return sorted(sorted(classes), key=natural_key), files


class Scan(NamedTuple):
    """What a class folder holds at any depth, as sorted paths in the split.

    images: files with the ending of an image. others: all other files. loops: links to a folder that leads back to the
    link.
    """
    images: list[str]
    others: list[str]
    loops: list[str]


def scan_class(split: str, name: str) -> Scan:
    """Return the content of folder `name` of `split`, without hidden folders. Links are followed, loops are not."""
    found = Scan([], [], [])
    # With each folder, where the links lie that lead to it. Only a link above one of them can lead back.
    pending: list[tuple[str, tuple[str, ...]]] = [(name, ())]
    while pending:
        folder, links = pending.pop()
        for entry in _entries(os.path.join(split, folder)):
            path = os.path.join(folder, entry.name)
            # Links named as images are files: looking at a million of them would take long.
            if entry.is_symlink() and _is_image(entry.name) or not entry.is_dir():
                (found.images if _is_image(entry.name) else found.others).append(path)
            elif entry.name.startswith('.'):
                continue
            elif not entry.is_symlink():
                pending.append((path, links))
            else:
                places = (*links, os.path.realpath(os.path.join(split, folder)))
                if any(_lies_in(place, os.path.realpath(entry.path)) for place in places):
                    found.loops.append(path)
                else:
                    pending.append((path, places))
    for paths in found:
        paths.sort()
    return found


def _lies_in(path: str, folder: str) -> bool:
    return os.path.commonpath((path, folder)) == folder


def _count_endings(paths: Sequence[str]) -> str:
    endings = Counter(os.path.splitext(path)[1].lower() or 'without ending' for path in paths)
    return ', '.join(f'{count} {ending}' for ending, count in endings.most_common(5))


def _warn_of_loops(folder: str, loops: list[str]) -> None:
    if loops:
        _logger.warning('%s: %d links are not followed, since they lead back to themselves: %s', folder, len(loops),
                        name_some(sorted(loops)))


def _is_image(name: str) -> bool:
    return name.lower().endswith(EXTENSIONS) and not name.startswith('.')


def _explain_no_classes(folder: str, files: list[str]) -> str:
    if num_images := sum(map(_is_image, files)):
        return (f'{folder}: {num_images} images but no class folders (as ImageNet\'s validation set comes); '
                'move each image into a folder named after its class, with the names of train')
    if other := describe_other_formats(folder):
        return f'{folder}: no class folders in it, but {other}'
    return f'{folder}: no class folders in it; class folders with images are expected directly in it'
