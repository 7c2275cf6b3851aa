"""One optimizer step. The host never waits for the device in it; it asks for results later.

    step = TrainingStep(state, objective, prepare=prepare, precision=precision, args=args)
    images = step(batches)       as long as there are batches
    step.sync_skipped_steps()    at log steps, before a save, at the end of an epoch
"""
import contextlib
import logging
import math
import sys
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from engine.optimizer import FUSED
from engine.state import TrainState, batch_norm_buffers
from utils.distributed import note_progress
from utils.errors import NotFiniteError, UserError
from utils.faults import fault_point
from utils.runtime import Precision

_logger = logging.getLogger(__name__)

ADVICE = 'A lower --lr, --clip-grad 1 or --amp-dtype bfloat16 helps; --resume auto goes back to the last checkpoint'


class TrainingStep:
    """Called with an iterator of batches, takes one optimizer step from the next `args.accum_steps` batches.

    A step whose gradient is not finite changes no byte but the count of such steps, on any rank: the averaged gradient
    is the same on all ranks. The device detects and skips the step; the host learns of it in `sync_skipped_steps`. If
    the optimizer has no fused form in torch (see create_optimizer), the host waits for the answer in every step.

    Args:
        objective: that of `state.model`, as training calls it (see wrap_model): (images, targets) → loss.
        prepare: (images, targets) from the loader → the same on the device, as the objective takes them.
        args: accum_steps, clip_grad, max_skipped_steps.
    Attributes:
        gradient_norm: of the last step, before clipping; float32 [] on the device.
    """

    def __init__(self, state: TrainState, objective: nn.Module, *, prepare, precision: Precision, args):
        self._state, self._objective = state, objective
        self._prepare, self._precision, self._args = prepare, precision, args
        self._parameters = list(objective.parameters())
        self._statistics = _Statistics(state.model)
        self._is_fused = isinstance(state.optimizer, FUSED) and all(g['fused'] for g in state.optimizer.param_groups)
        self._unsettled: list[tuple[int, int, torch.Tensor]] = []
        self.gradient_norm: torch.Tensor
        _start_momentum(state.optimizer)

    def __call__(self, batches: Iterator) -> torch.Tensor:
        """Take the step; return the images of its last batch as the model saw them, [B, C, H, W]."""
        state, args = self._state, self._args
        note_progress(state.global_step)
        if 'torch._inductor.cudagraph_trees' in sys.modules:  # its import is not worth it if nothing is compiled
            torch.compiler.cudagraph_mark_step_begin()
        self._statistics.keep()
        images, sums = self._compute_gradient(batches)
        fault_point('step')
        state.scaler.unscale_(state.optimizer)
        parameters = [parameter for parameter in self._parameters if parameter.grad is not None]
        self.gradient_norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        skip = ~self.gradient_norm.isfinite()
        if args.clip_grad is not None:
            nn.utils.clip_grads_with_norm_(parameters, args.clip_grad, self.gradient_norm)
        self._step_optimizer(skip)
        self._statistics.restore(skip)
        if state.ema:
            state.ema.update(state.model, skip, state.global_step)
        state.loss_sums += sums.masked_fill(skip, 0)
        state.scaler.update()
        state.optimizer.zero_grad(set_to_none=True)
        self._unsettled.append((state.epoch, state.step, skip))
        state.count_step()
        return images

    def sync_skipped_steps(self) -> None:
        """Wait for the steps since the last call; count and log the skipped ones.

        Raises:
            NotFiniteError: more than `args.max_skipped_steps` were skipped in a row. The error may come some steps
                late, since a skipped step leaves the weights unchanged.
        """
        if not self._unsettled:
            return
        unsettled, self._unsettled = self._unsettled, []
        flags = torch.stack([skip for *_, skip in unsettled]).tolist()
        for (epoch, step, _), skipped in zip(unsettled, flags, strict=True):
            if skipped:
                self._note_skipped(epoch, step)
            else:
                self._state.skipped_in_a_row = 0

    def _compute_gradient(self, batches: Iterator) -> tuple[torch.Tensor, torch.Tensor]:
        """Store the gradient in the parameters; return the last images, and the sum of losses and their number."""
        state, args = self._state, self._args
        sums = torch.zeros_like(state.loss_sums)
        for micro_step in range(args.accum_steps):
            images, targets = self._prepare(*next(batches))
            is_last = micro_step == args.accum_steps - 1
            # Gradients are averaged over ranks once per step, not once per batch.
            wrapped = self._objective if isinstance(self._objective, DistributedDataParallel) else None
            with wrapped.no_sync() if wrapped and not is_last else contextlib.nullcontext():
                with self._precision.autocast():
                    try:
                        loss = self._objective(images, targets)
                    except ValueError as error:
                        raise _explain_norm(error, images) or error from error
                if fault_point('loss') == 'nan':
                    loss = loss * math.nan
                state.scaler.scale(loss / args.accum_steps).backward()
            sums += torch.stack([loss.detach().double() * len(images),
                                 torch.full_like(loss, len(images), dtype=torch.float64)])
        return images, sums

    def _step_optimizer(self, skip: torch.Tensor) -> None:
        # The scaler's own step would not notice a norm that overflows.
        optimizer = self._state.optimizer
        if self._is_fused:
            optimizer.found_inf = skip.float()  # type: ignore[attr-defined]  # as torch's GradScaler sets it
            optimizer.step()
            del optimizer.found_inf  # type: ignore[attr-defined]  # likewise
        elif not skip.item():
            optimizer.step()

    def _note_skipped(self, epoch: int, step: int) -> None:
        state = self._state
        state.skipped_steps += 1
        state.skipped_in_a_row += 1
        if state.skipped_in_a_row > self._args.max_skipped_steps:
            raise NotFiniteError(
                f'the gradient was not finite in {state.skipped_in_a_row} steps in a row, up to epoch {epoch + 1}, '
                f'step {step + 1}; none of them changed a weight. {ADVICE}')
        if state.world.is_main:
            _logger.warning(
                'epoch %d, step %d: the gradient is not finite, the step is skipped (%d so far, %d in a row)',
                epoch + 1, step + 1, state.skipped_steps, state.skipped_in_a_row)


def _explain_norm(error: ValueError, images: torch.Tensor) -> UserError | None:
    """Return what to do if a norm got a single value to compute a variance from; None for another error."""
    if 'Expected more than 1' not in str(error):
        return None
    count, _, height, width = images.shape
    remedy = 'a --batch-size of at least 2, or a larger --img-size' if count == 1 else 'a larger --img-size'
    return UserError(f'a norm of the model gets a single value for each channel, from a batch of {count} and images of '
                     f'{height} × {width} pixels, and cannot normalise it; give {remedy}')


class _Statistics:
    """The statistics of batch norm, which the forward pass changes and a skipped step restores.

    A call takes a few launches for any number of layers, since one tensor holds the copies of all buffers of a dtype.
    """

    def __init__(self, model: nn.Module):
        buffers = batch_norm_buffers(model)
        self._groups = []
        for dtype in dict.fromkeys(buffer.dtype for buffer in buffers):
            alike = [buffer for buffer in buffers if buffer.dtype == dtype]
            copies = torch.empty(2, sum(buffer.numel() for buffer in alike), dtype=dtype, device=alike[0].device)
            old, new = ([part.view_as(buffer) for part, buffer in
                         zip(copy.split([buffer.numel() for buffer in alike]), alike, strict=True)] for copy in copies)
            self._groups.append((alike, copies, old, new))

    def keep(self) -> None:
        """Copy the current statistics."""
        for buffers, _, old, _ in self._groups:
            torch._foreach_copy_(old, buffers)

    def restore(self, skip: torch.Tensor) -> None:
        """Restore the statistics of the last `keep` if `skip`, a bool [] on their device, is True."""
        for buffers, copies, _, new in self._groups:
            torch._foreach_copy_(new, buffers)
            torch.where(skip, copies[0], copies[1], out=copies[1])  # chooses, so that NaN leaves no trace
            torch._foreach_copy_(buffers, new)


def _start_momentum(optimizer: torch.optim.Optimizer) -> None:
    """Initialise SGD's momentum with zeros, which lead to the same first step.

    Fused SGD would write its first momentum into uninitialised memory, which would remain if the step were skipped.
    """
    if not isinstance(optimizer, torch.optim.SGD):
        return
    for group in optimizer.param_groups:
        for parameter in group['params'] if group['momentum'] else ():
            state = optimizer.state[parameter]
            if state.get('momentum_buffer') is None:
                state['momentum_buffer'] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
