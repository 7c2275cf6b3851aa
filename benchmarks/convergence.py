"""Train by the published step and by ours, from one initialisation on the same batches, and compare their losses.

    python -m benchmarks.convergence --data DIR                       # DIR: class folders of CIFAR-10's images
    python -m benchmarks.convergence --data DIR --precision bf16 --name convergence_bf16

A seed determines the order and augmentation of the images and dropout. Stochastic depth is off, because the published
code draws it differently. The rate rises over a tenth of the steps and then stays. Distances are between loss curves,
smoothed over 20 steps; see `compare`.
"""
import itertools
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from benchmarks.shared.command import common_options, parse_command, start_alone
from benchmarks.shared.measure import create_step
from benchmarks.shared.published import PUBLISHED, published_model
from benchmarks.shared.records import markdown_table, new_record, origin, precision_of, save
from data.batch import BatchPreparer
from data.folders import ImageFolder
from data.loader import Loader, create_loader
from data.samplers import TrainSampler
from data.seeding import derive_seed, seed_generators
from data.transforms import create_train_transform
from engine.loss import create_loss
from engine.step import TrainingStep
from models import create_model
from options.types import count, number, positive
from utils.console import progress_bar
from utils.distributed import World
from utils.pictures import BLUE, ORANGE, new_figure
from utils.runtime import seed_everything
from utils.script import run_script

SMOOTHED, LAST = 20, 50  # steps
CHANCE = 2  # a distance of means may be this multiple of its expected value
PATHS = ('published', 'default')


def convergence_options(parser) -> None:
    add = parser.add_argument_group('What is trained').add_argument
    add('--data', required=True, metavar='DIR', help='class folders with images')
    add('--model', default='t2t_vit_7', choices=PUBLISHED, metavar='MODEL', help='a published T2T-ViT, by name')
    add('--steps', type=number(int, low=2), default=300, metavar='N', help='steps of each run')
    add('--seeds', type=number(int, low=2), default=3, metavar='N', help='runs of each path')
    add('--lr', type=positive, default=5e-4, metavar='LR', help='learning rate after the warm-up')
    add('-j', '--workers', type=count, default=0, metavar='N', help='data loader processes')
    common_options(add, batch_size=64, img_size=64, precision='fp32', device='auto', seed=42)


# --- Training ---------------------------------------------------------------------------------------------------------

class Run:
    """One path from the common initialisation: call `step` for each batch, then `losses`."""

    def __init__(self, path: str, args, step_args, num_classes: int, world: World):
        seed_everything(args.seed, 0)  # the same initialisation for all paths and seeds
        is_published = path == 'published'
        create = published_model if is_published else create_model
        model = create(args.model, img_size=args.img_size, num_classes=num_classes, drop_path_rate=0.)
        loss = create_loss(step_args, soft_targets=False)
        self._losses: list[torch.Tensor] = []

        def noted_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            # On a CPU, autocast leaves the loss itself in bfloat16, which has steps of 0.016 here.
            self._losses.append(loss(logits.detach().float(), targets))
            return loss(logits, targets)

        self._state, self._step = create_step(step_args, model, precision_of(args.precision, world.device), world,
                                              loss=noted_loss, is_published=is_published)

    def step(self, images: torch.Tensor, targets: torch.Tensor, rate: float) -> None:
        for group in self._state.optimizer.param_groups:
            group['lr'] = rate
        self._step(iter([(images, targets)]))

    def losses(self) -> list[float]:
        if isinstance(self._step, TrainingStep):
            self._step.sync_skipped_steps()
        return torch.stack(self._losses).tolist()


def create_batches(dataset: ImageFolder, args, seed: int) -> Loader:
    """Return batches of padded, cropped and flipped images in the order of the seed."""
    transform = create_train_transform(args.img_size, crop_mode='pad', auto_augment=None, color_jitter=None)
    return create_loader(dataset, transform, TrainSampler(len(dataset), args.batch_size, seed=seed), seed=seed,
                         workers=args.workers)


def train(args, step_args, world: World) -> dict[str, list[list[float]]]:
    """Return the losses of all runs, [seed][step] by path."""
    dataset, prepare = ImageFolder(args.data), BatchPreparer(world.device)
    losses: dict[str, list[list[float]]] = {path: [] for path in PATHS}
    with progress_bar(total=args.seeds * args.steps * len(PATHS), unit='step') as bar:
        for index in range(args.seeds):
            seed = derive_seed(args.seed, index) >> 1
            runs = {path: Run(path, args, step_args, len(dataset.classes), world) for path in PATHS}
            loader = create_batches(dataset, args, seed)
            for step, (images, targets) in enumerate(_endless(loader, args.steps)):
                images, targets = prepare(images, targets)
                rate = args.lr * min(1, 10 * (step + 1) / args.steps)
                for path, run in runs.items():
                    _seed_generators(world.device, seed, step)
                    run.step(images, targets, rate)
                    bar.set_description(f'seed {index + 1}, {path}', refresh=False)
                    bar.update()
            loader.close()
            for path, run in runs.items():
                losses[path].append(run.losses())
    return losses


def _endless(loader: Loader, steps: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    def epochs():
        for epoch in itertools.count():
            loader.set_position(epoch)
            yield from loader
    return itertools.islice(epochs(), steps)


def _seed_generators(device: torch.device, *numbers: int) -> None:
    seed_generators(*numbers)
    if device.type == 'cuda':
        torch.cuda.manual_seed(derive_seed(*numbers) >> 1)


# --- Comparison -------------------------------------------------------------------------------------------------------

def smooth(losses: list[list[float]]) -> np.ndarray:
    """Return means over SMOOTHED steps (or all, if there are fewer), [seeds, steps less SMOOTHED - 1]."""
    window = min(SMOOTHED, len(losses[0]))
    return np.stack([np.convolve(curve, np.full(window, 1 / window), mode='valid') for curve in losses])


def spread_of_seeds(curves: np.ndarray) -> np.ndarray:
    """Return the mean distance of two of the curves [seeds, steps] at each step, [steps]."""
    return np.mean([np.abs(a - b) for a, b in itertools.combinations(curves, 2)], axis=0)


def compare(losses: dict[str, list[list[float]]]) -> dict:
    """Compare losses [seed][step] by path.

    A path is within the spread of seeds if its curves are at most this far from the published ones of equal seeds, and
    its mean curve is at most CHANCE times as far away as expected of independent seeds.
    """
    yardstick, num_seeds = smooth(losses['published']), len(losses['published'])
    spread = spread_of_seeds(yardstick).mean()
    last = {path: np.array(runs)[:, -LAST:].mean(axis=1) for path, runs in losses.items()}  # [seeds]
    spread_of_means = float(spread / num_seeds ** 0.5)
    of_paths: dict[str, dict] = {}
    for path in losses:
        figures = {'last': float(last[path].mean()), 'last_standard_error': _standard_error(last[path])}
        if path != 'published':
            curves = smooth(losses[path])
            at_equal_seed = np.abs(curves - yardstick).mean()
            of_means = np.abs(curves.mean(axis=0) - yardstick.mean(axis=0)).mean()
            difference = last[path] - last['published']
            figures |= {'at_equal_seed': float(at_equal_seed), 'of_means': float(of_means),
                        'last_difference': float(difference.mean()),
                        'last_difference_standard_error': _standard_error(difference),
                        'is_within': bool(at_equal_seed <= spread and of_means <= CHANCE * spread_of_means)}
        of_paths[path] = figures
    return {'spread_of_seeds': float(spread), 'spread_of_means': spread_of_means, 'paths': of_paths}


def _standard_error(values: np.ndarray) -> float:
    return float(values.std(ddof=1) / len(values) ** 0.5)


def as_table(comparison: dict) -> str:
    """Return a table with a line for each path; the published one has the distances that seeds explain."""
    lines = []
    for path, figures in comparison['paths'].items():
        is_yardstick = path == 'published'
        at_equal_seed, of_means = (
            comparison['spread_of_seeds'], CHANCE * comparison['spread_of_means']) if is_yardstick else (
            figures['at_equal_seed'], figures['of_means'])
        lines.append([
            path, f'{figures["last"]:.4f} ± {figures["last_standard_error"]:.4f}',
            '' if is_yardstick else
            f'{figures["last_difference"]:+.1e} ± {figures["last_difference_standard_error"]:.1e}',
            f'{"≤ " * is_yardstick}{at_equal_seed:.1e}', f'{"≤ " * is_yardstick}{of_means:.1e}',
            '' if is_yardstick else 'yes' if figures['is_within'] else 'no'])
    return markdown_table(['path', f'loss of the last {LAST} steps', 'difference', 'distance at equal seed',
                           'distance of the means', 'within the spread'], lines)


def as_text(record: dict) -> str:
    """Return the whole record in Markdown."""
    settings = record['options']
    return (f'# Convergence\n\n{origin(record)}\n\n'
            f'{settings["model"]}, {settings["img_size"]} pixels, batch {settings["batch_size"]}, '
            f'{settings["precision"]}: {settings["steps"]} steps from one initialisation with each of '
            f'{settings["seeds"]} seeds; ± is a standard error over them. Distances are between curves smoothed over '
            f'{SMOOTHED} steps. The line of `published` has the distances that seeds explain: the mean distance of its '
            f'curves of two seeds, and {CHANCE} times the expected distance of two means over all seeds.\n\n'
            f'{as_table(record["comparison"])}\n')


def draw(record: dict, path: Path) -> None:
    """Draw the smoothed curves, and the difference between ours and the published ones of equal seeds."""
    figure = new_figure(11, 4.2)
    left, right = figure.subplots(1, 2)
    curves = {name: smooth(runs) for name, runs in record['losses'].items()}
    steps = len(record['losses']['published'][0])
    window = steps - curves['published'].shape[1] + 1
    x = np.arange(window, steps + 1)
    for name, colour, line in (('published', BLUE, '-'), ('default', ORANGE, '--')):
        of_path = curves[name]
        left.fill_between(x, of_path.min(axis=0), of_path.max(axis=0), color=colour, alpha=0.2, linewidth=0)
        left.plot(x, of_path.mean(axis=0), line, color=colour, label=name)
    left.set_title('Loss: mean and range over seeds')
    spread = spread_of_seeds(curves['published'])
    right.fill_between(x, -spread, spread, color=BLUE, alpha=0.2, linewidth=0, label='published: two seeds')
    right.plot(x, (curves['default'] - curves['published']).T, color=ORANGE, linewidth=0.8)
    right.plot([], [], color=ORANGE, linewidth=0.8, label='default: each seed')
    right.axhline(0, color='black', linewidth=0.5)
    right.set_title('Loss minus the published one of the same seed')
    for axes in (left, right):
        axes.set_xlabel(f'step (mean of the last {window})')
        axes.grid(alpha=0.3)
        axes.legend(fontsize=9)
    figure.savefig(path, dpi=110)


def main() -> None:
    args = parse_command('Compare the losses of our step with those of the published one.', 'convergence',
                         convergence_options)
    step_args, world = start_alone(args)
    started = time.perf_counter()
    losses = train(args, step_args, world)
    record = {**new_record('convergence', args, world.device, args.data), 'seconds': time.perf_counter() - started,
              'comparison': compare(losses), 'losses': losses}
    print(as_table(record['comparison']), *save(args, record, as_text(record), draw), sep='\n')


if __name__ == '__main__':
    run_script(main)
