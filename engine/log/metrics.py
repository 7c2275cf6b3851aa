"""metrics.jsonl, the record of a run: a line of JSON for each log line ('train') and each epoch ('epoch').

summary.csv and curves.png are made from it, so a resumed run has one history.
"""
import json
import logging
import os
from pathlib import Path

from engine.log.sink import Run, Sink
from utils.disk import require_own, write_whole
from utils.errors import UserError
from utils.faults import fault_point

_logger = logging.getLogger(__name__)

METRICS, SUMMARY, CURVES, ARGS = 'metrics.jsonl', 'summary.csv', 'curves.png', 'args.yaml'
ENVIRONMENT = 'environment.json'


class Metrics(Sink):
    """Appends to metrics.jsonl. Lines that a full disk refused are written with the next one."""
    name = METRICS

    def __init__(self, run: Run):
        super().__init__(run)
        self._path = run.folder / METRICS
        # How many records the file holds, and in how many bytes; None while it holds something else.
        self._written = 0
        self._size: int | None = None

    def record(self, record: dict) -> None:
        self._write()

    def flush(self) -> None:
        self._write()
        with open(self._path, 'rb') as file:
            os.fsync(file.fileno())

    def close(self, finished: bool) -> None:
        self._write()

    def _write(self) -> None:
        """Append the records that the file lacks, over what a failed attempt left; or write the whole file anew."""
        fault_point('log.metrics')
        size = self._size if self._path.exists() else None
        missing = self.run.records[self._written if size is not None else 0:]
        data = ''.join(json.dumps(record) + '\n' for record in missing).encode()
        if size is None:
            write_whole(self._path, data)
        elif data:
            with open(self._path, 'r+b') as file:
                file.seek(size)
                file.write(data)
                file.truncate()
        self._size = (size or 0) + len(data)
        self._written = len(self.run.records)


def read_environment(folder: Path) -> list[dict]:
    """Return the entries of a run's environment.json, one for each start; none if the file cannot be read."""
    try:
        starts = json.loads((folder / ENVIRONMENT).read_bytes())
    except (OSError, ValueError):
        return []
    return [start for start in starts if isinstance(start, dict)] if isinstance(starts, list) else []


def read_metrics(folder: Path) -> list[dict]:
    """Return the records of a run's metrics.jsonl, without damaged lines and a last line that a crash cut short.

    Raises:
        UserError: something of that name exists but cannot be read, or is a link out of the folder.
    """
    path = folder / METRICS
    require_own(path)
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f'{path} cannot be read ({error.strerror}), and the run writes its record there; '
                        'move it away') from None
    records = [_read_record(line) for line in lines]
    if damaged := sum(record is None for record in records[:-1]):
        _logger.warning('%s: %d damaged lines are left out', path, damaged)
    return [record for record in records if record is not None]


def _read_record(line: bytes) -> dict | None:
    """Return the record in a line of metrics.jsonl, or None if the line is damaged."""
    try:
        record = json.loads(line)
        is_whole = isinstance(record['epoch' if record['kind'] == 'epoch' else 'global_step'], int)
    except (ValueError, TypeError, KeyError):
        return None
    return record if is_whole else None
