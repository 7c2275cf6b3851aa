"""A model of training on many GPUs: what a step waits for, in closed form and as a simulation of single steps.

    plan(cluster, work, gpus=64)              # one line of benchmarks/scaling/plans.py's tables
    simulate(cluster, work, 64, steps=200)    # seconds of a step, with chance in it

Times are in seconds, sizes in bytes, rates per second. docs/scaling.md explains the model and what it leaves out.
"""
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import NormalDist

import numpy as np

from engine.loop import bucket_sizes

LEAST_GAIN = 1e-6


@dataclass(frozen=True)
class Link:
    """A connection between GPUs."""
    latency: float
    bandwidth: float  # of each end


@dataclass(frozen=True)
class Cluster:
    """Machines of one kind, and how fast one model trains on one of their GPUs."""
    image_seconds: float  # a step of B images takes a GPU B * image_seconds + fixed_seconds,
    fixed_seconds: float = 0.
    host_seconds: float = 0.  # but at least the time of its launches
    forward_share: float = 1 / 3  # of B * image_seconds; the rest is the backward pass
    gpus_per_node: int = 8
    node: Link = Link(0., math.inf)  # between the GPUs of a node
    network: Link = Link(0., math.inf)  # between nodes; all GPUs of a node share it
    hidden: float = 1.  # part of a reduction in which the GPU can compute; 0 if both need the same cores
    jitter: float = 0.  # standard deviation of the logarithm of a GPU's time for a step
    cores_per_gpu: float = math.inf
    loader_rate: float = math.inf  # images of one core, in training
    evaluation_rate: float = math.inf  # images of one core, in evaluation
    inference_rate: float = math.inf  # images of one GPU in evaluation
    disk: float = math.inf  # rate of a node's disk
    memory: float = 0.  # bytes that a node's memory can hold
    store_node: float = math.inf  # rate from an object store to one node
    store: float = math.inf  # and to all nodes
    save_seconds: float = 0.  # a checkpoint stops training for this time,
    write_seconds: float = 0.  # and is then written in the background; the next one waits for that
    restart_seconds: float = 0.  # from a failure to the next step
    failure_gpu_seconds: float = math.inf  # of a GPU between two failures


@dataclass(frozen=True)
class Work:
    """A training on a data set."""
    images: float
    samples: float  # images that are trained on in all
    image_bytes: float = 0.
    local_batch: int = 256  # images per step and GPU, unless all GPUs would exceed largest_batch
    largest_batch: float = math.inf
    # For each parameter in order, the part of the backward pass after which its gradient exists, and its bytes.
    gradients: tuple[tuple[float, float], ...] = ()
    evaluated: int = 0  # images after each epoch
    in_store: bool = False  # whether the data is in an object store instead of on the disk of each node

    @functools.cached_property
    def buckets(self) -> list[tuple[float, float]]:
        return fill_buckets(self.gradients)

    def batch(self, gpus: int) -> float:
        """Return the images per step on each GPU; raise ValueError if there are more GPUs than images."""
        batch = min(self.local_batch, self.largest_batch // gpus)
        if batch < 1:
            raise ValueError(f'{gpus} GPUs share a batch of {self.largest_batch}')
        return batch


# --- Parts of a step --------------------------------------------------------------------------------------------------

def fill_buckets(gradients) -> list[tuple[float, float]]:
    """Return (part of the backward pass after which it is full, bytes) of each bucket."""
    first, size = bucket_sizes(sum(amount for _, amount in gradients))
    buckets: list[tuple[float, float]] = []
    filled = 0.
    for ready, amount in gradients:
        filled += amount
        if filled >= (size if buckets else first):
            buckets.append((ready, filled))
            filled = 0.
    if filled:
        buckets.append((gradients[-1][0], filled))
    return buckets


def reduce_seconds(cluster: Cluster, amount: float, gpus: int) -> float:
    """Return the seconds to sum `amount` bytes over all GPUs.

    In a node of g GPUs, a ring takes 2(g-1) messages of 1/g of the bytes. Between N nodes, it is the faster of a ring
    with 2(N-1) messages of 1/N, and a tree with twice the bytes and 2 log2 N messages.
    """
    in_node = min(gpus, cluster.gpus_per_node)
    nodes = math.ceil(gpus / cluster.gpus_per_node)
    within = 2 * (in_node - 1) * (cluster.node.latency + amount / in_node / cluster.node.bandwidth)
    link = cluster.network
    ring = 2 * (nodes - 1) * (link.latency + amount / nodes / link.bandwidth)
    tree = 2 * math.ceil(math.log2(nodes)) * link.latency + 2 * amount / link.bandwidth
    return within + min(ring, tree) * (nodes > 1)


def compute_seconds(cluster: Cluster, batch: float) -> tuple[float, float, float]:
    """Return the seconds of forward, backward and the rest of a step of `batch` images on one GPU."""
    passes = max(batch * cluster.image_seconds, cluster.host_seconds - cluster.fixed_seconds)
    return cluster.forward_share * passes, (1 - cluster.forward_share) * passes, cluster.fixed_seconds


@functools.cache
def waiting_factor(jitter: float, gpus: int) -> float:
    """Return the mean of the slowest of `gpus` log-normal times, as a multiple of the mean of one."""
    if not jitter or gpus == 1:
        return 1.
    quantiles = (np.arange(2000) + 0.5) / 2000  # of the slowest; u^(1/n) is the quantile of each
    normal = NormalDist()
    slowest = np.exp([jitter * normal.inv_cdf(float(u)) for u in quantiles ** (1 / gpus)]).mean()
    return float(slowest) / math.exp(jitter**2 / 2)


def input_rates(cluster: Cluster, work: Work, gpus: int) -> dict[str, float]:
    """Return the images per second that each stage of the input allows, for all GPUs together."""
    nodes = math.ceil(gpus / cluster.gpus_per_node)
    rates = {'loader cores': gpus * cluster.cores_per_gpu * cluster.loader_rate}
    if not work.image_bytes:
        return rates
    if work.in_store:
        return rates | {'store, each node': nodes * cluster.store_node / work.image_bytes,
                        'store, in all': cluster.store / work.image_bytes}
    if work.images * work.image_bytes > cluster.memory:
        rates['disk'] = nodes * cluster.disk / work.image_bytes
    return rates


def step_parts(cluster: Cluster, work: Work, gpus: int) -> dict[str, float]:
    """Return what a step is the sum of: seconds of computing, and of waiting for the slowest, gradients and input."""
    batch = work.batch(gpus)
    compute = sum(compute_seconds(cluster, batch))
    factor = waiting_factor(cluster.jitter, gpus)
    forward, backward, after = (seconds * factor for seconds in compute_seconds(cluster, batch))
    end = 0.
    taken = [reduce_seconds(cluster, amount, gpus) for _, amount in work.buckets] if gpus > 1 else []
    slowed = backward + (1 - cluster.hidden) * sum(taken)
    for (ready, _), seconds in zip(work.buckets, taken, strict=False):
        end = max(end, ready * slowed) + cluster.hidden * seconds
    synchronous = forward + max(slowed, end) + after
    needed = gpus * batch / min(input_rates(cluster, work, gpus).values())
    return {'computing': compute, 'slowest': compute * (factor - 1),
            'gradients': synchronous - factor * compute, 'input': max(0., needed - synchronous)}


# Possible limits, and how to remove each.
WITHOUT: dict[str, Callable[[Cluster], Cluster]] = {
    'GPU': lambda cluster: replace(cluster, image_seconds=0., fixed_seconds=0.),
    'launches': lambda cluster: replace(cluster, host_seconds=0.),
    'gradients': lambda cluster: replace(cluster, node=Link(0., math.inf), network=Link(0., math.inf)),
    'slowest GPU': lambda cluster: replace(cluster, jitter=0.),
    'loader cores': lambda cluster: replace(cluster, cores_per_gpu=math.inf),
    'disk': lambda cluster: replace(cluster, disk=math.inf),
    'store, each node': lambda cluster: replace(cluster, store_node=math.inf),
    'store, in all': lambda cluster: replace(cluster, store=math.inf)}


def step_seconds(cluster: Cluster, work: Work, gpus: int) -> float:
    """Return the seconds of a step in closed form."""
    return sum(step_parts(cluster, work, gpus).values())


def limiter(cluster: Cluster, work: Work, gpus: int) -> str:
    """Return what limits a step: the key of WITHOUT whose removal makes it shortest."""
    whole = step_seconds(cluster, work, gpus)
    gains = {name: 1 - step_seconds(without(cluster), work, gpus) / whole for name, without in WITHOUT.items()}
    best = max(gains, key=gains.__getitem__)
    if gains[best] > LEAST_GAIN:
        return best
    rates = input_rates(cluster, work, gpus)  # two stages are equally slow
    return min(rates, key=rates.__getitem__)


# --- Chance -----------------------------------------------------------------------------------------------------------

def simulate(cluster: Cluster, work: Work, gpus: int, *, steps: int = 200, seed: int = 0, prefetch: int = 2) -> float:
    """Return the mean seconds of `steps` simulated steps, after as many that fill the queues.

    Each node has a queue of `prefetch` batches, whose times vary as a GPU's do.
    """
    random = np.random.default_rng(seed)
    nodes = math.ceil(gpus / cluster.gpus_per_node)
    node_of = np.arange(gpus) // cluster.gpus_per_node
    batch = work.batch(gpus)
    forward, backward, after = compute_seconds(cluster, batch)
    load = gpus * batch / min(input_rates(cluster, work, gpus).values())
    reductions = [(ready, reduce_seconds(cluster, amount, gpus)) for ready, amount in work.buckets] if gpus > 1 else []
    taken = (1 - cluster.hidden) * sum(seconds for _, seconds in reductions)

    def noise(count: int) -> np.ndarray:
        return np.exp(cluster.jitter * random.standard_normal(count) - cluster.jitter**2 / 2)

    end, made, ends = 0., np.zeros(nodes), []
    fetched = [np.zeros(nodes)] * prefetch  # when the batches that are in the queue were taken out of it
    for _ in range(2 * steps):
        made = np.maximum(made, fetched[-prefetch]) + load * noise(nodes)
        starts = np.maximum(end, made)
        fetched = [*fetched[1:], starts]
        pace = noise(gpus)
        behind_forward = starts[node_of] + forward * pace
        slowed = backward * pace + taken
        reduced = 0.
        for ready, seconds in reductions:
            reduced = max(reduced, (behind_forward + ready * slowed).max()) + cluster.hidden * seconds
        end = max((behind_forward + slowed).max(), reduced) + after * pace.max()
        ends.append(end)
    return float(ends[-1] - ends[steps - 1]) / steps


def goodput(cluster: Cluster, gpus: int, interval: float) -> float:
    """Return the part of the time that is training, with a checkpoint every `interval` seconds of it.

    This is equation 20 of J. T. Daly, A higher order estimate of the optimum checkpoint interval, 2006, for failures
    that follow a Poisson process, also during checkpoints and restarts.
    """
    between, needed = cluster.failure_gpu_seconds / gpus, interval + saving_seconds(cluster, interval)
    if math.isinf(between):
        return interval / needed
    return interval / (between * math.exp(cluster.restart_seconds / between) * math.expm1(needed / between))


def saving_seconds(cluster: Cluster, interval: float) -> float:
    """Return the seconds that a checkpoint costs, `interval` seconds of training after the one before."""
    return cluster.save_seconds + max(0., cluster.write_seconds - interval)


def best_interval(cluster: Cluster, gpus: int) -> float:
    """Return the best interval by J. W. Young, 1974, but at least the time that writing takes."""
    if math.isinf(cluster.failure_gpu_seconds):
        return math.inf
    return max(cluster.write_seconds, math.sqrt(2 * cluster.save_seconds * cluster.failure_gpu_seconds / gpus))


# --- A training -------------------------------------------------------------------------------------------------------

def evaluation_seconds(cluster: Cluster, work: Work, gpus: int) -> float:
    """Return the seconds of the evaluation after an epoch."""
    per_gpu = min(cluster.inference_rate, cluster.cores_per_gpu * cluster.evaluation_rate)
    return work.evaluated / (gpus * per_gpu)


def training_parts(cluster: Cluster, work: Work, gpus: int, step: float) -> dict[str, float]:
    """Return the seconds of the whole training by activity, with steps of `step` seconds.

    Checkpoints come after each epoch and, within epochs, every best_interval.
    """
    steps, epochs = work.samples / (gpus * work.batch(gpus)), work.samples / work.images
    stepping = steps * step
    interval = max(step, min(best_interval(cluster, gpus), stepping / epochs))
    saving = stepping * saving_seconds(cluster, interval) / interval
    return {'steps': stepping, 'evaluation': epochs * evaluation_seconds(cluster, work, gpus), 'checkpoints': saving,
            'failures': stepping / goodput(cluster, gpus, interval) - stepping - saving}


def ideal_rate(cluster: Cluster, work: Work) -> float:
    """Return the images per second of one GPU that waits for nothing."""
    return work.local_batch / (work.local_batch * cluster.image_seconds + cluster.fixed_seconds)


def plan(cluster: Cluster, work: Work, gpus: int, steps: int = 200) -> dict:
    """Plan a training on `gpus` GPUs: rate and its limit, hours and what takes most of them.

    images_per_second comes from simulated steps, closed_form has no chance, efficiency refers to `ideal_rate`.
    """
    batch = work.batch(gpus)
    seconds = simulate(cluster, work, gpus, steps=steps)
    rate = gpus * batch / seconds
    parts = training_parts(cluster, work, gpus, seconds)
    hours = sum(parts.values()) / 3600
    return {'gpus': gpus, 'batch': batch, 'global_batch': gpus * batch, 'images_per_second': rate,
            'closed_form': gpus * batch / step_seconds(cluster, work, gpus),
            'efficiency': rate / gpus / ideal_rate(cluster, work),
            'limiter': limiter(cluster, work, gpus), 'step_milliseconds': 1000 * seconds,
            'parts_milliseconds': {name: 1000 * value for name, value in step_parts(cluster, work, gpus).items()},
            'read_bytes_per_second': rate * work.image_bytes, 'hours': hours, 'gpu_hours': gpus * hours,
            'hours_of': {name: value / 3600 for name, value in parts.items()},
            'most': max(parts, key=parts.__getitem__)}
