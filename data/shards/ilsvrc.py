"""ImageNet's original archives, read in place by the offsets of their images.

    train = open_archive('ILSVRC2012_img_train.tar')                                # a tar file of 1,000 tar files
    val = open_archive('ILSVRC2012_img_val.tar', 'ILSVRC2012_devkit_t12.tar.gz')    # 50,000 images, numbered

The devkit has the class number of each validation image, and a MATLAB file with the WordNet id of each number.
"""
import hashlib
import io
import logging
import os
import re
import tarfile
from typing import NamedTuple

import numpy as np
from torchvision.datasets.imagenet import ARCHIVE_META

from data.base import ImageDataset, PathList
from data.classes import name_some
from data.decode import EXTENSIONS, ImageError
from data.shards.tar import Member, refusal, scan_tar
from utils.console import progress_bar
from utils.errors import UserError

_logger = logging.getLogger(__name__)

ARCHIVES = {'train': ARCHIVE_META['train'][0], 'val': ARCHIVE_META['val'][0]}
DEVKIT = ARCHIVE_META['devkit'][0]
IMAGES = {'train': 1_281_167, 'val': 50_000}
# Longer tar files in a tar file are refused; ImageNet's longest has 0.2 GB.
MAX_ARCHIVE = 1 << 33
_META, _TRUTH = 'data/meta.mat', 'data/ILSVRC2012_validation_ground_truth.txt'


class Archive(ImageDataset):
    """The images of one of the two archives, under their names in class folders.

    split: 'train' or 'val'. names: paths such as 'n01440764/n01440764_18.JPEG', ordered by class and then by name.
    offset, size: int64 [len], of the images in the archive.
    """

    def __init__(self, path: str, split: str, classes: list[str], found: list[tuple[str, Member]]):
        found = sorted(found, key=lambda pair: (pair[0], pair[1].name))
        number = {name: target for target, name in enumerate(classes)}
        super().__init__(classes, [number[name] for name, _ in found])
        self.archive, self.split = path, split
        self.names = PathList([f'{name}/{member.name}' for name, member in found])
        self.offset = np.array([member.offset for _, member in found], np.int64)
        self.size = np.array([member.size for _, member in found], np.int64)
        self._file = open(path, 'rb', buffering=0)  # pread uses no position, so forks may share it

    def read_bytes_or_image(self, index: int) -> bytes:
        size = int(self.size[index])
        try:
            content = os.pread(self._file.fileno(), size, int(self.offset[index]))
        except OSError as error:
            raise ImageError(f'image {self.path(index)}: {error.strerror or error}') from None
        if len(content) < size:
            raise ImageError(f'image {self.path(index)}: the archive ends within it; download it again')
        return content

    def path(self, index: int) -> str:
        return f'{self.archive}::{self.names[index]}'


class Devkit(NamedTuple):
    """wnids: WordNet ids by ILSVRC's numbers, which begin with 1. truth: the number of each validation image."""
    wnids: dict[int, str]
    truth: list[int]


def open_archive(path: str, devkit: str | None = None) -> Archive:
    """Read the headers of one of the archives, under any file name, and return its images.

    devkit: its archive; None takes DEVKIT beside `path` if there is one. Training images do not need it.
    Raises UserError for another or a truncated archive, for members that are no plain files, and if the devkit is
    missing, damaged, or of other classes. Logs a warning if the counts are not IMAGES.
    """
    beside = os.path.join(os.path.dirname(path), DEVKIT)
    if devkit is None and os.path.exists(beside):
        devkit = beside
    try:
        with open(path, 'rb') as file:
            first = next(scan_tar(file, path, max_bytes=MAX_ARCHIVE), None)
            if first and re.fullmatch(r'n\d{8}\.tar', first.name):
                archive = _open_train(path, file, devkit)
            elif first and re.fullmatch(r'ILSVRC2012_val_\d{8}\.JPEG', first.name):
                archive = _open_val(path, file, devkit)
            else:
                begins = f'it begins with {first.name!r}' if first else 'it is empty'
                raise UserError(f'{path} is neither {" nor ".join(ARCHIVES.values())}: {begins}; shards made elsewhere '
                                'are read without packing (wds:PATH)')
    except OSError as error:
        raise UserError(f'archive {path}: {error.strerror or error}; check the path') from None
    if not len(archive):
        raise UserError(f'{path}: no images in it; download it again')
    if len(archive) != IMAGES[archive.split]:
        _logger.warning('%s: %d images of %d classes; ImageNet has %d of 1000', path, len(archive),
                        len(archive.classes), IMAGES[archive.split])
    return archive


def _open_train(path: str, file, devkit: str | None) -> Archive:
    found, classes = [], []
    with progress_bar(total=os.path.getsize(path), unit='B', unit_scale=True, desc='headers') as bar:
        for inner in scan_tar(file, path, max_bytes=MAX_ARCHIVE):
            match = re.fullmatch(r'(n\d{8})\.tar', inner.name)
            if not match:
                raise refusal(path, inner.name, 'no archive of a class')
            classes.append(match[1])
            # Its own file object keeps the position of the outer scan.
            where, end = f'{path}::{inner.name}', inner.offset + inner.size
            with open(path, 'rb') as part:
                for member in scan_tar(part, where, start=inner.offset, end=end):
                    if '/' in member.name or not member.name.lower().endswith(EXTENSIONS):
                        raise refusal(where, member.name, 'no image')
                    found.append((match[1], member))
            bar.update(end - bar.n)
    if devkit:
        published = sorted(read_devkit(devkit).wnids.values())
        if extra := sorted(set(classes) - set(published)):
            raise UserError(f'{path}: {name_some(extra)} not among the {len(published)} classes of {devkit}; '
                            'give the devkit that belongs to it')
        if missing := sorted(set(published) - set(classes)):
            _logger.warning('%s: no images of %s, which %s knows', path, name_some(missing), devkit)
        classes = published  # both splits number classes alike
    return Archive(path, 'train', sorted(classes), found)


def _open_val(path: str, file, devkit: str | None) -> Archive:
    if devkit is None:
        raise UserError(f'{path}: the classes of its images are in {DEVKIT}; download it from the same site, and '
                        'give it with --devkit')
    kit, found = read_devkit(devkit), []
    for member in scan_tar(file, path):
        match = re.fullmatch(r'ILSVRC2012_val_(\d{8})\.JPEG', member.name)
        if not match:
            raise refusal(path, member.name, 'no image of the validation set')
        number = int(match[1])
        if not 1 <= number <= len(kit.truth):
            raise UserError(f'{path}: {member.name!r}, but {devkit} has the classes of {len(kit.truth)} images; '
                            'give the devkit that belongs to it')
        found.append((kit.wnids[kit.truth[number - 1]], member))
    return Archive(path, 'val', sorted(kit.wnids.values()), found)


def read_devkit(path: str) -> Devkit:
    """Read the devkit's archive. Raises UserError if it is damaged, or no devkit."""
    try:
        from scipy.io import loadmat
    except ImportError:
        raise UserError(f'{path}: reading it needs scipy: pip install -r requirements-shards.txt') from None
    files = {}
    try:
        with tarfile.open(path, 'r:*') as archive:
            for member in archive:
                name = next((name for name in (_META, _TRUTH) if member.name.endswith('/' + name)), None)
                file = archive.extractfile(member) if name and member.isreg() and member.size < 1 << 26 else None
                if name and file:
                    files[name] = file.read()
        synsets = np.atleast_1d(loadmat(io.BytesIO(files[_META]), squeeze_me=True)['synsets'])
        # Synsets with children are groups of classes.
        wnids = {int(row['ILSVRC2012_ID']): str(row['WNID']) for row in synsets if not int(row['num_children'])}
        truth = [int(line) for line in files[_TRUTH].split()]
    except FileNotFoundError:
        raise UserError(f'devkit {path} does not exist; check the path') from None
    except Exception as error:  # readers raise nearly anything for damaged files
        what = f'no {error} in it' if isinstance(error, KeyError) else ' '.join(str(error).split())
        raise UserError(f'{path} is damaged, or not {DEVKIT} ({what}); download it again') from None
    bad = [name for name in wnids.values() if not re.fullmatch(r'n\d{8}', name)]
    if bad or not set(truth) <= wnids.keys():
        what = f'{bad[0]!r} is no WordNet id' if bad else f'its images are of {min(set(truth) - wnids.keys())}'
        raise UserError(f'{path} disagrees with itself: {what}, and its {len(wnids)} classes have other numbers; '
                        'download it again')
    return Devkit(wnids, truth)


def check_md5(path: str, kind: str) -> None:
    """Raise UserError if an archive's MD5 is not the published one. kind: 'train', 'val' or 'devkit'."""
    digest = hashlib.md5(usedforsecurity=False)
    try:
        with open(path, 'rb') as file, progress_bar(total=os.path.getsize(path), unit='B', unit_scale=True,
                                                    desc=f'MD5 of {os.path.basename(path)}') as bar:
            while chunk := file.read(1 << 22):
                digest.update(chunk)
                bar.update(len(chunk))
    except OSError as error:
        raise UserError(f'{path}: {error.strerror or error}; check the path') from None
    published = ARCHIVE_META[kind][1]
    if digest.hexdigest() != published:
        raise UserError(f'{path}: its MD5 is {digest.hexdigest()}, that of {ARCHIVE_META[kind][0]} is {published}; '
                        'download it again, or leave --verify out if it is meant to differ')
