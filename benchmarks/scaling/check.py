"""Holds the model of benchmarks/scaling/cluster.py against two processes on this machine's cores, with gloo.

    python -m benchmarks.scaling.check                                        # T2T-ViT-7 at 64 pixels: a minute
    python -m benchmarks.scaling.check --model t2t_vit_14 --batch-sizes 1 4   # another

In turns, for each of --batch-sizes: one process steps while the other waits (alone); both step, and do not speak
(apart: two that compute share memory, caches and clock); both step with DistributedDataParallel (together). Then both
take means of messages of growing size, as DistributedDataParallel does. The model gets
the following, and predicts the steps together:

compute      a + b B seconds for a batch of B, a line through the medians of the smallest and the largest batch
jitter       the spread of the steps of two that are apart
messages     latency and bandwidth, a line through the times of the means, from 64 kB on
overlap      none: the cores that would add and copy gradients are those that compute

There are two predictions: from one process alone, as if a second had a machine of its own but for the messages, and
from two that are apart. What is between them is what the processes take from one another without a word.
NAME.json, the record, and NAME.md, the tables, go to --output; benchmarks/scaling/plans.py quotes the verdict.
"""
import logging
import math
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from benchmarks.cost import launch_ranks, start_ddp
from benchmarks.scaling.cluster import Cluster, Link, Work, step_parts
from benchmarks.scaling.plans import TOKEN_SHARES, list_gradients
from benchmarks.shared.measure import Contender, training_options
from benchmarks.shared.records import (
    check_record_options,
    markdown_table,
    new_record,
    origin,
    precision_of,
    record_options,
    write_record,
)
from options.parser import create_parser, parse_options
from options.types import image_size, positive_int, seed
from utils.distributed import destroy_process_group
from utils.errors import UserError
from utils.runtime import seed_everything, start
from utils.script import run_script

RANKS = 2
KINDS = ('alone', 'apart', 'DDP')
MESSAGES = (1_000, 10_000, 64_000, 250_000, 1_000_000, 4_000_000, 16_000_000, 26_214_400, 64_000_000)  # bytes
FITTED = 64_000  # from which on a message's bytes matter
TARGET = 15  # per cent that a prediction may be wrong


def check_options(parser) -> None:
    add = parser.add_argument_group('What is measured').add_argument
    add('--model', default='t2t_vit_7', choices=TOKEN_SHARES, metavar='MODEL', help=f'of {", ".join(TOKEN_SHARES)}')
    add('--img-size', type=image_size, default=64, metavar='N', help='pixels a side')
    add('--batch-sizes', nargs='+', type=positive_int, default=[4, 8, 16], metavar='N',
        help='images per step and process; two at least')
    add('--rounds', type=positive_int, default=8, metavar='N', help='in which all take turns')
    add('--steps', type=positive_int, default=4, metavar='N', help='of each, in a round')
    add('--device', default='cpu', choices=['cpu'], help='the processes share its cores')
    add('--parts', default='', choices=['', 'ranks'], help='ranks: what the command starts for itself')
    add('--seed', type=seed, default=42, metavar='S', help='of weights and images')
    record_options(parser, 'scaling_check')


# ---------------------------------------------------------------------------------------------------------------------
# Measuring

def act_as_rank(args, training_args) -> None:
    """Measures with the other process; rank 0 writes the milliseconds of all steps and messages."""
    world, _ = start(training_args)
    running = {}
    for batch in args.batch_sizes:
        for kind in ('apart', 'DDP'):
            seed_everything(args.seed, 0)
            here = args.replacing(batch_size=batch, channels_last=False)
            running[batch, kind] = start_ddp(Contender(kind, args.model, args.img_size), here, training_args,
                                             precision_of('fp32', world.device), world)
        running[batch, 'alone'] = running[batch, 'apart']

    def window(batch: int, kind: str) -> list[float]:
        """Milliseconds of each step."""
        dist.barrier()
        times = [time.perf_counter()]
        for _ in range(args.steps if kind != 'alone' or world.is_main else 0):
            running[batch, kind].step()
            times.append(time.perf_counter())
        dist.barrier()
        return (1000 * np.diff(times)).tolist()

    found: dict[tuple[int, str], list[float]] = {key: [] for key in running}
    for number in range(args.rounds + 1):
        for key in running if number % 2 else reversed(running):
            taken = window(*key)
            if number:  # the first round is for warming up
                found[key] += taken
    everyone: list = [None] * world.size
    dist.all_gather_object(everyone, found)
    messages = [(size, time_message(size, args.rounds)) for size in MESSAGES]
    if world.is_main:
        # Of steps together, rank 0 has them all: no process ends one before the other.
        steps = [{'batch_size': batch, 'kind': kind, 'milliseconds':
                  [of_rank[batch, kind] for of_rank in (everyone if kind == 'apart' else everyone[:1])]}
                 for batch in args.batch_sizes for kind in KINDS]
        write_record(Path(args.output), args.name, {
            'threads': torch.get_num_threads(), 'steps': steps,
            'messages': [{'bytes': size, 'milliseconds': times} for size, times in messages]}, '')
    destroy_process_group()


def time_message(size: int, repeats: int) -> list[float]:
    """Milliseconds of means over all processes of so many bytes, as DistributedDataParallel takes them in a bucket."""
    gradient, bucket, times = torch.ones(size // 4), torch.empty(size // 4), []
    for number in range(repeats + 2):
        dist.barrier()
        started = time.perf_counter()
        bucket.copy_(gradient)
        bucket.div_(dist.get_world_size())
        dist.all_reduce(bucket)
        if number > 1:
            times.append(1000 * (time.perf_counter() - started))
    return times


# ---------------------------------------------------------------------------------------------------------------------
# Predicting

def fit_line(x, y) -> tuple[float, float]:
    """The a and b, neither below zero, of a + b x: least squares of what y is off in proportion."""
    x, y = np.asarray(x, float), np.asarray(y, float)
    weights = 1 / y
    b, a = np.polyfit(x, y, 1, w=weights)
    if a < 0:
        return 0., float((weights**2 * x * y).sum() / ((weights * x) ** 2).sum())
    return (float(a), float(b)) if b >= 0 else (float(np.average(y, weights=weights**2)), 0.)


def spread(windows: list[list[float]]) -> float:
    """Standard deviation of the logarithm of a step's time, from the quartiles, which a few slow ones do not move."""
    low, high = np.percentile(np.log(np.concatenate(windows)), (25, 75))
    return float((high - low) / 1.349)


def predict(measured: dict, args) -> dict:
    """Predictions of the steps together, with their errors in per cent, and what they come from."""
    medians = {(point['batch_size'], point['kind']): float(np.median(np.concatenate(point['milliseconds'])))
               for point in measured['steps']}
    jitter = float(np.median([spread(point['milliseconds']) for point in measured['steps']
                              if point['kind'] == 'apart']))
    sums = [(point['bytes'], np.median(point['milliseconds']) / 1000) for point in measured['messages']
            if point['bytes'] >= FITTED]
    latency, per_byte = fit_line(*zip(*sums, strict=True))
    # Of two, a ring is two messages of half the bytes each.
    link = Link(latency / 2, 1 / per_byte if per_byte else math.inf)
    gradients = list_gradients(args.model, 1000, TOKEN_SHARES[args.model], img_size=args.img_size)
    ends = min(args.batch_sizes), max(args.batch_sizes)
    found: dict[str, Any] = {
        'latency_milliseconds': 1000 * latency, 'bytes_per_second': link.bandwidth, 'jitter': jitter,
        'gradient_bytes': sum(size for _, size in gradients), 'rows': []}
    clusters = {}
    for kind in ('alone', 'apart'):
        fixed, image = fit_line(ends, [medians[batch, kind] / 1000 for batch in ends])
        clusters[kind] = Cluster(image_seconds=image, fixed_seconds=fixed, gpus_per_node=RANKS, node=link, hidden=0.,
                                 jitter=jitter)
        found[f'compute_{kind}'] = {'fixed_milliseconds': 1000 * fixed, 'milliseconds_per_image': 1000 * image}
    for batch in args.batch_sizes:
        row = {'batch_size': batch, **{kind: medians[batch, kind] for kind in KINDS}}
        for kind, cluster in clusters.items():
            work = Work(1e6, 1e6, local_batch=batch, gradients=gradients)
            one, two = (1000 * sum(step_parts(cluster, work, ranks).values()) for ranks in (1, RANKS))
            row |= {f'one_from_{kind}': one, f'from_{kind}': two,
                    f'error_one_from_{kind}': 100 * (one / medians[batch, kind] - 1),
                    f'error_from_{kind}': 100 * (two / medians[batch, 'DDP'] - 1)}
        found['rows'].append(row)
    return found


def verdict(found: dict, args) -> str:
    worst = {name: max(abs(row[name]) for row in found['rows']) for name in (
        'error_one_from_alone', 'error_from_alone', 'error_from_apart')}
    batches = ', '.join(map(str, args.batch_sizes))
    return (f'{args.model} at {args.img_size} pixels, {batches} images on each of two processes on {os.cpu_count()} '
            f'cores: steps of both together are predicted within {worst["error_from_apart"]:.0f} % from their steps '
            f'apart, {worst["error_from_alone"]:.0f} % from those of one alone, which has the memory to itself; steps '
            f'of one within {worst["error_one_from_alone"]:.0f} %. Target, {TARGET} %: '
            f'{"met" if worst["error_from_apart"] <= TARGET else "missed"}. A message: '
            f'{found["latency_milliseconds"]:.2f} ms and {found["bytes_per_second"] / 1e9:.2f} GB/s; jitter '
            f'{100 * found["jitter"]:.1f} %.')


def as_text(record: dict) -> str:
    """The whole record in Markdown."""
    found = record['found']
    steps = [[str(row['batch_size']), f'{row["alone"]:.1f}', f'{row["error_one_from_alone"]:+.1f} %',
              f'{row["apart"]:.1f}', f'{row["DDP"]:.1f}', f'{row["from_alone"]:.1f}',
              f'{row["error_from_alone"]:+.1f} %', f'{row["from_apart"]:.1f}', f'{row["error_from_apart"]:+.1f} %']
             for row in found['rows']]
    messages = [[f'{point["bytes"]:,}', f'{np.median(point["milliseconds"]):.3f}',
                 f'{found["latency_milliseconds"] + 1000 * point["bytes"] / found["bytes_per_second"]:.3f}']
                for point in record['measured']['messages']]
    return '\n\n'.join([
        '# The model of many GPUs, held against two processes',
        f'{origin(record)} In fp32, {record["measured"]["threads"]} thread(s) for each process; medians, over rounds '
        'in which all take turns.', record['verdict'],
        '## Steps, in milliseconds',
        markdown_table(['batch', 'alone', 'its prediction', 'apart', 'together', 'predicted from alone', 'error',
                        'predicted from apart', 'error'], steps),
        f'## Messages, in milliseconds; the gradients are {found["gradient_bytes"] / 1e6:.1f} MB',
        markdown_table(['bytes', 'measured', 'fitted'], messages)]) + '\n'


def main() -> None:
    parser = create_parser('Hold the model of many GPUs against two processes.', (check_options,))
    args = parse_options(parser)
    if len(set(args.batch_sizes)) < 2:
        raise UserError(f'--batch-sizes {args.batch_sizes[0]}: a line needs two points; give another batch size too')
    folder = check_record_options(args)
    training_args = training_options('--device', args.device, '--seed', str(args.seed))
    logging.disable(logging.INFO)
    if args.parts:
        act_as_rank(args, training_args)
        return
    measured = launch_ranks(RANKS, torch.device(args.device), script='scaling/check')
    if 'error' in measured:
        raise UserError(f'two processes could not be measured: {measured["error"]}')
    found = predict(measured, args)
    record = {**new_record('scaling_check', args, torch.device('cpu')), 'measured': measured, 'found': found,
              'verdict': verdict(found, args)}
    text = as_text(record)
    print(text, *write_record(folder, args.name, record, text), sep='\n')


if __name__ == '__main__':
    run_script(main)
