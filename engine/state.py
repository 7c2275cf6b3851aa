"""TrainState: everything that a resumed run needs."""
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from engine.best import ENTRIES
from engine.ema import ModelEma
from engine.teacher import Teacher
from utils.distributed import World, gather
from utils.errors import UserError
from utils.runtime import get_rng_state, set_rng_state

_logger = logging.getLogger(__name__)

VERSION = 2
# Entries of a checkpoint with the types of their values.
KINDS = {'version': int, 'arch': str, 'epoch': int, 'step': int, 'global_step': int, 'state_dict': dict,
         'optimizer': dict, 'amp_scaler': dict, 'skipped_steps': int, 'skipped_in_a_row': int, 'ranks': list,
         'args': dict, 'classes': list}
# Attributes that a checkpoint stores as they are.
PLAIN = ('epoch', 'step', 'global_step', 'metric', 'best_metric', 'best_epoch', 'skipped_steps', 'skipped_in_a_row')
# The same, which checkpoints of earlier versions lack.
RECENT = ('better', 'best_loss', 'best_of', 'best_results', 'evaluations_since_best')
# Options that decide which images are trained on.
SPLITTING = ('val_fraction', 'k_fold', 'fold', 'select_fraction')
# Attributes of which every rank has its own.
SUMS = ('loss_sums', 'window_sums', 'bad_images')


@dataclass(kw_only=True, eq=False)
class TrainState:
    """Everything that training changes, and the point it has reached."""
    arch: str  # the model's name
    model: nn.Module  # the raw model, never a DDP or compiled wrapper
    optimizer: torch.optim.Optimizer  # the learning rate is a function of the epoch and the options
    scaler: torch.amp.GradScaler
    ema: ModelEma | None  # the average of all parameters and buffers
    options: dict
    classes: list[str]  # their names
    world: World
    teacher: Teacher | None = None  # frozen: its fingerprint and its projection, which learns, are saved
    order: str = ''  # what determines the order of images beside the options (see TrainSampler); '' if unknown
    labels: str = ''  # of the token labels (TokenLabels.fingerprint), '' without
    images: dict[str, str] = field(default_factory=dict)  # of 'training' and 'evaluation' (ImageDataset.fingerprint)
    epoch: int = 0  # the current one
    step: int = 0  # optimizer steps taken in the epoch
    global_step: int = 0  # optimizer steps taken in the run
    images_seen: int = 0  # in the batches of these steps, of all ranks
    # Steps whose gradient was not finite, in the run and since the last good one, as TrainingStep counts them.
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    metric: float | None = None  # of the last evaluation, the better one of the weights and their average
    better: str | None = None  # the one that it is of
    best_metric: float | None = None
    best_loss: float | None = None
    best_epoch: int | None = None
    best_of: str | None = None  # the weights or their average
    best_results: dict[str, float] | None = None  # their numbers
    evaluations_since_best: int = 0

    def __post_init__(self):
        # Of this rank in the epoch so far: sum of losses and number of images; images that could not be decoded.
        self.loss_sums = torch.zeros(2, dtype=torch.float64, device=self.world.device)
        self.bad_images = torch.zeros(1, dtype=torch.float64, device=self.world.device)
        # The same sums at the last log line, so that an interruption does not change the next one.
        self.window_sums = self.loss_sums.clone()

    def count_step(self) -> None:
        """Count an optimizer step that was taken or skipped."""
        self.step += 1
        self.global_step += 1
        self.images_seen += _images_per_step(self.options, self.world.size)

    def start_next_epoch(self) -> None:
        self.epoch += 1
        self.step = 0
        self._reset_sums()

    def start_at(self, epoch: int, steps_per_epoch: int) -> None:
        """Go to the beginning of `epoch`, whatever was loaded."""
        self.epoch, self.step, self.global_step = epoch, 0, epoch * steps_per_epoch
        self.images_seen = self.global_step * _images_per_step(self.options, self.world.size)
        self.evaluations_since_best = 0
        self._reset_sums()

    def position(self) -> str:
        """Return where the run stands, as people count: 'in epoch 1, after step 7', or 'after epoch 1'."""
        if self.step == 0:
            return f'after epoch {self.epoch}' if self.epoch else 'before the first step'
        return f'in epoch {self.epoch + 1}, after step {self.step}'

    def forget_best(self) -> None:
        self.best_metric = self.best_loss = self.best_epoch = self.best_of = self.best_results = None
        self.evaluations_since_best = 0

    def has_stalled(self, patience: int | None) -> bool:
        """Tell whether the last `patience` evaluations were no better than the best; None: that never counts."""
        return bool(patience) and self.evaluations_since_best >= (patience or 0)

    def _reset_sums(self) -> None:
        for name in SUMS:
            getattr(self, name).zero_()

    def state_dict(self) -> dict[str, Any]:
        """Return the whole state as tensors and plain values, with the names of published checkpoints.

        Every rank must call it, since each has its own random generators and sums.
        """
        ranks = gather({'rng': get_rng_state(self.world.device), 'statistics': [b.cpu() for b in self._statistics()],
                        'threads': torch.get_num_threads(),
                        **{name: getattr(self, name).cpu() for name in SUMS}})
        return {
            'version': VERSION,
            'arch': self.arch,
            **{name: getattr(self, name) for name in (*PLAIN, *RECENT)},
            # For scripts that use the checkpoint: the entry of the better weights.
            'preferred': ENTRIES.get(self.better or ''),
            'images_seen': self.images_seen,
            'state_dict': self.model.state_dict(),
            'state_dict_ema': self.ema.module.state_dict() if self.ema else None,
            'optimizer': self.optimizer.state_dict(),
            'amp_scaler': self.scaler.state_dict(),
            'ranks': ranks,
            'args': self.options,
            'classes': self.classes,
            'order': self.order,
            'images': self.images,
            'labels': self.labels,
            'teacher': self._fingerprint,
            'projection': self.projection.state_dict() if self.projection else None,
        }

    @property
    def projection(self) -> nn.Linear | None:
        """Return what maps the model's features to the teacher's and learns beside the model, if anything does."""
        return self.teacher.projection if self.teacher else None

    def _statistics(self) -> list[torch.Tensor]:
        """Return the running statistics that differ between ranks until --dist-bn reduce averages them."""
        if self.options.get('dist_bn') != 'reduce' or self.world.size == 1:
            return []
        return batch_norm_buffers(self.model) + (batch_norm_buffers(self.ema.module) if self.ema else [])

    def load_state_dict(self, state: dict[str, Any], *, source, with_optimizer: bool = True) -> None:
        """Restore everything, or raise and change nothing.

        Args:
            source: the file, for messages.
            with_optimizer: False keeps the new optimizer and scaler.
        Raises:
            UserError: not a checkpoint of a run, or of another model, number of classes or image size.
        """
        self._check(state, source)
        self._check_teacher(state, source, with_optimizer=with_optimizer)
        # The optimizer first, since torch can still refuse it.
        if with_optimizer:
            self._load_optimizer(state['optimizer'], state['args'], source)
            if state['amp_scaler']:  # empty if the run needed no loss scaling
                self.scaler.load_state_dict(state['amp_scaler'])
        self.model.load_state_dict(state['state_dict'])
        if self.ema:
            # The average of a run that had none starts at the weights.
            self.ema.module.load_state_dict(state['state_dict_ema'] or state['state_dict'])
        if self.projection and self._fits_projection(state):
            self.projection.load_state_dict(state['projection'])
        for name in (*PLAIN, *RECENT):
            setattr(self, name, state.get(name))
        if 'evaluations_since_best' not in state:  # earlier versions evaluated every epoch
            self.evaluations_since_best = self.epoch - 1 - (-1 if self.best_epoch is None else self.best_epoch)
        # Checkpoints of earlier versions lack images_seen.
        before = state['global_step'] * _images_per_step(state['args'], len(state['ranks']))
        self.images_seen = state.get('images_seen', before)
        self._load_rank(state['ranks'])
        for kind, saved in self._changed_images(state) if self.world.is_main else ():
            _logger.warning('the %s images are others than in the checkpoint, or in another order: %s, before %s', kind,
                            self.images[kind], saved)
        labels = state.get('labels', '')  # earlier versions lack it
        if self.world.is_main and labels != self.labels:
            _logger.warning('the token labels are others than in the checkpoint: %s, before %s', self.labels or 'none',
                            labels or 'none')
        if state.get('teacher') != self._fingerprint and self.world.is_main:
            _logger.warning('the run goes on with %s, before with %s', _described_teacher(self._fingerprint),
                            _described_teacher(state.get('teacher')))

    def _load_optimizer(self, saved: dict, before: dict, source) -> None:
        # Options take precedence over the checkpoint, so a changed decay or momentum applies to the rest of the run.
        asked = [{k: v for k, v in group.items() if k != 'params'} for group in self.optimizer.param_groups]
        name = before.get('opt')
        if str(name).lower() != str(self.options.get('opt')).lower():
            raise UserError(f"{source}: its optimizer is {name}, this run's is {self.options['opt']}; "
                            f'say --opt {name}, or --no-resume-opt to start the optimizer anew')
        for option in ('opt_kwargs', 'freeze', 'layer_decay'):
            self._check_option_of_groups(option, before.get(option), source)
        try:
            # This run chooses the implementation, which decides where steps are counted.
            form = {k: asked[0][k] for k in ('fused', 'foreach') if k in asked[0]}
            self.optimizer.load_state_dict({**saved, 'param_groups': [{**g, **form} for g in saved['param_groups']]})
        except (ValueError, KeyError) as error:
            raise UserError(f'{source}: its optimizer state is of another kind ({error}); '
                            'use the same --opt, or --no-resume-opt to start the optimizer anew') from None
        for group, settings in zip(self.optimizer.param_groups, asked, strict=True):
            group.update(settings)
        # Fused kernels need weights and moments in the same memory order, which --channels-last may have changed.
        for parameter, moments in self.optimizer.state.items():
            moments.update({name: torch.empty_like(parameter, dtype=value.dtype).copy_(value)
                            for name, value in moments.items()
                            if isinstance(value, torch.Tensor) and value.shape == parameter.shape})

    def _check_option_of_groups(self, option: str, before, source) -> None:
        """Raise UserError if the optimizer of a checkpoint has other parameters or moments than this run's."""
        now, flag = self.options.get(option), f'--{option.replace("_", "-")}'
        if option == 'layer_decay':  # another factor keeps the groups
            is_same = bool(before) == bool(now)
        else:
            is_same = before == now
        if not is_same:
            was, this = (f'with {flag} {" ".join(value) if isinstance(value, list) else value}'
                         if value not in (None, []) else f'without {flag}' for value in (before, now))
            raise UserError(f'{source}: its optimizer was made {was}, this run is {this}; give the same, or '
                            '--no-resume-opt to start the optimizer anew')

    def _load_rank(self, ranks: list[dict]) -> None:
        if len(ranks) == self.world.size:
            mine = ranks[self.world.rank]
            set_rng_state(mine['rng'], self.world.device)
            before, now = mine.get('threads'), torch.get_num_threads()  # earlier versions did not save them
            if self.world.is_main and self.world.device.type == 'cpu' and before not in (None, now):
                _logger.warning('the checkpoint is of processes with %d thread(s), these have %d: sums are rounded '
                                'otherwise; OMP_NUM_THREADS=%d repeats the same bytes', before, now, before)
            for name in SUMS:
                getattr(self, name).copy_(mine[name])
            for buffer, saved in zip(self._statistics(), mine['statistics'], strict=True):
                buffer.copy_(saved)
            return
        if self.world.is_main:
            _logger.warning('the checkpoint is of %d processes, this run has %d: it resumes at the same point, but '
                            'with other random numbers', len(ranks), self.world.size)
            for name in SUMS:
                getattr(self, name).copy_(sum(rank[name] for rank in ranks))

    def _check(self, state: dict[str, Any], source) -> None:
        if missing := {'state_dict_ema', *KINDS, *PLAIN} - state.keys():
            raise UserError(f'{source}: not a checkpoint that a run can continue from (it has no '
                            f'{", ".join(sorted(missing))}); --initial-checkpoint starts a new run from its weights')
        wrong = [name for name, kind in KINDS.items() if not isinstance(state[name], kind)]
        wrong = wrong or [key for key, value in state['state_dict'].items() if not isinstance(value, torch.Tensor)]
        if wrong:
            raise UserError(f'{source}: not a checkpoint as runs write it ({", ".join(wrong[:3])}); resume another '
                            'checkpoint of the run')
        if state['version'] > VERSION:
            raise UserError(f"{source}: saved by a newer version of this program (format {state['version']}, "
                            f'this one reads up to {VERSION}); update to resume it')
        if state['arch'] != self.arch:
            raise UserError(f"{source}: a checkpoint of {state['arch']}, and this run is of {self.arch}; "
                            f"say --model {state['arch']}, or resume another file")
        if state['classes'] != self.classes:
            raise UserError(f'{source}: trained on {_named(state["classes"])}, this data set has '
                            f'{_named(self.classes)}; resume with the same data, or start a new run with transfer.py')
        before, now = (_splitting(options) for options in (state['args'], self.options))
        if before != now:
            raise UserError(f'{source}: trained {_with(before)}, this run is {_with(now)}: images held out for '
                            f'evaluation would change sides; {_remedy(before, now)}')
        per_step = (_images_per_step(state['args'], len(state['ranks'])),
                    _images_per_step(self.options, self.world.size))
        if state['step'] and per_step[0] != per_step[1]:
            raise UserError(f'{source}: stands in the middle of an epoch of {per_step[0]} images a step, this run has '
                            f'{per_step[1]} (processes x --batch-size x --accum-steps); '
                            f'{_fitting(per_step[0], self.world.size)}')
        if state['step'] and state.get('order') and state['order'] != self.order:  # earlier versions lack it
            raise UserError(f"{source}: stands in the middle of an epoch of {state['order']}, this run has "
                            f'{self.order}, in another order: some images would be repeated, others left out; resume '
                            'with the same data, or from a checkpoint at the end of an epoch')
        changed = dict(self._changed_images(state))
        if state['step'] and 'training' in changed:
            raise UserError(f"{source}: stands in the middle of an epoch of {changed['training']}, this run has "
                            f"{self.images['training']}: other names, or in another order; some images would be "
                            'repeated, others left out; resume with the same data, or from a checkpoint at the end of '
                            'an epoch')
        labels = state.get('labels', '')  # earlier versions lack it
        if state['step'] and labels != self.labels:
            raise UserError(f"{source}: stands in the middle of an epoch of {labels or 'images alone'}, this run has "
                            f"{self.labels or 'no token labels'}: labels of another teacher, or of other images; "
                            'resume with the same --token-labels, or from a checkpoint at the end of an epoch')
        for entry in ('state_dict', 'state_dict_ema') if self.ema and state['state_dict_ema'] else ('state_dict',):
            self._check_weights(state[entry], source)

    def _check_teacher(self, state: dict[str, Any], source, *, with_optimizer: bool) -> None:
        before = state.get('teacher')  # earlier versions had none
        if state['step'] and before != self._fingerprint:
            raise UserError(f'{source}: stands in the middle of an epoch with {_described_teacher(before)}, this run '
                            f'has {_described_teacher(self._fingerprint)}; resume with the same --teacher and '
                            '--teacher-checkpoint, or from a checkpoint at the end of an epoch')
        if self.projection and with_optimizer and not self._fits_projection(state):
            raise UserError(f'{source}: holds no projection to features of this --teacher, nor what the optimizer '
                            'knows of it; resume with the same teacher, or say --no-resume-opt')
        if state.get('projection') and not self.projection and with_optimizer:
            raise UserError(f'{source}: its optimizer knows of a projection to features of a teacher, which this run '
                            'has not; resume with the same teacher and --distill, or say --no-resume-opt')

    def _fits_projection(self, state: dict[str, Any]) -> bool:
        saved = state.get('projection')
        return isinstance(saved, dict) and self.projection is not None and all(
            isinstance(saved.get(name), torch.Tensor) and saved[name].shape == value.shape
            for name, value in self.projection.state_dict().items())

    @property
    def _fingerprint(self) -> str | None:
        return self.teacher.fingerprint if self.teacher else None

    def _changed_images(self, state: dict[str, Any]) -> Iterator[tuple[str, str]]:
        """Yield the kinds of images that differ from those of a checkpoint, with what these were."""
        before = state.get('images')  # earlier versions lack it
        for kind, now in self.images.items():
            if isinstance(before, dict) and isinstance(before.get(kind), str) and before[kind] != now:
                yield kind, before[kind]

    def _check_weights(self, theirs: dict[str, torch.Tensor], source) -> None:
        ours = self.model.state_dict()
        different = [f'{k} {tuple(theirs[k].shape)} in the file, {tuple(ours[k].shape)} here'
                     for k in ours if k in theirs and theirs[k].shape != ours[k].shape]
        different += [f'{k} only in the file' for k in theirs if k not in ours]
        different += [f'{k} only here' for k in ours if k not in theirs]
        if different:
            more = f' and {len(different) - 3} more' if len(different) > 3 else ''
            raise UserError(f'{source}: other sizes than this run: {"; ".join(different[:3])}{more}; give the '
                            '--num-classes, --img-size and --model-kwargs of the checkpoint, or start a new run with '
                            '--initial-checkpoint')


def batch_norm_buffers(model: nn.Module) -> list[torch.Tensor]:
    return [buffer for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)
            for buffer in module.buffers()]


def _described_teacher(fingerprint: str | None) -> str:
    return f'a teacher whose weights have the checksum {fingerprint[:12]}' if fingerprint else 'no teacher'


def _splitting(options: dict) -> dict[str, str]:
    """Return those of SPLITTING that are given, as they are typed."""
    return {f'--{name.replace("_", "-")}': str(options[name]) for name in SPLITTING if options.get(name)}


def _with(given: dict[str, str]) -> str:
    return f'with {_typed(given)}' if given else 'without held-out images'


def _remedy(before: dict[str, str], now: dict[str, str]) -> str:
    """Say how the options `now` become those `before`."""
    surplus = [name for name in now if name not in before]
    remedies = [f'give {_typed(before)}'] if before else []
    return ' and '.join(remedies + ([f'leave {" and ".join(surplus)} out'] if surplus else []))


def _typed(given: dict[str, str]) -> str:
    return ' '.join(f'{name} {value}' for name, value in given.items())


def _images_per_step(options: dict, processes: int) -> int:
    return options.get('batch_size', 0) * options.get('accum_steps', 1) * processes


def _fitting(images: int, processes: int) -> str:
    """Say with which options `processes` make steps of `images`, in as few batches as possible."""
    if images % processes:
        numbers = ', '.join(str(n) for n in range(1, images + 1) if images % n == 0)
        return f'{processes} processes cannot share {images}; start {numbers} of them'
    return f'on {processes} process(es) give -b {images // processes} --accum-steps 1, or another equal product'


def _named(classes: list[str]) -> str:
    return f'{len(classes)} classes ({", ".join(classes[:3])}{", …" if len(classes) > 3 else ""})'
