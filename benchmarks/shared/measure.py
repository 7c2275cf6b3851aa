"""What the benchmarks measure: formulations of a model that step, and how they take turns and are timed and profiled.

    contenders = list_contenders('t2t_vit_14', args)
    measure(contenders, start_training, args, training_args, 'bf16', world, 'a title for the bar')
    rows = [contender.row(args.batch_size) for contender in contenders]

benchmarks/step.py says what the figures are.
"""
import gc
import itertools
import math
import random
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np
import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.data.mixup import mixup_target
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.shared.published import PublishedStep, published_model, published_optimizer
from benchmarks.shared.records import precision_of
from engine.compile import compile_model
from engine.loss import create_loss
from engine.optimizer import create_optimizer, param_groups
from engine.run import create_state
from engine.step import TrainingStep
from models import create_model_from_options
from options.parser import parse_options
from options.scripts import train_parser
from options.types import image_size
from utils.console import progress_bar
from utils.distributed import World
from utils.errors import UserError
from utils.runtime import Precision, move_model, seed_everything
from utils.timm_model import TimmModel

CONTENDERS = ('published', 'default', 'compiled')
TASKS = {'train': 'training', 'inference': 'inference'}
NUM_CLASSES = 1000
LEAST_ROUNDS = 3
SAVE_SECONDS = 5  # between two saves of a table that is not finished
MORE_STEPS = 4  # after a last one that was not finite
STEPS_PROFILED = 2  # the published step keeps the gradients of one step during the next
# Operators that compute nothing: views, and memory that nothing is written to.
NOT_COMPUTING = {'alias', 'as_strided', 'chunk', 'detach', 'detach_', 'empty', 'empty_like', 'empty_strided', 'expand',
                 'expand_as', 'is_nonzero', 'item', 'lift_fresh', 'narrow', 'numpy_T', 'permute', 'record_stream',
                 'reshape', 'resize_', 'resolve_conj', 'resolve_neg', 'result_type', 'select', 'set_', 'slice', 'split',
                 'split_with_sizes', 'squeeze', 'squeeze_', 't', 'to', 'transpose', 'unbind', 'unflatten', 'unfold',
                 'unsqueeze', 'view', 'view_as', '_local_scalar_dense', '_reshape_alias', '_unsafe_view'}
LAUNCHES = ('cudaLaunch', 'cuLaunch', 'cudaGraphLaunch', 'cudaMemcpy', 'cudaMemset')


@dataclass
class Running:
    """A contender that can step.

    Attributes:
        step: steps once.
        held: lists the tensors that it keeps between steps, but for gradients.
        is_finite: whether the last step was.
        model: the contender's.
    """
    step: Callable[[], object]
    held: Callable[[], list[torch.Tensor]]
    is_finite: Callable[[], bool]
    model: nn.Module


@dataclass
class Contender:
    """One row of a table; `error` says in a line why it is not measured, where it is not."""
    label: str
    model: str
    img_size: int | tuple[int, int]
    is_published: bool = False
    is_compiled: bool = False
    running: Running | None = None
    steps_per_window: int = 1
    milliseconds: list[float] = field(default_factory=list)
    measured: dict = field(default_factory=dict)
    error: str | None = None

    def fail(self, error: Exception) -> None:
        first = (str(error).strip().splitlines() or ['no reason given'])[0]
        is_full = isinstance(error, torch.OutOfMemoryError)
        self.error = 'out of memory' if is_full else first if isinstance(error, UserError) else (
            f'{type(error).__name__}: {first}'[:200])
        self.running, self.milliseconds = None, []

    def row(self, batch_size: int) -> dict:
        """What the record has of it."""
        row = {'contender': self.label, 'model': self.model, 'img_size': self.img_size, 'compiled': self.is_compiled}
        if self.error:
            return {**row, 'error': self.error}
        if not self.milliseconds:
            return {**row, **self.measured, 'error': 'the run ended before its turn'}
        low, median, high = np.percentile(self.milliseconds, (25, 50, 75)).tolist()
        return {**row, 'images_per_second': 1000 * batch_size / median,
                'milliseconds': {'median': median, 'quartiles': [low, high]}, **self.measured,
                'steps_per_window': self.steps_per_window, 'windows_milliseconds': self.milliseconds}


def training_options(*words: str):
    """The options of train.py, those that `words` say and the defaults."""
    return parse_options(train_parser(), list(words))


def list_contenders(model: str, args) -> list[Contender]:
    """The rows of a model's table, in order."""
    rows = [Contender(name, model, args.img_size, is_published=name == 'published', is_compiled=name == 'compiled')
            for name in CONTENDERS if name in args.contenders]
    for name_and_size in args.peers:
        name, _, size = name_and_size.partition('@')
        size = image_size(size) if size else args.img_size
        label = name if size == args.img_size else f'{name} at {size}'
        rows += [Contender(label + ', compiled' * is_compiled, name, size, is_compiled=is_compiled)
                 for kind, is_compiled in (('default', False), ('compiled', True)) if kind in args.contenders]
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# Steps

def make_batch(contender: Contender, args, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Images [B, 3, H, W] of normalised random pixels, and soft targets [B, NUM_CLASSES] as Mixup makes them."""
    generator = torch.Generator().manual_seed(args.seed)
    size = (contender.img_size,) * 2 if isinstance(contender.img_size, int) else contender.img_size
    mean, std = (torch.tensor(values)[:, None, None] for values in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    images = (torch.rand(args.batch_size, 3, *size, generator=generator) - mean) / std
    labels = torch.randint(NUM_CLASSES, (args.batch_size,), generator=generator)
    layout = torch.channels_last if args.channels_last else torch.contiguous_format
    return (images.to(device).contiguous(memory_format=layout),
            mixup_target(labels, NUM_CLASSES, lam=0.7, smoothing=0.1).to(device))


def start_training(contender: Contender, args, training_args, precision: Precision, world: World, *,
                   wrap: Callable[[nn.Module], nn.Module] = lambda model: model) -> Running:
    """A contender whose step is one of training, from fresh weights; its model is called as `wrap` returns it."""
    model = _create_model(contender, training_args)
    make_optimizer = published_optimizer if contender.is_published else _default_optimizer
    state = create_state(training_args, model, make_optimizer(model, training_args), precision, [], world)
    compile_model(state.model, args.compile if contender.is_compiled else '')
    step: PublishedStep | TrainingStep = (PublishedStep if contender.is_published else TrainingStep)(
        state, wrap(state.model), prepare=lambda *batch: batch,
        loss=create_loss(training_args, soft_targets=True), precision=precision, args=training_args)
    state.model.train()
    batches, count = itertools.repeat(make_batch(contender, args, world.device)), itertools.count(1)

    def take_step() -> None:
        step(batches)
        if isinstance(step, TrainingStep) and next(count) % training_args.log_interval == 0:
            step.sync_skipped_steps()

    def held() -> list[torch.Tensor]:
        moments = [value for values in state.optimizer.state.values() for value in values.values()]
        average = _tensors(state.ema.module) if state.ema else []
        return [*_tensors(state.model), *average, *filter(torch.is_tensor, moments)]

    def is_finite() -> bool:
        return math.isfinite(step.last_loss if isinstance(step, PublishedStep) else step.gradient_norm.item())

    return Running(take_step, held, is_finite, state.model)


def _create_model(contender: Contender, training_args) -> TimmModel:
    args = training_args.replacing(model=contender.model, img_size=contender.img_size)
    if contender.is_published:
        return published_model(args.model, num_classes=NUM_CLASSES, img_size=args.img_size, drop_rate=args.drop,
                               drop_path_rate=args.drop_path)
    return create_model_from_options(args, num_classes=NUM_CLASSES)


def _default_optimizer(model: TimmModel, training_args) -> torch.optim.Optimizer:
    return create_optimizer(param_groups(model, training_args.weight_decay), training_args)


def start_inference(contender: Contender, args, training_args, precision: Precision, world: World) -> Running:
    """A contender whose step is the forward pass of an evaluation."""
    model = _create_model(contender, training_args).eval()
    move_model(model, world.device, channels_last=args.channels_last)
    compile_model(model, args.compile if contender.is_compiled else '')
    images, _ = make_batch(contender, args, world.device)

    @torch.no_grad()
    def take_step() -> torch.Tensor:
        with precision.autocast():
            logits = model(images)
        return logits.float()

    return Running(take_step, lambda: _tensors(model), lambda: bool(take_step().isfinite().all()), model)


def _tensors(model: nn.Module) -> list[torch.Tensor]:
    return [*model.parameters(), *model.buffers()]


# ---------------------------------------------------------------------------------------------------------------------
# Measuring

def synchronize(device: torch.device) -> None:
    if device.type == 'cuda':
        torch.cuda.synchronize(device)


def time_window(contender: Contender, device: torch.device) -> float:
    """Milliseconds of a step, over those of a window."""
    synchronize(device)
    started = time.perf_counter()
    assert contender.running is not None, 'it is warm, or it has failed and is not asked'
    for _ in range(contender.steps_per_window):
        contender.running.step()
    synchronize(device)
    return 1000 * (time.perf_counter() - started) / contender.steps_per_window


def warm_up(contender: Contender, start_contender, args, training_args, precision_name: str, world: World) -> None:
    """Makes the contender, compiles it where that is to be, and measures all but its time."""
    device = world.device
    seed_everything(args.seed, 0)
    pools = _graph_pools(device)
    # Its own, for the scaler of float16 is a state.
    precision = precision_of(precision_name, device)
    started = time.perf_counter()
    contender.running = running = start_contender(contender, args, training_args, precision, world)
    for _ in range(args.warmup):
        running.step()
    synchronize(device)
    seconds = time.perf_counter() - started
    contender.steps_per_window = max(1, round(1000 * args.window / time_window(contender, device)))
    held = sum(tensor.numel() * tensor.element_size() for tensor in running.held())
    running.model.zero_grad(set_to_none=True)  # what is there now would be counted, or not, with its release
    profiled = (_profile_on_gpu if device.type == 'cuda' else _profile_on_cpu)(running.step, device)
    kernels, launches, allocated, longest = profiled
    contender.measured = {
        'peak_bytes': held + allocated + _graph_pools(device) - pools, 'held_bytes': held, 'kernels': kernels,
        'launches': launches, 'warm_up_seconds': seconds,
        'parameters': sum(parameter.numel() for parameter in running.model.parameters()),
        **({'longest': longest[:args.profile]} if args.profile else {})}


def _graph_pools(device: torch.device) -> int:
    """Bytes that the CUDA graphs of this process keep to themselves."""
    if device.type != 'cuda':
        return 0
    return sum(segment['total_size'] for segment in torch.cuda.memory_snapshot()
               if tuple(segment.get('segment_pool_id', (0, 0))) != (0, 0))


def _profile_on_gpu(step: Callable[[], object], device: torch.device) -> tuple[int, int, int, list]:
    """Kernels of one step, launches from the host, the bytes that are allocated at most, and kernels `_by_name`."""
    synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    for _ in range(STEPS_PROFILED):
        step()
    synchronize(device)
    allocated = torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        step()
        synchronize(device)
    events = _events(profiler)
    kernels = [(event.name(), event.end_ns() - event.start_ns()) for event in events
               if event.device_type() == DeviceType.CUDA and not event.is_user_annotation()]
    launches = sum(event.device_type() == DeviceType.CPU and event.name().startswith(LAUNCHES) for event in events)
    return len(kernels), launches, allocated, _by_name(kernels, steps=1)


def _profile_on_cpu(step: Callable[[], object], device: torch.device) -> tuple[int, None, int, list]:
    """Computing operators of one step, None, the bytes that are allocated at most, and operators `_by_name`."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        for _ in range(STEPS_PROFILED):
            step()
    events = _events(profiler)
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == '[memory]')
    allocated = max(itertools.accumulate((size for _, size in changes), initial=0))
    operators = _operators(events)
    count = sum(is_innermost for *_, is_innermost in operators) // STEPS_PROFILED
    return count, None, allocated, _by_name([(name, nanoseconds) for name, nanoseconds, _ in operators], STEPS_PROFILED)


def _events(profiler: profile) -> list:
    """What was recorded, as it was: its public form takes long to make, and hides what an operator gives back."""
    return profiler.profiler.kineto_results.events()  # type: ignore[union-attr]  # both are there once it has ended


def _operators(events: list) -> list[list]:
    """Operators that compute: the name, the nanoseconds without those it calls, and whether there are none of these."""
    spans = sorted((event.start_thread_id(), event.start_ns(), -event.end_ns(), event.name()) for event in events
                   if _computes(event.name()))
    operators: list[list] = []
    callers: list[tuple[int, int, list]] = []
    for thread, begin, negative_end, name in spans:
        while callers and (callers[-1][0] != thread or callers[-1][1] <= begin):
            callers.pop()
        operators.append([name, -negative_end - begin, True])
        if callers:
            caller = callers[-1][2]
            caller[1], caller[2] = caller[1] - operators[-1][1], False
        callers.append((thread, -negative_end, operators[-1]))
    return operators


def _by_name(events: Iterable[tuple[str, int]], steps: int) -> list[tuple[str, int, float]]:
    """Name, calls and milliseconds of a step of what took so many nanoseconds each in `steps`, the longest first."""
    found: dict[str, tuple[int, int]] = {}
    for name, nanoseconds in events:
        calls, total = found.get(name, (0, 0))
        found[name] = calls + 1, total + nanoseconds
    return sorted(((name, calls // steps, total / steps / 1e6) for name, (calls, total) in found.items()),
                  key=lambda row: -row[2])


def _computes(event_name: str) -> bool:
    space, _, name = event_name.partition('::')
    return 'cpp_fused' in event_name or (
        bool(name) and space not in ('autograd', 'torch', 'profiler') and name not in NOT_COMPUTING)


def measure(contenders: list[Contender], start_contender, args, training_args, precision_name: str, world: World,
            title: str, save: Callable[[], object] = lambda: None) -> None:
    """Fills the rows of one table; calls `save` as they come, for whoever measures may be killed."""
    order = random.Random(args.seed)
    bar = progress_bar(total=len(contenders) * (args.repeats + 1), desc=title)
    for contender in contenders:
        attempt(contender, warm_up, start_contender, args, training_args, precision_name, world)
        bar.update()
        save()
    for contender in contenders:  # in a round that does not count, all come into their stride
        attempt(contender, time_window, world.device)
    started = saved = time.perf_counter()
    for number in range(args.repeats):
        if number == LEAST_ROUNDS or time.perf_counter() - saved > SAVE_SECONDS:
            save()
            saved = time.perf_counter()
        if args.seconds and number >= LEAST_ROUNDS and time.perf_counter() - started > args.seconds:
            break
        for contender in order.sample(contenders, len(contenders)):
            attempt(contender, add_window, world.device)
            bar.update()
    bar.close()
    for contender in contenders:
        attempt(contender, note_finiteness)
        contender.running = None
    _release()


def attempt(contender: Contender, work: Callable, *arguments) -> None:
    """Calls work(contender, …) unless the contender has failed; of an error there will be its row that says so."""
    if contender.error:
        return
    try:
        work(contender, *arguments)
    except Exception as error:
        contender.fail(error)
        error.__traceback__ = None  # it holds what was allocated
        _release()


def add_window(contender: Contender, device: torch.device) -> None:
    contender.milliseconds.append(time_window(contender, device))


def note_finiteness(contender: Contender) -> None:
    """Whether the last step was finite, or one of the next few: float16's scaler has to find its scale by overflows."""
    running = contender.running
    assert running is not None, 'it is warm, or it has failed and is not asked'

    def is_next_finite() -> bool:
        running.step()
        return running.is_finite()

    contender.measured['is_finite'] = running.is_finite() or any(is_next_finite() for _ in range(MORE_STEPS))


def _release() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
