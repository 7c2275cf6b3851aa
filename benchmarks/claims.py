"""Train small models that differ in one thing each, and say which of the paper's claims hold at this size.

    python -m benchmarks.claims DIR                             # DIR: CIFAR-10's images in train/CLASS and test/CLASS
    python -m benchmarks.claims DIR --images 0 --epochs 30 --device cuda --name claims_long      # longer, on all images

Each run is train.py with the options of COMMON, of the command line and of MODELS; the record has its command. All
models have about equal parameters, and all runs of a seed see the same images in the same order. The result of a run is
the top-1 after its last epoch. `judge` has the rule.

The runs stay in --runs, one folder each. The same command skips those that are done and continues one that was ended.
"""
import shlex
import signal
from typing import NamedTuple

import numpy as np
import torch

from benchmarks.shared.claims import Claim, claims_table, describe_verdicts, draw, judge, kinds_table
from benchmarks.shared.command import common_options, parse_command, start_alone
from benchmarks.shared.records import PRECISIONS, new_record, origin, save
from benchmarks.shared.runs import Run, images_of, train_all
from options.types import count, number, positive, positive_int
from utils.console import plural
from utils.script import run_script

# The recipe of all runs, beside the options of this benchmark: crops and flips, label smoothing, stochastic depth.
COMMON = ('--scale', '0.5', '1', '--train-interpolation', 'bilinear', '--aa', '', '--color-jitter', '0', '--reprob',
          '0', '--mixup', '0', '--cutmix', '0', '--smoothing', '0.1', '--drop-path', '0.1', '--weight-decay', '0.05',
          '--crop-pct', '1', '--sched-on-updates', '--no-model-ema', '--fast-eval', '--no-tensorboard', '--keep', '1')


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


def train_models(args) -> list[dict]:
    """Train every model with every seed, or find that it is done; return the results."""
    kinds = [(name, seed) for seed in range(args.seed, args.seed + args.seeds) for name in MODELS]
    with images_of(args.data, args.images) as (data, images):
        runs = [Run(args.runs, f'{name}, seed {seed}', f'claims-{MODELS[name].name}-{seed}',
                    [*MODELS[name].options(), *recipe(args), '--seed', str(seed)], images) for name, seed in kinds]
        results = train_all(runs, data, workers=args.workers)
    return [{'model': name, 'seed': seed, **result} for (name, seed), result in zip(kinds, results, strict=True)]


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
                                      for result in results], **judge(top1, CLAIMS)}


def models_table(record: dict) -> str:
    """Return a table with a line for each model."""
    models = record['models']
    return kinds_table(record, 'model', {name: model['options'] for name, model in models.items()},
                       parameters={name: f'{model["parameters"]:,}' for name, model in models.items()})


def as_text(record: dict) -> str:
    """Return the whole record in Markdown."""
    options = record['options']
    trained, evaluated = (record['images'][split].split(' images')[0] for split in ('training', 'evaluation'))
    return (
        f'# Claims\n\n{origin(record)} The time is the sum of all runs.\n\n{describe_verdicts(record)}\n'
        f'{models_table(record)}\n\n'
        f'{int(trained):,} training images, {plural(options["epochs"], "epoch")}, {options["img_size"]} pixels, batch '
        f'{options["batch_size"]}; {int(evaluated):,} test images. Each run is this command with the options of its '
        f'model and its seed:\n\n```sh\npython train.py DIR {record["recipe"]}\n```\n')


def main() -> None:
    args = parse_command("Say which of the paper's claims hold in small.", 'claims', claims_options)
    _, world = start_alone(args)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that it ends train.py, too
    record = new_claims_record(args, world.device, train_models(args))
    print(claims_table(record), *save(args, record, as_text(record), draw), sep='\n')


if __name__ == '__main__':
    run_script(main)
