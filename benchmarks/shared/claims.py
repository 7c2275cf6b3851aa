"""Claims that one kind of training is better than another, and which of them runs with several seeds decide."""
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks.shared.records import markdown_table
from utils.pictures import BLUE, GREEN, ORANGE, new_figure

STANDARD_ERRORS = 2  # a difference of more than so many is decided


class Claim(NamedTuple):
    """A claim: one of several kinds of training is better than another.

    published: the difference of top-1 on ImageNet in points; None if none was published.
    """
    text: str
    better: str
    worse: str
    published: float | None


def judge(top1: dict[str, list[float]], claims: Sequence[Claim]) -> dict:
    """Say which claims hold for top-1 in percent, [seed] by the name of a kind; seeds are paired.

    A claim holds ('yes') if the mean difference over the seeds exceeds STANDARD_ERRORS standard errors, and does not
    ('no') if it is as far below zero; else it is undecided. Few seeds say little of the deviation of one difference, so
    all claims share one estimate: what is left of `top1` when each kind and each seed has its mean taken away.
    """
    scores = np.array(list(top1.values()))  # [kinds, seeds]
    kinds, seeds = scores.shape
    left = scores - scores.mean(axis=1, keepdims=True) - scores.mean(axis=0) + scores.mean()
    freedom = (kinds - 1) * (seeds - 1)
    error = float((2 * (left ** 2).sum() / freedom / seeds) ** 0.5)
    found = []
    for claim in claims:
        differences = np.array(top1[claim.better]) - np.array(top1[claim.worse])
        mean = float(differences.mean())
        verdict = 'undecided' if abs(mean) <= STANDARD_ERRORS * error else 'yes' if mean > 0 else 'no'
        found.append({**claim._asdict(), 'differences': differences.tolist(), 'difference': mean,
                      'deviation': float(differences.std(ddof=1)), 'verdict': verdict})
    return {'standard_error': error, 'degrees_of_freedom': freedom, 'claims': found}


def claims_table(record: dict) -> str:
    """Return a table with a line for each claim."""
    return markdown_table(
        ['claim', 'holds at this size', 'difference', 'deviation', 'published difference'],
        [[claim['text'], claim['verdict'], f'{claim["difference"]:+.2f}', f'{claim["deviation"]:.2f}',
          '' if claim['published'] is None else f'{claim["published"]:+.1f}'] for claim in record['claims']])


def kinds_table(record: dict, title: str, options: Mapping[str, str], **more: Mapping[str, str]) -> str:
    """Return a table with a line for each kind of training: its top-1 by seed and its options, by its name.

    title: of the first column. more: further columns behind it, by their titles.
    """
    return markdown_table(
        [title, *more, 'top-1, %', 'deviation', *(f'seed {seed}' for seed in seeds_of(record)), 'options'],
        [[name, *(column[name] for column in more.values()), f'{np.mean(top1):.2f}', f'{np.std(top1, ddof=1):.2f}',
          *(f'{value:.2f}' for value in top1), f'`{options[name]}`' if options[name] else '']
         for name, top1 in record['top1'].items()])


def describe_verdicts(record: dict) -> str:
    """Return how many claims hold, their table, and the rule, in Markdown."""
    held_by = {verdict: sum(claim['verdict'] == verdict for claim in record['claims'])
               for verdict in ('yes', 'no', 'undecided')}
    return (
        f'Of the {len(record["claims"])} claims, {held_by["yes"]} hold at this size, {held_by["no"]} do not, and '
        f'{held_by["undecided"]} are undecided.\n\n'
        f'{claims_table(record)}\n\n'
        f'Differences are points of top-1, means over {record["options"]["seeds"]} seeds with the standard deviation '
        f'of one. Their standard error is {record["standard_error"]:.2f}, estimated from all models together '
        f'({record["degrees_of_freedom"]} degrees of freedom). A claim is decided if its difference exceeds '
        f'{STANDARD_ERRORS} standard errors. Published differences are those of ImageNet.\n')


def seeds_of(record: dict) -> range:
    return range(record['options']['seed'], record['options']['seed'] + record['options']['seeds'])


def draw(record: dict, path: Path) -> None:
    """Draw top-1 of every run by kind, and the difference of every claim with the interval that decides it."""
    figure = new_figure(13, 4.2)
    left, right = figure.subplots(1, 2)
    for row, top1 in enumerate(record['top1'].values()):
        left.plot(top1, [row] * len(top1), 'o', color=BLUE, alpha=0.5)
        left.plot(np.mean(top1), row, '|', color='black', markersize=18)
    left.set_yticks(range(len(record['top1'])), list(record['top1']))
    left.set_title('Top-1 of each seed and their mean, %')
    colours = {'yes': GREEN, 'no': ORANGE, 'undecided': 'grey'}
    for row, claim in enumerate(record['claims']):
        right.errorbar(claim['difference'], row, xerr=STANDARD_ERRORS * record['standard_error'], fmt='o', capsize=4,
                       color=colours[claim['verdict']])
        right.plot(claim['differences'], [row] * len(claim['differences']), '.', color=colours[claim['verdict']],
                   alpha=0.5)
    right.set_yticks(range(len(record['claims'])),
                     [f'{claim["text"]}: {claim["verdict"]}' for claim in record['claims']])
    right.axvline(0, color='black', linewidth=0.5)
    right.set_title(f'Difference ± {STANDARD_ERRORS} standard errors, points')
    for axes in (left, right):
        axes.invert_yaxis()
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
