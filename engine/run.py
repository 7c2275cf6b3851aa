"""One run from its options: its initial state, and its training to the last epoch."""
import logging
import shlex
import sys
from pathlib import Path

from timm.layers import convert_sync_batchnorm
from torch import nn

from engine.checkpoint import BEST, LAST, copy_best
from engine.compile import compile_model
from engine.ema import PUBLISHED_DECAY, ModelEma, needs_warmup
from engine.log.run_log import RunLog
from engine.loop import Trainer, wrap_model
from engine.objective import create_objective
from engine.optimizer import create_schedule
from engine.recipe import warn
from engine.run_folder import RunLock, check_all_see, lock_patience, resolve_run
from engine.state import TrainState
from engine.writer import CheckpointWriter
from utils import job, signals
from utils.checkpoint_reader import read_checkpoint
from utils.console import plural
from utils.distributed import World, broadcast_from_main, from_main, hang_explained, raise_on_all_ranks
from utils.errors import UserError
from utils.runtime import Precision, describe_environment, move_model

_logger = logging.getLogger(__name__)

# Options that may differ between a run and its continuation without changing what is computed.
RESUME_SAFE_OPTIONS = {
    'data', 'workers', 'pin_mem', 'log_interval', 'output', 'experiment', 'resume', 'download', 'checkpoint_steps',
    'checkpoint_hist', 'save_images', 'tensorboard', 'validation_batch_size_multiplier', 'max_bad_images',
    'max_bad_val_images', 'shard_cache', 'shard_cache_size', 'shard_timeout', 'timeout', 'use_ema',
    'weights_key'}


def create_state(args, model: nn.Module, optimizer, precision: Precision, classes: list[str],
                 world: World) -> TrainState:
    """Create the state of a new run on its device. The average starts as a copy of the weights."""
    if args.sync_bn and world.size > 1:
        model = convert_sync_batchnorm(model)  # timm's, since torch's drops the activations in timm's norms
    move_model(model, world.device, channels_last=args.channels_last)
    # Ranks draw different initial weights. DDP would equalise the model, but not the average.
    broadcast_from_main(model.state_dict().values())
    ema = None
    if args.model_ema:
        decay = PUBLISHED_DECAY if args.model_ema_decay is None else args.model_ema_decay
        ema = ModelEma(model, decay=decay, device='cpu' if args.model_ema_force_cpu else None)
    return TrainState(arch=args.model.lower(), model=model, optimizer=optimizer, scaler=precision.scaler, ema=ema,
                      options=args.as_dict(), classes=classes, world=world)


def run_training(args, state: TrainState, loaders, precision: Precision, *, kind: str) -> TrainState:
    """Continue where --resume says, train to the end of the schedule, and leave the run's folder complete.

    Args:
        kind: 'train' or 'transfer', the part of --output that holds the run's folder.
        loaders: train_loader, prepare_train, val_loader, prepare_val, img_size and class_names, of this rank.
    Returns:
        `state`, at its end.
    Raises:
        UserError: no epoch is left of a run that --resume names, or an epoch of these loaders does not have the step
            of the checkpoint.
    """
    world = state.world
    objective = create_objective(args, state.model, soft_targets=loaders.prepare_train.mixing)
    state.order = loaders.train_loader.sampler.order
    state.images = {'training': loaders.train_loader.fingerprint(), 'evaluation': loaders.val_loader.fingerprint()}
    steps_per_epoch = len(loaders.train_loader) // args.accum_steps
    schedule, num_epochs = create_schedule(state.optimizer, args, steps_per_epoch)
    size = 'x'.join(str(s) for s in dict.fromkeys(loaders.img_size))
    with raise_on_all_ranks():
        found = resolve_run(
            output=args.output, kind=kind, experiment=args.experiment, resume=args.resume,
            name=f'{state.arch}-{size}', restarted=job.was_restarted()) if world.is_main else None
    folder, checkpoint = from_main(found)
    _describe_schedule(args, state, loaders, precision, num_epochs, steps_per_epoch)
    _go_to_start(args, state, checkpoint, steps_per_epoch)
    if state.epoch >= num_epochs:
        # A queue that starts a run again until it ends with 0 is done; so is a launcher, but for the files at the end.
        if args.resume != 'auto' and not job.was_restarted():
            raise UserError(f'nothing is left to train: {plural(state.epoch, "epoch")} of {num_epochs} are done; '
                            'give more --epochs')
        _logger.info('nothing is left to train in %s: all %s are done (another --experiment starts a new run)', folder,
                     plural(num_epochs, 'epoch'))
    if state.step > steps_per_epoch:
        raise UserError(f'the checkpoint is at step {state.step} of its epoch, but an epoch now has {steps_per_epoch}; '
                        'use the --batch-size, --accum-steps and number of processes of the checkpoint')
    compile_model(state.model, args.compile)
    wrapped = wrap_model(objective, world)
    # From here on the folder is this run's, and a signal has the state saved first.
    with raise_on_all_ranks():
        patience = lock_patience(args) if job.was_restarted() else 0
        lock = RunLock(folder, patience=patience) if world.is_main else None
    check_all_see(folder, world)
    _keep_best(state, folder, checkpoint)
    writer = CheckpointWriter(folder, keep=args.checkpoint_hist, resumed=checkpoint) if world.is_main else None
    signals.install()
    _logger.info('run folder: %s', folder)
    environment = {'processes': world.size, 'precision': str(precision)}
    if world.is_main:
        environment = describe_environment(world.device) | environment
    log = RunLog(folder if world.is_main else None, options=state.options, environment=environment,
                 global_step=state.global_step, images_seen=state.images_seen, epoch=state.epoch)
    try:
        with hang_explained():  # innermost: the other ranks ask within seconds who has waited
            Trainer(state, wrapped, loaders, schedule=schedule, num_epochs=num_epochs, precision=precision, args=args,
                    log=log, writer=writer, folder=folder).fit()
        log.finish()
    finally:
        log.close()
        loaders.train_loader.close()
        loaders.val_loader.close()
        if writer:
            writer.wait()
        if lock:
            lock.release()
    _logger.info('checkpoints, curves.png and summary.csv are in %s', folder)
    if world.is_main:
        _logger.info('next:\n%s', '\n'.join(f'  {command}' for command in _next_commands(args, folder)))
    return state


def _describe_schedule(args, state: TrainState, loaders, precision: Precision, num_epochs: int,
                       steps_per_epoch: int) -> None:
    """Say how long the run is and what its average is of, and warn of options that do not go together."""
    world, steps = state.world, num_epochs * steps_per_epoch
    if state.ema:
        state.ema.use_warmup = needs_warmup(args.model_ema_decay, steps)
    if not world.is_main:
        return
    parts = [f'{num_epochs - args.cooldown_epochs} of the schedule']
    parts += [f'the first {args.warmup_epochs} to warm up'] if args.warmup_epochs else []
    parts += [f'then {args.cooldown_epochs} to cool down'] if args.cooldown_epochs else []
    _logger.info('%s of %s: %s', plural(num_epochs, 'epoch'), plural(steps_per_epoch, 'step'), ', '.join(parts))
    sampler = loaders.train_loader.sampler
    per_step = args.batch_size * args.accum_steps * world.size
    if left := sampler.num_samples - steps_per_epoch * per_step:
        _logger.info('a step takes %s: %d of %s are left out in each epoch, others every time',
                     plural(per_step, 'image'), left, plural(sampler.num_samples, 'training image'))
    if state.ema:
        _logger.info('the average of the weights has the decay %g%s', state.ema.decay,
                     ', to which it warms up' if state.ema.use_warmup else '')
    warn(args, images=sampler.num_samples, processes=world.size, steps=steps, device=world.device,
         dtype=precision.dtype)


def _keep_best(state: TrainState, folder: Path, resumed: Path | None) -> None:
    """Bring the best checkpoint along if the run goes on in another folder; else the best is found anew."""
    found = True
    if state.world.is_main and resumed and state.best_epoch is not None:
        found = copy_best(folder, resumed, best_epoch=state.best_epoch)
    if not from_main(found):
        _logger.warning('the best checkpoint so far, of epoch %d, is not beside %s; the best is chosen from here on',
                        (state.best_epoch or 0) + 1, resumed)
        state.forget_best()


def _next_commands(args, folder: Path) -> list[str]:
    """Return the commands that use a run's result, as they are typed where this one was."""
    scripts = Path(sys.argv[0]).parent
    best = folder / BEST if (folder / BEST).exists() else folder / LAST
    with_model = ['--checkpoint', best]
    for name, default in (('dataset', 'folder'), ('val_split', None), ('only_classes', None), ('device', 'auto')):
        if (value := getattr(args, name)) != default:
            with_model += [f'--{name.replace("_", "-")}', value]
    data = [args.data] if args.data else []
    return [shlex.join(['python', *map(str, words)]) for words in (
        [scripts / 'validate.py', *data, *with_model],
        [scripts / 'predict.py', *(['--data', *data] if data else []), '--samples', 20, *with_model],
        [scripts / 'tools/report', folder])]


def _go_to_start(args, state: TrainState, checkpoint: Path | None, steps_per_epoch: int) -> None:
    """Bring the state to where the run starts: to its checkpoint, and to --start-epoch."""
    start_epoch, restarted = args.start_epoch, job.was_restarted()
    if checkpoint:
        content = read_checkpoint(checkpoint, verified=True)
        before = content['args']
        # What the user asked for once is not repeated when the launcher restarts the processes.
        with_optimizer = args.resume_opt or (restarted and not before.get('resume_opt', True))
        state.load_state_dict(content, source=checkpoint, with_optimizer=with_optimizer)
        if state.world.is_main:
            _report_differences(before, state.options)
        _logger.info('resumed from %s, %s', checkpoint, state.position())
        if restarted and before.get('start_epoch') == start_epoch:
            return
    if start_epoch is not None:
        state.start_at(start_epoch, steps_per_epoch)


def _report_differences(before: dict, now: dict) -> None:
    # Options that earlier versions lacked, with the values that describe what they did.
    before = {'compile': '', 'global_batch_size': None, 'fast_transform': False, 'fast_eval': False} | before
    # With --global-batch-size, the parts of a step follow from the number of processes.
    parts = {'batch_size', 'accum_steps'} if now['global_batch_size'] else set()
    changed = [f'{k} {before.get(k)!r} → {now.get(k)!r}' for k in sorted(before.keys() | now.keys())
               if before.get(k) != now.get(k) and k not in RESUME_SAFE_OPTIONS | parts]
    if changed:
        _logger.warning('resumed with options that differ from those of the checkpoint: %s', ', '.join(changed))
