"""The start of a process: its seeds, its kernels, its precision."""
import contextlib
import copy
import ctypes
import logging
import os
import platform
import random
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
from torch import nn

from utils.console import setup_logging
from utils.disk import ROOT
from utils.distributed import World, init_process_group
from utils.errors import UserError

_logger = logging.getLogger(__name__)


def seed_everything(seed: int, rank: int) -> None:
    """Seed Python, numpy, torch and CUDA, differently on each rank."""
    random.seed(seed + rank)
    np.random.seed((seed + rank) % 2**32)
    torch.manual_seed(seed + rank)


def get_rng_state(device: torch.device) -> dict:
    """Return the states of all random generators of the process, as plain values and tensors."""
    numpy = np.random.get_state(legacy=False)
    return {
        'python': random.getstate(),
        'numpy': (numpy['bit_generator'], torch.from_numpy(numpy['state']['key'].astype(np.int64)),
                  numpy['state']['pos'], numpy['has_gauss'], numpy['gauss']),
        'torch': torch.get_rng_state(),
        'cuda': torch.cuda.get_rng_state(device) if device.type == 'cuda' else None,
    }


def set_rng_state(state: dict, device: torch.device) -> None:
    version, internal, gauss = state['python']
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = state['numpy']
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state['torch'])
    if device.type == 'cuda' and state['cuda'] is not None:
        torch.cuda.set_rng_state(state['cuda'], device)


def set_determinism(deterministic: bool) -> None:
    """Choose repeatable kernels, or the fastest ones. On CPUs both are the same and repeat to the bit."""
    torch.backends.cudnn.benchmark = not deterministic
    if deterministic:
        os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')
        torch.backends.cudnn.deterministic = True
        torch.use_deterministic_algorithms(True)
        # Otherwise a kernel fills each new tensor, for code that reads uninitialised memory. This code does not.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # torch makes it late


class Precision:
    """Mixed precision on one device: `autocast()` for the forward pass, and the `scaler` that float16 needs.

    Args:
        dtype_name: 'auto' (bfloat16 if the device has it, otherwise float16), 'bfloat16' or 'float16'.
    """

    def __init__(self, device: torch.device, *, enabled: bool, dtype_name: str = 'auto'):
        if enabled and device.type == 'cpu' and dtype_name == 'float16':
            raise UserError('--amp-dtype float16: a CPU trains in bfloat16; leave --amp-dtype out')
        if dtype_name == 'auto':
            has_bfloat16 = device.type == 'cpu' or torch.cuda.is_bf16_supported(including_emulation=False)
            dtype_name = 'bfloat16' if has_bfloat16 else 'float16'
        self.device_type = device.type
        self.dtype = getattr(torch, dtype_name) if enabled else None
        # A disabled scaler passes everything through, so the loop needs no branches.
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype is torch.float16)

    def anew(self) -> 'Precision':
        """Return the same precision, with a scaler that has not been used."""
        other = copy.copy(self)
        other.scaler = torch.amp.GradScaler(self.device_type, enabled=self.dtype is torch.float16)
        return other

    def autocast(self):
        if self.dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device_type, dtype=self.dtype)

    def __str__(self):
        return str(self.dtype or torch.float32).removeprefix('torch.')


def move_model(model: nn.Module, device: torch.device, *, channels_last: bool) -> None:
    """Move a model to a device in place, and its convolutions to the memory layout `channels_last` if asked."""
    model.to(device)
    if channels_last:
        model.to(memory_format=torch.channels_last)


def find_commit() -> str | None:
    """Return the commit of this code. The variable COMMIT names it if there is no .git."""
    if commit := os.environ.get('COMMIT'):
        return commit
    try:
        git = subprocess.run(['git', '-C', ROOT, 'rev-parse', '--short', 'HEAD'], capture_output=True, text=True)
    except OSError:  # a machine without git
        return None
    return git.stdout.strip() or None


def describe_environment(device: torch.device) -> dict:
    """Return machine, versions and commit, for records of results."""
    import timm
    import torchvision
    return {
        'device': torch.cuda.get_device_name(device) if device.type == 'cuda' else f'{os.cpu_count()} CPU cores',
        'python': platform.python_version(), 'torch': torch.__version__,
        'torchvision': torchvision.__version__, 'timm': timm.__version__,
        'commit': find_commit(),
    }


def start(args, *, alone: bool = False) -> tuple[World, Precision]:
    """Set this process up from the options: process group, device, logging, seeds and precision.

    Args:
        alone: the script must be a single process.
    Raises:
        UserError: several processes were started of a script that is `alone`.
    """
    world = init_process_group(args.device, timedelta(seconds=args.timeout))
    setup_logging(is_main=world.is_main)
    if alone and world.size > 1:
        script = Path(sys.argv[0]).name
        raise UserError(f'{script} is one process, and {world.size} were started; call python {script} by itself')
    set_determinism(args.deterministic)
    # Convolutions in float32 must be float32. TF32 loses nothing only beside bfloat16 or float16.
    torch.backends.cudnn.allow_tf32 = args.amp
    if world.device.type == 'cpu':
        keep_freed_memory()
    seed_everything(args.seed, world.rank)
    precision = Precision(world.device, enabled=args.amp, dtype_name=args.amp_dtype)
    _logger.info('%d process(es), %s, %s', world.size, world.device, precision)
    return world, precision


def keep_freed_memory() -> None:
    """Make glibc keep freed memory in this process, so that each image or batch reuses that of the previous one.

    Otherwise large blocks go back to the system and are allocated again. For a batch of 64 float32 images on a CPU that
    takes three times as long as the computation.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD of malloc.h
        # M_MMAP_THRESHOLD: older versions refuse 1 << 30, and no longer raise it by themselves after the call above.
        mallopt(-3, 1 << 30) or mallopt(-3, 32 << 20)
