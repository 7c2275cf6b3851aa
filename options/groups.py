"""Command-line options: every script's parser is built here from the same titled groups.

A script asks for the groups it needs, adds a group of its own where it has one, and may change defaults:

    parser = create_parser('Train a model', GROUPS, defaults={'epochs': 60})
    args = parse_options(parser)

A recipe (`-c FILE.yaml`) gives defaults, the command line wins. Underscores and hyphens are the same in option names.
Whatever is wrong raises UserError before anything heavy is imported: this module imports no torch.
"""
import argparse
import ast
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from options.recipes import RecipeParser, read_recipe
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


MAX_IMAGE_SIZE = 8192  # beyond it no memory holds the tokens

# ---------------------------------------------------------------------------------------------------------------------
# Types of values. Each carries `kind`, the Python type a recipe may give for it.

class Converter:
    """A function that reads the text of an option, with the Python type or types that a recipe may give for it."""

    def __init__(self, convert: Callable[[Any], Any], kind: type | tuple[type, ...]):
        self._convert, self.kind = convert, kind

    def __call__(self, text):
        return self._convert(text)


def recipe_kind(*kinds: type) -> Callable[[Callable[[Any], Any]], Converter]:
    """Decorates a function that reads the text of an option."""
    return lambda convert: Converter(convert, kinds if len(kinds) > 1 else kinds[0])


def number(kind: type[int] | type[float], low=None, high=None, above=None, below=None) -> Converter:
    """A converter to int or float that holds bounds: low and high inclusive, `above` and `below` exclusive."""

    @recipe_kind(kind)
    def convert(text):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f'{text!r} is not {"an integer" if kind is int else "a number"}') from None
        # Written so that NaN fails every bound.
        if low is not None and not value >= low:
            raise argparse.ArgumentTypeError(f'{text} is too small: at least {low}')
        if above is not None and not value > above:
            raise argparse.ArgumentTypeError(f'{text} is too small: it must be more than {above}')
        if high is not None and not value <= high:
            raise argparse.ArgumentTypeError(f'{text} is too large: at most {high}')
        if below is not None and not value < below:
            raise argparse.ArgumentTypeError(f'{text} is too large: it must be less than {below}')
        if kind is float and not math.isfinite(value):
            raise argparse.ArgumentTypeError(f'{text} is not a finite number')
        if kind is int and abs(value) >= 2**63:
            raise argparse.ArgumentTypeError(f'{text[:20]}… is too large')
        return value

    return convert


count = number(int, low=0)
positive_int = number(int, low=1)
real = number(float)
rate = number(float, low=0)
positive = number(float, above=0)
probability = number(float, low=0, high=1)
fraction = number(float, low=0, below=1)
seed = number(int, low=0, high=2**32 - 1)


@recipe_kind(int, str)
def image_size(text):
    """'224' → 224; '192x256' (height x width) → (192, 256)."""
    match = re.fullmatch(r'(\d+)(?:x(\d+))?', str(text))
    if not match:
        raise argparse.ArgumentTypeError(f'{text!r} is not an image size: give 224, or height x width as 192x256')
    height, width = int(match[1]), int(match[2] or match[1])
    if not 1 <= min(height, width) <= max(height, width) <= MAX_IMAGE_SIZE:
        raise argparse.ArgumentTypeError(f'{text} is out of range: give 1 to {MAX_IMAGE_SIZE} pixels')
    return height if height == width else (height, width)


@recipe_kind(bool)
def truth(text):
    """'True', 'yes', '1', … → True; 'False', 'no', '0', … → False (the published script read 'False' as true)."""
    if str(text).lower() in ('true', 'yes', 'on', '1'):
        return True
    if str(text).lower() in ('false', 'no', 'off', '0'):
        return False
    raise argparse.ArgumentTypeError(f'{text!r} is neither True nor False')



def keyword(text):
    """'name=value', left as it is: `keywords` reads the values."""
    name, equals, _ = text.partition('=')
    if not equals or not name.isidentifier():
        raise argparse.ArgumentTypeError(f'{text!r} is no argument: give NAME=VALUE, such as aux_weight=0.25')
    return text


def keywords(arguments) -> dict:
    """['aux_weight=0.25', 'norm=None'] → {'aux_weight': 0.25, 'norm': None}; what is no Python literal is a string."""
    values = {}
    for argument in arguments or ():
        name, _, value = argument.partition('=')
        try:
            values[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            values[name] = value
    return values


# ---------------------------------------------------------------------------------------------------------------------
# Parser

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


def resolve_num_classes(args, classes) -> int:
    """The size of the classifier: --num-classes, or one for each class of the data set.

    Raises:
        UserError: the data set has more classes than that.
    """
    if args.num_classes is not None and args.num_classes < len(classes):
        raise UserError(f'--num-classes {args.num_classes}: the data set has {len(classes)} classes; '
                        'give at least as many, or leave the option out')
    return args.num_classes or len(classes)


def share_global_batch(args: Options, processes: int) -> Options:
    """The options with --batch-size and --accum-steps as --global-batch-size asks for on so many processes, if it does.

    Of the ways to make a step of exactly as many images, that of the fewest batches, and of even ones where there are
    any: Mixup pairs images. Without it, `args`.

    Raises:
        UserError: the processes cannot share it, or --accum-steps is given as well.
    """
    total = args.global_batch_size
    if total is None:
        return args
    if args.batch_size * args.accum_steps * processes == total:  # as in the args.yaml of a run
        return args
    if args.accum_steps != 1:
        raise UserError(f'--accum-steps {args.accum_steps} beside --global-batch-size {total}, which finds it by '
                        'itself; leave one of them out, or say --accum-steps 1')
    if total % processes:
        fitting = ', '.join(str(n) for n in range(1, total + 1) if total % n == 0)
        raise UserError(f'--global-batch-size {total}: {processes} processes cannot share it; give '
                        f'{multiples_around(total, processes)}, or start {fitting} of them')
    share = total // processes
    numbers = [n for n in range(-(-share // args.batch_size), share + 1) if share % n == 0]
    accum_steps = next((n for n in numbers if share // n % 2 == 0), numbers[0])
    return args.replacing(batch_size=share // accum_steps, accum_steps=accum_steps)


def multiples_around(number: int, unit: int) -> str:
    """The multiples of `unit` next to `number`, which is none of them, as '8 or 16'; 0 is not one."""
    below = number - number % unit
    return ' or '.join(str(multiple) for multiple in (below, below + unit) if multiple)


# ---------------------------------------------------------------------------------------------------------------------
# Groups. Names and defaults are those of the published main.py; what is ours has no published counterpart.

FLAG = argparse.BooleanOptionalAction


DATASETS = ('folder', 'imagenet', 'cifar10', 'cifar100', 'digits', 'synthetic')


def data_options(parser):
    group = parser.add_argument_group('Data')
    group.add_argument('data', metavar='DIR', nargs='?',
                       help='data set: a folder with train/ and val/ of class folders or shards, or wds:ADDRESS '
                            '(https, s3) of such')
    _add_dataset_options(group.add_argument)


def image_options(parser):
    """Images as files, or as a data set, for scripts that look at single images."""
    group = parser.add_argument_group('Images')
    group.add_argument('images', metavar='IMAGE', nargs='*', help='image files, and folders of such')
    group.add_argument('--data', metavar='DIR', help='instead: the evaluation images of this data set')
    _add_dataset_options(group.add_argument)
    group.add_argument('--samples', type=positive_int, metavar='N',
                       help='take only N images of the data set, evenly spread over it')


def check_images(args) -> None:
    """Raises UserError unless the options name either files or a data set."""
    has_data_set = bool(args.data) or args.dataset != 'folder'
    if bool(args.images) == has_data_set:
        raise UserError('which images? give files or folders, or a data set (--data DIR, --dataset digits)'
                        + (', not both' if args.images else ''))


def _add_dataset_options(add):
    add('--dataset', default='folder', choices=DATASETS,
        help='what is in DIR; digits (embedded) and synthetic (for measuring) need none')
    add('--download', action=FLAG, help='fetch CIFAR where it is missing (default: only where no DIR is given)')
    add('--val-split', metavar='NAME', help='folder of the evaluation images (default: val, validation or test)')
    add('--only-classes', metavar='CLASSES', help="use a part of the classes: '0-4', or names as 'cat,dog'")
    add('-j', '--workers', type=count, default=8, metavar='N', help='data loader processes per rank')
    add('--pin-mem', action=FLAG, default=True, help='page-locked memory, from which a GPU copies while it computes')
    # Its own option: what is left out of an evaluation changes what its numbers are of, as nothing in training does.
    add('--max-bad-val-images', type=count, default=0, metavar='N',
        help='leave out up to N evaluation images that cannot be decoded, per process; they are counted')
    add('--shard-cache', metavar='DIR', help='keep shards from elsewhere here (default: ~/.cache/t2t-vit/shards)')
    add('--shard-cache-size', type=positive, default=100, metavar='GB', help='room for them, on each machine')
    add('--shard-timeout', type=positive, default=300, metavar='SECONDS',
        help='stop when the server of the shards has not answered for so long')


def training_data_options(parser):
    add = parser.add_argument_group('Training data').add_argument
    add('--train-split', default='train', metavar='NAME', help='folder of the training images below DIR')
    add('--max-bad-images', type=count, default=0, metavar='N',
        help='replace up to N training images that cannot be decoded by their neighbours, per process')


def model_options(parser):
    add = parser.add_argument_group('Model and weights').add_argument
    add('--model', default='t2t_vit_14', metavar='MODEL', help='a T2T-ViT or any model of timm, by name')
    add('--pretrained', action=FLAG, default=False, help="start from the model's published weights")
    add('--initial-checkpoint', default='', metavar='PATH', help='start from the weights of this file')
    add('--use-ema', action=FLAG, default=True, help='of a checkpoint that holds both, take the averaged weights')
    add('--num-classes', type=positive_int, metavar='N',
        help="size of the classifier (default: the data set's classes, 1000 for ImageNet)")
    add('--gp', metavar='POOL', help='global pooling (default: that of the model)')
    add('--img-size', type=image_size, default=224, metavar='N', help='input size in pixels, or HxW')
    add('--model-kwargs', type=keyword, nargs='+', metavar='NAME=VALUE',
        help="further arguments of the model, such as aux_weight=0.25")
    add('--channels-last', action=FLAG, default=False, help='channels-last memory layout (for convolutions)')


# Of a checkpoint, model and image size are found out where they are not given.
TRAINED_MODEL = {'model': None, 'img_size': None}


def trained_model_options(parser):
    """Which weights, beside `model_options`, for scripts that use a trained model."""
    add = parser.add_argument_group('Trained model').add_argument
    add('--eval-checkpoint', '--checkpoint', metavar='PATH', help='checkpoint of the model, of any known kind')
    add('--class-map', metavar='FILE',
        help='text file with one class folder a line, in the order of the labels')
    add('-b', '--b', '--batch-size', dest='batch_size', type=positive_int, default=64, metavar='N',
        help='images per batch and process')


def check_trained_model(args) -> None:
    """Raises UserError unless the options name exactly one source of weights."""
    if bool(args.eval_checkpoint) + args.pretrained != 1 or args.initial_checkpoint:
        raise UserError('which weights? give --checkpoint PATH, or --pretrained for the published ones')


def input_options(parser):
    add = parser.add_argument_group('Evaluation input').add_argument
    add('-vb', '--validation-batch-size-multiplier', type=positive_int, default=1, metavar='N',
        help='evaluation batch = N x --batch-size')
    add('--crop-pct', type=positive, metavar='PCT', help='centre crop as a part of the resized image (model: 0.9)')
    add('--mean', type=real, nargs='+', metavar='MEAN', help='mean of the pixels (default: the model\'s)')
    add('--std', type=positive, nargs='+', metavar='STD', help='standard deviation of the pixels')
    add('--interpolation', default='', choices=['', 'bilinear', 'bicubic', 'nearest'], metavar='NAME',
        help='resize of evaluation images: bilinear, bicubic, nearest (default: the model\'s)')
    add('--fast-eval', action=FLAG, default=False,
        help='resize evaluation images as tensors, in half the time: 1 in 300 pixels differs by a level of 255')


def optimizer_options(parser):
    add = parser.add_argument_group('Optimizer').add_argument
    add('-b', '--b', '--batch-size', dest='batch_size', type=positive_int, default=64, metavar='N',
        help='images per process and step')
    add('--accum-steps', type=positive_int, default=1, metavar='N', help='batches whose gradients make one step')
    add('--global-batch-size', type=positive_int, metavar='N',
        help='images of one step over all processes, however many there are: --batch-size becomes the most that one '
             'process takes at a time, and --accum-steps what is needed')
    add('--opt', default='adamw', metavar='NAME', help='adamw, sgd or any optimizer of timm')
    add('--opt-eps', type=positive, metavar='EPS', help="optimizer's epsilon (default: its own)")
    add('--opt-betas', type=fraction, nargs='+', metavar='BETA', help="optimizer's betas (default: its own)")
    add('--momentum', type=rate, default=0.9, metavar='M', help='momentum of SGD')
    add('--weight-decay', '--wd', type=rate, default=0.05, metavar='W',
        help='decay of weights; biases, 1-D parameters and cls_token have none')
    add('--clip-grad', type=positive, metavar='NORM', help='clip the gradient to this norm (default: never)')
    add('--max-skipped-steps', type=count, default=20, metavar='N',
        help='stop after more steps in a row than this whose gradient is not finite, at the next log line; such '
             'steps are skipped')


def schedule_options(parser):
    add = parser.add_argument_group('Learning rate schedule').add_argument
    add('--sched', default='cosine', choices=['cosine', 'tanh', 'step', 'poly'],
        help='shape of the schedule after the warm-up')
    add('--lr', type=rate, default=5e-4, metavar='LR', help='learning rate at the top of the schedule')
    add('--lr-noise', type=rate, nargs='+', metavar='PCT', help='noise on the rate between these parts of the epochs')
    add('--lr-noise-pct', type=rate, default=0.67, metavar='PCT', help='limit of that noise')
    add('--lr-noise-std', type=rate, default=1.0, metavar='STD', help='standard deviation of that noise')
    add('--lr-cycle-mul', type=positive, default=1.0, metavar='MULT', help='each cycle is longer by this factor')
    add('--lr-cycle-limit', type=positive_int, default=1, metavar='N', help='number of cosine cycles')
    add('--warmup-lr', type=rate, default=1e-6, metavar='LR', help='rate of the first warm-up epoch')
    add('--min-lr', type=rate, default=1e-5, metavar='LR', help='rate at the end of the schedule')
    add('--epochs', type=positive_int, default=300, metavar='N', help='epochs of the schedule')
    add('--start-epoch', type=count, metavar='N', help='count the epochs from here')
    add('--decay-epochs', type=positive, default=30, metavar='N', help='epochs between steps (step schedule)')
    add('--warmup-epochs', type=count, default=10, metavar='N', help='epochs of linear warm-up')
    add('--cooldown-epochs', type=count, default=10, metavar='N', help='epochs at --min-lr after the schedule')
    add('--sched-on-updates', action=FLAG, default=False, help='change the rate every step, not every epoch')
    add('--decay-rate', '--dr', type=positive, default=0.1, metavar='RATE', help='factor of a step')


def augmentation_options(parser):
    add = parser.add_argument_group('Augmentation and regularization').add_argument
    add('--aug', action=FLAG, default=True, help='--no-aug: centre crops, unerased; Mixup stays')
    add('--train-crop-mode', default='rrc', choices=['rrc', 'pad'],
        help='rrc: random resized crop; pad: resize, then random crop of the image padded by 1/8')
    add('--scale', type=positive, nargs=2, default=[0.08, 1.0], metavar=('MIN', 'MAX'),
        help='area of a random resized crop')
    add('--ratio', type=positive, nargs=2, default=[3 / 4, 4 / 3], metavar=('MIN', 'MAX'), help='its aspect ratio')
    add('--hflip', type=probability, default=0.5, metavar='P', help='probability of a horizontal flip')
    add('--vflip', type=probability, default=0.0, metavar='P', help='probability of a vertical flip')
    add('--color-jitter', type=rate, default=0.4, metavar='PCT', help='colour jitter; unused beside --aa')
    add('--aa', default='rand-m9-mstd0.5-inc1', metavar='POLICY', help="AutoAugment or RandAugment policy; '' for none")
    add('--aug-splits', type=count, default=0, metavar='N', help='AugMix splits: 0, or at least 2')
    add('--jsd', action=FLAG, default=False, help='Jensen-Shannon divergence over the splits')
    add('--resplit', action=FLAG, default=False, help='do not erase in the first, clean split')
    add('--reprob', type=probability, default=0.25, metavar='P', help='probability of random erasing')
    add('--remode', default='pixel', choices=['pixel', 'rand', 'const'], help='what an erased region is filled with')
    add('--recount', type=positive_int, default=1, metavar='N', help='erased regions per image')
    add('--mixup', type=rate, default=0.8, metavar='ALPHA', help='Mixup alpha; 0 for none')
    add('--cutmix', type=rate, default=1.0, metavar='ALPHA', help='CutMix alpha; 0 for none')
    add('--cutmix-minmax', type=probability, nargs=2, metavar=('MIN', 'MAX'), help='CutMix region, instead of alpha')
    add('--mixup-prob', type=probability, default=1.0, metavar='P', help='probability of mixing a batch')
    add('--mixup-switch-prob', type=probability, default=0.5, metavar='P', help='of those, the part by CutMix')
    add('--mixup-mode', default='batch', choices=['batch', 'pair', 'elem'], help='one mix per batch, pair or image')
    add('--mixup-off-epoch', type=count, default=0, metavar='N', help='no mixing from this epoch on; 0: always')
    add('--smoothing', type=fraction, default=0.1, metavar='S', help='label smoothing')
    add('--train-interpolation', default='random', choices=['random', 'bilinear', 'bicubic'],
        help='resize of training images')
    add('--fast-transform', action=FLAG, default=True,
        help='augment training images as tensors: the same draws, pixels equal but for a level here and there, sooner')
    add('--drop', type=fraction, default=0.0, metavar='P', help='dropout')
    add('--drop-path', type=fraction, default=0.1, metavar='P', help='stochastic depth of the last block')
    add('--drop-block', type=fraction, metavar='P', help='DropBlock, for models that have it')


def batch_norm_options(parser):
    add = parser.add_argument_group('Batch norm (models that have it)').add_argument
    add('--bn-momentum', type=rate, metavar='M', help='momentum of the running statistics')
    add('--bn-eps', type=positive, metavar='EPS', help='epsilon')
    add('--sync-bn', action=FLAG, default=False, help='statistics over all processes')
    add('--dist-bn', default='', choices=['', 'reduce', 'broadcast'],
        help='after an epoch, share the running statistics')


def ema_options(parser):
    add = parser.add_argument_group('Moving average of the weights').add_argument
    add('--model-ema', action=FLAG, default=True, help='keep and evaluate averaged weights')
    add('--model-ema-force-cpu', action=FLAG, default=False, help='keep them in CPU memory; they are not evaluated')
    add('--model-ema-decay', type=probability, default=0.99996, metavar='D', help='decay of the average per step')


def device_options(parser):
    add = parser.add_argument_group('Device and precision').add_argument
    add('--device', default='auto', metavar='NAME', help='auto (a GPU where there is one), cuda, cuda:1 or cpu')
    add('--amp', '--native-amp', action=FLAG, default=False, help='mixed precision')
    add('--amp-dtype', default='auto', choices=['auto', 'bfloat16', 'float16'],
        help='auto: bfloat16 where the device has it, else float16 with loss scaling')
    add('--deterministic', action=FLAG, default=False, help='only kernels that repeat to the bit (GPU)')
    add('--timeout', type=positive, default=1800, metavar='SECONDS',
        help='stop, and name the process to blame, when the others have waited this long for it')
    add('--seed', type=seed, default=42, metavar='S', help='seed of everything random')
    add('--log-interval', type=positive_int, default=50, metavar='N', help='steps between log lines')


def compile_options(parser):
    add = parser.add_argument_group('Compilation').add_argument
    add('--compile', default='', choices=['', 'blocks', 'model', 'graphs', 'autotune'],
        help='torch.compile: blocks (one at a time: ready in a minute), model (as a whole: minutes, and faster), '
             'graphs (and launched as CUDA graphs), autotune (and kernels tried out); results differ by rounding')


def run_options(parser):
    add = parser.add_argument_group('Run, checkpoints, resume').add_argument
    add('--output', default='./output', metavar='DIR', help='runs go to DIR/train/EXPERIMENT')
    add('--experiment', default='', metavar='NAME', help="the run's folder (default: date-model-size)")
    add('--resume', default='', metavar='PATH', help="continue from this checkpoint; 'auto': the newest of this run")
    add('--resume-opt', action=FLAG, default=True, help='--no-resume-opt: take the weights, start the optimizer anew')
    add('--checkpoint-steps', '--recovery-interval', type=count, default=0, metavar='N',
        help='save every N steps within an epoch as well; 0: only after epochs')
    add('--checkpoint-hist', '--keep', type=positive_int, default=2, metavar='N',
        help='newest checkpoints to keep, beside the best')
    add('--eval-metric', default='top1', choices=['top1', 'top5', 'loss'], help='what makes a checkpoint the best')
    add('--save-images', action=FLAG, default=False, help='write the augmented batch as a picture at every log line')
    add('--tensorboard', action=FLAG, default=True, help='write TensorBoard events')
