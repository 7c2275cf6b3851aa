"""Datasets by name: image folders, CIFAR, the embedded digits, and synthetic images for measuring.

    train, val = open_train_val('folder', '/data/imagenet')
    val = open_eval('folder', '/data/imagenet/val', classes=checkpoint_classes)

| name | what it is |
|---|---|
| folder, imagenet, '' | root/train/CLASS/….jpg, and the same below root/val, root/validation or root/test |
| | or shards (see shards.py) in root/train, root/val …; with root = 'wds:ADDRESS' also elsewhere, by http(s) or S3 |
| cifar10, cifar100 | the published binary files in root, fetched with `download`; or folders as above |
| digits | 1,797 handwritten digits of 8 × 8 pixels, embedded, for trying things in seconds |
| synthetic | random pictures, for measuring |

`digits` is data/digits.npz (licence and source: data/digits.LICENSE). It was made from scikit-learn's
`digits = load_digits()` as numpy.savez_compressed(file, images=…, targets=…, is_val=…): `images` is
`digits.images` as uint8 [1797, 8, 8] with ink from 0 to 16, `targets` is `digits.target` as uint8, and
`is_val` marks the fixed fifth of each class that is held out: for class k, of its n indices in order,
permuted by `numpy.random.RandomState(k)`, the first round(n / 5).
"""

import difflib
import logging
import os
from collections.abc import Sequence

from data.arrays import _CIFAR, _open_part
from data.base import ImageDataset
from data.classes import match_classes, select_classes
from data.folders import ImageFolder, has_class_folders
from data.places import (
    EVAL_SPLITS,
    PREFIX,
    _check_root,
    _describe_content,
    _has_splits,
    _join,
    _parse_root,
    has_manifest,
    is_pattern,
    list_tars,
    scheme_of,
)
from data.shards.cache import Cache
from data.shards.dataset import Shards, open_shards, reader
from data.shards.manifest import MANIFEST, Manifest
from data.shards.remote import NotFoundError
from options.groups import DATASETS
from utils.errors import UserError

_logger = logging.getLogger(__name__)

def open_train_val(
    name: str,
    root: str | None = None,
    *,
    train_split: str = 'train',
    val_split: str | None = None,
    download: bool = False,
    only_classes: str | None = None,
    allow_missing_classes: bool = False,
    num_images: int = 1024,
    image_size: int | Sequence[int] = 224,
    num_classes: int = 1000,
    cache: Cache | None = None,
) -> tuple[ImageDataset, ImageDataset]:
    """The training and the evaluation split as two ImageDatasets with one class map, the training split's.

    name: one of DATASETS, or '' for 'folder'. root: the folder with the data, or 'wds:' and its path or address.
    train_split, val_split: the folders of the splits, or patterns of tar files; None looks for EVAL_SPLITS.
    download: fetch CIFAR's files into `root` if they are not there; in one process while others wait.
    only_classes: a subset such as '0-4' or 'cat,dog', renumbered from 0 (see `select_classes`).
    allow_missing_classes: let the evaluation split lack classes.
    num_images, image_size, num_classes: of each split of 'synthetic', ignored for the others.
    cache: where shards from elsewhere are fetched to.
    Raises UserError for an unknown name, a folder that is not laid out as expected, splits whose classes
    differ, a training split of fewer than two classes, or a failed download.
    """
    root, is_wds = _parse_root(root)
    name = _resolve_name(name, root, is_wds)
    train: ImageDataset
    val: ImageDataset
    if name == 'folder':
        root, cache = _check_root(root), cache or Cache()
        if is_pattern(root):
            raise UserError(f'{root}: one split, but two are needed: give its folder, with --train-split and '
                            '--val-split for the patterns')
        trained = _open_split(_find_split(root, train_split, cache), is_wds, cache)
        folder = _find_split(root, val_split, cache) if val_split else _find_eval_split(root, cache)
        evaluated = _open_split(folder, is_wds, cache)
        _name_numbers(trained, None, '')
        _name_numbers(evaluated, trained.classes, trained.folder)
        _check_two_classes(trained)
        train, val = trained, match_classes(evaluated, trained.classes, where=evaluated.folder,
                                            map_source=trained.folder, allow_missing=allow_missing_classes)
    else:
        synthetic = (num_images, image_size, num_classes)
        train = _open_part(name, root, train_split, download, synthetic)
        val = _open_part(name, root, val_split, download, synthetic)
    return select_classes(train, only_classes), select_classes(val, only_classes)


def open_eval(
    name: str,
    root: str | None = None,
    *,
    split: str | None = None,
    classes: Sequence[str] | None = None,
    download: bool = False,
    only_classes: str | None = None,
    allow_missing_classes: bool = False,
    num_images: int = 1024,
    image_size: int | Sequence[int] = 224,
    num_classes: int = 1000,
    cache: Cache | None = None,
) -> ImageDataset:
    """One split of a dataset for evaluation, as an ImageDataset.

    The class map is `classes` (names in order, from a checkpoint or `read_class_map`) if given, else that of
    the folder root/train if there is one, else the split's own folders. `only_classes` is applied before
    `classes`, so that a model trained on a subset is evaluated with the same option.

    split: the split's folder; None looks for EVAL_SPLITS, then takes `root` itself if it holds class folders.
    The other arguments and the errors are those of `open_train_val`.
    """
    root, is_wds = _parse_root(root)
    name = _resolve_name(name, root, is_wds)
    if name == 'folder':
        root, cache = _check_root(root), cache or Cache()
        dataset = _open_eval_split(root, split, classes, allow_missing_classes, is_wds, cache)
        where = root
    else:
        dataset = _open_part(name, root, split, download, (num_images, image_size, num_classes))
        where = name
    dataset = select_classes(dataset, only_classes)
    if classes is not None:
        dataset = match_classes(dataset, classes, where=where, map_source='the model',
                                allow_missing=allow_missing_classes)
    return dataset


def _resolve_name(name: str, root: str, is_wds: bool) -> str:
    """`name`, which must be one of DATASETS, or 'folder' for its aliases and for CIFAR as image folders."""
    name = (name or 'folder').lower()
    if name not in DATASETS:
        near = difflib.get_close_matches(name, DATASETS, n=1)
        hint = f'did you mean {near[0]!r}?' if near else f'choose from {", ".join(DATASETS)}'
        raise UserError(f'unknown dataset {name!r}; {hint}')
    if name == 'imagenet' or (name in _CIFAR and root and (is_wds or _has_splits(root))):
        return 'folder'
    if is_wds and name != 'folder':
        raise UserError(f'dataset {name!r} and {PREFIX}{root}: shards are of the dataset folder; leave out --dataset')
    return name


# ----------------------------------------------------------------------------------------------------------
# Image folders and shards


def _open_split(path: str, is_wds: bool, cache: Cache) -> ImageFolder | Shards:
    """The split at `path`: shards if it has a manifest, tar files if that was said, else class folders."""
    if scheme_of(path) or is_pattern(path) or has_manifest(path):
        return open_shards(path, cache)
    tars = list_tars(path)
    if is_wds and tars:
        return open_shards(path, cache)
    if is_wds:
        what = 'class folders; leave out "wds:"' if has_class_folders(path) else f'neither {MANIFEST} nor tar files'
        raise UserError(f'{path} holds {what}')
    if tars and not has_class_folders(path):
        raise UserError(f'{path} holds {len(tars)} tar files; to read them as shards give {PREFIX}{path}')
    return ImageFolder(path)


def _open_eval_split(root: str, split: str | None, classes: Sequence[str] | None, allow_missing: bool, is_wds: bool,
                     cache: Cache) -> ImageDataset:
    """The evaluation split below `root`, or `root` itself, numbered as root/train if that rules."""
    if is_pattern(root):
        folder, train_classes = root, None
    else:
        folder = _find_split(root, split, cache) if split else _find_eval_split(root, cache, or_itself=True)
        train_classes = None
        if classes is None and folder not in (root, _join(root, 'train')):
            train_classes = _read_train_classes(root, is_wds, cache)
    dataset = _open_split(folder, is_wds, cache)
    _name_numbers(dataset, classes or train_classes, 'the model' if classes else _join(root, 'train'))
    if classes is not None:
        return dataset  # the caller numbers it
    if train_classes is not None:
        return match_classes(dataset, train_classes, where=folder, map_source=_join(root, 'train'),
                             allow_missing=allow_missing)
    _check_two_classes(dataset)
    _logger.info('%s: classes are numbered by its own %d %s', folder, len(dataset.classes),
                 'names' if isinstance(dataset, Shards) else 'folders')
    return dataset


def _read_train_classes(root: str, is_wds: bool, cache: Cache) -> list[str] | None:
    """The class map of root/train, where there is one."""
    train = _join(root, 'train')
    if scheme_of(root) or has_manifest(train):
        try:
            return Manifest.read_classes(reader(train, cache.opening_patience), train)
        except NotFoundError:
            return None
    if not os.path.isdir(train):
        return None
    dataset = _open_split(train, is_wds, cache)
    _name_numbers(dataset, None, '')
    return dataset.classes


def _name_numbers(dataset: ImageFolder | Shards, classes: Sequence[str] | None, map_source: str) -> None:
    if isinstance(dataset, Shards):
        dataset.name_numbers(classes, map_source)


def _find_split(root: str, split: str, cache: Cache) -> str:
    """The path of the folder `split` in `root`. Raises UserError that says what is in `root` instead."""
    folder = _join(root, split)
    if is_pattern(split) or os.path.isdir(folder):
        return folder
    if scheme_of(root):
        return _find_address([folder], cache)
    raise UserError(f'{root}: no folder {split!r} in it{_describe_content(root)}')


def _find_eval_split(root: str, cache: Cache, or_itself: bool = False) -> str:
    """The first of EVAL_SPLITS that is in `root`, or `root` if that is a split and `or_itself` is set."""
    if scheme_of(root):
        return _find_address([_join(root, split) for split in EVAL_SPLITS] + [root] * or_itself, cache)
    for split in EVAL_SPLITS:
        if os.path.isdir(os.path.join(root, split)):
            return os.path.join(root, split)
    if or_itself and (has_manifest(root) or not os.path.isdir(os.path.join(root, 'train'))):
        return root
    raise UserError(f'{root}: no folder {", ".join(EVAL_SPLITS[:-1])} or {EVAL_SPLITS[-1]} in it'
                    f'{_describe_content(root)}')


def _find_address(addresses: list[str], cache: Cache) -> str:
    """The first address that has a manifest. A store may refuse what is not there, rather than say so."""
    reasons = []
    for address in addresses:
        try:
            reader(address, cache.opening_patience)(MANIFEST)
            return address
        except NotFoundError as error:
            reasons.append(str(error))
    raise UserError(f'{reasons[0]}; give the address of a folder that tools/pack.py has written, or name the split')


def _check_two_classes(dataset: ImageFolder | Shards):
    if len(dataset.classes) < 2:
        kind = 'class' if isinstance(dataset, Shards) else 'class folder'
        raise UserError(f'{dataset.folder}: a single {kind}, {dataset.classes[0]!r}; at least two are needed'
                        + ('' if isinstance(dataset, Shards) else ', directly in it'))


# ----------------------------------------------------------------------------------------------------------
# Datasets that are not folders
