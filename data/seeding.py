"""Random numbers that depend on what is drawn, not on who draws it or when.

A sample's augmentation depends on (seed, epoch, index, repeat) alone, not on the number of workers or ranks, nor on
where an epoch is resumed.
"""
import contextlib
import hashlib
import random
import struct
from collections.abc import Iterator

import numpy as np
import torch


def derive_seed(*numbers: int) -> int:
    """Return a 64-bit seed from integers (each within int64); different tuples give unrelated seeds."""
    digest = hashlib.blake2b(struct.pack(f'<{len(numbers)}q', *numbers), digest_size=8).digest()
    return int.from_bytes(digest, 'little')


def seed_generators(*numbers: int) -> None:
    """Seed the CPU generators of `random`, numpy and torch from integers; about 10 µs.

    torch.manual_seed would also seed all accelerators, and queue calls until they are initialised.
    """
    seed = derive_seed(*numbers)
    random.seed(seed)
    np.random.seed(seed & 0xFFFF_FFFF)
    torch.default_generator.manual_seed(seed >> 1)


@contextlib.contextmanager
def preserved_generators() -> Iterator[None]:
    """Restore the CPU generators of `random`, numpy and torch at the end of the context; about 150 µs."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
