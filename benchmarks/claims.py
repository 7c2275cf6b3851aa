"""Train small models that differ in one thing each, and say which of the paper's claims hold at this size.

    python -m benchmarks.claims DIR                             # DIR: CIFAR-10's images in train/CLASS and test/CLASS
    python -m benchmarks.claims DIR --images 0 --epochs 30 --device cuda --name claims_long      # longer, on all images

Each run is train.py with the options of COMMON, of the command line and of MODELS; the record has its command. All
models have about equal parameters, and all runs of a seed see the same images in the same order. The result of a run is
the top-1 after its last epoch. `judge` has the rule.

The runs stay in --runs, one folder each. The same command skips those that are done and continues one that was ended.
"""
import hashlib
import shlex
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from benchmarks.shared.command import common_options, parse_command, start_alone, training_options
from benchmarks.shared.records import PRECISIONS, markdown_table, new_record, origin, save
from data.folders import ImageFolder
from engine.checkpoint import LAST
from engine.log.metrics import read_metrics
from options.types import count, number, positive, positive_int
from utils.checkpoint_reader import read_checkpoint
from utils.console import plural, progress_bar
from utils.disk import ROOT
from utils.errors import UserError
from utils.pictures import BLUE, GREEN, ORANGE, new_figure
from utils.script import run_script

# The recipe of all runs, beside the options of this benchmark: crops and flips, label smoothing, stochastic depth.
COMMON = ('--scale', '0.5', '1', '--train-interpolation', 'bilinear', '--aa', '', '--color-jitter', '0', '--reprob',
          '0', '--mixup', '0', '--cutmix', '0', '--smoothing', '0.1', '--drop-path', '0.1', '--weight-decay', '0.05',
          '--crop-pct', '1', '--sched-on-updates', '--no-model-ema', '--fast-eval', '--no-tensorboard', '--keep', '1')
LOOK_SECONDS = 1.0
STANDARD_ERRORS = 2  # a difference of more than so many is decided


# --- Models and claims ------------------------------------------------------------------------------------------------

class Model(NamedTuple):
    """A model by name, its backbone as (blocks, channels, heads), and further arguments."""
    name: str
    backbone: tuple[int, int, int]
    more: tuple[str, ...] = ()

    def options(self) -> list[str]:
        """Return the options of train.py that choose it."""
        depth, channels, heads = self.backbone
        return ['--model', self.name, '--model-kwargs', f'depth={depth}', f'embed_dim={channels}', f'num_heads={heads}',
                'mlp_ratio=2.0', *self.more]


# t2t_vit_7 with fewer channels. Two wide blocks have the parameters of seven narrow ones.
DEEP, WIDE_T2T, WIDE_VIT = (7, 96, 3), (2, 174, 3), (2, 168, 3)
TOKENS = 'token_dim=32'
MODELS = {
    'T2T-ViT': Model('t2t_vit_7', DEEP, (TOKENS,)),
    'T2T-ViT, Transformer tokens': Model('t2t_vit_7', DEEP, (TOKENS, 'tokens_type=transformer')),
    'T2T-ViT, convolution tokens': Model('t2t_vit_c_14', DEEP, (TOKENS,)),
    'T2T-ViT, shallow-wide': Model('t2t_vit_7', WIDE_T2T, (TOKENS,)),
    'ViT': Model('vit_s_16', WIDE_VIT),
    'ViT, deep-narrow': Model('vit_dn', DEEP),
}


class Claim(NamedTuple):
    """A claim of the paper: one of MODELS is better than another.

    published: the difference of top-1 on ImageNet in points, of the models that models/ablations.py and README.md list.
    """
    text: str
    better: str
    worse: str
    published: float


CLAIMS = (
    Claim('T2T-ViT beats ViT', 'T2T-ViT', 'ViT', 81.5 - 78.1),
    Claim('T2T-ViT beats ViT of the same backbone', 'T2T-ViT', 'ViT, deep-narrow', 81.5 - 79.0),
    Claim('Performer tokens beat convolution', 'T2T-ViT', 'T2T-ViT, convolution tokens', 81.5 - 80.8),
    Claim('Transformer tokens beat convolution', 'T2T-ViT, Transformer tokens', 'T2T-ViT, convolution tokens',
          81.7 - 80.8),
    Claim('Transformer tokens beat Performer tokens', 'T2T-ViT, Transformer tokens', 'T2T-ViT', 81.7 - 81.5),
    Claim('Deep-narrow beats shallow-wide in T2T-ViT', 'T2T-ViT', 'T2T-ViT, shallow-wide', 81.5 - 77.9),
    Claim('Deep-narrow beats shallow-wide in ViT', 'ViT, deep-narrow', 'ViT', 79.0 - 78.1),
)


def judge(top1: dict[str, list[float]]) -> dict:
    """Say which of CLAIMS hold for top-1 in percent, [seed] by the name of a model; seeds are paired.

    A claim holds ('yes') if the mean difference over the seeds exceeds STANDARD_ERRORS standard errors, and does not
    ('no') if it is as far below zero; else it is undecided. Few seeds say little of the deviation of one difference, so
    all claims share one estimate: what is left of `top1` when each model and each seed has its mean taken away.
    """
    scores = np.array(list(top1.values()))  # [models, seeds]
    models, seeds = scores.shape
    left = scores - scores.mean(axis=1, keepdims=True) - scores.mean(axis=0) + scores.mean()
    freedom = (models - 1) * (seeds - 1)
    error = float((2 * (left ** 2).sum() / freedom / seeds) ** 0.5)
    claims = []
    for claim in CLAIMS:
        differences = np.array(top1[claim.better]) - np.array(top1[claim.worse])
        mean = float(differences.mean())
        verdict = 'undecided' if abs(mean) <= STANDARD_ERRORS * error else 'yes' if mean > 0 else 'no'
        claims.append({**claim._asdict(), 'differences': differences.tolist(), 'difference': mean,
                       'deviation': float(differences.std(ddof=1)), 'verdict': verdict})
    return {'standard_error': error, 'degrees_of_freedom': freedom, 'claims': claims}


# --- Runs -------------------------------------------------------------------------------------------------------------

def claims_options(parser) -> None:
    add = parser.add_argument_group('What is trained').add_argument
    add('data', metavar='DIR', help='data set with class folders in train/ and val/ or test/')
    add('--images', type=count, default=20_000, metavar='N',
        help='training images, the first of each class in equal numbers; 0: all')
    add('--epochs', type=positive_int, default=1, metavar='N', help='epochs of each run')
    add('--seeds', type=number(int, low=2), default=3, metavar='N', help='runs of each model')
    add('--lr', type=positive, default=1e-3, metavar='LR', help='highest learning rate')
    add('-j', '--workers', type=count, default=1, metavar='N', help='data loader processes')
    add('--runs', default='output', metavar='DIR', help='folder of the runs, as --output of train.py')
    common_options(add, batch_size=32, img_size=64, precision='fp32', device='auto', seed=1)


def recipe(args) -> list[str]:
    """Return the options of train.py that all runs share."""
    precision = ['--no-amp'] if args.precision == 'fp32' else ['--amp', '--amp-dtype', PRECISIONS[args.precision]]
    return ['--img-size', 'x'.join(map(str, np.ravel(args.img_size))), '-b', str(args.batch_size), '--epochs',
            str(args.epochs), '--lr', str(args.lr), '--device', args.device, *precision, *COMMON]


class Run:
    """The training of a model of MODELS with a seed.

    Attributes:
        epochs: its length.
        folder: the folder of the run; other options or other images have another.
    """

    def __init__(self, args, name: str, seed: int, images: str):
        self.name, self.seed = name, seed
        self._options = [*MODELS[name].options(), *recipe(args), '--seed', str(seed)]
        options = training_options(*self._options)
        self.epochs = options.epochs + options.cooldown_epochs
        digest = hashlib.sha256(shlex.join([images, *self._options]).encode()).hexdigest()[:8]
        self._experiment = f'claims-{MODELS[name].name}-{seed}-{digest}'
        self.folder = Path(args.runs).expanduser() / 'train' / self._experiment

    def is_done(self) -> bool:
        return (self.folder / LAST).exists() and len(self._epoch_records()) == self.epochs

    def progress(self) -> float:
        """Return how many epochs its log shows, with the part of one."""
        return max((record['epoch_progress'] for record in read_metrics(self.folder) if record['kind'] == 'train'),
                   default=0)

    def _epoch_records(self) -> list[dict]:
        return [record for record in read_metrics(self.folder) if record['kind'] == 'epoch']

    def train(self, data: Path, args, bar: tqdm) -> None:
        """Train to the end, from the start or from where it was ended, and move the bar.

        Raises:
            UserError: train.py failed; with the last line of its output.
        """
        command = [sys.executable, ROOT / 'train.py', data, *self._options, '-j', args.workers, '--output', args.runs,
                   '--experiment', self._experiment, '--resume', 'auto']
        before = bar.n - self.progress()
        process = subprocess.Popen([str(word) for word in command], text=True, stdin=subprocess.DEVNULL,
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        try:
            while True:
                try:
                    said = ''.join(process.communicate(timeout=LOOK_SECONDS))
                    break
                except subprocess.TimeoutExpired:
                    bar.update(before + self.progress() - bar.n)
        finally:
            if process.poll() is None:
                process.terminate()  # it saves its state
                process.communicate()
        if process.returncode:
            raise UserError((said.strip().splitlines() or [f'exit code {process.returncode}'])[-1])
        bar.update(before + self.epochs - bar.n)

    def result(self) -> dict:
        """Return the figures after the last epoch, with those of the data and the model."""
        epochs, state = self._epoch_records(), read_checkpoint(self.folder / LAST)
        return {'model': self.name, 'seed': self.seed, 'top1': epochs[-1]['top1'], 'loss': epochs[-1]['loss'],
                'parameters': sum(tensor.numel() for tensor in state['state_dict'].values()),
                'images': state['images'], 'seconds': sum(epoch['epoch_seconds'] for epoch in epochs)}


def link_images(data: Path, images: int, folder: Path) -> Path:
    """Return a data set of links in `folder`: the first training images of each class, and everything else of `data`.

    Raises:
        UserError: a class has fewer images.
    """
    train_set = ImageFolder(str(data / 'train'))
    each = images // len(train_set.classes)
    for target, name in enumerate(train_set.classes):
        found = np.flatnonzero(train_set.targets == target)[:each]
        if len(found) < each or not each:
            raise UserError(f'--images {images}: that is {each} of each class, and {name} has {len(found)}; give 0 for '
                            'all images')
        for index in found:
            image = Path(train_set.path(int(index))).resolve()
            link = folder / 'train' / name / f'{index}{image.suffix}'
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(image)
    for entry in data.iterdir():
        if entry.name != 'train':
            (folder / entry.name).symlink_to(entry.resolve())
    return folder


def train_all(args) -> list[dict]:
    """Train every model with every seed, or find that it is done; return the results."""
    data = Path(args.data).expanduser()
    with tempfile.TemporaryDirectory(prefix='claims-') as folder:
        if args.images:
            data = link_images(data, args.images, Path(folder))
        images = ImageFolder(str(data / 'train')).fingerprint()
        runs = [Run(args, name, seed, images) for seed in range(args.seed, args.seed + args.seeds) for name in MODELS]
        results = []
        with progress_bar(total=sum(run.epochs for run in runs), initial=sum(run.progress() for run in runs),
                          bar_format='{l_bar}{bar}| {n:.2f}/{total} epochs [{elapsed}<{remaining}]') as bar:
            for number, run in enumerate(runs, start=1):
                bar.set_description(f'{run.name}, seed {run.seed}')
                if not run.is_done():
                    run.train(data, args, bar)
                results.append(result := run.result())
                tqdm.write(f'{number:3d} of {len(runs)}: {run.name}, seed {run.seed}: top-1 {result["top1"]:.2f} %')
                sys.stdout.flush()
    return results


# --- Record -----------------------------------------------------------------------------------------------------------

def new_claims_record(args, device: torch.device, results: list[dict]) -> dict:
    """Return the whole record of `results`, whose seconds are those of training and evaluation."""
    top1 = {name: [result['top1'] for result in results if result['model'] == name] for name in MODELS}
    return {**new_record('claims', args, device, args.data), 'seconds': sum(result['seconds'] for result in results),
            'images': results[0]['images'], 'recipe': shlex.join(recipe(args)),
            'models': {name: {'options': shlex.join(model.options()), 'parameters': next(
                result['parameters'] for result in results if result['model'] == name)}
                for name, model in MODELS.items()},
            'top1': top1, 'results': [{name: value for name, value in result.items() if name != 'images'}
                                      for result in results], **judge(top1)}


def claims_table(record: dict) -> str:
    """Return a table with a line for each claim."""
    return markdown_table(
        ['claim', 'holds at this size', 'difference', 'deviation', 'published difference'],
        [[claim['text'], claim['verdict'], f'{claim["difference"]:+.2f}', f'{claim["deviation"]:.2f}',
          f'{claim["published"]:+.1f}'] for claim in record['claims']])


def models_table(record: dict) -> str:
    """Return a table with a line for each model."""
    return markdown_table(
        ['model', 'parameters', 'top-1, %', 'deviation', *(f'seed {seed}' for seed in seeds_of(record)), 'options'],
        [[name, f'{record["models"][name]["parameters"]:,}', f'{np.mean(top1):.2f}', f'{np.std(top1, ddof=1):.2f}',
          *(f'{value:.2f}' for value in top1), f'`{record["models"][name]["options"]}`']
         for name, top1 in record['top1'].items()])


def seeds_of(record: dict) -> range:
    return range(record['options']['seed'], record['options']['seed'] + record['options']['seeds'])


def as_text(record: dict) -> str:
    """Return the whole record in Markdown."""
    options, held_by = record['options'], {verdict: sum(claim['verdict'] == verdict for claim in record['claims'])
                                           for verdict in ('yes', 'no', 'undecided')}
    trained, evaluated = (record['images'][split].split(' images')[0] for split in ('training', 'evaluation'))
    return (
        f'# Claims\n\n{origin(record)} The time is the sum of all runs.\n\n'
        f'Of the {len(record["claims"])} claims, {held_by["yes"]} hold at this size, {held_by["no"]} do not, and '
        f'{held_by["undecided"]} are undecided.\n\n'
        f'{claims_table(record)}\n\n'
        f'Differences are points of top-1, means over {options["seeds"]} seeds with the standard deviation of one. '
        f'Their standard error is {record["standard_error"]:.2f}, estimated from all models together '
        f'({record["degrees_of_freedom"]} degrees of freedom). A claim is decided if its difference exceeds '
        f'{STANDARD_ERRORS} standard errors. Published differences are those of ImageNet.\n\n'
        f'{models_table(record)}\n\n'
        f'{int(trained):,} training images, {plural(options["epochs"], "epoch")}, {options["img_size"]} pixels, batch '
        f'{options["batch_size"]}; {int(evaluated):,} test images. Each run is this command with the options of its '
        f'model and its seed:\n\n```sh\npython train.py DIR {record["recipe"]}\n```\n')


def draw(record: dict, path: Path) -> None:
    """Draw top-1 of every run by model, and the difference of every claim with the interval that decides it."""
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


def main() -> None:
    args = parse_command("Say which of the paper's claims hold in small.", 'claims', claims_options)
    _, world = start_alone(args)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that it ends train.py, too
    record = new_claims_record(args, world.device, train_all(args))
    print(claims_table(record), *save(args, record, as_text(record), draw), sep='\n')


if __name__ == '__main__':
    run_script(main)
