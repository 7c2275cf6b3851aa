"""Processes that are killed, told to stop, or hang: what is saved, what goes on, what is left behind.

    python -m pytest tests/faults/test_processes.py            the quick part
    python -m pytest tests/faults/test_processes.py -m faults  every signal, to the launcher and to a process

Rank 1 stops itself within a step (SIGSTOP), so that a signal meets the job at a step that is known; then it goes on.
"""
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

from launch.agent import SURVIVAL_SECONDS
from tests.conftest import ROOT, SECONDS, assert_same, run_command, succeeded
from utils.checkpoint_reader import read_checkpoint

RUN = ('--dataset', 'digits', '--only-classes', '0-2', '--model', 't2t_vit_7', '--img-size', '32', '--device', 'cpu',
       '--model-kwargs', 'embed_dim=32', 'depth=2', 'num_heads=2', '-b', '16', '--epochs', '2',
       '--cooldown-epochs', '0', '--warmup-epochs', '0', '--lr', '1e-3', '--model-ema-decay', '0.9', '--log-interval',
       '1', '--checkpoint-steps', '3', '--no-tensorboard', '--output', 'runs')
TIMES = {'epoch_seconds', 'images_per_second'}
STEP = 8  # passes of the fault point: the signal comes in the step after 7 have been taken
STOP = STEP + 1  # the ranks agree on it while they take the next one


class Job:
    """./distributed_train.sh 2 OPTIONS… in a session of its own, all whose processes can be found by a mark.

    `command` is another one with the same options, `inside` are words before it. Leaving the block kills what is left
    of it. `ended()` waits for it and for the end of all its processes.
    """

    def __init__(self, cwd: Path, *options, inside=(), number=2, command=None, **environment):
        self.mark = f'T2T_TEST_JOB={uuid.uuid4()}'.encode()
        name, value = self.mark.decode().split('=')
        env = {**os.environ, 'PYTHON': sys.executable, 'HF_HUB_OFFLINE': '1', 'OMP_NUM_THREADS': '1', name: value,
               **environment}
        self.err = cwd / f'{value}.err'
        with open(self.err, 'w') as err, open(cwd / f'{value}.out', 'w') as out:
            self.launcher = subprocess.Popen(
                [*inside, *(command or (ROOT / 'distributed_train.sh', str(number))), *RUN, *options], cwd=cwd, env=env,
                stdout=out, stderr=err, stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=_heed_signals)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        for pid in self.processes():
            os.kill(pid, signal.SIGKILL)
        self.launcher.wait()

    def processes(self) -> list[int]:
        """All processes of the job that live, loader workers too."""
        return [pid for pid in map(int, filter(str.isdecimal, os.listdir('/proc')))
                if self.mark in _read(f'/proc/{pid}/environ')]

    def rank(self, rank: int) -> int | None:
        """The process of this rank. Its loader workers have its environment, but not its parent."""
        for pid in self.processes():
            is_child = _stat(pid)[1:] == [str(self.launcher.pid)]
            if is_child and f'RANK={rank}'.encode() in _read(f'/proc/{pid}/environ').split(b'\0'):
                return pid
        return None

    def stopped_process(self) -> int:
        """Waits until one of them, whichever rank it is, has been stopped; returns it."""
        return _eventually(lambda: next((pid for pid in self.processes() if _stat(pid)[:1] == ['T']), None),
                           message=self.said)

    def stopped_rank(self, rank: int) -> int:
        """Waits until this rank has been stopped; returns its process."""
        return _eventually(lambda: (pid := self.rank(rank)) and _stat(pid)[:1] == ['T'] and pid)

    def ended(self) -> tuple[int, str]:
        """The launcher's exit code and what it has printed, when all processes have ended; fails if one lives on."""
        code = self.launcher.wait(SECONDS)
        # The processes save after a launcher that was killed; loader workers look for their parent every 5 s.
        _eventually(lambda: not self.processes(), 20, lambda: f'left behind: {self._describe()}\n{self.said()}')
        return code, self.said()

    def said(self) -> str:
        return self.err.read_text()

    def _describe(self) -> list[str]:
        return [f'{pid} {_read(f"/proc/{pid}/cmdline")[-200:]}' for pid in self.processes()]


def _heed_signals() -> None:
    """A test run that was started in the background ignores Ctrl-C, and its children would inherit that."""
    for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def _read(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError:
        return b''


def _stat(pid: int) -> list[str]:
    """[state, parent] of a process, or [] when it is gone."""
    return _read(f'/proc/{pid}/stat').decode().rpartition(')')[2].split()[:2]


def _eventually(condition, seconds: float = 90, message=lambda: 'it did not happen'):
    end = time.monotonic() + seconds
    while not (result := condition()):
        assert time.monotonic() < end, message()
        time.sleep(0.05)
    return result


def records(run: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run / 'metrics.jsonl').read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMES} for line in lines]


def state_of(run: Path) -> dict:
    return {k: v for k, v in read_checkpoint(run / 'last.pth.tar').items() if k != 'args'}


def assert_ends_as(uninterrupted: Path, run: Path) -> None:
    assert_same(state_of(uninterrupted), state_of(run))
    assert records(run) == records(uninterrupted)


@pytest.fixture(scope='module')
def uninterrupted(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp('uninterrupted')
    with Job(folder, '-j', '0', '--experiment', 'run') as job:
        code, said = job.ended()
    assert code == 0, said
    run = folder / 'runs/train/run'
    assert read_checkpoint(run / 'last.pth.tar')['global_step'] > 2 * STEP, 'the runs must be longer than this'
    return run


@pytest.mark.faults
def test_a_killed_process_costs_no_byte_and_few_seconds(uninterrupted, tmp_path, record_property):
    """The job goes on from its last checkpoint by itself, and ends as if nothing had been."""
    with Job(tmp_path, '-j', '1', '--experiment', 'run', T2T_FAULTS=f'step@{STEP}#1=stop') as job:
        victim = job.stopped_rank(1)
        survivor = job.rank(0)
        os.kill(victim, signal.SIGKILL)
        killed = time.time()
        metrics = tmp_path / 'runs/train/run/metrics.jsonl'
        before = metrics.stat().st_mtime_ns
        _eventually(lambda: job.rank(0) not in (survivor, None) and metrics.stat().st_mtime_ns > before
                    and f'"global_step": {STEP}' in metrics.read_text())
        seconds = time.time() - killed
        code, said = job.ended()
    assert code == 0, said
    assert 'rank 1 was ended by SIGKILL' in said and 'restart 1 of 3' in said
    assert 'Traceback' not in said, 'what the survivor makes of it is no news'
    assert_ends_as(uninterrupted, tmp_path / 'runs/train/run')
    record_property('seconds from kill to next training step', round(seconds, 1))
    assert seconds < 15


@pytest.mark.faults
def test_a_killed_loader_worker_costs_no_byte(uninterrupted, tmp_path):
    """As the system does when memory runs out, for once."""
    with Job(tmp_path, '-j', '1', '--experiment', 'run', T2T_FAULTS='data.train@10#1=kill') as job:
        code, said = job.ended()
    assert code == 0, said
    assert 'a data loading process died' in said and 'restart 1 of 3' in said and 'Traceback' not in said
    assert_ends_as(uninterrupted, tmp_path / 'runs/train/run')


def interrupt(cwd: Path, number: int, *, whom: str) -> tuple[int, str]:
    """Sends a signal to the launcher or to rank 1 in the midst of a step; returns exit code and what was said."""
    with Job(cwd, '-j', '1', '--experiment', 'run', T2T_FAULTS=f'step@{STEP}#1=stop') as job:
        stopped = job.stopped_rank(1)
        os.kill(job.launcher.pid if whom == 'launcher' else stopped, number)
        if number != signal.SIGSTOP:
            time.sleep(0.5)  # for the launcher to pass it on, or to die
        os.kill(stopped, signal.SIGCONT)
        if number == signal.SIGSTOP:
            time.sleep(2)
            os.kill(job.launcher.pid if whom == 'launcher' else stopped, signal.SIGCONT)
        return job.ended()


def assert_nothing_lost(run: Path) -> None:
    """The checkpoint stands where the log does: every step that was taken is saved, the one under way too."""
    steps = [record['global_step'] for record in records(run) if record['kind'] == 'train']
    assert state_of(run)['global_step'] == steps[-1] == STOP


def go_on(cwd: Path, said: str) -> None:
    """Runs the command that the interrupted run has printed."""
    command = shlex.split(re.search(r'To go on: (.*)', said)[1])
    succeeded(run_command(command, cwd, OMP_NUM_THREADS='1'))


SAVED = [('launcher', 'SIGTERM', 75), ('launcher', 'SIGUSR1', 75), ('launcher', 'SIGHUP', 75),
         ('launcher', 'SIGQUIT', 75), ('launcher', 'SIGINT', 130), ('rank 1', 'SIGTERM', 75),
         ('rank 1', 'SIGUSR1', 75), ('rank 1', 'SIGHUP', 75), ('rank 1', 'SIGQUIT', 75), ('rank 1', 'SIGINT', 130)]


@pytest.mark.faults
@pytest.mark.parametrize(('whom', 'name', 'exit_code'), SAVED)
def test_a_signal_loses_no_step(uninterrupted, tmp_path, whom, name, exit_code, record_property):
    record_property('signal', name)
    code, said = interrupt(tmp_path, getattr(signal, name), whom=whom)
    run = tmp_path / 'runs/train/run'
    assert code == exit_code, said
    assert f'interrupted by {name}; the state is saved, in epoch 1, after step {STOP}. To go on: ' in said
    assert 'Traceback' not in said and said.count('interrupted by') == 1
    assert_nothing_lost(run)
    go_on(tmp_path, said)
    assert_ends_as(uninterrupted, run)


@pytest.mark.faults
@pytest.mark.parametrize('name', ['SIGKILL', 'SIGABRT', 'SIGSEGV'])
def test_processes_save_and_end_with_a_launcher_that_dies(uninterrupted, tmp_path, name, record_property):
    record_property('signal', name)
    code, said = interrupt(tmp_path, getattr(signal, name), whom='launcher')
    run = tmp_path / 'runs/train/run'
    assert code == -getattr(signal, name), said
    assert 'interrupted by SIGTERM; the state is saved' in said
    assert_nothing_lost(run)
    go_on(tmp_path, said)
    assert_ends_as(uninterrupted, run)


@pytest.mark.faults
@pytest.mark.parametrize('name', ['SIGABRT', 'SIGSEGV'])
def test_a_crash_of_a_process_is_a_restart(uninterrupted, tmp_path, name, record_property):
    record_property('signal', name)
    code, said = interrupt(tmp_path, getattr(signal, name), whom='rank 1')
    assert code == 0, said
    assert f'rank 1 was ended by {name}' in said and 'restart 1 of 3' in said
    assert_ends_as(uninterrupted, tmp_path / 'runs/train/run')


@pytest.mark.faults
@pytest.mark.parametrize('whom', ['launcher', 'rank 1'])
def test_a_pause_changes_nothing(uninterrupted, tmp_path, whom, record_property):
    record_property('signal', 'SIGSTOP')
    code, said = interrupt(tmp_path, signal.SIGSTOP, whom=whom)
    assert code == 0 and 'restart' not in said, said
    assert_ends_as(uninterrupted, tmp_path / 'runs/train/run')


@pytest.mark.faults
def test_a_launcher_that_is_killed_while_it_is_stopped_leaves_nothing(tmp_path):
    with Job(tmp_path, '-j', '1', '--experiment', 'run', T2T_FAULTS=f'step@{STEP}#1=stop') as job:
        stopped = job.stopped_rank(1)
        os.kill(job.launcher.pid, signal.SIGSTOP)
        os.kill(job.launcher.pid, signal.SIGKILL)
        job.launcher.wait(timeout=30)  # only its end tells its processes
        os.kill(stopped, signal.SIGCONT)
        code, said = job.ended()
    assert code == -signal.SIGKILL
    assert_nothing_lost(tmp_path / 'runs/train/run')


@pytest.mark.faults
def test_a_process_that_hangs_is_named_with_its_stack(tmp_path):
    with Job(tmp_path, '-j', '0', '--experiment', 'run', '--timeout', '15', MAX_RESTARTS='0',
             T2T_FAULTS=f'step@{STEP}#1=stop') as job:
        code, said = job.ended()
    assert code == 4, said
    line = next(line for line in said.splitlines() if 'in vain' in line)
    # Steps of milliseconds are too many to tell of each of them.
    step = re.search(r'train.py: error: waited 15 s \(--timeout\) in vain for rank 1, at step (\d+) since ', line)
    assert int(step[1]) < STEP
    assert 'silent since' in line and 'rank 0' not in line
    stack = said[said.index('rank 1 (process '):]
    assert 'did not respond; its stack:' in stack and re.search(r'engine/step.py", line \d+ in __call__', stack)
    assert 'Traceback' not in said


@pytest.mark.faults
def test_a_hang_is_a_restart(uninterrupted, tmp_path):
    with Job(tmp_path, '-j', '0', '--experiment', 'run', '--timeout', '15', T2T_FAULTS=f'step@{STEP}#1=stop') as job:
        code, said = job.ended()
    assert code == 0 and 'in vain for rank 1' in said and 'restart 1 of 3' in said, said
    assert_ends_as(uninterrupted, tmp_path / 'runs/train/run')


@pytest.mark.faults
def test_restarts_are_counted_and_end(tmp_path):
    with Job(tmp_path, '-j', '0', '--experiment', 'run', MAX_RESTARTS='1', T2T_FAULTS='step@2#1!=kill') as job:
        code, said = job.ended()
    assert code == 128 + signal.SIGKILL, said
    assert said.count('; restart 1 of 1') == 1 and 'after 1 restart(s); --resume auto goes on' in said


@pytest.mark.faults
def test_decisions_are_not_restarted(tmp_path):
    for options, faults, expected in ((('--lr', 'x'), '', 2), (('--max-skipped-steps', '1'), 'loss@2+=nan', 3)):
        with Job(tmp_path, '-j', '0', '--experiment', f'run{expected}', *options, T2T_FAULTS=faults) as job:
            code, said = job.ended()
        assert code == expected and 'restart' not in said and 'Traceback' not in said, said


@pytest.mark.faults
def test_a_second_ctrl_c_ends_at_once(tmp_path):
    """A process that does not reach the end of its step would have two minutes."""
    with Job(tmp_path, '-j', '1', '--experiment', 'run', T2T_FAULTS=f'step@{STEP}#1=stop') as job:
        job.stopped_rank(1)
        os.kill(job.launcher.pid, signal.SIGINT)
        time.sleep(1.5)
        os.kill(job.launcher.pid, signal.SIGINT)
        started = time.monotonic()
        code, said = job.ended()
    assert code == 130 and 'interrupted twice' in said, said
    assert time.monotonic() - started < 10


@pytest.mark.faults
def test_a_process_that_does_not_end_in_the_grace_time_is_killed(tmp_path):
    with Job(tmp_path, '-j', '1', '--experiment', 'run', GRACE='2', T2T_FAULTS=f'step@{STEP}#1=stop') as job:
        job.stopped_rank(1)
        os.kill(job.launcher.pid, signal.SIGTERM)
        code, said = job.ended()
    assert code == 128 + signal.SIGTERM and 'stopped by SIGTERM' in said and 'were killed' in said, said


@pytest.mark.faults
def test_nobody_ends_before_what_rank_0_saves_is_saved(tmp_path):
    """Rank 1 has nothing to write, but waits; rank 0 takes longer than the survivors of a crash are given."""
    with Job(tmp_path, '-j', '0', '--experiment', 'run', '--checkpoint-steps', '0',
             T2T_FAULTS=f'step@{STEP}#1=term,save.written#0=stop') as job:
        saving = job.stopped_rank(0)
        time.sleep(SURVIVAL_SECONDS + 1)
        assert job.rank(1) is not None
        os.kill(saving, signal.SIGCONT)
        code, said = job.ended()
    assert code == 75 and 'the state is saved' in said, said
    assert_nothing_lost(tmp_path / 'runs/train/run')


# Where the data of rank 1 stops: in the first batch, in that of step STOP + 1 and in an evaluation; and where all end.
# The batch before the last one may be lost in the pipe of a worker that stops.
STALLS = {'data.train': 'before the first step', f'data.train@{STOP + 1}': f'in epoch 1, after step [{STOP - 1}{STOP}]',
          'data.val@2': r'in epoch 1, after step 1\d'}


@pytest.mark.faults
@pytest.mark.parametrize('whom', ['launcher', 'launcher killed'])
@pytest.mark.parametrize('where', STALLS)
def test_a_signal_ends_a_wait_for_data(uninterrupted, tmp_path, where, whom):
    """Its loader worker stops, as one does that reads from a server which hangs. The other rank waits for this one."""
    with Job(tmp_path, '-j', '1', '--experiment', 'run', T2T_FAULTS=f'{where}#1=stop') as job:
        job.stopped_process()
        time.sleep(4)  # the ranks take the steps that they have batches for
        os.kill(job.launcher.pid, signal.SIGTERM if whom == 'launcher' else signal.SIGKILL)
        started = time.monotonic()
        code, said = job.ended()
        assert time.monotonic() - started < 12
    run = tmp_path / 'runs/train/run'
    assert code == (75 if whom == 'launcher' else -signal.SIGKILL), said
    assert re.search(rf'interrupted by SIGTERM; the state is saved, {STALLS[where]}\.', said), said
    assert 'Traceback' not in said
    go_on(tmp_path, said)
    assert_ends_as(uninterrupted, run)


@pytest.mark.faults
@pytest.mark.parametrize('end', ['done', 'stopped', 'a mistake'])
def test_a_job_leaves_no_temporary_files(tmp_path, tmp_path_factory, end):
    temporary = tmp_path_factory.mktemp('t')  # a short path, so that sockets are there too
    options = {'done': ('--epochs', '1'), 'stopped': (), 'a mistake': ('--lr', 'x')}[end]
    with Job(tmp_path, '-j', '1', '--experiment', 'run', *options, TMPDIR=str(temporary),
             T2T_FAULTS=f'step@{STEP}=term' if end == 'stopped' else '') as job:
        code, said = job.ended()
    assert code == {'done': 0, 'stopped': 75, 'a mistake': 2}[end], said
    # Importing timm makes an empty folder for compiled code.
    left = [path.name for path in temporary.iterdir()]
    assert end == 'done' and not left or [name for name in left if not name.startswith('torchinductor_')] == []


@pytest.mark.faults
def test_one_process_ends_a_wait_for_data_too(tmp_path):
    """Its worker, which hangs, ends with it, and as well if it is killed."""
    for number, code in ((signal.SIGTERM, 75), (signal.SIGKILL, -signal.SIGKILL)):
        with Job(tmp_path, '-j', '1', '--experiment', number.name, command=(sys.executable, str(ROOT / 'train.py')),
                 T2T_FAULTS='data.train@3=stop') as job:
            stopped = job.stopped_process()
            time.sleep(2)
            os.kill(job.launcher.pid, number)
            if number == signal.SIGKILL:
                time.sleep(1)
                os.kill(stopped, signal.SIGCONT)
            assert job.ended()[0] == code


@pytest.mark.faults
@pytest.mark.parametrize('name', ['SIGTERM', 'SIGUSR1', 'SIGINT'])
def test_before_training_a_signal_ends_the_job_at_once(tmp_path, name):
    with Job(tmp_path, '-j', '0', '--experiment', 'run') as job:
        _eventually(lambda: job.rank(0) and job.rank(1))
        time.sleep(1)  # its imports are under way
        os.kill(job.launcher.pid, getattr(signal, name))
        code, said = job.ended()
    assert code == (130 if name == 'SIGINT' else 75), said
    assert len(said.splitlines()) == 1 and 'Traceback' not in said, said


@pytest.mark.parametrize(('name', 'value'), [('MAX_RESTARTS', 'many'), ('GRACE', '-1')])
def test_settings_of_the_launcher_are_checked(tmp_path, name, value):
    with Job(tmp_path, **{name: value}) as job:
        code, said = job.ended()
    assert code == 2 and said.startswith(f'launcher.py: error: {name}={value}: ') and said.count('\n') == 1, said


@pytest.mark.faults
def test_processes_that_wait_in_vain_end_after_their_launcher(tmp_path):
    """As for data that never comes: one is stopped, and the other waits for it within a step."""
    with Job(tmp_path, '-j', '0', '--experiment', 'run', GRACE='3', T2T_FAULTS=f'step@{STEP}#1=stop') as job:
        stopped, waiting = job.stopped_rank(1), job.rank(0)
        time.sleep(1)
        os.kill(job.launcher.pid, signal.SIGKILL)
        _eventually(lambda: _stat(waiting)[:1] in ([], ['Z']), 15)
        os.kill(stopped, signal.SIGKILL)
        _, said = job.ended()
    assert 'the launcher has ended, and the state could not be saved in 3 s' in said and 'Traceback' not in said


HARMLESS = ('SIGWINCH', 'SIGCONT', 'SIGURG', 'SIGCHLD', 'SIGIO')


@pytest.mark.faults
@pytest.mark.parametrize('whom', ['launcher', 'rank 1'])
def test_signals_that_ask_for_nothing_change_nothing(uninterrupted, tmp_path, whom):
    """As a terminal sends one that is resized, and a kernel for input or output that is ready."""
    with Job(tmp_path, '-j', '1', '--experiment', 'run', T2T_FAULTS=f'step@{STEP}#1=stop') as job:
        stopped = job.stopped_rank(1)
        for name in HARMLESS:
            os.kill(job.launcher.pid if whom == 'launcher' else stopped, getattr(signal, name))
        os.kill(stopped, signal.SIGCONT)
        code, said = job.ended()
    assert code == 0 and 'ended by' not in said and 'interrupted' not in said, said
    assert_ends_as(uninterrupted, tmp_path / 'runs/train/run')


MACHINES = {
    'without a name': ('-u', 'hostname no-such-host', 0),
    'without a name or a network': ('-nu', 'hostname no-such-host; ip link set lo up', 0),
    'without a name or IPv4': ('-nu', 'hostname no-such-host; ip link set lo up; ip addr del 127.0.0.1/8 dev lo', 0),
    'without any interface': ('-n', 'true', 2)}


@pytest.mark.faults
@pytest.mark.parametrize('machine', MACHINES)
def test_two_processes_on_a_machine(tmp_path, machine):
    flags, setup, expected = MACHINES[machine]
    if subprocess.run(['unshare', flags, 'sh', '-c', setup], capture_output=True).returncode:
        pytest.skip('namespaces of names and networks need root and iproute2')
    inside = ('unshare', flags, 'sh', '-c', f'{setup}; exec "$@"', 'sh')
    with Job(tmp_path, '-j', '0', '--experiment', 'run', inside=inside) as job:
        code, said = job.ended()
    assert code == expected, said
    assert said.count('\n') == (1 if expected else 0) and ('no loopback interface' in said) == bool(expected), said
