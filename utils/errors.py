"""The error of a user's mistake, and how a script ends: one line and an exit code, never a traceback for a mistake.

Exit codes, of the scripts and of distributed_train.sh alike:

      0  done
      1  a bug: its traceback is printed
      2  a user's mistake
      3  training has left the finite numbers
      4  a process did not come to the others for --timeout seconds
      5  another process of the job was lost (distributed_train.sh ends with that one's code)
     75  interrupted by SIGTERM, SIGHUP, SIGUSR1 or SIGQUIT; a training has saved its state: started again it goes on
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

# Ends that were decided on: the same would come of starting the processes again.
DECISIONS = (EXIT_USER_ERROR, EXIT_NOT_FINITE, EXIT_INTERRUPTED, EXIT_CTRL_C)

class UserError(ValueError):
    """Something the user gave is wrong. The message says what, with its value, and what to do instead."""

    exit_code = EXIT_USER_ERROR
    label = 'error: '


class NotFiniteError(UserError):
    """Training has left the finite numbers; the message says what helps."""

    exit_code = EXIT_NOT_FINITE


class HangError(UserError):
    """A process has not come to the others in time; the message names it."""

    exit_code = EXIT_HANG


class PeerLostError(UserError):
    """Another process of the job has ended; why, its own message or the launcher says."""

    exit_code = EXIT_PEER_LOST


class InterruptedRun(UserError):
    """A signal has asked a training to stop, and its state is saved.

    Args:
        number: of the signal.
        epoch, step: where the state stands.
        folder: the run's, or one of its checkpoints.
    """

    label = ''

    def __init__(self, number: int, *, epoch: int, step: int, folder):
        super().__init__(f'interrupted by {signal.Signals(number).name}; the state is saved, at epoch {epoch}, step '
                         f'{step}. To go on: {job.resume_command(folder)}')
        self.exit_code = EXIT_CTRL_C if number == signal.SIGINT else EXIT_INTERRUPTED


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """The end of a message on a wrong name: '; did you mean …?' with the nearest of `names`, or '' if none is near."""
    near = difflib.get_close_matches(name, names, n=1)
    return f'; did you mean {near[0]}?' if near else ''

