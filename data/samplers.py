"""Which samples make up which batch, on which rank: batch samplers that yield lists of (epoch, index, repeat).

The epoch comes with the index because worker processes outlive epochs, and a sample's randomness depends on it. So does
`repeat`, which counts how often the epoch has had the image before.
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

    With `targets`, an epoch has as many samples of each class that has any, but for one (`_balanced_order`).

    With `repeats`, each sample comes that often in a row, and the epoch has only the first samples of perm: it is as
    long as before. Rank r takes samples r, r + world_size, … of a global batch, so that repeats go to different ranks,
    as with timm's RepeatAugSampler.

    num_samples: size of the data set. batch_size: images per rank and batch. shuffle: False for the data set's order.
    shard_offsets: for locality, the first sample of each shard, then the number of samples [shards + 1].
    targets: the class of each sample, int64 [num_samples].
    Raises UserError if the samples do not suffice for one optimizer step, or shards to be fetched are to be balanced.
    """

    def __init__(self, num_samples: int, batch_size: int, *, rank: int = 0, world_size: int = 1, seed: int = 42,
                 shuffle: bool = True, accum_steps: int = 1, shard_offsets: Sequence[int] | np.ndarray | None = None,
                 targets: np.ndarray | None = None, repeats: int = 1):
        assert 0 <= rank < world_size, f'rank {rank} of {world_size}'
        assert shard_offsets is None or shard_offsets[-1] == num_samples, \
            f'shards of {shard_offsets[-1]} samples, not {num_samples}'
        if targets is not None and shard_offsets is not None:
            raise UserError('--sampler balanced: these shards are fetched one by one, and a balanced order would need '
                            'all at once; copy them to a disk of this machine, or leave the option out')
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
        self.repeats = repeats
        self._starts = None if shard_offsets is None else np.asarray(shard_offsets, dtype=np.int64)
        # The samples of each class that has any.
        self._of_class = [] if targets is None else [np.flatnonzero(targets == k) for k in np.unique(targets)]
        self.set_position(0)

    @property
    def order(self) -> str:
        """Describe what the order depends on beside the seed, the epoch and the number of samples of a step."""
        return f'{self.num_samples} images' + (
            '' if self._starts is None else f' in {len(self._starts) - 1} shards from elsewhere') + (
            f', {len(self._of_class)} classes equally often' if self._of_class else '') + (
            f', each {self.repeats} times in a row' if self.repeats > 1 else '')

    def __len__(self) -> int:
        """Return the number of batches in a whole epoch, wherever in it the next iteration starts."""
        return self._num_batches

    def set_position(self, epoch: int, start_batch: int = 0) -> None:
        """Let the next iteration start at batch `start_batch` of `epoch`; required before each epoch."""
        assert 0 <= start_batch <= len(self), f'batch {start_batch} of an epoch of {len(self)}'
        self.epoch = epoch
        self.start_batch = start_batch

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        epoch, order = self.epoch, self._order()
        repeats = _count_before(order) if self._of_class or self.repeats > 1 else np.zeros_like(order)
        for batch, of_batch in zip(self._share(order), self._share(repeats), strict=True):
            yield [(epoch, index, repeat) for index, repeat in zip(batch.tolist(), of_batch.tolist(), strict=True)]

    def remaining(self) -> np.ndarray:
        """Return the samples of the next iteration: int64 [batches, batch_size]."""
        return self._share(self._order())

    def _share(self, values: np.ndarray) -> np.ndarray:
        """Return what the next iteration has of `values`, one for each sample of the epoch: [batches, batch_size]."""
        if self.repeats > 1:
            values = values.reshape(self._num_batches, self.batch_size, self.world_size).swapaxes(1, 2)
        return values.reshape(self._num_batches, self.world_size, self.batch_size)[self.start_batch:, self.rank]

    def _order(self) -> np.ndarray:
        """Return the samples of the epoch on all ranks, in the order of global batches: int64 [n]."""
        length = self._num_batches * self.world_size * self.batch_size
        count = -(-length // self.repeats)
        if not self.shuffle:
            order = np.arange(count)
        elif self._of_class:
            order = self._balanced_order(count)
        elif self._starts is not None:
            order = self._local_order(self._starts)[:count]
        else:
            order = torch.randperm(self.num_samples, generator=self._generator()).numpy()[:count]
        return order.repeat(self.repeats)[:length]

    def _generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(derive_seed(self.seed, self.epoch))

    def _balanced_order(self, count: int) -> np.ndarray:
        """Return `count` samples, as many of each class but for one: int64 [count].

        A sample comes again only when all of its class have come. Chance decides which classes have one more.
        """
        generator, classes = self._generator(), len(self._of_class)
        more = set(torch.randperm(classes, generator=generator)[:count % classes].tolist())
        chosen = []
        for number, own in enumerate(self._of_class):
            wanted = count // classes + (number in more)
            rounds = torch.rand(-(-wanted // len(own)), len(own), generator=generator, dtype=torch.float64)
            chosen.append(own[rounds.numpy().argsort(axis=1, kind='stable').ravel()[:wanted]])
        return np.concatenate(chosen)[torch.randperm(count, generator=generator).numpy()]

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


def _count_before(values: np.ndarray) -> np.ndarray:
    """Return how often each value has come before, in the order of `values`: int64 [n]."""
    order = values.argsort(kind='stable')  # equal values lie together, in their order
    firsts = np.searchsorted(values[order], values[order])
    counts = np.empty_like(order)
    counts[order] = np.arange(len(values)) - firsts
    return counts


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

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        for first in range(0, len(self._indices), self.batch_size):
            yield [(0, index, 0) for index in self._indices[first:first + self.batch_size]]
