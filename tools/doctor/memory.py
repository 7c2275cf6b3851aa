"""Memory: of the step, of the device, and the largest batch that fits."""
import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch

from tools.doctor.case import Case, Loading, Setup, Steps
from tools.doctor.findings import LOOK, OK, STOP, Finding, gib
from tools.doctor.speed import interpolate, read_proc
from utils.console import plural

# Of a device. The rest is for fragments and other programs.
MOST_MEMORY = 0.9


def look_at_memory(case: Case, setup: Setup, loading: Loading, steps: Steps) -> Iterator[Finding]:
    """Compare the memory of a step with the device's, and that of waiting batches with the machine's."""
    yield device_memory(case, steps)
    yield shared_memory(case, setup, loading)


def device_memory(case: Case, steps: Steps) -> Finding:
    """Tell whether the batch fits, and how many images would."""
    wanted, device = case.args.batch_size, case.world.device
    peaks = {size: peak for size, (_, peak) in steps.measured.items()}
    total = total_memory(device)
    need = interpolate(wanted, peaks)
    here = f'{gib(need)} of {gib(total)}' if total else gib(need)
    sharing = 1
    if device.type == 'cpu':
        sharing = case.processes
        need *= sharing
        here += f' for each of {plural(sharing, "process", "processes")}' * (sharing > 1)
    largest = largest_batch(peaks, total / sharing)
    figure = f'{wanted} images take {here}' + (f'; about {largest:,} would fit' if largest else '')
    mark, remedy = OK, ''
    if steps.too_large and steps.too_large <= wanted or (total and need > total):
        images, part = wanted * case.args.accum_steps * case.processes, largest or max(2, wanted // 2)
        mark, figure = STOP, f'{wanted} images do not fit: they take {here}'
        remedy = f'Say -b {part} --global-batch-size {images}: as many images a step, in parts.'
    elif total and need > MOST_MEMORY * total:
        mark, remedy = LOOK, 'That is close; a smaller -b with the present --global-batch-size is safe.'
    return Finding(mark, 'Memory of the GPU' if device.type == 'cuda' else 'Memory', figure, remedy,
                   numbers={'bytes': need, 'total': total, 'largest_batch': largest})


def total_memory(device: torch.device) -> int:
    """Return a GPU's bytes; of main memory, what this process has or can still get."""
    if device.type == 'cuda':
        return torch.cuda.get_device_properties(device).total_memory
    free = 1024 * (read_proc('meminfo').get('MemAvailable', 0) + read_proc('self/status').get('VmRSS', 0))
    with contextlib.suppress(OSError, ValueError):  # a container may have less than its machine
        free = min(free, int(Path('/sys/fs/cgroup/memory.max').read_text()))
    return free


def largest_batch(peaks: dict[int, int], total: float) -> int | None:
    """Return the largest even batch that fits, on the line through two measured ones; None if there is no such line."""
    (low, at_low), (high, at_high) = min(peaks.items()), max(peaks.items())
    if low == high or at_high <= at_low or not total:
        return None
    per_image = (at_high - at_low) / (high - low)
    fits = low + (MOST_MEMORY * total - at_low) / per_image
    return 2 * int(fits / 2) if fits >= 2 else None


def shared_memory(case: Case, setup: Setup, loading: Loading) -> Finding:
    """Tell whether the machine has room for the batches that the workers of both loaders prepare ahead."""
    loaders = ((setup.input.train_loader, loading.batch), (setup.input.val_loader, loading.eval_batch))
    sizes = [batch[0].nbytes for loader, batch in loaders if batch for _ in range(case.processes * loader.blocks)]
    need, figure = sum(sizes), f'Up to {plural(len(sizes), "batch", "batches")} wait in shared memory'
    if not need:
        return Finding(OK, 'Waiting batches', 'None: without --workers they are made one by one')
    free = total_memory(torch.device('cpu'))
    if not free:  # not Linux
        return Finding(OK, 'Waiting batches', f'{figure}: {gib(need)}', numbers={'bytes': need})
    figure += f', for training and evaluation: {gib(need)} of {gib(free)}'
    mark, remedy = OK, ''
    if need > MOST_MEMORY * free:
        mark, remedy = STOP, 'Use fewer --workers, or a smaller -b with the present --global-batch-size.'
    return Finding(mark, 'Waiting batches', figure, remedy, numbers={'bytes': need, 'free': free})
