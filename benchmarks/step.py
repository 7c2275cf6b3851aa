"""Measure steps of training and inference: the published formulation, ours, ours compiled and timm's, side by side.

    python -m benchmarks.step --models t2t_vit_14 --batch-size 256 --precision bf16          # on a GPU
    python -m benchmarks.step --models t2t_vit_7 --batch-size 8 --contenders published default --peers none

Each model, precision and task has a table. `published` is benchmarks/shared/published.py, `default` is what train.py
and validate.py do without further options, and `compiled` is the same compiled. All steps take the same batch, which is
on the device. benchmarks/shared/measure.py explains how time, memory and kernels are measured.

The record and the tables are written whenever rows are complete; an unfinished table says so.
"""
import itertools

import torch

from benchmarks.shared.command import common_options, parse_command, start_alone
from benchmarks.shared.measure import (
    CONTENDERS,
    LEAST_ROUNDS,
    TASKS,
    list_contenders,
    measure,
    start_inference,
    start_training,
)
from benchmarks.shared.records import markdown_table, new_record, origin, save
from models import resolve_name
from options.groups import FLAG
from options.types import count, image_size, positive, positive_int, rate, recipe_kind
from utils.script import run_script

PEERS = ('deit_small_patch16_224', 'vit_little_patch16_reg4_gap_256', 'vit_little_patch16_reg4_gap_256@256',
         'swin_tiny_patch4_window7_224', 'convnext_tiny', 'resnet50')


@recipe_kind(str)
def peer(text: str) -> str:
    """Return 'resnet50' or 'resnet50@256' unchanged; check the size."""
    if '@' in text:
        image_size(text.partition('@')[2])
    return text


def step_options(parser) -> None:
    add = parser.add_argument_group('What is measured').add_argument
    add('--models', nargs='+', default=['t2t_vit_14'], metavar='MODEL', help='T2T-ViTs, by name; a table for each')
    add('--contenders', nargs='+', default=list(CONTENDERS), choices=CONTENDERS,
        help='formulations of these models; peers have only `default` and `compiled`')
    add('--compile', default='model', choices=['blocks', 'model', 'graphs', 'autotune'],
        help='how `compiled` is compiled (see train.py)')
    add('--peers', nargs='+', default=list(PEERS), type=peer, metavar='MODEL[@SIZE]',
        help="models of timm for comparison, at --img-size or at SIZE; 'none' for none")
    add('--task', default='both', choices=[*TASKS, 'both'], help='train, inference or both')
    add('--channels-last', action=FLAG, default=False, help='channels-last memory layout, for all')
    common_options(add, batch_size=64, img_size=224, precision=['bf16'], device='auto', seed=42)
    add = parser.add_argument_group('How').add_argument
    add('--repeats', type=positive_int, default=20, metavar='N', help='rounds, and windows of each contender')
    add('--seconds', type=positive, metavar='S',
        help=f'begin no round after this time, once {LEAST_ROUNDS} have ended (default: no limit)')
    add('--window', type=rate, default=0.2, metavar='S', help='seconds of a window, which has a step at least')
    add('--warmup', type=positive_int, default=3, metavar='N', help='steps before anything is measured')
    add('--profile', type=count, default=0, metavar='N', help='list the N longest kernels of each contender')


def as_table(table: dict, device: torch.device) -> str:
    """Return a table of the record in Markdown, with its heading."""
    counted = 'kernels (launches)' if device.type == 'cuda' else 'operators'
    header = ['contender', 'img/s', '× published', 'ms per step', 'quartiles', 'peak MiB', '× published', counted]
    yardstick = next((row for row in table['rows'] if row['contender'] == 'published' and 'milliseconds' in row), None)
    lines, remarks = [], ['This table is not finished.'] * ('unfinished' in table)
    for row in table['rows']:
        if 'error' in row:
            memory = f'{row["peak_bytes"] / 2**20:.1f}' if 'peak_bytes' in row else '–'
            lines.append([row['contender'], *['–'] * 4, memory, *['–'] * 2])
            remarks.append(f'`{row["contender"]}` was not measured: {row["error"]}.')
            continue
        if not row.get('is_finite', True):  # noted at the end of the table
            remarks.append(f'`{row["contender"]}` computes numbers that are not finite.')
        faster, memory = (f'{factor:.2f}' for factor in (
            row['images_per_second'] / yardstick['images_per_second'],
            row['peak_bytes'] / yardstick['peak_bytes'])) if yardstick else ('–', '–')
        low, high = row['milliseconds']['quartiles']
        launches = '' if row['launches'] is None else f' ({row["launches"]})'
        lines.append([
            row['contender'], f'{row["images_per_second"]:.1f}', faster, f'{row["milliseconds"]["median"]:.2f}',
            f'{low:.2f} … {high:.2f}', f'{row["peak_bytes"] / 2**20:.1f}', memory, f'{row["kernels"]}{launches}'])
    size = '{} × {}'.format(*table['img_size']) if isinstance(table['img_size'], tuple) else table['img_size']
    texts = [f'## {table["model"]}: {TASKS[table["task"]]}, {table["precision"]}, batch {table["batch_size"]}, '
             f'{size} pixels', markdown_table(header, lines), *remarks]
    for row in (row for row in table['rows'] if 'longest' in row):
        longest = [[f'`{name[:100]}`', calls, f'{milliseconds:.3f}'] for name, calls, milliseconds in row['longest']]
        texts += [f'### {row["contender"]}', markdown_table(['longest', 'calls per step', 'ms per step'], longest)]
    return '\n\n'.join(texts) + '\n'


def as_text(record: dict, device: torch.device) -> str:
    """Return the whole record in Markdown."""
    measured = ('Kernels ran on the device and include copies and fills. Launches come from the host.'
                if device.type == 'cuda' else
                'Operators are the innermost ones that compute something, and compiled kernels.')
    head = (f'# Steps, side by side\n\n{origin(record)}\n\n'
            f'Medians over rounds in which the contenders take turns. {measured} Peak memory is what a contender '
            'holds, and the most that a step allocates beside it.\n')
    return '\n'.join([head, *(as_table(table, device) for table in record['tables'])])


def main() -> None:
    args = parse_command('Measure steps of training and inference, side by side.', 'step', step_options)
    args = args.replacing(peers=[] if args.peers == ['none'] else args.peers)
    for name in [*args.models, *(name.partition('@')[0] for name in args.peers)]:
        resolve_name(name)
    training_args, world = start_alone(args)
    if world.device.type == 'cpu' and 'compiled' in args.contenders:
        # Only then does the profiler see compiled kernels. It costs each of them one check.
        from torch._inductor import config
        config.cpp.enable_kernel_profile = True

    record = {**new_record('step', args, world.device), 'tables': []}
    tasks = list(TASKS) if args.task == 'both' else [args.task]
    for model, precision, task in itertools.product(args.models, args.precision, tasks):
        torch.compiler.reset()
        contenders = list_contenders(model, args)
        table = {'model': model, 'precision': precision, 'task': task, 'batch_size': args.batch_size,
                 'img_size': args.img_size, 'unfinished': True}
        record['tables'].append(table)

        def write(table=table, contenders=contenders) -> list:
            table['rows'] = [contender.row(args.batch_size) for contender in contenders]
            return save(args, record, as_text(record, world.device))

        measure(contenders, start_training if task == 'train' else start_inference, args, training_args, precision,
                world, f'{model}, {precision}, {TASKS[task]}', write)
        del table['unfinished']
        paths = write()
        print(as_table(table, world.device), flush=True)
    print(*paths, sep='\n')


if __name__ == '__main__':
    run_script(main)
