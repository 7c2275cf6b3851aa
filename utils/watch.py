"""Threads watch a device, since the main thread may hang in a launch or a read for ever.

One thread puts marks into the device's queue; when the queue is full, that thread hangs too. So a second thread
measures how long the last mark has been waiting, and judges (see utils/distributed.py).
"""
import threading
import time
from collections.abc import Callable

import torch

BEAT = 0.5  # seconds between two looks


class DeviceMarks:
    """Puts a mark into the work of a device. The call returns a function that tells whether the device is past it.

    A mark is a copy into the host's memory, on the default stream, where training runs. It is not a CUDA event:
    torch keeps Python's lock while it queries one, so a driver that hangs would stop this watch as well.
    """

    def __init__(self, device: torch.device):
        self._source = torch.ones(1, dtype=torch.uint8, device=device)
        self._seen = torch.zeros(1, dtype=torch.uint8, pin_memory=device.type == 'cuda')

    def __call__(self) -> Callable[[], bool]:
        self._seen.zero_()
        self._seen.copy_(self._source, non_blocking=True)
        return lambda: bool(self._seen)


class DeviceWatch:
    """Knows for how long a device has stood still. There is never more than one mark under way.

    Args:
        mark: puts a mark into the device's work, after all that is there; returns what tells whether it is passed.
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
        """Seconds for which the device has stood before the same mark; to be asked every BEAT.

        Time in which nobody asked does not count: a process that was stopped did not wait for another one.
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
        self._thread.join(2 * BEAT)  # no longer, as it may hang with the device

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
        except RuntimeError:  # the device has failed, which the main thread learns as well
            self._is_open = False
