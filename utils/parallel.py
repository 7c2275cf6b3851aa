"""Work on numbered items in several processes of this machine, with one progress bar.

    for result in in_processes(work, range(100), jobs=4, total=25_000):
        …

where work(item, tick) does one item, and reports progress by tick(count, bytes).
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
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1


def in_processes(work: Callable, items: Sequence, *, jobs: int, total: int, done: int = 0,
                 desc: str | None = None) -> Generator:
    """Yield work(item, tick) of every item, in the order of completion. No process is left at the end.

    Args:
        jobs: number of processes; they are forked, so `work` may hold a dataset of any size. Which process does which
            item depends on this number alone.
        total, done: the images that the bar counts, and those that were done before.
    Raises:
        UserError: an item raised it, or a process was killed.
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
                writer.close()  # so the pipe ends with its process
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
    """Delay Ctrl-C to the end of the block, since the hooks that Python calls at a fork would swallow it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _received(reader, processes: dict) -> Iterator:
    """Yield the result in a process's pipe, if there is one; raise the error of a process that failed."""
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
        raise UserError(f'one of the --jobs has ended with exit code {process.exitcode}; if memory was full, use '
                        'fewer. The same command continues the work')
    else:
        raise RuntimeError(f'in a process of --jobs:\n{content}')


def _run(work: Callable, items: Sequence, counts, number: int, pipe, parent: int) -> None:
    """Do the items of one process one after another; exit if the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the parent ends the others
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
    os._exit(0)  # without the parent's exit handlers
