"""The Python half of distributed_train.sh: torchrun, but a worker's exit code is passed on.

A user's mistake stays one line, as if a single process had made it; after a crash the processes are started again.

    python -m utils.launch NUM_PROC SCRIPT OPTIONS…

MAX_RESTARTS says how often they are started again (3 times; by default never where the script cannot go on from a
checkpoint, or on several machines), GRACE how many seconds they have to save after a signal that asks to stop (120).
NNODES, NODE_RANK, MASTER_ADDR and MASTER_PORT say where this machine stands among several.
"""
import argparse
import functools
import logging
import os
import sys
from datetime import datetime
from pathlib import Path
from unittest import mock

import yaml

from utils.errors import DECISIONS, UserError, report, run_script
from utils.options import Parser, count, positive

RESUMING = ('train.py', 'transfer.py')


def main() -> None:
    num_proc, script, *options = sys.argv[1:]
    if not num_proc.isdecimal() or int(num_proc) < 1:
        raise UserError(f'NUM_PROC {num_proc!r}: give the number of processes first: ./distributed_train.sh 8 /data …')
    if not Path(script).is_file():
        raise UserError(f'SCRIPT {script}: no such script; train.py, validate.py or transfer.py')
    launch(int(num_proc), script, options)


def launch(num_proc: int, script: str, options: list[str]) -> None:
    """Starts `num_proc` processes here and waits for them; exits as the first that failed, if any did."""
    # Nodes do not tell one another of their restarts: on several, it is for the scheduler to start the job again.
    can_restart = Path(script).name in RESUMING and os.environ.get('NNODES', '1') == '1'
    restarts = _number('MAX_RESTARTS', count, 3 if can_restart else 0)
    grace = _number('GRACE', positive, 120)
    import torch
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    from utils.agent import Agent, Stopped, describe

    gpus = torch.cuda.device_count()
    if num_proc > gpus and _device(options) != 'cpu':
        raise UserError(f'NUM_PROC {num_proc}: this machine has {gpus} GPU(s); give at most as many, or --device cpu')
    # Each process its share of the cores; torchrun would say one thread, with a warning.
    os.environ.setdefault('OMP_NUM_THREADS', str(max(1, len(os.sched_getaffinity(0)) // num_proc)))
    # Whoever is started again finds the run's folder by the time at which the first were started.
    os.environ.setdefault('T2T_STARTED', f'{datetime.now():%Y%m%d-%H%M%S}')
    os.environ['T2T_LAUNCHER'] = str(os.getpid())
    # The agent reports a failed worker with a page of logs; what the worker said is enough.
    logging.getLogger('torch.distributed.elastic').setLevel(logging.CRITICAL)
    # No signals: torch's handlers would raise wherever the agent is, and lose sight of processes it has just started.
    words = [*_rendezvous(), f'--nproc-per-node={num_proc}', f'--max-restarts={restarts}', '--signals-to-handle=']
    agent = functools.partial(Agent, grace=grace)
    try:
        with mock.patch('torch.distributed.launcher.api.LocalElasticAgent', agent):
            run(parse_args([*words, script, *options]))
    except Stopped as e:
        report(str(e), e.exit_code)
    except ChildFailedError as e:
        rank, failure = e.get_first_failure()
        line = describe(rank, failure)
        if failure.exitcode not in DECISIONS and restarts:
            line += f', after {restarts} restart(s); --resume auto goes on from the last checkpoint'
        report(line, failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode)


def _number(name: str, convert, default):
    """The environment variable `name`, or `default`.

    Raises:
        UserError: it is not such a number.
    """
    value = os.environ.get(name, '')
    try:
        return convert(value) if value else default
    except argparse.ArgumentTypeError as e:
        raise UserError(f'{name}={value}: {e}') from None


def _rendezvous() -> list[str]:
    """torchrun's options for one node (any free port), or for several, whose first has an address all can reach."""
    nodes = os.environ.get('NNODES', '1')
    if nodes == '1':
        return ['--standalone']
    missing = [name for name in ('NODE_RANK', 'MASTER_ADDR') if not os.environ.get(name)]
    if missing:
        raise UserError(f'NNODES={nodes}, but {" and ".join(missing)} not set; on every node, say its number (from 0) '
                        'and the address of node 0')
    return [f'--nnodes={nodes}', f'--node-rank={os.environ["NODE_RANK"]}',
            f'--master-addr={os.environ["MASTER_ADDR"]}', f'--master-port={os.environ.get("MASTER_PORT", "29500")}']


def _device(words: list[str]) -> str:
    """--device of the command line, else of its recipe, else 'auto'. What is wrong with either, the script says."""
    parser = Parser(add_help=False)
    parser.add_argument('-c', '--config')
    parser.add_argument('--device')
    try:
        args, _ = parser.parse_known_args(words)
        recipe = yaml.safe_load(Path(args.config).read_text()) if args.config and not args.device else {}
        return args.device or recipe.get('device', 'auto')
    except (UserError, OSError, yaml.YAMLError, UnicodeDecodeError, AttributeError):
        return 'cpu'


if __name__ == '__main__':
    run_script(main)
