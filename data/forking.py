"""Worker processes that are forked again if they hang.

A thread of a C++ library, such as gloo's at the end of a collective, takes a lock of the interpreter for a microsecond.
A process forked in that moment inherits the lock without the thread that would release it. Up to Python 3.11 it then
waits forever before its first line.
"""
import os
import select
from multiprocessing.context import ForkContext, ForkProcess

from utils.errors import explain_limit

# Seconds for a new process to start; each replacement gets twice as many.
PATIENCE = 10.0


class RetryingProcess(ForkProcess):
    """A forked process whose `start` returns once it is running."""
    _pipe: tuple[int, int]

    def run(self):
        for end in self._pipe:
            os.close(end)
        try:
            super().run()
        except Exception as error:
            if not explain_limit(error):
                raise
            os._exit(1)  # a thread of its own could not start; the main process says what helps

    @staticmethod
    def _Popen(process):
        patience = PATIENCE
        while True:
            reading, writing = process._pipe = os.pipe()
            started = ForkProcess._Popen(process)
            os.close(writing)
            # The pipe ends when the new process closes its side or dies; a death is noticed elsewhere.
            is_running = select.select([reading], [], [], patience)[0]
            os.close(reading)
            if is_running:
                return started
            started.kill()
            started.wait()
            started.close()
            patience *= 2


class RetryingForkContext(ForkContext):
    """The context of `multiprocessing` with such processes."""
    Process = RetryingProcess
