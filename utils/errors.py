"""Errors that end a script with one line and an exit code, without a traceback.

Exit codes of all scripts and of distributed_train.sh:

      0  done
      1  a bug: its traceback is printed
      2  a user's mistake
      3  training reached numbers that are not finite
      4  a process did not respond to the others within --timeout seconds
      5  another process of the job was lost (distributed_train.sh ends with that process's code)
     75  interrupted by SIGTERM, SIGHUP, SIGUSR1 or SIGQUIT; training has saved its state, and resumes from there
    130  the same, by Ctrl-C
  128+n  killed by signal n
"""
import difflib
import errno
import re
import signal
from collections.abc import Iterable

from utils import job

EXIT_BUG = 1
EXIT_USER_ERROR = 2
EXIT_NOT_FINITE = 3
EXIT_HANG = 4
EXIT_PEER_LOST = 5
EXIT_INTERRUPTED = 75  # sysexits.h: a temporary failure, try again
EXIT_CTRL_C = 130

# Exit codes after which starting the processes again would change nothing.
DECISIONS = (EXIT_USER_ERROR, EXIT_NOT_FINITE, EXIT_INTERRUPTED, EXIT_CTRL_C)

# In the messages of torch's errors, of its CPU allocator, of CUDA and of its libraries.
OUT_OF_MEMORY = ("can't allocate memory", 'not enough memory', 'out of memory', 'CUBLAS_STATUS_ALLOC_FAILED',
                 'CUDNN_STATUS_ALLOC_FAILED', 'std::bad_alloc')
TOO_MANY = 'too many processes and threads; use fewer --workers, or raise the limit: ulimit -u'
# What a system refuses at a limit that the user can raise, by words in the messages of Python's errors.
LIMITS = {
    'Too many open files': 'too many open files; use fewer --workers, or raise the limit: ulimit -n 4096',
    "can't start new thread": TOO_MANY,
    'Resource temporarily unavailable': TOO_MANY,  # as C++ says it
    'cannot join thread before it is started': TOO_MANY,  # which torch's agent tries after that
    'failed to map segment': 'too little address space for the libraries; raise the limit: ulimit -v unlimited',
}


class UserError(ValueError):
    """Something the user gave is wrong. The message names it, its value and the remedy."""

    exit_code = EXIT_USER_ERROR
    label = 'error: '


class NotFiniteError(UserError):
    """Training reached numbers that are not finite. The message says what helps."""

    exit_code = EXIT_NOT_FINITE


class HangError(UserError):
    """A process did not respond to the others in time. The message names it."""

    exit_code = EXIT_HANG


class PeerLostError(UserError):
    """Another process of the job has ended. Its own message or the launcher says why."""

    exit_code = EXIT_PEER_LOST


class WorkerKilledError(UserError):
    """The system has killed a data loading process, mostly for want of memory. The launcher starts the job again."""

    exit_code = 128 + signal.SIGKILL


class InterruptedRun(UserError):
    """A signal stopped training, and the state is saved.

    Args:
        number: of the signal.
        position: of the saved state, such as 'in epoch 1, after step 7'.
        folder: the run's folder, one of its checkpoints, or 'auto'.
    """

    label = ''

    def __init__(self, number: int, *, position: str, folder):
        self.number, self.position = number, position
        super().__init__(f'interrupted by {signal.Signals(number).name}; the state is saved, {position}. '
                         f'To go on: {job.resume_command(folder)}')
        self.exit_code = EXIT_CTRL_C if number == signal.SIGINT else EXIT_INTERRUPTED


def explain_limit(error: BaseException) -> UserError | None:
    """Return what to do if an error is about memory, files or processes that this machine lacks; None for any other.

    torch has a class of its own for the memory of GPUs alone, and names no kind for the rest.
    """
    words = "can't start new thread" if getattr(error, 'errno', None) == errno.EAGAIN else next(
        (words for words in LIMITS if words in str(error)), None)
    if words and isinstance(error, OSError | RuntimeError | ImportError):
        return UserError(LIMITS[words])
    wanted = re.search(r'tried to allocate [\d.]+ \w+', str(error), re.IGNORECASE)
    text = wanted[0] if wanted else next(iter(str(error).splitlines()), '')
    is_full = isinstance(error, MemoryError) or type(error).__name__ == 'OutOfMemoryError' or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in OUT_OF_MEMORY))
    if not is_full:
        return None
    return UserError(f'out of memory ({text[:200] or type(error).__name__}); a smaller --batch-size needs less; '
                     'in training, --global-batch-size keeps the images of a step')


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """Return '; did you mean …?' with the most similar of `names`, or '' if none is similar."""
    near = difflib.get_close_matches(name, names, n=1)
    return f'; did you mean {near[0]}?' if near else ''
