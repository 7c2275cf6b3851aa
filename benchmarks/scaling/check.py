"""Compare the model of benchmarks/scaling/cluster.py with two processes on this machine's cores, with gloo.

    python -m benchmarks.scaling.check                                        # T2T-ViT-7 at 64 pixels: a minute
    python -m benchmarks.scaling.check --model t2t_vit_14 --batch-sizes 1 4   # another

Steps are measured in turns, for each of --batch-sizes: of one process while the other waits (alone), of both without
communication (apart: they share memory, caches and clock), and of both with DistributedDataParallel (together). Then
both average messages of growing size. From these, the model predicts the steps together, once from `alone` and once
from `apart`. The difference is what the processes take from each other without communicating.

docs/scaling.md explains the model; benchmarks/scaling/plans.py quotes the verdict.
"""
import math
import os
import time
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from benchmarks.scaling.cluster import Cluster, Link, Work, step_parts
from benchmarks.scaling.plans import TOKEN_SHARES, list_gradients
from benchmarks.shared.command import common_options, parse_command, shared_training_options
from benchmarks.shared.measure import Contender
from benchmarks.shared.ranks import finish_rank, launch_ranks, start_ddp, take_turns
from benchmarks.shared.records import markdown_table, new_record, origin, precision_of, save
from options.types import positive_int
from utils import job
from utils.errors import UserError
from utils.runtime import seed_everything, start
from utils.script import run_script

RANKS = 2
KINDS = ('alone', 'apart', 'DDP')
MESSAGES = (1_000, 10_000, 64_000, 250_000, 1_000_000, 4_000_000, 16_000_000, 26_214_400, 64_000_000)  # bytes
FITTED = 64_000  # bytes from which on a message's size matters
TARGET = 15  # allowed error of a prediction in per cent


def check_options(parser) -> None:
    add = parser.add_argument_group('What is measured').add_argument
    add('--model', default='t2t_vit_7', choices=TOKEN_SHARES, metavar='MODEL', help=f'of {", ".join(TOKEN_SHARES)}')
    add('--batch-sizes', nargs='+', type=positive_int, default=[4, 8, 16], metavar='N',
        help='images per step and process; two at least')
    add('--rounds', type=positive_int, default=8, metavar='N', help='rounds in which all take turns')
    add('--steps', type=positive_int, default=4, metavar='N', help='steps of each in a round')
    add('--device', default='cpu', choices=['cpu'], help='the processes share its cores')
    common_options(add, img_size=64, seed=42)


# --- Measuring --------------------------------------------------------------------------------------------------------

def act_as_rank(args, training_args) -> None:
    """Measure with the other process; rank 0 writes the milliseconds of all steps and messages."""
    world, _ = start(training_args)
    running = {}
    for batch in args.batch_sizes:
        for kind in ('apart', 'DDP'):
            seed_everything(args.seed, 0)
            running[batch, kind] = start_ddp(
                Contender(kind, args.model, args.img_size), args.replacing(batch_size=batch), training_args,
                precision_of('fp32', world.device), world)
        running[batch, 'alone'] = running[batch, 'apart']

    def window(batch: int, kind: str) -> list[float]:
        """Return milliseconds of each step."""
        dist.barrier()
        times = [time.perf_counter()]
        for _ in range(args.steps if kind != 'alone' or world.is_main else 0):
            running[batch, kind].step()
            times.append(time.perf_counter())
        dist.barrier()
        return (1000 * np.diff(times)).tolist()

    found: dict[tuple[int, str], list[float]] = {key: [] for key in running}
    for key, counts in take_turns(list(running), args.rounds):
        taken = window(*key)
        found[key] += taken if counts else []
    everyone: list = [None] * world.size
    dist.all_gather_object(everyone, found)
    # Rank 0 has all steps together, since no process ends one before the other.
    steps = [{'batch_size': batch, 'kind': kind, 'milliseconds':
              [of_rank[batch, kind] for of_rank in (everyone if kind == 'apart' else everyone[:1])]}
             for batch in args.batch_sizes for kind in KINDS]
    messages = [{'bytes': size, 'milliseconds': time_message(size, args.rounds)} for size in MESSAGES]
    finish_rank(args, world, {'threads': torch.get_num_threads(), 'steps': steps, 'messages': messages})


def time_message(size: int, repeats: int) -> list[float]:
    """Return milliseconds of averaging `size` bytes over all processes, as DistributedDataParallel does a bucket."""
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


# --- Predicting -------------------------------------------------------------------------------------------------------

def fit_line(x, y) -> tuple[float, float]:
    """Fit y by a + b x with least squares of relative errors, neither a nor b below zero; return (a, b)."""
    x, y = np.asarray(x, float), np.asarray(y, float)
    weights = 1 / y
    b, a = np.polyfit(x, y, 1, w=weights)
    if a < 0:
        return 0., float((weights**2 * x * y).sum() / ((weights * x) ** 2).sum())
    return (float(a), float(b)) if b >= 0 else (float(np.average(y, weights=weights**2)), 0.)


def spread(windows: list[list[float]]) -> float:
    """Return the standard deviation of the logarithm of a step's time, estimated by quartiles."""
    low, high = np.percentile(np.log(np.concatenate(windows)), (25, 75))
    return float((high - low) / 1.349)


def predict(measured: dict, args) -> dict:
    """Predict the steps together; return predictions, their errors in per cent, and the model's inputs."""
    medians = {(point['batch_size'], point['kind']): float(np.median(np.concatenate(point['milliseconds'])))
               for point in measured['steps']}
    jitter = float(np.median([spread(point['milliseconds']) for point in measured['steps']
                              if point['kind'] == 'apart']))
    sums = [(point['bytes'], np.median(point['milliseconds']) / 1000) for point in measured['messages']
            if point['bytes'] >= FITTED]
    latency, per_byte = fit_line(*zip(*sums, strict=True))
    # A ring of two sends two messages of half the bytes each.
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
    """Return the whole record in Markdown."""
    found = record['found']
    steps = [[row['batch_size'], f'{row["alone"]:.1f}', f'{row["error_one_from_alone"]:+.1f} %',
              f'{row["apart"]:.1f}', f'{row["DDP"]:.1f}', f'{row["from_alone"]:.1f}',
              f'{row["error_from_alone"]:+.1f} %', f'{row["from_apart"]:.1f}', f'{row["error_from_apart"]:+.1f} %']
             for row in found['rows']]
    messages = [[f'{point["bytes"]:,}', f'{np.median(point["milliseconds"]):.3f}',
                 f'{found["latency_milliseconds"] + 1000 * point["bytes"] / found["bytes_per_second"]:.3f}']
                for point in record['measured']['messages']]
    return '\n\n'.join([
        '# The model of many GPUs, held against two processes',
        f'{origin(record)} In fp32, {record["measured"]["threads"]} thread(s) for each process; medians over rounds '
        'in which all take turns.', record['verdict'],
        '## Steps, in milliseconds',
        markdown_table(['batch', 'alone', 'its prediction', 'apart', 'together', 'predicted from alone', 'error',
                        'predicted from apart', 'error'], steps),
        f'## Messages, in milliseconds; the gradients are {found["gradient_bytes"] / 1e6:.1f} MB',
        markdown_table(['bytes', 'measured', 'fitted'], messages)]) + '\n'


def main() -> None:
    args = parse_command('Compare the model of many GPUs with two processes.', 'scaling_check', check_options,
                         channels_last=False)
    if len(set(args.batch_sizes)) < 2:
        raise UserError(f'--batch-sizes {args.batch_sizes[0]}: a line needs two points; give another batch size too')
    if job.world_size() > 1:  # started by `launch_ranks`
        act_as_rank(args, shared_training_options(args))
        return
    measured = launch_ranks(RANKS, 'scaling/check', args.device)
    found = predict(measured, args)
    record = {**new_record('scaling.check', args, torch.device('cpu')), 'measured': measured, 'found': found,
              'verdict': verdict(found, args)}
    text = as_text(record)
    print(text, *save(args, record, text), sep='\n')


if __name__ == '__main__':
    run_script(main)
