"""Memory for batches, shared by worker processes, which fill it, and the main process, and used again and again.

To get it from the system anew for each batch takes a worker about as long as resizing a third of the images in it.
"""
from collections.abc import Sequence

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.data import get_worker_info


class BatchMemory:
    """Some blocks for each of `workers` processes. A batch that finds all of them taken has memory of its own.

    blocks: for each worker; the batches that it prepares ahead, and those that are in use at the same time.
    """

    def __init__(self, workers: int, blocks: int):
        self._per_worker = blocks
        self._taken = torch.zeros(workers * blocks, dtype=torch.uint8).share_memory_()  # by a batch that is in use
        self._blocks: dict[int, torch.Tensor] = {}  # in a worker: number → tensor
        self._in_use: dict[int, StorageWeakRef] = {}  # in the main process: number → what a batch lies in, weakly

    def __len__(self) -> int:
        """The number of all workers' blocks."""
        return len(self._taken)

    # --- In a worker --------------------------------------------------------------------------------------------------

    def take(self, shape: Sequence[int], dtype: torch.dtype) -> tuple[torch.Tensor, int | None]:
        """A tensor for a batch, and the number of its block, which is to come to `give_back` with it.

        Without workers, memory of this process.
        """
        worker = get_worker_info()
        if worker is None:
            return torch.empty(shape, dtype=dtype), None
        numbers = range(worker.id * self._per_worker, (worker.id + 1) * self._per_worker)
        number = next((number for number in numbers if not self._taken[number]), None)
        if number is None:
            return _shared(shape, dtype), None
        block = self._blocks.get(number)
        if block is None or len(block) < shape[0] or block.shape[1:] != shape[1:] or block.dtype != dtype:
            block = self._blocks[number] = _shared(shape, dtype)
        self._taken[number] = 1
        return block[:shape[0]], number

    # --- In the main process ------------------------------------------------------------------------------------------

    def give_back(self, batch: torch.Tensor, number: int | None) -> None:
        """`batch`, which has arrived in block `number`, gives it back as soon as nobody holds any part of it."""
        if number is None:
            return
        if batch.is_shared():
            self._in_use[number] = StorageWeakRef(batch.untyped_storage())
        else:  # it has been copied to pinned memory
            self._taken[number] = 0

    def reclaim(self) -> None:
        """To be called now and then: takes back what is held no longer."""
        for number, storage in list(self._in_use.items()):
            if storage.expired():
                del self._in_use[number]
                self._taken[number] = 0

    def restart(self) -> None:
        """Before an epoch: batches of the one before that nobody will get give back their blocks.

        Where that was left early, workers may be at one of it still; what they take for it comes back an epoch later.
        """
        self.reclaim()
        for number in range(len(self._taken)):
            if number not in self._in_use:  # which workers that are still at the last epoch must not find free
                self._taken[number] = 0


def _shared(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Memory that another process can map, as torch's default_collate makes it."""
    size = torch.Size(shape).numel()
    storage = torch.UntypedStorage._new_shared(size * dtype.itemsize)
    return torch.empty(0, dtype=dtype).set_(storage).view(tuple(shape))
