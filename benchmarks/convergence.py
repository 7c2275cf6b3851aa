"""Trains by the yardstick's step and by ours, from one initialisation on the same batches, and compares their losses.

    python -m benchmarks.convergence --data DIR                       # DIR: class folders of CIFAR-10's images
    python -m benchmarks.convergence --data DIR --precision bf16 --name convergence_bf16
    python -m benchmarks.convergence --data DIR --compile model       # our step compiled as a third path

A seed stands for the order and the augmentation of the images and for dropout: before each step all paths' generators
are set alike. Stochastic depth is left out, for the yardstick draws it in another way. The rate rises over a tenth of
the steps and then stays. Of the loss curves, smoothed over 20 steps, there are

    spread of seeds     the mean distance of the yardstick's curves of two seeds
    at equal seed       the mean distance of a path's curve from the yardstick's of the same seed
    of the means        the distance of the mean over all seeds; of equal steps with independent seeds, it can be
                        expected to be the spread of seeds divided by the root of their number, and chance may double it

and the loss of the last 50 steps. A path is within the spread where neither distance exceeds what seeds account for:
the spread of seeds at equal seed, and twice what is expected of the means.

NAME.json, the record with every loss, NAME.md, the table, and NAME.png, the curves, go to --output.
"""
import itertools
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from benchmarks.shared.measure import training_options
from benchmarks.shared.published import PUBLISHED, PublishedStep, published_model, published_optimizer
from benchmarks.shared.records import (
    PRECISIONS,
    check_precisions,
    check_record_options,
    markdown_table,
    new_record,
    origin,
    precision_of,
    record_options,
    write_record,
)
from data.batch import BatchPreparer
from data.folders import ImageFolder
from data.loader import Loader, create_loader
from data.samplers import TrainSampler
from data.seeding import derive_seed, seed_generators
from data.transforms import create_train_transform
from engine.compile import compile_model
from engine.loss import create_loss
from engine.optimizer import create_optimizer, param_groups
from engine.run import create_state
from engine.step import TrainingStep
from models import create_model
from options.groups import compile_options
from options.parser import create_parser, parse_options
from options.types import count, image_size, number, positive, positive_int, seed
from utils.console import progress_bar
from utils.distributed import World
from utils.pictures import BLUE, GREEN, ORANGE, new_figure
from utils.runtime import seed_everything, start
from utils.script import run_script
from utils.timm_model import TimmModel

SMOOTHED, LAST = 20, 50  # steps
CHANCE = 2  # times its expected value is what a distance of means may have
COLOURS = {'published': BLUE, 'default': ORANGE, 'compiled': GREEN}


def convergence_options(parser) -> None:
    add = parser.add_argument_group('What is trained').add_argument
    add('--data', required=True, metavar='DIR', help='class folders with images')
    add('--model', default='t2t_vit_7', choices=PUBLISHED, metavar='MODEL', help='a published T2T-ViT, by name')
    add('--img-size', type=image_size, default=64, metavar='N', help='input size in pixels, or HxW')
    add('-b', '--batch-size', type=positive_int, default=64, metavar='N', help='images per step')
    add('--steps', type=number(int, low=2), default=300, metavar='N', help='steps of each run')
    add('--seeds', type=number(int, low=2), default=3, metavar='N', help='runs of each path')
    add('--lr', type=positive, default=5e-4, metavar='LR', help='learning rate after the warm-up')
    add('--precision', default='fp32', choices=list(PRECISIONS), help='of all paths')
    add('-j', '--workers', type=count, default=0, metavar='N', help='data loader processes')
    add('--device', default='auto', metavar='NAME', help='auto (a GPU where there is one), cuda, cuda:1 or cpu')
    add('--seed', type=seed, default=42, metavar='S', help='of the initialisation and of all seeds')
    record_options(parser, 'convergence')


# ---------------------------------------------------------------------------------------------------------------------
# Training

class Run:
    """One path from the initialisation: `step(images, targets, rate)`, then `losses()`, of all its steps."""

    def __init__(self, path: str, args, step_args, num_classes: int, world: World):
        seed_everything(args.seed, 0)  # the initialisation is the same whatever the path and the seed
        create: Callable[..., TimmModel] = published_model if path == 'published' else create_model
        model = create(args.model, img_size=args.img_size, num_classes=num_classes, drop_path_rate=0.)
        optimizer = published_optimizer(model, step_args) if path == 'published' else create_optimizer(
            param_groups(model, step_args.weight_decay), step_args)
        precision = precision_of(args.precision, world.device)
        self._state = create_state(step_args, model, optimizer, precision, [], world)
        if path == 'compiled':
            compile_model(model, args.compile)
        loss = create_loss(step_args, soft_targets=False)
        self._losses: list[torch.Tensor] = []

        def noted_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            # On a CPU autocast leaves the loss itself in bfloat16, whose steps are 0.016 here.
            self._losses.append(loss(logits.detach().float(), targets))
            return loss(logits, targets)

        self._step = (PublishedStep if path == 'published' else TrainingStep)(
            self._state, model, prepare=lambda *batch: batch, loss=noted_loss, precision=precision, args=step_args)
        model.train()

    def step(self, images: torch.Tensor, targets: torch.Tensor, rate: float) -> None:
        for group in self._state.optimizer.param_groups:
            group['lr'] = rate
        self._step(iter([(images, targets)]))

    def losses(self) -> list[float]:
        if isinstance(self._step, TrainingStep):
            self._step.sync_skipped_steps()
        return torch.stack(self._losses).tolist()


def create_batches(dataset: ImageFolder, args, seed: int) -> Loader:
    """Batches of images padded, cropped and flipped, in the order that the seed says."""
    transform = create_train_transform(args.img_size, crop_mode='pad', auto_augment=None, color_jitter=None)
    return create_loader(dataset, transform, TrainSampler(len(dataset), args.batch_size, seed=seed), seed=seed,
                         workers=args.workers)


def train(paths: list[str], args, world: World) -> dict[str, list[list[float]]]:
    """The losses of all runs, [seed][step] by path; a bar shows the time left."""
    dataset, prepare = ImageFolder(args.data), BatchPreparer(world.device)
    step_args = training_options('--batch-size', str(args.batch_size), '--lr', str(args.lr), '--device', args.device)
    losses: dict[str, list[list[float]]] = {path: [] for path in paths}
    with progress_bar(total=args.seeds * args.steps * len(paths), unit='step') as bar:
        for index in range(args.seeds):
            seed = derive_seed(args.seed, index) >> 1
            runs = {path: Run(path, args, step_args, len(dataset.classes), world) for path in paths}
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


# ---------------------------------------------------------------------------------------------------------------------
# Comparison

def smooth(losses: list[list[float]]) -> np.ndarray:
    """Means over SMOOTHED steps (or all, where there are fewer), [seeds, steps less SMOOTHED - 1]."""
    window = min(SMOOTHED, len(losses[0]))
    return np.stack([np.convolve(curve, np.full(window, 1 / window), mode='valid') for curve in losses])


def spread_of_seeds(curves: np.ndarray) -> np.ndarray:
    """The mean distance of two of the curves [seeds, steps] at each step, [steps]."""
    return np.mean([np.abs(a - b) for a, b in itertools.combinations(curves, 2)], axis=0)


def compare(losses: dict[str, list[list[float]]]) -> dict:
    """What the module's head says, of losses [seed][step] by path: `spread_of_seeds`, and figures of each path."""
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
    """A line for each path; the yardstick's has the distances that seeds account for."""
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
    """The whole record in Markdown."""
    settings = record['options']
    return (f'# Convergence\n\n{origin(record)}\n\n'
            f'{settings["model"]}, {settings["img_size"]} pixels, batch {settings["batch_size"]}, '
            f'{settings["precision"]}: {settings["steps"]} steps from one initialisation with each of '
            f'{settings["seeds"]} seeds; ± is a standard error over them. Distances are those of the curves smoothed '
            f'over {SMOOTHED} steps, and in the line of `published` those that seeds account for: the mean distance of '
            f'its curves of two seeds, and {CHANCE} times the one that is expected of two means over as many seeds.\n\n'
            f'{as_table(record["comparison"])}\n')


def draw(losses: dict[str, list[list[float]]], path: Path) -> None:
    """The smoothed curves, and how far ours are from the yardstick's of the same seed, as a PNG file."""
    figure = new_figure(11, 4.2)
    left, right = figure.subplots(1, 2)
    curves = {name: smooth(runs) for name, runs in losses.items()}
    yardstick = curves['published']
    steps = np.arange(yardstick.shape[1]) + len(losses['published'][0]) - yardstick.shape[1] + 1
    for name, of_path in curves.items():
        left.fill_between(steps, of_path.min(axis=0), of_path.max(axis=0), color=COLOURS[name], alpha=0.2, linewidth=0)
        left.plot(steps, of_path.mean(axis=0), color=COLOURS[name], label=name,
                  linestyle='-' if name == 'published' else '--')
    left.set_title('Loss: mean and range over seeds')
    spread = spread_of_seeds(yardstick)
    right.fill_between(steps, -spread, spread, color=BLUE, alpha=0.2, linewidth=0, label='published: two seeds')
    for name, of_path in curves.items():
        if name == 'published':
            continue
        for index, difference in enumerate(of_path - yardstick):
            right.plot(steps, difference, color=COLOURS[name], linewidth=0.8,
                       label='' if index else f'{name}: each seed')
    right.axhline(0, color='black', linewidth=0.5)
    right.set_title('Loss less the yardstick’s of the same seed')
    for axes in (left, right):
        axes.set_xlabel(f'step (mean of the {len(losses["published"][0]) - yardstick.shape[1] + 1} up to it)')
        axes.grid(alpha=0.3)
        axes.legend(fontsize=9)
    figure.savefig(path, dpi=110)


def main() -> None:
    args = parse_options(create_parser(
        'Compare the losses of our step with the yardstick’s.', (convergence_options, compile_options)))
    folder = check_record_options(args)
    logging.disable(logging.INFO)  # the bar and the table are enough
    world, _ = start(training_options('--device', args.device, '--seed', str(args.seed)), alone=True)
    check_precisions([args.precision], world.device)
    started = time.perf_counter()
    losses = train(['published', 'default', *['compiled'] * bool(args.compile)], args, world)
    record = {**new_record('convergence', args, world.device, args.data), 'seconds': time.perf_counter() - started,
              'comparison': compare(losses), 'losses': losses}
    print(as_table(record['comparison']))
    paths = write_record(folder, args.name, record, as_text(record))
    picture = folder / f'{args.name}.png'
    draw(losses, picture)
    print(*paths, picture, sep='\n')


if __name__ == '__main__':
    run_script(main)
