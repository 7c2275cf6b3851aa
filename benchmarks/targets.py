"""Holds the figures that were measured against the targets, and makes one record of many.

    python -m benchmarks.targets                                             # those in benchmarks/results
    python -m benchmarks.targets --records DIR --output DIR --name gpu       # as benchmarks/gpu_suite.sh does

--records is searched, at any depth, for the records of benchmarks/step.py, scale.py and fidelity.py, for the log of a
training in float16 (fp16/) and for parts.tsv, both of gpu_suite.sh. NAME.md has a line for each target, then the tables
of all records; NAME.json has the records by name. Where there are records of a GPU, those of a CPU are not judged. A
target for another machine, as those for a GPU are on a CPU, has no line; of one that was not measured the line says so.
Where a table has what is compiled, tables without it do not count.
"""
import logging
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.records import ROOT, check_record_options, markdown_table, read_record, record_options, write_record
from utils import options
from utils.errors import UserError, run_script
from utils.log import read_environment, read_metrics

PEER = 'vit_little_patch16_reg4_gap_256'
ABSOLUTE = (('t2t_vit_14', 224, 'train', 9000, 10800), ('t2t_vit_14', 224, 'inference', 26000, 31000),
            ('t2t_vit_7', 224, 'train', None, 39500), ('t2t_vit_19', 224, 'train', None, 6400),
            ('t2t_vit_24', 224, 'train', None, 4100), ('t2t_vit_t_14', 224, 'train', None, 9000),
            ('t2t_vit_14', 384, 'train', None, 3300))  # images/s of one H200 in bf16: target and stretch
FP16_STEPS = 500
ABSOLUTE_DEVICE = 'H200'
MANY_TOKENS, MANY_ON_GPU = 12_544, 200_000  # of images of 448 and 1792 pixels; launches take the time of fewer
LAUNCH_BOUND = 0.7  # an exponent below this is that of launches


def targets_options(parser) -> None:
    parser.add_argument_group('Records').add_argument(
        '--records', default=str(ROOT / 'benchmarks/results'), metavar='DIR', help='folder with the records')
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
    """The records below a folder, by their names there."""

    def __init__(self, folder: Path):
        self.by_name, self.folder = {}, folder
        for path in sorted(folder.rglob('*.json'), key=lambda path: path.stat().st_mtime):
            record = read_record(path)
            # Those of faults and of saving are not of a device's speed.
            if isinstance(record, dict) and isinstance(record.get('machine'), dict):
                self.by_name[path.relative_to(folder).with_suffix('').as_posix()] = record
        self.is_gpu = any('cuda' in record['machine'] for record in self.by_name.values())
        self.judged = [record for record in self.by_name.values() if ('cuda' in record['machine']) == self.is_gpu]

    def tables(self, model: str, task: str, device: str = '', **wanted) -> list[dict[str, dict]]:
        """The tables of benchmarks/step.py for a model: its rows by contender, without those that failed."""
        return [{row['contender']: row for row in table['rows'] if 'error' not in row}
                for record in self.judged if device in record['machine']['device'] for table in record.get('tables', ())
                if (table.get('model'), table.get('task')) == (model, task)
                and all(table[key] == value for key, value in wanted.items())]

    def parts(self, name: str) -> list[dict]:
        """The parts of benchmarks/scale.py of that name."""
        return [record[name] for record in self.judged if name in record]


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


def float16(folder: Path) -> Figure:
    figure = Figure(f'float16: no NaN in {FP16_STEPS} steps')
    logs = sorted(folder.rglob('fp16/metrics.jsonl'))
    steps = [line for log in logs for line in read_metrics(log.parent) if line['kind'] == 'train']
    if steps:
        last = steps[-1]
        is_finite = all(line['loss'] is not None for line in steps)
        figure.found = (f'{last["global_step"]} steps, {last["skipped_steps"]} skipped, loss '
                        f'{steps[0]["loss"]:.2f} → {last["loss"]:.2f}' if is_finite else 'a loss that is not finite')
        # The scale of the loss is too large at first, and is halved in a step that is skipped.
        figure.is_met = is_finite and last['global_step'] >= FP16_STEPS and last['skipped_steps'] < FP16_STEPS / 50
        precisions = {start.get('precision') for log in logs for start in read_environment(log.parent)}
        if precisions != {'float16'}:
            figure.found += f', in {" and ".join(sorted(filter(None, precisions))) or "an unknown precision"}'
            figure.is_met = None
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
                float16(records.folder), *scaling(records), *fidelity(records)]
    variants = sorted({table['model'] for record in records.judged for table in record.get('tables', ())
                       if 'model' in table})
    return [against_yardstick(records, 't2t_vit_14', 'inference', 1.25, paths=('default',)),
            *(against_yardstick(records, model, task, 1, paths=('default',)) for model in variants
              for task in ('train', 'inference')), *scaling(records), *fidelity(records)]


def parts_table(folder: Path) -> str:
    """What became of the parts of gpu_suite.sh."""
    paths = sorted(folder.rglob('parts.tsv'))
    rows = [line.split('\t') for path in paths for line in path.read_text(encoding='utf-8').splitlines()]
    return '\n\n## Parts\n\n' + markdown_table(['part', 'seconds', 'ended'], rows) if rows else ''


def main() -> None:
    parser = options.create_parser('Hold what was measured against the targets.', (targets_options,))
    args = options.parse_options(parser)
    folder = Path(args.records).expanduser()
    if not folder.is_dir():
        raise UserError(f'--records {folder}: no such folder; name one with records of benchmarks/')
    output = check_record_options(args)
    logging.disable(logging.INFO)
    records = Records(folder)
    table = markdown_table(['target', 'found', 'verdict'], [figure.line() for figure in judge(records)])
    print(table)
    texts = [path.read_text(encoding='utf-8') for name in records.by_name
             if (path := folder / f'{name}.md').exists()] if folder.resolve() != output.resolve() else []
    text = '\n\n'.join([f'# Targets\n\n{table}{parts_table(folder)}', *texts])
    print(*write_record(output, args.name, {'records': records.by_name}, text + '\n'), sep='\n')


if __name__ == '__main__':
    run_script(main)
