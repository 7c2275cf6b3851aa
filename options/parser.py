"""Build and run a script's parser.

    parser = create_parser('Train a model', GROUPS, defaults={'epochs': 60})
    args = parse_options(parser)

A recipe (`-c FILE.yaml`) gives defaults, the command line wins. Underscores and hyphens are the same in option names.
A mistake raises UserError before anything heavy is imported: this module imports no torch.
"""
import argparse
import re
import sys
from pathlib import Path

from options.recipes import RecipeParser, read_recipe
from options.types import count
from utils.errors import UserError, did_you_mean
from utils.versions import check_timm


class Options(argparse.Namespace):
    """The parsed options: attributes to read; setting one after parsing is a bug and raises."""

    def __setattr__(self, name, value):
        if self.__dict__.get('_frozen'):
            raise AttributeError(f'options are read-only after parsing: {name}')
        super().__setattr__(name, value)

    def freeze(self) -> 'Options':
        self._frozen = True
        return self

    def replacing(self, **values) -> 'Options':
        """A copy with other values of some options: what was found out after parsing."""
        return Options(**{k: v for k, v in vars(self).items() if k != '_frozen'} | values).freeze()

    def as_dict(self) -> dict:
        """The options as plain values, for checkpoints and for a recipe that repeats the run."""
        plain = {k: v for k, v in vars(self).items() if not k.startswith('_') and k != 'config'}
        if isinstance(plain.get('img_size'), tuple):
            plain['img_size'] = '{}x{}'.format(*plain['img_size'])
        return dict(sorted(plain.items()))


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows a default where there is one to show and the text does not say it in better words."""

    def _get_help_string(self, action):
        if action.default in (None, '', argparse.SUPPRESS) or 'default' in action.help:
            return action.help
        return super()._get_help_string(action)


class Parser(RecipeParser):
    """argparse, but an error is a UserError of one line that names the nearest right option.

    `gone`: the options that are refused, and for each the line that says what to do instead.
    """

    def __init__(self, *, formatter_class=_Help, gone: dict[str, str] | None = None, **kwargs):
        super().__init__(allow_abbrev=False, formatter_class=formatter_class, **kwargs)
        self.gone = gone or {}
        for name, instead in self.gone.items():
            self.add_argument(name, action=Refuse, nargs='?', const=instead, default=argparse.SUPPRESS,
                              help=argparse.SUPPRESS)

    def error(self, message):
        unknown = re.match(r'unrecognized arguments: (.*)', message)
        if unknown:
            words = unknown[1].split()
            given = next((w for w in words if w.startswith('-')), words[0]).split('=')[0]
            if given.startswith('-'):
                known = self._option_string_actions.keys() - self.gone
                message = f'{given}: no such option{did_you_mean(given, known)}'
            else:
                message = f'{given!r}: no option takes this value; quote a value that holds spaces'
        raise UserError(f'{message} (all options: {self.prog} --help)')

    def parse_known_args(self, args=None, namespace=None):
        args = sys.argv[1:] if args is None else list(args)
        return super().parse_known_args([_hyphens(a) for a in args], namespace)


def _hyphens(argument: str) -> str:
    """--eval_checkpoint=a_b → --eval-checkpoint=a_b."""
    if not argument.startswith('--'):
        return argument
    name, equals, value = argument.partition('=')
    return name.replace('_', '-') + equals + value


class Refuse(argparse.Action):
    """An option of the published code that means nothing any more: the error says what took its place."""

    def __call__(self, parser, namespace, values, option_string=None):
        parser.error(f'{option_string} is gone: {self.const}')


# What the published main.py and transfer_learning.py took and this system does not, and what to do instead.
REFUSED = {
    '--apex-amp': 'mixed precision is --amp (--amp-dtype chooses bfloat16 or float16)',
    '--split-bn': 'separate batch norms per augmentation split were for ResNets under AugMix; use --sync-bn or nothing',
    '--num-gpu': 'several GPUs are one process each: ./distributed_train.sh NUM_PROC …',
    '--no-prefetcher': 'batches are normalised on the device at the moment of use; nothing to switch off',
    '--use-multi-epochs-loader': 'loader workers live through all epochs by themselves',
    '--drop-connect': 'stochastic depth is --drop-path',
    '--bn-tf': "TensorFlow's batch norm is --bn-momentum 0.01 --bn-eps 1e-3",
    '--patience-epochs': 'it was for the plateau schedule, which cannot resume; choose another --sched',
    '--tta': 'the published code never fed it augmented images; evaluation is one centre crop',
}


def create_parser(description: str, groups, defaults: dict | None = None, gone: dict | None = None) -> Parser:
    """A parser with `groups` (functions that take a parser and add options), some defaults changed.

    `gone` is, beside REFUSED, what this script does not take and the line that says what to do instead.
    """
    parser = Parser(description=description, gone=REFUSED | (gone or {}))
    parser.add_argument('-c', '--config', metavar='FILE', help='YAML recipe of defaults: its keys are option names')
    for group in groups:
        group(parser)
    # torch.distributed.launch adds --local-rank to the command line; torchrun's environment says the same.
    parser.add_argument('--local-rank', type=count, default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    parser.set_defaults(**(defaults or {}))
    return parser


def parse_options(parser: Parser, argv=None) -> Options:
    """Parses the command line over the recipe it names; read-only from then on.

    Raises:
        UserError: a mistake in either, or a timm that is too old for what scripts import next.
    """
    take_recipe(parser, argv)
    args = parser.parse_intermixed_args(argv, Options())  # images may stand behind options
    vars(args).pop('local_rank', None)
    check_timm()
    return args.freeze()


def take_recipe(parser: Parser, argv=None, *, complete: bool = True) -> None:
    """Makes the recipe that the command line names, if it does, the parser's defaults; `complete` as of read_recipe."""
    find_config = Parser(add_help=False)
    find_config.add_argument('-c', '--config')
    config = find_config.parse_known_args(argv)[0].config
    if config:
        parser.set_defaults(**read_recipe(Path(config), parser, complete=complete))
