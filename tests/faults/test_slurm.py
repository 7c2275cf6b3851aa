"""launch/slurm.sbatch, with srun, scontrol and squeue that play an allocation of two nodes on this machine.

    python -m pytest tests/faults/test_slurm.py -m faults
"""
import os
import signal
import socket
import time

import pytest

from tests.conftest import ROOT
from tests.faults.test_processes import STEP, STOP, Job, assert_ends_as, records, state_of

pytestmark = pytest.mark.faults
# As the real one: a task on each node, which gets the signals that srun gets; its end is the worst of theirs.
SRUN = '''#!/usr/bin/env bash
echo "$@" >>"$STARTED"
while [[ "$1" = --* ]]; do shift; done
for node in 1 2; do "$@" & tasks+=($!); done
trap 'kill -USR1 "${tasks[@]}"' USR1
trap 'kill -TERM "${tasks[@]}"' TERM
worst=0
for task in "${tasks[@]}"; do
    while kill -0 "$task" 2>/dev/null; do wait "$task"; done
    wait "$task"
    code=$?
    [ "$code" -gt "$worst" ] && worst=$code
done
exit "$worst"
'''
SCONTROL = '''#!/usr/bin/env bash
case "$1" in
    show) echo 127.0.0.1; echo 127.0.0.2 ;;
    requeue) echo "$2" >>"$REQUEUED" ;;
esac
'''


class Allocation(Job):
    """The batch script's life in an allocation; `state` is what Slurm says of the job."""

    def __init__(self, cwd, *, state='RUNNING', restarts=0, port, **environment):
        tools = cwd / 'bin'
        tools.mkdir(exist_ok=True)
        for name, text in (('srun', SRUN), ('scontrol', SCONTROL), ('squeue', f'#!/usr/bin/env bash\necho {state}\n')):
            (tools / name).write_text(text)
            (tools / name).chmod(0o755)
        self.requeued, self.started = cwd / 'requeued', cwd / 'started'
        super().__init__(
            cwd, '-j', '0', '--output', str(cwd / 'runs'), command=('bash', ROOT / 'launch/slurm.sbatch'),
            PATH=f'{tools}:{os.environ["PATH"]}', SLURM_SUBMIT_DIR=str(ROOT), SLURM_JOB_ID=str(port - 20000),
            SLURM_JOB_NUM_NODES='2', SLURM_JOB_NODELIST='node[1-2]', SLURM_GPUS_ON_NODE='1',
            SLURM_RESTART_COUNT=str(restarts), REQUEUED=str(self.requeued),
            STARTED=str(self.started), SLURM_CPUS_PER_TASK='1', **environment)


@pytest.fixture
def port():
    for number in range(21000, 29000):
        with socket.socket() as probe:
            try:
                probe.bind(('', number))
                return number
            except OSError:
                continue
    return None


def test_a_job_saves_before_its_time_limit_and_goes_on_in_its_next_life(port, tmp_path):
    one = tmp_path / 'one'
    one.mkdir()
    with Job(one, '-j', '0', '--experiment', 'run') as job:
        code, said = job.ended()
    assert code == 0, said
    with Allocation(tmp_path, port=port, T2T_FAULTS=f'step@{STEP}#1=stop') as job:
        stopped = job.stopped_process()
        os.kill(job.launcher.pid, signal.SIGUSR1)
        time.sleep(1.5)
        os.kill(stopped, signal.SIGCONT)
        code, said = job.ended()
        steps, _, command = job.started.read_text().partition(' ./distributed_train.sh ')
        assert steps == '--nodes=2 --ntasks=2 --ntasks-per-node=1 --cpus-per-task=1'
        assert command.startswith(f'1 --experiment slurm-{port - 20000} --resume auto --dataset'), 'the user is last'
        assert code == 75 and 'interrupted by SIGUSR1; the state is saved' in said, said
        assert job.requeued.read_text() == f'{port - 20000}\n'
    run = tmp_path / f'runs/train/slurm-{port - 20000}'
    assert state_of(run)['global_step'] == STOP == records(run)[-1]['global_step']
    with Allocation(tmp_path, port=port, restarts=1) as job:
        code, said = job.ended()
        assert code == 0, said
    assert_ends_as(one / 'runs/train/run', run)


def test_a_job_that_is_cancelled_is_not_requeued(port, tmp_path):
    with Allocation(tmp_path, port=port, state='COMPLETING', T2T_FAULTS=f'step@{STEP}#1=stop') as job:
        stopped = job.stopped_process()
        os.kill(job.launcher.pid, signal.SIGTERM)
        time.sleep(1.5)
        os.kill(stopped, signal.SIGCONT)
        code, said = job.ended()
    assert code == 75 and not job.requeued.exists(), said
