"""End a process with one line and an exit code, from any thread and in any rank."""
import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import NoReturn

from utils import job
from utils.errors import UserError

# Held by the thread that reports, until the process has ended; a signal's handler may interrupt it, and report too.
_reporting = threading.RLock()


def fail(error: UserError) -> NoReturn:
    """Says, in the name of the script, what is wrong, and exits; from any thread."""
    report(f'{Path(sys.argv[0]).name}: {error.label}{error}', error.exit_code)


def report(line: str, exit_code: int) -> NoReturn:
    """Says `line` once, however many processes have the same to say, and exits.

    Under torchrun the message goes into the file that its agent reads; the launcher prints the first one. A process on
    its own prints it, and so does rank 0 when the launcher is gone.
    """
    with _reporting:
        error_file = job.error_file()
        if error_file and not job.is_orphan():
            # By way of a rename: the launcher must not find half of it, should this process be killed now.
            written = error_file.with_name(f'{error_file.name}.new')
            try:
                written.write_text(json.dumps({'message': line, 'timestamp': int(time.time())}))
                written.replace(error_file)
            except OSError:  # a full disk; this may be what the line is about
                print(line, file=sys.stderr)
        elif job.rank() == 0:
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
