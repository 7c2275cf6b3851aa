"""Measure what T2T-ViT costs as images, batches and ranks grow: the published formulation and ours, side by side.

    python -m benchmarks.cost                                                           # on two cores: seven minutes
    python -m benchmarks.cost --models t2t_vit_14 --precision bf16 --parts tokens overhead --ddp-batch-size 64  # GPU

--parts chooses among five parts:

size      time and peak memory of a training step for --img-sizes at --batch-size
batch     the same for --batch-sizes at --img-size
tokens    the same of the first token layer alone, with one image of --token-sizes; its cost grows as N^p with the
          number N of tokens, and p is fitted to the larger half of N
overhead  a training step with DistributedDataParallel in a group of one rank, against one without
ranks     training steps in --ranks processes, against one process with all their threads (CPU) or one GPU
"""
import itertools
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from matplotlib.ticker import LogLocator

from benchmarks.shared.command import common_options, parse_command, shared_training_options, start_alone
from benchmarks.shared.measure import (
    Contender,
    Running,
    list_contenders,
    make_batch,
    measure,
    start_training,
    synchronize,
)
from benchmarks.shared.published import TOKEN_LAYERS as PUBLISHED_LAYERS
from benchmarks.shared.ranks import finish_rank, group_of_one, launch_ranks, start_ddp
from benchmarks.shared.records import markdown_table, new_record, origin, precision_of, save
from models import resolve_name
from models.tokens_to_token import SOFT_SPLITS, TOKEN_LAYERS, SoftSplit, token_grid
from options.types import image_size, number, positive_int, rate
from utils import job
from utils.console import progress_bar
from utils.distributed import World, from_main
from utils.errors import UserError
from utils.pictures import BLUE, GREEN, ORANGE, new_figure
from utils.runtime import Precision, seed_everything, start
from utils.script import run_script

PARTS = ('size', 'batch', 'tokens', 'overhead', 'ranks')
TOKEN_DIM = 64
TARGET = 3  # per cent that DistributedDataParallel may add to a step
MEASURES = {'ms per image': lambda row: 1000 / row['images_per_second'],
            'peak MiB': lambda row: row['peak_bytes'] / 2**20}
# The x-axis of each part with curves: its key in a point, and its label.
AXES = {'size': ('img_size', 'pixels a side'), 'batch': ('batch_size', 'images per step'),
        'tokens': ('tokens', 'tokens N')}
COLORS = (BLUE, ORANGE, GREEN, '#CC79A7', '#56B4E9', '#E69F00')
STYLES = {'published': ('--', 'o'), 'default': ('-', 's')}


def scale_options(parser) -> None:
    add = parser.add_argument_group('What is measured').add_argument
    add('--parts', nargs='+', default=list(PARTS), choices=PARTS, help='parts, in this order')
    add('--models', nargs='+', default=['t2t_vit_14', 't2t_vit_t_14'], metavar='MODEL', help='T2T-ViTs, by name')
    add('--img-sizes', nargs='+', type=image_size, default=[224, 280, 336, 392, 448], metavar='N',
        help='pixels a side, in part size')
    add('--batch-sizes', nargs='+', type=positive_int, default=[1, 2, 4], metavar='N',
        help='images per step, in part batch')
    add('--ddp-batch-size', type=positive_int, default=8, metavar='N',
        help='images per step and rank, in parts overhead and ranks')
    add('--token-sizes', nargs='+', type=image_size, default=[112, 160, 224, 320, 448], metavar='N',
        help='pixels a side, in part tokens; there are N²/16 tokens')
    add('--ranks', nargs='+', type=number(int, low=2), default=[2], metavar='N', help='processes, in part ranks')
    common_options(add, batch_size=1, img_size=224, precision='fp32', device='auto', seed=42)
    add = parser.add_argument_group('How').add_argument
    add('--repeats', type=positive_int, default=3, metavar='N', help='rounds of the parts size, batch, tokens')
    add('--pairs', type=positive_int, default=16, metavar='N', help='rounds of the parts overhead and ranks')
    add('--window', type=rate, default=0.2, metavar='S', help='seconds of a window, which has a step at least')
    add('--warmup', type=positive_int, default=1, metavar='N', help='steps before anything is measured')


# --- Images and batches -----------------------------------------------------------------------------------------------

def measure_models(args, training_args, world: World, part: str, done: dict) -> list[dict]:
    """Measure the part size or batch, rows at each point; `done` keeps the points that both parts have."""
    points = [(args.batch_size, size) for size in args.img_sizes] if part == 'size' else [
        (size, args.img_size) for size in args.batch_sizes]
    found = []
    for model, (batch_size, img_size) in itertools.product(args.models, points):
        point = {'model': model, 'task': 'train', 'batch_size': batch_size, 'img_size': img_size}
        key = tuple(point.values())
        if key not in done:
            here = args.replacing(batch_size=batch_size, img_size=img_size)
            contenders = list_contenders(model, here)
            measure(contenders, start_training, here, training_args, args.precision, world,
                    f'{model}, batch {batch_size}, {img_size} pixels')
            done[key] = [contender.row(batch_size) for contender in contenders]
        found.append({**point, 'rows': done[key]})
    return found


# --- Token layers -----------------------------------------------------------------------------------------------------

def start_token_layer(contender: Contender, args, training_args, precision: Precision, world: World) -> Running:
    """Return a contender whose step is the first token layer, forward and backward."""
    ours = TOKEN_LAYERS[contender.model]
    layer = ours(SOFT_SPLITS[0], 3, TOKEN_DIM, of_pixels=True)
    if contender.is_published:
        layer.__class__ = PUBLISHED_LAYERS[ours]
    layer.to(world.device)
    images, _ = make_batch(contender, args, world.device)

    def take_step() -> torch.Tensor:
        layer.zero_grad(set_to_none=True)
        with precision.autocast():
            tokens = layer(images)
        tokens.float().square().mean().backward()
        return tokens

    return Running(take_step, lambda: [*layer.parameters(), *layer.buffers()],
                   lambda: bool(take_step().isfinite().all()), layer)


def measure_tokens(args, training_args, world: World) -> list[dict]:
    """Measure the part tokens, rows for each number of tokens."""
    split, found = SoftSplit(*SOFT_SPLITS[0]), []
    for size in args.token_sizes:
        here = args.replacing(batch_size=1, img_size=size)
        contenders = [Contender(f'{whose} {kind}', kind, size, is_published=whose == 'published')
                      for kind in TOKEN_LAYERS for whose in STYLES]
        measure(contenders, start_token_layer, here, training_args, args.precision, world,
                f'token layers, {size} pixels')
        grid = split.grid_size(*((size, size) if isinstance(size, int) else size))
        found.append({'task': 'train', 'img_size': size, 'tokens': math.prod(grid),
                      'rows': [contender.row(1) for contender in contenders]})
    return found


def fit_exponents(points: list[dict]) -> dict[str, dict[str, dict[str, float]]]:
    """Fit p in time and memory ~ N^p by least squares of logarithms over the larger half of N; {'train': …}."""
    points = sorted(points, key=lambda point: point['tokens'])
    larger = points[len(points) // 2:] if len(points) > 2 else points
    fitted = {}
    for index, name in enumerate(row['contender'] for row in points[0]['rows']):
        given = [(point['tokens'], point['rows'][index]) for point in larger]
        rows = [(tokens, row['milliseconds']['median'], row['peak_bytes']) for tokens, row in given
                if 'milliseconds' in row]
        if len(rows) > 1:
            tokens, times, memory = np.log(rows).T
            fitted[name] = {'time': np.polyfit(tokens, times, 1)[0], 'memory': np.polyfit(tokens, memory, 1)[0]}
    return {'train': fitted} if fitted else {}


# --- Ranks ------------------------------------------------------------------------------------------------------------

def measure_overhead(args, training_args, world: World) -> dict:
    """Measure the part overhead: per cent that DDP adds to a step, its interval, and the rows of both."""
    here, model = args.replacing(batch_size=args.ddp_batch_size, repeats=args.pairs), args.models[0]
    contenders = [Contender(label, model, args.img_size) for label in ('no DDP', 'DDP')]
    with group_of_one(world.device):
        measure(contenders, start_ddp, here, training_args, args.precision, world, f'{model}, DDP')
    found = {'model': model, 'batch_size': here.batch_size, 'img_size': args.img_size,
             'rows': [contender.row(here.batch_size) for contender in contenders]}
    without, with_ddp = (contender.milliseconds for contender in contenders)
    if without and with_ddp:
        median, low, high = median_with_interval(np.divide(with_ddp, without), args.seed)
        found |= {'percent': 100 * (median - 1), 'interval': [100 * (low - 1), 100 * (high - 1)]}
    return found


def median_with_interval(values: np.ndarray, seed: int) -> tuple[float, float, float]:
    """Return the median and its 95 % interval by bootstrapping."""
    drawn = np.random.default_rng(seed).choice(values, (2000, len(values)))
    return np.median(values).item(), *np.percentile(np.median(drawn, axis=1), (2.5, 97.5)).tolist()


def measure_ranks(ranks: int, device: torch.device) -> dict:
    """Measure the part ranks for one number of them; return what rank 0 found, or the error."""
    try:
        return launch_ranks(ranks, 'cost', device.type)
    except UserError as error:
        return {'ranks': ranks, 'error': str(error)}


def act_as_rank(args, training_args) -> None:
    """Take steps together with the other ranks and, on rank 0, also alone."""
    world, _ = start(training_args)
    here, model = args.replacing(batch_size=args.ddp_batch_size), args.models[0]
    precision = precision_of(args.precision, world.device)
    threads = torch.get_num_threads()
    running = {}
    for label in ('one rank', 'DDP'):
        seed_everything(args.seed, 0)
        running[label] = start_ddp(Contender(label, model, args.img_size), here, training_args, precision, world)

    def window(label: str, steps: int) -> float:
        """Return milliseconds of a step."""
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
    quotients = world.size * np.divide(windows['one rank'], windows['DDP'])
    faster, low, high = median_with_interval(quotients, args.seed)
    medians = {label: np.median(times).item() for label, times in windows.items()}
    finish_rank(args, world, {
        'ranks': world.size, 'model': model, 'batch_size': here.batch_size, 'img_size': args.img_size,
        'threads_per_rank': threads, 'threads_of_one_rank': threads * world.size,
        'images_per_second_of_one_rank': 1000 * here.batch_size / medians['one rank'],
        'images_per_second': 1000 * here.batch_size * world.size / medians['DDP'],
        'faster': faster, 'interval': [low, high], 'windows_milliseconds': windows})


# --- Tables and picture -----------------------------------------------------------------------------------------------

def model_tables(points: list[dict], part: str) -> list[str]:
    """Return a table for each model: time and memory of both formulations, and the quotients of ours."""
    key, first = ('img_size', 'pixels') if part == 'size' else ('batch_size', 'batch')
    header = [first] + [column for name in MEASURES for column in (
        f'published, {name}', f'default, {name}', 'default / published')]
    texts = []
    for model in dict.fromkeys(point['model'] for point in points):
        chosen = [point for point in points if point['model'] == model]
        other = f'batch {chosen[0]["batch_size"]}' if part == 'size' else f'{chosen[0]["img_size"]} pixels'
        lines = []
        for point in chosen:
            lines.append([point[key]])
            for value in MEASURES.values():
                theirs, ours = (None if 'error' in row else value(row) for row in point['rows'])
                lines[-1] += [shown(theirs), shown(ours), f'{ours / theirs:.2f}' if ours and theirs else '–']
        texts += [f'## {model}, training, {other}', markdown_table(header, lines), *remarks(chosen, key)]
    return texts


def shown(value: float | None) -> str:
    return '–' if value is None else f'{value:.4g}'


def remarks(points: list[dict], key: str) -> list[str]:
    return [f'`{row["contender"]}` was not measured at {point[key]}: {row["error"]}.'
            for point in points for row in point['rows'] if 'error' in row]


def token_tables(points: list[dict], exponents: dict) -> list[str]:
    """Return a table of time and one of memory, each with the fitted exponents in its last line."""
    labels = [row['contender'] for row in points[0]['rows']]
    fitted = exponents.get('train', {})
    texts = []
    for (name, value), kind in zip(MEASURES.items(), ('time', 'memory'), strict=True):
        lines = [[f'{point["tokens"]:,}', *(shown(None if 'error' in row else value(row)) for row in point['rows'])]
                 for point in points]
        lines.append([f'exponent of {kind}', *(f'{fitted[label][kind]:.2f}' if label in fitted else '–'
                                               for label in labels)])
        texts += [f'## First token layer, training, one image: {name}', markdown_table(['tokens', *labels], lines)]
    return texts + remarks(points, 'tokens')


def overhead_text(found: dict) -> list[str]:
    head = (f'## DistributedDataParallel in a group of one rank: {found["model"]}, batch {found["batch_size"]}, '
            f'{found["img_size"]} pixels')
    if 'percent' not in found:
        return [head, *remarks([found], 'model')]
    low, high = found['interval']
    verdict = 'met' if high < TARGET else 'missed' if low >= TARGET else 'not resolved; give more --pairs'
    rows = [[row['contender'], f'{row["milliseconds"]["median"]:.2f}',
             '{:.2f} … {:.2f}'.format(*row['milliseconds']['quartiles']), row['kernels']] for row in found['rows']]
    return [head, markdown_table(['step', 'ms', 'quartiles', 'kernels or operators'], rows),
            f'Overhead {found["percent"]:+.2f} %, 95 % interval {low:+.2f} … {high:+.2f} %, over '
            f'{len(found["rows"][0]["windows_milliseconds"])} pairs. Target, less than {TARGET} %: {verdict}.']


def ranks_text(found: list[dict]) -> list[str]:
    measured, texts = [point for point in found if 'error' not in point], ['## Several ranks']
    if measured:
        texts[0] += ': {model}, batch {batch_size} on each, {img_size} pixels'.format(**measured[0])
        texts.append(markdown_table(
            ['ranks', 'threads on each', 'img/s', 'one rank, threads', 'one rank, img/s', 'faster', '95 % interval'],
            [[point['ranks'], point['threads_per_rank'], f'{point["images_per_second"]:.1f}',
              point['threads_of_one_rank'], f'{point["images_per_second_of_one_rank"]:.1f}',
              f'{point["faster"]:.3f}', '{:.3f} … {:.3f}'.format(*point['interval'])] for point in measured]))
    return texts + [f'{point["ranks"]} ranks were not measured: {point["error"]}.' for point in found
                    if 'error' in point]


def as_text(record: dict) -> str:
    """Return the whole record in Markdown."""
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
    """Draw time and memory over size, batch and tokens: two panels for each of these parts in the record."""
    parts = [part for part in AXES if part in record]
    if not parts:
        return
    figure = new_figure(12, 4 * len(parts))
    for panels, part in zip(figure.subplots(len(parts), 2, squeeze=False), parts, strict=True):
        points, (key, label) = record[part], AXES[part]
        where = {'size': f'batch {points[0].get("batch_size")}', 'batch': f'{points[0]["img_size"]} pixels',
                 'tokens': 'first token layer, one image'}[part]
        for panel, (name, value) in zip(panels, MEASURES.items(), strict=True):
            draw_curves(panel, points, key, value)
            panel.set(xscale='log', yscale='log', xlabel=label, ylabel=name, title=f'training, {where}')
            ticks = sorted({length(point[key]) for point in points})
            panel.set_xticks(ticks, [f'{tick:,.0f}' for tick in ticks])
            low, high = panel.get_ylim()
            panel.set_ylim(low / 1.6, high * 1.6)  # so that one of the ticks 1, 2, 5, 10 … is there
            panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            panel.yaxis.set_major_formatter('{x:,g}')
            panel.minorticks_off()
            panel.grid(alpha=0.3)
            panel.legend(fontsize=8)
    figure.savefig(path, dpi=100)


def draw_curves(panel, points: list[dict], key: str, value) -> None:
    """Draw a value of the rows over a key of their points, a line for each model and formulation."""
    lines: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for point in points:
        for row in (row for row in point['rows'] if 'error' not in row):
            line = lines.setdefault((row['model'], row['contender'].split()[0]), [])
            line.append((length(point[key]), value(row)))
    models = list(dict.fromkeys(model for model, _ in lines))
    for (model, formulation), values in lines.items():
        style, marker = STYLES[formulation]
        panel.plot(*np.transpose(sorted(values)), style, marker=marker, markersize=4, label=f'{model}, {formulation}',
                   color=COLORS[models.index(model) % len(COLORS)])


def length(value: float | tuple[int, int]) -> float:
    """Return a number as it is, and the side of a square as large as an image of (height, width)."""
    return math.prod(value) ** 0.5 if isinstance(value, tuple) else value


def main() -> None:
    # Shared code reads these, and this benchmark does not offer them.
    args = parse_command('Measure what T2T-ViT costs as images, batches and ranks grow.', 'scale', scale_options,
                         channels_last=False, contenders=list(STYLES), peers=[], seconds=None, profile=0)
    for name in args.models:
        resolve_name(name)
    for size in {*args.img_sizes, args.img_size}:
        try:
            token_grid(*((size, size) if isinstance(size, int) else size))
        except ValueError as error:
            raise UserError(f'--img-sizes: {error}') from None
    if job.world_size() > 1:  # started by `launch_ranks`
        act_as_rank(args, shared_training_options(args))
        return
    training_args, world = start_alone(args)
    record = new_record('cost', args, world.device)
    done: dict = {}
    work = {'size': lambda: measure_models(args, training_args, world, 'size', done),
            'batch': lambda: measure_models(args, training_args, world, 'batch', done),
            'tokens': lambda: measure_tokens(args, training_args, world),
            'overhead': lambda: measure_overhead(args, training_args, world),
            'ranks': lambda: [measure_ranks(ranks, world.device)
                              for ranks in progress_bar(iterable=args.ranks, desc='ranks')]}
    for part in dict.fromkeys(args.parts):  # writes files after each, since measuring may take long
        record[part] = work[part]()
        if part == 'tokens':
            record['exponents'] = fit_exponents(record['tokens'])
        paths = save(args, record, as_text(record), draw)
    print(as_text(record), *paths, sep='\n')


if __name__ == '__main__':
    run_script(main)
