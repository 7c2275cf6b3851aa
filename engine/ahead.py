"""The batches of the next steps, fetched ahead, so that no rank waits for data within a step.

A rank that waits for data in a step keeps the others waiting for its gradient, in a library that handles no signal. So
each rank has the batches of a step in hand before any rank begins that step (see Trainer), and waits for data only
between two steps, where a signal ends the wait.
"""
from collections import deque
from collections.abc import Iterator

from utils import signals


class StepsAhead:
    """The batches of the steps of an epoch.

    Args:
        loader: its next iteration gives the batches.
        steps: how many steps are left in the epoch.
        batches_per_step: of one rank.
        depth: how many steps to have in hand.
    """

    def __init__(self, loader, *, steps: int, batches_per_step: int, depth: int):
        self._loader, self._batches = loader, iter(loader)
        self._left, self._batches_per_step, self._depth = steps, batches_per_step, depth
        self._in_hand: deque[tuple[deque, int]] = deque()

    def fill(self) -> None:
        """Fetch the batches of the next `depth` steps, or fewer if a signal has asked to stop."""
        while self._left and len(self._in_hand) < self._depth:
            fetched = signals.wait_for(self._fetch)
            if fetched is None:
                return
            self._in_hand.append(fetched)
            self._left -= 1

    def take(self) -> tuple[Iterator, int]:
        """Return the batches of the next step, each freed once it is used, and the number of their bad images."""
        batches, bad_count = self._in_hand.popleft()
        return _emptied(batches), bad_count

    def _fetch(self) -> tuple[deque, int]:
        return deque([next(self._batches) for _ in range(self._batches_per_step)]), self._loader.take_bad_count()


def _emptied(batches: deque) -> Iterator:
    while batches:
        yield batches.popleft()
