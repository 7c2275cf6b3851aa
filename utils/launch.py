"""The Python half of distributed_train.sh: torchrun, but a worker's exit code is passed on.

A user's mistake stays one line, as if a single process had made it.

    python -m utils.launch NUM_PROC SCRIPT OPTIONS…

NNODES, NODE_RANK, MASTER_ADDR and MASTER_PORT say where this machine stands among several.
"""
import logging
import os
import sys
from pathlib import Path

import yaml

from utils.errors import UserError, report, run_script
from utils.options import Parser


def main() -> None:
    num_proc, script, *options = sys.argv[1:]
    if not num_proc.isdecimal() or int(num_proc) < 1:
        raise UserError(f'NUM_PROC {num_proc!r}: give the number of processes first: ./distributed_train.sh 8 /data …')
    if not Path(script).is_file():
        raise UserError(f'SCRIPT {script}: no such script; train.py, validate.py or transfer.py')
    launch(int(num_proc), script, options)


def launch(num_proc: int, script: str, options: list[str]) -> None:
    """Starts `num_proc` processes here and waits for them; exits as the first that failed, if any did."""
    import torch
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    gpus = torch.cuda.device_count()
    if num_proc > gpus and _device(options) != 'cpu':
        raise UserError(f'NUM_PROC {num_proc}: this machine has {gpus} GPU(s); give at most as many, or --device cpu')
    # Each process its share of the cores; torchrun would say one thread, with a warning.
    os.environ.setdefault('OMP_NUM_THREADS', str(max(1, len(os.sched_getaffinity(0)) // num_proc)))
    # The agent reports a failed worker with a page of logs; what the worker said is enough.
    logging.getLogger('torch.distributed.elastic').setLevel(logging.CRITICAL)
    try:
        run(parse_args([*_rendezvous(), f'--nproc-per-node={num_proc}', script, *options]))
    except SignalException as e:
        report(f'stopped by {e.sigval.name}, with all its processes; --resume auto continues', 128 + e.sigval)
    except ChildFailedError as e:
        _, failure = e.get_first_failure()
        if failure.exitcode == 1:
            report(f'rank {failure.rank} failed; its traceback is above', 1)
        if failure.exitcode < 0:
            report(f'rank {failure.rank} was ended by signal {-failure.exitcode}; --resume auto continues a training',
                   128 - failure.exitcode)
        report(failure.message, failure.exitcode)


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
