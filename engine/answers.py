"""What a model answered to each image, over all ranks, in the order of the data set.

    keeper = AnswerKeeper()
    keeper.add(numbers, logits, guesses, targets)  # of each batch
    answers = keeper.gather()                      # on every rank
    answers.top1, answers.part(0, 1000).loss
"""
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from engine.calibration import calibration_error, wilson_interval
from utils.distributed import gather
from utils.errors import UserError


@dataclass(frozen=True)
class Answers:
    """Answers to n images, with k = 5 guesses each, or as many as there are classes.

    Attributes:
        numbers: of the images in the data set, ascending, [n].
        guesses: classes, the most probable one first, [n, k]; probabilities: of these, [n, k].
        right: whether they are the true class, or one of several, [n, k].
        losses: negative log-likelihood of the true class, or of any of several, [n].
    """
    numbers: np.ndarray
    guesses: np.ndarray
    probabilities: np.ndarray
    right: np.ndarray
    losses: np.ndarray

    def part(self, start: int, end: int) -> 'Answers':
        """Return the answers to the images from `start` to before `end`."""
        own = slice(*np.searchsorted(self.numbers, (start, end)))
        return Answers(self.numbers[own], self.guesses[own], self.probabilities[own], self.right[own],
                       self.losses[own])

    def as_dict(self) -> dict:
        """Return the numbers of the whole: accuracies with the 95 % interval of the first, in percent, loss and ECE."""
        count, right = len(self.numbers), int(self.right[:, 0].sum())
        if not count:
            raise UserError('none of the images of a part of the set can be decoded; check the data set')
        low, high = wilson_interval(right, count)
        return {'loss': float(self.losses.mean(dtype=np.float64)), 'top1': 100 * right / count, 'top1_low': low,
                'top1_high': high, 'top5': 100 * int(self.right.any(1).sum()) / count, 'ece': self.calibration_error,
                'count': count}

    @property
    def calibration_error(self) -> float:
        return calibration_error(self.probabilities[:, 0], self.right[:, 0])


class AnswerKeeper:
    """Collects the answers of this rank on its device, 50 bytes an image; adding them never makes the host wait."""

    def __init__(self) -> None:
        self._kept: list[tuple[torch.Tensor, ...]] = []

    def add(self, numbers: torch.Tensor, logits: torch.Tensor, guesses: torch.Tensor, targets: torch.Tensor) -> None:
        """Add the answers `logits` [B, K] to the images `numbers` [B], and the best of them, `guesses` [B, k].

        targets: as for `true_losses`.
        """
        logarithms = logits.log_softmax(1)
        self._kept.append((numbers, guesses.int(), logarithms.gather(1, guesses).exp(), is_right(guesses, targets),
                           true_losses(logarithms, targets)))

    def gather(self) -> Answers | None:
        """Return the answers of all ranks, on every rank; None if there are none. All ranks must call this."""
        own = [torch.cat(parts).cpu().numpy() for parts in zip(*self._kept, strict=True)]
        everything = [arrays for arrays in gather(own) if arrays]
        if not everything:
            return None
        joined = [np.concatenate(parts) for parts in zip(*everything, strict=True)]
        order = joined[0].argsort(kind='stable')
        return Answers(*(array[order] for array in joined))


def is_right(guesses: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return which guesses [B, k] are the target [B], or one of several [B, L], which -1 fills up: [B, k]."""
    return (guesses.unsqueeze(2) == targets.reshape(len(targets), 1, -1)).any(2)


def true_losses(logarithms: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the negative log-likelihood of the target [B], or of any one of several [B, L], which -1 fills up: [B].

    logarithms: log-probabilities [B, K].
    """
    if targets.dim() == 1:
        return F.nll_loss(logarithms, targets, reduction='none')
    found = logarithms.gather(1, targets.clamp(min=0)).masked_fill(targets < 0, -torch.inf)  # [B, L]
    return -found.logsumexp(1)


# --- For people -------------------------------------------------------------------------------------------------------

def image_rows(answers: Answers, dataset, truth: np.ndarray, names: Sequence[str]) -> Iterator[dict]:
    """Yield a row for each image: its name and path, what it is, the guesses, and whether the first is right.

    Args:
        dataset: the images; has `name(number)` and `path(number)`.
        truth: class numbers [images], or several of each [images, L], which -1 fills up.
        names: of the classes.
    """
    for row, number in enumerate(answers.numbers.tolist()):
        targets = [target for target in np.atleast_1d(truth[number]).tolist() if target >= 0]
        entry = {'name': dataset.name(number), 'path': dataset.path(number),
                 'target': ' '.join(map(str, targets)), 'class': '; '.join(names[target] for target in targets)}
        for place, (guess, probability) in enumerate(zip(answers.guesses[row].tolist(),
                                                         answers.probabilities[row].tolist(), strict=True), start=1):
            entry |= {f'guess_{place}': guess, f'class_{place}': names[guess], f'probability_{place}': probability}
        yield entry | {'loss': float(answers.losses[row]), 'right': bool(answers.right[row, 0])}
