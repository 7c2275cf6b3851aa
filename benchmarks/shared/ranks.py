"""Ranks of a benchmark: a group of one rank, and processes that measure together.

    found = launch_ranks(2, 'scaling/overlap', 'cpu')   # starts the benchmark again, in two processes
    finish_rank(args, world, found)                     # the end of each process
"""
import contextlib
import functools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from benchmarks.shared.measure import Contender, Running, start_training
from benchmarks.shared.records import write_record
from engine.loop import wrap_model
from utils.disk import ROOT
from utils.distributed import World, destroy_process_group
from utils.errors import UserError
from utils.runtime import Precision


@contextlib.contextmanager
def group_of_one(device: torch.device):
    """Create a process group with this process as its only rank."""
    is_gpu = device.type == 'cuda'
    dist.init_process_group('nccl' if is_gpu else 'gloo', store=dist.HashStore(), rank=0, world_size=1,
                            device_id=device if is_gpu else None)
    try:
        yield
    finally:
        dist.destroy_process_group()


def launch_ranks(ranks: int, script: str, device_type: str) -> dict:
    """Run the benchmark with the same options in several processes; return what rank 0 found.

    Raises:
        UserError: a process failed; with the last line of its output.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, '-m', 'launch.launcher', str(ranks), str(ROOT / f'benchmarks/{script}.py'),
                   *sys.argv[1:], '--device', device_type, '--output', folder, '--name', 'ranks']
        environment = {**os.environ, 'PYTHONPATH': str(ROOT)}
        ended = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
        if ended.returncode:
            said = ended.stderr.strip().splitlines() or [f'exit code {ended.returncode}']
            raise UserError(said[-1])
        return json.loads((Path(folder) / 'ranks.json').read_text(encoding='utf-8'))


def finish_rank(args, world: World, found: dict) -> None:
    """Leave the process group; rank 0 first writes what it found for `launch_ranks`."""
    if world.is_main:
        write_record(Path(args.output), args.name, found, '')
    destroy_process_group()


def take_turns(keys: Sequence, rounds: int) -> Iterator:
    """Yield (key, whether it counts) in rounds of alternating order, after a first one that does not count."""
    for number in range(rounds + 1):
        for key in keys if number % 2 else reversed(keys):
            yield key, number > 0


def start_ddp(contender: Contender, args, training_args, precision: Precision, world: World) -> Running:
    """Start training as `start_training` does; wrap the model of the contender 'DDP' as train.py does."""
    if contender.label != 'DDP':
        return start_training(contender, args, training_args, precision, world)
    # wrap_model does not wrap for a single rank, so it is told of a second one; DDP itself asks the group.
    return start_training(contender, args, training_args, precision, world,
                          wrap=functools.partial(wrap_model, world=replace(world, size=max(2, world.size))))
