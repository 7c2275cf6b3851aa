"""The linear probe of transfer.py: how well a linear classifier does on the features of a model that does not change.

    check_probe(args, world)
    run_probe(args, model, loaders, precision, classes, world)

The features of the training images are computed once and kept in OUTPUT/features, where later probes find them.
"""
import hashlib
import json
import logging
import time
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import nn

from engine.best import WEIGHTS, better_result
from engine.evaluate import evaluate
from engine.log.run_log import RunLog
from engine.logistic import HELD_OUT, LinearClassifier, fit_lbfgs, fit_sgd, hold_out
from engine.run import create_state, next_commands
from engine.run_folder import RunLock, resolve_run
from engine.state import TrainState
from engine.writer import CheckpointWriter
from utils.console import plural, progress_bar
from utils.disk import make_folder, write_whole
from utils.distributed import World
from utils.errors import UserError
from utils.fingerprint import fingerprint_of
from utils.results import write_results
from utils.runtime import Precision, describe_environment, move_model
from utils.timm_model import TimmModel

_logger = logging.getLogger(__name__)

FEATURES = 'features'
RESULTS = 'probe'


def check_probe(args, world: World) -> None:
    """Raise UserError for options of a run that has no steps to take, resume or share."""
    if world.size > 1:
        raise UserError(f'--linear-probe runs in one process, and these are {world.size}; start it as '
                        'python transfer.py')
    for option, value in (('resume', args.resume), ('freeze', args.freeze), ('layer-decay', args.layer_decay)):
        if value not in (None, ''):
            raise UserError(f'--{option} {value} beside --linear-probe, which trains only the classifier and finds '
                            'the features of an earlier start by itself; leave one of them out')


def run_probe(args, model: TimmModel, loaders, precision: Precision, classes: list[str], world: World) -> dict:
    """Fit the classifier of `model` for each decay, choose one, and write a run's folder with the result.

    The decay is chosen on a held-out part of the training images. A classifier with it is then fitted to all of them,
    and evaluated once.

    Args:
        loaders: train_loader of the training images as an evaluation sees them, val_loader, prepare_train,
            prepare_val and config, a description of their input.
    Returns:
        The result, with the numbers of the evaluation images.
    Raises:
        UserError: the classifier is not one linear layer at the end of the model, or there are too few images.
    """
    started = time.perf_counter()
    size = 'x'.join(map(str, loaders.config.img_size))
    folder, _ = resolve_run(output=args.output, kind='transfer', experiment=args.experiment, resume='',
                            name=f'{args.model.lower()}-{size}')
    head = _linear_classifier(model)
    move_model(model, world.device, channels_last=args.channels_last)
    lock = RunLock(folder, patience=0)
    _logger.info('run folder: %s', folder)
    try:
        result = _probe(args, model, head, loaders, precision, classes, world, folder, started)
    finally:
        loaders.train_loader.close()
        loaders.val_loader.close()
        lock.release()
    _logger.info('next:\n%s', '\n'.join(f'  {command}' for command in next_commands(args, folder)))
    return result


def _probe(args, model: TimmModel, head: nn.Linear, loaders, precision: Precision, classes: list[str], world: World,
           folder: Path, started: float) -> dict:
    features, targets = _features(args, model, head, loaders, precision)
    features, targets = features.to(world.device), targets.to(world.device)
    rows, best = _sweep(args, features, targets, model.num_classes)
    classifier = _fit(args, features, targets, model.num_classes, rows[best]['decay'])
    with torch.no_grad():
        for parameter, fitted in zip((head.weight, head.bias), classifier.of_features(), strict=True):
            parameter.copy_(fitted)
    top1, loss = classifier.judge(features, targets)
    _logger.info('decay %g fits %.2f %% of all %s', rows[best]['decay'], top1, plural(len(targets), 'training image'))
    result = evaluate(model, loaders.val_loader, loaders.prepare_val, precision=precision,
                      log_interval=args.log_interval)
    # No step follows: the optimizer is there because a checkpoint has one.
    state = create_state(args.replacing(model_ema=False), model, torch.optim.SGD(head.parameters(), lr=args.lr),
                         precision, classes, world)
    record = {'epoch': 0, 'images_seen': len(targets), 'train_loss': loss, 'train_top1': top1, **result.as_dict(),
              'decay': rows[best]['decay'], 'epoch_seconds': round(time.perf_counter() - started, 1)}
    _save(args, state, record, folder)
    write_results(folder / RESULTS, {
        'model': args.model, 'solver': args.probe_solver, 'decays': rows, **record,
        'decay_chosen_on': f'1 in {HELD_OUT} of the training images of each class' if len(rows) > 1 else 'nothing',
        'evaluated_on': 'the evaluation images, once', **describe_environment(world.device)}, rows, '--output')
    _logger.info('*** Linear probe: top-1 %.3f %% of %s, with decay %g', result.top1,
                 plural(result.count, 'evaluation image'), rows[best]['decay'])
    return {'best_epoch': None, 'of': 'weights', **record, 'evaluated_on': 'the evaluation images, once'}


def _linear_classifier(model: TimmModel) -> nn.Linear:
    head = model.get_classifier()
    if not isinstance(head, nn.Linear) or head.bias is None:
        what = 'several classifiers' if isinstance(head, tuple | list) else f'a classifier of another kind ({head})'
        raise UserError(f'--linear-probe: {type(model).__name__} has {what}, and the probe is for a single linear '
                        'layer with a bias; say --freeze backbone instead, which trains any')
    return head


# --- Features, on the disk --------------------------------------------------------------------------------------------

def _features(args, model: TimmModel, head: nn.Linear, loaders, precision: Precision
              ) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the features [n, C] of the training images and their targets [n], from the disk if they are there."""
    folder = Path(args.output).expanduser() / FEATURES
    make_folder(folder, '--output')
    path = folder / f'{args.model.lower()}-{_key(args, model, head, loaders, precision)}.safetensors'
    try:
        kept = safetensors.torch.load_file(path)
        _logger.info('features of the training images: %s', path)
        return kept['features'], kept['targets']
    except FileNotFoundError:
        pass
    except (OSError, safetensors.SafetensorError, KeyError) as error:
        _logger.warning('%s cannot be read (%s); the features are computed anew', path, error)
    features, targets = compute_features(model, head, loaders.train_loader, loaders.prepare_train, precision)
    if bad := loaders.train_loader.take_bad_count():
        _logger.warning('%s cannot be decoded and were left out', plural(bad, 'training image'))
    try:
        write_whole(path, safetensors.torch.save({'features': features, 'targets': targets}))
        _logger.info('features of the training images are kept in %s', path)
    except OSError as error:
        _logger.warning('%s could not be written (%s); another start will compute the features anew', path,
                        error.strerror)
    return features, targets


def _key(args, model: TimmModel, head: nn.Linear, loaders, precision: Precision) -> str:
    """Return a name for all that the features depend on: weights, images and targets, input and precision."""
    in_head = {id(parameter) for parameter in head.parameters()}
    weights = {name: tensor for name, tensor in model.state_dict(keep_vars=True).items() if id(tensor) not in in_head}
    return hashlib.sha256(json.dumps([
        fingerprint_of(weights), loaders.train_loader.fingerprint(), loaders.config._asdict(), args.fast_eval,
        str(precision), args.model.lower(), args.model_kwargs, args.gp]).encode()).hexdigest()[:16]


@torch.no_grad()
def compute_features(model: TimmModel, head: nn.Linear, loader, prepare, precision: Precision
                     ) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the inputs of the classifier `head`, float32 [n, C], for the images of `loader`, and their targets [n].

    Raises:
        UserError: the outputs of `head` are not those of the model, or a feature is not finite.
    """
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    hook = head.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0], output)))
    model.eval()
    all_features, all_targets = [], []
    try:
        with progress_bar(total=len(loader), desc='features', unit='batch') as bar:
            for images, targets in loader:
                images, targets = prepare(images, targets)
                seen.clear()
                with precision.autocast():
                    logits = model(images)
                if len(seen) != 1 or seen[0][0].ndim != 2 or not torch.equal(seen[0][1], logits):
                    raise UserError(f'--linear-probe: the linear classifier of {type(model).__name__} is not its last '
                                    'layer; say --freeze backbone instead')
                all_features.append(seen[0][0].float().cpu())
                all_targets.append(targets.cpu())
                bar.update()
    finally:
        hook.remove()
    if not all_features:
        raise UserError('--linear-probe: no training image can be decoded; check the data set')
    features = torch.cat(all_features)
    if not features.isfinite().all():
        raise UserError('--linear-probe: features of the model are not finite; leave --amp out, or say --amp-dtype '
                        'bfloat16')
    return features, torch.cat(all_targets)


# --- Decays -----------------------------------------------------------------------------------------------------------

def _sweep(args, features: torch.Tensor, targets: torch.Tensor, classes: int) -> tuple[list[dict], int]:
    """Fit a classifier for each decay to most of the images; return a row for each, and the best one's index.

    The others choose by accuracy, and of equal ones by loss. A single decay needs no choice.
    """
    decays = sorted(set(args.probe_decays), reverse=True)
    if len(decays) == 1:
        return [{'decay': decays[0]}], 0
    is_held_out = hold_out(targets.cpu(), args.seed).to(targets.device)
    count = int(is_held_out.sum())
    if not count:
        raise UserError(f'--probe-decays: no class has {HELD_OUT} training images, so that some could be held out to '
                        'choose a decay; give a single one, such as --probe-decays 0.01')
    rows: list[dict] = []
    found: LinearClassifier | None = None
    for decay in decays:
        found = _fit(args, features[~is_held_out], targets[~is_held_out], classes, decay, found)
        top1, loss = found.judge(features[is_held_out], targets[is_held_out])
        rows.append({'decay': decay, 'top1': top1, 'loss': loss})
        _logger.info('decay %-8g top-1 %7.3f %%, loss %.4f, on %s held out', decay, top1, loss,
                     plural(count, 'training image'))
    best = min(range(len(rows)), key=lambda index: (-rows[index]['top1'], rows[index]['loss']))
    if best in (0, len(rows) - 1):
        _logger.warning('decay %g is the %s of those tried; others beyond it may do better (--probe-decays)',
                        rows[best]['decay'], 'lowest' if best else 'highest')
    return rows, best


def _fit(args, features: torch.Tensor, targets: torch.Tensor, classes: int, decay: float,
         start: LinearClassifier | None = None) -> LinearClassifier:
    if args.probe_solver == 'sgd':
        return fit_sgd(features, targets, classes, decay, lr=args.lr, momentum=args.momentum,
                       batch_size=args.batch_size, epochs=args.epochs, seed=args.seed)
    return fit_lbfgs(features, targets, classes, decay, start)


# --- The run's folder -------------------------------------------------------------------------------------------------

def _save(args, state: TrainState, record: dict, folder: Path) -> None:
    """Write the checkpoint and the record of a run of a single epoch."""
    result = better_result(record, args.eval_metric)
    state.start_next_epoch()
    state.metric = state.best_metric = result.value
    state.better = state.best_of = WEIGHTS
    state.best_loss, state.best_epoch = result.loss, 0
    state.images_seen = record['images_seen']
    log = RunLog(folder, options=state.options,
                 environment={'processes': 1, **describe_environment(state.world.device)})
    writer = CheckpointWriter(folder, keep=args.checkpoint_hist)
    try:
        log.epoch(record)
        log.sync()
        writer.save(state.state_dict(), state.global_step, is_best=True, must_succeed=True)
        log.finish()
    finally:
        log.close()
        writer.wait()
