"""Measures steps of training and inference: the published formulation, ours, ours compiled and timm's, side by side.

    python -m benchmarks.step --models t2t_vit_14 --batch-size 256 --precision bf16          # on a GPU
    python -m benchmarks.step --models t2t_vit_7 --batch-size 8 --contenders published default --peers none

There is a table for each model, precision and task. Its contenders, all in memory at once, are warmed up, then take
turns, in another order in each round. What is timed is a window of steps between two synchronisations of the device;
the figures are the median and the quartiles over the rounds. All have the same batch, on the device: random pixels,
normalised, and the soft targets of Mixup. `published` is benchmarks/shared/published.py; `default` is what train.py and
validate.py do without further options; `compiled` is the same compiled. Peers are trained and evaluated by the same
code as `default` and `compiled`.

Peak memory is what a contender holds (weights; in training their average and the optimizer's state too) and the most
that a step allocates beside it: on a GPU by the allocator's account, with the private pools of CUDA graphs; on a CPU by
the allocations and releases that torch.profiler records. Kernels of a step are counted by the profiler: on a GPU what
ran there, with copies and fills, and in brackets the launches from the host; on a CPU the innermost operators that
compute something, and compiled kernels. --profile lists those that a step spends most time in.

NAME.json, the record with the time of every window, and NAME.md, the tables, go to --output. They are written as
soon as there are rows, and again as these get better; a table says so as long as it is not finished.
"""
import itertools
import logging
from pathlib import Path

import torch

from benchmarks.shared.measure import (
    CONTENDERS,
    LEAST_ROUNDS,
    TASKS,
    list_contenders,
    measure,
    start_inference,
    start_training,
    training_options,
)
from benchmarks.shared.records import (
    PRECISIONS,
    check_precisions,
    check_record_options,
    markdown_table,
    new_record,
    origin,
    record_options,
    write_record,
)
from models import resolve_name
from options.groups import FLAG
from options.parser import create_parser, parse_options
from options.types import count, image_size, positive, positive_int, rate, recipe_kind, seed
from utils.runtime import start
from utils.script import run_script

PEERS = ('deit_small_patch16_224', 'vit_little_patch16_reg4_gap_256', 'vit_little_patch16_reg4_gap_256@256',
         'swin_tiny_patch4_window7_224', 'convnext_tiny', 'resnet50')
NAME_SHOWN = 100  # letters of a kernel's name


@recipe_kind(str)
def peer(text: str) -> str:
    """'resnet50' or 'resnet50@256', left as it is."""
    if '@' in text:
        image_size(text.partition('@')[2])
    return text



def step_options(parser) -> None:
    add = parser.add_argument_group('What is measured').add_argument
    add('--models', nargs='+', default=['t2t_vit_14'], metavar='MODEL', help='T2T-ViTs, by name; a table for each')
    add('--contenders', nargs='+', default=list(CONTENDERS), choices=CONTENDERS,
        help='formulations of these models; of peers there are those of `default` and `compiled`')
    add('--compile', default='model', choices=['blocks', 'model', 'graphs', 'autotune'],
        help='what `compiled` is (see train.py)')
    add('--peers', nargs='+', default=list(PEERS), type=peer, metavar='MODEL[@SIZE]',
        help="models of timm beside them, at --img-size or at SIZE; 'none' for none")
    add('--task', default='both', choices=[*TASKS, 'both'], help='train, inference or both')
    add('--precision', nargs='+', default=['bf16'], choices=list(PRECISIONS), help='a table for each')
    add('-b', '--batch-size', type=positive_int, default=64, metavar='N', help='images per step')
    add('--img-size', type=image_size, default=224, metavar='N', help='input size in pixels, or HxW')
    add('--channels-last', action=FLAG, default=False, help='channels-last memory layout, for all')
    add('--device', default='auto', metavar='NAME', help='auto (a GPU where there is one), cuda, cuda:1 or cpu')
    add = parser.add_argument_group('How').add_argument
    add('--repeats', type=positive_int, default=20, metavar='N', help='rounds, and windows of each contender')
    add('--seconds', type=positive, metavar='S',
        help=f'begin no round after so long, once there are {LEAST_ROUNDS} (default: no limit)')
    add('--window', type=rate, default=0.2, metavar='S', help='seconds of a window, which has a step at least')
    add('--warmup', type=positive_int, default=3, metavar='N', help='steps before anything is measured')
    add('--seed', type=seed, default=42, metavar='S', help='of weights, images and the order of a round')
    add('--profile', type=count, default=0, metavar='N', help='list the N longest kernels of each contender')
    record_options(parser, 'step')


# ---------------------------------------------------------------------------------------------------------------------
# Tables

def as_table(table: dict, device: torch.device) -> str:
    """A table of the record in Markdown, with its heading."""
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
    heading = (f'## {table["model"]}: {TASKS[table["task"]]}, {table["precision"]}, batch {table["batch_size"]}, '
               f'{size} pixels')
    return '\n\n'.join([heading, markdown_table(header, lines), *remarks, *_longest(table)]) + '\n'


def _longest(table: dict) -> list[str]:
    """What each contender spends most time in, where that was asked for."""
    texts = []
    for row in (row for row in table['rows'] if 'longest' in row):
        lines = [[f'`{name[:NAME_SHOWN]}`', str(calls), f'{milliseconds:.3f}']
                 for name, calls, milliseconds in row['longest']]
        texts += [f'### {row["contender"]}', markdown_table(['longest', 'calls per step', 'ms per step'], lines)]
    return texts


def as_text(record: dict, device: torch.device) -> str:
    """The whole record in Markdown."""
    measured = ('Kernels are those that ran on the device, with copies and fills; launches are those from the host.'
                if device.type == 'cuda' else
                'Operators are the innermost ones that compute something, and compiled kernels.')
    head = (f'# Steps, side by side\n\n{origin(record)}\n\n'
            f'Medians over rounds in which the contenders take turns. {measured} Peak memory is what a contender '
            'holds, and the most that a step allocates beside it.\n')
    return '\n'.join([head, *(as_table(table, device) for table in record['tables'])])


def main() -> None:
    parser = create_parser('Measure steps of training and inference, side by side.', (step_options,))
    args = parse_options(parser)
    args = args.replacing(peers=[] if args.peers == ['none'] else args.peers)
    for name in [*args.models, *(name.partition('@')[0] for name in args.peers)]:
        resolve_name(name)
    folder = check_record_options(args)
    training_args = training_options('--batch-size', str(args.batch_size), '--device', args.device,
                                     '--seed', str(args.seed), *['--channels-last'] * args.channels_last)
    logging.disable(logging.INFO)  # the bar and the tables are enough
    world, _ = start(training_args, alone=True)
    check_precisions(args.precision, world.device)
    if world.device.type == 'cpu' and 'compiled' in args.contenders:
        # The profiler does not see compiled kernels without it. It costs them a check of whether there is one.
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

        def save(table=table, contenders=contenders) -> tuple[Path, Path]:
            table['rows'] = [contender.row(args.batch_size) for contender in contenders]
            return write_record(folder, args.name, record, as_text(record, world.device))

        measure(contenders, start_training if task == 'train' else start_inference, args, training_args, precision,
                world, f'{model}, {precision}, {TASKS[task]}', save)
        del table['unfinished']
        paths = save()
        print(as_table(table, world.device), flush=True)
    print(*paths, sep='\n')


if __name__ == '__main__':
    run_script(main)
