"""The error of a user's mistake, and how a script ends: one line and an exit code, never a traceback for a mistake."""
import json
import os
import sys
import time
from pathlib import Path

EXIT_USER_ERROR = 2
EXIT_NOT_FINITE = 3
EXIT_CTRL_C = 130


class UserError(ValueError):
    """Something the user gave is wrong. The message says what, with its value, and what to do instead."""

    exit_code = EXIT_USER_ERROR


class NotFiniteError(UserError):
    """Training has left the finite numbers; the message says what helps."""

    exit_code = EXIT_NOT_FINITE


def run_script(main) -> None:
    """Calls a script's `main()` and ends the process with the exit code that says how it went."""
    name = Path(sys.argv[0]).name
    try:
        main()
    except UserError as e:
        report(f'{name}: error: {e}', e.exit_code)
    except KeyboardInterrupt:
        report(f'{name}: interrupted; a training goes on from its last checkpoint with --resume auto', EXIT_CTRL_C)


def report(line: str, exit_code: int) -> None:
    """Says `line` once, however many processes have the same to say, and exits.

    Under torchrun the message goes into the file that its agent reads; the launcher prints the first one. A process on
    its own prints it. The exit skips waiting for the other ranks, which may be in the midst of a collective.
    """
    error_file = os.environ.get('TORCHELASTIC_ERROR_FILE')
    if error_file:
        Path(error_file).write_text(json.dumps({'message': line, 'timestamp': int(time.time())}))
    else:
        print(line, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)
