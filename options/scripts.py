"""The parser of each script. Tools, benchmarks and tests take parsers from here, so none of them imports a script.

    args = parse_options(train_parser())
"""
from pathlib import Path

from options import groups
from options.parser import Parser, create_parser
from options.recipes import Removed
from options.types import SETS, boolean, count, positive, positive_int, rate, set_folder

TRAINING = (groups.data_options, groups.training_data_options, groups.model_options, groups.input_options,
            groups.optimizer_options, groups.schedule_options, groups.augmentation_options,
            groups.loss_options, groups.token_label_options, groups.distillation_options, groups.fine_tuning_options,
            groups.batch_norm_options, groups.ema_options, groups.device_options, groups.compile_options,
            groups.selection_options, groups.run_options)
TRAINED_MODEL = (groups.model_options, groups.trained_model_options, groups.input_options)
# Options of evaluation that the published main.py has, and what to do instead.
IN_EVALUATION = {'--tta': 'training evaluates one centre crop of each image; validate.py averages over several (--tta)'}
# Model and image size are read from the checkpoint unless they are given.
FROM_CHECKPOINT = {'model': None, 'img_size': None}


# --- train.py ---------------------------------------------------------------------------------------------------------

def train_parser() -> Parser:
    parser = create_parser('Train a T2T-ViT or any model of timm.', TRAINING, gone=IN_EVALUATION | {
        '--eval-checkpoint': 'evaluation is: python validate.py DIR --model MODEL --eval-checkpoint PATH'})
    parser.complete = _fit_training
    return parser


def _fit_training(values: dict) -> None:
    """Set what was not given: lengths of the published 300 epochs, less in runs of fewer than 100; mixing of images."""
    for name in ('warmup_epochs', 'cooldown_epochs'):
        if values[name] is None:
            values[name] = min(10, values['epochs'] // 10)
    # Token labels come with a mixing of their own.
    for name, usual in (('mixup', 0.8), ('cutmix', 1.0)):
        if values[name] is None:
            values[name] = 0.0 if values['token_labels'] else usual


# --- transfer.py ------------------------------------------------------------------------------------------------------

# The folder that the download of CIFAR-10 makes.
CIFAR_10 = 'cifar-10-batches-py'
# The published recipe: SGD with plain momentum (timm's 'sgd' is Nesterov's), a cosine schedule without warm-up, padded
# crops and flips, plain cross-entropy.
TRANSFER_DEFAULTS = dict(
    dataset=None, opt='momentum', lr=0.01, weight_decay=5e-4, batch_size=128,
    epochs=60, warmup_epochs=0, cooldown_epochs=0, min_lr=2e-4, train_crop_mode='pad', train_interpolation='bilinear',
    interpolation='bilinear', crop_pct=1.0, aa='', color_jitter=0.0, reprob=0.0, mixup=0.0, cutmix=0.0, smoothing=0.0,
    model_ema=False)


def transfer_parser() -> Parser:
    parser = create_parser('Transfer a model to another data set.', (*TRAINING, _transfer_options), TRANSFER_DEFAULTS,
                           gone=IN_EVALUATION)
    parser.complete = _follow_from_weights_and_data
    return parser


def _follow_from_weights_and_data(values: dict) -> None:
    """Set what was not given: a checkpoint to start from means transfer learning, a folder means its own images.

    --layer-decay takes the place of --transfer-ratio. If both are given, rates are multiplied by both.
    """
    if values['transfer_learning'] is None:
        values['transfer_learning'] = bool(values['transfer_model'])
    if values['dataset'] is None:
        is_folder = values['data'] and not (Path(values['data']).expanduser() / CIFAR_10).is_dir()
        values['dataset'] = 'folder' if is_folder else 'cifar10'
    if values['transfer_ratio'] is None:
        values['transfer_ratio'] = 1.0 if values['layer_decay'] else 0.01


def _transfer_options(parser: Parser) -> None:
    add = parser.add_argument_group('Transfer').add_argument
    add('--transfer-learning', type=boolean, nargs='?', const=True, metavar='True|False',
        help='start from --transfer-model or --pretrained weights (default: if --transfer-model is given)')
    add('--transfer-model', metavar='PATH', help='checkpoint to start from; its classifier may have any size')
    add('--transfer-ratio', type=rate, metavar='R',
        help='learning rate of all but the classifier, as a share of --lr (default: 0.01; 1 with --layer-decay)')
    add('--linear-probe', action=groups.FLAG, default=False,
        help='fit only the classifier, to features that are computed once and kept in OUTPUT/features')
    add('--probe-solver', default='lbfgs', choices=['lbfgs', 'sgd'],
        help='linear probe: lbfgs (the optimum), or sgd (with --lr, --momentum, --batch-size and --epochs)')
    add('--probe-decays', type=rate, nargs='+', default=[1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1.0], metavar='W',
        help='linear probe: weight decays to try, on a fifth of the training images')
    add('--pixel-stats', default='imagenet', choices=['imagenet', 'cifar'],
        help="normalisation: of the weights' training (imagenet), or of the target, as published (cifar)")


def recorded_parser() -> Parser:
    """Return a parser of all options that the args.yaml of a run may hold."""
    return create_parser('', (*TRAINING, _transfer_options), gone=IN_EVALUATION)


# --- validate.py ------------------------------------------------------------------------------------------------------

def validate_parser() -> Parser:
    parser = create_parser(
        'Evaluate a model, or several.',
        (groups.data_options, groups.model_options, groups.trained_models_options, groups.input_options,
         groups.device_options, groups.compile_options, _validate_options),
        {**FROM_CHECKPOINT, 'log_interval': 10})
    parser.complete = _settle_checkpoints_and_sets
    return parser


def _settle_checkpoints_and_sets(values: dict) -> None:
    """Tell the first checkpoint from others, and from DIR behind them; set the sets that were not named: all given."""
    checkpoints = values['eval_checkpoint'] or [None]
    if len(checkpoints) > 1 and not values['data'] and not values['set_folders'] and values['dataset'] == 'folder':
        *checkpoints, values['data'] = checkpoints
    values['eval_checkpoint'], *values['further_checkpoints'] = checkpoints
    if values['sets'] is None:
        given = {name.partition('=')[0] for name in values['set_folders'] or ()}
        if values['data'] or values['dataset'] != 'folder' or not given:
            given.add('val')
        values['sets'] = [name for name in SETS if name in given]
    values['sets'] = list(dict.fromkeys(values['sets']))


def _validate_options(parser: Parser) -> None:
    add = parser.add_argument_group('Evaluation').add_argument
    add('--sets', nargs='+', choices=SETS, metavar='SET',
        help=f'evaluation sets of ImageNet: {", ".join(SETS)} (default: val in DIR, and those of --data)')
    add('--data', dest='set_folders', nargs='+', action='extend', type=set_folder, metavar='SET=DIR',
        help='where each of them is (default: val in DIR, real as val)')
    add('--tta', default='', choices=['', 'flip', 'five', 'multi-scale'],
        help='average the probabilities of several views: flip (2), five (corners and centre), multi-scale (3 sizes)')
    add('--per-image', metavar='FILE', help='write the answer to each image to FILE.csv or FILE.parquet')
    add('--results-file', metavar='FILE',
        help='write results to FILE.json and FILE.csv (default: output/validate/DATE-MODEL-SIZE)')


# --- predict.py -------------------------------------------------------------------------------------------------------

def predict_parser() -> Parser:
    # Without --max-bad-val-images, all undecodable images are left out.
    return create_parser(
        'Predict the classes of images.',
        (groups.image_options, *TRAINED_MODEL, groups.device_options, _predict_options),
        {**FROM_CHECKPOINT, 'log_interval': 10, 'max_bad_val_images': None})


def _predict_options(parser: Parser) -> None:
    add = parser.add_argument_group('Prediction').add_argument
    add('-k', '--top-k', type=positive_int, default=5, metavar='K', help='classes to show for each image')
    add('-o', '--results-file', metavar='FILE',
        help='write results to FILE.json and FILE.csv (default: output/predict/DATE-MODEL-SIZE)')


# --- visualize.py -----------------------------------------------------------------------------------------------------

FIGURES_OF_IMAGES = ['attention', 'tokens', 'features']
FIGURES = (*FIGURES_OF_IMAGES, 'mistakes')


def visualize_parser() -> Parser:
    # Silent channels are judged over a batch, whose maps are in memory together.
    # Without --max-bad-val-images, undecodable files are left out, but no image of a data set is.
    return create_parser(
        'Show what a model sees.',
        (groups.image_options, *TRAINED_MODEL, groups.device_options, _visualize_options),
        {**FROM_CHECKPOINT, 'batch_size': 16, 'max_bad_val_images': None})


def _visualize_options(parser: Parser) -> None:
    add = parser.add_argument_group('Pictures').add_argument
    add('--figures', nargs='+', choices=FIGURES, default=FIGURES_OF_IMAGES, metavar='FIGURE',
        help='attention, tokens, features of each image (default: these three), or mistakes on a data set')
    add('--target-class', metavar='CLASS',
        help='attention: show what speaks for this class, a name or a number from 0 (default: the most probable one)')
    add('--blocks', type=positive_int, nargs='+', metavar='N',
        help='attention: show the heads of these blocks, counted from 1 (default: 4 5, as published)')
    add('--token', type=count, nargs=2, metavar=('ROW', 'COL'),
        help='attention, tokens: show this token of the last grid, counted from 0 (default: the middle)')
    add('--layers', nargs='+', metavar='NAME', help='features: layers (default: an early, a middle and a late one)')
    add('--beside', nargs='+', default=[], metavar='MODEL=CHECKPOINT|MODEL=pretrained',
        help='features: show these models too')
    add('-o', '--output-dir', default='output/visualize', metavar='DIR', help='folder for the pictures')


# --- export.py --------------------------------------------------------------------------------------------------------

FORMATS = ('safetensors', 'onnx', 'torch-export', 'aotinductor', 'int8')


def export_parser() -> Parser:
    # The files are for other machines: compare them in float32 on the CPU.
    return create_parser(
        'Export a trained model.', (groups.image_options, *TRAINED_MODEL, _export_options),
        {**FROM_CHECKPOINT, 'batch_size': 16, 'samples': 1000, 'workers': 2, 'device': 'cpu', 'amp': False,
         'amp_dtype': 'auto', 'deterministic': True, 'timeout': 1800, 'seed': 42})


def _export_options(parser: Parser) -> None:
    add = parser.add_argument_group('Export').add_argument
    add('--format', dest='formats', nargs='+', choices=FORMATS, metavar='FORMAT',
        help=f'{", ".join(FORMATS)} (default: all that this machine supports)')
    add('-o', '--output-dir', metavar='DIR', help='folder for the files (default: output/export/MODEL-SIZE)')


# --- tools/doctor -----------------------------------------------------------------------------------------------------

SAMPLES, QUICK_SAMPLES = 1000, 200


def doctor_parser() -> Parser:
    parser = create_parser('Check a long run before it starts.', (*TRAINING, _doctor_options), gone=IN_EVALUATION)
    parser.complete = _fit_training
    return parser


def _doctor_options(parser: Parser) -> None:
    add = parser.add_argument_group('Doctor').add_argument
    add('--processes', type=positive_int, metavar='N',
        help='processes of the run on this machine (default: its GPUs; on a CPU 1, but 2 to exchange a gradient)')
    add('--price', type=positive, metavar='MONEY', help='price of one GPU for an hour')
    add('--quick', action='store_true', help=f'decode {QUICK_SAMPLES} images instead of {SAMPLES:,}, and measure '
                                             'the loader for a shorter time')
    add('--results-file', metavar='FILE', help='also write the findings to FILE.json and FILE.csv')


SCRIPTS = {'train': train_parser, 'transfer': transfer_parser, 'validate': validate_parser, 'predict': predict_parser,
           'visualize': visualize_parser, 'export': export_parser}


def scripts_with(option: str) -> list[str]:
    """Return the file names of the scripts that have an option: ['transfer.py'] for --transfer-model."""
    return [f'{name}.py' for name, create in SCRIPTS.items()
            if not isinstance(create()._option_string_actions.get(option), Removed | None)]


Parser.scripts_with = staticmethod(scripts_with)
