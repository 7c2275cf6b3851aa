"""metrics.jsonl, the record of a run, and summary.csv."""
import json
import logging
from pathlib import Path

from utils.errors import UserError

_logger = logging.getLogger(__name__)

METRICS, SUMMARY, CURVES, ARGS = 'metrics.jsonl', 'summary.csv', 'curves.png', 'args.yaml'
ENVIRONMENT = 'environment.json'


def read_environment(folder: Path) -> list[dict]:
    """The entries of a run's environment.json, one for each time it was started; none where they cannot be read."""
    try:
        starts = json.loads((folder / ENVIRONMENT).read_bytes())
    except (OSError, ValueError):
        return []
    return [start for start in starts if isinstance(start, dict)] if isinstance(starts, list) else []


def read_metrics(folder: Path) -> list[dict]:
    """The records of a run's metrics.jsonl, without a last line that a crash cut short, and without damaged ones.

    Raises UserError if there is something of that name that cannot be read.
    """
    path = folder / METRICS
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        return []
    except OSError as e:
        raise UserError(f"{path}: {e.strerror}; it is to hold the run's record: move it out of the way") from None
    records = [_read_record(line) for line in lines]
    if damaged := sum(record is None for record in records[:-1]):
        _logger.warning('%s: %d damaged lines are left out', path, damaged)
    return [record for record in records if record is not None]


def _read_record(line: bytes) -> dict | None:
    """The record in a line of metrics.jsonl; None where there is none."""
    try:
        record = json.loads(line)
        is_whole = isinstance(record['epoch' if record['kind'] == 'epoch' else 'global_step'], int)
    except (ValueError, TypeError, KeyError):
        return None
    return record if is_whole else None
