"""What tools/doctor measures of a run: images per second of the loader and the training step, and their memory."""
import contextlib
import itertools
import os
import statistics
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from data import evenly_spaced
from data.pipeline import create_training_input
from engine.compile import list_blocks
from engine.loss import create_loss
from engine.optimizer import create_optimizer, create_schedule, param_groups
from engine.run import create_state
from engine.step import TrainingStep
from models import create_model_from_options
from options.checks import resolve_num_classes
from tools.doctor.findings import LOOK, OK, Finding, duration, plural
from utils.console import progress_bar
from utils.errors import UserError

if TYPE_CHECKING:
    from tools.doctor.case import Case

RATES = 'Images per second'  # the title of the section that others need
ENOUGH = 1.1  # times what the model takes, so that a slow disk for a moment is no matter
SHORT_STEP = 4.0  # seconds: on a CPU, batches that take longer are reckoned from smaller ones


# ---------------------------------------------------------------------------------------------------------------------
# 3. Images per second


def look_at_rates(case: 'Case'):
    """Measures loader and training step by themselves, into `case`, and yields which one starves the other."""
    _prepare(case)
    yield from _measure_loaders(case)
    yield from _measure_steps(case)
    yield _who_starves(case)


def _prepare(case: 'Case') -> None:
    """The model and its batches, as train.py makes them; bad images, of which the page has spoken, end nothing here."""
    args = case.args.replacing(max_bad_images=len(case.train), max_bad_val_images=len(case.val or ()))
    model = create_model_from_options(args, num_classes=resolve_num_classes(args, case.train.classes))
    case.input = create_training_input(args, case.train, case.val or evenly_spaced(case.train, 1), model.pretrained_cfg,
                                       model.num_classes, case.world)
    if args.compile == 'blocks':
        list_blocks(model)  # which says so where it has none
    optimizer = create_optimizer(param_groups(model, args.weight_decay), args)
    create_schedule(optimizer, args, steps_per_epoch=1)[0].step(0)  # at full rate first steps may be too large
    case.state = create_state(args, model, optimizer, case.precision, case.train.classes, case.world)
    case.gradient_bytes = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)


def _measure_loaders(case: 'Case'):
    workers, cores = case.args.workers, len(os.sched_getaffinity(0))
    case.batch, case.loader_rate = loader_rate(_epochs(case.input.train_loader), workers, case.seconds, 'loader')
    case.input.train_loader.close()
    if case.val is not None and len(case.val):
        loader = itertools.chain.from_iterable(itertools.repeat(case.input.val_loader))
        case.eval_batch, case.eval_loader_rate = loader_rate(loader, workers, case.seconds / 3, 'evaluation loader')
    case.input.val_loader.close()
    # All processes of this machine share its cores; without workers each loads by itself.
    loading = max(1, workers)
    case.rate_per_core = case.loader_rate / min(loading, cores)
    case.supply = case.rate_per_core * min(loading * case.processes, cores)
    evaluation = f', {case.eval_loader_rate:,.0f} to evaluate with' if case.eval_loader_rate else ''
    figure = (f'{case.loader_rate:,.0f} images/s to train on{evaluation}, from {plural(workers, "worker")} on '
              f'{plural(cores, "core")}')
    numbers = {'images_per_second': case.loader_rate, 'evaluation_images_per_second': case.eval_loader_rate,
               'per_core': case.rate_per_core, 'workers': workers, 'cores': cores}
    if workers * case.processes > 2 * cores:
        figure += f'; {plural(case.processes, "process", "processes")} of as many would have more than two on a core'
        remedy = f'Say -j {max(1, cores // case.processes)}: it takes less memory, and is as fast.'
        yield Finding(LOOK, 'Loader', figure, remedy, numbers=numbers)
    else:
        yield Finding(OK, 'Loader', figure, numbers=numbers)


def _epochs(loader) -> Iterator:
    for epoch in itertools.count():
        loader.set_position(epoch)
        yield from loader


def loader_rate(batches: Iterator, workers: int, seconds: float, name: str) -> tuple[tuple, float]:
    """The first batch, and images per second after the workers have found their pace, over whole rounds of them."""
    round_size, count = max(1, workers), 0
    with progress_bar(total=seconds, desc=name, bar_format='{desc}: {n:.0f} of {total:.0f} s |{bar}|') as bar:
        first = next(batches)
        for _ in range(round_size - 1):
            next(batches)
        started = now = time.perf_counter()
        while now - started < seconds:
            for _ in range(round_size):
                count += len(next(batches)[1])
                now = time.perf_counter()
                if now - started > 3 * seconds:  # so slow that a part of a round has to do
                    break
            bar.update(min(seconds, now - started) - bar.n)
    return first, count / (now - started)


def _measure_steps(case: 'Case'):
    """Times the step at this batch, and takes note of its memory at two batches, which says what others would take."""
    args, device = case.args, case.world.device
    step, wanted = _training_step(case), args.batch_size
    if device.type == 'cuda':
        _measure_on_gpu(case, step, wanted)
    else:
        _measure_on_cpu(case, step, wanted)
    if not case.steps:
        raise UserError(f'not even {case.too_large} images fit into the memory of {device}; use a smaller model or '
                        '--img-size')
    seconds = _at(wanted, {size: seconds for size, (seconds, _) in case.steps.items()})
    case.step_seconds = args.accum_steps * seconds
    case.step_rate = wanted / seconds
    case.forward_rate = _forward_rate(case, max(case.steps))
    largest = max(case.steps)
    figure = (f'{_number(case.step_rate)} images/s, {1000 * case.step_seconds:,.0f} ms a step of '
              f'{wanted * args.accum_steps} images in {case.precision}, on {device_name(device)}')
    is_missed = device.type == 'cpu' and args.device == 'auto'
    figure += ', for torch sees no GPU' * is_missed + f'; reckoned from steps of {largest}' * (largest != wanted)
    if args.compile:
        figure += f'; without --compile {args.compile}, which takes minutes to prepare, and is faster'
    numbers = {'images_per_second': case.step_rate, 'seconds': case.step_seconds,
               'forward_images_per_second': case.forward_rate}
    remedy = ''
    if not torch.isfinite(step.gradient_norm).item():
        figure += '; the gradient was not finite'
        remedy = 'A lower --lr, --clip-grad 1 or --amp-dtype bfloat16 helps.'
    elif is_missed:
        remedy = 'See that the driver works and that torch is built for it; or say --device cpu.'
    yield Finding(LOOK if remedy else OK, 'Step', figure, remedy, numbers=numbers)


def _training_step(case: 'Case') -> TrainingStep:
    case.state.model.train()
    return TrainingStep(case.state, case.state.model, prepare=case.input.prepare_train,
                        loss=create_loss(case.args, soft_targets=case.input.prepare_train.mixing),
                        precision=case.precision, args=case.args.replacing(accum_steps=1))


def _measure_on_gpu(case: 'Case', step: TrainingStep, wanted: int) -> None:
    """Steps of this batch, or of the largest half of it that fits, and of half of that."""
    size = wanted
    while size and len(case.steps) < 2:
        try:
            case.steps[size] = _time_steps(case, step, size)
        except torch.OutOfMemoryError:
            case.too_large = size
        if size == case.too_large:  # only here are the tensors gone that the error still held
            case.state.optimizer.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
        size = size // 4 * 2 if size > 2 else 0  # even, as Mixup wants it


def _measure_on_cpu(case: 'Case', step: TrainingStep, wanted: int) -> None:
    """Steps of more and more images, up to this batch, or to where they take long; two of them at least."""
    size = min(2, wanted)
    while True:
        case.steps[size] = seconds, _ = _time_steps(case, step, size)
        if size == wanted or (len(case.steps) > 1 and 4 * seconds > SHORT_STEP):
            break
        size = min(wanted, 4 * size)
    for small in sorted(case.steps)[:-2]:  # the nearer two say more of what is beyond them
        del case.steps[small]


def _time_steps(case: 'Case', step: TrainingStep, size: int) -> tuple[float, int]:
    """Median seconds of a step with `size` images, and the bytes that this process has at most in it."""
    device = case.world.device
    batch = tuple(part[:size] for part in case.batch)
    on_gpu = device.type == 'cuda'
    _reset_peak(device)
    seconds: list[float] = []
    started, warm = time.perf_counter(), 3 if on_gpu else 1
    with progress_bar(total=warm + (20 if on_gpu else 3), desc=f'steps of {size}', unit='step') as bar:
        while len(seconds) < bar.total:
            begun = time.perf_counter()
            step(iter([batch]))
            step.gradient_norm.item()  # waits for the device
            seconds.append(time.perf_counter() - begun)
            bar.update()
            if len(seconds) > warm and time.perf_counter() - started > SHORT_STEP:
                break
    return statistics.median(seconds[warm:]), _peak(device)


def _reset_peak(device: torch.device) -> None:
    if device.type == 'cuda':
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with contextlib.suppress(OSError):  # Linux alone has it
            Path('/proc/self/clear_refs').write_text('5')


def _peak(device: torch.device) -> int:
    """Bytes allocated on a GPU, or resident in main memory, at most since `_reset_peak`."""
    if device.type == 'cuda':
        return torch.cuda.max_memory_allocated(device)
    return 1024 * _proc('/proc/self/status').get('VmHWM', 0)


def _proc(path: str) -> dict[str, int]:
    """The numbers in a table of Linux, by name; none elsewhere."""
    try:
        pairs = (line.split()[:2] for line in Path(path).read_text().splitlines())
        return {pair[0].rstrip(':'): int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdecimal()}
    except OSError:
        return {}


def _at(size: int, known: Mapping[int, float]) -> float:
    """The value at `size` on the line through the known ones, of which there are one or two."""
    if size in known:
        return known[size]
    (low, at_low), (high, at_high) = min(known.items()), max(known.items())
    if low == high:
        return at_low * size / low
    return max(at_high * min(1, size / high), at_low + (at_high - at_low) / (high - low) * (size - low))


@torch.no_grad()
def _forward_rate(case: 'Case', size: int) -> float:
    """Images per second of an evaluation."""
    model = case.state.model.eval()
    images, _ = case.input.prepare_val(*(part[:size] for part in case.batch)) if case.batch[0].ndim == 4 else (
        case.input.prepare_train(*(part[:size] for part in case.batch)))
    seconds = []
    for _ in range(3):
        begun = time.perf_counter()
        with case.precision.autocast():
            model(images).sum().item()
        seconds.append(time.perf_counter() - begun)
    model.train()
    return len(images) / min(seconds)


def _number(value: float) -> str:
    return f'{value:,.0f}' if value >= 10 else f'{value:.1f}'


def device_name(device: torch.device) -> str:
    if device.type == 'cuda':
        return torch.cuda.get_device_name(device)
    return f'the CPU, {plural(torch.get_num_threads(), "thread")}'


def _who_starves(case: 'Case') -> Finding:
    """Holds what the loader gives against what the model takes."""
    if case.world.device.type == 'cuda':
        need = case.step_rate * case.processes
        case.total_rate = min(need, case.supply)
    else:  # all want the same cores
        need = case.step_rate
        case.total_rate = 1 / (1 / need + 1 / case.supply)
    epoch = len(case.train) / case.total_rate
    numbers = {'needed': need, 'supplied': case.supply, 'epoch_seconds': epoch}
    figure = (f'{plural(case.processes, "process", "processes")} can train on {_number(need)} images/s, the loader '
              f'gives {_number(case.supply)}; an epoch takes {duration(epoch)}')
    if case.supply >= ENOUGH * need:
        case.starving = (f'Nothing: images come {_number(case.supply / need)} times as fast as the model takes them '
                         f'({_number(case.supply)} against {_number(need)}/s).')
        return Finding(OK, 'Who waits', figure, numbers=numbers)
    cores = -(-ENOUGH * need // case.rate_per_core)
    case.starving = (f'The model: it waits for images ({case.supply:,.0f}/s come, {need:,.0f}/s would be taken); '
                     f'{cores:,.0f} cores would do.')
    here = len(os.sched_getaffinity(0))
    wanted = int(-(-cores // case.processes))
    if cores <= here:
        remedy = f'-j {wanted} would do: {plural(here, "core")} are here.'
    else:
        remedy = (f'{cores:,.0f} cores, with -j {wanted} for each process, would feed it; or give them less to do: '
                  'images packed at a smaller size once (tools/pack.py), a lighter --aa.')
    return Finding(LOOK, 'Who waits', f'{figure}: the model waits for images', remedy, numbers=numbers)


# ---------------------------------------------------------------------------------------------------------------------
# 4. Memory
