"""One run from its options: its initial state, and its training to the last epoch."""
import logging
from pathlib import Path

from timm.layers import convert_sync_batchnorm
from torch import nn

from engine.compile import compile_model
from engine.ema import ModelEma
from engine.log.run_log import RunLog
from engine.loop import Trainer, wrap_model
from engine.loss import create_loss
from engine.optimizer import create_schedule
from engine.run_folder import RunLock, check_all_see, lock_patience, resolve_run
from engine.state import TrainState
from engine.writer import CheckpointWriter
from utils import job, signals
from utils.checkpoint_reader import read_checkpoint
from utils.distributed import World, broadcast_from_main, from_main, hang_explained, raise_on_all_ranks
from utils.errors import UserError
from utils.runtime import Precision, describe_environment, move_model

_logger = logging.getLogger(__name__)

# Options that may differ between a run and its continuation without changing what is computed.
RESUME_SAFE_OPTIONS = {
    'data', 'workers', 'pin_mem', 'log_interval', 'output', 'experiment', 'resume', 'download', 'checkpoint_steps',
    'checkpoint_hist', 'save_images', 'tensorboard', 'validation_batch_size_multiplier', 'max_bad_images',
    'max_bad_val_images', 'shard_cache', 'shard_cache_size', 'shard_timeout', 'timeout'}


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
        ema = ModelEma(model, decay=args.model_ema_decay, device='cpu' if args.model_ema_force_cpu else None)
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
        UserError: no epoch is left, or an epoch of these loaders does not have the step of the checkpoint.
    """
    world = state.world
    loss = create_loss(args, soft_targets=loaders.prepare_train.mixing)
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
    _go_to_start(args, state, checkpoint, steps_per_epoch)
    if state.epoch >= num_epochs:
        raise UserError(f'nothing is left to train: epoch {state.epoch} of {num_epochs} would be next; '
                        'give more --epochs')
    if state.step > steps_per_epoch:
        raise UserError(f'the checkpoint is at step {state.step} of its epoch, but an epoch now has {steps_per_epoch}; '
                        'use the --batch-size, --accum-steps and number of processes of the checkpoint')
    compile_model(state.model, args.compile)
    model = wrap_model(state.model, world)
    # From here on the folder is this run's, and a signal has the state saved first.
    with raise_on_all_ranks():
        patience = lock_patience(args) if job.was_restarted() else 0
        lock = RunLock(folder, patience=patience) if world.is_main else None
    check_all_see(folder, world)
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
            Trainer(state, model, loaders, loss=loss, schedule=schedule, num_epochs=num_epochs, precision=precision,
                    args=args, log=log, writer=writer, folder=folder).fit()
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
    return state


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
        _logger.info('resumed from %s: epoch %d, step %d', checkpoint, state.epoch, state.step)
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
