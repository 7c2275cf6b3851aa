"""Hold out a share of one data set for evaluation, by the names of its images alone.

    train, val = hold_out(dataset, 0.1)

A hash of each image's name decides its side, so no seed, order or other image moves it: images that are added join
either side, and the others stay. Class folders and shards of the same images are split alike.
"""
import hashlib
import logging
import os

import numpy as np

from data.base import ImageDataset, Part
from data.classes import name_some
from data.shards.manifest import member_key
from utils.console import plural

_logger = logging.getLogger(__name__)


def hold_out(dataset: ImageDataset, share: float, *, where: str) -> tuple[Part, Part]:
    """Return the images to train on and those that are held out, `share` of each class but for chance.

    Of a class with two or more images, each side gets at least one, and the log says for which classes that was done.
    A class with a single image is trained on alone.

    share: between 0 and 1. where: what the log calls `dataset`.
    """
    position = np.array([_position(dataset.name(index)) for index in range(len(dataset))])
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
    _logger.info('%s: %d images to train on, %d held out for evaluation (--val-fraction %g)', where, len(train),
                 len(val), share)
    for targets, what in ((chosen, 'by chance all their images fell to one side; one image was moved'),
                          (single, 'a single image, which is trained on; nothing evaluates the class')):
        if len(targets):
            _logger.warning('%s: %s (%s): %s', where, plural(len(targets), 'class', 'classes'),
                            name_some([dataset.classes[target] for target in targets]), what)
    return train, val


def _position(name: str) -> float:
    """Return a number from 0 up to 1 for the name of an image, whatever its ending."""
    digest = hashlib.blake2b(os.fsencode(member_key(name)), digest_size=8).digest()
    return int.from_bytes(digest, 'big') / 2 ** 64
