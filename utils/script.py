"""Run a script's `main()`: a user's mistake ends it with one line, a bug with a traceback."""
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
    signals.prepare()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors='backslashreplace')  # the console may lack letters of a name
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


def _nobody_reads() -> bool:
    """Tell whether standard output is a pipe whose reader has closed it (`| head`); if so, discard further output."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    if not any(event & select.POLLERR for _, event in poll.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at its end
    return True
