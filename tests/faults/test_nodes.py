"""Two machines on one: launchers in two network namespaces, each with an address of its own, and a cable between them.

    python -m pytest tests/faults/test_nodes.py -m faults

Needs the right to make network namespaces (root on Linux, with iproute2); is skipped elsewhere.
"""
import contextlib
import os
import re
import shutil
import signal
import subprocess
import time
import uuid
from pathlib import Path

import pytest
import torch

from tests.faults.test_processes import STEP, STOP, Job, _eventually, assert_ends_as, records, state_of
from utils.checkpoint_reader import read_checkpoint

pytestmark = pytest.mark.faults
PORT = 29500
# Nothing random but the samples, which belong to the step and not to the rank.
PLAIN = ('--model-kwargs', 'embed_dim=32', 'depth=2', 'num_heads=2', 'tokens_type=transformer', '-j', '0', '--opt',
         'momentum', '--drop-path', '0', '--mixup', '0', '--cutmix', '0', '--reprob', '0', '--no-model-ema', '-b', '16',
         '--global-batch-size', '32', '--experiment', 'run')
# To be told of a loss within the seconds of a test.
QUICK = {'NODE_TIMEOUT': '5', 'GRACE': '20', 'RDZV_TIMEOUT': '60'}


def ip(*words) -> None:
    subprocess.run(['ip', *words], check=True, capture_output=True, text=True)


class Network:
    """Two network namespaces with a cable between them; leaving the block removes them."""

    def __init__(self):
        self.name = f't2t{uuid.uuid4().hex[:6]}'

    def __enter__(self):
        try:
            for side in 'ab':
                ip('netns', 'add', self.name + side)
            ip('link', 'add', f'v{self.name}a', 'netns', f'{self.name}a', 'type', 'veth',
               'peer', 'name', f'v{self.name}b', 'netns', f'{self.name}b')
            for side in 'ab':
                ip('-n', self.name + side, 'addr', 'add', f'{self.address(side)}/30', 'dev', f'v{self.name}{side}')
                ip('-n', self.name + side, 'link', 'set', 'lo', 'up')
                self.plug(side, 'up')
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception):
        for side in 'ab':
            with contextlib.suppress(subprocess.CalledProcessError):
                ip('netns', 'del', self.name + side)

    @staticmethod
    def address(side: str) -> str:
        return {'a': '10.77.0.1', 'b': '10.77.0.2'}[side]

    def plug(self, side: str, state: str) -> None:
        ip('-n', self.name + side, 'link', 'set', f'v{self.name}{side}', state)

    def node(self, side: str, cwd, *options, **environment) -> Job:
        """A launcher with one process, on the machine a, which has the address where they meet, or b."""
        return Job(cwd, *options, inside=('ip', 'netns', 'exec', self.name + side), number=1,
                   **{'NNODES': '2', 'RDZV_ENDPOINT': f'{self.address("a")}:{PORT}', **QUICK, **environment})


@pytest.fixture
def network():
    if os.geteuid() or not shutil.which('ip'):
        pytest.skip('network namespaces need root and iproute2')
    try:
        with Network() as network:
            yield network
    except subprocess.CalledProcessError as error:
        pytest.skip(f'no network namespaces here: {error.stderr.strip()}')


def losses(run) -> torch.Tensor:
    """Of each step, once and in order."""
    lines = [record for record in records(run) if record['kind'] == 'train']
    assert [line['global_step'] for line in lines] == list(range(1, len(lines) + 1))
    return torch.tensor([line['loss'] for line in lines], dtype=torch.float64)


@pytest.fixture(scope='module')
def alone(tmp_path_factory):
    """One process that nothing happens to, and that takes the images of a step at once."""
    folder = tmp_path_factory.mktemp('alone')
    with Job(folder, *PLAIN, '-b', '32', '--epochs', '3', number=1) as job:
        code, said = job.ended()
    assert code == 0, said
    return folder / 'runs/train/run'


def test_two_nodes_end_in_the_bytes_of_one(network, tmp_path):
    one, two = tmp_path / 'one', tmp_path / 'two'
    one.mkdir(), two.mkdir()
    options = ('-j', '0', '--experiment', 'run', '--epochs', '1')
    with Job(one, *options) as job:
        code, said = job.ended()
    assert code == 0, said
    with network.node('b', two, *options) as b, network.node('a', two, *options) as a:
        ends = [node.ended() for node in (a, b)]
    assert [code for code, _ in ends] == [0, 0], ends
    assert_ends_as(one / 'runs/train/run', two / 'runs/train/run')


def kill(node: Job) -> None:
    """All its processes, as when its machine loses power; the launcher last, that it may tell nobody."""
    pids = node.processes()
    for pid in sorted(pids, key=lambda pid: pid == node.launcher.pid):
        os.kill(pid, signal.SIGKILL)
    node.launcher.wait()


def is_asked_to_stop(pid: int) -> bool:
    """Whether a SIGTERM waits for this stopped process to go on."""
    pending = re.search(r'ShdPnd:\s*(\w+)', Path(f'/proc/{pid}/status').read_text())
    return bool(int(pending[1], 16) & 1 << (signal.SIGTERM - 1))


@pytest.mark.parametrize(('how', 'side', 'stays'), [('killed', 'a', 'b'), ('unplugged', 'b', 'a')])
def test_a_lost_node_costs_no_step_and_comes_back(network, alone, tmp_path, how, side, stays):
    """In the midst of an epoch; the other goes on alone with the same steps, and again with it when it is back.

    A machine that is unplugged sends no word of it; its connections would hang for --timeout. Rank 0 is on machine a,
    whose address is the lower one.
    """
    options = (*PLAIN, '--epochs', '3', '--checkpoint-steps', '3', '--timeout', '600')
    env = {'NNODES': '1:2', 'RDZV_ENDPOINT': f'{network.address(stays)}:{PORT}'}
    # The survivor stops once more, after 17 steps alone, for the other to come back; less are left after that.
    with (network.node(stays, tmp_path, *options, **env, T2T_FAULTS='step@18!=stop') as survivor,
          network.node(side, tmp_path, *options, **env, T2T_FAULTS=f'step@{STEP}=stop') as victim):
        victim.stopped_process()
        lost = time.monotonic()
        if how == 'killed':
            kill(victim)
        else:
            network.plug(side, 'down')
        stopped = survivor.stopped_process()
        seconds = time.monotonic() - lost
        assert '1 machine(s), 1 process(es) go on' in survivor.said(), survivor.said()
        if how == 'unplugged':
            code, said = victim.ended()
            assert code == 5 and len(said.splitlines()) == 1 and 'out of reach for 5 s (NODE_TIMEOUT)' in said, said
            network.plug(side, 'up')
        with network.node(side, tmp_path, *options, **env) as back:
            _eventually(lambda: is_asked_to_stop(stopped), message=lambda: survivor.said() + back.said())
            os.kill(stopped, signal.SIGCONT)
            ends = [survivor.ended(), back.ended()]
    assert [code for code, _ in ends] == [0, 0], ends
    said = ends[0][1]
    assert 'a machine joins: the state is saved' in said and '2 machine(s), 2 process(es) go on' in said
    assert 'restart' not in said and 'Traceback' not in said + ends[1][1]
    run = tmp_path / 'runs/train/run'
    torch.testing.assert_close(losses(run), losses(alone), rtol=1e-4, atol=0)
    assert len(read_checkpoint(run / 'last.pth.tar')['ranks']) == 2
    assert seconds < 60


def test_sigterm_to_one_node_saves_and_ends_both(network, tmp_path):
    options = ('-j', '0', '--experiment', 'run')
    with (network.node('a', tmp_path, *options) as a,
          network.node('b', tmp_path, *options, T2T_FAULTS=f'step@{STEP}=stop') as b):
        stopped = b.stopped_process()
        os.kill(a.launcher.pid, signal.SIGTERM)
        time.sleep(1.5)  # for b to hear of it
        os.kill(stopped, signal.SIGCONT)
        ends = [a.ended(), b.ended()]
    assert [code for code, _ in ends] == [75, 75], ends
    run = tmp_path / 'runs/train/run'
    for _, said in ends:
        assert said.count('interrupted by SIGTERM; the state is saved') == 1 and 'Traceback' not in said, said
    steps = [record['global_step'] for record in records(run) if record['kind'] == 'train']
    assert state_of(run)['global_step'] == steps[-1] == STOP


def test_a_machine_that_waits_for_a_place_leaves_without_the_others(network, tmp_path):
    options = (*PLAIN, '--epochs', '1')
    env = {'NNODES': '1:2', 'RDZV_ENDPOINT': f'{network.address("a")}:{PORT}', 'T2T_FAULTS': f'step@{STEP}!=stop'}
    with network.node('a', tmp_path, *options, **env) as a, network.node('b', tmp_path, *options, **env) as b:
        stopped = [a.stopped_process(), b.stopped_process()]
        with network.node('b', tmp_path, *options, **env) as spare:
            _eventually(lambda: 'waiting for other machines, or for a place' in spare.said(), message=spare.said)
            os.kill(spare.launcher.pid, signal.SIGTERM)
            code, said = spare.ended()
        assert code == 75 and 'before there was anything to save' in said, said
        for pid in stopped:
            os.kill(pid, signal.SIGCONT)
        ends = [a.ended(), b.ended()]
    assert ends == [(0, ''), (0, '')]


def test_processes_save_everywhere_when_the_launcher_dies_that_holds_the_store(network, tmp_path):
    options = ('-j', '0', '--experiment', 'run')
    with (network.node('a', tmp_path, *options) as a,
          network.node('b', tmp_path, *options, T2T_FAULTS=f'step@{STEP}=stop') as b):
        stopped = b.stopped_process()
        os.kill(a.launcher.pid, signal.SIGKILL)
        a.launcher.wait()
        time.sleep(1)
        os.kill(stopped, signal.SIGCONT)
        ends = [a.ended(), b.ended()]
    assert [code for code, _ in ends] == [-signal.SIGKILL, 75], ends
    assert all('interrupted by SIGTERM; the state is saved' in said for _, said in ends), ends
    assert state_of(tmp_path / 'runs/train/run')['global_step'] == STOP


def test_a_process_that_hangs_on_another_node_is_named_there_and_shown_here(network, tmp_path):
    options = ('-j', '0', '--experiment', 'run', '--epochs', '1', '--timeout', '10')
    with (network.node('a', tmp_path, *options) as a,
          network.node('b', tmp_path, *options, T2T_FAULTS=f'step@{STEP}=stop') as b):
        ends = [a.ended(), b.ended()]
    assert [code for code, _ in ends] == [0, 0], ends
    assert 'waited 10 s (--timeout) in vain for rank 1, at step ' in ends[0][1]
    assert 'did not respond; its stack:' in ends[1][1] and 'a process on another machine has failed' in ends[1][1]


def test_a_crash_on_one_node_restarts_both(network, tmp_path):
    """Not only is nothing lost: the restarts are counted for both."""
    options = (*PLAIN, '--epochs', '1')
    with (network.node('a', tmp_path, *options, MAX_RESTARTS='1') as a,
          network.node('b', tmp_path, *options, MAX_RESTARTS='1', T2T_FAULTS='step@3!=kill') as b):
        ends = [a.ended(), b.ended()]
    assert [code for code, _ in ends] == [137, 137], ends
    assert '; restart 1 of 1' in ends[1][1] and 'after 1 restart(s)' in ends[1][1]
    assert 'was ended by SIGKILL' in ends[0][1].splitlines()[-1]


def test_a_mistake_ends_both_nodes_with_one_line(network, tmp_path):
    """One that both see at once; and one of a single machine, whose --output is not that of the other."""
    with network.node('a', tmp_path, '--lr', 'x') as a, network.node('b', tmp_path, '--lr', 'x') as b:
        both = [a.ended(), b.ended()]
    elsewhere = tmp_path / 'elsewhere'
    elsewhere.mkdir()
    with network.node('a', tmp_path, '-j', '0') as a, network.node('b', elsewhere, '-j', '0') as b:
        one = [a.ended(), b.ended()]
    for code, said in both + one:
        assert code == 2 and len(said.splitlines()) == 1 and said.startswith('train.py: error: '), said
    assert all('is not the same on every machine' in said for _, said in one)


def test_nobody_waits_for_ever(network, tmp_path):
    """One finds nobody at the meeting place, and one nobody else."""
    with network.node('b', tmp_path, RDZV_TIMEOUT='2') as b:
        code, said = b.ended()
    assert code == 2 and len(said.splitlines()) == 1, said
    assert f'waited 2 s (RDZV_TIMEOUT) in vain for the launcher at {network.address("a")}:{PORT}' in said
    with network.node('a', tmp_path, RDZV_TIMEOUT='3') as a:
        code, said = a.ended()
    assert code == 5 and len(said.splitlines()) == 1 and 'too few machines joined within RDZV_TIMEOUT' in said, said
