"""The sections of tools/report, from a run's folder, its checkpoint and its data. They say what is missing."""
import io
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from markupsafe import Markup

from data import ImageDataset, Numbered, evenly_spaced
from data.base import Part
from data.pipeline import create_eval_loader, name_classes, open_evaluation_data, resolve_input
from engine.best import Result, best_record
from engine.log.curves import draw_curves
from engine.log.metrics import ARGS, ENVIRONMENT, METRICS, read_environment, read_metrics
from engine.log.result import RESULT, read_result
from engine.predict import Predictions, predict
from figures.attention import draw_attention
from figures.explain import class_relevance, classifier_attention
from figures.mistakes import (
    accuracy_figure,
    confusion_figure,
    confusion_matrix,
    errors_figure,
    reliability_figure,
    shorten,
)
from figures.places import NotSeen
from models import open_trained_model
from options.parser import Options, parse_options
from options.recipes import read_recipe
from options.scripts import SCRIPTS, recorded_parser, validate_parser
from tools.report.page import facts, image, note, picture, table
from utils.console import format_seconds
from utils.disk import require_own
from utils.distributed import World
from utils.errors import UserError
from utils.pictures import image_sheet, new_figure
from utils.weight_sources import BEST, LAST

CHECKPOINTS = (BEST, LAST)
# Sample predictions: right ones, and as many wrong ones.
SHOWN = 8
ATTENTION = 6
# The table of epochs: name in a record, heading, format.
COLUMNS = {
    'train_loss': ('training loss', '.4f'), 'loss': ('loss', '.4f'), 'top1': ('top-1, %', '.2f'),
    'top5': ('top-5, %', '.2f'), 'ema_loss': ('loss (EMA)', '.4f'), 'ema_top1': ('top-1 (EMA), %', '.2f'),
    'ema_top5': ('top-5 (EMA), %', '.2f'), 'macro_f1': ('macro F1, %', '.2f'),
    'ema_macro_f1': ('macro F1 (EMA), %', '.2f'), 'lr': ('learning rate', '.2e'), 'epoch_seconds': ('seconds', ',.1f')}


class Run(NamedTuple):
    """A run's options, the records of its epochs and log lines, and the environment of each start."""
    folder: Path
    options: dict[str, Any]
    epochs: list[dict]
    steps: list[dict]
    starts: list[dict]


class Evaluated(NamedTuple):
    """A model, its evaluation images and its predictions for them."""
    model: Any
    args: Options
    dataset: ImageDataset
    names: list[str]
    predictions: Predictions
    total: int


# --- Reading a run ----------------------------------------------------------------------------------------------------

def open_run(folder: Path) -> Run:
    """Read the folder of a run. Raises UserError if there is none."""
    if not folder.is_dir():
        raise UserError(f'{folder} is no folder; give that of a run, such as output/train/demo')
    if not any((folder / name).exists() for name in (ARGS, METRICS, *CHECKPOINTS)):
        raise UserError(f'{folder} is not the folder of a run: it has no {ARGS}, {METRICS} or {CHECKPOINTS[0]}')
    for name in (ARGS, ENVIRONMENT, RESULT):
        require_own(folder / name)
    records = read_metrics(folder)
    settings = read_recipe(folder / ARGS, recorded_parser(), complete=False) if (folder / ARGS).exists() else {}
    return Run(folder, settings, [record for record in records if record['kind'] == 'epoch'],
               [record for record in records if record['kind'] == 'train'], read_environment(folder))


def evaluation_options(run: Run, given) -> Options:
    """Return the run's options as validate.py would take them, changed by the options `given` to this script."""
    defaults = vars(validate_parser().parse_args([]))
    known = {name: value for name, value in run.options.items() if name in defaults}
    checkpoint = next((run.folder / name for name in CHECKPOINTS if (run.folder / name).exists()), None)
    return Options(**defaults | known).replacing(
        eval_checkpoint=checkpoint and str(checkpoint), pretrained=False, initial_checkpoint='', amp=False,
        use_ema=None, weights_key=None,  # those of the training were for the weights that it started from
        data=given.data or known.get('data'), device=given.device, workers=given.workers, batch_size=given.batch_size,
        validation_batch_size_multiplier=1, class_map=None, download=False)


def open_model(args):
    """Return the run's model. Raises UserError if the run has no checkpoint yet, or it cannot be opened."""
    if not args.eval_checkpoint:
        raise UserError('the run has no checkpoint yet')
    return open_trained_model(args)


def evaluate(model, args, classes, num_samples: int, world, precision) -> Evaluated:
    """Return the predictions for up to `num_samples` evaluation images. Raises UserError if there are none."""
    try:
        whole = open_evaluation_data(args, classes, model.num_classes, world)
    except UserError as error:
        if args.data and Path(args.data).exists():
            raise
        raise UserError(f'{error}; a report downloads nothing: name the folder of the data with --data') from None
    dataset = evenly_spaced(whole, num_samples)
    args = args.replacing(max_bad_val_images=len(dataset))
    loader, prepare = create_eval_loader(args, Numbered(dataset), resolve_input(args, model.pretrained_cfg), world)
    predictions = predict(model, loader, prepare, precision=precision)
    loader.close()
    if not len(predictions.indices):
        raise UserError(f'none of {len(dataset)} evaluation images can be decoded')
    names = name_classes(args, classes or dataset.classes, model.num_classes)
    return Evaluated(model, args, dataset, names, predictions, len(whole))


# --- Sections ---------------------------------------------------------------------------------------------------------

def headline(run: Run) -> tuple[str, str]:
    """Return the title of the page, and the line below it."""
    data = run.options.get('data')
    data = Path(data).name if data else run.options.get('dataset', 'unknown data')
    best = best_of(run)
    model = run.options.get('model', 'model')
    result = f': {best[1]}' if best else ''
    return f'{model} on {data}{result}', f'Run {run.folder.name}, report of {datetime.now():%Y-%m-%d %H:%M}.'


def best_of(run: Run) -> tuple[dict, Result] | None:
    """Return the record of the epoch that the run's best checkpoint is of, and the result that made it the best."""
    return best_record(run.epochs, run.options.get('eval_metric', 'top1'))


def summary(run: Run, model) -> Markup:
    best, last = best_of(run), (run.steps or run.epochs or [{}])[-1]
    size = run.options.get('img_size', 'unknown')
    result = read_result(run.folder)
    early = ', stopped early' if result.get('stopped_early') else ''
    pairs = [('Best', f'{best[1]} after epoch {best[0]["epoch"] + 1} ({best[1].of})' if best
              else 'no epoch has been evaluated' if run.epochs else 'no epoch has ended'),
             *((name.replace('_', ' ').capitalize(), str(result[name])) for name in ('chosen_on', 'evaluated_on')
               if name in result),
             *([('Result', f'{result["top1"]:.2f} % top-1, loss {result["loss"]:.4f}')]
               if all(isinstance(result.get(name), float) for name in ('top1', 'loss')) else []),
             ('Epochs', f'{len(run.epochs)} of {run.options.get("epochs") or "unknown"}{early}'),
             ('Images seen', f'{last["images_seen"]:,}' if 'images_seen' in last else 'not recorded'),
             ('Steps', f'{last["global_step"]:,}' if 'global_step' in last else 'none'),
             ('Time of the epochs', format_seconds(sum(record.get('epoch_seconds', 0) for record in run.epochs))),
             ('Model', run.options.get('model', 'unknown')),
             ('Parameters', f'{sum(p.numel() for p in model.parameters()):,}' if model else 'no checkpoint'),
             ('Image size', '{}x{}'.format(*size) if isinstance(size, tuple) else size)]
    return facts(pairs)


def curves(run: Run) -> Markup:
    if not run.steps and not run.epochs:
        return note('The run has recorded nothing yet.')
    buffer = io.BytesIO()
    draw_curves([*run.steps, *run.epochs], buffer, run.options.get('eval_metric', 'top1'))
    return image(buffer.getvalue(), 'Curves of loss, top-1 accuracy and learning rate against epochs', wide=True)


def epochs(run: Run) -> Markup:
    if not run.epochs:
        return note('No epoch has ended yet.')
    names = [name for name in COLUMNS if any(name in record for record in run.epochs)]
    best, result = best_of(run) or (None, None)
    rows = [[record['epoch'] + 1, f'best: {result.of}' if result and record is best else '',
             *(format(record[name], COLUMNS[name][1]) if isinstance(record.get(name), int | float) else '–'
               for name in names)] for record in run.epochs]
    marked = [number for number, record in enumerate(run.epochs) if record is best]
    return table(['epoch', '', *(COLUMNS[name][0] for name in names)], rows, marked)


def used_options(run: Run) -> Markup:
    if not run.options:
        return note('The run has no args.yaml.')
    script = 'transfer' if 'transfer_ratio' in run.options else 'train'
    defaults = vars(parse_options(SCRIPTS[script](), []))
    changed = [name for name, value in run.options.items() if value != defaults.get(name)]
    ordered = sorted(run.options, key=lambda name: name not in changed)
    rows = [[name, describe_value(run.options[name]), describe_value(defaults.get(name)),
             'changed' if name in changed else ''] for name in ordered]
    return note(f'{len(changed)} of {len(rows)} options differ from the defaults of {script}.py; they come first, '
                'marked.') + table(['option', 'value', 'default', ''], rows, range(len(changed)))


def describe_value(value) -> str:
    """Return the value of an option as people read it."""
    if isinstance(value, bool):
        return 'on' if value else 'off'
    if isinstance(value, list | tuple):
        return ' '.join(describe_value(item) for item in value)
    if isinstance(value, float):
        return f'{value:.6g}'
    return '–' if value is None else str(value) or "''"


def environment(run: Run) -> Markup:
    if not run.starts:
        return note('The run has not recorded what it was computed on.')
    names = list(dict.fromkeys(name for start in run.starts for name in start))
    head = ['', *(f'start {number}' for number in range(1, len(run.starts) + 1))]
    return table(head, ([name, *(start.get(name, '–') for start in run.starts)] for name in names))


def mistakes(evaluated: Evaluated) -> Markup:
    predictions, names = evaluated.predictions, evaluated.names
    targets = evaluated.dataset.targets[predictions.indices]
    matrix = confusion_matrix(targets, predictions.classes[:, 0], len(names))
    return Markup('\n').join([
        note(of_how_many(evaluated)),
        picture(confusion_figure(matrix, names), 'Confusion matrix: true classes in rows, predicted ones in columns'),
        picture(accuracy_figure(matrix, names), 'Bars of the accuracy of each class'),
        picture(reliability_figure(predictions, targets), 'Accuracy against confidence, with the number of images'),
        picture(errors_figure(predictions, targets, names, lambda k: pixels(evaluated.dataset, k)),
                'The wrong predictions that the model is most sure of')])


def of_how_many(evaluated: Evaluated) -> str:
    count, tried = len(evaluated.predictions.indices), len(evaluated.dataset)
    images = 'image' if count == 1 else 'images'
    evenly = '' if tried == evaluated.total else f', evenly spread over all {evaluated.total:,}'
    damaged = f'; {tried - count:,} could not be decoded' if tried > count else ''
    return (f'Of {count:,} evaluation {images}{evenly}, with the weights of '
            f'{Path(evaluated.args.eval_checkpoint).name}{damaged}.')


def pixels(dataset, index: int):
    return np.asarray(dataset.image(index))


def samples(evaluated: Evaluated) -> Markup:
    predictions, names = evaluated.predictions, evaluated.names
    targets = evaluated.dataset.targets[predictions.indices]
    right = predictions.classes[:, 0] == targets
    parts = []
    for rows, title in ((np.flatnonzero(right), 'Right'), (np.flatnonzero(~right), 'Wrong')):
        if not len(rows):
            parts.append(note(f'{title}: none of {len(right):,} images.'))
            continue
        shown = [int(rows[k * len(rows) // SHOWN]) for k in range(SHOWN)] if len(rows) > SHOWN else rows.tolist()
        said = [(names[targets[row]], names[predictions.classes[row, 0]], predictions.probabilities[row, 0])
                for row in shown]
        titles = [f'is {shorten(true, 26)}\nsaid {shorten(guess, 20)} ({100 * probability:.1f} %)'
                  for true, guess, probability in said]
        sheet = image_sheet((pixels(evaluated.dataset, int(predictions.indices[row])) for row in shown), titles,
                            title=f'{title}: evenly spread over all that are')
        description = '; '.join(f'is {true}, said {guess}' for true, guess, _ in said)
        parts.append(picture(sheet, f'{title} predictions: {description}'))
    return Markup('\n').join(parts)


def attention(evaluated: Evaluated) -> Markup:
    model, args, found = evaluated.model, evaluated.args, evaluated.predictions.indices
    device = next(model.parameters()).device
    decodable = Part(evaluated.dataset, found)
    loader, prepare = create_eval_loader(
        args.replacing(workers=0, batch_size=ATTENTION), evenly_spaced(decodable, ATTENTION),
        resolve_input(args, model.pretrained_cfg), World(0, 0, 1, device))
    images, targets = next(iter(loader))
    loader.close()
    try:
        figure = attention_sheet(model, prepare(images, targets)[0], images.permute(0, 2, 3, 1).numpy(),
                                 targets.tolist(), evaluated.names)
    except NotSeen as error:
        return note(f'{error}.')
    return note('Attention rollout: how much of each part of the image reaches the classifier through all blocks. '
                'Below it: how much each part speaks for the class that the model names. Both are shares of the '
                "image's largest value.") + picture(
        figure, f'Attention of {len(images)} images: each image above its attention rollout, and above what speaks for '
                'the class that the model names', wide=True)


def attention_sheet(model, images, pictures, targets, names):
    """Draw pictures [B, H, W, 3] in a row, and below each what its image in `images` [B, C, H, W] shows.

    These are the attention rollout and what speaks for the class that the model names. `targets` are the true classes.
    """
    height = 1.7 * pictures.shape[1] / pictures.shape[2]
    figure = new_figure(11, 3 * height + 0.9)
    axes = figure.subplots(3, len(pictures), squeeze=False)
    for k, shown in enumerate(pictures):
        image = images[k:k + 1]
        seen, reason = classifier_attention(model, image), class_relevance(model, image)[0]
        axes[0, k].imshow(shown, interpolation='nearest')
        axes[0, k].set_title(shorten(names[targets[k]], 22), fontsize=9, parse_math=False)
        axes[0, k].set_axis_off()
        overlay = draw_attention(axes[1, k], shown, seen.rollout, seen.places)
        draw_attention(axes[2, k], shown, reason.tokens, seen.places)
        axes[2, k].set_title(f'for {shorten(names[reason.number], 22)}', fontsize=9, parse_math=False)
    figure.colorbar(overlay, ax=axes[1:], fraction=0.02, pad=0.01)
    return figure
