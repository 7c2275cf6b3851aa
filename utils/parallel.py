"""Work on numbered items in processes of this machine, with one bar.

    for result in in_processes(work, range(100), jobs=4, total=25_000):
        …

where work(item, tick) does one item and calls tick(count, bytes) as it goes.
"""
import contextlib
import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable, Generator, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

from utils.console import progress_bar
from utils.errors import UserError


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1


def in_processes(work: Callable, items: Sequence, *, jobs: int, total: int, done: int = 0,
                 desc: str | None = None) -> Generator:
    """Yields work(item, tick) of every item, in the order in which they get ready.

    jobs: processes; they are forked, so that `work` may hold a dataset of any size. total, done: the images that
    the bar counts, and those of them that were done before. Which process does which item depends on `jobs` alone.
    Raises the UserError of an item at once, and UserError if a process is killed; no process is left in any case.
    """
    context = multiprocessing.get_context('fork')
    jobs = max(1, min(jobs, len(items)))
    counts = context.RawArray('q', 2 * jobs)
    processes: dict[Connection, BaseProcess] = {}
    try:
        with _ctrl_c_waits():
            for number in range(jobs):
                reader, writer = context.Pipe(duplex=False)
                process = context.Process(target=_run, args=(work, items[number::jobs], counts, number, writer,
                                                             os.getpid()))
                process.start()
                writer.close()  # so that the pipe ends with its process
                processes[reader] = process
        started = time.monotonic()
        with progress_bar(total=total, initial=done, unit='image', desc=desc) as bar:
            while processes:
                ready = [reader for reader in wait(processes, timeout=0.2) if isinstance(reader, Connection)]
                bar.set_postfix_str(f'{sum(counts[1::2]) / 1e6 / (time.monotonic() - started + 1e-9):.0f} MB/s', False)
                bar.update(done + sum(counts[::2]) - bar.n)
                for reader in ready:
                    yield from _received(reader, processes)
    finally:
        for started_process in processes.values():
            started_process.kill()
        for started_process in processes.values():
            started_process.join()


@contextlib.contextmanager
def _ctrl_c_waits() -> Iterator[None]:
    """Ctrl-C takes effect at the end: what Python calls at a fork, as logging has it do, would swallow it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _received(reader, processes: dict) -> Iterator:
    """The result that waits in a process's pipe, if it is not the end of it."""
    try:
        kind, content = reader.recv()
    except EOFError:
        kind, content = 'killed', None
    if kind == 'result':
        yield content
    elif kind == 'end':
        processes.pop(reader).join()
    elif kind == 'mistake':
        raise UserError(content)
    elif kind == 'killed':
        process = processes.pop(reader)
        process.join()
        raise UserError(f'one of the --jobs has ended with exit code {process.exitcode}; if the memory was full, take '
                        'fewer. The same command goes on')
    else:
        raise RuntimeError(f'in a process of --jobs:\n{content}')


def _run(work: Callable, items: Sequence, counts, number: int, pipe, parent: int) -> None:
    """The life of one process: its items one after another; nobody is left to work for once the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the parent ends the others
    signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def tick(count: int, size: int) -> None:
        counts[2 * number] += count
        counts[2 * number + 1] += size
        if os.getppid() != parent:
            os._exit(1)

    with contextlib.suppress(BrokenPipeError):
        try:
            for item in items:
                pipe.send(('result', work(item, tick)))
            pipe.send(('end', None))
        except UserError as error:
            pipe.send(('mistake', str(error)))
        except Exception:
            pipe.send(('bug', traceback.format_exc()))
    os._exit(0)  # without what the parent had planned for its own end
