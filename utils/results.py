"""Result files: a JSON object and a CSV table beside each other."""
import csv
import json
import logging
import math
from datetime import datetime
from pathlib import Path

from utils.disk import check_writable, make_folder
from utils.errors import UserError

_logger = logging.getLogger(__name__)


def results_stem(args, given: str | None, option: str, kind: str) -> Path:
    """Return the path of result files without .json and .csv. Check that it is writable, but create nothing.

    Args:
        args: options with the model and its image size, for the default name.
        given: the value of `option`; in a folder (an existing one, or a name that ends in /) the default name applies.
        kind: 'validate' or another folder of output/.
    """
    size = args.img_size if isinstance(args.img_size, int) else '{}x{}'.format(*args.img_size)
    dated = f'{datetime.now():%Y%m%d-%H%M%S}-{args.model}-{size}'
    stem = Path(given or f'output/{kind}/{dated}')
    if given and (stem.is_dir() or given.endswith('/')):
        stem /= dated
    elif stem.suffix in ('.json', '.csv'):
        stem = stem.with_suffix('')
    check_writable(stem.parent, option)
    return stem


def write_results(stem: Path, record: dict, rows: list[dict], option: str,
                  tables: dict[str, list[dict]] | None = None) -> None:
    """Write `record` to STEM.json and `rows` to STEM.csv. Numbers that are not finite become null and empty.

    Args:
        tables: further rows, each written to STEM.NAME.csv.
    Raises:
        UserError: the files cannot be written.
    """
    make_folder(stem.parent, option)
    json_file = Path(f'{stem}.json')
    csv_files = {Path(f'{stem}.csv'): rows} | {Path(f'{stem}.{name}.csv'): table
                                               for name, table in (tables or {}).items()}
    try:
        json_file.write_text(json.dumps(finite(record), indent=2, allow_nan=False) + '\n', encoding='utf-8')
        for csv_file, table in csv_files.items():
            # Image names need not be valid UTF-8; their bytes stay the same.
            with open(csv_file, 'w', newline='', encoding='utf-8', errors='surrogateescape') as file:
                writer = csv.DictWriter(file, table[0])
                writer.writeheader()
                writer.writerows(finite(table))
    except OSError as error:
        raise UserError(f'{option}: {error.filename or stem} cannot be written ({error.strerror})') from None
    _logger.info('results: %s', ', '.join(str(file) for file in (json_file, *csv_files)))


def finite(value):
    """Return the value with None for every number that is not finite, since JSON has none."""
    if isinstance(value, dict):
        return {name: finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
