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


class InterruptedRun(UserError):
    """A signal stopped training, and the state is saved.

    Args:
        number: of the signal.
        epoch, step: the point of the saved state.
        folder: the run's folder, or one of its checkpoints.
    """

    label = ''

    def __init__(self, number: int, *, epoch: int, step: int, folder):
        super().__init__(f'interrupted by {signal.Signals(number).name}; the state is saved, at epoch {epoch}, step '
                         f'{step}. To go on: {job.resume_command(folder)}')
        self.exit_code = EXIT_CTRL_C if number == signal.SIGINT else EXIT_INTERRUPTED


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """Return '; did you mean …?' with the most similar of `names`, or '' if none is similar."""
    near = difflib.get_close_matches(name, names, n=1)
    return f'; did you mean {near[0]}?' if near else ''
