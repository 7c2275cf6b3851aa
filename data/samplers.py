"""Which samples make up which batch, on which rank: batch samplers that yield lists of (epoch, index).

The epoch travels with the index because worker processes outlive epochs, and a sample's randomness needs it.
"""

from collections.abc import Iterator

import torch

from utils.errors import UserError

from .seeding import derive_seed


class TrainSampler:
    """Batches of one rank for training: a new permutation per epoch, the same for any number of ranks.

    With G = batch_size · world_size, global batch s of an epoch is perm[s·G : (s+1)·G], and rank r takes the
    r-th of its `world_size` equal parts; perm depends on (seed, epoch) alone. So the same samples come in the
    same order for the same G, on however many ranks. The last, incomplete global batch is dropped, and so are
    global batches that do not fill a last group of `accum_steps` (the batches whose gradients make one
    optimizer step).

    num_samples: size of the dataset. batch_size: images per rank and batch.
    shuffle: False for the dataset's own order.
    Raises UserError if the samples do not suffice for one optimizer step.
    """

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        *,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 42,
        shuffle: bool = True,
        accum_steps: int = 1,
    ):
        assert 0 <= rank < world_size, f'rank {rank} of {world_size}'
        if min(batch_size, accum_steps) < 1:
            raise UserError(f'batch size {batch_size}, accumulation steps {accum_steps}; use at least 1')
        num_batches = num_samples // (batch_size * world_size)
        self._num_batches = num_batches - num_batches % accum_steps
        if not self._num_batches:
            fitting = num_samples // (world_size * accum_steps)
            remedy = f'use a batch size of at most {fitting}' if fitting else 'use fewer processes or steps'
            raise UserError(
                f'{num_samples} training images do not make one step of {batch_size} (batch size) × '
                f'{world_size} (processes) × {accum_steps} (accumulation steps); {remedy}')
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size
        self.seed = seed
        self.shuffle = shuffle
        self.set_position(0)

    def __len__(self) -> int:
        """The number of batches in a whole epoch, wherever in it the next iteration starts."""
        return self._num_batches

    def set_position(self, epoch: int, start_batch: int = 0):
        """The next iteration starts at batch `start_batch` of `epoch`. To be called before each epoch."""
        assert 0 <= start_batch <= len(self), f'batch {start_batch} of an epoch of {len(self)}'
        self.epoch = epoch
        self.start_batch = start_batch

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, start_batch = self.epoch, self.start_batch
        order = torch.arange(self.num_samples)
        if self.shuffle:
            generator = torch.Generator().manual_seed(derive_seed(self.seed, epoch))
            order = torch.randperm(self.num_samples, generator=generator)
        for batch in range(start_batch, len(self)):
            first = (batch * self.world_size + self.rank) * self.batch_size
            yield [(epoch, index) for index in order[first:first + self.batch_size].tolist()]


class EvalSampler:
    """Batches of one rank for evaluation: over all ranks every sample exactly once, none to fill up.

    Rank r takes samples r, r + world_size, … in batches of `batch_size`, the last one as short as it falls.
    Ranks may differ by one sample and by one batch, or have none, so nothing may be synchronised per batch.
    """

    def __init__(self, num_samples: int, batch_size: int, *, rank: int = 0, world_size: int = 1):
        assert 0 <= rank < world_size, f'rank {rank} of {world_size}'
        if batch_size < 1:
            raise UserError(f'batch size {batch_size}; it must be at least 1')
        self.batch_size = batch_size
        self._indices = range(rank, num_samples, world_size)

    def __len__(self) -> int:
        return -(-len(self._indices) // self.batch_size)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for first in range(0, len(self._indices), self.batch_size):
            yield [(0, index) for index in self._indices[first:first + self.batch_size]]
