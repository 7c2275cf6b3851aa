"""Hold out a part of one data set, by the names of its images alone: a share of them, or one of K folds.

    train, val = hold_out(dataset, 0.1)
    train, val = hold_out_fold(dataset, 2, 5)

A hash of each image's name decides its side, so no seed, order or other image moves it: images that are added join
either side, and the others stay. Class folders and shards of the same images are split alike. Folds are of equal sizes
instead, so that images that are added may move others.
"""
import hashlib
import logging
import os

import numpy as np

from data.base import ImageDataset, Part
from data.classes import name_some
from data.shards.manifest import member_key
from utils.console import plural
from utils.errors import UserError

_logger = logging.getLogger(__name__)


# Those of an option are not those of another.
SALTS = {'--val-fraction': b'', '--select-fraction': b'select', '--k-fold': b'fold'}


def hold_out(dataset: ImageDataset, share: float, *, where: str,
             option: str = '--val-fraction') -> tuple[Part, Part]:
    """Return the images to train on and those that are held out, `share` of each class but for chance.

    Of a class with two or more images, each side gets at least one, and the log says for which classes that was done.
    A class with a single image is trained on alone.

    share: between 0 and 1. where: what the log calls `dataset`. option: the option, of SALTS, that asks for it.
    """
    position = _positions(dataset, option)
    is_held_out = position < share
    counts = np.bincount(dataset.targets, minlength=len(dataset.classes))
    held_out = np.bincount(dataset.targets[is_held_out], minlength=len(dataset.classes))
    chosen = np.flatnonzero((counts > 1) & ((held_out == 0) | (held_out == counts)))
    for target in chosen:
        own = np.flatnonzero(dataset.targets == target)
        # The image nearest to the share changes its side.
        moved = own[position[own].argmin() if held_out[target] == 0 else position[own].argmax()]
        is_held_out[moved] = not is_held_out[moved]
    single = np.flatnonzero(counts == 1)
    is_held_out[np.isin(dataset.targets, single)] = False
    train, val = (Part(dataset, np.flatnonzero(side)) for side in (~is_held_out, is_held_out))
    purpose = 'for evaluation' if option == '--val-fraction' else 'to choose the best epoch on'
    _logger.info('%s: %d images to train on, %d held out %s (%s %g)', where, len(train), len(val), purpose, option,
                 share)
    for targets, what in ((chosen, 'by chance all their images fell to one side; one image was moved'),
                          (single, 'a single image, which is trained on; nothing evaluates the class')):
        if len(targets):
            _logger.warning('%s: %s (%s): %s', where, plural(len(targets), 'class', 'classes'),
                            name_some([dataset.classes[target] for target in targets]), what)
    return train, val


def hold_out_fold(dataset: ImageDataset, fold: int, folds: int, *, where: str) -> tuple[Part, Part]:
    """Return the images outside of a fold, to train on, and those in it. Each image is in one of `folds`.

    The images of each class, ordered by a hash of their names, are dealt out to the folds one by one, class after
    class. So folds differ by one image of a class, and by one image as a whole. Names alone decide.

    fold: from 1 on. where: what the log calls `dataset`.
    Raises UserError if there are more folds than images.
    """
    count = len(dataset)
    if folds > count:
        raise UserError(f'--k-fold {folds}: {where} has {plural(count, "image")}; give fewer folds')
    position = _positions(dataset, '--k-fold')
    dealt = sorted(range(count), key=lambda index: (dataset.classes[dataset.targets[index]], position[index],
                                                    dataset.name(index)))
    is_held_out = np.zeros(count, dtype=bool)
    is_held_out[dealt[fold - 1::folds]] = True
    train, val = (Part(dataset, np.flatnonzero(side)) for side in (~is_held_out, is_held_out))
    _logger.info('%s: fold %d of %d: %d images to train on, %d held out for evaluation', where, fold, folds, len(train),
                 len(val))
    counts = np.bincount(dataset.targets, minlength=len(dataset.classes))
    if few := [dataset.classes[target] for target in np.flatnonzero((counts > 0) & (counts < folds))]:
        _logger.warning('%s: %s (%s): fewer images than the %d folds, so not every fold evaluates them', where,
                        plural(len(few), 'class', 'classes'), name_some(few), folds)
    return train, val


def _positions(dataset: ImageDataset, option: str) -> np.ndarray:
    """Return a number from 0 up to 1 for each image: float64 [images]."""
    return np.array([_position(dataset.name(index), SALTS[option]) for index in range(len(dataset))])


def _position(name: str, salt: bytes) -> float:
    """Return a number from 0 up to 1 for the name of an image, whatever its ending."""
    digest = hashlib.blake2b(os.fsencode(member_key(name)), digest_size=8, person=salt).digest()
    return int.from_bytes(digest, 'big') / 2 ** 64
