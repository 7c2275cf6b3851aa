"""The environment variables of the launcher. No other module reads them.

A process without a launcher is rank 0 of 1 and was never restarted.
"""
import os
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path

STARTED, LAUNCHER, COMMAND = 'T2T_STARTED', 'T2T_LAUNCHER', 'T2T_COMMAND'
OF_A_JOB = ('TORCHELASTIC', 'MASTER_', 'NNODES', 'RDZV_', 'PET_', 'T2T_')
OF_A_PROCESS = ('RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'LOCAL_WORLD_SIZE')

_launcher: int | None = None


def rank() -> int:
    return int(os.environ.get('RANK', 0))


def world_size() -> int:
    return int(os.environ.get('WORLD_SIZE', 1))


def local_rank() -> int:
    return int(os.environ.get('LOCAL_RANK', 0))


def local_world_size() -> int:
    return int(os.environ.get('LOCAL_WORLD_SIZE', 1))


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


def without_job(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the environment for a child that starts its own job."""
    return {name: value for name, value in environment.items()
            if not name.startswith(OF_A_JOB) and name not in OF_A_PROCESS}


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
