"""Memory: of the step, of the device, and the largest batch that fits."""
import contextlib
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from tools.doctor.findings import LOOK, OK, STOP, Finding, NotMeasured, gib, plural
from tools.doctor.speed import RATES, _at, _proc

if TYPE_CHECKING:
    from tools.doctor.case import Case


MOST_MEMORY = 0.9  # of a device: the rest is for fragments, and for what others have there


def look_at_memory(case: 'Case'):
    """Memory of the device at this batch, and of the loader's batches on the host."""
    if not case.steps:
        raise NotMeasured(f'no training step could be measured, see "{RATES}"')
    wanted, device = case.args.batch_size, case.world.device
    peaks = {size: peak for size, (_, peak) in case.steps.items()}
    total = _device_memory(device)
    need = _at(wanted, peaks)
    here = f'{gib(need)} of {gib(total)}' if total else gib(need)
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


def _shared_memory(case: 'Case') -> Finding:
    """Whether /dev/shm has room for the batches that both loaders' workers make ahead."""
    loaders = ((case.input.train_loader, case.batch), (case.input.val_loader, case.eval_batch))
    sizes = [batch[0].nbytes for loader, batch in loaders if batch for _ in range(case.processes * loader.blocks)]
    need, figure = sum(sizes), f'Up to {plural(len(sizes), "batch", "batches")} wait in shared memory'
    if not need:
        return Finding(OK, 'Waiting batches', 'None: without --workers they are made one by one')
    try:
        free = shutil.disk_usage('/dev/shm').free
    except OSError:
        return Finding(OK, 'Waiting batches', f'{figure}: {gib(need)}', numbers={'bytes': need})
    figure += f', for training and evaluation: {gib(need)} of /dev/shm, which has {gib(free)} free'
    numbers = {'bytes': need, 'free': free}
    if need > free:
        remedy = 'Give /dev/shm more room (docker run --shm-size=16g, or --ipc=host), or use fewer --workers.'
        return Finding(STOP, 'Waiting batches', figure, remedy, numbers=numbers)
    return Finding(OK, 'Waiting batches', figure, numbers=numbers)
