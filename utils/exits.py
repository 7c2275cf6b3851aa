"""End a process with one line and an exit code, from any thread and in any rank."""
import contextlib
import json
import multiprocessing
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from utils import job
from utils.console import printable
from utils.errors import UserError

# Held by the reporting thread until the process ends. A signal handler may interrupt that thread and report too.
_reporting = threading.RLock()
# Temporary folders and the process that owns them. Forked ones do not.
_temporary: dict[str, int] = {}


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


def temporary_folder(make: Callable[[], str]) -> str:
    """Return the folder that `make` makes. `leave_at_once` removes it; a normal end, the libraries' and atexit's task.

    Raises:
        UserError: it cannot be made.
    """
    try:
        folder = make()
    except OSError as error:
        raise UserError(f'no temporary folder can be made ({error.strerror}); make room, or set TMPDIR to a folder '
                        'that can be written') from None
    _temporary.setdefault(folder, os.getpid())
    return folder


def leave_at_once(exit_code: int) -> NoReturn:
    """Exit without waiting for threads or for other ranks, which may be in a collective; end worker processes."""
    for worker in multiprocessing.active_children():
        worker.kill()  # else it would print that its temporary folder is gone
    for folder, owner in _temporary.items():
        if owner == os.getpid():
            shutil.rmtree(folder, ignore_errors=True)
    for stream in filter(None, (sys.stdout, sys.stderr)):
        with contextlib.suppress(OSError):  # the reader is gone
            stream.flush()
    os._exit(exit_code)
