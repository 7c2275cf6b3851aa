"""Token labels: a teacher's classes at every position of every image (Jiang et al. 2021, "All Tokens Matter").

    labels = open_token_labels('/data/label_top5_train_nfnet', train_set, num_classes=1000)
    scores, classes = labels.read(index)      # float16 [K, H, W] each, of sample `index` of train_set

`label_store` has the two forms on disk. Labels are found by the names of the images, so the same ones serve class
folders, shards, and any part of either.
"""
import hashlib
import logging
from itertools import zip_longest

import numpy as np
import torch

from data.base import ImageDataset
from data.classes import name_some
from data.label_store import LabelStore, check_values, open_store
from data.shards.manifest import key_of, member_key
from utils.console import plural
from utils.errors import UserError

_logger = logging.getLogger(__name__)

# Labels that are read at the start, for mistakes and for the fingerprint.
PROBES = 64


class TokenLabels:
    """The labels of `store` for the samples of a data set; see `open_token_labels`.

    shape: (2, K, H, W) of every label: scores, then classes; K best classes on a grid of H × W.
    missing: int64 [M], the samples without a label.
    """

    def __init__(self, store: LabelStore, rows: np.ndarray, num_classes: int):
        self._store, self._rows, self._num_classes = store, rows, num_classes
        self.folder, self.shape = store.folder, store.shape
        self.missing = np.flatnonzero(rows < 0)

    def __len__(self) -> int:
        """Return the number of samples of the data set."""
        return len(self._rows)

    def read(self, index: int) -> torch.Tensor | None:
        """Return the scores (logits) and classes of sample `index`, float16 [2, K, H, W], not to be written to.

        They lie as the image does in its file, unflipped; the grid covers the whole image. None: it has no label.

        Raises:
            UserError: a damaged file, or a class that is not below `num_classes`.
        """
        row = int(self._rows[index])
        if row < 0:
            return None
        label = self._store.read(row)
        if mistake := check_values(label, self._num_classes):
            raise UserError(f'{self._store.where(row)}: {mistake}')
        return label

    def fingerprint(self) -> str:
        """Return the number of labels, with a checksum of some of them, spread over the data set.

        It is the same for the same labels in either form, and tells whether two runs read the same ones.
        """
        digest = hashlib.sha256(np.asarray(self.shape).tobytes() + self.missing.tobytes())
        for index in self.probes():
            if (label := self.read(index)) is not None:
                digest.update(label.numpy().tobytes())
        return f'{len(self) - len(self.missing)} labels with the checksum {digest.hexdigest()[:16]}'

    def probes(self) -> list[int]:
        """Return up to PROBES samples, evenly spaced."""
        count = min(PROBES, len(self))
        return [k * len(self) // count for k in range(count)]


def open_token_labels(folder: str, dataset: ImageDataset, *, num_classes: int, max_missing: int = 0) -> TokenLabels:
    """Return the labels in `folder`, in the published or the packed form, for the samples of `dataset`.

    num_classes: of the model that is trained.
    max_missing: how many samples may lack a label.

    Raises:
        UserError: no labels in `folder`, more missing ones than tolerated, two images with one label, classes that are
            not those of `dataset`, a class number too large, or a damaged file among those that are looked at.
    """
    store = open_store(folder)
    _check_classes(store, dataset, num_classes)
    rows = find_rows(store, dataset)
    missing = np.flatnonzero(rows < 0)
    if len(missing):
        names = name_some([key_of(dataset.name(index))[0] for index in missing[:3].tolist()])
        lacks = f'{store.folder} lacks the labels of {len(missing)} of {plural(len(dataset), "image")} ({names}'
        lacks += ', …)' if len(missing) > 3 else ')'
        if len(missing) == len(dataset):
            raise UserError(f'{lacks}; its labels have names such as {store.names[0]!r}: give those of this data set')
        if len(missing) > max_missing:
            raise UserError(f'{lacks}, {max_missing} are tolerated; make them with tools/token_labels.py, or tolerate '
                            f'them: --max-missing-labels {len(missing)}')
        _logger.warning('%s; %d are tolerated', lacks, max_missing)
    labels = TokenLabels(store, rows, num_classes)
    for index in labels.probes():
        labels.read(index)
    _, best, height, width = labels.shape
    _logger.info('%s: token labels of %d images, %d classes on %d × %d positions', store.folder,
                 len(labels) - len(missing), best, height, width)
    return labels


def _check_classes(store: LabelStore, dataset: ImageDataset, num_classes: int) -> None:
    """Raise UserError if the labels are known to number their classes in another way than the data set."""
    remedy = 'make labels for these classes with tools/token_labels.py'
    if store.num_classes and store.num_classes > num_classes:
        raise UserError(f'{store.folder}: labels of {store.num_classes} classes, and the model has {num_classes}; '
                        f'{remedy}')
    if store.classes is None and len(dataset.classes) < num_classes:
        raise UserError(f'{store.folder}: labels without names of classes, and the data set has {len(dataset.classes)} '
                        f'of {num_classes}: nothing says which is which; {remedy}')
    if store.classes is None or store.classes[:len(dataset.classes)] == dataset.classes:
        return
    pairs = enumerate(zip_longest(store.classes, dataset.classes, fillvalue='none'))
    number, theirs, own = next((number, *pair) for number, pair in pairs if pair[0] != pair[1])
    raise UserError(f'{store.folder}: labels of other classes than the data set: class {number} is {theirs!r} there, '
                    f'{own!r} here; {remedy}')


def find_rows(store: LabelStore, dataset: ImageDataset) -> np.ndarray:
    """Return the row of each sample's label in `store`, int64 [len(dataset)], -1 for none.

    Raises:
        UserError: two images that differ in name have one label.
    """
    row_of = {name: row for row, name in enumerate(store.names)}
    rows = np.full(len(dataset), -1, dtype=np.int64)
    for index in range(len(dataset)):
        name = dataset.name(index)
        key, ending = key_of(name)
        # The published form drops what follows the first dot; shards put '_' for all dots but the last.
        row = row_of.get(member_key(name), -1) if '.' in ending else -1
        rows[index] = row if row >= 0 else row_of.get(key, -1)
    found = rows[rows >= 0]
    taken, counts = np.unique(found, return_counts=True)
    for row in taken[counts > 1]:
        names = sorted({dataset.name(index) for index in np.flatnonzero(rows == row).tolist()})
        if len(names) > 1:
            raise UserError(f'{store.folder}: images {name_some(names, 2)} would have one label, '
                            f'{store.names[int(row)]!r}; rename one of them, and make the labels again')
    return rows
