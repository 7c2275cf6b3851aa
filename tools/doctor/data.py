"""Data: the classes and files of both splits, by their names alone. Nothing is written."""
import contextlib
import os
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from timm.data import ImageNetInfo
from timm.utils.misc import natural_key

from data import ImageDataset
from data.classes import name_some
from data.decode import EXTENSIONS
from data.folders import ImageFiles, ImageFolder, is_annotated, list_classes, scan_class
from data.pipeline import open_evaluation_data, open_training_data
from data.places import EVAL_SPLITS
from options.datasets import DATASETS
from tools.doctor.case import Case, Splits
from tools.doctor.findings import LOOK, OK, STOP, Finding, name_up_to, refusal
from utils.console import plural
from utils.errors import UserError

IMAGENET = {'train': 1_281_167, 'val': 50_000}
# With so many classes, all of them ImageNet's, a data set is meant to be ImageNet.
NEARLY_IMAGENET = 900
# A class is small below this share of the median number of images.
FEW = 0.1
# Behind the name of another class, these suggest a second version of it.
LEFTOVER = re.compile(r'[\s_.-]*(\(\d+\)|old|new|bak|backup|copy|tmp|temp|orig|original|dup|duplicate)$', re.I)


# --- Folders ----------------------------------------------------------------------------------------------------------

class Survey(NamedTuple):
    """The content of one split's folder by its names."""
    folder: str
    counts: dict[str, int]  # images of each class folder
    stray: list[str]  # files without the extension of an image
    loose: list[str]  # images outside class folders


def survey(folder: str) -> Survey:
    """Count as data.folders reads: it skips hidden folders and files."""
    found = Survey(folder, {}, [], [])
    if is_annotated(folder):
        dataset = ImageFolder(folder)
        counts = np.bincount(dataset.targets, minlength=len(dataset.classes)).tolist()
        return found._replace(counts=dict(zip(dataset.classes, counts, strict=True)))
    classes = set(list_classes(folder))
    for entry in os.scandir(folder):
        if entry.name.startswith('.'):
            continue
        if entry.name not in classes:
            (found.loose if _is_image(entry.name) else found.stray).append(entry.path)
            continue
        scanned = scan_class(folder, entry.name)
        found.counts[entry.name] = len(scanned.images)
        found.stray.extend(os.path.join(folder, path) for path in scanned.others
                           if not os.path.basename(path).startswith('.'))
    return found


def _is_image(name: str) -> bool:
    return name.lower().endswith(EXTENSIONS)


def split_folders(args) -> tuple[str, str | None] | None:
    """Return the folders of the training and the evaluation split; None unless the data set is folders of images."""
    root = os.path.expanduser(args.data or '')
    train = os.path.join(root, args.train_split)
    is_divided = args.val_fraction or args.k_fold
    if is_divided and not os.path.isdir(train):
        train = root
    if not root or not os.path.isdir(train) or DATASETS[args.dataset].folder == '':
        return None
    if not any(entry.is_dir() for entry in os.scandir(train)):  # a folder of shards
        return None
    if is_divided:
        return train, None
    names = (args.val_split,) if args.val_split else EVAL_SPLITS
    return train, next((path for name in names if os.path.isdir(path := os.path.join(root, name))), None)


def open_splits(case: Case) -> Splits:
    """Open both splits as train.py does; if it would refuse them, each by itself.

    Raises:
        UserError: the training images cannot be opened alone either.
    """
    args = case.args

    def open_alone(split: str | None) -> ImageDataset:
        alone = args.replacing(val_split=split, val_fraction=None, k_fold=None, fold=None, class_map=None)
        return open_evaluation_data(alone, None, None, case.world)

    try:
        return Splits(*open_training_data(args, case.world))
    except UserError as error:
        problem = error
    try:
        train = open_alone(args.train_split)
    except UserError:
        raise problem from None
    folders, val = split_folders(args), None
    with contextlib.suppress(UserError):
        # Of a folder, all images count, whatever their classes.
        val = ImageFiles([folders[1]]) if folders and folders[1] else open_alone(args.val_split)
    return Splits(train, val, problem)


# --- Findings ---------------------------------------------------------------------------------------------------------

def look_at_data(case: Case, splits: Splits) -> Iterator[Finding]:
    """Check the classes and files of both splits."""
    args, classes, size = case.args, splits.train.classes, len(splits.train)
    counts = np.bincount(splits.train.targets, minlength=len(classes))
    val_size = None if splits.val is None else len(splits.val)
    evaluation = '' if val_size is None else f', {val_size:,} to evaluate with'
    yield Finding(OK, 'Images', f'{plural(size, "image")} to train on{evaluation}, '
                  f'{plural(len(classes), "class", "classes")}, in {args.data or args.dataset}',
                  numbers={'train': size, 'val': val_size, 'classes': len(classes)})
    yield _balance(classes, counts)
    surveys = [survey(folder) for folder in split_folders(args) or () if folder]
    if len(surveys) == 2:
        yield from _class_map(surveys[0], surveys[1], splits.problem)
    elif splits.problem:
        yield refusal('Splits', splits.problem)
    else:
        yield Finding(OK, 'Class map', 'The same in both splits')
    for found in surveys:
        yield from _oddities(found)
    yield from near_names(surveys, classes)
    if not args.only_classes:
        yield from known_numbers(splits, classes)


def _balance(classes: Sequence[str], counts: np.ndarray) -> Finding:
    low, high, median = int(counts.min()), int(counts.max()), float(np.median(counts))
    figure = f'{low:,} to {high:,} images to train on, median {median:,.0f}'
    if low == high:
        figure = f'{plural(low, "image")} of each to train on'
    few = [name for name, count in zip(classes, counts, strict=True) if 0 < count < FEW * median]
    mark, remedy = OK, ''
    if few:
        figure += f'; {plural(len(few), "class has", "classes have")} less than a tenth of that: {name_some(few)}'
        mark, remedy = LOOK, 'Add images to them, or leave them out with --only-classes.'
    return Finding(mark, 'Images per class', figure, remedy,
                   numbers={'least': low, 'median': median, 'most': high, 'few': len(few)})


def _class_map(train: Survey, val: Survey, problem: UserError | None) -> Iterator[Finding]:
    """Compare the class folders of both splits."""
    order, own = (sorted(sorted(found.counts), key=natural_key) for found in (train, val))  # as data.folders has them
    missing = [name for name in order if name not in val.counts]
    extra = [name for name in own if name not in train.counts]

    def stop(figure: str, remedy: str, names: Sequence[str] = (), **numbers) -> Finding:
        return Finding(STOP, 'Class map', figure, remedy,
                       name_up_to([os.path.join(val.folder, name) for name in names]), numbers)

    if not val.counts:
        yield stop(f"{val.folder} has {plural(len(val.loose), 'image')} and no class folders, like ImageNet's "
                   f'validation set', f'Move each image into {val.folder}/CLASS, with the folder names of '
                   f'{train.folder}.')
        return
    if missing:
        moved = sum(order.index(name) != index for index, name in enumerate(own) if name in train.counts)
        figure = f'{val.folder} lacks the folders of {plural(len(missing), "class", "classes")} of {train.folder}'
        if moved:
            figure += f'; numbered by its own folders, {plural(moved, "class", "classes")} would get a wrong label'
        yield stop(figure, f'Put these folders, with their images, into {val.folder}; or take them out of '
                   f'{train.folder}.', missing, missing=missing, moved=moved)
    if extra:
        yield stop(f'{val.folder} has {plural(len(extra), "class", "classes")} that {train.folder} has not',
                   'Remove or rename them, or give them images to train on.', extra, extra=extra)
    if not missing and not extra:
        yield refusal('Class map', problem) if problem else Finding(
            OK, 'Class map', f'The same {plural(len(train.counts), "folder")} in both splits')


def _oddities(found: Survey) -> Iterator[Finding]:
    """Name the empty class folders of one split, and the files that are not read."""
    empty = sorted(os.path.join(found.folder, name) for name, count in found.counts.items() if not count)
    if empty:
        yield Finding(LOOK, 'Empty folders', f'{plural(len(empty), "class folder")} of {found.folder} without images; '
                      'an empty one keeps its label', 'Fill or remove them, in both splits.', name_up_to(empty),
                      {'empty': [os.path.basename(path) for path in empty]})
    if found.loose and found.counts:
        yield Finding(LOOK, 'Loose images', f'{plural(len(found.loose), "image")} of {found.folder} outside class '
                      'folders: not read', 'Move them into the folder of their class, or away.',
                      name_up_to(sorted(found.loose)), {'loose': len(found.loose)})
    if found.stray:
        yield Finding(LOOK, 'Stray files', f'{plural(len(found.stray), "file")} of {found.folder} without an image '
                      'extension: not read', 'Remove them, or give images their extension.',
                      name_up_to(sorted(found.stray)), {'stray': len(found.stray)})


def near_names(surveys: Sequence[Survey], classes: Sequence[str]) -> Iterator[Finding]:
    """Name pairs of classes that are probably two versions of one."""
    names = sorted({name for found in surveys for name in found.counts} or classes)
    known: dict[str, str] = {}
    twins = [(known.setdefault(re.sub(r'[\s_-]+', ' ', name.casefold()).strip(), name), name) for name in names]
    twins += [(base, name) for name in names if (base := LEFTOVER.sub('', name)) in names]
    pairs = [(one, other) for one, other in twins if one != other]
    if pairs:
        where = {name: os.path.join(found.folder, name) for found in reversed(surveys) for name in found.counts}
        yield Finding(LOOK, 'Near-equal names', f'{plural(len(pairs), "pair")} of classes that look like two versions '
                      'of one', 'If they are one class, put them into one folder, in both splits.',
                      name_up_to([' and '.join(where.get(name, name) for name in pair) for pair in pairs]),
                      {'pairs': pairs})


def known_numbers(splits: Splits, classes: Sequence[str]) -> Iterator[Finding]:
    """Say what is missing of ImageNet, if the classes are its classes."""
    synsets = set(ImageNetInfo().label_names())
    if len(classes) < NEARLY_IMAGENET or not synsets >= set(classes):
        return
    found = {'train': len(splits.train), 'val': 0 if splits.val is None else len(splits.val)}
    short = [f'{len(synsets) - len(classes)} of {len(synsets):,} classes'] * (len(classes) < len(synsets))
    short += [f'{count - found[split]:,} of {count:,} images in {split}' for split, count in IMAGENET.items()
              if found[split] < count]
    if short:
        yield Finding(LOOK, 'ImageNet', f'By its classes this is ImageNet; it lacks {", ".join(short)}',
                      'Unpack its archives again, or expect other results than published.', numbers=found)
    else:
        yield Finding(OK, 'ImageNet', 'Complete: all classes, all images', numbers=found)
