"""The results of several models on several sets, as rows of tables and as text."""
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from engine.answers import image_rows
from engine.confusion import class_rows, describe, pair_rows
from engine.evaluate import Evaluation
from utils.console import plural, printable

# Columns of the table on the console: heading, how a row fills it.
COLUMNS = {
    'set': lambda row: row['set'],
    'images': lambda row: f'{row["count"]:,}',
    'top-1': lambda row: f'{row["top1"]:.2f}',
    '95 % interval': lambda row: f'{row["top1_low"]:.2f} – {row["top1_high"]:.2f}',
    'top-5': lambda row: f'{row["top5"]:.2f}',
    'NLL': lambda row: f'{row["loss"]:.4f}',
    'ECE': lambda row: f'{row["ece"]:.2f}',
    'balanced': lambda row: _optional(row['balanced_accuracy']),
    'macro F1': lambda row: _optional(row['macro_f1']),
    'CE': lambda row: _optional(row.get('corruption_error'))}


class Scores:
    """Collects the evaluations of several models, set after set.

    A set has `name`, `data` (what the user gave), `dataset`, `truth`, `names` of its classes, and `parts`: the first
    image of each of its parts, and the one behind its last.

    Args:
        references: error of a reference model on each part, in 0…1.
    """

    def __init__(self, references: Mapping[str, float]):
        self._references = references
        self._results: list[tuple[Any, list[Evaluation]]] = []

    def add(self, image_set, results: list[Evaluation]) -> None:
        """Add the results of all models on a set, with their answers."""
        self._results.append((image_set, results))

    def rows(self, models: Sequence[dict]) -> list[dict]:
        """Return a row for each of the `models`, which dicts describe, on each set and below it on each of its parts.

        `corruption_error` is the top-1 error on a part relative to the reference, and above it the mean of these, in
        percent.
        """
        rows = [{**model, 'set': name, 'data': image_set.data, **numbers}
                for image_set, model, result in self._each(models)
                for name, numbers in self._numbers(image_set, result)]
        if all(row['corruption_error'] is None for row in rows):
            rows = [{name: value for name, value in row.items() if name != 'corruption_error'} for row in rows]
        return rows

    def _numbers(self, image_set, result: Evaluation) -> Iterator[tuple[str, dict]]:
        assert result.answers, f'{image_set.name}: evaluated without the truth'
        whole = result.answers.as_dict() | result.as_dict()
        parts: dict[str, dict] = {name: dict.fromkeys(whole) | result.answers.part(*ends).as_dict()
                 for name, ends in image_set.parts.items()}
        errors = {name: (100 - part['top1']) / self._references[name] for name, part in parts.items()}
        yield image_set.name, {**whole, 'corruption_error': float(np.mean([*errors.values()])) if errors else None}
        for name, part in parts.items():
            yield f'{image_set.name}/{name}', {**part, 'corruption_error': errors[name]}

    def tables(self, models: Sequence[dict]) -> dict[str, list[dict]]:
        """Return rows of each class, and of each pair of true and predicted class, of the sets whose images have one.

        Of sets with parts there are no pairs, which would be millions.
        """
        classes, pairs = [], []
        for image_set, model, result in self._each(models):
            if result.confusion:
                classes += [self._where(image_set, model) | row for row in class_rows(result.confusion,
                                                                                      image_set.names)]
                if not image_set.parts:
                    pairs += [self._where(image_set, model) | row for row in pair_rows(result.confusion,
                                                                                       image_set.names)]
        return {name: rows for name, rows in (('classes', classes), ('confusion', pairs)) if rows}

    def image_rows(self, models: Sequence[dict]) -> Iterator[dict]:
        """Yield a row for each image of each set and model, as `engine.answers.image_rows`."""
        for image_set, model, result in self._each(models):
            assert result.answers, f'{image_set.name}: evaluated without the truth'
            for row in image_rows(result.answers, image_set.dataset, image_set.truth, image_set.names):
                yield self._where(image_set, model) | row

    def _each(self, models: Sequence[dict]) -> Iterator[tuple[Any, dict, Evaluation]]:
        for image_set, results in self._results:
            for model, result in zip(models, results, strict=True):
                yield image_set, model, result

    def _where(self, image_set, model: dict) -> dict:
        """Return the first columns of tables of several results."""
        is_single = sum(len(results) for _, results in self._results) == 1
        return {} if is_single else {'checkpoint': model['checkpoint'], 'set': image_set.name}

    def describe(self, rows: Sequence[dict]) -> str:
        """Return the `rows` as a table for the console; of a single one, its numbers with those of its classes."""
        if len(rows) > 1:
            return _table(rows)
        (image_set, [result]), [row] = self._results[0], rows
        left_out = f', {result.bad_images} left out that cannot be decoded' if result.bad_images else ''
        lines = [f'Evaluated {result.count} images{left_out}']
        if result.confusion:
            lines += [describe(result.confusion, image_set.names),
                      f'Balanced accuracy: {row["balanced_accuracy"]:.1f}%, macro F1: {row["macro_f1"]:.1f}%']
        lines += [f'Negative log-likelihood: {row["loss"]:.4f}, expected calibration error: {row["ece"]:.1f}%',
                  f'Top-1 accuracy of the model is: {row["top1"]:.1f}% (95 % interval: {row["top1_low"]:.1f} to '
                  f'{row["top1_high"]:.1f}%)']
        return '\n'.join(lines)


def _table(rows: Sequence[dict]) -> str:
    """Return rows of `Scores.rows` as a table; columns without numbers are left out."""
    names = short_names([row['checkpoint'] for row in rows])
    columns = {'model': names} | {heading: [fill(row) for row in rows] for heading, fill in COLUMNS.items()}
    if len(set(names)) == 1:
        del columns['model']
    columns = {heading: cells for heading, cells in columns.items() if set(cells) != {'-'}}
    widths = {heading: max(map(len, (heading, *cells))) for heading, cells in columns.items()}
    bad = sum(row['bad_images'] or 0 for row in rows if row['checkpoint'] == rows[0]['checkpoint'])
    left_out = f'; {plural(bad, "image")} left out that cannot be decoded' if bad else ''
    lines = [f'Accuracies, errors and F1 in percent{left_out}:']
    for line in (list(columns), *zip(*columns.values(), strict=True)):
        lines.append(printable('  ' + '  '.join(
            f'{cell:{"<" if heading in ("model", "set") else ">"}{width}}'
            for cell, (heading, width) in zip(line, widths.items(), strict=True)).rstrip()))
    return '\n'.join(lines)


def short_names(paths: Sequence[str]) -> list[str]:
    """Return paths without the folders that all of them lie in; what is no path stays as it is."""
    folders = {path: os.path.dirname(path) for path in paths if '/' in path and '://' not in path}
    if len({os.path.isabs(folder) for folder in folders.values()}) != 1:
        return list(paths)
    common = os.path.commonpath(folders.values())
    return [os.path.relpath(path, common or '.') if path in folders else path for path in paths]


def _optional(value: float | None) -> str:
    return '-' if value is None else f'{value:.2f}'
