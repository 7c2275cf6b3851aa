"""Which samples make up which batch, on which rank: batch samplers that yield lists of (epoch, index).

The epoch comes with the index because worker processes outlive epochs, and a sample's randomness depends on it.
"""
import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
import torch

from data.seeding import derive_seed
from utils.errors import UserError

# Streams of shards that are read in parallel, see `TrainSampler`; as many shards, or twice as many, are in use.
MAX_LANES = 32
# Shards of a lane whose samples are shuffled together.
WINDOW_SHARDS = 2


class TrainSampler:
    """Batches of one rank for training: a new permutation per epoch, the same for any number of ranks.

    With G = batch_size · world_size, global batch s of an epoch is perm[s·G : (s+1)·G], and rank r takes the r-th of
    its `world_size` equal parts. perm depends on (seed, epoch) alone. Samples that do not fill a last optimizer step of
    `accum_steps` global batches are dropped.

    If shards have to be fetched, perm has locality instead (`_local_order`), and also depends on the number of samples
    of an optimizer step.

    num_samples: size of the data set. batch_size: images per rank and batch. shuffle: False for the data set's order.
    shard_offsets: for locality, the first sample of each shard, then the number of samples [shards + 1].
    Raises UserError if the samples do not suffice for one optimizer step.
    """

    def __init__(self, num_samples: int, batch_size: int, *, rank: int = 0, world_size: int = 1, seed: int = 42,
                 shuffle: bool = True, accum_steps: int = 1, shard_offsets: Sequence[int] | np.ndarray | None = None):
        assert 0 <= rank < world_size, f'rank {rank} of {world_size}'
        assert shard_offsets is None or shard_offsets[-1] == num_samples, \
            f'shards of {shard_offsets[-1]} samples, not {num_samples}'
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
        self.accum_steps = accum_steps
        self.seed = seed
        self.shuffle = shuffle
        self._starts = None if shard_offsets is None else np.asarray(shard_offsets, dtype=np.int64)
        self.set_position(0)

    @property
    def order(self) -> str:
        """Describe what the order depends on beside the seed, the epoch and the number of samples of a step."""
        return f'{self.num_samples} images' + (
            '' if self._starts is None else f' in {len(self._starts) - 1} shards from elsewhere')

    def __len__(self) -> int:
        """Return the number of batches in a whole epoch, wherever in it the next iteration starts."""
        return self._num_batches

    def set_position(self, epoch: int, start_batch: int = 0) -> None:
        """Let the next iteration start at batch `start_batch` of `epoch`; required before each epoch."""
        assert 0 <= start_batch <= len(self), f'batch {start_batch} of an epoch of {len(self)}'
        self.epoch = epoch
        self.start_batch = start_batch

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch = self.epoch
        for batch in self.remaining():
            yield [(epoch, index) for index in batch.tolist()]

    def remaining(self) -> np.ndarray:
        """Return the samples of the next iteration: int64 [batches, batch_size]."""
        length = self._num_batches * self.world_size * self.batch_size
        if self._starts is not None and self.shuffle:
            order = self._local_order(self._starts)[:length]
        elif self.shuffle:
            order = torch.randperm(self.num_samples, generator=self._generator()).numpy()[:length]
        else:
            order = np.arange(length)
        return order.reshape(self._num_batches, self.world_size, self.batch_size)[self.start_batch:, self.rank]

    def _generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(derive_seed(self.seed, self.epoch))

    def _local_order(self, starts: np.ndarray) -> np.ndarray:
        """Return the samples of all whole global batches in an order that uses few shards at a time: int64 [n].

        The shards are permuted, concatenated and cut into L lanes of equal length. L is the largest power of two up to
        `MAX_LANES` that divides S, the samples of an optimizer step. Each lane is shuffled in windows of about
        `WINDOW_SHARDS` shards. A step takes the next S / L samples of each lane, lane after lane. So the order depends
        on (seed, epoch, S) alone, and each rank reads lanes of its own if the number of ranks divides L.
        """
        generator, size = self._generator(), self.batch_size * self.world_size * self.accum_steps
        lanes, length = math.gcd(size, MAX_LANES), self.num_samples // size * size
        shards = torch.randperm(len(starts) - 1, generator=generator).numpy()
        counts = np.diff(starts)[shards]
        # Concatenate the shards' ranges of samples in shuffled order.
        ends = np.cumsum(counts)
        row = np.repeat(starts[shards] - (ends - counts), counts) + np.arange(self.num_samples)
        window = max(1, math.ceil(WINDOW_SHARDS * self.num_samples / len(shards)))
        edges = np.union1d(range(0, length, window), range(0, length + 1, length // lanes)).tolist()
        chance = torch.rand(length, generator=generator, dtype=torch.float64).numpy()
        # Window by window: sorting millions at once takes many times as long. Stable: all machines must sort alike.
        order = np.concatenate([first + chance[first:end].argsort(kind='stable') for first, end in pairwise(edges)])
        return row[:length][order].reshape(lanes, -1, size // lanes).swapaxes(0, 1).ravel()


class EvalSampler:
    """Batches of one rank for evaluation: over all ranks every sample exactly once, without padding.

    Rank r takes samples r, r + world_size, … in batches of `batch_size`; the last one may be shorter. Ranks may differ
    by a sample and by a batch, or have none, so no batch may synchronise them.
    """

    def __init__(self, num_samples: int, batch_size: int, *, rank: int = 0, world_size: int = 1):
        assert 0 <= rank < world_size, f'rank {rank} of {world_size}'
        if batch_size < 1:
            raise UserError(f'batch size {batch_size}; it must be at least 1')
        self.batch_size = batch_size
        self._indices = range(rank, num_samples, world_size)

    def __len__(self) -> int:
        return -(-len(self._indices) // self.batch_size)

    def remaining(self) -> np.ndarray:
        """Return the samples of the next iteration: int64 [samples]."""
        return np.asarray(self._indices, dtype=np.int64)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for first in range(0, len(self._indices), self.batch_size):
            yield [(0, index) for index in self._indices[first:first + self.batch_size]]
