"""End a process with one line and an exit code, from any thread and in any rank."""
import contextlib
import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import NoReturn

from utils import job
from utils.console import printable
from utils.errors import UserError

# Held by the reporting thread until the process ends. A signal handler may interrupt that thread and report too.
_reporting = threading.RLock()


def fail(error: UserError) -> NoReturn:
    """Report an error in the name of the script and exit, from any thread."""
    report(f'{Path(sys.argv[0]).name}: {error.label}{error}', error.exit_code)


def report(line: str, exit_code: int) -> NoReturn:
    """Report `line` once, even if many processes report the same, and exit.

    Under the launcher, the line goes into the file that its agent reads; the launcher prints the first one. A process
    without a launcher prints it itself, and so does rank 0 if the launcher is gone.
    """
    line = printable(line)
    with _reporting:
        error_file = job.error_file()
        if error_file and not job.is_orphan():
            # Renamed into place, so that the launcher never finds half a line if this process is killed now.
            written = error_file.with_name(f'{error_file.name}.new')
            try:
                written.write_text(json.dumps({'message': line, 'timestamp': int(time.time())}))
                written.replace(error_file)
            except OSError:  # a full disk, which the line may be about
                print(line, file=sys.stderr)
        elif job.rank() == 0:
            print(line, file=sys.stderr)
        leave_at_once(exit_code)


def leave_at_once(exit_code: int) -> NoReturn:
    """Exit without waiting for threads or for other ranks, which may be in a collective."""
    for stream in filter(None, (sys.stdout, sys.stderr)):
        with contextlib.suppress(OSError):  # the reader is gone
            stream.flush()
    os._exit(exit_code)
