"""The process group: this process's rank and device, collectives, and errors that name the rank at fault.

Everything works without a group too: a single process is rank 0 of 1.
"""
import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from utils import job
from utils.disk import ROOT
from utils.errors import HangError, PeerLostError, UserError, explain_limit
from utils.exits import fail
from utils.watch import BEAT, DeviceMarks, DeviceWatch

HERE = Path(__file__).resolve()
# How far apart processes may start: imports, a cold disk.
START = timedelta(minutes=10)
# Processes that wait in vain for the same rank notice it within this many seconds of each other.
PATIENCE = 3.0
# NCCL's watchdog aborts a process without naming the missing rank, and starts counting before the watch of this file.
# With this extra time it acts only if the watch itself hangs.
NCCL_MARGIN = timedelta(minutes=5)
LOST = ('Connection closed by peer', 'Connection reset by peer', 'Broken pipe', 'Connection refused', 'was aborted',
        'remote process exited')
TIMED_OUT = ('timed out', 'timeout', 'Timed out')
# Beside NCCL, a group for messages between hosts: it needs no GPU, and gloo raises after --timeout.
_host_group: dist.ProcessGroup | None = None


@dataclass(frozen=True)
class World:
    """This process: rank of size, local_rank of local_size on this machine, and its device."""
    rank: int
    local_rank: int
    size: int
    device: torch.device
    local_size: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def init_process_group(device_name: str, timeout: timedelta = timedelta(minutes=30)) -> World:
    """Choose this process's device and, if there are several processes, join their group (NCCL or gloo).

    Args:
        device_name: 'auto', 'cuda', 'cuda:N' or 'cpu'.
        timeout: how long a rank waits for the others in a collective before it ends with an error.
    Raises:
        UserError: the variables of the job contradict one another, there is no such device, there are more processes
            here than GPUs, or this machine lacks memory, files or processes.
        PeerLostError: a process is missing.
    """
    global _host_group
    if mistake := job.mistake():
        raise UserError(mistake)
    if separate := job.separate_tasks():
        raise UserError(f'{separate}; have it start one ./distributed_train.sh on each machine (launch/slurm.sbatch), '
                        'or say WORLD_SIZE=1 if separate ones are wanted')
    rank, size = job.rank(), job.world_size()
    local_rank, local_size = job.local_rank(), job.local_world_size()
    device = _device(device_name, local_rank, local_size)
    if device.type == 'cuda':
        torch.cuda.set_device(device)
    if size > 1:
        try:
            store = _in_thread(_meet, rank, size)
            _connect(store, rank, size, device, timeout)
        except RuntimeError as error:
            if explained := explain_limit(error):
                raise explained from error
            raise PeerLostError(f'the processes of the job did not find one another ({_first_line(error)})') from error
        _progress.start(store, rank, size, timeout)
        if device.type == 'cuda':
            _host_group = _gloo_group()
            _progress.watch(DeviceMarks(device))
    return World(rank, local_rank, size, device, local_size)


def _in_thread(function, *args):
    """Return or raise what `function(*args)` does, while signals are handled, which a long call into torch prevents."""
    outcome: Future = Future()

    def call():
        try:
            outcome.set_result(function(*args))
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=call, daemon=True).start()
    return outcome.result()


def _meet(rank: int, size: int) -> dist.Store:
    """Wait for all ranks, and return the store that they share."""
    store, _, _ = next(dist.rendezvous('env://', timeout=START))
    # The launcher's store still holds the keys of processes before a restart.
    store = dist.PrefixStore(f'restart_{job.restart_count()}', store)
    # --timeout may be short, so it counts only from here on.
    store.set(f'joined/{rank}', '')
    store.wait([f'joined/{other}' for other in range(size)], START)
    return store


def _connect(store: dist.Store, rank: int, size: int, device: torch.device, timeout: timedelta) -> None:
    is_gpu = device.type == 'cuda'
    if is_gpu:
        timeout += NCCL_MARGIN
        # Another thread of torch aborts the process if the watchdog hangs, by default after 8 minutes.
        os.environ.setdefault('TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC', str(round(timeout.total_seconds())))
    # With a device_id, communicators are created now.
    dist.init_process_group('nccl' if is_gpu else 'gloo', store=store, rank=rank, world_size=size, timeout=timeout,
                            device_id=device if is_gpu else None)


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


def destroy_process_group() -> None:
    """Close the group's connections, at the end of a script."""
    global _host_group
    _progress.stop()
    _host_group = None
    if dist.is_initialized():
        dist.destroy_process_group()


def is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


# --- A process that does not respond ---------------------------------------------------------------------------------

class _Progress:
    """A thread that reports this rank's progress to the shared store twice a second.

    It also ends this process if its device waits in vain for another rank (see `watch`).
    """

    def __init__(self):
        self.step = 0
        self._device: DeviceWatch | None = None
        self.timeout = timedelta(minutes=30)
        self._since = time.time()
        self._store: dist.Store | None = None
        self._thread: threading.Thread | None = None
        self._stopped = threading.Event()

    def start(self, store, rank: int, size: int, timeout: timedelta) -> None:
        self._store, self._rank, self._size, self.timeout = store, rank, size, timeout
        self._stopped.clear()
        self._thread = threading.Thread(target=self._run, args=(store,), name='progress', daemon=True)
        self._thread.start()

    def watch(self, mark: Callable[[], Callable[[], bool]]) -> None:
        """Watch a device whose collectives may block the main thread forever; `mark` as for DeviceWatch.

        A rank that never started the collective has an idle device. It does not report waiting, so the others know
        that it is the missing one. gloo needs no watch: its calls raise after their timeout.
        """
        self._device = DeviceWatch(mark)

    def stop(self) -> None:
        self._stopped.set()
        if self._thread:  # a thread that is in the store when the interpreter ends aborts the process
            self._thread.join(PATIENCE)
        self._store = None
        if self._device:
            self._device.stop()
            self._device = None

    def note(self, step: int) -> None:
        self.step, self._since = step, time.time()

    def _run(self, store: dist.Store) -> None:
        while True:
            told = {'step': self.step, 'since': self._since, 'now': time.time(), 'where': _where_main_thread_is()}
            try:
                store.set(f'progress/{self._rank}', json.dumps(told))
                self._end_if_in_vain()
            except RuntimeError:
                return  # the launcher and its store are gone
            if self._stopped.wait(BEAT):
                return

    def _end_if_in_vain(self) -> None:
        device = self._device
        waited = device.waited() if device else 0.0
        # Ranks reach a collective at different times. Late ones report waiting as soon as the first one gives up, so
        # that it does not take them for missing.
        if waited > self.timeout.total_seconds() or (waited > PATIENCE and self.someone_waits()):
            error = self.hang()
            if error and not self._stopped.is_set():
                fail(error)

    def hang(self) -> HangError | None:
        """Return the error of this rank, which waits in vain, or None if the store is gone."""
        missing = self.missing()
        if missing is None:
            return None
        seconds = f'{self.timeout.total_seconds():g} s (--timeout)'
        if missing:
            return HangError(f'waited {seconds} in vain for {"; for ".join(missing)}')
        devices = ' and to their GPUs' if self._device else ''
        return HangError(f'waited {seconds} in vain, as all ranks did; see to the network between them{devices}')

    def missing(self) -> list[str] | None:
        """Describe the ranks that never reached this collective; None if the store is gone."""
        store = self._store
        if store is None:
            return None
        try:
            store.set(f'waiting/{self._rank}', '')
            store.set('someone waits', '')
            others = {rank for rank in range(self._size) if rank != self._rank}
            end = time.monotonic() + PATIENCE
            while others and time.monotonic() < end:
                others = {rank for rank in others if not store.check([f'waiting/{rank}'])}
                time.sleep(0.05)
            return [self._describe(store, rank) for rank in sorted(others)]
        except RuntimeError:
            return None

    def someone_waits(self) -> bool:
        """Tell whether any rank has reported that it waits in vain."""
        store = self._store
        try:
            return store is not None and store.check(['someone waits'])
        except RuntimeError:
            return False

    def _describe(self, store: dist.Store, rank: int) -> str:
        if not store.check([f'progress/{rank}']):
            return f'rank {rank}, of which nothing is known'
        told = json.loads(store.get(f'progress/{rank}'))
        text = f'rank {rank}, at step {told["step"]} since {_clock(told["since"])}, in {told["where"]}'
        if time.time() - told['now'] > 2 * PATIENCE:
            text += f', silent since {_clock(told["now"])} (stopped, or its machine is out of reach)'
        return text


_progress = _Progress()


def note_progress(global_step: int) -> None:
    """Note that this rank has begun a step, for the messages of ranks that wait for it."""
    _progress.note(global_step)


@contextlib.contextmanager
def hang_explained():
    """Turn errors of collectives that another rank causes into one line.

    Raises:
        HangError: a rank did not respond in time; the message names it and its last position.
        PeerLostError: a rank has ended.
    """
    try:
        yield
    except Exception as error:
        if explained := explain(error):
            raise explained from error
        raise


def explain(error: Exception) -> HangError | PeerLostError | None:
    """Return what an error of a collective means, or None for any other error."""
    text = str(error)
    if not isinstance(error, RuntimeError) or not is_distributed():
        return None
    timed_out = any(words in text for words in TIMED_OUT) and not text.startswith('CUDA error')
    if not timed_out and not any(words in text for words in LOST) and not isinstance(error, dist.DistError):
        return None
    # The first rank to give up closes its connections, so it looks dead to the others.
    if (timed_out or _progress.someone_waits()) and (hang := _progress.hang()):
        return hang
    return PeerLostError(f'another process of the job was lost ({_first_line(error)})')


def _where_main_thread_is() -> str:
    """Return the innermost line of this project that the main thread is in: 'data/loader.py:98 (_batches)'."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    while frame:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(ROOT) and path != HERE:  # the caller of this file says more
            return f'{path.relative_to(ROOT)}:{frame.f_lineno} ({frame.f_code.co_name})'
        frame = frame.f_back
    return 'the libraries'


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)[:200]


def _clock(seconds: float) -> str:
    return f'{datetime.fromtimestamp(seconds):%H:%M:%S}'


# --- Collectives -----------------------------------------------------------------------------------------------------

def _gloo_group() -> dist.ProcessGroup:
    """Create another group of all ranks, for CPU tensors; all ranks must call this."""
    try:
        group = dist.new_group(backend='gloo', timeout=_progress.timeout)
    except RuntimeError as error:
        if explained := explain_limit(error):
            raise explained from error
        raise PeerLostError(f'the processes cannot connect over gloo, as they must beside NCCL ({_first_line(error)}); '
                            'name the network, as in GLOO_SOCKET_IFNAME=eth0') from error
    assert isinstance(group, dist.ProcessGroup), 'a group of all ranks includes this one'
    return group


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """Sum `values` elementwise over all ranks, in place."""
    if is_distributed():
        dist.all_reduce(values)
    return values


def from_main(value):
    """Return rank 0's value, any picklable object, on every rank."""
    if not is_distributed():
        return value
    box = [value]
    dist.broadcast_object_list(box, group=_host_group)
    return box[0]


@contextlib.contextmanager
def raise_on_all_ranks():
    """Raise a UserError of this block on rank 0, such as that of a file which it alone writes, on every rank."""
    mistake = None
    try:
        yield
    except UserError as error:
        mistake = str(error)
    if mistake := from_main(mistake) or mistake:
        raise UserError(mistake)


def broadcast_from_main(tensors) -> None:
    """Copy rank 0's values into these tensors of every rank."""
    if is_distributed():
        for tensor in tensors:
            dist.broadcast(tensor, src=0)


def gather(value) -> list:
    """Return the values of all ranks, any picklable objects, in the order of ranks, on every rank."""
    if not is_distributed():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group=_host_group)
    return values


@contextlib.contextmanager
def one_per_machine_first(world: World):
    """Run this block on the first rank of every machine, then on the others; for files that it downloads."""
    if world.local_rank != 0:
        gather(None)
    yield
    if world.local_rank == 0:
        gather(None)


class AsyncMax:
    """The maximum of a number over all ranks, available one call later, so that no call waits for it.

    It has its own gloo group, apart from the work of a GPU. A single process gets its number at once. All ranks must
    make the same calls.
    """

    def __init__(self):
        self._group: dist.ProcessGroup | None = _gloo_group() if is_distributed() else None
        self._under_way: tuple[torch.Tensor, dist.Work] | None = None

    def exchange(self, number: int) -> int:
        """Return the maximum of the previous call, or 0. While it is 0, `number` takes part in the next one."""
        if self._group is None:
            return number
        if not (agreed := self._finish()):
            self._start(number)
        return agreed

    def conclude(self, number: int) -> int:
        """Wait for and return the maximum of this call or the previous one; nothing stays pending."""
        return self.exchange(number) or self._finish()

    def close(self) -> None:
        """Wait for a pending exchange, whose result no longer matters."""
        if self._under_way is None:
            return
        with contextlib.suppress(RuntimeError):  # a more important error is on its way
            self._under_way[1].wait(timedelta(seconds=PATIENCE))
        self._under_way = None

    def _start(self, number: int) -> None:
        value = torch.tensor(number)
        self._under_way = value, dist.all_reduce(value, dist.ReduceOp.MAX, group=self._group, async_op=True)

    def _finish(self) -> int:
        if self._under_way is None:
            return 0
        (value, work), self._under_way = self._under_way, None
        work.wait()
        return int(value)
