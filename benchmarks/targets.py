"""Compare measured figures with the targets, and combine many records into one.

    python -m benchmarks.targets                                             # those in benchmarks/results
    python -m benchmarks.targets --records DIR --output DIR --name gpu --follow   # as benchmarks/gpu_suite.sh does

--records is searched at any depth for records and for parts.tsv of gpu_suite.sh. NAME.md has a line for each target,
then the tables of all records; NAME.json has the records by name with their tables, and the parts.

If there are records of a GPU, those of a CPU are not judged. Targets for other machines have no line. If any table has
`compiled`, tables without it do not count.
"""
import os
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.shared.command import parse_command
from benchmarks.shared.records import markdown_table, read_record, write_record
from options.groups import FLAG
from utils.disk import ROOT, make_folder, write_whole
from utils.errors import UserError
from utils.runtime import find_commit
from utils.script import run_script

PEER = 'vit_little_patch16_reg4_gap_256'
# Images/s of one H200 in bf16: model, pixels, task, target and stretch.
ABSOLUTE = (('t2t_vit_14', 224, 'train', 9000, 10800), ('t2t_vit_14', 224, 'inference', 26000, 31000),
            ('t2t_vit_7', 224, 'train', None, 39500), ('t2t_vit_19', 224, 'train', None, 6400),
            ('t2t_vit_24', 224, 'train', None, 4100), ('t2t_vit_t_14', 224, 'train', None, 9000),
            ('t2t_vit_14', 384, 'train', None, 3300))
FP16_STEPS = 500
ABSOLUTE_DEVICE = 'H200'
# Tokens of images of 448 and 1792 pixels. A GPU needs the larger ones, since launches take the time of fewer tokens.
MANY_TOKENS, MANY_ON_GPU = 12_544, 200_000
LAUNCH_BOUND = 0.7  # a smaller exponent shows the time of launches
PARTS = 'parts.tsv'
WELL = 'well'  # the end of a part that is not run again
BEFORE = 'before/'  # for results of parts that did not end well; they count until these do
LOOK_SECONDS = 0.5


def targets_options(parser) -> None:
    add = parser.add_argument_group('Records').add_argument
    add('--records', default=str(ROOT / 'benchmarks/results'), metavar='DIR', help='folder with the records')
    add('--follow', action=FLAG, default=False, help='write whenever they change, until the calling process has ended')
    add('--unpack', action=FLAG, default=False, help='write the folder --records from NAME.json, to continue a suite')


@dataclass
class Figure:
    """A target, what was found (None if nothing was measured), and whether that meets it."""
    target: str
    found: str | None = None
    is_met: bool | None = None

    def line(self) -> list[str]:
        verdict = 'not measured' if self.found is None else {True: 'met', False: 'missed', None: '–'}[self.is_met]
        return [self.target, self.found or '–', verdict]


def judged(target: str, value: float | None, text: str, is_met: Callable[[float], bool]) -> Figure:
    """Return the figure of a value, formatted by `text`; None stands for a value that was not measured."""
    return Figure(target) if value is None else Figure(target, text.format(value), is_met(value))


class Records:
    """The records below a folder by name, their tables, and how the parts of gpu_suite.sh ended."""

    def __init__(self, folder: Path):
        self.by_name = {}
        self.part_lines = [line.split('\t') for path in sorted(folder.rglob(PARTS))
                           for line in path.read_text(encoding='utf-8').splitlines()]
        for path in sorted(folder.rglob('*.json'), key=lambda path: path.stat().st_mtime):
            record = read_record(path)
            name = path.relative_to(folder).with_suffix('').as_posix()
            # The records of faults and of saving are not about a device's speed.
            if (isinstance(record, dict) and isinstance(record.get('machine'), dict)
                    and not (name.startswith(BEFORE) and name.removeprefix(BEFORE) in ended_well(self.part_lines))):
                self.by_name[name] = record
        self.texts = {name: path.read_text(encoding='utf-8') for name in self.by_name
                      if (path := folder / f'{name}.md').exists()}
        self.is_gpu = any('cuda' in record['machine'] for record in self.by_name.values())
        self.judged = [record for record in self.by_name.values() if ('cuda' in record['machine']) == self.is_gpu]

    def tables(self, model: str, task: str, device: str = '', **wanted) -> list[dict[str, dict]]:
        """Return the tables of benchmarks/step.py for a model: rows by contender, without failures."""
        return [{row['contender']: row for row in table['rows'] if 'error' not in row}
                for record in self.judged if device in record['machine']['device'] for table in record.get('tables', ())
                if (table.get('model'), table.get('task')) == (model, task)
                and all(table[key] == value for key, value in wanted.items())]

    def parts(self, name: str) -> list[dict]:
        """Return what the records of benchmarks/cost.py have of a part."""
        return [record[name] for record in self.judged if name in record]


def ended_well(part_lines: list[list[str]]) -> set[str]:
    """Return the parts of gpu_suite.sh that are done."""
    return {part for part, _, ended in part_lines if ended == WELL}


def compiled_if_any(tables: list[dict[str, dict]]) -> list[dict[str, dict]]:
    """Return the tables that have `compiled`, or else all."""
    return [table for table in tables if 'compiled' in table] or tables


def fastest(table: dict[str, dict]) -> float | None:
    """Return images/s of the faster of our paths in a table."""
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
    """Judge whether we are `factor` times as fast as the published code in every table."""
    tables = [table for table in records.tables(model, task, **wanted)
              if 'published' in table and table.keys() & set(paths)]
    found = [max(table[path]['images_per_second'] for path in paths if path in table)
             / table['published']['images_per_second']
             for table in (compiled_if_any(tables) if 'compiled' in paths else tables)]
    return judged(f'{model}, {task}: {" or ".join(paths)} at least {factor} × published', min(found, default=None),
                  '{:.2f} ×', lambda quotient: quotient >= factor)


def against_peer(records: Records, task: str) -> list[Figure]:
    figures = []
    for ours, theirs in (('default', PEER), ('compiled', f'{PEER}, compiled')):
        tables = [table for table in records.tables('t2t_vit_14', task, img_size=224)
                  if table.keys() >= {ours, theirs}]
        quotients = [table[ours]['images_per_second'] / table[theirs]['images_per_second']
                     for table in compiled_if_any(tables)]
        figures.append(judged(f't2t_vit_14, {task}, {ours}: ahead of {theirs}', min(quotients, default=None),
                              '{:.2f} ×', lambda quotient: quotient > 1))
    return figures


def memory(records: Records) -> Figure:
    tables = [table for table in records.tables('t2t_vit_14', 'train', batch_size=256, img_size=224)
              if 'published' in table and fastest(table)]
    shares = [min(table[name]['peak_bytes'] for name in ('default', 'compiled') if name in table)
              / table['published']['peak_bytes'] for table in compiled_if_any(tables)]
    return judged('t2t_vit_14, train: peak memory at most half of published', max(shares, default=None),
                  '{:.2f} of it', lambda share: share <= 0.5)


def float16(records: Records) -> Figure:
    figure = Figure(f'float16: no NaN in {FP16_STEPS} steps')
    # The record with the most steps counts.
    record = max((record for record in records.judged if record.get('lines')),
                 key=lambda record: record['lines'][-1]['step'], default=None)
    if record:
        # A line may have only skipped steps, since each of them halves a loss scale that is too large at first.
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
    """Judge for each precision our largest error as a multiple of the published code's; ours has to be finite."""
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
    """Return a figure for each target that applies to the machine of the records."""
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


def write_targets(folder: Path, output: Path, name: str) -> str:
    """Write NAME.json and NAME.md for the records in `folder`; return the first tables and the paths."""
    records = Records(folder)
    table = markdown_table(['target', 'found', 'verdict'], [figure.line() for figure in judge(records)])
    is_suite = folder.resolve() != output.resolve()
    texts = records.texts if is_suite else {}
    if records.part_lines:
        ends = {line[0]: line for line in records.part_lines}  # of each part its last line
        table += '\n\n## Parts\n\n' + markdown_table(['part', 'seconds', 'ended'], list(ends.values()))
    text = '\n\n'.join([f'# Targets\n\n{table}', *texts.values()])
    content = {'records': records.by_name, **({'texts': texts, 'parts': records.part_lines} if is_suite else {})}
    return '\n'.join([table, *map(str, write_record(output, name, content, text + '\n'))])


def follow(folder: Path, output: Path, name: str) -> None:
    """Write the targets whenever `folder` has changed, until the calling process has ended."""
    parent, before, has_ended = os.getppid(), None, False
    while not has_ended:
        has_ended = os.getppid() != parent  # then writes once more, for the last change
        now = {path: path.stat().st_mtime_ns for kind in ('*.json', '*.md', PARTS) for path in folder.rglob(kind)}
        if now != before:
            write_targets(folder, output, name)
            before = now
        time.sleep(LOOK_SECONDS)


def unpack(packed: Path, folder: Path) -> None:
    """Restore the folder of records that NAME.json was written from."""
    content = read_record(packed)
    if not isinstance(content, dict) or not content.keys() >= {'records', 'texts', 'parts'}:
        raise UserError(f'--name: {packed} is not of gpu_suite.sh; give another name')
    now = find_commit()
    for record in content['records'].values():
        if (commit := record['machine']['commit']) != now:
            raise UserError(f'--name: {packed} has figures of commit {commit}, and this is {now}; give another name')
    done = ended_well(content['parts'])
    # Records in before/ come first, so that newer ones of the same part replace them.
    names = sorted(content['records'], key=lambda name: not name.startswith(BEFORE))
    for number, name in enumerate(names):
        path = folder / (name if name in done else BEFORE + name.removeprefix(BEFORE))
        for written in write_record(path.parent, path.name, content['records'][name], content['texts'].get(name, '')):
            os.utime(written, (number, number))  # the order of the records
    make_folder(folder, '--records')
    write_whole(folder / PARTS, ''.join('\t'.join(line) + '\n' for line in content['parts']))


def main() -> None:
    args = parse_command('Compare measured figures with the targets.', 'targets', targets_options)
    folder, output = Path(args.records).expanduser(), Path(args.output).expanduser()
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
