"""What an evaluation took each class for: exact counts over all ranks, and the numbers of each class.

    counter = ConfusionCounter()
    counter.add(targets, guesses, num_classes=K)  # of each batch
    confusion = counter.gather()                  # on every rank
    confusion.recall, confusion.macro_f1, confusion.most_confused(10)
"""
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from utils.console import plural
from utils.distributed import gather

# Largest number of classes whose confusion matrix, and whose numbers, are shown whole on the console.
MATRIX_SHOWN, CLASSES_SHOWN = 12, 40
# Of more classes: how many of the worst ones, and of the most confused pairs, are shown.
WORST_SHOWN = 10


@dataclass(frozen=True)
class Confusion:
    """Images by true and predicted class. Only pairs that occur are kept, so any number of classes fits.

    Precision, recall and F1 of each class are in 0…1 and NaN where they are undefined; means leave those out.

    Attributes:
        num_classes: K, the size of the classifier.
        true, predicted, images: [n] each: class numbers of the pairs that occur, and how many images each has.
    """
    num_classes: int
    true: np.ndarray
    predicted: np.ndarray
    images: np.ndarray

    @cached_property
    def support(self) -> np.ndarray:
        """Images of each class, [K]."""
        return self._sums(self.true)

    @cached_property
    def guessed(self) -> np.ndarray:
        """Images that were taken for each class, [K]."""
        return self._sums(self.predicted)

    @cached_property
    def right(self) -> np.ndarray:
        """Images of each class that were taken for it, [K]."""
        return self._sums(self.true, self.true == self.predicted)

    @cached_property
    def recall(self) -> np.ndarray:
        """Share of a class's images that were found, [K]; NaN for a class without images."""
        return _divide(self.right, self.support)

    @cached_property
    def precision(self) -> np.ndarray:
        """Share of right ones among the images that were taken for a class, [K].

        0 for a class with images that was never guessed, as in scikit-learn; NaN if it has no images either.
        """
        return np.where((self.guessed == 0) & (self.support > 0), 0, _divide(self.right, self.guessed))

    @cached_property
    def f1(self) -> np.ndarray:
        """Harmonic mean of precision and recall, [K]; NaN for a class without images that was never guessed."""
        return _divide(2 * self.right, self.support + self.guessed)

    @property
    def balanced_accuracy(self) -> float:
        """Mean recall of the classes that have images, in percent."""
        return _mean_percent(self.recall)

    @property
    def macro_f1(self) -> float:
        """Mean F1 of the classes that have images or were guessed, in percent."""
        return _mean_percent(self.f1)

    def most_confused(self, limit: int) -> list[tuple[int, int, int]]:
        """Return up to `limit` triples (true class, predicted class, images) of errors, most images first."""
        wrong = np.flatnonzero(self.true != self.predicted)
        order = wrong[np.argsort(-self.images[wrong], kind='stable')][:limit]
        return [(int(self.true[k]), int(self.predicted[k]), int(self.images[k])) for k in order]

    def matrix(self) -> np.ndarray:
        """Return all counts, [K, K] by true class (row) and predicted class (column)."""
        counts = np.zeros((self.num_classes, self.num_classes), np.int64)
        counts[self.true, self.predicted] = self.images
        return counts

    def _sums(self, classes: np.ndarray, of: np.ndarray | slice = slice(None)) -> np.ndarray:
        sums = np.zeros(self.num_classes, np.int64)
        np.add.at(sums, classes[of], self.images[of])
        return sums


class ConfusionCounter:
    """Collects the guesses of this rank on its device, 8 bytes per image; adding them never makes the host wait."""

    def __init__(self) -> None:
        self._pairs: list[torch.Tensor] = []
        self._num_classes = 0

    def add(self, targets: torch.Tensor, guesses: torch.Tensor, *, num_classes: int) -> None:
        """Add true and predicted class numbers, [B] each, of a classifier of that size."""
        self._num_classes = num_classes
        self._pairs.append(torch.stack((targets, guesses)).int())

    def gather(self) -> Confusion:
        """Return the counts of all ranks, on every rank; all ranks must call this."""
        pairs = torch.cat(self._pairs, 1) if self._pairs else torch.empty(2, 0, dtype=torch.int32)
        own = np.unique(pairs.cpu().numpy(), axis=1, return_counts=True)
        # A rank without images does not know the number of classes.
        found, counts, sizes = zip(*gather((*own, self._num_classes)), strict=True)
        (true, predicted), place = np.unique(np.concatenate(found, 1), axis=1, return_inverse=True)
        images = np.zeros(len(true), np.int64)
        np.add.at(images, place.ravel(), np.concatenate(counts))
        return Confusion(max(sizes), true, predicted, images)


# --- For people -------------------------------------------------------------------------------------------------------

def class_rows(confusion: Confusion, names: Sequence[str]) -> list[dict]:
    """Return a row for each class, in the order of the labels: images, precision, recall and F1 in percent."""
    return [{'label': label, 'class': names[label], 'images': int(confusion.support[label]),
             'guessed': int(confusion.guessed[label]), 'right': int(confusion.right[label]),
             **{name: 100 * float(getattr(confusion, name)[label]) for name in ('precision', 'recall', 'f1')}}
            for label in range(confusion.num_classes)]


def pair_rows(confusion: Confusion, names: Sequence[str]) -> list[dict]:
    """Return a row for each pair of true and predicted class that occurs, in the order of the labels."""
    return [{'true': names[true], 'predicted': names[predicted], 'images': int(images),
             'percent_of_true': 100 * float(images / confusion.support[true])}
            for true, predicted, images in zip(confusion.true, confusion.predicted, confusion.images, strict=True)]


def describe(confusion: Confusion, names: Sequence[str]) -> str:
    """Return tables of the classes and of what they were taken for; of many classes only the worst."""
    rows = [row for row in class_rows(confusion, names) if row['images'] or row['guessed']]
    shown = rows
    heading = f'Precision, recall and F1 in percent of {plural(len(rows), "class", "classes")}'
    if len(rows) > CLASSES_SHOWN:
        shown = sorted(rows, key=lambda row: row['f1'])[:WORST_SHOWN]
        heading += f', the {WORST_SHOWN} with the lowest F1'
    width = max(len('class'), *(len(row['class']) for row in shown))
    lines = [f'{heading}:', f'  {"class":{width}}  images  precision  recall     F1']
    lines += [f'  {row["class"]:{width}}  {row["images"]:6,}  {_percent(row["precision"]):>9}  '
              f'{_percent(row["recall"]):>6}  {_percent(row["f1"]):>5}' for row in shown]
    without = confusion.num_classes - int((confusion.support > 0).sum())
    if without:
        lines.append(f'  {plural(without, "class has", "classes have")} no images')
    return '\n'.join([*lines, *_describe_pairs(confusion, names)])


def _describe_pairs(confusion: Confusion, names: Sequence[str]) -> list[str]:
    if confusion.num_classes <= MATRIX_SHOWN:
        width = max(map(len, names))
        cells = max(4, *(len(f'{count:,}') for count in confusion.images))
        rows = [f'  {names[label]:{width}}  ' + ' '.join(f'{count:{cells},}' for count in row)
                for label, row in enumerate(confusion.matrix())]
        return ['Confusion matrix, images by true class (row) and predicted class (column), in the same order:', *rows]
    pairs = [f'  {images:6,}  {names[true]} → {names[predicted]}'
             for true, predicted, images in confusion.most_confused(WORST_SHOWN)]
    return ['Most confused, images of true → predicted class:', *pairs] if pairs else ['No class is taken for another.']


def _percent(value: float) -> str:
    return '-' if np.isnan(value) else f'{value:.1f}'


# --- Arithmetic -------------------------------------------------------------------------------------------------------

def _divide(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.divide(part, whole, out=np.full(len(whole), np.nan), where=whole > 0)


def _mean_percent(values: np.ndarray) -> float:
    return 100 * float(np.nanmean(values))
