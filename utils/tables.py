"""A table of many rows, written row by row: CSV, or Parquet if pyarrow is installed."""
import csv
import importlib.util
import io
import itertools
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from utils.disk import check_writable, make_folder, sync_folder
from utils.errors import UserError
from utils.results import finite, no_formula

# Rows of a group of Parquet's, which are in memory together.
GROUP = 50_000


def check_table(path: str | None, option: str) -> None:
    """Raise UserError if no table can be written there: another ending, no pyarrow, no right to; create nothing."""
    if not path:
        return
    if not path.endswith(('.csv', '.parquet')):
        raise UserError(f'{option} {path}: give a name that ends in .csv or .parquet')
    if path.endswith('.parquet') and importlib.util.find_spec('pyarrow') is None:
        raise UserError(f'{option} {path}: Parquet needs pyarrow: pip install pyarrow; or give a name that ends in '
                        '.csv')
    if os.path.isdir(path):
        raise UserError(f'{option} {path}: a folder; give the name of a file')
    check_writable(Path(path).parent, option)


def write_table(path: str, rows: Iterable[dict], option: str) -> None:
    """Write rows of the same columns to a file as `check_table` allows; it is whole, or as it was.

    Numbers that are not finite are left out.

    Raises:
        UserError: the file cannot be written.
    """
    target = Path(path)
    make_folder(target.parent, option)
    temporary = target.with_name(f'.{target.name}.tmp')
    temporary.unlink(missing_ok=True)  # a link there would lead the content elsewhere
    try:
        with open(temporary, 'xb') as file:
            (_write_parquet if path.endswith('.parquet') else _write_csv)(file, rows)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
        sync_folder(target.parent)
    except OSError as error:
        raise UserError(f'{option}: {path} cannot be written ({error.strerror or error}); name another file') from None
    finally:
        temporary.unlink(missing_ok=True)


def _write_csv(file: Any, rows: Iterable[dict]) -> None:
    # Image names need not be valid UTF-8; their bytes stay the same.
    text = io.TextIOWrapper(file, encoding='utf-8', errors='surrogateescape', newline='', write_through=True)
    writer = None
    for row in rows:
        if writer is None:
            writer = csv.DictWriter(text, row)
            writer.writeheader()
        writer.writerow({name: no_formula(value) for name, value in finite(row).items()})
    text.detach()


def _write_parquet(file: Any, rows: Iterable[dict]) -> None:
    pyarrow, parquet = (importlib.import_module(name) for name in ('pyarrow', 'pyarrow.parquet'))

    writer = None
    rows = iter(rows)
    while group := list(itertools.islice(rows, GROUP)):
        # Text in Parquet is UTF-8, as image names need not be.
        plain = [{name: value.encode('utf-8', 'replace').decode() if isinstance(value, str) else value
                  for name, value in finite(row).items()} for row in group]
        table = pyarrow.Table.from_pylist(plain, schema=writer and writer.schema)
        writer = writer or parquet.ParquetWriter(file, table.schema)
        writer.write_table(table)
    if writer:
        writer.close()
