"""Runs Python programs without the seconds that each takes to import torch: a process that has done so forks them.

    python tests/warm.py SOCKET          # until its standard input ends; see `Warm` in conftest.py

A connection brings the words after `python`, the folder, the environment and the files 0, 1 and 2. The answers are the
number of the new process and, when that has ended, its exit code. If the connection ends before, the process is killed.
The launcher's ranks are forked too, and are its children as always.
"""
import contextlib
import ctypes
import gc
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import time
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MOST = 2**18  # bytes of a request
LAUNCHER = 'launch.launcher'
PR_SET_CHILD_SUBREAPER = 36


def receive(connection: socket.socket) -> dict:
    """The next request with its files, or {} if the other end is gone."""
    try:
        message, files, *_ = socket.recv_fds(connection, MOST, 3)
    except ConnectionError:
        return {}
    return {**json.loads(message), 'files': files} if message else {}


def next_request() -> dict:
    """Returns in a new process for each request; this one ends with its standard input."""
    running = {}  # the connection of each process, by its file
    numbers = {}  # the process of each connection
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(sys.argv[1])
        listener.listen(99)
        while True:
            ready = select.select([0, listener, *running, *numbers], [], [])[0]
            if 0 in ready:
                for number in numbers.values():
                    kill_group(number)
                sys.exit()
            for ended in running.keys() & ready:
                connection = running.pop(ended)
                os.close(ended)
                code = os.waitstatus_to_exitcode(os.waitpid(numbers.pop(connection), 0)[1])
                with connection, contextlib.suppress(OSError):  # its other end is gone
                    connection.send(str(code).encode())
            for connection in numbers.keys() & ready:
                kill_group(numbers[connection])
            if listener in ready:
                connection, _ = listener.accept()
                request = receive(connection)
                if not request:  # its other end is gone
                    connection.close()
                    continue
                if not (pid := os.fork()):
                    for file in running:
                        os.close(file)
                    for other in (connection, *numbers):
                        other.close()
                    return request
                for file in request['files']:
                    os.close(file)
                running[os.pidfd_open(pid)] = connection
                numbers[connection] = pid
                with contextlib.suppress(OSError):  # the next round ends the process of a connection that is gone
                    connection.send(str(pid).encode())


def kill_group(number: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # it has ended, or not begun
        os.killpg(number, signal.SIGKILL)


def become(request: dict) -> list[str]:
    """Makes this process the one that is asked for; returns its words."""
    os.setsid()
    for number, file in enumerate(request['files']):
        os.dup2(file, number)
        os.close(file)
    os.chdir(request['cwd'])
    os.environ.clear()
    os.environ.update(request['environment'])
    sys.executable = request.get('executable', sys.executable)
    words = request['words']
    flags = set()
    while words[0] in ('-P', '-u'):
        flags.add(words.pop(0))
    # New ones, since those of before know whether their files were pipes.
    sys.stdout = sys.__stdout__ = open(1, 'w', closefd=False)
    sys.stderr = sys.__stderr__ = open(2, 'w', buffering=1, closefd=False, errors='backslashreplace')
    if '-u' in flags or os.environ.get('PYTHONUNBUFFERED'):
        sys.stdout.reconfigure(write_through=True)
    if threads := os.environ.get('OMP_NUM_THREADS'):
        torch.set_num_threads(int(threads))
    here = [] if '-P' in flags else [{'-m': os.getcwd(), '-c': ''}.get(words[0], str(Path(words[0]).resolve().parent))]
    sys.path[:] = [*here, *filter(None, os.environ.get('PYTHONPATH', '').split(':')), *PATH]
    sys.argv[:] = {'-m': words[1:], '-c': ['-c', *words[2:]]}.get(words[0], words)
    if words[0] not in ('-m', '-c'):
        forget_other_projects(Path(words[0]).resolve())
    return words


def forget_other_projects(script: Path) -> None:
    """Has the script of a copy of the project import the copy's modules."""
    root = next((folder for folder in script.parents if (folder / 'engine').is_dir()), ROOT)
    if root != ROOT:
        warnings.filterwarnings('ignore', 'Overwriting .* in registry')  # timm's, which knows the models of this one
    for name, module in list(sys.modules.items()):
        file = Path(getattr(module, '__file__', None) or '/')
        if root != ROOT and ROOT in file.parents and 'site-packages' not in file.parts and name != '__main__':
            del sys.modules[name]


def next_rank() -> dict:
    """Returns {} in the launcher, and in each rank that it starts its request.

    A child forks them, before the launcher has threads, and leaves them to the launcher.
    """
    from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    launcher = os.getpid()
    if not os.fork():
        ours.close()
        os.setpgid(0, 0)
        while request := receive(theirs):
            if not (between := os.fork()):
                if os.fork():
                    os._exit(0)
                while os.getppid() != launcher:
                    time.sleep(0.001)
                theirs.send(str(os.getpid()).encode())
                theirs.close()
                return request
            os.waitpid(between, 0)
            for file in request['files']:
                os.close(file)
        os._exit(0)
    theirs.close()
    adopt = ctypes.CDLL(None).prctl

    class Rank(subprocess.Popen):
        def __init__(self, words, environment):
            self._request = {'words': words[1:], 'cwd': os.getcwd(), 'environment': environment}
            super().__init__(words)

        def _execute_child(self, *_):
            adopt(PR_SET_CHILD_SUBREAPER, 1)
            socket.send_fds(ours, [json.dumps(self._request).encode()], (0, 1, 2))
            self.pid = int(ours.recv(MOST))
            adopt(PR_SET_CHILD_SUBREAPER, 0)
            self._child_created = True

    SubprocessHandler._popen = lambda _, words, environment: Rank(words, environment)
    return {}


sys.path[0] = str(ROOT)
import torch._dynamo  # noqa: E402, as every optimizer does
import torch.distributed.run  # noqa: E402
import torch.utils.tensorboard  # noqa: E402, F401

import data.pipeline  # noqa: E402, F401
import engine.run  # noqa: E402, F401
import launch.agent  # noqa: E402, F401
import models  # noqa: E402, F401
import utils.pictures  # noqa: E402, F401

# What is imported stays. Without this, a process would take two seconds to look for garbage in it when it ends.
gc.collect()
gc.freeze()
PATH = sys.path[1:]
words = become(next_request())
if words[:2] == ['-m', LAUNCHER] and (rank := next_rank()):
    words = become(rank)
# At the level of the module, so that whatever the program ends with ends this process as it would end the program's.
if words[0] == '-m':
    runpy.run_module(words[1], run_name='__main__', alter_sys=True)
elif words[0] == '-c':
    exec(words[1], {'__name__': '__main__'})
else:
    runpy.run_path(words[0], run_name='__main__')
