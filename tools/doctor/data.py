"""What tools/doctor/__main__.py says of a data set: its classes, its images, and a thousand of these decoded.

Nothing is written. What a folder holds is counted by its names alone; of the images, a sample is read.
"""
import contextlib
import hashlib
import io
import math
import multiprocessing
import os
import re
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from PIL import Image
from timm.data import ImageNetInfo
from timm.utils.misc import natural_key

from data import ImageDataset, evenly_spaced
from data.base import Part
from data.classes import name_some
from data.decode import EXTENSIONS, FORMATS, ImageError, decode_rgb
from data.folders import ImageFiles
from data.pipeline import open_evaluation_data, open_training_data
from data.places import EVAL_SPLITS
from options.datasets import DATASETS
from tools.doctor.findings import LOOK, OK, STOP, Finding, name_up_to, plural, sentence
from utils.console import progress_bar
from utils.errors import UserError

if TYPE_CHECKING:
    from tools.doctor.case import Case

IMAGENET = {'train': 1_281_167, 'val': 50_000}
NEARLY_IMAGENET = 900  # classes, all of them ImageNet's: then it is ImageNet that is meant
FEW = 0.1  # of the median number of images of a class
SHARDS_FETCHED = 4  # at most, of a data set that lies elsewhere
SECONDS_READING = 30  # at most, for the sample, and as long for comparing train with val
ORIENTATION = 0x0112  # EXIF's number for it
DEEP, COLOURS, TRANSPARENT, ANIMATED, TURNED = '16 bits', 'Other colours', 'Transparent', 'Animated', 'Turned by EXIF'
NOTES = {'CMYK': COLOURS, 'LAB': COLOURS, 'YCbCr': COLOURS, 'RGBA': TRANSPARENT, 'LA': TRANSPARENT, 'PA': TRANSPARENT}
MODES = {'L': 'grey', '1': 'black-and-white', 'P': 'palette', 'I;16': '16-bit grey'}  # those whose names say nothing
UNUSUAL = {  # what is done with such images, and what a user may want to do instead
    DEEP: ('read, with brightness scaled to 8 bits', 'Convert them to 8 bits yourself where it matters how.'),
    COLOURS: ('CMYK or the like, made RGB without a colour profile', 'Convert them yourself where colours matter.'),
    TRANSPARENT: ('read without transparency; what it hid shows', 'Put them on a background where it matters.'),
    ANIMATED: ('the first frame is read', 'Take them apart where other frames matter.'),
    TURNED: ('read as they are stored, not upright, as the published code does',
             'Turn the pixels themselves: mogrify -auto-orient FILE.')}
# Behind the name of another class they are a sign that somebody kept two versions of it.
LEFTOVER = re.compile(r'[\s_.-]*(\(\d+\)|old|new|bak|backup|copy|tmp|temp|orig|original|dup|duplicate)$', re.I)


class Survey(NamedTuple):
    """What one split's folder holds by its names: images of each class, and the paths of files that are passed over."""
    folder: str
    counts: dict[str, int]
    stray: list[str]
    loose: list[str]  # images that lie outside of class folders


def survey(folder: str) -> Survey:
    """Counts as data.folders reads: hidden folders and files are no part of it."""
    found = Survey(folder, {}, [], [])
    for entry in os.scandir(folder):
        if entry.name.startswith('.'):
            continue
        if not entry.is_dir():
            (found.loose if _is_image(entry.name) else found.stray).append(entry.path)
            continue
        count = 0
        for parent, folders, files in os.walk(entry.path):
            folders[:] = [name for name in folders if not name.startswith('.')]
            images = sum(map(_is_image, files))
            count += images
            if images < len(files):
                found.stray.extend(os.path.join(parent, name) for name in files
                                   if not _is_image(name) and not name.startswith('.'))
        found.counts[entry.name] = count
    return found


def _is_image(name: str) -> bool:
    return name.lower().endswith(EXTENSIONS) and not name.startswith('.')


def split_folders(args) -> tuple[str, str | None] | None:
    """The folders of the training and the evaluation split; None where the data set is not one of image folders."""
    root = os.path.expanduser(args.data or '')
    train = os.path.join(root, args.train_split)
    if not root or not os.path.isdir(train) or DATASETS[args.dataset].folder == '':
        return None
    if not any(entry.is_dir() for entry in os.scandir(train)):  # it is one of shards
        return None
    names = (args.val_split,) if args.val_split else EVAL_SPLITS
    return train, next((path for name in names if os.path.isdir(path := os.path.join(root, name))), None)


# ---------------------------------------------------------------------------------------------------------------------
# 1. The data set


def open_splits(case: 'Case') -> None:
    """Opens both splits as train.py does, into `case`; where they do not go together, each by itself, with the problem.

    Raises:
        UserError: the training images cannot be opened alone either.
    """
    args = case.args
    try:
        case.train, case.val = open_training_data(args, case.world)
        return
    except UserError as error:
        case.problem = error
    try:
        case.train = _open_alone(case, args.train_split)
    except UserError:
        raise case.problem from None
    folders = split_folders(args)
    with contextlib.suppress(UserError):
        # Of folders all images, whatever classes they are of.
        case.val = ImageFiles([folders[1]]) if folders and folders[1] else _open_alone(case, args.val_split)


def _open_alone(case: 'Case', split: str | None) -> ImageDataset:
    return open_evaluation_data(case.args.replacing(val_split=split, class_map=None), None, None, case.world)


def look_at_data(case: 'Case'):
    """Yields what is wrong with the splits that `open_splits` has opened."""
    args, problem = case.args, case.problem
    classes = case.train.classes
    figure = f'{plural(len(case.train), "image")} to train on'
    if case.val is not None:
        figure += f', {len(case.val):,} to evaluate with'
    counts = np.bincount(case.train.targets, minlength=len(classes))
    yield Finding(OK, 'Images', f'{figure}, {plural(len(classes), "class", "classes")}, in {args.data or args.dataset}',
                  numbers={'train': len(case.train), 'val': len(case.val) if case.val is not None else None,
                           'classes': len(classes)})
    yield _balance(classes, counts)
    surveys = [survey(folder) for folder in split_folders(args) or () if folder]
    if len(surveys) == 2:
        yield from _class_map(surveys[0], surveys[1], problem)
    elif problem:
        text, _, remedy = str(problem).partition('; ')
        yield Finding(STOP, 'Splits', text, sentence(remedy))
    else:
        yield Finding(OK, 'Class map', 'The same in both splits')
    for found in surveys:
        yield from _oddities(found)
    yield from _near_names(surveys, classes)
    yield from _known_numbers(case, classes)


def _balance(classes: Sequence[str], counts: np.ndarray) -> Finding:
    low, high, median = int(counts.min()), int(counts.max()), float(np.median(counts))
    figure = (f'{plural(low, "image")} of each to train on' if low == high else
              f'{low:,} to {high:,} images to train on, median {median:,.0f}')
    few = [name for name, count in zip(classes, counts, strict=True) if 0 < count < FEW * median]
    numbers = {'least': low, 'median': median, 'most': high, 'few': len(few)}
    if few:
        figure += f'; {plural(len(few), "class has", "classes have")} less than a tenth of that: {name_some(few)}'
        return Finding(LOOK, 'Images per class', figure, 'Add images to them, or leave them out with --only-classes.',
                       numbers=numbers)
    return Finding(OK, 'Images per class', figure, numbers=numbers)


def _class_map(train: Survey, val: Survey, problem: UserError | None):
    """Whether the folders of both splits are the same ones."""
    order, own = (sorted(sorted(found.counts), key=natural_key) for found in (train, val))  # as data.folders has them
    missing = [name for name in order if name not in val.counts]
    extra = [name for name in own if name not in train.counts]
    if not val.counts:
        yield Finding(STOP, 'Class map', f'{val.folder} has {plural(len(val.loose), "image")} and no class folders, as '
                      "ImageNet's validation set comes",
                      f'Move each image into {val.folder}/CLASS, with the folder names of {train.folder}.')
        return
    if missing:
        moved = sum(order.index(name) != index for index, name in enumerate(own) if name in train.counts)
        figure = f'{val.folder} lacks the folders of {plural(len(missing), "class", "classes")} of {train.folder}'
        if moved:
            figure += f'; numbered by its own folders, {plural(moved, "class", "classes")} would be taken for another'
        remedy = f'Put these folders, with their images, into {val.folder}; or take them out of {train.folder}.'
        places = name_up_to([os.path.join(val.folder, name) for name in missing])
        yield Finding(STOP, 'Class map', figure, remedy, places, {'missing': missing, 'moved': moved})
    if extra:
        figure = f'{val.folder} has {plural(len(extra), "class", "classes")} that {train.folder} has not'
        yield Finding(STOP, 'Class map', figure, 'Remove or rename them, or give them images to train on.',
                      name_up_to([os.path.join(val.folder, name) for name in extra]), {'extra': extra})
    if problem and not missing and not extra:
        text, _, remedy = str(problem).partition('; ')
        yield Finding(STOP, 'Class map', text, sentence(remedy))
    if not problem and not missing and not extra:
        yield Finding(OK, 'Class map', f'The same {plural(len(train.counts), "folder")} in both splits')


def _oddities(found: Survey):
    """Empty class folders and files that are passed over, of one split."""
    empty = sorted(name for name, count in found.counts.items() if not count)
    if empty:
        yield Finding(LOOK, 'Empty folders', f'{plural(len(empty), "class folder")} of {found.folder} without images; '
                      'an empty one keeps its place, and its number, among the classes',
                      'Fill or remove them, in both splits.',
                      name_up_to([os.path.join(found.folder, name) for name in empty]), {'empty': empty})
    if found.loose and found.counts:
        yield Finding(LOOK, 'Loose images', f'{plural(len(found.loose), "image")} of {found.folder} outside of class '
                      'folders: they are not read', 'Move them into the folder of their class, or away.',
                      name_up_to(sorted(found.loose)), {'loose': len(found.loose)})
    if found.stray:
        figure = f'{plural(len(found.stray), "file")} of {found.folder} without the ending of an image: not read'
        yield Finding(LOOK, 'Stray files', figure, 'Remove them, or give images their ending.',
                      name_up_to(sorted(found.stray)), {'stray': len(found.stray)})


def _near_names(surveys: Sequence[Survey], classes: Sequence[str]):
    """Pairs of classes that are likely two versions of one."""
    names = sorted({name for found in surveys for name in found.counts} or classes)
    known: dict[str, str] = {}
    pairs = []
    for name in names:
        other = known.setdefault(re.sub(r'[\s_-]+', ' ', name.casefold()).strip(), name)
        if other != name:
            pairs.append((other, name))
    for name in names:
        base = LEFTOVER.sub('', name)
        if base != name and base in names:
            pairs.append((base, name))
    if pairs:
        where = {name: os.path.join(found.folder, name) for found in reversed(surveys) for name in found.counts}
        figure = f'{plural(len(pairs), "pair")} of classes that look like two versions of one'
        places = name_up_to([' and '.join(where.get(name, name) for name in pair) for pair in pairs])
        yield Finding(LOOK, 'Near-equal names', figure,
                      'If they are one class, put them into one folder, in both splits.', places, {'pairs': pairs})


def _known_numbers(case: 'Case', classes: Sequence[str]):
    """What is missing of ImageNet, where the classes are its classes."""
    synsets = set(ImageNetInfo().label_names())
    if len(classes) < NEARLY_IMAGENET or not synsets >= set(classes) or case.args.only_classes:
        return
    found = {'train': len(case.train), 'val': len(case.val) if case.val is not None else 0}
    short = [f'{count - found[split]:,} of {count:,} images in {split}' for split, count in IMAGENET.items()
             if found[split] < count]
    if len(classes) < len(synsets):
        short.insert(0, f'{len(synsets) - len(classes)} of {len(synsets):,} classes')
    if short:
        yield Finding(LOOK, 'ImageNet', f'By its classes this is ImageNet; it lacks {", ".join(short)}',
                      'Unpack its archives again, or expect other results than published.', numbers=found)
    else:
        yield Finding(OK, 'ImageNet', 'Complete: all classes, all images', numbers=found)


# ---------------------------------------------------------------------------------------------------------------------
# 2. A sample of its images


class Seen(NamedTuple):
    """What one image is. `problem` says why it cannot be decoded, where it cannot."""
    path: str
    length: int
    digest: bytes
    kind: str  # of its file
    mode: str
    size: tuple[int, int] | None
    notes: tuple[str, ...]
    problem: str = ''


def look_closely(stored: bytes | Image.Image, path: str) -> Seen:
    """Decodes what is stored for an image, and notes what is unusual about it."""
    if not isinstance(stored, bytes):
        pixels = stored.tobytes()
        return Seen(path, len(pixels), _digest(pixels), 'pixels', stored.mode, stored.size, ())
    seen = Seen(path, len(stored), _digest(stored), 'unknown', '', None, ())
    try:
        with Image.open(io.BytesIO(stored), formats=FORMATS) as image:
            seen = seen._replace(kind=image.format or 'unknown', mode=image.mode, size=image.size)
            frames, orientation = getattr(image, 'n_frames', 1), image.getexif().get(ORIENTATION, 1)
    except Exception:  # as decode_rgb expects it of damaged files; what is wrong, that one says
        frames, orientation = 1, 1
    signs = {DEEP: seen.mode.startswith('I') or (seen.kind == 'PNG' and stored[24] == 16), ANIMATED: frames > 1,
             NOTES.get(seen.mode, ''): seen.mode in NOTES, TURNED: orientation not in (0, 1)}
    seen = seen._replace(notes=tuple(note for note, is_there in signs.items() if is_there))
    try:
        decode_rgb(stored, path)
    except ImageError as error:
        return seen._replace(problem=_reason(error, path))
    return seen


def _digest(stored: bytes | Image.Image) -> bytes:
    content = stored if isinstance(stored, bytes) else stored.tobytes()
    return hashlib.blake2b(content, digest_size=16).digest()


def _reason(error: ImageError, path: str) -> str:
    """What is wrong, without the path and the remedy, which are said for all."""
    return str(error).removeprefix(f'image {path}: ').partition('; ')[0]


_sample: ImageDataset | None = None  # of this process; to a worker it comes with the fork, for to send it takes long


def _hold(sample: ImageDataset) -> None:
    global _sample
    _sample = sample


def _look_closely_at(index: int) -> Seen:
    assert _sample is not None, 'held before the processes were forked'
    path = _sample.path(index)
    try:
        return look_closely(_sample.read_bytes_or_image(index), path)
    except ImageError as error:
        return Seen(path, 0, b'', 'unknown', '', None, (), _reason(error, path))


def read_sample(dataset: ImageDataset, count: int, workers: int, bar) -> list[Seen]:
    """Up to `count` images, evenly spread over the set, as far as SECONDS_READING suffice."""
    sample = sample_of(dataset, count)
    deadline, found = time.monotonic() + SECONDS_READING, []
    # Every k-th, so that what was seen when the time is over is spread over the set as well.
    order = [index for first in range(16) for index in range(first, len(sample), 16)]
    with contextlib.ExitStack() as stack:
        if workers:
            pool = ProcessPoolExecutor(workers, multiprocessing.get_context('fork'), _hold, (sample,))
            stack.callback(pool.shutdown, cancel_futures=True)
            results = pool.map(_look_closely_at, order, chunksize=8)
        else:
            _hold(sample)
            results = map(_look_closely_at, order)
        for seen in results:
            found.append(seen)
            bar.update()
            if time.monotonic() > deadline:
                break
    return found


def sample_of(dataset: ImageDataset, count: int) -> ImageDataset:
    """Up to `count` images, evenly spread over the set, or over some shards where these have to be fetched."""
    starts = dataset.shard_offsets()
    if starts is None:
        return evenly_spaced(dataset, count)
    spans = list(zip(starts[:-1], starts[1:], strict=True))
    chosen = [spans[k * len(spans) // SHARDS_FETCHED] for k in range(SHARDS_FETCHED)] if (
        len(spans) > SHARDS_FETCHED) else spans
    return evenly_spaced(Part(dataset, [index for span in chosen for index in range(*span)]), count)


def look_at_images(case: 'Case'):
    """Decodes a sample of both splits, three quarters of it to train on, and yields what is wrong with it."""
    args, val_count = case.args, case.samples // 4
    workers = min(args.workers, os.cpu_count() or 1)
    sizes = {'train': case.samples - val_count, 'val': val_count}
    seen = {}
    with progress_bar(total=case.samples, desc='images', unit='image') as bar:
        for split, dataset in (('train', case.train), ('val', case.val)):
            if dataset is not None and len(dataset):
                seen[split] = read_sample(dataset, sizes[split], workers, bar)
    tolerated = {'train': args.max_bad_images, 'val': args.max_bad_val_images}
    for split, found in seen.items():
        yield _bad_images(split, found, len(getattr(case, split)), tolerated[split])
    together = [image for found in seen.values() for image in found]
    good = [image for image in together if not image.problem]
    kinds = Counter(f'{image.kind} {image.mode}' for image in good)
    yield Finding(OK, 'Kinds', ', '.join(f'{count:,} {_in_words(kind)}' for kind, count in kinds.most_common()) or
                  'None could be decoded', numbers=dict(kinds))
    yield from _unusual(good)
    if good:
        yield _sizes(good, args.img_size)
    yield from _duplicates(case, seen)


def _in_words(kind: str) -> str:
    """'JPEG L' → 'grey JPEG'."""
    file, _, mode = kind.partition(' ')
    return f'{MODES.get(mode, mode)} {file}'


def _bad_images(split: str, seen: Sequence[Seen], total: int, tolerated: int) -> Finding:
    bad = [image for image in seen if image.problem]
    option = '--max-bad-images' if split == 'train' else '--max-bad-val-images'
    unseen = total - len(seen)
    expected = min(len(bad) + unseen, math.ceil(total * upper_bound(len(bad), len(seen))))
    figure = f'{len(bad):,} of {len(seen):,} images of {split} cannot be decoded' if bad else (
        f'{plural(len(seen), "image")} of {split} decoded, all good')
    if unseen:
        figure += f'; of all {total:,}, with 95 % certainty, no more than {expected:,} are bad'
    numbers = {'looked_at': len(seen), 'bad': len(bad), 'bad_at_most': expected, 'tolerated': tolerated}
    details = name_up_to([f'{image.path}: {image.problem}' for image in bad])
    if not bad:
        return Finding(OK, f'Decoding {split}', figure, numbers=numbers)
    remedy = 'Restore or remove them'
    if expected > tolerated:
        instead = 'they are left out, and counted' if split == 'val' else 'a neighbour takes the place of each'
        remedy += f'; or say {option} {expected} (it is {tolerated}), and {instead}'
    return Finding(STOP if len(bad) > tolerated else LOOK, f'Decoding {split}', figure, f'{remedy}.', details, numbers)


def upper_bound(bad: int, seen: int) -> float:
    """The share of bad ones that, with 95 % confidence, is not exceeded where `bad` of `seen` are (Clopper-Pearson)."""
    if bad >= seen:
        return 1.0
    low, high = bad / seen, 1.0
    for _ in range(50):
        share = (low + high) / 2
        chance = sum(math.comb(seen, k) * share**k * (1 - share)**(seen - k) for k in range(bad + 1))
        low, high = (share, high) if chance > 0.05 else (low, share)
    return high


def _unusual(good: Sequence[Seen]):
    for note, (effect, remedy) in UNUSUAL.items():
        paths = sorted(image.path for image in good if note in image.notes)
        if paths:
            figure = f'{plural(len(paths), "image")}: {effect}'
            yield Finding(LOOK, note, figure, remedy, name_up_to(paths, 10), {'count': len(paths)})


def _sizes(good: Sequence[Seen], img_size: int | tuple[int, int]) -> Finding:
    wanted = max(img_size) if isinstance(img_size, tuple) else img_size
    sizes = sorted((image.size for image in good if image.size), key=lambda size: size[0] * size[1])
    smaller = sum(min(size) < wanted for size in sizes)
    median = tuple(round(statistics.median(edges)) for edges in zip(*sizes, strict=True))
    text = '{} × {}'
    if len(set(sizes)) == 1:
        figure = f'All {text.format(*median)} pixels'
    else:
        figure = f'Median {text.format(*median)} pixels, from {text.format(*sizes[0])} to {text.format(*sizes[-1])}'
    figure += f'; {smaller:,} of {len(sizes):,} are smaller than --img-size {wanted}'
    numbers = {'median': median, 'smallest': sizes[0], 'largest': sizes[-1], 'smaller': smaller}
    return Finding(OK, 'Sizes', figure, numbers=numbers)


def _duplicates(case: 'Case', seen: dict[str, list[Seen]]):
    """Whether images that were sampled for training are among those of the evaluation, byte for byte."""
    if 'val' not in seen:
        return
    known = {image.digest: image.path for image in seen['train'] if image.length}
    lengths = {image.length for image in seen['train']}
    deadline, compared, pairs = time.monotonic() + SECONDS_READING, 0, []
    for length, digest, path in _val_images(case, seen['val'], lengths):
        compared += 1
        if length in lengths and (twin := known.get(digest())):
            pairs.append(f'{twin} = {path}')
        if time.monotonic() > deadline:
            break
    numbers = {'train': len(known), 'val': compared, 'duplicates': len(pairs)}
    text = f'{plural(len(known), "image")} of train against {compared:,} of val'
    if pairs:
        yield Finding(LOOK, 'Duplicates', f'{text}: {plural(len(pairs), "is", "are")} in both, byte for byte',
                      'Take them out of one split: what was trained on is recognised, and accuracy looks too good.',
                      name_up_to(pairs, 5), numbers)
    else:
        yield Finding(OK, 'Duplicates', f'{text}: none is in both', numbers=numbers)


def _val_images(case: 'Case', sampled: Sequence[Seen], lengths: set[int]):
    """(length, function that gives the digest, path): of all evaluation images in folders, else of the sampled."""
    val = case.val
    if val is None or split_folders(case.args) is None:
        for image in sampled:
            yield image.length, (lambda image=image: image.digest), image.path
        return
    for index in range(len(val)):
        path = val.path(index)
        try:
            yield os.path.getsize(path), (lambda index=index: _digest(val.read_bytes_or_image(index))), path
        except (OSError, ImageError):
            continue  # it is, or will be, named among the bad ones
