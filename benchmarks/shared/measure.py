"""Measure formulations of a model side by side: each takes steps in turn, which are timed and profiled.

    contenders = list_contenders('t2t_vit_14', args)
    measure(contenders, start_training, args, training_args, 'bf16', world, 'a title for the bar')
    rows = [contender.row(args.batch_size) for contender in contenders]

A window of steps is timed between two synchronisations of the device. Peak memory is what a contender holds (weights,
their average, the optimizer's state) and the most that a step allocates beside it. A GPU's allocator counts this, with
the private pools of CUDA graphs; for a CPU, torch.profiler's allocations do. The profiler also counts what a step
runs: a GPU's kernels, copies and fills, and launches; a CPU's innermost operators that compute, and compiled kernels.
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
from engine.objective import Objective
from engine.optimizer import create_optimizer, param_groups
from engine.run import create_state
from engine.state import TrainState
from engine.step import TrainingStep
from models import create_model_from_options
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
SAVE_SECONDS = 5  # between two saves of an unfinished table
MORE_STEPS = 4  # after a last step that was not finite
STEPS_PROFILED = 2  # the published step keeps the gradients of one step during the next
# Operators that compute nothing: they make views or memory without content.
NOT_COMPUTING = {'alias', 'as_strided', 'chunk', 'detach', 'detach_', 'empty', 'empty_like', 'empty_strided', 'expand',
                 'expand_as', 'is_nonzero', 'item', 'lift_fresh', 'narrow', 'numpy_T', 'permute', 'record_stream',
                 'reshape', 'resize_', 'resolve_conj', 'resolve_neg', 'result_type', 'select', 'set_', 'slice', 'split',
                 'split_with_sizes', 'squeeze', 'squeeze_', 't', 'to', 'transpose', 'unbind', 'unflatten', 'unfold',
                 'unsqueeze', 'view', 'view_as', '_local_scalar_dense', '_reshape_alias', '_unsafe_view'}
LAUNCHES = ('cudaLaunch', 'cuLaunch', 'cudaGraphLaunch', 'cudaMemcpy', 'cudaMemset')


@dataclass
class Running:
    """A contender that can take steps.

    Attributes:
        held: lists the tensors that are kept between steps, except gradients.
        is_finite: tells whether the last step was finite.
    """
    step: Callable[[], object]
    held: Callable[[], list[torch.Tensor]]
    is_finite: Callable[[], bool]
    model: nn.Module


@dataclass
class Contender:
    """One row of a table, or the `error` in one line that kept it from being measured."""
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
        """Return the row of the record."""
        row = {'contender': self.label, 'model': self.model, 'img_size': self.img_size, 'compiled': self.is_compiled}
        if self.error:
            return {**row, 'error': self.error}
        if not self.milliseconds:
            return {**row, **self.measured, 'error': 'the run ended before its turn'}
        low, median, high = np.percentile(self.milliseconds, (25, 50, 75)).tolist()
        return {**row, 'images_per_second': 1000 * batch_size / median,
                'milliseconds': {'median': median, 'quartiles': [low, high]}, **self.measured,
                'steps_per_window': self.steps_per_window, 'windows_milliseconds': self.milliseconds}


def list_contenders(model: str, args) -> list[Contender]:
    """Return the rows of a model's table, in order."""
    rows = [Contender(name, model, args.img_size, is_published=name == 'published', is_compiled=name == 'compiled')
            for name in CONTENDERS if name in args.contenders]
    for name_and_size in args.peers:
        name, _, size = name_and_size.partition('@')
        size = image_size(size) if size else args.img_size
        label = name if size == args.img_size else f'{name} at {size}'
        rows += [Contender(label + ', compiled' * is_compiled, name, size, is_compiled=is_compiled)
                 for kind, is_compiled in (('default', False), ('compiled', True)) if kind in args.contenders]
    return rows


# --- Steps ------------------------------------------------------------------------------------------------------------

def make_batch(contender: Contender, args, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return images [B, 3, H, W] of normalised random pixels and soft targets [B, NUM_CLASSES] as Mixup makes them."""
    generator = torch.Generator().manual_seed(args.seed)
    size = (contender.img_size,) * 2 if isinstance(contender.img_size, int) else contender.img_size
    mean, std = (torch.tensor(values)[:, None, None] for values in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    images = (torch.rand(args.batch_size, 3, *size, generator=generator) - mean) / std
    labels = torch.randint(NUM_CLASSES, (args.batch_size,), generator=generator)
    layout = torch.channels_last if args.channels_last else torch.contiguous_format
    return (images.to(device).contiguous(memory_format=layout),
            mixup_target(labels, NUM_CLASSES, lam=0.7, smoothing=0.1).to(device))


def create_step(training_args, model: TimmModel, precision: Precision, world: World, *, loss: Callable,
                is_published: bool = False,
                wrap: Callable[[nn.Module], nn.Module] = lambda objective: objective,
                prepare: Callable = lambda *batch: batch) -> tuple[TrainState, PublishedStep | TrainingStep]:
    """Return a new training state and its step; `wrap` returns the objective as the step calls it."""
    optimizer = published_optimizer(model, training_args) if is_published else create_optimizer(
        param_groups(model, training_args.weight_decay), training_args)
    state = create_state(training_args, model, optimizer, precision, [], world)
    state.model.train()
    if is_published:
        return state, PublishedStep(state, wrap(state.model), prepare=prepare, loss=loss, precision=precision,
                                    args=training_args)
    return state, TrainingStep(state, wrap(Objective(state.model, loss)), prepare=prepare, precision=precision,
                               args=training_args)


def start_training(contender: Contender, args, training_args, precision: Precision, world: World, *,
                   wrap: Callable[[nn.Module], nn.Module] = lambda objective: objective) -> Running:
    """Return a contender whose step trains from fresh weights; `wrap` returns the objective as the step calls it."""
    model = _create_model(contender, training_args)
    compile_model(model, args.compile if contender.is_compiled else '')
    state, step = create_step(
        training_args, model, precision, world, wrap=wrap,
        loss=create_loss(training_args, soft_targets=True), is_published=contender.is_published)
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


def start_inference(contender: Contender, args, training_args, precision: Precision, world: World) -> Running:
    """Return a contender whose step is the forward pass of an evaluation."""
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


# --- Measuring --------------------------------------------------------------------------------------------------------

def synchronize(device: torch.device) -> None:
    if device.type == 'cuda':
        torch.cuda.synchronize(device)


def time_window(contender: Contender, device: torch.device) -> float:
    """Return the mean milliseconds of a step in a window."""
    synchronize(device)
    started = time.perf_counter()
    assert contender.running is not None, 'a contender that failed takes no turn'
    for _ in range(contender.steps_per_window):
        contender.running.step()
    synchronize(device)
    return 1000 * (time.perf_counter() - started) / contender.steps_per_window


def warm_up(contender: Contender, start_contender, args, training_args, precision_name: str, world: World) -> None:
    """Start the contender, compile it if it is to be compiled, and measure everything but time."""
    device = world.device
    seed_everything(args.seed, 0)
    pools = _graph_pools(device)
    # Each contender has its own, because float16's scaler has a state.
    precision = precision_of(precision_name, device)
    started = time.perf_counter()
    contender.running = running = start_contender(contender, args, training_args, precision, world)
    for _ in range(args.warmup):
        running.step()
    synchronize(device)
    seconds = time.perf_counter() - started
    contender.steps_per_window = max(1, round(1000 * args.window / time_window(contender, device)))
    held = sum(tensor.numel() * tensor.element_size() for tensor in running.held())
    running.model.zero_grad(set_to_none=True)  # otherwise their release would be counted
    kernels, launches, allocated, longest = (_profile_on_gpu if device.type == 'cuda' else _profile_on_cpu)(
        running.step, device)
    contender.measured = {
        'peak_bytes': held + allocated + _graph_pools(device) - pools, 'held_bytes': held, 'kernels': kernels,
        'launches': launches, 'warm_up_seconds': seconds,
        'parameters': sum(parameter.numel() for parameter in running.model.parameters()),
        **({'longest': longest[:args.profile]} if args.profile else {})}


def _graph_pools(device: torch.device) -> int:
    """Return the bytes in the private pools of CUDA graphs."""
    if device.type != 'cuda':
        return 0
    return sum(segment['total_size'] for segment in torch.cuda.memory_snapshot()
               if tuple(segment.get('segment_pool_id', (0, 0))) != (0, 0))


def _profile_on_gpu(step: Callable[[], object], device: torch.device) -> tuple[int, int, int, list]:
    """Return a step's kernels, launches from the host, peak of allocated bytes, and kernels `_by_name`."""
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
    """Return a step's computing operators, None, peak of allocated bytes, and operators `_by_name`."""
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
    """Return the raw events; the public form takes long to make and hides the memory that operators free."""
    return profiler.profiler.kineto_results.events()  # type: ignore[union-attr]  # both exist after it has ended


def _operators(events: list) -> list[list]:
    """List computing operators: name, nanoseconds without those of inner operators, and whether there are no inner."""
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
    """Sum (name, nanoseconds) over `steps` to (name, calls, milliseconds) of a step, the longest first."""
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
    """Measure all rows of a table; call `save` as they come, since the process may be killed."""
    order = random.Random(args.seed)
    bar = progress_bar(total=len(contenders) * (args.repeats + 1), desc=title)
    for contender in contenders:
        attempt(contender, warm_up, start_contender, args, training_args, precision_name, world)
        bar.update()
        save()
    for contender in contenders:  # a round that does not count
        attempt(contender, time_window, world.device)
    started = saved = time.perf_counter()
    for number in range(args.repeats):
        if number == LEAST_ROUNDS or time.perf_counter() - saved > SAVE_SECONDS:
            save()
            saved = time.perf_counter()
        if args.seconds and number >= LEAST_ROUNDS and time.perf_counter() - started > args.seconds:
            break
        for contender in order.sample(contenders, len(contenders)):
            attempt(contender, lambda turn: turn.milliseconds.append(time_window(turn, world.device)))
            bar.update()
    bar.close()
    for contender in contenders:
        attempt(contender, note_finiteness)
        contender.running = None
    _release()


def attempt(contender: Contender, work: Callable, *arguments) -> None:
    """Call work(contender, …) unless the contender has failed; keep an error for its row."""
    if contender.error:
        return
    try:
        work(contender, *arguments)
    except Exception as error:
        contender.fail(error)
        error.__traceback__ = None  # it refers to tensors
        _release()


def note_finiteness(contender: Contender) -> None:
    """Note whether the last step or one of the next is finite: float16's scaler finds its scale by overflows."""
    running = contender.running
    assert running is not None, 'a contender that failed takes no turn'

    def is_next_finite() -> bool:
        running.step()
        return running.is_finite()

    contender.measured['is_finite'] = running.is_finite() or any(is_next_finite() for _ in range(MORE_STEPS))


def _release() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
