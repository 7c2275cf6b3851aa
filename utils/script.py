"""Run a script's `main()`: a user's mistake ends it with one line, a bug with a traceback."""
import contextlib
import io
import os
import select
import sys
import traceback
from pathlib import Path

from utils import signals
from utils.errors import EXIT_BUG, EXIT_CTRL_C, UserError, explain_limit
from utils.exits import fail, leave_at_once, report


def run_script(main) -> None:
    """Call a script's `main()`, and end the process with the exit code of errors.py if it fails."""
    name = Path(sys.argv[0]).name
    _open_standard_files()
    signals.prepare()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors='backslashreplace')  # the console may lack letters of a name
        sys.stdout = _Console(sys.stdout)
    try:
        main()
        if sys.stdout:
            sys.stdout.flush()
    except BrokenPipeError:
        if not _nobody_reads():
            raise
    except UserError as error:
        fail(error)
    except KeyboardInterrupt:
        report(f'{name}: interrupted; the same command starts it again', EXIT_CTRL_C)
    except Exception as error:
        if explained := explain_limit(error):
            fail(explained)
        # Only a process that has imported torch can have peers. This module must not import it.
        distributed = sys.modules.get('utils.distributed')
        if distributed is None or not distributed.is_distributed():
            raise
        if explained := distributed.explain(error):
            fail(explained)
        traceback.print_exc()
        leave_at_once(EXIT_BUG)


def _open_standard_files() -> None:
    """Open what the parent process has closed, so that no file of the run gets its number, and libraries can write."""
    for number, name, mode in ((0, 'stdin', 'r'), (1, 'stdout', 'w'), (2, 'stderr', 'w')):
        if getattr(sys, name) is None:
            try:
                os.fstat(number)
            except OSError:
                os.open(os.devnull, os.O_RDWR)  # the lowest free number, which is this one
            setattr(sys, name, open(number, mode, closefd=False))


class _Console:
    """Standard output that ends no program: where it cannot be written, as on a full disk, a line says so once."""

    def __init__(self, stream: io.TextIOWrapper):
        self._stream = stream

    def write(self, text: str) -> int:
        with self._tolerance():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._tolerance():
            self._stream.flush()

    @contextlib.contextmanager
    def _tolerance(self):
        try:
            yield
        except BrokenPipeError:
            raise
        except OSError as error:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())  # also for what is still in its buffer
            print(f'warning: standard output cannot be written ({error.strerror}); the program goes on without it',
                  file=sys.stderr)

    def __getattr__(self, name: str):
        return getattr(self._stream, name)


def _nobody_reads() -> bool:
    """Tell whether standard output is a pipe whose reader has closed it (`| head`); if so, discard further output."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    if not any(event & select.POLLERR for _, event in poll.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at its end
    return True
