"""Lines on the console, and progress bars. Rank 0 speaks; the others only warn."""
import logging
import sys
import warnings

from tqdm import tqdm

from utils import job

# The folders whose modules a script runs. Each is the name of a logger. launch/ runs in a process of its own.
ROOMS = ('data', 'engine', 'figures', 'models', 'options', 'utils')


class _ConsoleHandler(logging.Handler):
    """Lines to standard output, above the progress bar where there is one."""

    def emit(self, record):
        if sys.stdout is None:  # closed by who started this
            return
        try:
            tqdm.write(self.format(record), file=sys.stdout)
            sys.stdout.flush()
        except BrokenPipeError:  # nobody reads any more, which is no reason to stop
            sys.stdout = None


def setup_logging(*, is_main: bool) -> None:
    """Rank 0 speaks; the others speak up only when something is wrong."""
    handler = _ConsoleHandler()
    handler.setFormatter(_Formatter('%(message)s'))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    for room in (*ROOMS, '__main__'):
        logging.getLogger(room).setLevel(logging.INFO if is_main else logging.WARNING)
    logging.captureWarnings(True)
    # The published default of 8 workers is more than a small machine has cores; the user can say otherwise.
    warnings.filterwarnings('ignore', message='This DataLoader will create')


class _Formatter(logging.Formatter):
    def format(self, record):
        text = super().format(record)
        return text if record.levelno < logging.WARNING else f'{record.levelname.lower()}: {text}'


def progress_bar(**kwargs) -> tqdm:
    """A bar with the time left, on rank 0 and only where a person can see it."""
    hidden = job.rank() > 0 or not sys.stderr.isatty()
    return tqdm(disable=hidden, leave=False, dynamic_ncols=True, **kwargs)


def format_seconds(seconds: float) -> str:
    """5025 → '1:23:45'."""
    minutes, seconds = divmod(round(seconds), 60)
    return f'{minutes // 60}:{minutes % 60:02d}:{seconds:02d}'
