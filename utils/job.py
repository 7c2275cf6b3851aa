"""The environment variables of the launcher. No other module reads them.

A process without a launcher is rank 0 of 1 and was never restarted.
"""
import os
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path

STARTED, LAUNCHER, COMMAND, GRACE = 'T2T_STARTED', 'T2T_LAUNCHER', 'T2T_COMMAND', 'T2T_GRACE'
OF_A_JOB = ('TORCHELASTIC', 'MASTER_', 'NNODES', 'RDZV_', 'PET_', 'T2T_')
OF_A_PROCESS = ('RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'LOCAL_WORLD_SIZE')
# Variables in which other programs tell each of their tasks how many there are.
TASKS = {'SLURM_STEP_NUM_TASKS': 'srun', 'OMPI_COMM_WORLD_SIZE': 'mpirun', 'MV2_COMM_WORLD_SIZE': 'mpirun',
         'PMI_SIZE': 'mpiexec', 'JSM_NAMESPACE_SIZE': 'jsrun', 'FLUX_JOB_SIZE': 'flux run'}

_launcher: int | None = None


def rank() -> int:
    return _number('RANK', 0)


def world_size() -> int:
    return _number('WORLD_SIZE', 1)


def local_rank() -> int:
    return _number('LOCAL_RANK', 0)


def local_world_size() -> int:
    return _number('LOCAL_WORLD_SIZE', 1)


def _number(name: str, default: int) -> int:
    """Return the number in a variable; `default` if it is missing, empty or no number (see `mistake`)."""
    value = os.environ.get(name, '')
    return int(value) if value.isdecimal() else default


def mistake() -> str | None:
    """Return what is wrong with the variables that tell this process its rank, in one line, or None."""
    given = {name: os.environ.get(name, '') for name in OF_A_PROCESS}
    for name, value in given.items():
        if value and not value.isdecimal():
            return f'{name}={value} is not a number; unset it, or start the job by ./distributed_train.sh'
    if rank() >= world_size():
        return (f'RANK={rank()}, but WORLD_SIZE={given["WORLD_SIZE"] or "(not set)"}; unset both, or start the job by '
                './distributed_train.sh')
    needed = ('RANK', 'MASTER_ADDR', 'MASTER_PORT')
    if world_size() > 1 and (missing := [name for name in needed if not os.environ.get(name)]):
        return (f'WORLD_SIZE={world_size()}, but {" and ".join(missing)} not set; unset WORLD_SIZE, or start the job '
                'by ./distributed_train.sh')
    return None


def separate_tasks(*, launchers: bool = False) -> str | None:
    """Return which program has started several tasks that know nothing of one another, in one line, or None.

    Args:
        launchers: the tasks are launchers, not processes.
    """
    if os.environ.get('NNODES' if launchers else 'WORLD_SIZE'):  # they know one another, or are to be separate
        return None
    for name, program in TASKS.items():
        if (number := _number(name, 1)) > 1:
            return f'{program} has started {number} tasks ({name}), each of which would be a job of its own'
    return None


def is_launched() -> bool:
    return 'TORCHELASTIC_RUN_ID' in os.environ


def restart_count() -> int:
    """Return how often the launcher restarted the processes after a crash."""
    return int(os.environ.get('TORCHELASTIC_RESTART_COUNT', 0))


def was_restarted() -> bool:
    """Tell whether this process replaces one that crashed."""
    return restart_count() > 0


def start_time() -> str | None:
    """Return the first start of the job as YYYYMMDD-HHMMSS, which restarts do not change; None without a launcher."""
    return os.environ.get(STARTED)


def error_file() -> Path | None:
    """Return the file from which the launcher reads this process's last message."""
    name = os.environ.get('TORCHELASTIC_ERROR_FILE')
    return Path(name) if name else None


def take_launcher() -> int | None:
    """Return the launcher's process id, and hide it from child processes."""
    global _launcher
    launcher = os.environ.pop(LAUNCHER, None)
    if launcher is not None:
        _launcher = int(launcher)
    return _launcher


def is_orphan() -> bool:
    """Tell whether this process had a launcher and has outlived it."""
    return _launcher is not None and os.getppid() != _launcher


def grace() -> float:
    """Return the seconds that the launcher gives its processes to save after a signal."""
    return float(os.environ.get(GRACE, 0))


def without_job(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the environment for a child that starts its own job."""
    return {name: value for name, value in environment.items()
            if not name.startswith(OF_A_JOB) and name not in (*OF_A_PROCESS, *TASKS)}


def resume_command(folder) -> str:
    """Return the command that started this process or its job, with --resume `folder` at its end."""
    options = sys.argv[1:]
    for index in reversed(range(len(options))):
        name, equals, _ = options[index].partition('=')
        name = name.replace('_', '-')
        if name in ('--resume', '--start-epoch'):  # these and the one below are for one start only
            del options[index:index + (1 if equals else 2)]
        elif name == '--no-resume-opt':
            del options[index]
    command = ['python', sys.argv[0]]
    if is_launched():
        names = ['SCRIPT'] if os.environ.get('SCRIPT') else []
        if os.environ.get('NNODES', '1') != '1':
            names += ['NNODES', 'RDZV_ENDPOINT', 'RDZV_ID']
        command = [f'{name}={os.environ[name]}' for name in names if name in os.environ]
        command += [os.environ.get(COMMAND, './distributed_train.sh'), str(local_world_size())]
    return shlex.join([*command, *options, '--resume', str(folder)])
