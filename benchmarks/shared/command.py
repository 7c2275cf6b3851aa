"""The command line of a benchmark: common options, parsing, and the process that it starts."""
import logging
from pathlib import Path

from benchmarks.shared.records import PRECISIONS, check_precisions
from options.parser import Options, create_parser, parse_options
from options.scripts import train_parser
from options.types import image_size, positive_int, seed
from utils.disk import ROOT, check_writable
from utils.distributed import World
from utils.errors import UserError
from utils.runtime import start

COMMON: dict[str, dict] = {
    '--img-size': dict(type=image_size, metavar='N', help='input size in pixels, or HxW'),
    '--batch-size': dict(type=positive_int, metavar='N', help='images per step and process'),
    '--precision': dict(choices=list(PRECISIONS), help='number formats, with a table for each'),
    '--device': dict(metavar='NAME', help='auto (a GPU if there is one), cuda, cuda:1 or cpu'),
    '--seed': dict(type=seed, metavar='S', help='seed of weights, images and random orders')}


def common_options(add, **defaults) -> None:
    """Add options of COMMON, by name and default; a list as the default allows several values."""
    for name, default in defaults.items():
        option = '--' + name.replace('_', '-')
        names = ['-b', option] if name == 'batch_size' else [option]
        several = {'nargs': '+'} if isinstance(default, list) else {}
        add(*names, default=default, **several, **COMMON[option])


def parse_command(description: str, name: str, *groups, **settings) -> Options:
    """Parse the command line of a benchmark and mute the log.

    Args:
        name: default of --name.
        groups: functions that add options to a parser.
        settings: options that this benchmark does not offer but shared code reads.
    """
    args = parse_options(create_parser(description, (*groups, record_options), {'name': name, **settings}))
    if Path(args.name).name != args.name:
        raise UserError(f'--name {args.name}: give a name without a folder; the folder is --output')
    check_writable(Path(args.output).expanduser(), '--output')
    logging.disable(logging.INFO)
    return args


def record_options(parser) -> None:
    add = parser.add_argument_group('Record').add_argument
    add('--output', default=str(ROOT / 'benchmarks/results'), metavar='DIR',
        help='folder of the files (default: benchmarks/results)')
    add('--name', metavar='NAME', help='name of the files, without suffix')


def training_options(*words: str) -> Options:
    """Return the options of train.py that `words` give, and its defaults."""
    return parse_options(train_parser(), list(words))


def shared_training_options(args) -> Options:
    """Return the options of train.py with those that `args` has in common."""
    return training_options().replacing(**{name: getattr(args, name) for name in (
        'model', 'batch_size', 'img_size', 'lr', 'workers', 'device', 'seed', 'channels_last') if name in args})


def start_alone(args) -> tuple[Options, World]:
    """Start this process on --device; return the options of its training and its world.

    Raises:
        UserError: the device does not compute in one of --precision.
    """
    training_args = shared_training_options(args)
    world, _ = start(training_args, alone=True)
    names = getattr(args, 'precision', [])
    check_precisions([names] if isinstance(names, str) else names, world.device)
    return training_args, world
