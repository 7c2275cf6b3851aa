"""Images: a sample of both splits, decoded."""
import contextlib
import hashlib
import io
import math
import multiprocessing
import os
import statistics
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import NamedTuple

from PIL import Image

from data import ImageDataset, evenly_spaced
from data.base import Part
from data.decode import FORMATS, ImageError, decode_rgb
from tools.doctor.case import Case, Splits
from tools.doctor.data import split_folders
from tools.doctor.findings import LOOK, OK, STOP, Finding, name_up_to
from utils.console import plural, progress_bar

# The most shards to fetch of a remote data set.
SHARDS_FETCHED = 4
# The longest time for reading the sample of a split, and for comparing train with val.
SECONDS_READING = 30
# Tags of EXIF and of TIFF.
ORIENTATION, BITS = 0x0112, 258
DEEP, COLOURS, TRANSPARENT, ANIMATED, TURNED = '16 bits', 'Other colours', 'Transparent', 'Animated', 'Turned by EXIF'
NOTES = {'CMYK': COLOURS, 'LAB': COLOURS, 'YCbCr': COLOURS, 'RGBA': TRANSPARENT, 'LA': TRANSPARENT, 'PA': TRANSPARENT}
# Names for Pillow's modes that do not speak for themselves.
MODES = {'L': 'grey', '1': 'black-and-white', 'P': 'palette', 'I;16': '16-bit grey'}
# How such images are read, and what else a user can do.
UNUSUAL = {
    DEEP: ('read, with brightness scaled to 8 bits', 'Convert them to 8 bits yourself if it matters how.'),
    COLOURS: ('CMYK or the like, made RGB without a colour profile', 'Convert them yourself if colours matter.'),
    TRANSPARENT: ('read without transparency; hidden pixels show', 'Put them on a background if it matters.'),
    ANIMATED: ('only the first frame is read', 'Split them if other frames matter.'),
    TURNED: ('read as stored, not upright, as the published code does',
             'Rotate the pixels themselves: mogrify -auto-orient FILE.')}


def look_at_images(case: Case, splits: Splits) -> Iterator[Finding]:
    """Decode a sample of both splits, three quarters of it from the training images."""
    args, val_count = case.args, case.samples // 4
    seen = {}
    with progress_bar(total=case.samples, desc='images', unit='image') as bar:
        for split, dataset, count in (('train', splits.train, case.samples - val_count),
                                      ('val', splits.val, val_count)):
            if dataset is not None and len(dataset):
                seen[split] = read_sample(dataset, count, min(args.workers, os.cpu_count() or 1), bar)
    tolerated = {'train': args.max_bad_images, 'val': args.max_bad_val_images}
    for split, found in seen.items():
        yield bad_images(split, found, len(getattr(splits, split)), tolerated[split])
    good = [image for found in seen.values() for image in found if not image.problem]
    kinds = Counter(f'{image.kind} {image.mode}' for image in good)
    yield Finding(OK, 'Kinds', ', '.join(f'{count:,} {_in_words(kind)}' for kind, count in kinds.most_common()) or
                  'None could be decoded', numbers=dict(kinds))
    for note, (effect, remedy) in UNUSUAL.items():
        if paths := sorted(image.path for image in good if note in image.notes):
            yield Finding(LOOK, note, f'{plural(len(paths), "image")}: {effect}', remedy, name_up_to(paths, 10),
                          {'count': len(paths)})
    if good:
        yield _sizes(good, args.img_size)
    if 'val' in seen:
        yield _duplicates(case, splits, seen)


# --- One image --------------------------------------------------------------------------------------------------------

class Seen(NamedTuple):
    """What one image is."""
    path: str
    length: int = 0  # bytes of the file, or of the pixels
    digest: bytes = b''
    kind: str = 'unknown'  # format of the file
    mode: str = ''
    size: tuple[int, int] | None = None
    notes: tuple[str, ...] = ()
    problem: str = ''  # why it cannot be decoded


def look_closely(stored: bytes | Image.Image, path: str) -> Seen:
    """Decode what is stored for an image, and note what is unusual about it."""
    if not isinstance(stored, bytes):
        return Seen(path, len(stored.tobytes()), _digest(stored), 'pixels', stored.mode, stored.size)
    seen, frames, orientation, bits, is_transparent = Seen(path, len(stored), _digest(stored)), 1, 1, 8, False
    with contextlib.suppress(Exception):  # any, if the file is damaged; decode_rgb says how
        with Image.open(io.BytesIO(stored), formats=FORMATS) as image:
            seen = seen._replace(kind=image.format or 'unknown', mode=image.mode, size=image.size)
            frames, orientation = getattr(image, 'n_frames', 1), image.getexif().get(ORIENTATION, 1)
            bits = stored[24] if image.format == 'PNG' else max(getattr(image, 'tag_v2', {}).get(BITS, (8,)))
            is_transparent = 'transparency' in image.info
    signs = {DEEP: seen.mode.startswith('I') or bits > 8, ANIMATED: frames > 1, TURNED: orientation not in (0, 1),
             TRANSPARENT: is_transparent or NOTES.get(seen.mode) == TRANSPARENT,
             COLOURS: NOTES.get(seen.mode) == COLOURS}
    seen = seen._replace(notes=tuple(note for note in UNUSUAL if signs[note]))
    try:
        return seen._replace(size=decode_rgb(stored, path).size)  # PIL announces the size of a turned TIFF
    except ImageError as error:
        return seen._replace(problem=_reason(error, path))


def _digest(stored: bytes | Image.Image) -> bytes:
    content = stored if isinstance(stored, bytes) else stored.tobytes()
    return hashlib.blake2b(content, digest_size=16).digest()


def _reason(error: ImageError, path: str) -> str:
    """Return what is wrong, without the path and the remedy, which the finding has."""
    return str(error).removeprefix(f'image {path}: ').partition('; ')[0]


# --- A sample ---------------------------------------------------------------------------------------------------------

# Of this process. A worker inherits it by the fork, since sending it takes long.
_sample: ImageDataset | None = None


def _hold(sample: ImageDataset) -> None:
    global _sample
    _sample = sample


def _look_closely_at(index: int) -> Seen:
    assert _sample is not None, 'held before the processes were forked'
    path = _sample.path(index)
    try:
        return look_closely(_sample.read_bytes_or_image(index), path)
    except ImageError as error:
        return Seen(path, problem=_reason(error, path))


def read_sample(dataset: ImageDataset, count: int, workers: int, bar) -> list[Seen]:
    """Return up to `count` images, evenly spaced over the set, or as many as SECONDS_READING allow."""
    sample = sample_of(dataset, count)
    deadline, found = time.monotonic() + SECONDS_READING, []
    # Every 16th, so that a sample that is cut short is spread over the set too.
    order = [index for first in range(16) for index in range(first, len(sample), 16)]
    with contextlib.ExitStack() as stack:
        results: Iterator[Seen]
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
    """Return up to `count` images, evenly spaced over the set, or over a few shards if these have to be fetched."""
    starts = dataset.shard_offsets()
    if starts is None:
        return evenly_spaced(dataset, count)
    spans = list(zip(starts[:-1], starts[1:], strict=True))
    if len(spans) > SHARDS_FETCHED:
        spans = [spans[k * len(spans) // SHARDS_FETCHED] for k in range(SHARDS_FETCHED)]
    return evenly_spaced(Part(dataset, [index for span in spans for index in range(*span)]), count)


# --- Findings ---------------------------------------------------------------------------------------------------------

def _in_words(kind: str) -> str:
    """'JPEG L' → 'grey JPEG'."""
    file, _, mode = kind.partition(' ')
    return f'{MODES.get(mode, mode)} {file}'


def bad_images(split: str, seen: Sequence[Seen], total: int, tolerated: int) -> Finding:
    """Count the images that cannot be decoded, and estimate how many the whole split has."""
    bad = [image for image in seen if image.problem]
    unseen = total - len(seen)
    expected = min(len(bad) + unseen, math.ceil(total * upper_bound(len(bad), len(seen))))
    figure = f'{len(bad):,} of {len(seen):,} images of {split} cannot be decoded' if bad else (
        f'{plural(len(seen), "image")} of {split} decoded, all good')
    if unseen:
        figure += f'; of all {total:,}, with 95 % certainty, no more than {expected:,} are bad'
    mark, remedy = OK, ''
    if bad:
        mark, remedy = STOP if len(bad) > tolerated else LOOK, 'Restore or remove them.'
    if bad and expected > tolerated:
        option, instead = ('--max-bad-images', 'neighbours replace them') if split == 'train' else (
            '--max-bad-val-images', 'they are left out, and counted')
        remedy = f'Restore or remove them; or say {option} {expected} (it is {tolerated}), and {instead}.'
    return Finding(mark, f'Decoding {split}', figure, remedy,
                   name_up_to([f'{image.path}: {image.problem}' for image in bad]),
                   {'looked_at': len(seen), 'bad': len(bad), 'bad_at_most': expected, 'tolerated': tolerated})


def upper_bound(bad: int, seen: int) -> float:
    """Return the share of bad images that 95 % confidence does not exceed, given `bad` of `seen` (Clopper-Pearson)."""
    if bad >= seen:
        return 1.0
    low, high = bad / seen, 1.0
    for _ in range(50):
        share = (low + high) / 2
        chance = sum(math.comb(seen, k) * share**k * (1 - share)**(seen - k) for k in range(bad + 1))
        low, high = (share, high) if chance > 0.05 else (low, share)
    return high


def _sizes(good: Sequence[Seen], img_size: int | tuple[int, int]) -> Finding:
    wanted = max(img_size) if isinstance(img_size, tuple) else img_size
    sizes = sorted((image.size for image in good if image.size), key=lambda size: size[0] * size[1])
    smaller = sum(min(size) < wanted for size in sizes)
    median = tuple(round(statistics.median(edges)) for edges in zip(*sizes, strict=True))
    middle, smallest, largest = (f'{size[0]} × {size[1]}' for size in (median, sizes[0], sizes[-1]))
    figure = f'Median {middle} pixels, from {smallest} to {largest}'
    if len(set(sizes)) == 1:
        figure = f'All {middle} pixels'
    figure += f'; {smaller:,} of {len(sizes):,} are smaller than --img-size {wanted}'
    return Finding(OK, 'Sizes', figure, numbers={
        'median': median, 'smallest': sizes[0], 'largest': sizes[-1], 'smaller': smaller})


def _duplicates(case: Case, splits: Splits, seen: dict[str, list[Seen]]) -> Finding:
    """Look for sampled training images, byte for byte, among those of the evaluation."""
    known = {image.digest: image.path for image in seen['train'] if image.length}
    lengths = {image.length for image in seen['train']}
    deadline, compared, pairs = time.monotonic() + SECONDS_READING, 0, []
    for path, digest in _val_digests(case, splits, seen['val'], lengths):
        compared += 1
        if digest in known:
            pairs.append(f'{known[digest]} = {path}')
        if time.monotonic() > deadline:
            break
    numbers = {'train': len(known), 'val': compared, 'duplicates': len(pairs)}
    text = f'{plural(len(known), "image")} of train against {compared:,} of val'
    if not pairs:
        return Finding(OK, 'Duplicates', f'{text}: none is in both', numbers=numbers)
    return Finding(LOOK, 'Duplicates', f'{text}: {plural(len(pairs), "is", "are")} in both, byte for byte',
                   'Take them out of one split: a model recognises its training images, so accuracy looks too good.',
                   name_up_to(pairs, 5), numbers)


def _val_digests(case: Case, splits: Splits, sampled: Sequence[Seen],
                 lengths: set[int]) -> Iterator[tuple[str, bytes | None]]:
    """Yield path and digest: of the sampled evaluation images; of all if they are files, but only if `lengths` fit."""
    val = splits.val
    if val is None or split_folders(case.args) is None:
        yield from ((image.path, image.digest) for image in sampled)
        return
    for index in range(len(val)):
        path = val.path(index)
        with contextlib.suppress(OSError, ImageError):  # of a bad image, which is named elsewhere
            yield path, _digest(val.read_bytes_or_image(index)) if os.path.getsize(path) in lengths else None
