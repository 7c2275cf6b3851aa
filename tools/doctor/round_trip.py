"""Add up a gradient over all processes, check the sum, and measure the time.

    SCRIPT=tools/doctor/round_trip.py ./distributed_train.sh 8 --megabytes 86

distributed_train.sh says how to start it on several machines. tools/doctor runs it on one.
"""
import json
import statistics
import sys
import time
from datetime import timedelta
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from options.parser import Parser
from options.types import positive
from utils.errors import UserError
from utils.script import run_script

REPEATS = 5


def main():
    parser = Parser(description='Add up a gradient over all processes.')
    add = parser.add_argument
    add('--megabytes', type=positive, default=86.0, metavar='MB', help='of float32 numbers; T2T-ViT-14 has 86')
    add('--device', default='auto', metavar='NAME', help='auto (a GPU if there is one), cuda or cpu')
    add('--timeout', type=positive, default=60, metavar='SECONDS', help='stop if a process does not respond')
    add('--json', metavar='FILE', help='write the result for programs')
    args = parser.parse_args()

    import torch

    from utils.console import setup_logging
    from utils.distributed import destroy_process_group, init_process_group, sum_over_ranks

    world = init_process_group(args.device, timedelta(seconds=args.timeout))
    setup_logging(is_main=world.is_main)
    values = torch.empty(max(1, round(args.megabytes * 1e6 / 4)), device=world.device)
    expected, seconds = world.size * (world.size + 1) / 2, []
    for _ in range(1 + REPEATS):  # the first makes the connections
        values.fill_(world.rank + 1)
        sum_over_ranks(torch.zeros(1, device=world.device)).item()  # waits for all processes
        started = time.perf_counter()
        sum_over_ranks(values)
        is_right = bool((values == expected).all())  # waits for the device
        seconds.append(time.perf_counter() - started)
        if not is_right:
            raise UserError(f'rank {world.rank} got sums from {values.min().item():g} to {values.max().item():g}, not '
                            f'{expected:g}; check the network, or the links between the GPUs')
    median = statistics.median(seconds[1:])
    # In a ring, each process sends all but its own part, twice.
    rate = 2 * (world.size - 1) / world.size * values.nbytes / median
    if world.is_main:
        found = {'processes': world.size, 'bytes': values.nbytes, 'seconds': median, 'bytes_per_second': rate}
        if args.json:
            Path(args.json).write_text(json.dumps(found) + '\n', encoding='utf-8')
        print(f'{world.size} processes, {values.nbytes / 1e6:.1f} MB: {1000 * median:.1f} ms, {rate / 1e9:.2f} GB/s; '
              'the sum is right')
    destroy_process_group()


if __name__ == '__main__':
    run_script(main)
