"""Result files: a JSON object and a CSV table beside each other."""
import csv
import io
import json
import logging
import math
import re
from datetime import datetime
from pathlib import Path

from utils.disk import check_writable, make_folder, write_whole
from utils.errors import UserError

_logger = logging.getLogger(__name__)

# Names that nobody has chosen.
DATED = re.compile(r'\d{8}-\d{6}-.*')


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

    Each file is whole, or as it was. A dated name that another process has taken in the same second gets a number.

    Args:
        tables: further rows, each written to STEM.NAME.csv.
    Raises:
        UserError: the files cannot be written.
    """
    make_folder(stem.parent, option)
    is_dated = bool(DATED.fullmatch(stem.name))
    stem = _free(stem) if is_dated else stem
    json_file = Path(f'{stem}.json')
    csv_files = {Path(f'{stem}.csv'): rows} | {Path(f'{stem}.{name}.csv'): table
                                               for name, table in (tables or {}).items()}
    try:
        write_whole(json_file, json.dumps(finite(record), indent=2, allow_nan=False) + '\n')
        for csv_file, table in csv_files.items():
            text = io.StringIO(newline='')
            writer = csv.DictWriter(text, table[0])
            writer.writeheader()
            writer.writerows([{name: no_formula(value) for name, value in row.items()} for row in finite(table)])
            # Image names need not be valid UTF-8; their bytes stay the same.
            write_whole(csv_file, text.getvalue().encode('utf-8', errors='surrogateescape'))
    except OSError as error:
        if is_dated and not json_file.stat().st_size:
            json_file.unlink()  # it has only kept the name
        raise UserError(f'{option}: {stem} cannot be written ({error.strerror}); earlier results are as they were'
                        ) from None
    _logger.info('results: %s', ', '.join(str(file) for file in (json_file, *csv_files)))


def _free(stem: Path) -> Path:
    """Return the first of STEM, STEM-2, STEM-3 … whose JSON file does not exist, and create that file."""
    number = 1
    while True:
        candidate = stem.with_name(f'{stem.name}-{number}') if number > 1 else stem
        try:
            with open(f'{candidate}.json', 'x'):
                return candidate
        except FileExistsError:
            number += 1


def no_formula(value):
    """Return a name so that a spreadsheet does not compute it; names that are numbers, and other values, unchanged."""
    is_formula = isinstance(value, str) and re.match(r'[=+\-@\t\r](?![\d.]*$)', value)
    return f"'{value}" if is_formula else value


def finite(value):
    """Return the value with None for every number that is not finite, since JSON has none."""
    if isinstance(value, dict):
        return {name: finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
