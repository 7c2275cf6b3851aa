"""Processes with gloo between them that take one call after the other: their start costs more than a test.

Tensors are sent by value: shared memory would need a common parent.
"""
import os
import pickle
import socket
import subprocess
import traceback
from datetime import timedelta
from multiprocessing.connection import Connection

import torch
import torch.distributed as dist

from tests.conftest import ROOT, warm
from utils.distributed import World


class Group:
    def __init__(self, size: int, folder):
        self._pipes, self._processes = [], []
        for rank in range(size):
            ours, theirs = socket.socketpair()
            code = f'from tests.group import serve; serve({rank}, {size}, "file://{folder}/group")'
            self._pipes.append(Connection(ours.detach()))
            with theirs:
                self._processes.append(subprocess.Popen(
                    [warm().python, '-c', code], cwd=ROOT, stdin=theirs, env={**os.environ, 'OMP_NUM_THREADS': '1'}))

    def __call__(self, test, *args) -> list:
        """What test(world, *args) returns on each rank."""
        for pipe in self._pipes:
            pipe.send_bytes(pickle.dumps((test, args)))
        assert all(pipe.poll(120) for pipe in self._pipes), f'{test.__name__}: a rank has not answered'
        found = [pickle.loads(pipe.recv_bytes()) for pipe in self._pipes]
        assert not any(isinstance(answer, str) for answer in found), '\n'.join(map(str, found))
        return found

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.wait()


def serve(rank: int, size: int, meeting: str) -> None:
    """Makes the calls that come through standard input."""
    pipe = Connection(os.dup(0))
    dist.init_process_group('gloo', init_method=meeting, rank=rank, world_size=size, timeout=timedelta(seconds=60))
    while True:
        test, args = pickle.loads(pipe.recv_bytes())
        try:
            answer = test(World(rank, rank, size, torch.device('cpu')), *args)
        except Exception:
            answer = traceback.format_exc()
        pipe.send_bytes(pickle.dumps(answer))
