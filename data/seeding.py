"""Randomness that depends on what is drawn, not on who draws it or when.

A sample's augmentation is a function of (seed, epoch, index) alone. So it is the same for any number of
workers, for any number of ranks, and in an epoch that is resumed in the middle.
"""

import contextlib
import hashlib
import random
import struct
from collections.abc import Iterator

import numpy as np
import torch


def derive_seed(*numbers: int) -> int:
    """A 64-bit seed from integers (each within int64); tuples that differ give seeds that look unrelated."""
    digest = hashlib.blake2b(struct.pack(f'<{len(numbers)}q', *numbers), digest_size=8).digest()
    return int.from_bytes(digest, 'little')


def seed_generators(*numbers: int):
    """Seeds the CPU generators of `random`, numpy and torch from integers; about 10 µs.

    Not torch.manual_seed: that seeds all accelerators too, and piles up calls where none is initialised yet.
    """
    seed = derive_seed(*numbers)
    random.seed(seed)
    np.random.seed(seed & 0xFFFF_FFFF)
    torch.default_generator.manual_seed(seed >> 1)


@contextlib.contextmanager
def preserved_generators() -> Iterator[None]:
    """Puts the CPU generators of `random`, numpy and torch back as they were; about 150 µs."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
