"""Lines on the console, and progress bars. Rank 0 logs everything; other ranks log only warnings."""
import logging
import re
import sys
import warnings

from tqdm import tqdm

from utils import job

# The folders whose modules a script runs. Each is the name of a logger. launch/ runs in a process of its own.
ROOMS = ('data', 'engine', 'figures', 'models', 'options', 'utils')

# Control characters but for the end of a line and tab, and those that turn the direction of text.
CONTROLS = re.compile('[\0-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]')


class _ConsoleHandler(logging.Handler):
    """Writes lines to standard output, above any progress bar."""

    def emit(self, record):
        if sys.stdout is None:  # the parent process closed it
            return
        try:
            tqdm.write(self.format(record), file=sys.stdout)
            sys.stdout.flush()
        except BrokenPipeError:  # nobody reads any more; the program goes on
            sys.stdout = None


def setup_logging(*, is_main: bool) -> None:
    """Log to the console: everything on rank 0, warnings on other ranks."""
    handler = _ConsoleHandler()
    handler.setFormatter(_Formatter('%(message)s'))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    for room in (*ROOMS, '__main__'):
        logging.getLogger(room).setLevel(logging.INFO if is_main else logging.WARNING)
    logging.captureWarnings(True)
    # The published default of 8 workers exceeds the cores of a small machine; --workers changes it.
    warnings.filterwarnings('ignore', message='This DataLoader will create')


class _Formatter(logging.Formatter):
    def format(self, record):
        text = super().format(record)
        return printable(text if record.levelno < logging.WARNING else f'{record.levelname.lower()}: {text}')


def printable(text: str) -> str:
    """Return text with its control characters escaped: names of files, words of servers must not steer a terminal."""
    return CONTROLS.sub(lambda found: found[0].encode('unicode_escape').decode(), text)


def progress_bar(**kwargs) -> tqdm:
    """Return a bar with the time left; it is hidden on other ranks than 0 and if standard error is not a terminal."""
    hidden = job.rank() > 0 or not sys.stderr.isatty()
    return tqdm(disable=hidden, leave=False, dynamic_ncols=True, **kwargs)


def say_at_once(line: str) -> None:
    """Show a line before something that takes seconds: at a terminal, and not from the processes of a launcher."""
    if sys.stderr and sys.stderr.isatty() and not job.is_launched():
        print(line, file=sys.stderr, flush=True)


def percent(share: float) -> str:
    """Return '97 %', or '0.3 %' below one."""
    return f'{100 * share:.{0 if share >= 0.01 or not share else 1}f} %'


def plural(count: int, singular: str, several: str | None = None) -> str:
    """Return a count with its noun: 1 → '1 image', 1000 → '1,000 images'."""
    return f'{count:,} {singular if count == 1 else several or singular + "s"}'


def format_seconds(seconds: float) -> str:
    """Return '1:23:45' for 5025."""
    minutes, seconds = divmod(round(seconds), 60)
    return f'{minutes // 60}:{minutes % 60:02d}:{seconds:02d}'
