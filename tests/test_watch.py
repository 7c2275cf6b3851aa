"""A rank that did not come is named where the others hang with their devices; what only a GPU has is stood in for."""
import contextlib
import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from unittest.mock import create_autospec

import pytest
import torch
import torch.distributed as dist

from tests.conftest import ROOT, launch, run_command
from utils import distributed, exits, watch

STUCK = {'SCRIPT': 'tests/stuck.py', 'OMP_NUM_THREADS': '1'}


def eventually(condition) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


# --- The device ------------------------------------------------------------------------------------------------------

class Device:
    """Is past no mark put into it while it is `stuck`; counts those that are put and those that are under way."""

    def __init__(self, *, stuck: bool):
        self.stuck = stuck
        self.put = self.looks = 0

    def mark(self):
        self.put += 1
        return self._is_passed

    def _is_passed(self) -> bool:
        self.looks += 1
        return not self.stuck


@pytest.fixture
def clock(monkeypatch):
    """Time stands still for the watch, but for what a test adds to it; its beats are short."""
    now = [100.0]
    monkeypatch.setattr(watch, 'time', type('time', (), {'monotonic': lambda: now[0]}))
    monkeypatch.setattr(watch, 'BEAT', 0.01)
    return now


@contextlib.contextmanager
def watching(mark):
    device_watch = watch.DeviceWatch(mark)
    try:
        yield device_watch
    finally:
        device_watch.stop()


def waited(device_watch, clock, *, beats: int) -> float:
    """What the watch knows, asked once more after each of so many beats."""
    device_watch.waited()
    for _ in range(beats):
        clock[0] += watch.BEAT
        seconds = device_watch.waited()
    return seconds


def test_a_device_that_goes_on_never_waits(clock):
    device = Device(stuck=False)
    with watching(device.mark) as device_watch:
        for count in range(1, 6):
            eventually(lambda count=count: device.put > count)
            assert waited(device_watch, clock, beats=1) <= watch.BEAT


def test_a_device_that_stands_still_waits_before_one_mark(clock):
    device = Device(stuck=True)
    with watching(device.mark) as device_watch:
        eventually(lambda: device.looks > 5)
        assert device.put == 1  # no more are put, however long it takes
        assert waited(device_watch, clock, beats=50) == pytest.approx(50 * watch.BEAT)
        device.stuck = False
        eventually(lambda: device.put > 2)
        device_watch.waited()
        assert waited(device_watch, clock, beats=1) <= watch.BEAT


def test_a_device_that_takes_no_mark_waits(clock):
    """As when its queue is full: putting the mark hangs."""
    called, released = threading.Event(), threading.Event()

    def hang():
        called.set()
        released.wait()
        return lambda: True

    with watching(hang) as device_watch:
        called.wait()
        assert waited(device_watch, clock, beats=50) == pytest.approx(50 * watch.BEAT)
        released.set()


def test_a_pause_of_the_process_is_no_wait(clock):
    device = Device(stuck=True)
    with watching(device.mark) as device_watch:
        eventually(lambda: device.put)
        device_watch.waited()
        clock[0] += 3600
        assert device_watch.waited() <= 2 * watch.BEAT


def test_a_device_that_fails_is_left_to_the_main_thread(clock):
    def fail():
        raise RuntimeError('CUDA error: an illegal memory access was encountered')

    with watching(fail) as device_watch:
        device_watch._thread.join(30)
        assert not device_watch._thread.is_alive()
        assert waited(device_watch, clock, beats=50) == 0


def test_marks_are_passed_when_the_device_has_written_them():
    marks = watch.DeviceMarks(torch.device('cpu'))
    assert marks()() and marks()()
    marks._source.zero_()  # nothing is written
    is_passed = marks()
    assert not is_passed()
    marks._seen.fill_(1)
    assert is_passed()


# --- The rank --------------------------------------------------------------------------------------------------------

class Waiting:
    """Stands for a DeviceWatch that has waited so long."""

    def __init__(self, seconds: float):
        self.waited = lambda: seconds


@pytest.fixture
def progress(monkeypatch):
    """Rank 0 of three with a timeout of 60 s; rank 1 waits, and rank 2 loads a batch."""
    monkeypatch.setattr(distributed, 'PATIENCE', 0.3)
    progress = distributed._Progress()
    progress._store, progress._rank, progress._size = dist.HashStore(), 0, 3
    progress.timeout = timedelta(seconds=60)
    progress._store.set('waiting/1', '')
    now = time.time()
    progress._store.set('progress/2', json.dumps({'step': 7, 'since': now, 'now': now, 'where': 'data/loader.py:98'}))
    progress.said = []
    monkeypatch.setattr(distributed, 'fail', progress.said.append)
    return progress


@pytest.mark.parametrize(('seconds', 'someone_waits', 'ends'), [
    (0.0, True, False), (59.0, False, False), (60.5, False, True),
    (0.2, True, False), (0.4, True, True),  # at another's word, if it is no mere moment
])
def test_a_rank_ends_that_waits_in_vain(progress, seconds, someone_waits, ends):
    progress._device = Waiting(seconds)
    if someone_waits:
        progress._store.set('someone waits', '')
    progress._end_if_in_vain()
    assert len(progress.said) == ends
    assert progress._store.check(['waiting/0']) == ends
    for error in progress.said:
        assert error.exit_code == 4
        assert str(error).startswith('waited 60 s (--timeout) in vain for rank 2, at step 7 since ')
        assert str(error).endswith(', in data/loader.py:98')


def test_the_network_and_the_devices_are_to_blame_where_all_wait(progress):
    progress._device = Waiting(61)
    progress._store.set('waiting/2', '')
    progress._end_if_in_vain()
    [error] = progress.said
    assert 'in vain, as all ranks did; see to the network between them and to their GPUs' in str(error)


def test_a_rank_that_has_left_says_nothing(progress):
    progress._device = Waiting(61)
    progress._stopped.set()
    progress._end_if_in_vain()
    progress._store = None  # and so has the launcher
    progress._end_if_in_vain()
    assert progress.said == []


def test_threads_do_not_report_at_the_same_time(monkeypatch, tmp_path):
    """The launcher reads what the first has said, and all of it."""
    path = tmp_path / 'error'
    monkeypatch.setenv('TORCHELASTIC_ERROR_FILE', str(path))
    leaving, ended = threading.Event(), threading.Event()
    monkeypatch.setattr(exits, 'leave_at_once', lambda code: (leaving.set(), ended.wait(30)))
    first = threading.Thread(target=exits.report, args=('first', 4))
    first.start()
    leaving.wait()
    second = threading.Thread(target=exits.report, args=('second', 4))
    second.start()
    second.join(0.3)
    assert json.loads(path.read_text())['message'] == 'first'
    ended.set()
    first.join()
    second.join()


# --- A GPU, by stand-ins ---------------------------------------------------------------------------------------------

def test_on_gpus_nccl_is_more_patient_than_the_watch_and_hosts_talk_over_gloo(monkeypatch):
    calls = {}
    gloo = create_autospec(dist.ProcessGroup, instance=True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    monkeypatch.setattr(torch.cuda, 'set_device', lambda device: None)
    monkeypatch.setattr(distributed, '_meet', lambda rank, size: dist.HashStore())
    monkeypatch.setattr(dist, 'init_process_group', lambda backend, **kwargs: calls.update(kwargs, backend=backend))
    monkeypatch.setattr(dist, 'is_initialized', lambda: 'backend' in calls)
    monkeypatch.setattr(dist, 'get_world_size', lambda: 2)
    monkeypatch.setattr(dist, 'destroy_process_group', calls.clear)
    monkeypatch.setattr(dist, 'new_group', lambda **kwargs: calls.update(host=kwargs) or gloo)
    monkeypatch.setattr(distributed, 'DeviceMarks', lambda device: calls.update(marked=device) or Device(stuck=0).mark)
    for name, value in {'RANK': 1, 'WORLD_SIZE': 2, 'LOCAL_RANK': 1, 'LOCAL_WORLD_SIZE': 2,
                        'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': 29500}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv('TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC', '')  # so that it is as before when the test has ended
    monkeypatch.delenv('TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC')
    timeout, cuda = timedelta(minutes=30), torch.device('cuda', 1)
    try:
        world = distributed.init_process_group('cuda', timeout)
        assert world.device == calls['device_id'] == calls['marked'] == cuda and calls['backend'] == 'nccl'
        # From the watch's first word to the launcher's end of all processes.
        assert calls['timeout'] > timeout + 10 * timedelta(seconds=distributed.PATIENCE)
        assert distributed.os.environ['TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC'] == str(calls['timeout'].seconds)
        assert calls['host'] == {'backend': 'gloo', 'timeout': timeout}
        groups = []
        monkeypatch.setattr(dist, 'broadcast_object_list', lambda box, group: groups.append(group))
        monkeypatch.setattr(dist, 'all_gather_object', lambda values, value, group: groups.append(group))
        distributed.from_main(1)
        distributed.gather(1)
        with distributed.one_per_machine_first(world):
            pass
        assert groups == [gloo] * 3
        assert distributed._progress._device is not None
    finally:
        distributed.destroy_process_group()
    assert distributed._host_group is None and distributed._progress._device is None


# --- Jobs ------------------------------------------------------------------------------------------------------------

def test_the_rank_that_did_not_come_is_named_where_nothing_raises(tmp_path):
    """A read hangs for ever on the others, of which one came so late that its own time is not over."""
    result = launch(3, 'device', '--device', 'cpu', cwd=tmp_path, **STUCK)
    assert result.returncode == 4, result.stderr
    last = result.stderr.splitlines()[-1]
    assert last.startswith('stuck.py: error: waited 9 s (--timeout) in vain for rank 1, at step 2 since '), last
    assert '(oversleep)' in last and 'rank 0' not in last and 'rank 2' not in last
    assert 'rank 1 (process ' in result.stderr and result.stderr.count('did not respond; its stack:') == 1


def test_the_crash_is_named_and_not_what_was_aborted_for_it(tmp_path):
    result = launch(2, 'killed', '--device', 'cpu', cwd=tmp_path, **STUCK)
    assert result.returncode == 137, result.stderr
    assert result.stderr.splitlines()[-1].startswith('rank 1 was ended by SIGKILL')


def test_a_hang_is_named_on_a_machine_that_only_knows_of_what_was_aborted_for_it(tmp_path):
    """Two launchers, each with one process."""
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    command = [ROOT / 'distributed_train.sh', 1, 'aborted', '--device', 'cpu']
    nodes = {'NNODES': '2', 'RDZV_ENDPOINT': f'127.0.0.1:{port}', 'RDZV_TIMEOUT': '60', **STUCK}
    with ThreadPoolExecutor(2) as pool:
        ends = list(pool.map(lambda _: run_command(command, tmp_path, **nodes), range(2)))
    assert [end.returncode for end in ends] == [4, 4], [end.stderr for end in ends]
    assert all(end.stderr.splitlines()[-1] == 'stuck.py: error: waited in vain for rank 2' for end in ends)
