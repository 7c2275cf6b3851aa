"""What tools/doctor.py says of a run: its images per second, memory, time, disk, processes and recipe, each measured.

What is written goes to temporary folders below --output, or the nearest folder above it that is there.
"""
import contextlib
import itertools
import json
import math
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from data import spread
from data.pipeline import create_training_input
from engine.checkpoint import KEEP_AT_LEAST, RunLock, save_checkpoint
from engine.loss import create_loss
from engine.optimizer import create_optimizer, create_schedule, param_groups
from engine.run import create_state
from engine.step import TrainingStep
from models import create_model_from_options
from tools.doctor_page import LOOK, OK, STOP, Finding, NotMeasured, plural
from utils import options
from utils.errors import UserError
from utils.log import progress_bar

ROOT = Path(__file__).resolve().parents[1]
ENOUGH = 1.1  # times what the model takes, so that a slow disk for a moment is no matter
SHORT_STEP = 4.0  # seconds: on a CPU, batches that take longer are reckoned from smaller ones
MOST_MEMORY = 0.9  # of a device: the rest is for fragments, and for what others have there
ROUND_TRIP_SECONDS = 60
LONG = 14 * 86400  # seconds of training, beyond which one would rather know
PUBLISHED_RATE = 5e-4 / 512  # of learning, for each image of a step
LARGE = 100_000  # images to train on, from which on a data set is like ImageNet
FORGOTTEN = 0.01  # part of the average that may still be the initial weights


# ---------------------------------------------------------------------------------------------------------------------
# 3. Images per second


def look_at_rates(case):
    """Measures loader and training step by themselves, into `case`, and yields which one starves the other."""
    _prepare(case)
    yield from _measure_loaders(case)
    yield from _measure_steps(case)
    yield _who_starves(case)


def _prepare(case) -> None:
    """The model and its batches, as train.py makes them; bad images, of which the page has spoken, end nothing here."""
    args = case.args.replacing(max_bad_images=len(case.train), max_bad_val_images=len(case.val or ()))
    model = create_model_from_options(args, num_classes=options.resolve_num_classes(args, case.train.classes))
    case.input = create_training_input(args, case.train, case.val or spread(case.train, 1), model.pretrained_cfg,
                                       model.num_classes, case.world)
    optimizer = create_optimizer(param_groups(model, args.weight_decay), args)
    create_schedule(optimizer, args, steps_per_epoch=1)[0].step(0)  # at full rate first steps may be too large
    case.state = create_state(args, model, optimizer, case.precision, case.train.classes, case.world)
    case.gradient_bytes = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)


def _measure_loaders(case):
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


def _measure_steps(case):
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
              f'{wanted * args.accum_steps} images in {case.precision}, on {_device_name(device)}')
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


def _training_step(case) -> TrainingStep:
    case.state.model.train()
    return TrainingStep(case.state, case.state.model, prepare=case.input.prepare_train,
                        loss=create_loss(case.args, soft_targets=case.input.prepare_train.mixing),
                        precision=case.precision, args=case.args.replacing(accum_steps=1))


def _measure_on_gpu(case, step: TrainingStep, wanted: int) -> None:
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


def _measure_on_cpu(case, step: TrainingStep, wanted: int) -> None:
    """Steps of more and more images, up to this batch, or to where they take long; two of them at least."""
    size = min(2, wanted)
    while True:
        case.steps[size] = seconds, _ = _time_steps(case, step, size)
        if size == wanted or (len(case.steps) > 1 and 4 * seconds > SHORT_STEP):
            break
        size = min(wanted, 4 * size)
    for small in sorted(case.steps)[:-2]:  # the nearer two say more of what is beyond them
        del case.steps[small]


def _time_steps(case, step: TrainingStep, size: int) -> tuple[float, int]:
    """Median seconds of a step with `size` images, and the bytes that this process has at most in it."""
    device = case.world.device
    batch = tuple(part[:size] for part in case.batch)
    on_gpu = device.type == 'cuda'
    _reset_peak(device)
    seconds, started, warm = [], time.perf_counter(), 3 if on_gpu else 1
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


def _at(size: int, known: dict[int, float]) -> float:
    """The value at `size` on the line through the known ones, of which there are one or two."""
    if size in known:
        return known[size]
    (low, at_low), (high, at_high) = min(known.items()), max(known.items())
    if low == high:
        return at_low * size / low
    return max(at_high * min(1, size / high), at_low + (at_high - at_low) / (high - low) * (size - low))


@torch.no_grad()
def _forward_rate(case, size: int) -> float:
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


def _device_name(device: torch.device) -> str:
    if device.type == 'cuda':
        return torch.cuda.get_device_name(device)
    return f'the CPU, {plural(torch.get_num_threads(), "thread")}'


def _who_starves(case) -> Finding:
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
        case.starving = (f'Nothing: images come {case.supply / need:.1f} times as fast as the model takes them '
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


def look_at_memory(case):
    """Memory of the device at this batch, and of the loader's batches on the host."""
    if not case.steps:
        raise NotMeasured('no training step could be measured, see section 3')
    wanted, device = case.args.batch_size, case.world.device
    peaks = {size: peak for size, (_, peak) in case.steps.items()}
    total = _device_memory(device)
    need = _at(wanted, peaks)
    here = f'{_gib(need)} of {_gib(total)}' if total else _gib(need)
    if device.type == 'cpu':
        need *= case.processes
        here += f' for each of {plural(case.processes, "process", "processes")}' * (case.processes > 1)
    largest = _largest_batch(peaks, total / (case.processes if device.type == 'cpu' else 1))
    figure = f'{wanted} images take {here}' + (f'; about {largest:,} would fit' if largest else '')
    numbers = {'bytes': need, 'total': total, 'largest_batch': largest}
    where = 'Memory of the GPU' if device.type == 'cuda' else 'Memory'
    if case.too_large and case.too_large <= wanted or (total and need > total):
        images, part = wanted * case.args.accum_steps * case.processes, largest or max(2, wanted // 2)
        remedy = f'Say -b {part} --global-batch-size {images}: as many images a step, in parts.'
        yield Finding(STOP, where, f'{wanted} images do not fit: they take {here}', remedy, numbers=numbers)
    elif total and need > MOST_MEMORY * total:
        yield Finding(LOOK, where, figure, 'That is close; a smaller -b is safe, with --global-batch-size as now.',
                      numbers=numbers)
    else:
        yield Finding(OK, where, figure, numbers=numbers)
    yield _shared_memory(case)


def _device_memory(device: torch.device) -> int:
    """Bytes in all; of main memory, what this process has or can still get."""
    if device.type == 'cuda':
        return torch.cuda.get_device_properties(device).total_memory
    free = 1024 * (_proc('/proc/meminfo').get('MemAvailable', 0) + _proc('/proc/self/status').get('VmRSS', 0))
    with contextlib.suppress(OSError, ValueError):  # a container may have less than its machine
        free = min(free, int(Path('/sys/fs/cgroup/memory.max').read_text()))
    return free


def _largest_batch(peaks: dict[int, int], total: float) -> int | None:
    """The largest even batch that fits, on the line through two that were measured; None where none says."""
    (low, at_low), (high, at_high) = min(peaks.items()), max(peaks.items())
    if low == high or at_high <= at_low or not total:
        return None
    per_image = (at_high - at_low) / (high - low)
    fits = low + (MOST_MEMORY * total - at_low) / per_image
    return 2 * int(fits / 2) if fits >= 2 else None


def _shared_memory(case) -> Finding:
    """Whether /dev/shm has room for the batches that both loaders' workers make ahead."""
    loaders = ((case.input.train_loader, case.batch), (case.input.val_loader, case.eval_batch))
    sizes = [batch[0].nbytes for loader, batch in loaders if batch for _ in range(case.processes * loader.blocks)]
    need, figure = sum(sizes), f'Up to {plural(len(sizes), "batch", "batches")} wait in shared memory'
    if not need:
        return Finding(OK, 'Waiting batches', 'None: without --workers they are made one by one')
    try:
        free = shutil.disk_usage('/dev/shm').free
    except OSError:
        return Finding(OK, 'Waiting batches', f'{figure}: {_gib(need)}', numbers={'bytes': need})
    figure += f', for training and evaluation: {_gib(need)} of /dev/shm, which has {_gib(free)} free'
    numbers = {'bytes': need, 'free': free}
    if need > free:
        remedy = 'Give /dev/shm more room (docker run --shm-size=16g, or --ipc=host), or use fewer --workers.'
        return Finding(STOP, 'Waiting batches', figure, remedy, numbers=numbers)
    return Finding(OK, 'Waiting batches', figure, numbers=numbers)


def _gib(count: float) -> str:
    return f'{count / 2**30:.1f} GiB' if count >= 2**30 else f'{count / 2**20:.1f} MiB'


# ---------------------------------------------------------------------------------------------------------------------
# 5. Time and cost


def look_at_schedule(case):
    """Hours and money of all epochs, with evaluation and saving."""
    args = case.args
    if not case.total_rate:
        raise NotMeasured('no training step could be measured, see section 3')
    per_step = args.batch_size * args.accum_steps * case.processes
    steps = len(case.train) // per_step
    if not steps:
        raise UserError(f'{len(case.train):,} training images do not make one step of {per_step:,}; use a smaller -b')
    _, epochs = create_schedule(case.state.optimizer, args, steps)
    case.total_steps = steps * epochs
    training = steps * per_step / case.total_rate
    evaluating = 0.0
    if case.eval_loader_rate:
        devices = case.processes if case.world.device.type == 'cuda' else 1
        rate = min(case.forward_rate * devices, case.supply * case.eval_loader_rate / case.loader_rate)
        evaluating = len(case.val) / rate * (2 if args.model_ema and not args.model_ema_force_cpu else 1)
    saving = checkpoint_of(case)['seconds']
    # It is written while training goes on: only what lasts longer than an epoch holds it up.
    seconds = epochs * (training + evaluating + max(0.0, saving - training))
    hours = seconds / 3600
    figure = f'{plural(epochs, "epoch")} of {plural(steps, "step")}'
    if args.cooldown_epochs and epochs > args.epochs:
        figure += f' ({epochs - args.cooldown_epochs:,} of --epochs, then {args.cooldown_epochs:,} to cool down)'
    figure += f': {duration(seconds)}'
    money = args.price and hours * case.processes * args.price
    if case.world.device.type == 'cuda':
        figure += f', {hours * case.processes:,.1f} GPU-hours' + '; --price says what they cost' * (not money)
    if money:
        figure += f'; at --price {args.price:g} that costs {money:,.2f}'
    parts = (f'an epoch is {duration(training)} of training and {duration(evaluating)} of evaluation; a checkpoint is '
             f'written in {saving:.1f} s, while training goes on')
    numbers = {'epochs': epochs, 'steps_per_epoch': steps, 'seconds': seconds, 'hours': hours * case.processes,
               'money': money}
    mark, remedy = OK, ''
    if seconds > LONG:
        mark, remedy = LOOK, 'More or faster devices, fewer --epochs, a smaller model or --img-size shorten it.'
    yield Finding(mark, 'Whole schedule', figure, remedy, [parts], numbers)
    if case.processes > 1:
        means = 'as many times as fast' if case.world.device.type == 'cuda' else 'as fast, for they share the cores'
        yield Finding(OK, 'Reckoned', f'One process was measured; {case.processes} are taken to be {means}')


def duration(seconds: float) -> str:
    """5025 → '1.4 hours', in the unit in which it is easily said."""
    for unit, length in (('days', 86400), ('hours', 3600), ('minutes', 60)):
        if seconds >= 2 * length or (unit == 'hours' and seconds >= length):
            return f'{seconds / length:,.1f} {unit}'
    return f'{seconds:.1f} seconds' if seconds < 10 else f'{seconds:.0f} seconds'


# ---------------------------------------------------------------------------------------------------------------------
# 6. Disk


def checkpoint_of(case) -> dict:
    """Saves a checkpoint of this run once, where the run would; its bytes and seconds, and what the folder can do."""
    if case.saved is None:
        output = Path(case.args.output).expanduser().absolute()
        existing = next(path for path in (output, *output.parents) if path.exists())
        try:
            with tempfile.TemporaryDirectory(prefix='.doctor-', dir=existing) as folder:
                case.saved = {'folder': existing, **_save_once(case, Path(folder))}
        except OSError as error:
            case.saved = {'folder': existing, 'bytes': 0, 'seconds': 0.0, 'problem': error.strerror or str(error)}
    return case.saved


def _save_once(case, folder: Path) -> dict:
    """Raises OSError where something could not be written."""
    lock, is_locked = RunLock(folder), False
    try:
        RunLock(folder).release()
    except UserError:
        is_locked = True
    content = case.state.state_dict()
    started = time.perf_counter()
    path = save_checkpoint(content, folder, global_step=0, keep=KEEP_AT_LEAST, is_best=True)
    seconds = time.perf_counter() - started
    has_links = path.stat().st_nlink > 1
    lock.release()
    return {'bytes': path.stat().st_size, 'seconds': seconds, 'locks': is_locked, 'links': has_links, 'problem': ''}


def look_at_disk(case):
    """Whether the checkpoints fit, and whether the folder can do what they need."""
    if case.state is None:
        raise NotMeasured('there is no model to save, see section 3')
    saved = checkpoint_of(case)
    if saved['problem']:
        yield Finding(STOP, 'Checkpoints', f'A checkpoint cannot be written in {saved["folder"]} ({saved["problem"]})',
                      'Make room, get the right to write there, or name another --output.')
        return
    # The newest ones, the best, and the one that is being written while all others are still there.
    kept = max(case.args.checkpoint_hist, KEEP_AT_LEAST) + 2
    need, free = kept * saved['bytes'], shutil.disk_usage(saved['folder']).free
    speed = saved['bytes'] / max(saved['seconds'], 1e-6)
    figure = (f'{_gib(saved["bytes"])} each, up to {kept} at a time: {_gib(need)}; {saved["folder"]} has {_gib(free)} '
              f'free; written in {saved["seconds"]:.1f} s ({speed / 1e6:,.0f} MB/s)')
    numbers = {'bytes': saved['bytes'], 'needed': need, 'free': free, 'seconds': saved['seconds']}
    if need > free:
        yield Finding(STOP, 'Checkpoints', figure, f'Make room for {_gib(need - free)}, or name another --output.',
                      numbers=numbers)
    elif free < 2 * need:
        yield Finding(LOOK, 'Checkpoints', figure, 'That is close: make room, or name another --output.',
                      numbers=numbers)
    else:
        yield Finding(OK, 'Checkpoints', figure, numbers=numbers)
    lacks = ['locks, so nothing keeps two runs out of one folder'] * (not saved['locks']) + [
        'hard links, so the best and the last are written twice'] * (not saved['links'])
    inodes = os.statvfs(saved['folder'])
    if inodes.f_files and inodes.f_favail < 1000:
        lacks.append(f'room for more than {inodes.f_favail} files')
    if lacks:
        yield Finding(LOOK, 'File system', f'{saved["folder"]} has no {"; no ".join(lacks)}',
                      'Name an --output on another disk, or start one run at a time and leave it room.')
    else:
        yield Finding(OK, 'File system', 'Files can be written, renamed, linked and locked')


# ---------------------------------------------------------------------------------------------------------------------
# 7. Processes together


def look_at_processes(case):
    """Starts the processes by the launcher, as a run does, and has them add up a gradient."""
    count, device = case.together, case.world.device
    if count == 1:
        yield Finding(OK, 'Processes', 'One, which has nothing to exchange')
        return
    megabytes = (case.gradient_bytes or 86_000_000) / 1e6
    if device.type == 'cuda':
        torch.cuda.empty_cache()
    found, problem = add_up(count, megabytes, device.type)
    if problem:
        yield Finding(STOP, 'Round trip', f'{count} processes could not add up a gradient: {problem}',
                      'See to what is said there; GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME name the network to use, '
                      'NCCL_DEBUG=INFO tells more.')
        return
    seconds, share = found['seconds'], found['seconds'] / case.step_seconds if case.step_seconds else 0
    figure = (f'{count} processes add up {megabytes:,.1f} MB in {1000 * seconds:,.1f} ms '
              f'({found["bytes_per_second"] / 1e9:.2f} GB/s); the sum is right')
    if share:
        figure += f'; {100 * share:.0f} % of a step'
        # On a CPU it takes the cores that compute.
        figure += ', most of it while the gradient is computed' * (device.type == 'cuda')
    if share > 0.5 and case.processes > 1:
        yield Finding(LOOK, 'Round trip', figure, 'Larger -b or --accum-steps make it rarer; a faster link between the '
                      'processes makes it shorter.', numbers=found)
    else:
        yield Finding(OK, 'Round trip', figure, numbers=found)


def add_up(count: int, megabytes: float, kind: str) -> tuple[dict | None, str]:
    """What tools/round_trip.py has found with `count` processes here, or why it has not."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / 'found.json'
        command = [sys.executable, '-m', 'utils.launch', str(count), str(ROOT / 'tools/round_trip.py'),
                   '--megabytes', f'{megabytes:.6f}', '--device', kind, '--timeout', str(ROUND_TRIP_SECONDS // 2),
                   '--json', str(result)]
        # Of a job that this process may itself be in, the others must know nothing.
        clean = {name: value for name, value in os.environ.items()
                 if not name.startswith(('TORCHELASTIC', 'MASTER_', 'NNODES', 'RDZV_', 'PET_', 'T2T_'))
                 and name not in ('RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'LOCAL_WORLD_SIZE')}
        process = subprocess.Popen(command, cwd=ROOT, env={**clean, 'GRACE': '2', 'MAX_RESTARTS': '0'}, text=True,
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL)
        try:
            _, said = process.communicate(timeout=ROUND_TRIP_SECONDS)
        except subprocess.TimeoutExpired:
            return None, f'not done after {ROUND_TRIP_SECONDS} s'
        finally:
            _end(process)
        if process.returncode:
            return None, (said.strip().splitlines() or [f'exit code {process.returncode}'])[-1]
        return json.loads(result.read_text(encoding='utf-8')), ''


def _end(process: subprocess.Popen) -> None:
    """Ends the launcher, which ends the processes that it has started."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.communicate(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()


# ---------------------------------------------------------------------------------------------------------------------
# 8. The recipe


def look_at_recipe(case):
    """Options that do not go with one another, or with this machine."""
    findings = [*_learning_rate(case), *_lengths(case), *_precision(case)]
    yield from findings or [Finding(OK, 'Recipe', 'Nothing speaks against it')]


def _learning_rate(case):
    args = case.args
    images = args.batch_size * args.accum_steps * case.processes
    published = PUBLISHED_RATE * images
    is_tuning = bool(args.pretrained or args.initial_checkpoint)
    if len(case.train) < LARGE:
        return  # what is right for small data sets nobody knows
    # The smallest models were trained at twice that rate.
    if args.opt.lower() == 'adamw' and (args.lr > 2.1 * published or (args.lr < published / 2.1 and not is_tuning)):
        figure = (f'--lr {args.lr:g} with {images:,} images a step; the published recipe has 5e-4 for every 512 '
                  f'images: {published:.2g}, up to twice that for the smallest models')
        remedy = (f'For ImageNet from scratch say --lr {published:.2g}, or tell the doctor the --processes of the run; '
                  'for other data it may be as you mean it.')
        yield Finding(LOOK, 'Learning rate', figure, remedy,
                      numbers={'lr': args.lr, 'published': published, 'images': images})


def _lengths(case):
    args = case.args
    if args.warmup_epochs >= args.epochs:
        yield Finding(LOOK, 'Warm-up', f'{args.warmup_epochs} epochs of {args.epochs}: the rate never comes to its top',
                      f'Say --warmup-epochs {args.epochs // 10}.')
    if args.model_ema and case.total_steps:
        initial = args.model_ema_decay ** case.total_steps
        if initial > FORGOTTEN:
            decay = FORGOTTEN ** (1 / (0.2 * case.total_steps))
            text = f'{decay:.{1 - math.floor(math.log10(1 - decay))}f}'  # two digits of what it lacks to one
            figure = (f'--model-ema-decay {args.model_ema_decay:g} over {plural(case.total_steps, "step")}: at the end '
                      f'{100 * initial:.0f} % of the average is still what it began with')
            remedy = f'Say --model-ema-decay {text}, which forgets it in a fifth of the run; or --no-model-ema.'
            yield Finding(LOOK, 'Averaged weights', figure, remedy,
                          numbers={'initial': initial, 'steps': case.total_steps})


def _precision(case):
    args, device = case.args, case.world.device
    if device.type != 'cuda':
        return
    has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
    name = _device_name(device)
    if not args.amp:
        yield Finding(LOOK, 'Precision', f'float32 on {name}', 'Say --amp, as the published recipe: it is faster.')
    elif case.precision.dtype is torch.float16 and has_bfloat16:
        yield Finding(LOOK, 'Precision', f'float16 on {name}, which has bfloat16',
                      'Leave --amp-dtype out: bfloat16 needs no scaling and does not overflow.')
    elif case.precision.dtype is torch.bfloat16 and not has_bfloat16:
        yield Finding(LOOK, 'Precision', f'bfloat16 on {name}, which only imitates it', 'Leave --amp-dtype out.')
    if not args.pin_mem:
        yield Finding(LOOK, 'Transfer', '--no-pin-mem: the GPU waits while batches are copied', 'Leave it out.')
    if args.deterministic:
        yield Finding(LOOK, 'Kernels', '--deterministic: only those that repeat to the bit',
                      'Leave it out where that does not matter: others are faster.')
