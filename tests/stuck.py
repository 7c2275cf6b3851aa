"""A script whose processes stand still, or end, as those of a training on GPUs do: NCCL never raises.

    python -m launch.launcher 3 tests/stuck.py HOW --device cpu

`device`: rank 0 waits for a collective, rank 2 comes to it later, and rank 1 never does.
`killed`: rank 1 is killed, and then rank 0 is aborted. `aborted`: rank 1 is aborted, and then rank 0 reports a hang.
"""
import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from utils import distributed  # noqa: E402
from utils.errors import HangError
from utils.script import run_script  # noqa: E402

TIMEOUT = timedelta(seconds=9)
LATE = 4.5  # more than ranks may be apart that wait for the same one


class Stream:
    """Stands for a device: collectives are put into it, and the host waits for them without end."""

    def __init__(self):
        self._works = []

    def all_reduce(self) -> None:
        self._works.append(dist.all_reduce(torch.zeros(1), async_op=True))

    def mark(self):
        works = self._works[-1:]
        return lambda: all(work.is_completed() for work in works)

    def read(self) -> None:
        self._works[-1].wait()


def wait_for_a_device(rank: int) -> None:
    stream = Stream()
    distributed._progress.timeout = TIMEOUT  # of the watch, and not of the collectives
    distributed._progress.watch(stream.mark)
    for _ in range(2):
        stream.all_reduce()
        stream.read()
    distributed.note_progress(2)
    if rank == 1:
        oversleep()
    if rank == 2:
        time.sleep(LATE)
    stream.all_reduce()
    stream.read()


def oversleep() -> None:
    time.sleep(600)


def end(signal_number: int, seconds: float) -> None:
    time.sleep(seconds)
    os.kill(os.getpid(), signal_number)


def main() -> None:
    how = sys.argv[1]  # the launcher reads --device
    world = distributed.init_process_group('cpu', timedelta(seconds=600))
    if how == 'device':
        wait_for_a_device(world.rank)
    elif how == 'killed':
        end(signal.SIGKILL, 0) if world.rank == 1 else end(signal.SIGABRT, 0.5)
    elif how == 'aborted':
        if world.rank == 1:
            end(signal.SIGABRT, 0)
        time.sleep(1)
        raise HangError('waited in vain for rank 2')


if __name__ == '__main__':
    run_script(main)
