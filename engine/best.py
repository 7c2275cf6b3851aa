"""Which evaluation is the best one: of the weights or of their average, and of which epoch."""
import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

# What the results of an epoch are of, in words; with the prefix of their names in a record, and the entry of a
# checkpoint that holds the weights.
WEIGHTS, AVERAGED = 'weights', 'averaged weights'
PREFIXES = {WEIGHTS: '', AVERAGED: 'ema_'}
ENTRIES = {WEIGHTS: 'state_dict', AVERAGED: 'state_dict_ema'}
IN_WORDS = {'top1': 'top-1', 'top5': 'top-5', 'macro_f1': 'macro F1'}


class Result(NamedTuple):
    """An evaluation by --eval-metric; of equal ones, the lower loss is better."""
    metric: str
    value: float
    loss: float
    of: str  # WEIGHTS or AVERAGED

    def is_better_than(self, value: float | None, loss: float | None) -> bool:
        """Compare with another evaluation: its value, or None if there is none, and its loss if it is known."""
        if not math.isfinite(self.value):
            return False
        if value is None or not math.isfinite(value):
            return True
        sign = -1 if self.metric == 'loss' else 1
        return sign * self.value > sign * value or (self.value == value and loss is not None and self.loss < loss)

    def __str__(self) -> str:
        if self.metric == 'loss':
            return f'loss {self.value:.4f}'
        return f'{self.value:.2f} % {IN_WORDS.get(self.metric) or self.metric.replace("_", " ")}'


def better_result(results: Mapping[str, Any], metric: str) -> Result:
    """Return the better one of an epoch's results, which have those of the average under the prefix `ema_`, if any."""
    weights, *average = _results(results, metric)
    return average[0] if average and average[0].is_better_than(weights.value, weights.loss) else weights


def best_record(records: Iterable[dict], metric: str) -> tuple[dict, Result] | None:
    """Return the record of the best of a run's epochs and its result; None if no epoch has one.

    A record says which weights were the better ones. Earlier versions did not, and always chose the average.
    """
    best: tuple[dict, Result] | None = None
    for record in records:
        found = {result.of: result for result in _results(record, metric)}
        result = found.get(record.get('better', '')) or found.get(AVERAGED) or found.get(WEIGHTS)
        if result and result.is_better_than(*(best[1][1:3] if best else (None, None))):
            best = record, result
    return best


def _results(record: Mapping[str, Any], metric: str) -> list[Result]:
    """Return the results of the weights and of their average, as far as a record has them."""
    return [Result(metric, value, record.get(f'{prefix}loss', math.inf), of) for of, prefix in PREFIXES.items()
            if isinstance(value := record.get(prefix + metric), int | float)]
