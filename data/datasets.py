"""Data sets by name or place, with their splits and class numbers.

    train, val = open_train_val('folder', '/data/imagenet')
    val = open_eval('folder', '/data/imagenet/val', classes=checkpoint_classes)

| name | what it reads |
|---|---|
| folder, imagenet, '' | root/train/CLASS/….jpg, and the same below root/val, or another of EVAL_SPLITS |
| | or shards in root/train, root/val …; with root = 'wds:ADDRESS' also from a web server or an object store |
| | or root/CLASS/….jpg alone, of which `val_fraction` is held out |
| any other | what its opener in options/datasets.py reads |
"""
import logging
import pkgutil
from collections.abc import Sequence
from os import PathLike

from data.base import ImageDataset, Request
from data.classes import are_positions, match_classes, select_classes
from data.folders import ImageFiles, ImageFolder, has_class_folders, require_folder
from data.held_out import hold_out, hold_out_fold
from data.places import EVAL_SPLITS, SPLITS, Place, parse_place
from data.shards.cache import Cache
from data.shards.dataset import Shards, open_shards, reader
from data.shards.manifest import MANIFEST, Manifest
from data.shards.remote import NotFoundError
from data.shards.together import split_of, splits_together
from data.shards.verifying import has_split
from options.datasets import DATASETS
from utils.errors import UserError, did_you_mean

_logger = logging.getLogger(__name__)


def open_train_val(
    name: str,
    root: str | PathLike | None = None,
    *,
    train_split: str = 'train',
    val_split: str | None = None,
    val_fraction: float | None = None,
    fold: tuple[int, int] | None = None,
    only_classes: str | None = None,
    allow_missing_classes: bool = False,
    cache: Cache | None = None,
    **options,
) -> tuple[ImageDataset, ImageDataset]:
    """Return the training and the evaluation split, both with the training split's class numbers.

    name: one of DATASETS, or '' for 'folder'. root: the folder with the data, or 'wds:' and its path or address.
    train_split, val_split: folders of the splits, or patterns of tar files; None tries EVAL_SPLITS.
    val_fraction: instead of an evaluation split, this share of root/train, or of root itself (see `hold_out`).
    fold: instead of an evaluation split, fold k of K, as (k, K), of the training images (see `hold_out_fold`).
    only_classes: a subset such as '0-4' or 'cat,dog', renumbered from 0 (see `select_classes`).
    allow_missing_classes: let the evaluation split lack classes.
    cache: where remote shards are stored.
    options: `download`, `num_images` … of a `Request`, for data sets with an opener.
    Raises UserError for an unknown name, a folder that is not laid out as expected, splits whose classes
    differ, a training split of fewer than two classes, a failed download, or a `val_fraction` of a data set that has an
    evaluation split.
    """
    place = parse_place(root)
    name = _resolve_name(name, place)
    request = Request(name, place.path, **options)
    if val_fraction or fold:
        train, val = (_open_fold(request, place, train_split, fold, cache or Cache()) if fold else
                      _open_parts(name, place, train_split, val_split, val_fraction or 0, cache or Cache()))
        return select_classes(train, only_classes), select_classes(val, only_classes)
    if DATASETS[name].opener:
        train, val = (_open_part(request, split) for split in (train_split, val_split))
        return select_classes(train, only_classes), select_classes(val, only_classes)
    place.require()
    if place.is_pattern:
        raise UserError(f'{place}: one split, but two are needed: give its folder, with --train-split and '
                        '--val-split for the patterns, or --val-fraction 0.1')
    cache = cache or Cache()
    trained = _open_split(_find_split(place, train_split, cache), cache)
    found = _find_split(place, val_split, cache) if val_split else _find_eval_split(place, cache, or_itself=False)
    evaluated = _open_split(found, cache)
    _name_numbers(trained, None, '')
    _name_numbers(evaluated, trained.classes, trained.folder)
    _check_two_classes(trained)
    matched = match_classes(evaluated, trained.classes, where=evaluated.folder, map_source=trained.folder,
                            allow_missing=allow_missing_classes)
    return select_classes(trained, only_classes), select_classes(matched, only_classes)


def open_eval(
    name: str,
    root: str | PathLike | None = None,
    *,
    split: str | None = None,
    val_fraction: float | None = None,
    fold: tuple[int, int] | None = None,
    train_split: str = 'train',
    classes: Sequence[str] | None = None,
    only_classes: str | None = None,
    allow_missing_classes: bool = False,
    cache: Cache | None = None,
    **options,
) -> ImageDataset:
    """Return one split for evaluation.

    Its class numbers are those of `classes` (names in order, from a checkpoint or `read_class_map`) if given, else of
    root/train if there is one, else of the split's own folders. `only_classes` is applied before `classes`, so that a
    model trained on a subset is evaluated with the same option.

    split: the split's folder; None tries EVAL_SPLITS, then `root` itself if it holds class folders.
    val_fraction, fold: instead, the images that `open_train_val` holds out, for a fold of `train_split`.
    The other arguments and the errors are those of `open_train_val`.
    """
    place = parse_place(root)
    name = _resolve_name(name, place)
    request = Request(name, place.path, **options)
    if fold:
        _, dataset = _open_fold(request, place, train_split, fold, cache or Cache(), classes)
    elif val_fraction:
        _, dataset = _open_parts(name, place, 'train', split, val_fraction, cache or Cache(), classes)
    elif DATASETS[name].opener:
        dataset = _open_part(request, split)
    else:
        place.require()
        dataset = _open_eval_split(place, split, classes, allow_missing_classes, cache or Cache())
    dataset = select_classes(dataset, only_classes)
    if classes is not None:
        where = name if DATASETS[name].opener else str(place)
        if not set(dataset.classes) & set(classes) and are_positions(dataset.classes, len(classes)):
            _logger.info('%s: its classes are numbers, taken for positions in the class map of the model', where)
            dataset.classes = [classes[int(number)] for number in dataset.classes]
        dataset = match_classes(dataset, classes, where=where, map_source='the model',
                                allow_missing=allow_missing_classes)
    return dataset


def open_without_targets(root: str | PathLike, *, split: str | None = None) -> ImageDataset | None:
    """Return the images of an evaluation split of files, found as by `open_eval`, in whatever folders they lie.

    All targets are -1. Returns None for shards.
    """
    place = parse_place(root)
    place.require()
    if place.is_pattern or place.is_remote or place.is_shards:
        return None
    cache = Cache()
    found = _find_split(place, split, cache) if split else _find_eval_split(place, cache, or_itself=True)
    return None if found.holds_shards() else ImageFiles([found.path])


def has_eval_split(root: str | PathLike, *, cache: Cache) -> bool:
    """Return whether a data set of class folders or shards has an evaluation split of a usual name.

    Raises UserError for an address that is not read.
    """
    place = parse_place(root)
    place.require()
    return not place.is_class_folders() and any(split in EVAL_SPLITS for split in _splits_in(place, cache))


def _resolve_name(name: str, place: Place) -> str:
    """Return the name in DATASETS under which `place` is opened: 'folder' for class folders, whatever they hold."""
    name = (name or 'folder').lower()
    if name not in DATASETS:
        hint = did_you_mean(name, DATASETS) or f'; choose from {", ".join(DATASETS)}'
        raise UserError(f'unknown dataset {name!r}{hint}')
    if DATASETS[name].folder and place.path and (place.is_shards or place.has_splits() or place.is_class_folders()):
        return 'folder'
    if place.is_shards and DATASETS[name].opener:
        raise UserError(f'dataset {name!r} and {place.shards_address}: only the dataset folder has shards; leave out '
                        '--dataset')
    if DATASETS[name].folder == '' and place.path:
        raise UserError(f'{place.path}: the dataset {name} needs no folder; leave out the folder, or --dataset to read '
                        'it')
    return name


def _open_part(request: Request, split: str | None) -> ImageDataset:
    """Return a split of a data set that has its own opener: for training if `split` is 'train', else for evaluation."""
    if split not in (None, 'train', *EVAL_SPLITS):
        raise UserError(f'dataset {request.name!r} has no split {split!r}; choose train or val')
    entry = DATASETS[request.name]
    if entry.folder is None:
        require_folder(request.folder)
    return pkgutil.resolve_name(entry.opener)(request._replace(is_train=split == 'train'))


# ---------------------------------------------------------------------------------------------------------------------
# Class folders and shards


def _open_split(place: Place, cache: Cache) -> ImageFolder | Shards:
    if place.holds_shards():
        return open_shards(place, cache)
    if place.is_shards:
        what = 'class folders; leave out "wds:"' if has_class_folders(place.path) else (
            f'neither {MANIFEST} nor tar files')
        raise UserError(f'{place} holds {what}')
    if (tars := place.tars()) and not has_class_folders(place.path):
        raise UserError(f'{place} holds {len(tars)} tar files; to read them as shards give {place.shards_address}')
    return ImageFolder(place.path)


def _open_parts(name: str, place: Place, train_split: str, val_split: str | None, val_fraction: float, cache: Cache,
                classes: Sequence[str] | None = None) -> tuple[ImageDataset, ImageDataset]:
    """Return both parts of the training split in `place`, or of `place` itself, as `hold_out` divides it."""
    given = f'--val-fraction {val_fraction:g}'
    if DATASETS[name].opener:
        raise UserError(f'{given}: the dataset {name} has an evaluation split; leave the option out')
    if val_split:
        raise UserError(f'{given} beside --val-split {val_split}; leave one of them out')
    place.require()
    train, splits = place, _splits_in(place, cache)
    if not place.is_class_folders():  # else 'train' or 'test' may be the name of a class
        train = splits.get(train_split, place)
        if found := next((splits[split] for split in EVAL_SPLITS if split in splits), None):
            raise UserError(f'{given}: {place} has an evaluation split, {found}; leave the option out'
                            + (f', or give {train} to hold out a part of that' if train.is_folder() else ''))
    whole = _open_split(train, cache)
    _name_numbers(whole, classes, 'the model')
    _check_two_classes(whole)
    return hold_out(whole, val_fraction, where=whole.folder)


def _open_fold(request: Request, place: Place, train_split: str, fold: tuple[int, int], cache: Cache,
               classes: Sequence[str] | None = None) -> tuple[ImageDataset, ImageDataset]:
    """Return the images outside and inside a fold of the training images, whether or not there are others."""
    if DATASETS[request.name].opener:
        return hold_out_fold(_open_part(request, train_split), *fold, where=request.name)
    place.require()
    train = place
    if not place.is_pattern and not place.is_class_folders():
        splits = _splits_in(place, cache)
        train = splits.get(train_split) or (_find_split(place, train_split, cache) if splits else place)
    whole = _open_split(train, cache)
    _name_numbers(whole, classes, 'the model')
    _check_two_classes(whole)
    return hold_out_fold(whole, *fold, where=whole.folder)


def _splits_in(place: Place, cache: Cache) -> dict[str, Place]:
    """Return the splits in `place` that have a usual name: folders in it, or tar files that lie together."""
    if place.is_pattern:
        return {}
    if place.is_remote:
        found = {split: place.join(split) for split in SPLITS if has_split(place.join(split), cache.opening_patience)}
    else:
        found = {split: folder for split in SPLITS if (folder := place.join(split)).is_folder()}
    return found or _find_together(place, cache)


def _open_eval_split(place: Place, split: str | None, classes: Sequence[str] | None, allow_missing: bool,
                     cache: Cache) -> ImageDataset:
    """Return the evaluation split in `place`, or `place` itself, with the class numbers of place/train if there is one.
    """
    train, train_classes, found = place.join('train'), None, place
    if not place.is_pattern:
        found = _find_split(place, split, cache) if split else _find_eval_split(place, cache, or_itself=True)
        if found.files:
            train = _find_together(place, cache).get('train', train)
        if classes is None and found not in (place, train):
            train_classes = _read_train_classes(train, cache)
    dataset = _open_split(found, cache)
    _name_numbers(dataset, classes or train_classes, 'the model' if classes else str(train))
    if classes is not None:
        return dataset  # the caller numbers it
    if train_classes is not None:
        return match_classes(dataset, train_classes, where=str(found), map_source=str(train),
                             allow_missing=allow_missing)
    _check_two_classes(dataset)
    _logger.info('%s: classes are numbered by its own %d %s', found, len(dataset.classes),
                 'names' if isinstance(dataset, Shards) else 'folders')
    return dataset


def _read_train_classes(train: Place, cache: Cache) -> list[str] | None:
    """Return the class names of the training split if there is one."""
    if train.files:
        dataset = _open_split(train, cache)
        _name_numbers(dataset, None, '')
        return dataset.classes
    if train.is_remote or train.has_manifest():
        try:
            return Manifest.read_classes(reader(train, cache.opening_patience), str(train))
        except NotFoundError:
            return None
    if not train.is_folder():
        return None
    dataset = _open_split(train, cache)
    _name_numbers(dataset, None, '')
    return dataset.classes


def _name_numbers(dataset: ImageFolder | Shards, classes: Sequence[str] | None, map_source: str) -> None:
    if isinstance(dataset, Shards):
        dataset.name_numbers(classes, map_source)


def _find_split(place: Place, split: str, cache: Cache) -> Place:
    """Return `split` in `place`. Raises UserError that says what is there instead."""
    found = place.join(split)
    if found.is_pattern or found.is_folder():
        return found
    if place.is_remote:
        return _find_remote([found], place, (split_of(split) or split,), cache)
    if tars := _find_together(place, cache).get(split_of(split) or split):
        return tars
    raise UserError(f'{place}: no folder {split!r} in it{place.describe_content()}')


def _find_together(place: Place, cache: Cache) -> dict[str, Place]:
    """Return the splits whose tar files lie together in `place`, which the user calls shards; {} if none do."""
    if place.is_pattern or not place.is_shards or place.has_manifest():
        return {}
    return splits_together(place, reader(place, cache.opening_patience))


def _find_eval_split(place: Place, cache: Cache, *, or_itself: bool) -> Place:
    """Return the first of EVAL_SPLITS in `place`, or with `or_itself` a `place` that is a split."""
    splits = [place.join(split) for split in EVAL_SPLITS]
    if place.is_remote:
        return _find_remote(splits + [place] * or_itself, place, EVAL_SPLITS, cache)
    for split in splits:
        if split.is_folder():
            return split
    together = _find_together(place, cache)
    if tars := next((together[split] for split in EVAL_SPLITS if split in together), None):
        return tars
    if or_itself and (place.has_manifest() or not place.join('train').is_folder()):
        return place
    train = place.join('train')
    remedy = '; --val-fraction 0.1 holds out a tenth of train' if train.is_folder() or 'train' in together else ''
    raise UserError(f'{place}: no folder {", ".join(EVAL_SPLITS[:-1])} or {EVAL_SPLITS[-1]} in it'
                    f'{place.describe_content()}{remedy}')


def _find_remote(splits: list[Place], place: Place, names: Sequence[str], cache: Cache) -> Place:
    """Return the first of `splits` with a manifest, else the first of `names` among the tar files of `place`.

    Some stores refuse access instead of reporting that nothing is there.
    """
    reasons = []
    for split in splits:
        try:
            reader(split, cache.opening_patience)(MANIFEST)
            return split
        except NotFoundError as error:
            reasons.append(str(error))
    together = _find_together(place, cache)
    if tars := next((together[name] for name in names if name in together), None):
        return tars
    raise UserError(f'{reasons[0]}; give the address of a folder that tools/pack.py has written, or name the split')


def _check_two_classes(dataset: ImageFolder | Shards) -> None:
    if len(dataset.classes) < 2:
        kind = 'class' if isinstance(dataset, Shards) else 'class folder'
        raise UserError(f'{dataset.folder}: a single {kind}, {dataset.classes[0]!r}; at least two are needed'
                        + ('' if isinstance(dataset, Shards) else ', directly in it'))
