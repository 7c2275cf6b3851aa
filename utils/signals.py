"""How a process reacts to signals.

Before the training loop, a signal to stop ends the process at once, with one line and the exit code of an
interruption. After `install` it is only noted: between two steps the loop checks `received`, saves and ends.

    prepare()                       every script, at its start
    install()                       before the loop
    batch = wait_for(fetch)         for data, which may never come
    if number := received(): …      at the end of a step
"""
import ctypes
import faulthandler
import itertools
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from utils import job
from utils.errors import EXIT_CTRL_C, EXIT_INTERRUPTED, EXIT_PEER_LOST
from utils.exits import report

# SIGUSR1 is Slurm's warning before the end of the time limit (--signal=USR1@120).
STOPPING = ('SIGTERM', 'SIGINT', 'SIGHUP', 'SIGUSR1', 'SIGQUIT')
# A Ctrl-C reaches a process twice if the launcher passes on what the terminal or srun sends to everybody.
ECHO_SECONDS = 1.0
# How long a process whose launcher has died may take to save, if GRACE is not less.
LAST_SECONDS = 30.0
# Between two looks whether it has.
ORPHAN_SECONDS = 1.0
# How long data may still take to come after a signal.
STALL_SECONDS = 1.0
PR_SET_PDEATHSIG = 1

T = TypeVar('T')

_received = 0
_waiting: int | None = None  # the process that is in wait_for; its workers are forked there
_interrupted_at: float | None = None


def prepare() -> None:
    """Prepare a script: signals end it at once, SIGUSR2 prints its stacks, and it ends with its launcher."""
    if threading.current_thread() is not threading.main_thread():
        return  # only tests call a script's main in another thread
    # Ctrl-C stays Python's KeyboardInterrupt, so that `finally` blocks run.
    _handle(_end_at_once, set(STOPPING) - {'SIGINT'})
    if hasattr(signal, 'SIGIO'):  # tells of input or output that is ready, and would end the process
        signal.signal(signal.SIGIO, signal.SIG_IGN)
    faulthandler.enable()  # a crash in a library prints the stack
    if hasattr(signal, 'SIGUSR2'):
        faulthandler.register(signal.SIGUSR2, all_threads=True)
    _follow_launcher()


def install() -> None:
    """Only note signals to stop from now on. A second Ctrl-C still ends the process at once."""
    _handle(_note, STOPPING)
    if hasattr(signal, 'SIGALRM'):
        signal.signal(signal.SIGALRM, _end_wait)


def received() -> int:
    """Return the number of the first signal to stop since `install`, or 0."""
    return _received


class StalledError(BaseException):
    """Data has not come in time after a signal to stop. No handler of errors along the way takes it for its own."""


def wait_for(function: Callable[[], T]) -> T | None:
    """Return `function()`; None if a signal has asked to stop, and the function has not returned soon after.

    A signal that came before is enough. The function is left by an exception in its midst, so it must not be called
    again. Call this in the main thread.
    """
    global _waiting
    try:
        try:
            _waiting = os.getpid()
            return None if _received else function()
        finally:
            _waiting = None
            _set_alarm(0)
    except StalledError:
        return None


def until_stalled(items: Iterable[T]) -> Iterator[T]:
    """Iterate over `items` until they end, or until a signal has asked to stop (see `wait_for`)."""
    iterator = iter(items)
    while item := wait_for(lambda: list(itertools.islice(iterator, 1))):
        yield item.pop()


def _set_alarm(seconds: float) -> None:
    if hasattr(signal, 'setitimer') and signal.getsignal(signal.SIGALRM) is _end_wait:
        signal.setitimer(signal.ITIMER_REAL, seconds, seconds)  # again and again: a destructor would swallow the error


def _end_wait(number: int, frame) -> None:
    if _waiting == os.getpid():
        raise StalledError


def stoppable() -> list[signal.Signals]:
    """Return the signals to stop, except those that the process inherited as ignored (nohup, a shell's &)."""
    numbers = [getattr(signal, name) for name in STOPPING if hasattr(signal, name)]
    return [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]


def _handle(handler, names) -> None:
    for number in stoppable():
        if number.name in names:
            signal.signal(number, handler)


def _end_at_once(number: int, frame) -> None:
    report(f'{os.path.basename(sys.argv[0])}: stopped by {signal.Signals(number).name}; the same command starts it '
           'again', EXIT_INTERRUPTED)


def _note(number: int, frame) -> None:
    global _received, _interrupted_at
    _received = _received or number
    if _waiting == os.getpid():
        _set_alarm(STALL_SECONDS)
    if number != signal.SIGINT:
        return
    now = time.monotonic()
    if _interrupted_at is None:
        _interrupted_at = now
    elif now - _interrupted_at > ECHO_SECONDS:
        report(f'{os.path.basename(sys.argv[0])}: interrupted twice, ended at once; --resume auto continues from '
               'the last checkpoint', EXIT_CTRL_C)


def _follow_launcher() -> None:
    """Make the kernel send SIGTERM when the launcher dies (Linux only; elsewhere the workers live on)."""
    if job.take_launcher() is None:
        return
    if sys.platform == 'linux':
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)
        if job.is_orphan():  # the launcher died before the call
            _end_at_once(signal.SIGTERM, None)
    threading.Thread(target=_end_after_launcher, name='orphan', daemon=True).start()


def _end_after_launcher() -> None:
    """End this process some time after its launcher. The main thread may wait in vain, in torch, without signals."""
    while not job.is_orphan():
        time.sleep(ORPHAN_SECONDS)
    seconds = min(job.grace(), LAST_SECONDS)
    time.sleep(seconds)
    report(f'{os.path.basename(sys.argv[0])}: the launcher has ended, and the state could not be saved in {seconds:g} '
           's; --resume auto goes on from the last checkpoint', EXIT_PEER_LOST)
