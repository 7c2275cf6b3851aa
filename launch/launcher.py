"""The Python half of distributed_train.sh: torchrun, but a worker's exit code is passed on.

A user's mistake stays one line, as if a single process had made it; after a crash the processes are started again.

    python -m launch.launcher NUM_PROC SCRIPT OPTIONS…

MAX_RESTARTS says how often they are started again (3 times; by default never where the script cannot go on from a
checkpoint), GRACE how many seconds they have to save after a signal that asks to stop (120).

On several machines the same is started on each. NNODES says how many there are, as 4, or the fewest and the most, as
1:4. They meet at RDZV_ENDPOINT=HOST:PORT (else MASTER_ADDR:MASTER_PORT), an address of one of them, under the name
RDZV_ID, and wait RDZV_TIMEOUT seconds (600) for one another. A machine of which nothing is heard for NODE_TIMEOUT
seconds (15) is lost. What Kubeflow sets for torchrun, PET_NNODES and so on, counts where the name without PET_ is not
set. See docs/many_machines.md.
"""
import argparse
import functools
import logging
import math
import os
import re
import sys
from datetime import datetime
from pathlib import Path
from unittest import mock

from options.checks import multiples_around
from options.parser import Parser, take_recipe
from options.types import count, number, positive, positive_int
from utils import job
from utils.errors import DECISIONS, UserError
from utils.exits import leave_at_once, report
from utils.script import run_script

DEFAULT_PORT = 29500
RESUMING = ('train.py', 'transfer.py')


def main() -> None:
    if len(sys.argv) < 3:
        raise UserError('NUM_PROC and SCRIPT are missing: python -m launch.launcher NUM_PROC SCRIPT OPTIONS…')
    num_proc, script, *options = sys.argv[1:]
    if not num_proc.isdecimal() or int(num_proc) < 1:
        raise UserError(f'NUM_PROC {num_proc!r}: give the number of processes first: ./distributed_train.sh 8 /data …')
    if not Path(script).is_file():
        raise UserError(f'SCRIPT {script}: no such script; train.py, validate.py or transfer.py')
    launch(int(num_proc), script, options)


def launch(num_proc: int, script: str, options: list[str]) -> None:
    """Starts `num_proc` processes here and waits for them; exits as the first that failed, if any did."""
    restarts = _number('MAX_RESTARTS', count, 3 if Path(script).name in RESUMING else 0)
    grace = _number('GRACE', positive, 120)
    _check_global_batch(num_proc, script, options)
    if _setting('NNODES') not in ('', '1'):
        os.environ.setdefault('TORCH_CPP_LOG_LEVEL', 'ERROR')  # no word of addresses that have no name
    import torch
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    from launch.agent import Agent, JobStopped, describe
    from launch.nodes import Ended
    from utils.parallel import available_cores

    gpus = torch.cuda.device_count()
    if num_proc > gpus and _given(options, 'device') not in ('cpu', ''):
        raise UserError(f'NUM_PROC {num_proc}: this machine has {gpus} GPU(s); give at most as many, or --device cpu')
    # Each process its share of the cores; torchrun would say one thread, with a warning.
    os.environ.setdefault('OMP_NUM_THREADS', str(max(1, available_cores() // num_proc)))
    words, nodes = _find_nodes()
    # Whoever is started again finds the run's folder by the time at which the first were started.
    os.environ[job.STARTED] = nodes.agree('started', job.start_time() or f'{datetime.now():%Y%m%d-%H%M%S}')
    os.environ[job.LAUNCHER] = str(os.getpid())
    os.environ.pop('RANK', None)  # of this machine, where a scheduler has set it, and of no process
    # The agent reports a failed worker with a page of logs; what the worker said is enough.
    logging.disable()
    # No signals: torch's handlers would raise wherever the agent is, and lose sight of processes it has just started.
    words = [*words, f'--nproc-per-node={num_proc}', f'--max-restarts={restarts}', '--signals-to-handle=']
    agent = functools.partial(Agent, grace=grace, nodes=nodes)
    try:
        with mock.patch('torch.distributed.launcher.api.LocalElasticAgent', agent):
            run(parse_args([*words, script, *options]))
    except (JobStopped, Ended) as e:
        report(str(e), e.exit_code)
    except ChildFailedError as e:
        rank, failure = e.get_first_failure()
        line = describe(rank, failure)
        if failure.exitcode not in DECISIONS and restarts:
            line += f', after {restarts} restart(s); --resume auto goes on from the last checkpoint'
        report(line, failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode)
    # A thread that looks into the store as the interpreter ends would be unwound through C++, which aborts the process.
    leave_at_once(0)


def _setting(name: str) -> str:
    """The environment variable `name`, or what Kubeflow sets for torchrun under PET_`name`; '' for neither."""
    return os.environ.get(name) or os.environ.get(f'PET_{name}', '')


def _number(name: str, convert, default):
    """The environment variable `name`, or `default`.

    Raises:
        UserError: it is not such a number.
    """
    value = _setting(name)
    try:
        return convert(value) if value else default
    except argparse.ArgumentTypeError as e:
        raise UserError(f'{name}={value}: {e}') from None


def _node_range() -> tuple[int, int]:
    """NNODES: the fewest and the most nodes.

    Raises:
        UserError: it is neither a number nor two.
    """
    text = _setting('NNODES') or '1'
    match = re.fullmatch(r'(\d+)(?::(\d+))?', text)
    low, high = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not 1 <= low <= high:
        raise UserError(f'NNODES={text}: give the number of machines, as 4, or the fewest and the most, as 1:4')
    return low, high


def _meeting_place() -> tuple[str, int]:
    """Host and port at which the launchers meet.

    Raises:
        UserError: nothing says where, or the port is none.
    """
    endpoint = _setting('RDZV_ENDPOINT') or _setting('MASTER_ADDR')
    if not endpoint:
        raise UserError(f'NNODES={_setting("NNODES")}, but RDZV_ENDPOINT is not set; on every machine, say the same '
                        f'RDZV_ENDPOINT=HOST:PORT, an address of one of them, as node1:{DEFAULT_PORT}')
    host, colon, port = endpoint.rpartition(':') if endpoint.count(':') == 1 or ']:' in endpoint else (endpoint, '', '')
    port = port or _setting('MASTER_PORT') or str(DEFAULT_PORT)
    if not port.isdecimal() or not 0 < int(port) < 2**16:
        raise UserError(f'RDZV_ENDPOINT {endpoint}: port {port!r} is none; give HOST:PORT, as node1:{DEFAULT_PORT}')
    return host.strip('[]'), int(port)


def _find_nodes():
    """torchrun's options for the rendezvous, and the other launchers of the job, where there are any."""
    low, high = _node_range()
    silence = _number('NODE_TIMEOUT', number(float, low=2), 15)
    patience = _number('RDZV_TIMEOUT', positive_int, 600)
    if high == 1:
        from launch.nodes import alone
        return ['--standalone'], alone(silence)
    host, port = _meeting_place()
    # For the line that says how to go on.
    os.environ.update(NNODES=_setting('NNODES'), RDZV_ENDPOINT=f'[{host}]:{port}' if ':' in host else f'{host}:{port}')
    from launch.nodes import find
    rendezvous, nodes = find(host, port, name=_setting('RDZV_ID') or 't2t', patience=patience, silence=silence)
    return [f'--nnodes={low}:{high}', *rendezvous], nodes


def _check_global_batch(num_proc: int, script: str, options: list[str]) -> None:
    """Raises UserError where machines may come and go, and not every number of them could go on with the same steps."""
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
    """An option of the command line, else of its recipe; '' where either is wrong, which is for the script to say."""
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
