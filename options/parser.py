"""Build and run a script's parser.

    parser = create_parser('Train a model', GROUPS, defaults={'epochs': 60})
    args = parse_options(parser)

A recipe (`-c FILE.yaml`) gives defaults; the command line overrides it. Underscores and hyphens are the same in option
names. A mistake raises UserError before anything slow is imported: this module imports no torch.
"""
import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path

from options.elsewhere import ELSEWHERE
from options.paths import check_paths
from options.recipes import Removed, read_recipe
from options.types import count
from utils.console import say_at_once
from utils.errors import UserError, did_you_mean
from utils.versions import check_timm


class Options(argparse.Namespace):
    """The parsed options, as read-only attributes."""

    def __init__(self, **values):
        vars(self).update(values)

    def __setattr__(self, name, value):
        raise AttributeError(f'options are read-only after parsing: {name}')

    def replacing(self, **values) -> 'Options':
        """Return a copy with other values of some options, such as those found out after parsing."""
        return Options(**vars(self) | values)

    def as_dict(self) -> dict:
        """Return the options as plain values, for checkpoints and for a recipe that repeats the run."""
        plain = {name: value for name, value in sorted(vars(self).items()) if name != 'config'}
        for name in ('img_size', 'teacher_img_size'):
            if isinstance(plain.get(name), tuple):
                plain[name] = '{}x{}'.format(*plain[name])
        return plain


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Show a default, unless there is none or the text already says it."""

    def _get_help_string(self, action):
        if action.default in (None, '', argparse.SUPPRESS) or 'default' in action.help:
            return action.help
        return super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """argparse whose errors are a UserError of one line that names the nearest right option."""

    def __init__(self, *, formatter_class=_Help, **kwargs):
        super().__init__(allow_abbrev=False, formatter_class=formatter_class, **kwargs)
        # Defaults that follow from other options: changes a dict of all values, for `parse_options`.
        self.complete: Callable[[dict], None] = lambda values: None

    # Returns the names of the scripts that have an option; options.scripts, which knows them, sets it.
    scripts_with: Callable[[str], list[str]] = staticmethod(lambda option: [])

    def error(self, message):
        unknown = re.match(r'unrecognized arguments: (.*)', message)
        if unknown:
            words = unknown[1].split()
            given = next((w for w in words if w.startswith('-')), words[0]).split('=')[0]
            if given.startswith('-'):
                known = [option for option, action in self._option_string_actions.items()
                         if not isinstance(action, Removed)]
                others = self.scripts_with(given)
                instead = ELSEWHERE.get(given) or (others and f'it is one of {", ".join(others)}')
                message = f'{given}: no such option' + (f'; {instead}' if instead else did_you_mean(given, known))
            else:
                message = f'{given!r}: no option takes this value; quote a value that holds spaces'
        raise UserError(f'{message} (all options: {self.prog} --help)')

    def parse_known_args(self, args=None, namespace=None):
        """Read --eval_checkpoint=a_b as --eval-checkpoint=a_b."""
        words = sys.argv[1:] if args is None else args
        hyphenated = [re.sub('^--[^=]+', lambda name: name[0].replace('_', '-'), word) for word in words]
        return super().parse_known_args(hyphenated, namespace)


# Options of the published main.py and transfer_learning.py that were removed, and what to do instead.
REFUSED = {
    '--apex-amp': 'mixed precision is --amp (--amp-dtype chooses bfloat16 or float16)',
    '--split-bn': 'separate batch norms per augmentation split were for ResNets under AugMix; use --sync-bn or nothing',
    '--num-gpu': 'several GPUs are one process each: ./distributed_train.sh NUM_PROC …',
    '--no-prefetcher': 'batches are normalised on the device when they are used; there is nothing to switch off',
    '--use-multi-epochs-loader': 'loader workers always live through all epochs',
    '--drop-connect': 'stochastic depth is --drop-path',
    '--bn-tf': "TensorFlow's batch norm is --bn-momentum 0.01 --bn-eps 1e-3",
    '--patience-epochs': 'it was for the plateau schedule, which cannot resume; choose another --sched',
}


def create_parser(description: str, groups, defaults: dict | None = None, gone: dict | None = None) -> Parser:
    """Return a parser with options that `groups` add, each a function that takes the parser.

    Args:
        defaults: the defaults that this script changes.
        gone: options that this script does not take, beside REFUSED, and what to do instead.
    """
    parser = Parser(description=description)
    for name, instead in (REFUSED | (gone or {})).items():
        parser.add_argument(name, action=Removed, nargs='?', const=instead, default=argparse.SUPPRESS,
                            help=argparse.SUPPRESS)
    parser.add_argument('-c', '--config', metavar='FILE', help='YAML recipe of defaults: its keys are option names')
    for group in groups:
        group(parser)
    # torch.distributed.launch adds --local-rank, which the environment says too.
    parser.add_argument('--local-rank', type=count, default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    parser.set_defaults(**(defaults or {}))
    return parser


def parse_options(parser: Parser, argv=None) -> Options:
    """Parse the command line over the recipe it names, and return read-only options.

    Args:
        argv: words in place of the command line of this process, whose paths must exist.

    Raises:
        UserError: a mistake in either, a path that does not exist, or a timm that is too old for the scripts.
    """
    take_recipe(parser, argv)
    values = vars(parser.parse_intermixed_args(argv))  # images may follow options
    values.pop('local_rank', None)
    parser.complete(values)
    check_timm()
    args = Options(**values)
    if argv is None:
        check_paths(args)
        say_at_once(f'{parser.prog}: loading torch …')
    return args


def take_recipe(parser: Parser, argv=None, *, complete: bool = True) -> None:
    """Make the recipe that the command line names, if any, the parser's defaults; `complete` is that of read_recipe."""
    find_config = Parser(add_help=False)
    find_config.add_argument('-c', '--config')
    config = find_config.parse_known_args(argv)[0].config
    if config:
        parser.set_defaults(**read_recipe(Path(config), parser, complete=complete))
