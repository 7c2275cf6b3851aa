"""Measures steps of training and inference: the published formulation, ours, ours compiled and timm's, side by side.

    python -m benchmarks.step --models t2t_vit_14 --batch-size 256 --precision bf16          # on a GPU
    python -m benchmarks.step --models t2t_vit_7 --batch-size 8 --contenders published default --peers none

There is a table for each model, precision and task. Its contenders, all in memory at once, are warmed up, then take
turns, in another order in each round. What is timed is a window of steps between two synchronisations of the device;
the figures are the median and the quartiles over the rounds. All have the same batch, on the device: random pixels,
normalised, and the soft targets of Mixup. `published` is benchmarks/published.py; `default` is what train.py and
validate.py do without further options; `compiled` is the same compiled. Peers are trained and evaluated by the same
code as `default` and `compiled`.

Peak memory is what a contender holds (weights; in training their average and the optimizer's state too) and the most
that a step allocates beside it: on a GPU by the allocator's account, with the private pools of CUDA graphs; on a CPU by
the allocations and releases that torch.profiler records. Kernels of a step are counted by the profiler: on a GPU what
ran there, with copies and fills, and in brackets the launches from the host; on a CPU the innermost operators that
compute something, and compiled kernels. --profile lists those that a step spends most time in.

NAME.json, the record with the time of every window, and NAME.md, the tables, go to --output.
"""
import gc
import itertools
import logging
import math
import os
import random
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
# What the profiler has to say of itself, and of the memory that was there before it.
os.environ.setdefault('KINETO_LOG_LEVEL', '99')
os.environ.setdefault('TORCH_CPP_LOG_LEVEL', 'ERROR')

import numpy as np  # noqa: E402
import torch  # noqa: E402
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD  # noqa: E402
from timm.data.mixup import mixup_target  # noqa: E402
from torch import nn  # noqa: E402
from torch.autograd import DeviceType  # noqa: E402
from torch.profiler import ProfilerActivity, profile  # noqa: E402

from benchmarks.published import PublishedStep, published_model, published_optimizer  # noqa: E402
from benchmarks.records import (  # noqa: E402
    describe_command,
    describe_machine,
    describe_options,
    markdown_table,
    write_record,
)
from engine.compile import compile_model  # noqa: E402
from engine.loss import create_loss  # noqa: E402
from engine.optimizer import create_optimizer, param_groups  # noqa: E402
from engine.run import create_state  # noqa: E402
from engine.step import TrainingStep  # noqa: E402
from models import create_model_from_options, resolve_name  # noqa: E402
from utils import options  # noqa: E402
from utils.distributed import World  # noqa: E402
from utils.errors import UserError, run_script  # noqa: E402
from utils.log import check_folder, progress_bar  # noqa: E402
from utils.runtime import Precision, seed_everything, start  # noqa: E402

# The options of train.py, whose defaults the contenders have.
TRAINING = (options.data_options, options.training_data_options, options.model_options, options.input_options,
            options.optimizer_options, options.schedule_options, options.augmentation_options,
            options.batch_norm_options, options.ema_options, options.device_options, options.run_options)
CONTENDERS = ('published', 'default', 'compiled')
PEERS = ('deit_small_patch16_224', 'vit_little_patch16_reg4_gap_256', 'vit_little_patch16_reg4_gap_256@256',
         'swin_tiny_patch4_window7_224', 'convnext_tiny', 'resnet50')
PRECISIONS = {'fp32': 'auto', 'bf16': 'bfloat16', 'fp16': 'float16'}
TASKS = {'train': 'training', 'inference': 'inference'}
NUM_CLASSES = 1000
LEAST_ROUNDS = 3
NAME_SHOWN = 100  # letters of a kernel's name
MORE_STEPS = 4  # after a last one that was not finite
STEPS_PROFILED = 2  # the published step keeps the gradients of one step during the next
# Operators that compute nothing: views, and memory that nothing is written to.
NOT_COMPUTING = {'alias', 'as_strided', 'chunk', 'detach', 'detach_', 'empty', 'empty_like', 'empty_strided', 'expand',
                 'expand_as', 'is_nonzero', 'item', 'lift_fresh', 'narrow', 'numpy_T', 'permute', 'record_stream',
                 'reshape', 'resize_', 'resolve_conj', 'resolve_neg', 'result_type', 'select', 'set_', 'slice', 'split',
                 'split_with_sizes', 'squeeze', 'squeeze_', 't', 'to', 'transpose', 'unbind', 'unflatten', 'unfold',
                 'unsqueeze', 'view', 'view_as', '_local_scalar_dense', '_reshape_alias', '_unsafe_view'}
LAUNCHES = ('cudaLaunch', 'cuLaunch', 'cudaGraphLaunch', 'cudaMemcpy', 'cudaMemset')


def peer(text: str) -> str:
    """'resnet50' or 'resnet50@256', left as it is."""
    if '@' in text:
        options.image_size(text.partition('@')[2])
    return text


peer.kind = str


def step_options(parser) -> None:
    add = parser.add_argument_group('What is measured').add_argument
    add('--models', nargs='+', default=['t2t_vit_14'], metavar='MODEL', help='T2T-ViTs, by name; a table for each')
    add('--contenders', nargs='+', default=list(CONTENDERS), choices=CONTENDERS,
        help='formulations of these models; of peers there are those of `default` and `compiled`')
    add('--compile', default='model', choices=['blocks', 'model', 'graphs', 'autotune'],
        help='what `compiled` is (see train.py)')
    add('--peers', nargs='+', default=list(PEERS), type=peer, metavar='MODEL[@SIZE]',
        help="models of timm beside them, at --img-size or at SIZE; 'none' for none")
    add('--task', default='both', choices=[*TASKS, 'both'], help='train, inference or both')
    add('--precision', nargs='+', default=['bf16'], choices=list(PRECISIONS), help='a table for each')
    add('-b', '--batch-size', type=options.positive_int, default=64, metavar='N', help='images per step')
    add('--img-size', type=options.image_size, default=224, metavar='N', help='input size in pixels, or HxW')
    add('--channels-last', action=options.FLAG, default=False, help='channels-last memory layout, for all')
    add('--device', default='auto', metavar='NAME', help='auto (a GPU where there is one), cuda, cuda:1 or cpu')
    add = parser.add_argument_group('How').add_argument
    add('--repeats', type=options.positive_int, default=20, metavar='N', help='rounds, and windows of each contender')
    add('--seconds', type=options.positive, metavar='S',
        help=f'begin no round after so long, once there are {LEAST_ROUNDS} (default: no limit)')
    add('--window', type=options.rate, default=0.2, metavar='S', help='seconds of a window, which has a step at least')
    add('--warmup', type=options.positive_int, default=3, metavar='N', help='steps before anything is measured')
    add('--seed', type=options.seed, default=42, metavar='S', help='of weights, images and the order of a round')
    add('--profile', type=options.count, default=0, metavar='N', help='list the N longest kernels of each contender')
    add = parser.add_argument_group('Record').add_argument
    add('--output', default=str(ROOT / 'benchmarks/results'), metavar='DIR', help='folder of the record and the tables')
    add('--name', default='step', metavar='NAME', help='of both files')


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
        if not self.milliseconds:
            return {**row, 'error': self.error}
        low, median, high = np.percentile(self.milliseconds, (25, 50, 75)).tolist()
        return {**row, 'images_per_second': 1000 * batch_size / median,
                'milliseconds': {'median': median, 'quartiles': [low, high]}, **self.measured,
                'steps_per_window': self.steps_per_window, 'windows_milliseconds': self.milliseconds}


def list_contenders(model: str, args) -> list[Contender]:
    """The rows of a model's table, in order."""
    rows = [Contender(name, model, args.img_size, is_published=name == 'published', is_compiled=name == 'compiled')
            for name in CONTENDERS if name in args.contenders]
    for name_and_size in args.peers:
        name, _, size = name_and_size.partition('@')
        size = options.image_size(size) if size else args.img_size
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
    step = (PublishedStep if contender.is_published else TrainingStep)(
        state, wrap(state.model), prepare=lambda *batch: batch,
        loss=create_loss(training_args, soft_targets=True), precision=precision, args=training_args)
    state.model.train()
    batches, count = itertools.repeat(make_batch(contender, args, world.device)), itertools.count(1)

    def take_step() -> None:
        step(batches)
        if not contender.is_published and next(count) % training_args.log_interval == 0:
            step.settle()

    def held() -> list[torch.Tensor]:
        moments = [value for values in state.optimizer.state.values() for value in values.values()]
        return [*_tensors(state.model), *_tensors(state.ema.module), *filter(torch.is_tensor, moments)]

    def is_finite() -> bool:
        return math.isfinite(step.last_loss if contender.is_published else step.gradient_norm.item())

    return Running(take_step, held, is_finite, state.model)


def _create_model(contender: Contender, training_args) -> nn.Module:
    args = training_args.replacing(model=contender.model, img_size=contender.img_size)
    if contender.is_published:
        return published_model(args.model, num_classes=NUM_CLASSES, img_size=args.img_size, drop_rate=args.drop,
                               drop_path_rate=args.drop_path)
    return create_model_from_options(args, num_classes=NUM_CLASSES)


def _default_optimizer(model: nn.Module, training_args) -> torch.optim.Optimizer:
    return create_optimizer(param_groups(model, training_args.weight_decay), training_args)


def start_inference(contender: Contender, args, training_args, precision: Precision, world: World) -> Running:
    """A contender whose step is the forward pass of an evaluation."""
    model = _create_model(contender, training_args).eval()
    model.to(world.device, memory_format=torch.channels_last if args.channels_last else torch.preserve_format)
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
    precision = Precision(device, enabled=precision_name != 'fp32', dtype_name=PRECISIONS[precision_name])
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
    return count, None, allocated, _by_name([row[:2] for row in operators], STEPS_PROFILED)


def _events(profiler: profile) -> list:
    """What was recorded, as it was: its public form takes long to make, and hides what an operator gives back."""
    return profiler.profiler.kineto_results.events()


def _operators(events: list) -> list[list]:
    """Operators that compute: the name, the nanoseconds without those it calls, and whether there are none of these."""
    spans = sorted((event.start_thread_id(), event.start_ns(), -event.end_ns(), event.name()) for event in events
                   if _computes(event.name()))
    operators, callers = [], []
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
    found = {}
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
            title: str) -> None:
    """Fills the rows of one table."""
    order = random.Random(args.seed)
    bar = progress_bar(total=len(contenders) * (args.repeats + 1), desc=title)
    for contender in contenders:
        attempt(contender, warm_up, start_contender, args, training_args, precision_name, world)
        bar.update()
    for contender in contenders:  # in a round that does not count, all come into their stride
        attempt(contender, time_window, world.device)
    started = time.perf_counter()
    for number in range(args.repeats):
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

    def is_next_finite() -> bool:
        running.step()
        return running.is_finite()

    contender.measured['is_finite'] = running.is_finite() or any(is_next_finite() for _ in range(MORE_STEPS))


def _release() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# ---------------------------------------------------------------------------------------------------------------------
# Tables

def as_table(table: dict, device: torch.device) -> str:
    """A table of the record in Markdown, with its heading."""
    counted = 'kernels (launches)' if device.type == 'cuda' else 'operators'
    header = ['contender', 'img/s', '× published', 'ms per step', 'quartiles', 'peak MiB', '× published', counted]
    yardstick = next((row for row in table['rows'] if row['contender'] == 'published' and 'milliseconds' in row), None)
    lines, remarks = [], []
    for row in table['rows']:
        if 'error' in row:
            lines.append([row['contender'], *['–'] * 7])
            remarks.append(f'`{row["contender"]}` was not measured: {row["error"]}.')
            continue
        if not row['is_finite']:
            remarks.append(f'`{row["contender"]}` computes numbers that are not finite.')
        faster, memory = (f'{factor:.2f}' for factor in (
            row['images_per_second'] / yardstick['images_per_second'],
            row['peak_bytes'] / yardstick['peak_bytes'])) if yardstick else ('–', '–')
        low, high = row['milliseconds']['quartiles']
        launches = '' if row['launches'] is None else f' ({row["launches"]})'
        lines.append([
            row['contender'], f'{row["images_per_second"]:.1f}', faster, f'{row["milliseconds"]["median"]:.2f}',
            f'{low:.2f} … {high:.2f}', f'{row["peak_bytes"] / 2**20:.1f}', memory, f'{row["kernels"]}{launches}'])
    size = '{} × {}'.format(*table['img_size']) if isinstance(table['img_size'], tuple) else table['img_size']
    heading = (f'## {table["model"]}: {TASKS[table["task"]]}, {table["precision"]}, batch {table["batch_size"]}, '
               f'{size} pixels')
    return '\n\n'.join([heading, markdown_table(header, lines), *remarks, *_longest(table)]) + '\n'


def _longest(table: dict) -> list[str]:
    """What each contender spends most time in, where that was asked for."""
    texts = []
    for row in (row for row in table['rows'] if 'longest' in row):
        lines = [[f'`{name[:NAME_SHOWN]}`', str(calls), f'{milliseconds:.3f}']
                 for name, calls, milliseconds in row['longest']]
        texts += [f'### {row["contender"]}', markdown_table(['longest', 'calls per step', 'ms per step'], lines)]
    return texts


def as_text(record: dict, device: torch.device) -> str:
    """The whole record in Markdown."""
    machine = ', '.join(f'{name} {value}' for name, value in record['machine'].items() if value is not None)
    measured = ('Kernels are those that ran on the device, with copies and fills; launches are those from the host.'
                if device.type == 'cuda' else
                'Operators are the innermost ones that compute something, and compiled kernels.')
    head = (f'# Steps, side by side\n\nWritten by `{record["command"]}`; {machine}.\n\n'
            f'Medians over rounds in which the contenders take turns. {measured} Peak memory is what a contender '
            'holds, and the most that a step allocates beside it.\n')
    return '\n'.join([head, *(as_table(table, device) for table in record['tables'])])


def main() -> None:
    parser = options.create_parser('Measure steps of training and inference, side by side.', (step_options,))
    args = options.parse_options(parser)
    args = args.replacing(peers=[] if args.peers == ['none'] else args.peers)
    for name in [*args.models, *(name.partition('@')[0] for name in args.peers)]:
        resolve_name(name)
    if Path(args.name).name != args.name:
        raise UserError(f'--name {args.name}: give a name without a folder; the folder is --output')
    check_folder(Path(args.output), '--output')
    training_args = options.parse_options(options.create_parser('', TRAINING), [
        '--batch-size', str(args.batch_size), '--device', args.device, '--seed', str(args.seed),
        *['--channels-last'] * args.channels_last])
    logging.disable(logging.INFO)  # the bar and the tables are enough
    world, _ = start(training_args, alone=True)
    if world.device.type == 'cpu':
        if 'fp16' in args.precision:
            raise UserError('--precision fp16: a CPU computes in fp32 or bf16; leave it out')
        if 'compiled' in args.contenders:
            # The profiler does not see compiled kernels without it. It costs them a check of whether there is one.
            from torch._inductor import config
            config.cpp.enable_kernel_profile = True

    record = {'command': describe_command('step'),
              'machine': describe_machine(world.device), 'options': describe_options(args), 'tables': []}
    tasks = list(TASKS) if args.task == 'both' else [args.task]
    for model, precision, task in itertools.product(args.models, args.precision, tasks):
        torch.compiler.reset()
        contenders = list_contenders(model, args)
        measure(contenders, start_training if task == 'train' else start_inference, args, training_args, precision,
                world, f'{model}, {precision}, {TASKS[task]}')
        table = {'model': model, 'precision': precision, 'task': task, 'batch_size': args.batch_size,
                 'img_size': args.img_size, 'rows': [contender.row(args.batch_size) for contender in contenders]}
        record['tables'].append(table)
        print(as_table(table, world.device), flush=True)
        # After each table, for what is measured may take long.
        paths = write_record(Path(args.output), args.name, record, as_text(record, world.device))
    print(*paths, sep='\n')


if __name__ == '__main__':
    run_script(main)
