"""Start the processes of a job on this machine: torchrun, but with a worker's exit code and its one line of error.

    python -m launch.launcher NUM_PROC SCRIPT OPTIONS…          which distributed_train.sh runs

After a crash the processes start again, MAX_RESTARTS times (default: 3; 0 for scripts that cannot resume). After a
signal that asks to stop they have GRACE seconds (120) to save.

For several machines, start the same on each. NNODES is their number, as 4, or the fewest and the most, as 1:4. They
meet at RDZV_ENDPOINT=HOST:PORT (else MASTER_ADDR:MASTER_PORT), an address of one of them, under the name RDZV_ID, and
wait RDZV_TIMEOUT seconds (600) for one another. A machine that is silent for NODE_TIMEOUT seconds (15) is lost.
PET_NAME, which Kubeflow sets for torchrun, is the fallback for NAME. See docs/many_machines.md.
"""
import argparse
import atexit
import contextlib
import functools
import logging
import math
import os
import re
import shutil
import sys
import tempfile
from datetime import datetime
from pathlib import Path
from unittest import mock

from options.checks import multiples_around
from options.parser import Parser, take_recipe
from options.types import count, number, positive, positive_int
from utils import job
from utils.console import plural, say_at_once
from utils.errors import DECISIONS, UserError
from utils.exits import leave_at_once, report, temporary_folder
from utils.script import run_script

DEFAULT_PORT = 29500
# Scripts that resume from a checkpoint.
RESUMING = ('train.py', 'transfer.py')


def main() -> None:
    if len(sys.argv) < 3:
        raise UserError('NUM_PROC and SCRIPT are missing: python -m launch.launcher NUM_PROC SCRIPT OPTIONS…')
    num_proc, script, *options = sys.argv[1:]
    if not num_proc.isdecimal() or int(num_proc) < 1:
        raise UserError(f'NUM_PROC {num_proc!r}: give the number of processes first: ./distributed_train.sh 8 /data …')
    if not Path(script).is_file():
        raise UserError(f'SCRIPT {script}: no such script; give train.py, validate.py or transfer.py')
    launch(int(num_proc), script, options)


def launch(num_proc: int, script: str, options: list[str]) -> None:
    """Start `num_proc` processes here and wait for them. Exit with the code of the first that failed, if any did."""
    restarts = _number('MAX_RESTARTS', count, 3 if Path(script).name in RESUMING else 0)
    grace = _number('GRACE', positive, 120)
    _check_global_batch(num_proc, script, options)
    say_at_once(f'starting {plural(num_proc, "process", "processes")} of {Path(script).name} …')
    os.environ.setdefault('TORCH_CPP_LOG_LEVEL', 'ERROR')  # silences warnings about addresses without a name
    import torch
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    from launch.agent import Agent, JobStopped, describe
    from launch.nodes import Ended
    from utils.parallel import available_cores

    gpus = torch.cuda.device_count()
    if num_proc > gpus and _given(options, 'device') not in ('cpu', ''):
        raise UserError(f'NUM_PROC {num_proc}: this machine has {gpus} GPU(s); give at most as many, or --device cpu')
    # Each process gets its share of the cores. torchrun would give it one thread, with a warning.
    os.environ.setdefault('OMP_NUM_THREADS', str(max(1, available_cores() // num_proc)))
    rendezvous, nodes = _find_nodes()
    # Restarted processes find the run's folder by the time of the first start.
    os.environ[job.STARTED] = nodes.agree('started', job.start_time() or f'{datetime.now():%Y%m%d-%H%M%S}')
    os.environ[job.LAUNCHER] = str(os.getpid())
    os.environ[job.GRACE] = str(grace)
    os.environ.pop('RANK', None)  # a scheduler may set it to the machine's number
    # torch's agent reports a failed worker with a page of logs. The worker's own line is enough.
    logging.disable()
    folder = temporary_folder(functools.partial(tempfile.mkdtemp, prefix='t2t-'))  # for the last words of processes
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    # No signals: torch's handlers would raise anywhere in the agent, and lose processes that it has just started.
    words = [*rendezvous, f'--nproc-per-node={num_proc}', f'--max-restarts={restarts}', '--signals-to-handle=',
             f'--log-dir={folder}']
    agent = functools.partial(Agent, grace=grace, nodes=nodes)
    try:
        with mock.patch('torch.distributed.launcher.api.LocalElasticAgent', agent):
            run(parse_args([*words, script, *options]))
    except (JobStopped, Ended) as error:
        report(str(error), error.exit_code)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        line = describe(rank, failure)
        if failure.exitcode not in DECISIONS and restarts:
            line += f', after {restarts} restart(s); --resume auto goes on from the last checkpoint'
        report(line, failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode)
    for cache in Path(tempfile.gettempdir()).glob('torchinductor_*'):  # importing timm makes it
        with contextlib.suppress(OSError):  # it holds compiled code, or is another user's
            cache.rmdir()
    # Python's normal exit would unwind a thread that is in the store through C++, which aborts the process.
    leave_at_once(0)


def _setting(name: str) -> str:
    """Return the environment variable `name`, else PET_`name`, else ''."""
    return os.environ.get(name) or os.environ.get(f'PET_{name}', '')


def _number(name: str, convert, default):
    """Return the environment variable `name`, or `default`. Raises UserError if it is not such a number."""
    value = _setting(name)
    try:
        return convert(value) if value else default
    except argparse.ArgumentTypeError as error:
        raise UserError(f'{name}={value}: {error}') from None


def _node_range() -> tuple[int, int]:
    """Return the fewest and the most nodes of NNODES. Raises UserError if it is neither one number nor two."""
    text = _setting('NNODES') or '1'
    match = re.fullmatch(r'(\d+)(?::(\d+))?', text)
    low, high = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not 1 <= low <= high:
        raise UserError(f'NNODES={text}: give the number of machines, as 4, or the fewest and the most, as 1:4')
    return low, high


def _meeting_place() -> tuple[str, int]:
    """Return host and port at which the launchers meet. Raises UserError if they are missing or wrong."""
    endpoint = _setting('RDZV_ENDPOINT') or _setting('MASTER_ADDR')
    if not endpoint:
        raise UserError(f'NNODES={_setting("NNODES")}, but RDZV_ENDPOINT is not set; on every machine, give the same '
                        f'RDZV_ENDPOINT=HOST:PORT, an address of one of them, as node1:{DEFAULT_PORT}')
    host, _, port = endpoint.rpartition(':') if endpoint.count(':') == 1 or ']:' in endpoint else (endpoint, '', '')
    port = port or _setting('MASTER_PORT') or str(DEFAULT_PORT)
    if not port.isdecimal() or not 0 < int(port) < 2**16:
        raise UserError(f'RDZV_ENDPOINT {endpoint}: port {port!r} is none; give HOST:PORT, as node1:{DEFAULT_PORT}')
    return host.strip('[]'), int(port)


def _find_nodes():
    """Return torchrun's options for the rendezvous, and the launchers of the job."""
    from launch import nodes
    low, high = _node_range()
    silence = _number('NODE_TIMEOUT', number(float, low=2), 15)
    patience = _number('RDZV_TIMEOUT', positive_int, 600)
    if high == 1:
        if separate := job.separate_tasks(launchers=True):
            raise UserError(f'{separate}; set NNODES and RDZV_ENDPOINT to join them (docs/many_machines.md), or say '
                            'NNODES=1 if separate ones are wanted')
        return nodes.alone(silence)
    host, port = _meeting_place()
    # Processes print them in the command that resumes the run.
    os.environ.update(NNODES=_setting('NNODES'), RDZV_ENDPOINT=f'[{host}]:{port}' if ':' in host else f'{host}:{port}')
    rendezvous, found = nodes.find(host, port, name=_setting('RDZV_ID') or 't2t', patience=patience, silence=silence)
    return [f'--nnodes={low}:{high}', *rendezvous], found


def _check_global_batch(num_proc: int, script: str, options: list[str]) -> None:
    """Raise UserError if machines may come and go, but some numbers of them could not take the same steps."""
    low, high = _node_range()
    if low == high or Path(script).name not in RESUMING:
        return
    size = _given(options, 'global-batch-size', positive_int)
    numbers = [num_proc * nodes for nodes in range(low, high + 1)]
    unable = [n for n in numbers if size and size % (2 * n)]
    if size == '' or size and not unable:
        return
    unit = 2 * math.lcm(*numbers)
    wrong = f'{size}, which {unable[0]} processes cannot share in even parts' if size else 'not given'
    raise UserError(f'NNODES={_setting("NNODES")}: machines may come and go, and --global-batch-size is {wrong}; say '
                    f'{multiples_around(size or 0, unit)}, a multiple of {unit} that {", ".join(map(str, numbers))} '
                    'processes can share in even parts, as Mixup pairs images')


def _given(words: list[str], name: str, kind=str):
    """Return an option of the command line, else of its recipe; '' if either is wrong, which the script will report."""
    parser = Parser(add_help=False)
    parser.add_argument(f'--{name}', dest=name.replace('-', '_'), type=kind)
    try:
        take_recipe(parser, words, complete=False)
        [value] = vars(parser.parse_known_args(words)[0]).values()
        return value
    except UserError:
        return ''


if __name__ == '__main__':
    run_script(main)
