"""Processes: who am I, how many are we, and the few things we say to one another.

Every helper works without a process group too: a single process is rank 0 of 1.
"""
import contextlib
import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from utils.errors import UserError


@dataclass(frozen=True)
class World:
    """This process among its peers: `rank` of `size`, `local_rank` on this machine, and the device it computes on."""
    rank: int
    local_rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def join(device_name: str, timeout: timedelta = timedelta(minutes=30)) -> World:
    """Takes this process's device and, where torchrun started several, joins their group (NCCL on GPUs, gloo on CPUs).

    Args:
        device_name: 'auto', 'cuda', 'cuda:N' or 'cpu'.
    Raises:
        UserError: no such device, or more processes here than GPUs.
    """
    rank, size = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))
    local_rank, local_size = int(os.environ.get('LOCAL_RANK', 0)), int(os.environ.get('LOCAL_WORLD_SIZE', 1))
    device = _device(device_name, local_rank, local_size)
    if device.type == 'cuda':
        torch.cuda.set_device(device)
    if size > 1:
        # A device_id makes barriers use the right GPU and communicators come up early.
        kwargs = {'device_id': device} if device.type == 'cuda' else {}
        dist.init_process_group('nccl' if device.type == 'cuda' else 'gloo', timeout=timeout, **kwargs)
    return World(rank, local_rank, size, device)


def _device(name: str, local_rank: int, local_size: int) -> torch.device:
    gpus = torch.cuda.device_count()
    if name == 'auto':
        name = 'cuda' if gpus else 'cpu'
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ('cuda', 'cpu'):
        raise UserError(f'--device {name}: no such device; choose auto, cuda, cuda:N or cpu')
    if device.type == 'cpu':
        return device
    index = device.index if device.index is not None else local_rank
    if local_size > max(gpus, 1) or index >= gpus or (local_size > 1 and ':' in name):
        raise UserError(f'--device {name}: {local_size} process(es) here and {gpus} GPU(s); '
                        'start fewer processes, or say --device cpu')
    return torch.device('cuda', index)


def leave() -> None:
    """The end of a script: gives the group's connections back."""
    if dist.is_initialized():
        dist.destroy_process_group()


def is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """The elementwise sum of `values` over all ranks, in place."""
    if is_distributed():
        dist.all_reduce(values)
    return values


def from_main(value):
    """Rank 0's value of any picklable object, on every rank."""
    if not is_distributed():
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def overwrite_from_main(tensors) -> None:
    """Writes rank 0's values into these tensors of every rank."""
    if is_distributed():
        for tensor in tensors:
            dist.broadcast(tensor, src=0)


def gather(value) -> list:
    """Every rank's value of any picklable object, in the order of ranks, on every rank."""
    if not is_distributed():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


@contextlib.contextmanager
def one_per_machine_first(world: World):
    """This block is run by the first rank of every machine, then by the others: for files that it fetches."""
    if is_distributed() and world.local_rank != 0:
        dist.barrier()
    yield
    if is_distributed() and world.local_rank == 0:
        dist.barrier()
