"""Exact evaluation, for train.py (weights and their average), validate.py and transfer.py."""
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from engine.answers import AnswerKeeper, Answers, is_right, true_losses
from engine.confusion import Confusion, ConfusionCounter
from engine.ensemble import mean_probability
from utils import signals
from utils.console import progress_bar
from utils.distributed import gather, sum_over_ranks
from utils.errors import UserError

_logger = logging.getLogger(__name__)

# The numbers that may choose the best checkpoint.
METRICS = ('top1', 'top5', 'loss', 'balanced_accuracy', 'macro_f1')


@dataclass(frozen=True)
class Evaluation:
    """Cross-entropy `loss`, `top1` and `top5` in percent over all `count` images of all ranks.

    Another `bad_images` images could not be decoded. `confusion` has the counts and numbers of each class; None if an
    image may be of several. `answers` has those to each image, if `evaluate_together` was told the truth.
    """
    loss: float
    top1: float
    top5: float
    count: int
    bad_images: int
    images_per_second: float
    confusion: Confusion | None
    answers: Answers | None = None

    def as_dict(self) -> dict:
        """Return all numbers of the whole, without those of single classes."""
        return {'loss': self.loss, 'top1': self.top1, 'top5': self.top5,
                'balanced_accuracy': self.confusion.balanced_accuracy if self.confusion else None,
                'macro_f1': self.confusion.macro_f1 if self.confusion else None,
                'count': self.count, 'bad_images': self.bad_images, 'images_per_second': self.images_per_second}


class MostConfidentErrors:
    """The wrong predictions of this rank in which the model was most confident, most confident first.

    They stay on the device until they are fetched; adding them never makes the host wait.
    """

    def __init__(self, limit: int = 8):
        self._limit = limit
        self._kept: list[torch.Tensor] | None = None

    def add(self, images: torch.Tensor, targets: torch.Tensor, logits: torch.Tensor) -> None:
        probabilities, guesses = logits.softmax(1).max(1)  # [B] each
        is_error = (guesses != targets) & probabilities.isfinite()
        batch = self._surest(torch.where(is_error, probabilities, 0), images, targets, guesses)
        if self._kept is None:
            self._kept = batch
        else:
            self._kept = self._surest(*(torch.cat(pair) for pair in zip(self._kept, batch, strict=True)))

    def _surest(self, probabilities: torch.Tensor, *others: torch.Tensor) -> list[torch.Tensor]:
        probabilities, order = probabilities.topk(min(self._limit, len(probabilities)))
        return [probabilities, *(other[order] for other in others)]

    def fetch(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor] | None:
        """Return images [n, C, H, W] as the model took them, targets, guesses and probabilities of the guesses [n].

        Returns None if this rank has no errors; n is at most the limit.
        """
        if self._kept is None:
            return None
        count = int((self._kept[0] > 0).sum())
        if not count:
            return None
        probabilities, images, targets, guesses = (kept[:count] for kept in self._kept)
        return images, targets, guesses, probabilities


def evaluate(model, loader, prepare, *, precision, log_interval: int = 50, name: str = 'Test',
             errors: MostConfidentErrors | None = None, eager: bool = False,
             after_batch: Callable[[], None] = lambda: None) -> Evaluation:
    """Evaluate `model` on all batches of `loader`; not wrapped in DDP, since ranks may have different numbers of them.

    Each rank sums up its images; one reduction and one division follow. So the result is exact for any number of
    images and ranks.

    Args:
        prepare: (uint8 images [B, C, H, W], targets [B]) → (normalised images, targets) on the device.
        errors: collects the wrong predictions of this rank.
        eager: run `model` uncompiled, even if it is compiled.
        after_batch: called equally often on all ranks. What it raises ends the evaluation, at most one call after a
            signal has asked any rank to stop.
    Raises:
        UserError: no image could be decoded.
    """
    return evaluate_together([model], loader, prepare, precision=precision, log_interval=log_interval, name=name,
                             errors=errors, eager=eager, after_batch=after_batch)[0]


@torch.no_grad()
def evaluate_together(models: Sequence, loader, prepare, *, precision, truth: torch.Tensor | None = None,
                      ensemble: int = 0, log_interval: int = 50, name: str = 'Test',
                      errors: MostConfidentErrors | None = None, eager: bool = False,
                      after_batch: Callable[[], None] = lambda: None) -> list[Evaluation]:
    """Evaluate several models on the same batches, which are read once; return an Evaluation of each.

    Args:
        models: each maps what `prepare` returns as images to logits.
        truth: the classes of all images [images], on the device, or several of each [images, L], which -1 fills up; the
            loader gives numbers of images (`data.Numbered`). Then the answers to each image are kept. None: the loader
            gives targets.
        ensemble: also return, as the last one, the Evaluation of the mean probability of the first so many models.
        log_interval, errors: of the first model.
        The others, and what is raised, are those of `evaluate`.
    """
    most_batches = max(gather(len(loader)))
    was_training = [model.training for model in models]
    for model in models:
        model.eval()
    tallies = [_Tally(prepare.device, truth) for _ in range(len(models) + bool(ensemble))]
    batch_time = 0.0
    start = end = time.perf_counter()
    bar = progress_bar(total=len(loader), desc=name)
    calls = 0
    for index, (images, targets) in enumerate(signals.until_stalled(loader)):
        images, targets = prepare(images, targets)
        # Only the first batch compiles: the last one may be smaller, and is not worth another compilation.
        stance = torch.compiler.set_stance('force_eager' if eager else 'eager_on_recompile' if index else 'default')
        with stance, precision.autocast():
            logits = [model(images).float() for model in models]
        if ensemble:
            logits.append(mean_probability(logits[:ensemble]))
        batches = [tally.add(own, targets) for tally, own in zip(tallies, logits, strict=True)]
        if errors:
            errors.add(images, targets, logits[0])
        if index % log_interval == 0 or index == len(loader) - 1:
            _log_line(name, index, len(loader), batches[0], tallies[0].sums, batch_time or time.perf_counter() - end,
                      (time.perf_counter() - start) / (index + 1))
        batch_time = time.perf_counter() - end
        end = time.perf_counter()
        bar.update()
        after_batch()
        calls += 1
    # With one call more, a rank that has left its wait for the last batch learns that all ranks stop.
    for _ in range(calls, most_batches + 1):
        after_batch()
    bar.close()
    for model, training in zip(models, was_training, strict=True):
        model.train(training)
    bad = loader.take_bad_count()
    return [tally.finish(bad, start) for tally in tallies]


class _Tally:
    """Sums up what one model answers to this rank's images, on the device; adding a batch never makes the host wait."""

    def __init__(self, device: torch.device, truth: torch.Tensor | None):
        # Sums of loss, top-1, top-5, images and bad images, in float64, which keeps large sums exact.
        self.sums = torch.zeros(5, dtype=torch.float64, device=device)
        self._truth = truth
        self._confusion = ConfusionCounter() if truth is None or truth.dim() == 1 else None
        self._answers = AnswerKeeper() if truth is not None else None

    def add(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Add logits [B, K], and targets or numbers of images [B]; return the sums of the batch, [4] in float64."""
        numbers = targets
        if self._truth is not None:
            targets = self._truth[numbers]  # [B] or [B, L]
        guesses = logits.topk(min(5, logits.shape[1])).indices  # [B, 5]
        batch = _batch_sums(logits, targets, guesses)
        self.sums[:4] += batch
        if self._confusion:
            self._confusion.add(targets, guesses[:, 0], num_classes=logits.shape[1])
        if self._answers:
            self._answers.add(numbers, logits, guesses, targets)
        return batch

    def finish(self, bad: int, start: float) -> Evaluation:
        """Return the result over all ranks, which must all call this; `bad` images of this rank were left out."""
        self.sums[4] = bad
        loss, top1, top5, count, bad_images = sum_over_ranks(self.sums).tolist()
        if not count:
            raise UserError(f'none of {int(bad_images)} evaluation images can be decoded; check the data set')
        seconds = time.perf_counter() - start
        return Evaluation(loss / count, 100 * top1 / count, 100 * top5 / count, int(count), int(bad_images),
                          count / seconds, self._confusion.gather() if self._confusion else None,
                          self._answers.gather() if self._answers else None)


def _batch_sums(logits: torch.Tensor, targets: torch.Tensor, guesses: torch.Tensor) -> torch.Tensor:
    """Return [4] in float64: sum of losses, images right at the first and within five guesses, number of images.

    targets: [B], or several of each [B, L], which -1 fills up.
    """
    right = is_right(guesses, targets) if targets.dim() == 2 else guesses == targets[:, None]  # [B, 5]
    loss = (true_losses(logits.log_softmax(1), targets).sum() if targets.dim() == 2
            else F.cross_entropy(logits, targets, reduction='sum'))
    return torch.stack([loss.double(), right[:, 0].sum().double(), right.any(1).sum().double(),
                        torch.full_like(loss, len(targets), dtype=torch.float64)])


def _log_line(name, index, total, batch, sums, seconds, mean_seconds):
    """Log the line that users of timm know: the value of this batch, and the mean so far, of this rank."""
    (loss, top1, top5, n), (loss_sum, top1_sum, top5_sum, count, _) = batch.tolist(), sums.tolist()
    _logger.info('%s: [%4d/%d]  Time: %.3f (%.3f)  Loss: %7.4f (%6.4f)  Acc@1: %7.4f (%7.4f)  Acc@5: %7.4f (%7.4f)',
                 name, index + 1, total, seconds, mean_seconds, loss / n, loss_sum / count,
                 100 * top1 / n, 100 * top1_sum / count, 100 * top5 / n, 100 * top5_sum / count)
