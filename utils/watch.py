"""Threads that watch a device, since the main thread may hang forever in a launch or a read.

One thread puts marks into the device's queue; it hangs too if the queue is full. So a second thread measures how long
the last mark has been waiting (see utils/distributed.py).
"""
import threading
import time
from collections.abc import Callable

import torch

# Seconds between two checks.
BEAT = 0.5


class DeviceMarks:
    """Puts a mark into a device's queue; the call returns a function that tells whether the device has passed it.

    A mark is a copy into host memory on the default stream, where training runs. It is not a CUDA event, since torch
    holds Python's lock while it queries one: a hanging driver would stop this watch too.
    """

    def __init__(self, device: torch.device):
        self._source = torch.ones(1, dtype=torch.uint8, device=device)
        self._seen = torch.zeros(1, dtype=torch.uint8, pin_memory=device.type == 'cuda')

    def __call__(self) -> Callable[[], bool]:
        self._seen.zero_()
        self._seen.copy_(self._source, non_blocking=True)
        return lambda: bool(self._seen)


class DeviceWatch:
    """Measures how long a device has stood still, with one mark at a time.

    Args:
        mark: puts a mark at the end of the device's queue; returns a function that tells whether it was passed.
    """

    def __init__(self, mark: Callable[[], Callable[[], bool]]):
        self._mark = mark
        self._is_open = False
        self._passed = self._known = 0
        self._waited, self._asked = 0.0, time.monotonic()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name='device watch', daemon=True)
        self._thread.start()

    def waited(self) -> float:
        """Return the seconds for which the device has not passed the current mark; call it every BEAT.

        Time without calls does not count, since a stopped process does not wait for another one.
        """
        now = time.monotonic()
        if self._is_open and self._passed == self._known:
            self._waited += min(now - self._asked, 2 * BEAT)
        else:
            self._waited = 0.0
        self._known, self._asked = self._passed, now
        return self._waited

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join(2 * BEAT)  # it may hang with the device

    def _run(self) -> None:
        try:
            while not self._stopped.wait(BEAT):
                self._is_open = True
                is_passed = self._mark()
                while not is_passed():
                    if self._stopped.wait(BEAT):
                        return
                self._passed += 1
                self._is_open = False
        except RuntimeError:  # the device failed, which the main thread notices too
            self._is_open = False
