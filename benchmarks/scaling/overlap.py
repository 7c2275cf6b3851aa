"""Measure how much of the sum of the gradients is hidden behind the backward pass that makes them.

    python -m benchmarks.scaling.overlap                                       # t2t_vit_14 at 224 pixels, two processes
    python -m benchmarks.scaling.overlap --model t2t_vit_7 --delays 0 20       # another model, other links

Two processes with gloo take the same training steps. Their contenders take turns:

no communication  the model by itself
registration      buckets in the order in which parameters are registered, all full only at the end
torch             DistributedDataParallel with its defaults; its first step has other buckets
ours              as train.py wraps the model (engine/loop.py)

A communication hook imitates the link between two machines: it sums one bucket at a time and delays each by --delays.
Exposed is the time from the last gradient to the last sum, in which nothing is computed.
"""
import functools
import queue
import statistics
import threading
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks.shared.command import common_options, parse_command, shared_training_options, start_alone
from benchmarks.shared.measure import Contender, Running, start_training
from benchmarks.shared.ranks import finish_rank, launch_ranks, take_turns
from benchmarks.shared.records import markdown_table, new_record, origin, precision_of, save
from engine.loop import wrap_model
from models import create_model
from options.types import count, positive_int
from utils import job
from utils.distributed import World
from utils.runtime import seed_everything, start
from utils.script import run_script

RANKS = 2
ALONE = 'no communication'
COUNTED = ('t2t_vit_7', 't2t_vit_14', 't2t_vit_19', 't2t_vit_24', 't2t_vit_t_14')
# Targets: at most this part of the time that registration exposes, for delays up to these milliseconds; at least this
# percentage of bytes before the last gradient.
EXPOSED, JUDGED, EARLY = 1 / 3, 5, 80
MET = {True: 'met', False: 'missed'}


def overlap_options(parser) -> None:
    add = parser.add_argument_group('What is measured').add_argument
    add('--model', default='t2t_vit_14', metavar='MODEL', help='by name')
    add('--delays', nargs='+', type=count, default=[0, 5, 20], metavar='MS',
        help='milliseconds that each bucket takes in addition to loopback')
    add('--repeats', type=positive_int, default=12, metavar='N', help='rounds, and steps of each contender')
    add('--device', default='cpu', choices=['cpu'], help='the processes share its cores')
    common_options(add, batch_size=2, img_size=224, seed=42)


# --- The link ---------------------------------------------------------------------------------------------------------

class Link:
    """A communication hook of DDP that averages one bucket at a time and notes when each was handed over.

    Attributes:
        delay: seconds added to each bucket.
        hand_overs: (gradients that existed, bytes) of each bucket in the last backward pass.
        exposed: seconds from the last gradient to the last average in the last backward pass.
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
        """Forget the last backward pass."""
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
    """Run the backward pass of `loss`; return the number of gradients and [gradients, bytes] at each hand-over."""
    link.forget()
    loss().backward()
    gradients = sum(parameter.requires_grad for parameter in model.parameters())
    return {'gradients': gradients, 'buckets': [list(hand_over) for hand_over in link.hand_overs]}


def early_percent(found: dict) -> float:
    """Return the percentage of bytes that are handed over before the last gradient exists."""
    sizes = [size for _, size in found['buckets']]
    return 100 * sum(size for after, size in found['buckets'] if after < found['gradients']) / sum(sizes)


def count_hand_overs(name: str, world: World) -> dict:
    """Return `list_hand_overs` of a model's first step as train.py wraps it; images do not matter."""
    model = wrap_model(create_model(name, img_size=32), world)
    assert isinstance(model, DistributedDataParallel), 'there are several ranks'
    images = torch.randn(2, 3, 32, 32)
    return list_hand_overs(model, Link(model), lambda: model(images).square().sum())


# --- Measuring --------------------------------------------------------------------------------------------------------

def wrap_in_registration_order(model: nn.Module) -> DistributedDataParallel:
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True)
    wrapped.reducer._push_all_rebuilt_params()
    return wrapped


def act_as_rank(args, training_args) -> None:
    """Measure with the other process; rank 0 writes what it found."""
    world, _ = start(training_args)
    wraps: dict[str, Callable[[nn.Module], nn.Module]] = {
        ALONE: lambda model: model, 'registration': wrap_in_registration_order,
        'torch': functools.partial(DistributedDataParallel, gradient_as_bucket_view=True),
        'ours': functools.partial(wrap_model, world=world)}
    running: dict[str, Running] = {}
    links: dict[str, Link] = {}

    def wrap_and_link(model: nn.Module, label: str) -> nn.Module:
        wrapped = wraps[label](model)
        if isinstance(wrapped, DistributedDataParallel):
            links[label] = Link(wrapped)
        return wrapped

    for label in wraps:
        seed_everything(args.seed, 0)
        running[label] = start_training(
            Contender(label, args.model, args.img_size), args, training_args, precision_of('fp32', world.device), world,
            wrap=functools.partial(wrap_and_link, label=label))
    rows = [{'delay': delay, 'contender': label, 'step_milliseconds': [], 'exposed_milliseconds': []}
            for delay in args.delays for label in wraps]
    for row, counts in take_turns(rows, args.repeats):
        link = links.get(row['contender'])
        if link:
            link.delay = row['delay'] / 1000
            link.forget()
        dist.barrier()
        started = time.perf_counter()
        running[row['contender']].step()
        step = time.perf_counter() - started
        if counts:
            row['step_milliseconds'].append(1000 * step)
            row['exposed_milliseconds'].append(1000 * link.exposed if link else 0.)
    for row in rows:
        row['hand_overs'] = links[row['contender']].hand_overs if row['contender'] in links else []
    counted = {name: count_hand_overs(name, world) for name in COUNTED}
    finish_rank(args, world, {'threads': torch.get_num_threads(), 'rows': rows, 'hand_overs': counted})


# --- Tables -----------------------------------------------------------------------------------------------------------

def as_text(record: dict) -> str:
    """Return the whole record in Markdown."""
    hand_overs = [[name, found['gradients'],
                   ', '.join(f'{after} ({size / 2**20:.1f})' for after, size in found['buckets']),
                   f'{early_percent(found):.1f} %'] for name, found in record['hand_overs'].items()]
    options = record['options']
    lines = [f'# Gradients summed behind the backward pass\n\n{origin(record)}\n',
             f'{options["model"]} at {options["img_size"]} pixels, batch {options["batch_size"]} a process, '
             f'{RANKS} processes of {record["threads"]} thread(s) with gloo; medians of {options["repeats"]} rounds. '
             'Exposed: from the last gradient to the last sum. gloo sums on the cores that compute, which no order of '
             'buckets hides. The last column shows what the delays add to a step.\n',
             _steps_table(record['rows']), f'\n{verdict(record)}', '\n## Hand-overs\n',
             'Each bucket of ours is handed over after this many gradients in every step; its MiB in parentheses.\n',
             markdown_table(['model', 'gradients', 'handed over after (MiB)', 'bytes before the last gradient'],
                            hand_overs)]
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
    """Return the two targets, and whether they are met."""
    exposed = {delay: exposed_ratio(record['rows'], delay) for delay in sorted({r['delay'] for r in record['rows']})}
    early = min(map(early_percent, record['hand_overs'].values()))
    shown = ', '.join(f'{ratio:.2f} at {delay} ms' for delay, ratio in exposed.items())
    is_met = all(ratio <= EXPOSED for delay, ratio in exposed.items() if delay <= JUDGED)
    return (f'Exposed, as a part of what the order of registration exposes: {shown}; target, at most {EXPOSED:.2f} '
            f'up to {JUDGED} ms: {MET[is_met]}. Bytes before the last gradient: {early:.1f} % at least; target, '
            f'{EARLY} %: {MET[early >= EARLY]}.')


def exposed_ratio(rows: list[dict], delay: int) -> float:
    """Return the median time that our buckets expose, as a part of that in the order of registration."""
    ours, before = (statistics.median(row['exposed_milliseconds']) for label in ('ours', 'registration')
                    for row in rows if (row['delay'], row['contender']) == (delay, label))
    return ours / before


def main() -> None:
    args = parse_command('Measure how much of the sum of gradients is hidden.', 'overlap', overlap_options,
                         channels_last=False)
    if job.world_size() > 1:  # started by `launch_ranks`
        act_as_rank(args, shared_training_options(args))
        return
    _, world = start_alone(args)
    record = {**new_record('scaling.overlap', args, world.device),
              **launch_ranks(RANKS, 'scaling/overlap', args.device)}
    text = as_text(record)
    print(text, *save(args, record, text), sep='\n')


if __name__ == '__main__':
    run_script(main)
