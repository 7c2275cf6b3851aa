"""Memory for batches that worker processes fill and the main process reads, reused from batch to batch.

Getting it from the system for each batch takes a worker about as long as resizing a third of the images in it.

On Linux it is anonymous memory, not a file in /dev/shm, which in a container is small: docker gives 64 MiB.
"""
import functools
import logging
import os
import shutil
from collections.abc import Sequence

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.data import get_worker_info

from utils.errors import UserError

_logger = logging.getLogger(__name__)

SHARED_MEMORY = '/dev/shm'
# Docker gives a container this much of it.
SMALL = 1 << 26


class BatchMemory:
    """Shared blocks of memory, the same number for each of `workers` processes.

    A batch that finds all blocks of its worker taken gets memory of its own.

    blocks: for each worker: the batches that it prepares ahead, and those in use at the same time.
    """

    def __init__(self, workers: int, blocks: int):
        self._per_worker = blocks
        # By a batch that is in use.
        self._taken = share([workers * blocks], torch.uint8) if workers else torch.empty(0, dtype=torch.uint8)
        self._blocks: dict[int, torch.Tensor] = {}  # in a worker: number → tensor
        self._in_use: dict[int, StorageWeakRef] = {}  # in the main process: number → the batch's storage, weakly

    def __len__(self) -> int:
        """Return the number of blocks of all workers."""
        return len(self._taken)

    # --- In a worker --------------------------------------------------------------------------------------------------

    def take(self, shape: Sequence[int], dtype: torch.dtype) -> tuple[torch.Tensor, int | None]:
        """Return a tensor for a batch, and the number of its block for `give_back`.

        Without workers it is memory of this process, without a number.
        """
        worker = get_worker_info()
        if worker is None:
            return torch.empty(shape, dtype=dtype), None
        numbers = range(worker.id * self._per_worker, (worker.id + 1) * self._per_worker)
        number = next((number for number in numbers if not self._taken[number]), None)
        if number is None:
            return share(shape, dtype), None
        block = self._blocks.get(number)
        if block is None or len(block) < shape[0] or block.shape[1:] != shape[1:] or block.dtype != dtype:
            block = self._blocks[number] = share(shape, dtype)
        self._taken[number] = 1
        return block[:shape[0]], number

    # --- In the main process ------------------------------------------------------------------------------------------

    def give_back(self, batch: torch.Tensor, number: int | None) -> None:
        """Free block `number` as soon as nothing refers to `batch` any more."""
        if number is None:
            return
        if batch.is_shared():
            self._in_use[number] = StorageWeakRef(batch.untyped_storage())
        else:  # it has been copied to pinned memory
            self._taken[number] = 0

    def reclaim(self) -> None:
        """Free the blocks of batches that nothing refers to; required now and then."""
        for number, storage in list(self._in_use.items()):
            if storage.expired():
                del self._in_use[number]
                self._taken[number] = 0

    def restart(self) -> None:
        """Free the blocks of the last epoch's batches that were never read; required before each epoch.

        A worker may still be preparing such a batch; the block it takes is freed an epoch later.
        """
        self.reclaim()
        for number in range(len(self._taken)):
            if number not in self._in_use:
                self._taken[number] = 0


def share(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Return memory that another process can map.

    Raises:
        UserError: the system gives none.
    """
    size = torch.Size(shape).numel() * dtype.itemsize
    try:
        storage = _anonymous(size) or torch.UntypedStorage._new_shared(size)  # the latter as torch's default_collate
    except (OSError, RuntimeError) as error:
        reason = getattr(error, 'strerror', None) or str(error).splitlines()[0]
        raise UserError(f'no memory for a batch of {size:,} bytes ({reason}); use fewer --workers, a smaller '
                        '--batch-size, or raise the limits on memory and open files (ulimit -n)') from error
    return torch.empty(0, dtype=dtype).set_(storage).view(tuple(shape))


def _anonymous(size: int) -> torch.UntypedStorage | None:
    """Return shared memory that is in no file system; None if the system has no such memory. Raises OSError."""
    try:
        handle = os.memfd_create('batch')
    except (AttributeError, PermissionError):  # not Linux, or a sandbox
        return None
    try:
        os.ftruncate(handle, size)
        return torch.UntypedStorage._new_shared_fd_cpu(handle, size)  # type: ignore[attr-defined]  # not in its stubs
    finally:
        os.close(handle)


@functools.cache  # once for all loaders
def tell_where() -> None:
    """Log that batches are not in /dev/shm if that is small, since people know it as the place that runs full."""
    try:
        room = shutil.disk_usage(SHARED_MEMORY).total
    except OSError:
        return
    if room <= SMALL and hasattr(os, 'memfd_create'):
        _logger.info('%s has only %.0f MiB: the batches of --workers are in other memory', SHARED_MEMORY, room / 2**20)
