"""Processes forked beside threads: one that does not get going is replaced.

A thread of a C++ library takes a lock of the interpreter whenever it begins to use Python objects, as those of gloo do
at the end of every collective. A process that is forked in that microsecond has the lock, and nobody who would release
it: up to Python 3.11 it waits for it before its first line.
"""
import os
import select
from multiprocessing.context import ForkContext, ForkProcess

PATIENCE = 10.0  # seconds for a new process to get going, and twice as many for each that follows in its place


class SureProcess(ForkProcess):
    """A forked process whose `start` returns when it is at work."""
    _pipe: tuple[int, int]

    def run(self):
        for end in self._pipe:
            os.close(end)
        super().run()

    @staticmethod
    def _Popen(process):
        patience = PATIENCE
        while True:
            heard, silence = process._pipe = os.pipe()
            started = ForkProcess._Popen(process)
            os.close(silence)
            # The pipe ends when the new process closes its side, or dies, of which others will hear.
            is_at_work = select.select([heard], [], [], patience)[0]
            os.close(heard)
            if is_at_work:
                return started
            started.kill()
            started.wait()
            started.close()
            patience *= 2


class RetryingForkContext(ForkContext):
    """The context of `multiprocessing` with such processes."""
    Process = SureProcess
