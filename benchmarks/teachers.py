"""Train a small T2T-ViT with and without a teacher, and say what token labels and distillation add.

    python -m benchmarks.teachers DIR           # DIR: CIFAR-10's images in train/CLASS and test/CLASS

The teacher is trained first, on the same images, and labels them. Each run of a student is train.py with the options of
the recipe, of the command line and of STUDENTS; all are the same model from the same initial weights, with a classifier
of its tokens. All runs of a seed see the same images in the same order. The result is the top-1 after the last epoch.

The runs stay in --runs, one folder each. The same command skips what is done and continues what was ended.
"""
import shlex
import signal
import sys
from pathlib import Path

import numpy as np
import torch

from benchmarks.shared.claims import Claim, claims_table, describe_verdicts, draw, judge, kinds_table
from benchmarks.shared.command import common_options, parse_command, start_alone
from benchmarks.shared.records import PRECISIONS, new_record, origin, save
from benchmarks.shared.runs import Run, images_of, run_to_the_end, train_all
from engine.checkpoint import LAST
from options.types import count, number, positive, positive_int
from utils.console import plural
from utils.disk import ROOT
from utils.script import run_script

# The recipe of all runs, beside the options of this benchmark: crops and flips, label smoothing, stochastic depth.
COMMON = ('--scale', '0.3', '1', '--train-interpolation', 'bilinear', '--aa', '', '--color-jitter', '0', '--reprob',
          '0', '--mixup', '0', '--cutmix', '0', '--smoothing', '0.1', '--drop-path', '0.1', '--weight-decay', '0.05',
          '--crop-pct', '1', '--sched-on-updates', '--no-model-ema', '--fast-eval', '--no-tensorboard', '--keep', '1',
          '--cooldown-epochs', '0')
STUDENT = ('--model', 't2t_vit_7', '--model-kwargs', 'aux_head=True')
# A convolutional network learns from few images. Its last map has the grid of the student's tokens.
TEACHER = ('--model', 'resnet10t', '--model-kwargs', 'output_stride=16')
ALONE = 'alone'
# What a student learns from, with {labels} and {teacher} for their places.
STUDENTS = {
    ALONE: (),
    'token labels': ('--token-labels', '{labels}'),
    'token labels, as published': ('--token-labels', '{labels}', '--token-label-crop', 'published'),
    'soft distillation': ('--teacher-checkpoint', '{teacher}', '--distill', 'soft'),
    'hard distillation': ('--teacher-checkpoint', '{teacher}', '--distill', 'hard'),
}
CLAIMS = (
    # T2T-ViT-24 with and without token labels, T2T-ViT-7 with and without distillation.
    Claim('Token labels beat training alone', 'token labels', ALONE, 84.2 - 82.3),
    Claim('Straight crops of labels beat published ones', 'token labels', 'token labels, as published', None),
    Claim('Soft distillation beats training alone', 'soft distillation', ALONE, None),
    Claim('Hard distillation beats training alone', 'hard distillation', ALONE, 73.1 - 71.7),
    Claim('Token labels beat hard distillation', 'token labels', 'hard distillation', None),
)


def teachers_options(parser) -> None:
    add = parser.add_argument_group('What is trained').add_argument
    add('data', metavar='DIR', help='data set with class folders in train/ and val/ or test/')
    add('--images', type=count, default=10_000, metavar='N',
        help='training images, the first of each class in equal numbers; 0: all')
    add('--teacher-epochs', type=positive_int, default=10, metavar='N', help='epochs of the teacher')
    add('--epochs', type=positive_int, default=5, metavar='N', help='epochs of each student')
    add('--seeds', type=number(int, low=2), default=3, metavar='N', help='runs of each student')
    add('--lr', type=positive, default=1e-3, metavar='LR', help='highest learning rate')
    add('-j', '--workers', type=count, default=1, metavar='N', help='data loader processes')
    add('--runs', default='output', metavar='DIR', help='folder of the runs, as --output of train.py')
    common_options(add, batch_size=32, img_size=64, precision='fp32', device='auto', seed=1)


def recipe(args, epochs: int) -> list[str]:
    """Return the options of train.py that all runs share."""
    precision = ['--no-amp'] if args.precision == 'fp32' else ['--amp', '--amp-dtype', PRECISIONS[args.precision]]
    return ['--img-size', 'x'.join(map(str, np.ravel(args.img_size))), '-b', str(args.batch_size), '--epochs',
            str(epochs), '--val-interval', str(epochs), '--lr', str(args.lr), '--device', args.device, *precision,
            *COMMON]


# --- Runs -------------------------------------------------------------------------------------------------------------

def train_everything(args) -> tuple[dict, list[dict]]:
    """Return the result of the teacher, and those of all students, each trained or found done."""
    kinds = [(name, seed) for seed in range(args.seed, args.seed + args.seeds) for name in STUDENTS]
    with images_of(args.data, args.images) as (data, images):
        teacher = Run(args.runs, 'teacher', 'teacher', [*TEACHER, *recipe(args, args.teacher_epochs), '--seed',
                                                        str(args.seed)], images)
        [of_teacher] = train_all([teacher], data, workers=args.workers)
        labels = label(args, teacher, data)
        places = {'labels': str(labels), 'teacher': str(teacher.folder / LAST)}
        runs = [Run(args.runs, f'{name}, seed {seed}', f'student-{"-".join(name.replace(",", "").split())}-{seed}',
                    [*STUDENT, *recipe(args, args.epochs), *(word.format(**places) for word in STUDENTS[name]),
                     '--seed', str(seed)], images) for name, seed in kinds]
        results = train_all(runs, data, workers=args.workers)
    return of_teacher, [{'model': name, 'seed': seed, **result}
                        for (name, seed), result in zip(kinds, results, strict=True)]


def label(args, teacher: Run, data: Path) -> Path:
    """Return the folder of the teacher's labels of the training images, made or found."""
    folder = Path(args.runs).expanduser() / 'labels' / teacher.folder.name
    if not (folder / 'manifest.json').exists():
        run_to_the_end([sys.executable, ROOT / 'tools/token_labels.py', data, folder, '--teacher-checkpoint',
                        teacher.folder / LAST, '-j', args.workers, '--device', args.device])
    return folder


# --- Record -----------------------------------------------------------------------------------------------------------

def new_teachers_record(args, device: torch.device, of_teacher: dict, results: list[dict]) -> dict:
    """Return the whole record, whose seconds are those of training and evaluation."""
    top1 = {name: [result['top1'] for result in results if result['model'] == name] for name in STUDENTS}
    teacher, *own = ({name: value for name, value in result.items() if name != 'images'}
                     for result in (of_teacher, *results))
    return {**new_record('teachers', args, device, args.data),
            'seconds': sum(result['seconds'] for result in (of_teacher, *results)), 'images': of_teacher['images'],
            'recipe': shlex.join(recipe(args, args.epochs)), 'student': shlex.join(STUDENT),
            'students': {name: shlex.join(options) for name, options in STUDENTS.items()},
            'teacher': {'options': shlex.join([*TEACHER, '--epochs', str(args.teacher_epochs)]), **teacher},
            'top1': top1, 'results': own, **judge(top1, CLAIMS)}


def as_text(record: dict) -> str:
    """Return the whole record in Markdown."""
    options, teacher, student = record['options'], record['teacher'], record['results'][0]
    trained, evaluated = (record['images'][split].split(' images')[0] for split in ('training', 'evaluation'))
    return (
        f'# Teachers\n\n{origin(record)} The time is the sum of all runs.\n\n{describe_verdicts(record)}\n'
        f'{kinds_table(record, "student learns", record["students"])}\n\n'
        f'The teacher has {teacher["parameters"]:,} parameters and a top-1 of {teacher["top1"]:.2f} % '
        f'(`{teacher["options"]}`), a student {student["parameters"]:,} parameters. {int(trained):,} training images, '
        f'{plural(options["epochs"], "epoch")}, {options["img_size"]} pixels, batch {options["batch_size"]}; '
        f'{int(evaluated):,} test images. Each run is this command with the options of its row and its seed:\n\n'
        f'```sh\npython train.py DIR {record["student"]} {record["recipe"]}\n```\n')


def main() -> None:
    args = parse_command('Say what a teacher adds to a small T2T-ViT.', 'teachers', teachers_options)
    _, world = start_alone(args)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that it ends train.py, too
    record = new_teachers_record(args, world.device, *train_everything(args))
    print(claims_table(record), *save(args, record, as_text(record), draw), sep='\n')


if __name__ == '__main__':
    run_script(main)
