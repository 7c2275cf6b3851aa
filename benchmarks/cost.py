"""Measures what T2T-ViT costs as images, batches and ranks grow: the published formulation and ours, side by side.

    python -m benchmarks.cost                                                           # on two cores: seven minutes
    python -m benchmarks.cost --models t2t_vit_14 --precision bf16 --parts tokens overhead --ddp-batch-size 64  # GPU

It has five parts; --parts says which, and in which order:

size      milliseconds per image and peak memory of a step, for --img-sizes at --batch-size
batch     the same for --batch-sizes at --img-size
tokens    the same of the first token layer alone, Performer and Transformer of equal widths, one image of --token-sizes
          after the other; the exponent p in cost ~ N^p, N the number of tokens, is fitted to the larger half of them
overhead  a training step of the first model with DistributedDataParallel, in a group of one rank, against the same step
          without: the median of their quotients, window by window, with its bootstrapped 95 % interval
ranks     training steps of the first model in so many processes as --ranks says, against one process that has all their
          threads (on a CPU) or one of their GPUs; they take turns

The last two have --ddp-batch-size images on each rank. How steps are timed and what peak memory is,
benchmarks/step.py says. NAME.json, the record, NAME.md, the tables, and NAME.png, the curves, go to --output.
"""
import contextlib
import functools
import itertools
import json
import logging
import math
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from matplotlib.ticker import LogLocator
from torch import nn

from benchmarks.shared import published
from benchmarks.shared.measure import (
    CONTENDERS,
    TASKS,
    Contender,
    Running,
    list_contenders,
    make_batch,
    measure,
    start_inference,
    start_training,
    synchronize,
    training_options,
)
from benchmarks.shared.records import (
    PRECISIONS,
    ROOT,
    check_precisions,
    check_record_options,
    markdown_table,
    new_record,
    origin,
    precision_of,
    record_options,
    write_record,
)
from engine.loop import wrap_model
from models import resolve_name
from models.tokens_to_token import SOFT_SPLITS, TokenPerformer, TokenTransformer, token_grid
from options.parser import create_parser, parse_options
from options.types import image_size, number, positive_int, rate, seed
from utils import job
from utils.console import progress_bar
from utils.distributed import World, destroy_process_group, from_main
from utils.errors import UserError
from utils.pictures import BLUE, GREEN, ORANGE, new_figure
from utils.runtime import Precision, seed_everything, start
from utils.script import run_script

PARTS = ('size', 'batch', 'tokens', 'overhead', 'ranks')
TOKEN_DIM = 64
TOKEN_LAYERS = {'performer': (TokenPerformer, published.Performer),
                'transformer': (TokenTransformer, published.Transformer)}
TARGET = 3  # per cent that DistributedDataParallel may add to a step
COLORS = (BLUE, ORANGE, GREEN, '#CC79A7', '#56B4E9', '#E69F00')
STYLES = {'published': ('--', 'o'), 'default': ('-', 's'), 'compiled': (':', '^')}
MARGIN = 1.6  # above and below the curves, so that one of the ticks 1, 2, 5, 10 … is there


def scale_options(parser) -> None:
    add = parser.add_argument_group('What is measured').add_argument
    add('--parts', nargs='+', default=list(PARTS), choices=PARTS, help='which, and in which order')
    add('--models', nargs='+', default=['t2t_vit_14', 't2t_vit_t_14'], metavar='MODEL', help='T2T-ViTs, by name')
    add('--contenders', nargs='+', default=['published', 'default'], choices=CONTENDERS,
        help='formulations of them in the parts size and batch; with compiled, part overhead is of compiled models')
    add('--compile', default='model', choices=['blocks', 'model', 'graphs', 'autotune'],
        help='what `compiled` is (see train.py)')
    add('--task', default='train', choices=[*TASKS, 'both'], help='of the parts size, batch and tokens')
    add('--precision', default='fp32', choices=list(PRECISIONS), help='of all parts')
    add('--img-sizes', nargs='+', type=image_size, default=[224, 280, 336, 392, 448], metavar='N',
        help='pixels a side, in part size')
    add('--batch-sizes', nargs='+', type=positive_int, default=[1, 2, 4], metavar='N',
        help='images per step, in part batch')
    add('--ddp-batch-size', type=positive_int, default=8, metavar='N',
        help='images per step and rank, in parts overhead and ranks')
    add('--token-sizes', nargs='+', type=image_size, default=[112, 160, 224, 320, 448], metavar='N',
        help='pixels a side, in part tokens; there are N²/16 tokens')
    add('--ranks', nargs='+', type=number(int, low=2), default=[2], metavar='N',
        help='processes, in part ranks')
    add('-b', '--batch-size', type=positive_int, default=1, metavar='N', help='of part size')
    add('--img-size', type=image_size, default=224, metavar='N',
        help='of parts batch, overhead and ranks')
    add('--device', default='auto', metavar='NAME', help='auto (a GPU where there is one), cuda, cuda:1 or cpu')
    add = parser.add_argument_group('How').add_argument
    add('--repeats', type=positive_int, default=3, metavar='N', help='rounds of the parts size, batch, tokens')
    add('--pairs', type=positive_int, default=16, metavar='N', help='rounds of the parts overhead and ranks')
    add('--window', type=rate, default=0.2, metavar='S', help='seconds of a window, which has a step at least')
    add('--warmup', type=positive_int, default=1, metavar='N', help='steps before anything is measured')
    add('--seed', type=seed, default=42, metavar='S', help='of weights, images and the order of a round')
    record_options(parser, 'scale')


def tasks_of(args) -> list[str]:
    return list(TASKS) if args.task == 'both' else [args.task]


# ---------------------------------------------------------------------------------------------------------------------
# Images and batches

def measure_models(args, training_args, world: World, part: str, done: dict) -> list[dict]:
    """Measure the part size or batch: rows of shared/measure.py at each point; what both have is measured once."""
    points = [(args.batch_size, size) for size in args.img_sizes] if part == 'size' else [
        (size, args.img_size) for size in args.batch_sizes]
    found = []
    for model, task, (batch_size, img_size) in itertools.product(args.models, tasks_of(args), points):
        point = {'model': model, 'task': task, 'batch_size': batch_size, 'img_size': img_size}
        key = tuple(point.values())
        if key not in done:
            here = args.replacing(batch_size=batch_size, img_size=img_size)
            contenders = list_contenders(model, here)
            measure(contenders, start_training if task == 'train' else start_inference, here, training_args,
                    args.precision, world, f'{model}, {TASKS[task]}, batch {batch_size}, {img_size} pixels')
            torch.compiler.reset()
            done[key] = [contender.row(batch_size) for contender in contenders]
        found.append({**point, 'rows': done[key]})
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Token layers

class Unfolded(nn.Module):
    """A published token layer behind its soft split: images [B, C, H, W] to tokens [B, N, D]."""

    def __init__(self, layer: nn.Module, split: tuple[int, int, int]):
        super().__init__()
        kernel, stride, padding = split
        self.split, self.layer = nn.Unfold(kernel, stride=stride, padding=padding), layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(self.split(x).transpose(1, 2))


def start_token_layer(contender: Contender, args, training_args, precision: Precision, world: World, *,
                      task: str) -> Running:
    """A contender whose step is the first token layer, forward, and in training backward."""
    ours, yardstick = TOKEN_LAYERS[contender.model]
    layer = ours(SOFT_SPLITS[0], 3, TOKEN_DIM, of_pixels=True)
    if contender.is_published:
        weights, layer = layer.state_dict(), yardstick(3 * SOFT_SPLITS[0][0] ** 2, TOKEN_DIM)
        layer.load_state_dict(weights)
        layer = Unfolded(layer, SOFT_SPLITS[0])
    layer.to(world.device).train(task == 'train')
    images, _ = make_batch(contender, args, world.device)

    def take_step() -> torch.Tensor:
        layer.zero_grad(set_to_none=True)
        with torch.set_grad_enabled(task == 'train'), precision.autocast():
            tokens = layer(images)
        if task == 'train':
            tokens.float().square().mean().backward()
        return tokens

    def held() -> list[torch.Tensor]:
        return [*layer.parameters(), *layer.buffers()]

    return Running(take_step, held, lambda: bool(take_step().isfinite().all()), layer)


def measure_tokens(args, training_args, world: World) -> list[dict]:
    """The part tokens: rows of benchmarks/shared/measure.py for each task and number of tokens."""
    found = []
    for task, size in itertools.product(tasks_of(args), args.token_sizes):
        here = args.replacing(batch_size=1, img_size=size)
        contenders = [Contender(f'{whose} {kind}', kind, size, is_published=whose == 'published')
                      for kind in TOKEN_LAYERS for whose in ('published', 'default')]
        measure(contenders, functools.partial(start_token_layer, task=task), here, training_args, args.precision,
                world, f'token layers, {TASKS[task]}, {size} pixels')
        found.append({'task': task, 'img_size': size, 'tokens': count_tokens(size),
                      'rows': [contender.row(1) for contender in contenders]})
    return found


def count_tokens(size: int | tuple[int, int]) -> int:
    """Tokens of the first token layer."""
    kernel, stride, padding = SOFT_SPLITS[0]
    sides = (size, size) if isinstance(size, int) else size
    return math.prod((side + 2 * padding - kernel) // stride + 1 for side in sides)


def fit_exponents(points: list[dict]) -> dict[str, dict[str, dict[str, float]]]:
    """The p of time and of memory ~ N^p by task and contender: least squares of logarithms, of the larger half of N."""
    fitted: dict[str, dict[str, dict[str, float]]] = {}
    for task in dict.fromkeys(point['task'] for point in points):
        of_task = sorted((point for point in points if point['task'] == task), key=lambda point: point['tokens'])
        larger = of_task[len(of_task) // 2:] if len(of_task) > 2 else of_task
        for index, name in enumerate(row['contender'] for row in of_task[0]['rows']):
            given = [(point['tokens'], point['rows'][index]) for point in larger]
            rows = [(tokens, row['milliseconds']['median'], row['peak_bytes']) for tokens, row in given
                    if 'milliseconds' in row]
            if len(rows) > 1:
                tokens, times, memory = np.log(rows).T
                fitted.setdefault(task, {})[name] = {
                    'time': np.polyfit(tokens, times, 1)[0], 'memory': np.polyfit(tokens, memory, 1)[0]}
    return fitted


# ---------------------------------------------------------------------------------------------------------------------
# Ranks

@contextlib.contextmanager
def group_of_one(device: torch.device):
    """A process group of this process alone."""
    is_gpu = device.type == 'cuda'
    dist.init_process_group('nccl' if is_gpu else 'gloo', store=dist.HashStore(), rank=0, world_size=1,
                            device_id=device if is_gpu else None)
    try:
        yield
    finally:
        dist.destroy_process_group()


def start_ddp(contender: Contender, args, training_args, precision: Precision, world: World) -> Running:
    """As `start_training`; 'DDP' with the model wrapped as train.py wraps it where there are several ranks."""
    if contender.label != 'DDP':
        return start_training(contender, args, training_args, precision, world)
    # Told of a second rank, for it leaves alone what is one rank; DDP itself asks the group.
    return start_training(contender, args, training_args, precision, world,
                          wrap=functools.partial(wrap_model, world=replace(world, size=max(2, world.size))))


def of_ddp(args):
    """The options as benchmarks/shared/measure.py is to read them in the parts overhead and ranks."""
    return args.replacing(batch_size=args.ddp_batch_size, repeats=args.pairs)


def measure_overhead(args, training_args, world: World) -> dict:
    """Measure the part overhead: per cent that DDP adds to a step, its interval, and the rows of shared/measure.py."""
    here, model = of_ddp(args), args.models[0]
    is_compiled = 'compiled' in args.contenders
    contenders = [Contender(label, model, args.img_size, is_compiled=is_compiled) for label in ('no DDP', 'DDP')]
    with group_of_one(world.device):
        measure(contenders, start_ddp, here, training_args, args.precision, world, f'{model}, DDP')
    found = {'model': model + ', compiled' * is_compiled, 'batch_size': here.batch_size, 'img_size': args.img_size,
             'rows': [contender.row(here.batch_size) for contender in contenders]}
    without, with_ddp = (contender.milliseconds for contender in contenders)
    if without and with_ddp:
        median, low, high = median_with_interval(np.divide(with_ddp, without), args.seed)
        found |= {'percent': 100 * (median - 1), 'interval': [100 * (low - 1), 100 * (high - 1)]}
    return found


def median_with_interval(values: np.ndarray, seed: int) -> tuple[float, float, float]:
    """The median and its 95 % interval, by bootstrapping."""
    drawn = np.random.default_rng(seed).choice(values, (2000, len(values)))
    return np.median(values).item(), *np.percentile(np.median(drawn, axis=1), (2.5, 97.5)).tolist()


def launch_ranks(ranks: int, device: torch.device, script: str = 'cost') -> dict:
    """The part ranks of a benchmark for one number of them: what its rank 0 has found, or the error it ended with."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, '-m', 'launch.launcher', str(ranks), str(ROOT / f'benchmarks/{script}.py'),
                   *sys.argv[1:], '--device', device.type, '--parts', 'ranks', '--output', folder, '--name', 'ranks']
        environment = {**os.environ, 'PYTHONPATH': str(ROOT)}
        ended = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
        if ended.returncode:
            said = ended.stderr.strip().splitlines() or [f'exit code {ended.returncode}']
            return {'ranks': ranks, 'error': said[-1]}
        return json.loads((Path(folder) / 'ranks.json').read_text(encoding='utf-8'))


def act_as_rank(args, training_args) -> None:
    """Takes steps together with the other ranks, and on rank 0, which writes what it found, alone as well."""
    world, _ = start(training_args)
    here, model = of_ddp(args), args.models[0]
    precision = precision_of(args.precision, world.device)
    threads = torch.get_num_threads()
    running = {}
    for label in ('one rank', 'DDP'):
        seed_everything(args.seed, 0)
        running[label] = start_ddp(Contender(label, model, args.img_size), here, training_args, precision, world)

    def window(label: str, steps: int) -> float:
        """Milliseconds of a step."""
        together = label == 'DDP'
        torch.set_num_threads(threads if together else threads * world.size)
        dist.barrier()
        started = time.perf_counter()
        if together or world.is_main:
            for _ in range(steps):
                running[label].step()
        synchronize(world.device)
        taken = 1000 * (time.perf_counter() - started) / steps
        dist.barrier()
        return taken

    steps: list[int] = []
    for _ in range(args.warmup + 1):
        steps = from_main([max(1, round(1000 * args.window / window(label, 1))) for label in running])
    windows: dict[str, list[float]] = {label: [] for label in running}
    for index in range(args.pairs):
        order = list(zip(running, steps, strict=True))
        for label, count in order if index % 2 else reversed(order):
            windows[label].append(window(label, count))
    if world.is_main:
        quotients = world.size * np.divide(windows['one rank'], windows['DDP'])
        faster, low, high = median_with_interval(quotients, args.seed)
        medians = {label: np.median(times).item() for label, times in windows.items()}
        record = {'ranks': world.size, 'model': model, 'batch_size': here.batch_size, 'img_size': args.img_size,
                  'threads_per_rank': threads, 'threads_of_one_rank': threads * world.size,
                  'images_per_second_of_one_rank': 1000 * here.batch_size / medians['one rank'],
                  'images_per_second': 1000 * here.batch_size * world.size / medians['DDP'],
                  'faster': faster, 'interval': [low, high], 'windows_milliseconds': windows}
        write_record(Path(args.output), args.name, record, '')
    destroy_process_group()


# ---------------------------------------------------------------------------------------------------------------------
# Tables and picture

def cells(rows: list[dict]) -> list[str]:
    """Milliseconds per image and peak MiB of each contender, and, of two, the second's in proportion to the first's."""
    times = [1000 / row['images_per_second'] if 'images_per_second' in row else None for row in rows]
    peaks = [row['peak_bytes'] / 2**20 if 'peak_bytes' in row else None for row in rows]
    return [text for values in (times, peaks) for text in (
        *('–' if value is None else f'{value:.4g}' for value in values),
        *([] if len(values) < 2 else [_ratio(values[-1], values[0])]))]


def _ratio(value: float | None, other: float | None) -> str:
    return f'{value / other:.2f}' if value and other else '–'


def header(first: str, labels: list[str]) -> list[str]:
    columns = [f'{labels[-1]} / {labels[0]}'] if len(labels) > 1 else []
    return [first, *(f'{label}, ms per image' for label in labels), *columns,
            *(f'{label}, peak MiB' for label in labels), *columns]


def model_tables(points: list[dict], part: str) -> list[str]:
    key, first = ('img_size', 'pixels') if part == 'size' else ('batch_size', 'batch')
    texts = []
    for model, task in dict.fromkeys((point['model'], point['task']) for point in points):
        chosen = [point for point in points if (point['model'], point['task']) == (model, task)]
        other = f'batch {chosen[0]["batch_size"]}' if part == 'size' else f'{chosen[0]["img_size"]} pixels'
        labels = [row['contender'] for row in chosen[0]['rows']]
        texts += [f'## {model}, {TASKS[task]}, {other}',
                  markdown_table(header(first, labels), [[str(point[key]), *cells(point['rows'])] for point in chosen]),
                  *remarks(chosen, key)]
    return texts


def remarks(points: list[dict], key: str) -> list[str]:
    return [f'`{row["contender"]}` was not measured at {point[key]}: {row["error"]}.'
            for point in points for row in point['rows'] if 'error' in row]


def token_tables(points: list[dict], exponents: dict) -> list[str]:
    texts = []
    for task in dict.fromkeys(point['task'] for point in points):
        chosen = [point for point in points if point['task'] == task]
        labels = [row['contender'] for row in chosen[0]['rows']]
        for what, value in (('milliseconds', lambda row: row['milliseconds']['median']),
                            ('peak MiB', lambda row: row['peak_bytes'] / 2**20)):
            rows = [[f'{point["tokens"]:,}', *('–' if 'error' in row else f'{value(row):.4g}' for row in point['rows'])]
                    for point in chosen]
            kind = 'time' if what == 'milliseconds' else 'memory'
            of_task = exponents.get(task, {})
            rows.append([f'exponent of {kind}', *(f'{of_task[label][kind]:.2f}' if label in of_task else '–'
                                                  for label in labels)])
            texts += [f'## First token layer, {TASKS[task]}, one image: {what}',
                      markdown_table(['tokens', *labels], rows)]
        texts += remarks(chosen, 'tokens')
    return texts


def overhead_text(found: dict) -> list[str]:
    head = (f'## DistributedDataParallel in a group of one rank: {found["model"]}, batch {found["batch_size"]}, '
            f'{found["img_size"]} pixels')
    if 'percent' not in found:
        return [head, *remarks([found], 'model')]
    low, high = found['interval']
    verdict = 'met' if high < TARGET else 'missed' if low >= TARGET else 'not resolved; give more --pairs'
    rows = [[row['contender'], f'{row["milliseconds"]["median"]:.2f}',
             '{:.2f} … {:.2f}'.format(*row['milliseconds']['quartiles']), str(row['kernels'])] for row in found['rows']]
    return [head, markdown_table(['step', 'ms', 'quartiles', 'kernels or operators'], rows),
            f'Overhead {found["percent"]:+.2f} %, 95 % interval {low:+.2f} … {high:+.2f} %, over '
            f'{len(found["rows"][0]["windows_milliseconds"])} pairs. Target, less than {TARGET} %: {verdict}.']


def ranks_text(found: list[dict]) -> list[str]:
    measured, texts = [point for point in found if 'error' not in point], ['## Several ranks']
    if measured:
        texts[0] += ': {model}, batch {batch_size} on each, {img_size} pixels'.format(**measured[0])
        texts.append(markdown_table(
            ['ranks', 'threads on each', 'img/s', 'one rank, threads', 'one rank, img/s', 'faster', '95 % interval'],
            [[str(point['ranks']), str(point['threads_per_rank']), f'{point["images_per_second"]:.1f}',
              str(point['threads_of_one_rank']), f'{point["images_per_second_of_one_rank"]:.1f}',
              f'{point["faster"]:.3f}', '{:.3f} … {:.3f}'.format(*point['interval'])] for point in measured]))
    return texts + [f'{point["ranks"]} ranks were not measured: {point["error"]}.' for point in found
                    if 'error' in point]


def as_text(record: dict) -> str:
    """The whole record in Markdown."""
    texts = ['# Cost as images, batches and ranks grow',
             f'{origin(record)} In {record["options"]["precision"]}; medians over rounds in which the contenders take '
             'turns.']
    for part in ('size', 'batch'):
        texts += model_tables(record[part], part) if part in record else []
    texts += token_tables(record['tokens'], record['exponents']) if 'tokens' in record else []
    texts += overhead_text(record['overhead']) if 'overhead' in record else []
    texts += ranks_text(record['ranks']) if 'ranks' in record else []
    return '\n\n'.join(texts) + '\n'


def draw(record: dict, path: Path) -> None:
    """Draws time and memory of the parts size, batch and tokens, each a row of two panels; none if there are none."""
    curves = [(part, task, [point for point in record[part] if point['task'] == task]) for part in
              ('size', 'batch', 'tokens') if part in record for task in
              dict.fromkeys(point['task'] for point in record[part])]
    if not curves:
        return
    labels = {'size': ('img_size', 'pixels a side'), 'batch': ('batch_size', 'images per step'),
              'tokens': ('tokens', 'tokens N')}
    figure = new_figure(12, 4 * len(curves))
    for panels, (part, task, points) in zip(figure.subplots(len(curves), 2, squeeze=False), curves, strict=True):
        key, name = labels[part]
        lines: dict[tuple[str, str], list[tuple[float, float, float]]] = {}
        for point, row in ((p, row) for p in points for row in p['rows'] if 'error' not in row):
            lines.setdefault((row['model'], row['contender']), []).append(
                (math.prod(point[key]) ** 0.5 if isinstance(point[key], tuple) else point[key],
                 1000 / row['images_per_second'], row['peak_bytes'] / 2**20))
        models = list(dict.fromkeys(model for model, _ in lines))
        for (model, contender), values in lines.items():
            formulation = contender.split()[0]
            line, marker = STYLES[formulation]
            exponents = record.get('exponents', {}).get(task, {}).get(contender) if part == 'tokens' else None
            x, *ys = np.transpose(sorted(values))
            for panel, y, kind in zip(panels, ys, ('time', 'memory'), strict=True):
                power = f', $N^{{{exponents[kind]:.2f}}}$' if exponents else ''
                panel.plot(x, y, line, marker=marker, markersize=4, color=COLORS[models.index(model) % len(COLORS)],
                           label=f'{model}, {formulation}{power}')
        ticks = sorted({value for values in lines.values() for value, *_ in values})
        where = {'size': f'batch {points[0]["batch_size"]}' if part == 'size' else '',
                 'batch': f'{points[0]["img_size"]} pixels', 'tokens': 'first token layer, one image'}[part]
        for panel, what in zip(panels, ('milliseconds per image', 'peak memory, MiB'), strict=True):
            panel.set(xscale='log', yscale='log', xlabel=name, ylabel=what, title=f'{TASKS[task]}, {where}')
            panel.set_xticks(ticks, [f'{tick:,.0f}' for tick in ticks])
            low, high = panel.get_ylim()
            panel.set_ylim(low / MARGIN, high * MARGIN)
            panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            panel.yaxis.set_major_formatter('{x:,g}')
            panel.minorticks_off()
            panel.grid(alpha=0.3)
            panel.legend(fontsize=8)
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = create_parser('Measure what T2T-ViT costs as images, batches and ranks grow.', (scale_options,))
    args = parse_options(parser)
    args = args.replacing(channels_last=False, peers=[], seconds=None, profile=0)  # which measure.py asks for
    for name in args.models:
        resolve_name(name)
    for size in {*args.img_sizes, args.img_size}:
        try:
            token_grid(*((size, size) if isinstance(size, int) else size))
        except ValueError as error:
            raise UserError(f'--img-sizes: {error}') from None
    folder = check_record_options(args)
    training_args = training_options('--device', args.device, '--seed', str(args.seed))
    logging.disable(logging.INFO)  # the bar and the tables are enough
    if job.world_size() > 1:  # started by `launch_ranks`
        act_as_rank(args, training_args)
        return
    world, _ = start(training_args, alone=True)
    check_precisions([args.precision], world.device)

    record = new_record('scale', args, world.device)
    done: dict = {}
    work = {'size': lambda: measure_models(args, training_args, world, 'size', done),
            'batch': lambda: measure_models(args, training_args, world, 'batch', done),
            'tokens': lambda: measure_tokens(args, training_args, world),
            'overhead': lambda: measure_overhead(args, training_args, world),
            'ranks': lambda: [launch_ranks(ranks, world.device)
                              for ranks in progress_bar(iterable=args.ranks, desc='ranks')]}
    picture = folder / f'{args.name}.png'
    for part in dict.fromkeys(args.parts):  # files after each, for what is measured may take long
        record[part] = work[part]()
        if part == 'tokens':
            record['exponents'] = fit_exponents(record['tokens'])
        paths = write_record(folder, args.name, record, as_text(record))
        draw(record, picture)
    print(as_text(record), *paths, *([picture] if picture.exists() else []), sep='\n')


if __name__ == '__main__':
    run_script(main)
