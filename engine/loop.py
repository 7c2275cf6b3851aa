"""The epoch loop of train.py and transfer.py: train, evaluate, log and save until the last epoch is done."""
import contextlib
import functools
import inspect
import logging
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from timm.utils import distribute_bn
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from engine.ahead import StepsAhead
from engine.best import AVERAGED, PREFIXES, WEIGHTS, better_result
from engine.evaluate import METRICS, MostConfidentErrors, evaluate
from engine.log.run_log import IMAGES_SHOWN, RunLog
from engine.log.sink import FIRST_BATCH, SAVED_BATCH, WRONG_PREDICTIONS
from engine.state import TrainState
from engine.step import ADVICE, TrainingStep
from engine.writer import CheckpointWriter
from utils import signals
from utils.console import format_seconds, progress_bar
from utils.distributed import AsyncMax, World, broadcast_from_main, raise_on_all_ranks, sum_over_ranks
from utils.errors import InterruptedRun, NotFiniteError
from utils.faults import fault_point
from utils.runtime import Precision

_logger = logging.getLogger(__name__)

DDP_PARAMETERS = inspect.signature(DistributedDataParallel).parameters
# Default sizes of DDP's first bucket and its others, in bytes.
FIRST_BUCKET, BUCKET = 2**20, 25 * 2**20


def wrap_model(model: nn.Module, world: World) -> nn.Module:
    """Return a model or an objective as training calls it: wrapped in DDP if there are several ranks."""
    if world.size == 1:
        return model
    device_ids = [world.device] if world.device.type == 'cuda' else None
    _, size = bucket_sizes(sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad))
    # Copies all gradients into their bucket in two launches. Older versions of torch copy them one by one.
    batched: dict[str, Any] = {'batched_grad_copy': True} if 'batched_grad_copy' in DDP_PARAMETERS else {}
    # No initial broadcast: weights are equal since create_state, and ranks may resume with statistics of their own.
    # No broadcast of buffers in each step either: _share_buffers shares statistics at the end of an epoch.
    wrapped = DistributedDataParallel(model, device_ids=device_ids, gradient_as_bucket_view=True, init_sync=False,
                                      bucket_cap_mb=None if size == BUCKET else size / 2**20, **batched)
    wrapped.broadcast_buffers = False
    _settle_buckets(wrapped)
    return wrapped


def bucket_sizes(gradients: float) -> tuple[float, float]:
    """Return the bytes of DDP's first bucket and of its others, for so many bytes of gradients.

    The last bucket is summed after the backward pass. A small model would almost fit into it, so its gradients are
    split into up to eight. No bucket is smaller than DDP's default first one, since torch.compile refuses that.
    """
    if gradients >= 3 * BUCKET:
        return FIRST_BUCKET, BUCKET
    size = max(FIRST_BUCKET, gradients / 8)
    return size, size


def _settle_buckets(wrapped: DistributedDataParallel) -> None:
    """Make DDP arrange its buckets before the first step, by a backward pass of zeros from the last parameter on.

    DDP starts with one bucket, and splits it after its first step in the order of that step's gradients. With three or
    more ranks, rounding depends on the place of a gradient in its bucket. So a resumed run would differ.
    """
    wrapped.reducer.prepare_for_backward([])
    for parameter in reversed([parameter for parameter in wrapped.module.parameters() if parameter.requires_grad]):
        parameter.backward(torch.zeros_like(parameter))  # in the parameter's own layout
    wrapped.zero_grad(set_to_none=True)


class Trainer:
    """Takes a TrainState from where it stands to the end of its schedule.

    Args:
        objective: that of `state.model`, as training calls it (see wrap_model): (images, targets) → loss.
        loaders: train_loader and val_loader of this rank; prepare_train and prepare_val, which bring their batches to
            the device; class_names, for people.
        schedule: sets the learning rates (see create_schedule).
        args: the options of the loop (accum_steps, clip_grad, log_interval, checkpoint_steps, …).
        log: is told how training goes.
        writer: saves checkpoints; None on ranks other than 0.
        folder: the run's, for messages.
    """

    def __init__(self, state: TrainState, objective: nn.Module, loaders, *, schedule, num_epochs: int,
                 precision: Precision, args, log: RunLog, writer: CheckpointWriter | None, folder: Path):
        self.state, self.objective, self.loaders = state, objective, loaders
        self.schedule, self.num_epochs = schedule, num_epochs
        self.precision, self.args = precision, args
        self.log, self.writer, self.folder = log, writer, folder
        self.steps_per_epoch = len(loaders.train_loader) // args.accum_steps
        self._step = TrainingStep(state, objective, prepare=loaders.prepare_train, precision=precision, args=args)
        # Whether a signal asks to stop. All ranks get the same answer, so they stop after the same step. A rank takes
        # part in the exchange after step n with the batches of step n + 2 in hand, or with a signal. All ranks know its
        # result before they begin step n + 2, so none begins a step for which another one waits for data.
        self._signals = AsyncMax()
        self._depth = 2 if state.world.size > 1 else 1
        self._started, self._steps_since_start = time.perf_counter(), 0

    def fit(self) -> None:
        """Train all epochs that are left.

        Raises:
            InterruptedRun: a signal has asked to stop; the state is saved.
        """
        self._started = time.perf_counter()
        with contextlib.closing(self._signals):
            while self.state.epoch < self.num_epochs:
                self._run_epoch()
        state = self.state
        if state.best_metric is not None:
            # Checkpoints of earlier versions do not say what the best is of.
            of = f', of the {state.best_of}' if state.best_of else ''
            _logger.info('*** Best metric: %.4f (%s, epoch %d%s)', state.best_metric, self.args.eval_metric,
                         (state.best_epoch or 0) + 1, of)

    def _run_epoch(self) -> None:
        state = self.state
        epoch_started = time.perf_counter()
        self.schedule.step(state.epoch)
        if state.step:  # the rate of the last step, in case no other one follows
            self.schedule.step_update(state.global_step - 1)
        if self.args.mixup_off_epoch:
            self.loaders.prepare_train.mixup_enabled = state.epoch < self.args.mixup_off_epoch
        training = self._train_epoch()
        own = [(buffer, buffer.clone()) for model in self._evaluated().values() for buffer in model.buffers()]
        self._share_buffers()
        fault_point('evaluate')
        results, errors = self._evaluate(functools.partial(self._stop_in_evaluation, own))
        is_best = self._note_metric(results)
        self.log.epoch({'epoch': state.epoch, 'images_seen': state.images_seen, **training, **results,
                        'lr': self._top_rate(), 'epoch_seconds': round(time.perf_counter() - epoch_started, 1)})
        self._show_errors(errors)
        state.start_next_epoch()
        number = self._signals.conclude(signals.received())
        self._save(is_best=is_best, must_succeed=bool(number) or state.epoch == self.num_epochs)
        if number and state.epoch < self.num_epochs:
            raise self._interrupted(number)

    def _train_epoch(self) -> dict:
        """Train the rest of the epoch; return its mean loss and its bad images, of the whole epoch and all ranks."""
        state, args, loader = self.state, self.args, self.loaders.train_loader
        self.objective.train()
        loader.set_position(state.epoch, state.step * args.accum_steps)
        batches = StepsAhead(loader, steps=self.steps_per_epoch - state.step, batches_per_step=args.accum_steps,
                             depth=self._depth)
        batches.fill()
        self._stop_if_asked(self._signals.conclude)
        bar = progress_bar(total=self.steps_per_epoch, initial=state.step, desc=f'Epoch {state.epoch + 1}')
        started = time.perf_counter(), state.loss_sums.clone(), state.step
        while state.step < self.steps_per_epoch:
            self.schedule.step_update(state.global_step)
            batches_of_step, bad_count = batches.take()
            images = self._step(batches_of_step)
            state.bad_images += bad_count
            bar.update()
            self._steps_since_start += 1
            if state.step == 1 and self.log.wants(FIRST_BATCH):
                self.log.first_batch(self._denormalize(images), state.images_seen)
            if state.step in (1, self.steps_per_epoch) or state.step % args.log_interval == 0:
                if self.log.wants(SAVED_BATCH):
                    self.log.save_batch(self._denormalize(images), state.global_step)
                self._log_line(bar, *started)
                state.window_sums.copy_(state.loss_sums)
                started = time.perf_counter(), state.loss_sums.clone(), state.step
            batches.fill()
            # No request is pending in the work after the last step.
            self._stop_if_asked(self._signals.conclude if state.step == self.steps_per_epoch
                                else self._signals.exchange)
            if args.checkpoint_steps and state.global_step % args.checkpoint_steps == 0:
                self._save()
        bar.close()
        loss, count, bad = sum_over_ranks(torch.cat((state.loss_sums, state.bad_images))).tolist()
        if not count:
            raise NotFiniteError(f'the gradient was not finite in any step of epoch {state.epoch + 1}. {ADVICE}')
        return {'train_loss': loss / count, 'train_bad_images': int(bad)}

    def _denormalize(self, images: torch.Tensor) -> torch.Tensor:
        return self.loaders.prepare_train.denormalize(images[:IMAGES_SHOWN])

    def _stop_if_asked(self, ask: Callable[[int], int]) -> None:
        """Save and raise InterruptedRun if a signal asks any rank to stop."""
        if number := ask(signals.received()):
            self._save(must_succeed=True)
            raise self._interrupted(number)

    def _stop_in_evaluation(self, own: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Stop as after the last step, with the buffers that this rank had then, as a resumed run shares them again."""
        def ask(number: int) -> int:
            if number := self._signals.exchange(number):
                for buffer, value in own:
                    buffer.copy_(value)
            return number

        fault_point('evaluate.batch')
        self._stop_if_asked(ask)

    def _interrupted(self, number: int) -> InterruptedRun:
        return InterruptedRun(number, position=self.state.position(), folder=self.folder)

    def _log_line(self, bar, started: float, sums: torch.Tensor, step: int) -> None:
        """Log the loss since the last line, and the speed of this process since `started`, at `sums` and `step`."""
        state = self.state
        self._step.sync_skipped_steps()
        totals = torch.stack([state.loss_sums - state.window_sums, state.loss_sums - sums])
        (loss, count), (_, count_here) = sum_over_ranks(totals).tolist()
        loss = loss / count if count else None  # None: every step was skipped
        norm = self._step.gradient_norm.item()
        seconds, lr = time.perf_counter() - started, self._top_rate()
        speed = count_here / seconds
        steps_left = (self.num_epochs - state.epoch) * self.steps_per_epoch - state.step
        left = format_seconds((time.perf_counter() - self._started) / self._steps_since_start * steps_left)
        bar.set_postfix_str(f"loss {'none' if loss is None else f'{loss:.4f}'}, lr {lr:.2e}, {speed:.0f} img/s, "
                            f'run left {left}')
        on_gpu = state.world.device.type == 'cuda'
        self.log.train({
            'epoch': state.epoch, 'step': state.step, 'global_step': state.global_step,
            'images_seen': state.images_seen, 'epoch_progress': state.epoch + state.step / self.steps_per_epoch,
            'loss': loss, 'lr': lr, 'rates': {group['name']: group['lr'] for group in state.optimizer.param_groups},
            # Of the last step. JSON has no number for a norm that is not finite.
            'gradient_norm': norm if math.isfinite(norm) else None,
            'skipped_steps': state.skipped_steps, 'images_per_second': round(speed, 1),
            **({'gpu_memory_gib': round(torch.cuda.max_memory_allocated() / 2**30, 3)} if on_gpu else {})},
            steps_per_epoch=self.steps_per_epoch, step_seconds=seconds / (state.step - step), left=left)

    def _top_rate(self) -> float:
        return max(group['lr'] for group in self.state.optimizer.param_groups)

    def _share_buffers(self) -> None:
        """Give all ranks the buffers that are saved, since batch norms have seen other images on every rank."""
        world = self.state.world
        for model in self._evaluated().values():
            if self.args.dist_bn == 'reduce' and world.size > 1:
                distribute_bn(model, world.size, reduce=True)
            broadcast_from_main(model.buffers())

    def _evaluated(self) -> dict[str, nn.Module]:
        """Return the weights, and their average if it is on the same device, by their names."""
        models = {WEIGHTS: self.state.model}
        if self.state.ema and not self.args.model_ema_force_cpu:
            models[AVERAGED] = self.state.ema.module
        return models

    def _evaluate(self, after_batch: Callable[[], None]) -> tuple[dict, dict[str, MostConfidentErrors]]:
        """Return the results of the weights, of their average (`ema_…`) if it is on the same device, and the errors.

        Errors are collected on rank 0 only, and only if the log shows them.
        """
        args, loaders, models = self.args, self.loaders, self._evaluated()
        errors = {name: MostConfidentErrors() for name in models} if self.log.wants(WRONG_PREDICTIONS) else {}
        # Eager: the same numbers as validate.py's, without compiling a second graph.
        found = {name: evaluate(model, loaders.val_loader, loaders.prepare_val, precision=self.precision,
                                log_interval=args.log_interval, errors=errors.get(name), eager=True,
                                after_batch=after_batch, name='Test' if name == WEIGHTS else 'Test (EMA)').as_dict()
                 for name, model in models.items()}
        results = found[WEIGHTS]
        if of_average := found.get(AVERAGED):
            results |= {PREFIXES[AVERAGED] + name: of_average[name] for name in METRICS}
            results['better'] = better_result(results, args.eval_metric).of
        return results, errors

    def _show_errors(self, errors: dict[str, MostConfidentErrors]) -> None:
        sheets: dict[str, tuple[torch.Tensor, Sequence[str]]] = {}
        for name, kept in errors.items():
            if fetched := kept.fetch():
                images, *others = fetched
                sheets[name] = self.loaders.prepare_val.denormalize(images), [
                    f'{self._short_name(target)}\n→ {self._short_name(guess)}, {probability:.1%}'
                    for target, guess, probability in zip(*(other.tolist() for other in others), strict=True)]
        self.log.wrong_predictions(sheets, self.state.images_seen)

    def _short_name(self, label: int, length: int = 20) -> str:
        name = self.loaders.class_names[label]
        return name if len(name) <= length else f'{name[:length - 1]}…'

    def _note_metric(self, results: dict) -> bool:
        """Record the --eval-metric of the better weights; tell whether it is the best so far."""
        state, result = self.state, better_result(results, self.args.eval_metric)
        state.metric, state.better = result.value, result.of
        if not result.is_better_than(state.best_metric, state.best_loss):
            return False
        state.best_metric, state.best_loss, state.best_epoch, state.best_of = (
            result.value, result.loss, state.epoch, result.of)
        return True

    def _save(self, *, is_best: bool = False, must_succeed: bool = False) -> None:
        self._step.sync_skipped_steps()
        self._check_weights()
        content = self.state.state_dict()  # every rank contributes
        # No rank may report a saved state that rank 0 could not write.
        with raise_on_all_ranks() if must_succeed else contextlib.nullcontext():
            if self.writer:
                self.log.sync()  # records reach the disk before their checkpoint
                self.writer.save(content, self.state.global_step, is_best=is_best, must_succeed=must_succeed)

    def _check_weights(self) -> None:
        """Raise NotFiniteError on all ranks if any weight of any rank is not finite: such a state is never saved."""
        state = self.state
        models = [state.model] + ([state.ema.module] if state.ema else [])
        bad = sum(~tensor.isfinite().all().to(state.world.device) for model in models
                  for tensor in model.state_dict().values() if tensor.is_floating_point())
        if sum_over_ranks(bad.double()).item():
            raise NotFiniteError(
                f'a weight is not finite {state.position()}; this state was not saved. {ADVICE}')
