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
import io
import json
import os
import select
import shlex
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import NoReturn

from utils import signals

EXIT_BUG = 1
EXIT_USER_ERROR = 2
EXIT_NOT_FINITE = 3
EXIT_HANG = 4
EXIT_PEER_LOST = 5
EXIT_INTERRUPTED = 75  # sysexits.h: a temporary failure, try again
EXIT_CTRL_C = 130

# Ends that were decided on: the same would come of starting the processes again.
DECISIONS = (EXIT_USER_ERROR, EXIT_NOT_FINITE, EXIT_INTERRUPTED, EXIT_CTRL_C)

# Held by the thread that reports, until the process has ended; a signal's handler may interrupt it, and report too.
_reporting = threading.RLock()


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
                         f'{step}. To go on: {resume_command(folder)}')
        self.exit_code = EXIT_CTRL_C if number == signal.SIGINT else EXIT_INTERRUPTED


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """The end of a message on a wrong name: '; did you mean …?' with the nearest of `names`, or '' if none is near."""
    near = difflib.get_close_matches(name, names, n=1)
    return f'; did you mean {near[0]}?' if near else ''


def resume_command(folder) -> str:
    """The command that this process, or its job, was started with, with --resume `folder` at its end."""
    options = sys.argv[1:]
    for index in reversed(range(len(options))):
        name, equals, _ = options[index].partition('=')
        name = name.replace('_', '-')
        if name in ('--resume', '--start-epoch'):  # this one, and the one below, were meant for once
            del options[index:index + (1 if equals else 2)]
        elif name == '--no-resume-opt':
            del options[index]
    command = ['python', sys.argv[0]]
    if 'TORCHELASTIC_RUN_ID' in os.environ:
        names = ['SCRIPT'] if os.environ.get('SCRIPT') else []
        if os.environ.get('NNODES', '1') != '1':
            names += ['NNODES', 'RDZV_ENDPOINT', 'RDZV_ID']
        command = [f'{name}={os.environ[name]}' for name in names if name in os.environ]
        command += [os.environ.get('T2T_COMMAND', './distributed_train.sh'), os.environ['LOCAL_WORLD_SIZE']]
    return shlex.join([*command, *options, '--resume', str(folder)])


def run_script(main) -> None:
    """Calls a script's `main()` and ends the process with the exit code that says how it went."""
    name = Path(sys.argv[0]).name
    signals.prepare()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors='backslashreplace')  # a name that the console cannot show ends nothing
    try:
        main()
        if sys.stdout:
            sys.stdout.flush()
    except BrokenPipeError:
        if not _nobody_reads():
            raise
    except UserError as e:
        fail(e)
    except KeyboardInterrupt:
        report(f'{name}: interrupted; the same command starts it again', EXIT_CTRL_C)
    except Exception as e:
        # Only a process that has torch has peers; this module stays light for those that have none.
        distributed = sys.modules.get('utils.distributed')
        if distributed is None or not distributed.is_distributed():
            raise
        if explained := distributed.explain(e):
            fail(explained)
        traceback.print_exc()
        leave_at_once(EXIT_BUG)


def _nobody_reads() -> bool:
    """Whether standard output goes into a pipe whose other end is closed, as behind `| head`; then it is given up."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    if not any(event & select.POLLERR for _, event in poll.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at its end
    return True


def fail(error: UserError) -> NoReturn:
    """Says, in the name of the script, what is wrong, and exits; from any thread."""
    report(f'{Path(sys.argv[0]).name}: {error.label}{error}', error.exit_code)


def report(line: str, exit_code: int) -> NoReturn:
    """Says `line` once, however many processes have the same to say, and exits.

    Under torchrun the message goes into the file that its agent reads; the launcher prints the first one. A process on
    its own prints it, and so does rank 0 when the launcher is gone.
    """
    with _reporting:
        error_file = os.environ.get('TORCHELASTIC_ERROR_FILE')
        if error_file and not signals.is_orphan():
            # By way of a rename: the launcher must not find half of it, should this process be killed now.
            written = Path(f'{error_file}.new')
            try:
                written.write_text(json.dumps({'message': line, 'timestamp': int(time.time())}))
                written.replace(error_file)
            except OSError:  # a full disk; this may be what the line is about
                print(line, file=sys.stderr)
        elif os.environ.get('RANK', '0') == '0':
            print(line, file=sys.stderr)
        leave_at_once(exit_code)


def leave_at_once(exit_code: int) -> NoReturn:
    """Exits without waiting for threads, or for other ranks, which may be in the midst of a collective."""
    for stream in filter(None, (sys.stdout, sys.stderr)):
        try:
            stream.flush()
        except OSError:
            pass  # whoever read it is gone
    os._exit(exit_code)
