"""Holds the figures that were measured against the targets, and makes one record of many.

    python -m benchmarks.targets                                             # those in benchmarks/results
    python -m benchmarks.targets --records DIR --output DIR --name gpu --follow   # as benchmarks/gpu_suite.sh does

--records is searched, at any depth, for the records of benchmarks/step.py, scale.py, fidelity.py and float16.py, and
for parts.tsv of gpu_suite.sh. NAME.md has a line for each target, then the tables of all records; NAME.json has the
records by name with their tables, and the parts. --follow writes both files again whenever a record changes, until the
process that started it has ended. --unpack makes a folder of records out of NAME.json, for a suite that goes on: what
parts that did not end well have measured goes to before/ there, and counts until they do.

Where there are records of a GPU, those of a CPU are not judged. A target for another machine, as those for a GPU are on
a CPU, has no line; of one that was not measured the line says so. Where a table has what is compiled, tables without it
do not count.
"""
import logging
import os
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from benchmarks.shared.records import (
    ROOT,
    check_record_options,
    markdown_table,
    read_record,
    record_options,
    write_record,
)
from options.groups import FLAG
from options.parser import create_parser, parse_options
from utils.disk import make_folder, write_whole
from utils.errors import UserError
from utils.runtime import find_commit
from utils.script import run_script

PEER = 'vit_little_patch16_reg4_gap_256'
ABSOLUTE = (('t2t_vit_14', 224, 'train', 9000, 10800), ('t2t_vit_14', 224, 'inference', 26000, 31000),
            ('t2t_vit_7', 224, 'train', None, 39500), ('t2t_vit_19', 224, 'train', None, 6400),
            ('t2t_vit_24', 224, 'train', None, 4100), ('t2t_vit_t_14', 224, 'train', None, 9000),
            ('t2t_vit_14', 384, 'train', None, 3300))  # images/s of one H200 in bf16: target and stretch
FP16_STEPS = 500
ABSOLUTE_DEVICE = 'H200'
MANY_TOKENS, MANY_ON_GPU = 12_544, 200_000  # of images of 448 and 1792 pixels; launches take the time of fewer
LAUNCH_BOUND = 0.7  # an exponent below this is that of launches
PARTS = 'parts.tsv'
WELL = 'well'  # how a part ended that is not run again
BEFORE = 'before/'
LOOK_SECONDS = 0.5


def targets_options(parser) -> None:
    add = parser.add_argument_group('Records').add_argument
    add('--records', default=str(ROOT / 'benchmarks/results'), metavar='DIR', help='folder with the records')
    add('--follow', action=FLAG, default=False, help='write whenever they change, until the caller has ended')
    add('--unpack', action=FLAG, default=False, help='write the folder --records out of NAME.json instead')
    record_options(parser, 'targets')


@dataclass
class Figure:
    """What a target asks for, what was found, None where nothing was measured, and whether that meets it."""
    target: str
    found: str | None = None
    is_met: bool | None = None

    def line(self) -> list[str]:
        verdict = 'not measured' if self.found is None else {True: 'met', False: 'missed', None: '–'}[self.is_met]
        return [self.target, self.found or '–', verdict]


class Records:
    """The records below a folder, by their names there; their tables; what became of the parts of gpu_suite.sh."""

    def __init__(self, folder: Path):
        self.by_name = {}
        self.part_lines = [line.split('\t') for path in sorted(folder.rglob(PARTS))
                           for line in path.read_text(encoding='utf-8').splitlines()]
        for path in sorted(folder.rglob('*.json'), key=lambda path: path.stat().st_mtime):
            record = read_record(path)
            name = path.relative_to(folder).with_suffix('').as_posix()
            # Those of faults and of saving are not of a device's speed.
            if (isinstance(record, dict) and isinstance(record.get('machine'), dict)
                    and not (name.startswith(BEFORE) and name.removeprefix(BEFORE) in ended_well(self.part_lines))):
                self.by_name[name] = record
        self.texts = {name: path.read_text(encoding='utf-8') for name in self.by_name
                      if (path := folder / f'{name}.md').exists()}
        self.is_gpu = any('cuda' in record['machine'] for record in self.by_name.values())
        self.judged = [record for record in self.by_name.values() if ('cuda' in record['machine']) == self.is_gpu]

    def tables(self, model: str, task: str, device: str = '', **wanted) -> list[dict[str, dict]]:
        """The tables of benchmarks/step.py for a model: its rows by contender, without those that failed."""
        return [{row['contender']: row for row in table['rows'] if 'error' not in row}
                for record in self.judged if device in record['machine']['device'] for table in record.get('tables', ())
                if (table.get('model'), table.get('task')) == (model, task)
                and all(table[key] == value for key, value in wanted.items())]

    def parts(self, name: str) -> list[dict]:
        """The parts of benchmarks/cost.py of that name."""
        return [record[name] for record in self.judged if name in record]


def ended_well(part_lines: list[list[str]]) -> set[str]:
    """The parts of gpu_suite.sh that are done."""
    return {part for part, _, ended in part_lines if ended == WELL}


def compiled_if_any(tables: list[dict[str, dict]]) -> list[dict[str, dict]]:
    """The tables that have what is compiled, else all."""
    return [table for table in tables if 'compiled' in table] or tables


def fastest(table: dict[str, dict]) -> float | None:
    """Images/s of the faster of our paths in a table."""
    return max((table[name]['images_per_second'] for name in ('default', 'compiled') if name in table), default=None)


def absolute(records: Records) -> list[Figure]:
    figures = []
    for model, size, task, target, stretch in ABSOLUTE:
        of_device, of_any = ([speed for table in records.tables(model, task, device, img_size=size, precision='bf16')
                              if (speed := fastest(table))] for device in (ABSOLUTE_DEVICE, ''))
        asked = f'{target:,} ({stretch:,} as a stretch)' if target else f'{stretch:,} (a stretch)'
        figure = Figure(f'{model}, {size} pixels, {task}, bf16: {asked} img/s on an {ABSOLUTE_DEVICE}')
        if of_device:
            best = max(of_device)
            figure.found = f'{best:,.0f} img/s' + ', the stretch too' * (best >= stretch and target is not None)
            figure.is_met = best >= (target or stretch)
        elif of_any:
            figure.found = f'{max(of_any):,.0f} img/s on another device'
        figures.append(figure)
    return figures


def against_yardstick(records: Records, model: str, task: str, factor: float, paths=('default', 'compiled'),
                      **wanted) -> Figure:
    """At least so many times as fast as the published code; of several tables, the worst counts."""
    figure = Figure(f'{model}, {task}: {" or ".join(paths)} at least {factor} × published')
    tables = [table for table in records.tables(model, task, **wanted)
              if 'published' in table and table.keys() & set(paths)]
    found = [max(table[path]['images_per_second'] for path in paths if path in table)
             / table['published']['images_per_second']
             for table in (compiled_if_any(tables) if 'compiled' in paths else tables)]
    if found:
        figure.found, figure.is_met = f'{min(found):.2f} ×', min(found) >= factor
    return figure


def against_peer(records: Records, task: str) -> list[Figure]:
    figures = []
    for ours, theirs in (('default', PEER), ('compiled', f'{PEER}, compiled')):
        figure = Figure(f't2t_vit_14, {task}, {ours}: ahead of {theirs}')
        tables = [table for table in records.tables('t2t_vit_14', task, img_size=224)
                  if table.keys() >= {ours, theirs}]
        quotients = [table[ours]['images_per_second'] / table[theirs]['images_per_second']
                     for table in compiled_if_any(tables)]
        if quotients:
            figure.found, figure.is_met = f'{min(quotients):.2f} ×', min(quotients) > 1
        figures.append(figure)
    return figures


def memory(records: Records) -> Figure:
    figure = Figure('t2t_vit_14, train: peak memory at most half of published')
    tables = [table for table in records.tables('t2t_vit_14', 'train', batch_size=256, img_size=224)
              if 'published' in table and fastest(table)]
    shares = [min(table[name]['peak_bytes'] for name in ('default', 'compiled') if name in table)
              / table['published']['peak_bytes'] for table in compiled_if_any(tables)]
    if shares:
        figure.found, figure.is_met = f'{max(shares):.2f} of it', max(shares) <= 0.5
    return figure


def float16(records: Records) -> Figure:
    figure = Figure(f'float16: no NaN in {FP16_STEPS} steps')
    # Of several, that which went furthest.
    record = max((record for record in records.judged if record.get('lines')),
                 key=lambda record: record['lines'][-1]['step'], default=None)
    if record:
        # The scale of the loss is too large at first, and is halved in a step that is skipped: so may be all of a line.
        losses, last = [line['loss'] for line in record['lines'] if line['loss'] is not None], record['lines'][-1]
        is_finite = last['loss'] is not None
        figure.found = f'{last["step"]} steps, {last["skipped"]} skipped, loss ' + (
            f'{losses[0]:.2f} → {losses[-1]:.2f}' if is_finite else 'not finite')
        figure.is_met = is_finite and last['skipped'] < FP16_STEPS / 50
        if record['precision'] != 'float16':
            figure.found += f', in {record["precision"]}'
            figure.is_met = None
        elif last['step'] < FP16_STEPS:
            figure.is_met = None if figure.is_met else False
    return figure


def scaling(records: Records) -> list[Figure]:
    overhead = Figure('DistributedDataParallel at one rank: less than 3 % of a step')
    for found in records.parts('overhead'):
        if 'percent' in found:
            low, high = found['interval']
            overhead.found = f'{found["percent"]:+.2f} % ({low:+.2f} … {high:+.2f})'
            overhead.is_met = high < 3 or (False if low >= 3 else None)
    many = MANY_ON_GPU if records.is_gpu else MANY_TOKENS
    linear = Figure(f'Performer: time ~ N^p with p at most 1.1, up to {many:,} tokens or more')
    for exponents, points in zip(records.parts('exponents'), records.parts('tokens'), strict=True):
        if task := next((task for task in ('train', 'inference') if task in exponents), None):
            powers = {name: found['time'] for name, found in exponents[task].items()}
            linear.found = ', '.join(f'{name} {power:.2f}' for name, power in powers.items())
            power = powers.get('default performer')
            if power is not None and power < LAUNCH_BOUND:
                linear.found += ' (launch-bound)'
            elif power is not None and max(point['tokens'] for point in points) >= many:
                linear.is_met = power <= 1.1
    return [overhead, linear]


def fidelity(records: Records) -> list[Figure]:
    """The largest quotient of our error and the published code's, for each precision; ours has to be finite."""
    found: dict[str, list[float]] = {}
    lost: Counter[str] = Counter()
    for row in (row for record in records.judged for row in record.get('rows', ()) if 'ratios' in row):
        ratios = found.setdefault(row['precision'], [])
        for name in ('logits', 'gradient'):
            if name in row['ratios']:
                ratios.append(row['ratios'][name])
            elif name in row['errors'] and row['errors'][name] is None:
                lost[row['precision']] += 1
    return [Figure(f'{precision}: error of logits and gradients at most that of published',
                   f'{max(ratios, default=0):.2f} × at most, over {len(ratios)} cases'
                   + f', and {lost[precision]} not finite' * bool(lost[precision]),
                   max(ratios, default=0) <= 1 and not lost[precision])
            for precision, ratios in found.items() if ratios or lost[precision]
            ] or [Figure('errors of logits and gradients at most of published')]


def judge(records: Records) -> list[Figure]:
    """A figure for each target that holds for the machine of the records."""
    if records.is_gpu:
        return [*absolute(records),
                against_yardstick(records, 't2t_vit_14', 'train', 2.25, batch_size=256, img_size=224),
                against_yardstick(records, 't2t_vit_t_14', 'train', 3, batch_size=256, img_size=224),
                *against_peer(records, 'train'), *against_peer(records, 'inference'), memory(records),
                float16(records), *scaling(records), *fidelity(records)]
    variants = sorted({table['model'] for record in records.judged for table in record.get('tables', ())
                       if 'model' in table})
    return [against_yardstick(records, 't2t_vit_14', 'inference', 1.25, paths=('default',)),
            *(against_yardstick(records, model, task, 1, paths=('default',)) for model in variants
              for task in ('train', 'inference')), *scaling(records), *fidelity(records)]


def parts_table(lines: list[list[str]]) -> str:
    """What became of the parts of gpu_suite.sh: of each its last line."""
    rows = list({line[0]: line for line in lines}.values())
    return '\n\n## Parts\n\n' + markdown_table(['part', 'seconds', 'ended'], rows) if rows else ''


def write_targets(folder: Path, output: Path, name: str) -> str:
    """Writes NAME.json and NAME.md of what is in `folder`; returns its first tables and the files' paths."""
    records = Records(folder)
    table = markdown_table(['target', 'found', 'verdict'], [figure.line() for figure in judge(records)])
    is_suite = folder.resolve() != output.resolve()
    texts = records.texts if is_suite else {}
    table += parts_table(records.part_lines)
    text = '\n\n'.join([f'# Targets\n\n{table}', *texts.values()])
    content = {'records': records.by_name, **({'texts': texts, 'parts': records.part_lines} if is_suite else {})}
    return '\n'.join([table, *map(str, write_record(output, name, content, text + '\n'))])


def follow(folder: Path, output: Path, name: str) -> None:
    """Writes the targets whenever something in `folder` has changed, until the process that started this has ended."""
    parent, before, has_ended = os.getppid(), None, False
    while not has_ended:
        has_ended = os.getppid() != parent  # then once more, for what changed last
        now = {path: path.stat().st_mtime_ns for kind in ('*.json', '*.md', PARTS) for path in folder.rglob(kind)}
        if now != before:
            write_targets(folder, output, name)
            before = now
        time.sleep(LOOK_SECONDS)


def unpack(packed: Path, folder: Path) -> None:
    """Makes the folder of records that NAME.json was written from."""
    content = read_record(packed)
    if not isinstance(content, dict) or not content.keys() >= {'records', 'texts', 'parts'}:
        raise UserError(f'--name: {packed} is not of gpu_suite.sh; give another name')
    now = find_commit()
    for record in content['records'].values():
        if (commit := record['machine']['commit']) != now:
            raise UserError(f'--name: {packed} has figures of commit {commit}, and this is {now}; give another name')
    done = ended_well(content['parts'])
    # What is in before/ comes first, so that what the same part has measured since then replaces it.
    names = sorted(content['records'], key=lambda name: not name.startswith(BEFORE))
    for number, name in enumerate(names):
        path = folder / (name if name in done else BEFORE + name.removeprefix(BEFORE))
        for written in write_record(path.parent, path.name, content['records'][name], content['texts'].get(name, '')):
            os.utime(written, (number, number))  # the order of the records
    make_folder(folder, '--records')
    write_whole(folder / PARTS, ''.join('\t'.join(line) + '\n' for line in content['parts']))


def main() -> None:
    parser = create_parser('Hold what was measured against the targets.', (targets_options,))
    args = parse_options(parser)
    folder = Path(args.records).expanduser()
    output = check_record_options(args)
    logging.disable(logging.INFO)
    if args.unpack:
        unpack(output / f'{args.name}.json', folder)
        return
    if not folder.is_dir():
        raise UserError(f'--records {folder}: no such folder; name one with records of benchmarks/')
    if args.follow:
        follow(folder, output, args.name)
    else:
        print(write_targets(folder, output, args.name))


if __name__ == '__main__':
    run_script(main)
