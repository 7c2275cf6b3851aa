"""Images per second of the loader and of the training step, and the memory that the step takes."""
import contextlib
import itertools
import os
import statistics
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from data import evenly_spaced
from data.pipeline import create_training_input
from data.samplers import TrainSampler
from engine.compile import list_blocks
from engine.objective import create_objective
from engine.optimizer import create_optimizer, create_schedule, param_groups
from engine.run import create_state
from engine.step import TrainingStep
from models import create_model_from_options
from options.checks import resolve_num_classes
from tools.doctor.case import Case, Loading, Rates, Setup, Splits, Steps
from tools.doctor.findings import LOOK, OK, Finding, duration
from utils.console import plural, progress_bar
from utils.errors import UserError

# Supply over demand of images: a disk that is slow for a moment does not matter then.
ENOUGH = 1.1
# Seconds. On a CPU, larger batches than these are extrapolated from smaller ones.
SHORT_STEP = 4.0


def look_at_rates(case: Case, splits: Splits) -> Iterator[Finding | Setup | Loading | Steps | Rates]:
    """Measure the loader and the training step by themselves, and find which of them waits for the other."""
    setup = prepare(case, splits)
    yield setup
    loading = measure_loaders(case, splits, setup)
    yield loading
    yield _loader_finding(case, loading)
    steps = measure_steps(case, setup, loading)
    yield steps
    yield step_finding(case, steps)
    yield from find_who_waits(case, splits, loading, steps)


def prepare(case: Case, splits: Splits) -> Setup:
    """Make the model and the loaders as train.py does; bad images, which have a section of their own, stop nothing."""
    train, val = splits.train, splits.val or evenly_spaced(splits.train, 1)
    args = case.args.replacing(max_bad_images=len(train), max_bad_val_images=len(splits.val or ()))
    # It refuses data that does not fill a step of the whole run; the loaders below are those of one process.
    TrainSampler(len(train), args.batch_size, world_size=case.processes, accum_steps=args.accum_steps)
    model = create_model_from_options(args, num_classes=resolve_num_classes(args, train.classes))
    inputs = create_training_input(args, train, val, model.pretrained_cfg, model.num_classes, case.world)
    if args.compile == 'blocks':
        list_blocks(model)  # raises if it has none
    optimizer = create_optimizer(param_groups(model, args.weight_decay), args)
    create_schedule(optimizer, args, steps_per_epoch=1)[0].step(0)  # the full rate may be too large for first steps
    return Setup(inputs, create_state(args, model, optimizer, case.precision, train.classes, case.world))


# --- Loaders ----------------------------------------------------------------------------------------------------------

def measure_loaders(case: Case, splits: Splits, setup: Setup) -> Loading:
    """Measure both loaders, one after the other."""
    workers, cores, inputs = case.args.workers, _cores(), setup.input
    batch, rate = loader_rate(_epochs(inputs.train_loader), workers, case.seconds, 'loader')
    inputs.train_loader.close()
    eval_batch, eval_rate = None, 0.0
    if splits.val is not None and len(splits.val):
        batches = itertools.chain.from_iterable(itertools.repeat(inputs.val_loader))
        eval_batch, eval_rate = loader_rate(batches, workers, case.seconds / 3, 'evaluation loader')
    inputs.val_loader.close()
    # All processes of this machine share its cores. Without workers each process loads by itself.
    loading = max(1, workers)
    per_core = rate / min(loading, cores)
    return Loading(batch, rate, per_core, per_core * min(loading * case.processes, cores), eval_batch, eval_rate)


def _loader_finding(case: Case, loading: Loading) -> Finding:
    workers, cores = case.args.workers, _cores()
    evaluation = f', {loading.eval_rate:,.0f} to evaluate with' if loading.eval_rate else ''
    figure = (f'{loading.rate:,.0f} images/s to train on{evaluation}, from {plural(workers, "worker")} on '
              f'{plural(cores, "core")}')
    numbers = {'images_per_second': loading.rate, 'evaluation_images_per_second': loading.eval_rate,
               'per_core': loading.rate_per_core, 'workers': workers, 'cores': cores}
    if workers * case.processes <= 2 * cores:
        return Finding(OK, 'Loader', figure, numbers=numbers)
    figure += f'; {plural(case.processes, "process", "processes")} with as many would put more than two on a core'
    remedy = f'Say -j {max(1, cores // case.processes)}: it takes less memory, and is as fast.'
    return Finding(LOOK, 'Loader', figure, remedy, numbers=numbers)


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def _epochs(loader) -> Iterator:
    for epoch in itertools.count():
        loader.set_position(epoch)
        yield from loader


def loader_rate(batches: Iterator, workers: int, seconds: float, name: str) -> tuple[tuple, float]:
    """Return the first batch, and images per second of the warm loader, over whole rounds of its workers."""
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
                if now - started > 3 * seconds:  # too slow for a whole round
                    break
            bar.update(min(seconds, now - started) - bar.n)
    return first, count / (now - started)


# --- Steps ------------------------------------------------------------------------------------------------------------

def measure_steps(case: Case, setup: Setup, loading: Loading) -> Steps:
    """Measure the step at this batch, and its memory at two batches, from which that of others follows."""
    device, wanted = case.world.device, case.args.batch_size
    setup.state.model.train()
    prepare = setup.input.prepare_train
    objective = create_objective(case.args, setup.state.model, soft_targets=prepare.mixing)
    step = TrainingStep(setup.state, objective, prepare=prepare, precision=case.precision,
                        args=case.args.replacing(accum_steps=1))

    def time_steps(size: int) -> tuple[float, int]:
        return _time_steps(step, tuple(part[:size] for part in loading.batch), device)

    too_large = None
    if device.type == 'cuda':
        measured, too_large = _measure_on_gpu(time_steps, setup.state.optimizer, wanted)
    else:
        measured = _measure_on_cpu(time_steps, wanted)
    if not measured:
        raise UserError(f'not even {too_large} images fit into the memory of {device}; use a smaller model or '
                        '--img-size')
    seconds = interpolate(wanted, {size: seconds for size, (seconds, _) in measured.items()})
    return Steps(measured, too_large, case.args.accum_steps * seconds, wanted / seconds,
                 _forward_rate(case, setup, loading, max(measured)), bool(torch.isfinite(step.gradient_norm)))


def _measure_on_gpu(time_steps, optimizer, wanted: int) -> tuple[dict[int, tuple[float, int]], int | None]:
    """Time steps of this batch, or of the largest half of it that fits, and of half of that."""
    measured: dict[int, tuple[float, int]] = {}
    too_large, size = None, wanted
    while size and len(measured) < 2:
        try:
            measured[size] = time_steps(size)
        except torch.OutOfMemoryError:
            too_large = size
        if size == too_large:  # out of the except clause, since the error holds tensors
            optimizer.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
        size = size // 4 * 2 if size > 2 else 0  # even, as Mixup needs it
    return measured, too_large


def _measure_on_cpu(time_steps, wanted: int) -> dict[int, tuple[float, int]]:
    """Time steps of more and more images, up to this batch or to steps that take long; return the last two."""
    measured, size = {}, min(2, wanted)
    while True:
        measured[size] = seconds, _ = time_steps(size)
        if size == wanted or (len(measured) > 1 and 4 * seconds > SHORT_STEP):
            return dict(list(measured.items())[-2:])
        size = min(wanted, 4 * size)


def _time_steps(step: TrainingStep, batch: tuple, device: torch.device) -> tuple[float, int]:
    """Return the median seconds of a step with this batch, and the most bytes that this process has in it."""
    on_gpu = device.type == 'cuda'
    _reset_peak(device)
    seconds: list[float] = []
    started, warm = time.perf_counter(), 3 if on_gpu else 1
    with progress_bar(total=warm + (20 if on_gpu else 3), desc=f'steps of {len(batch[0])}', unit='step') as bar:
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
        with contextlib.suppress(OSError):  # only Linux has it
            Path('/proc/self/clear_refs').write_text('5')


def _peak(device: torch.device) -> int:
    """Return the most bytes since `_reset_peak`: allocated on a GPU, or resident in main memory."""
    if device.type == 'cuda':
        return torch.cuda.max_memory_allocated(device)
    return 1024 * read_proc('self/status').get('VmHWM', 0)


def read_proc(name: str) -> dict[str, int]:
    """Return the numbers of a table in Linux's /proc, by name; none elsewhere."""
    try:
        pairs = (line.split()[:2] for line in Path('/proc', name).read_text().splitlines())
        return {pair[0].rstrip(':'): int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdecimal()}
    except OSError:
        return {}


def interpolate(size: int, known: Mapping[int, float]) -> float:
    """Return the value at `size` on the line through the known ones, of which there are one or two."""
    if size in known:
        return known[size]
    (low, at_low), (high, at_high) = min(known.items()), max(known.items())
    if low == high:
        return at_low * size / low
    return max(at_high * min(1, size / high), at_low + (at_high - at_low) / (high - low) * (size - low))


@torch.no_grad()
def _forward_rate(case: Case, setup: Setup, loading: Loading, size: int) -> float:
    """Return images per second of an evaluation."""
    model, batch = setup.state.model.eval(), loading.batch
    prepare = setup.input.prepare_val if batch[0].ndim == 4 else setup.input.prepare_train
    images, _ = prepare(*(part[:size] for part in batch))
    seconds = []
    for _ in range(3):
        begun = time.perf_counter()
        with case.precision.autocast():
            model(images).sum().item()
        seconds.append(time.perf_counter() - begun)
    model.train()
    return len(images) / min(seconds)


def step_finding(case: Case, steps: Steps) -> Finding:
    args, device, largest = case.args, case.world.device, max(steps.measured)
    figure = (f'{_number(steps.rate)} images/s, {1000 * steps.seconds:,.0f} ms a step of '
              f'{args.batch_size * args.accum_steps} images in {case.precision}, on {device_name(device)}')
    is_missed = device.type == 'cpu' and args.device == 'auto'
    figure += ', because torch sees no GPU' * is_missed
    figure += f'; estimated from steps of {largest}' * (largest != args.batch_size)
    if args.compile:
        figure += f'; without --compile {args.compile}, which takes minutes to prepare, and is faster'
    remedy = ''
    if not steps.is_finite:
        figure += '; the gradient was not finite'
        remedy = 'A lower --lr, --clip-grad 1 or --amp-dtype bfloat16 helps.'
    elif is_missed:
        remedy = 'Check that the driver works and that torch is built for it; or say --device cpu.'
    return Finding(LOOK if remedy else OK, 'Step', figure, remedy, numbers={
        'images_per_second': steps.rate, 'seconds': steps.seconds, 'forward_images_per_second': steps.forward_rate})


def _number(value: float) -> str:
    return f'{value:,.0f}' if value >= 10 else f'{value:.1f}'


def device_name(device: torch.device) -> str:
    if device.type == 'cuda':
        return torch.cuda.get_device_name(device)
    return f'the CPU, {plural(torch.get_num_threads(), "thread")}'


def find_who_waits(case: Case, splits: Splits, loading: Loading, steps: Steps) -> Iterator[Rates | Finding]:
    """Compare the images that the loader supplies with those that the model can take."""
    if case.world.device.type == 'cuda':
        need = steps.rate * case.processes
        total = min(need, loading.supply)
    else:  # model and loader share the cores
        need = steps.rate
        total = 1 / (1 / need + 1 / loading.supply)
    epoch = len(splits.train) / total
    figure = (f'{plural(case.processes, "process", "processes")} can train on {_number(need)} images/s, the loader '
              f'gives {_number(loading.supply)}; an epoch takes {duration(epoch)}')
    numbers = {'needed': need, 'supplied': loading.supply, 'epoch_seconds': epoch}
    if loading.supply >= ENOUGH * need:
        yield Rates(total, f'Nothing: images come {_number(loading.supply / need)} times as fast as the model takes '
                           f'them ({_number(loading.supply)} against {_number(need)}/s).')
        yield Finding(OK, 'Who waits', figure, numbers=numbers)
        return
    cores, here = int(-(-ENOUGH * need // loading.rate_per_core)), _cores()
    yield Rates(total, f'The model: it waits for images ({loading.supply:,.0f}/s come, {need:,.0f}/s would be taken); '
                       f'{cores:,} cores would do.')
    workers = -(-cores // case.processes)
    remedy = f'-j {workers} would do: this machine has {plural(here, "core")}.' if cores <= here else (
        f'{cores:,} cores, with -j {workers} for each process, would feed it; or give them less to do: images packed '
        'at a smaller size once (tools/pack.py), a lighter --aa.')
    yield Finding(LOOK, 'Who waits', f'{figure}: the model waits for images', remedy, numbers=numbers)
