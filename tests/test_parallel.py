"""Tests of utils/parallel.py: results, errors, and that no process is left.

    python -m pytest tests/test_parallel.py
"""
import multiprocessing
import os
import signal
import time

import pytest

from tests.conftest import end_group
from tests.faults.test_pack import ended, group_is_gone
from utils.errors import UserError
from utils.parallel import in_processes


def forever(item, tick):
    while True:
        tick(1, 0)
        time.sleep(0.01)


@pytest.mark.parametrize('jobs', [1, 2, 9])
def test_every_item_is_done_once(jobs):
    def square(item, tick):
        tick(1, 10)
        return os.getpid(), item ** 2

    results = list(in_processes(square, range(7), jobs=jobs, total=7))
    assert sorted(value for _, value in results) == [0, 1, 4, 9, 16, 25, 36]
    assert len({process for process, _ in results}) == min(jobs, 7) and os.getpid() not in dict(results)


def fails(item, tick):
    if item == 0:
        forever(item, tick)
    if item == 1:
        raise UserError('this is wrong')
    if item == 2:
        raise KeyError('a bug')
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize('item, kind, message', [
    (1, UserError, '^this is wrong$'), (2, RuntimeError, "(?s)Traceback.*KeyError: 'a bug'"),
    (3, UserError, 'one of the --jobs has ended with exit code -9'),
])
def test_one_that_fails_ends_all(item, kind, message):
    with pytest.raises(kind, match=message):
        list(in_processes(fails, [0, item], jobs=2, total=2))
    assert not multiprocessing.active_children()


def test_all_end_with_their_parent():
    pid = os.fork()
    if pid == 0:
        os.setsid()
        list(in_processes(forever, range(2), jobs=2, total=2))
        os._exit(1)
    time.sleep(0.2)
    os.kill(pid, signal.SIGKILL)
    try:
        assert ended(pid) == -signal.SIGKILL
        assert group_is_gone(pid)
    finally:
        end_group(pid)
