"""Batches in hand, and waits for data that end at a signal. Whole jobs are in tests/faults/test_processes.py."""
import os
import signal
import threading
import time

import pytest

from engine.ahead import StepsAhead
from utils import signals


class Loader:
    """Batches 0, 1, 2, … of which each has as many bad images as its number says."""

    def __init__(self, batches: int):
        self.batches, self.read, self.bad = batches, 0, 0

    def __iter__(self):
        for number in range(self.batches):
            self.read, self.bad = self.read + 1, self.bad + number
            yield number

    def take_bad_count(self):
        bad, self.bad = self.bad, 0
        return bad


@pytest.fixture
def signalled(monkeypatch):
    """Handlers as in training, for the time of a test; returns a function that sends SIGUSR1 after some seconds."""
    before = {number: signal.getsignal(number) for number in (*signals.stoppable(), signal.SIGALRM)}
    monkeypatch.setattr(signals, '_received', 0)
    monkeypatch.setattr(signals, 'STALL_SECONDS', 0.2)
    signals.install()
    yield lambda seconds: threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGUSR1)).start()
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize('depth', [1, 2])
def test_each_step_has_its_batches_and_their_bad_images(depth):
    loader = Loader(7)
    ahead = StepsAhead(loader, steps=3, batches_per_step=2, depth=depth)
    for step in range(3):
        ahead.fill()
        assert loader.read == min(6, 2 * (step + depth))
        batches, bad_count = ahead.take()
        assert (list(batches), bad_count) == ([2 * step, 2 * step + 1], 4 * step + 1)
    ahead.fill()
    assert loader.read == 6, 'the rest makes no step'


def test_a_wait_for_data_ends_soon_after_a_signal(signalled):
    signalled(0.1)
    started = time.monotonic()
    assert signals.wait_for(lambda: time.sleep(30)) is None
    assert 0.2 < time.monotonic() - started < 5 and signals.received() == signal.SIGUSR1
    assert signals.wait_for(lambda: 1) is None, 'nothing is waited for after a signal'
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def test_data_that_comes_soon_after_a_signal_is_taken(signalled):
    signalled(0.1)
    assert signals.wait_for(lambda: time.sleep(0.2) or 1) == 1
    assert signals.received() and signal.getitimer(signal.ITIMER_REAL) == (0, 0)
    time.sleep(0.3)


def test_iteration_ends_at_a_signal(signalled):
    assert list(signals.until_stalled(range(3))) == [0, 1, 2] and list(signals.until_stalled([])) == []

    def items():
        yield 0
        signalled(0.1)
        time.sleep(30)

    assert list(signals.until_stalled(items())) == [0]


def test_nothing_handles_a_stall_for_an_error_of_its_own(signalled):
    def read():
        try:
            time.sleep(30)
        except Exception:
            return 'a bad image'

    signalled(0.1)
    assert signals.wait_for(read) is None
