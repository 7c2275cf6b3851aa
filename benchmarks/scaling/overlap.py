"""Measures how much of the sum of the gradients is hidden behind the backward pass that makes them.

    python -m benchmarks.scaling.overlap                                       # t2t_vit_14 at 224 pixels, two processes
    python -m benchmarks.scaling.overlap --model t2t_vit_7 --delays 0 20       # another model, other links

Two processes with gloo take the same training steps, side by side. Their contenders take turns:

no communication  the model by itself
registration      buckets in the order in which parameters are registered, all full only at the end
torch             DistributedDataParallel as it is: its first step in other buckets than all others
ours              as train.py wraps the model (engine/loop.py)

A communication hook stands for the link between two machines, where loopback is too fast to see it: it sums one bucket
at a time, and holds each back for as many more milliseconds as --delays says. It notes after how many gradients, and at
what time, each bucket was handed over. Exposed is the time from the last gradient to the last sum, in which nothing is
computed. The hand-overs of all published models are counted too; tests/test_overlap.py holds the program to them.

NAME.json, the record, and NAME.md, the tables, go to --output.
"""
import functools
import logging
import queue
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks.cost import launch_ranks
from benchmarks.shared.measure import Contender, Running, start_training, training_options
from benchmarks.shared.records import (
    check_record_options,
    markdown_table,
    new_record,
    origin,
    precision_of,
    record_options,
    write_record,
)
from engine.loop import wrap_model
from models import create_model
from options.parser import create_parser, parse_options
from options.types import count, image_size, positive_int, seed
from utils.distributed import World, destroy_process_group
from utils.errors import UserError
from utils.runtime import seed_everything, start
from utils.script import run_script

RANKS = 2
ALONE = 'no communication'
COUNTED = ('t2t_vit_7', 't2t_vit_14', 't2t_vit_19', 't2t_vit_24', 't2t_vit_t_14')
# Targets: at most this part of what registration order exposes, up to this delay in milliseconds; at least these per
# cent of the bytes before the last gradient.
EXPOSED, JUDGED, EARLY = 1 / 3, 5, 80


def overlap_options(parser) -> None:
    add = parser.add_argument_group('What is measured').add_argument
    add('--model', default='t2t_vit_14', metavar='MODEL', help='by name')
    add('--img-size', type=image_size, default=224, metavar='N', help='pixels a side')
    add('-b', '--batch-size', type=positive_int, default=2, metavar='N', help='images per step and process')
    add('--delays', nargs='+', type=count, default=[0, 5, 20], metavar='MS',
        help='milliseconds that each bucket takes beside its way over loopback')
    add('--repeats', type=positive_int, default=12, metavar='N', help='rounds, and steps of each contender')
    add('--device', default='cpu', choices=['cpu'], help='the processes share its cores')
    add('--parts', default='', choices=['', 'ranks'], help='ranks: what the command starts for itself')
    add('--seed', type=seed, default=42, metavar='S', help='of weights and images')
    record_options(parser, 'overlap')


# ---------------------------------------------------------------------------------------------------------------------
# The link, and what comes over it

class Link:
    """A communication hook of DDP that averages one bucket at a time, and tells when each was handed over.

    Args:
        model: whose gradients are counted; it takes the hook.
    Attributes:
        delay: seconds that each bucket takes longer.
        hand_overs: of the last backward pass, the gradients that were there and the bytes, bucket by bucket.
        exposed: of the last backward pass, seconds from the last gradient to the last average.
    """

    def __init__(self, model: DistributedDataParallel):
        self.delay = 0.
        self.hand_overs: list[tuple[int, int]] = []
        self._gradients, self._last_gradient, self._last_average = 0, 0., 0.
        self._buckets: queue.SimpleQueue = queue.SimpleQueue()
        threading.Thread(target=self._transfer, daemon=True).start()
        for parameter in model.module.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._count)
        model.register_comm_hook(None, self._hand_over)

    @property
    def exposed(self) -> float:
        return self._last_average - self._last_gradient

    def forget(self) -> None:
        """Before a backward pass."""
        self.hand_overs, self._gradients = [], 0

    def _count(self, parameter: torch.Tensor) -> None:
        self._gradients += 1
        self._last_gradient = time.perf_counter()

    def _hand_over(self, state, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        gradient = bucket.buffer()
        self.hand_overs.append((self._gradients, gradient.numel() * gradient.element_size()))
        averaged: torch.futures.Future[torch.Tensor] = torch.futures.Future()
        self._buckets.put((gradient, averaged))
        return averaged

    def _transfer(self) -> None:
        while True:
            gradient, averaged = self._buckets.get()
            dist.all_reduce(gradient.div_(dist.get_world_size()))
            time.sleep(self.delay)
            self._last_average = time.perf_counter()
            averaged.set_result(gradient)


def list_hand_overs(model: DistributedDataParallel, link: Link, loss: Callable[[], torch.Tensor]) -> dict:
    """Takes a backward pass of `loss`; the number of gradients, and [gradients there, bytes] of each hand-over."""
    link.forget()
    loss().backward()
    gradients = sum(parameter.requires_grad for parameter in model.parameters())
    return {'gradients': gradients, 'buckets': [list(hand_over) for hand_over in link.hand_overs]}


def early_percent(found: dict) -> float:
    """Per cent of the bytes that are handed over before the last gradient is there."""
    sizes = [size for _, size in found['buckets']]
    return 100 * sum(size for after, size in found['buckets'] if after < found['gradients']) / sum(sizes)


def count_hand_overs(name: str, world: World) -> dict:
    """`list_hand_overs` of a model as train.py wraps it, in its first step; they do not depend on the images."""
    model = wrap_model(create_model(name, img_size=32), world)
    assert isinstance(model, DistributedDataParallel), 'there are several ranks'
    images = torch.randn(2, 3, 32, 32)
    return list_hand_overs(model, Link(model), lambda: model(images).square().sum())


# ---------------------------------------------------------------------------------------------------------------------
# Measuring

def wrap_in_registration_order(model: nn.Module) -> DistributedDataParallel:
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True)
    wrapped.reducer._push_all_rebuilt_params()
    return wrapped


def act_as_rank(args, training_args) -> None:
    """Measures with the other processes; rank 0 writes what it found."""
    world, _ = start(training_args)
    wraps: dict[str, Callable[[nn.Module], nn.Module]] = {
        ALONE: lambda model: model, 'registration': wrap_in_registration_order,
        'torch': functools.partial(DistributedDataParallel, gradient_as_bucket_view=True),
        'ours': functools.partial(wrap_model, world=world)}
    running: dict[str, Running] = {}
    links: dict[str, Link | None] = {}
    for label, wrap in wraps.items():
        seed_everything(args.seed, 0)
        running[label], links[label] = _start(label, wrap, args, training_args, world)
    keys = [(delay, label) for delay in args.delays for label in wraps]
    times: dict[tuple, list] = {key: [] for key in keys}
    for number in range(args.repeats + 1):
        for delay, label in keys if number % 2 else reversed(keys):
            link = links[label]
            if link:
                link.delay = delay / 1000
                link.forget()
            dist.barrier()
            started = time.perf_counter()
            running[label].step()
            step = time.perf_counter() - started
            if number:  # the first round is for warming up
                times[delay, label].append((1000 * step, 1000 * link.exposed if link else 0.))
    rows = [{'delay': delay, 'contender': label, 'step_milliseconds': [step for step, _ in taken],
             'exposed_milliseconds': [exposed for _, exposed in taken],
             'hand_overs': link.hand_overs if (link := links[label]) else []}
            for (delay, label), taken in times.items()]
    counted = {name: count_hand_overs(name, world) for name in COUNTED}
    if world.is_main:
        write_record(Path(args.output), args.name, {
            'threads': torch.get_num_threads(), 'rows': rows, 'hand_overs': counted}, '')
    destroy_process_group()


def _start(label: str, wrap: Callable, args, training_args, world: World) -> tuple[Running, Link | None]:
    links = []

    def wrap_and_link(model: nn.Module) -> nn.Module:
        wrapped = wrap(model)
        if isinstance(wrapped, DistributedDataParallel):
            links.append(Link(wrapped))
        return wrapped

    here = args.replacing(channels_last=False)
    running = start_training(Contender(label, args.model, args.img_size), here, training_args,
                             precision_of('fp32', world.device), world, wrap=wrap_and_link)
    return running, links[0] if links else None


# ---------------------------------------------------------------------------------------------------------------------
# Tables

def as_text(record: dict) -> str:
    """The whole record in Markdown."""
    options_ = record['options']
    lines = [f'# Gradients summed behind the backward pass\n\n{origin(record)}\n',
             f'{options_["model"]} at {options_["img_size"]} pixels, batch {options_["batch_size"]} a process, '
             f'{RANKS} processes of {record["threads"]} thread(s) with gloo; medians of {options_["repeats"]} rounds. '
             'Exposed: from the last gradient to the last sum. gloo sums on the cores that compute, which no order of '
             'buckets hides; the last column has what the delays add to a step beside that.\n',
             _steps_table(record['rows']), f'\n{verdict(record)}', '\n## Hand-overs\n',
             'After how many gradients each bucket of ours is handed over, in every step, and its MiB.\n',
             _hand_overs_table(record['hand_overs'])]
    return '\n'.join(lines) + '\n'


def _steps_table(rows: list[dict]) -> str:
    found = {(row['delay'], row['contender']): row for row in rows}
    delays = {row['delay'] for row in rows}
    lines = []
    for (delay, label), row in found.items():
        alone, before = (found[delay, name] for name in (ALONE, 'registration'))
        exposed, exposed_before = (statistics.median(r['exposed_milliseconds']) for r in (row, before))
        ratio = statistics.median(
            step / other for step, other in zip(row['step_milliseconds'], alone['step_milliseconds'], strict=True))
        undelayed = statistics.median(found[min(delays), label]['step_milliseconds'])
        added = statistics.median(row['step_milliseconds']) - undelayed
        lines.append([f'{delay} ms', label, f'{statistics.median(row["step_milliseconds"]):.1f}', f'{ratio:.3f}',
                      *(['–'] * 3 if label == ALONE else
                        [f'{exposed:.1f}', f'{exposed / exposed_before:.2f}', f'{added:.1f}'])])
    header = ['delay', 'contender', 'ms per step', '× no communication', 'exposed ms', '× registration', 'added ms']
    return markdown_table(header, lines)


def verdict(record: dict) -> str:
    """The two targets, and whether they are met."""
    exposed = {delay: exposed_ratio(record['rows'], delay) for delay in sorted({r['delay'] for r in record['rows']})}
    early = min(map(early_percent, record['hand_overs'].values()))
    shown = ', '.join(f'{ratio:.2f} at {delay} ms' for delay, ratio in exposed.items())
    is_met = all(ratio <= EXPOSED for delay, ratio in exposed.items() if delay <= JUDGED)
    return (f'Exposed, as a part of what the order of registration exposes: {shown}; target, at most {EXPOSED:.2f} '
            f'up to {JUDGED} ms: {_met(is_met)}. Bytes before the last gradient: {early:.1f} % at least; target, '
            f'{EARLY} %: {_met(early >= EARLY)}.')


def exposed_ratio(rows: list[dict], delay: int) -> float:
    """The median of what our buckets expose, as a part of the median of those in the order of registration."""
    ours, before = (statistics.median(row['exposed_milliseconds']) for label in ('ours', 'registration')
                    for row in rows if (row['delay'], row['contender']) == (delay, label))
    return ours / before


def _met(is_met: bool) -> str:
    return 'met' if is_met else 'missed'


def _hand_overs_table(counted: dict[str, dict]) -> str:
    lines = [[name, str(found['gradients']),
              ', '.join(f'{after} ({size / 2**20:.1f})' for after, size in found['buckets']),
              f'{early_percent(found):.1f} %'] for name, found in counted.items()]
    return markdown_table(['model', 'gradients', 'handed over after (MiB)', 'bytes before the last gradient'], lines)


def main() -> None:
    parser = create_parser('Measure how much of the sum of gradients is hidden.', (overlap_options,))
    args = parse_options(parser)
    folder = check_record_options(args)
    training_args = training_options('--batch-size', str(args.batch_size), '--device', args.device,
                                     '--seed', str(args.seed))
    logging.disable(logging.INFO)
    if args.parts:
        return act_as_rank(args, training_args)
    start(training_args, alone=True)
    record = new_record('overlap', args, torch.device(args.device))
    found = launch_ranks(RANKS, torch.device(args.device), 'scaling/overlap')
    if 'error' in found:
        raise UserError(found['error'])
    record |= found
    text = as_text(record)
    print(text)
    print(*write_record(folder, args.name, record, text), sep='\n')


if __name__ == '__main__':
    run_script(main)
