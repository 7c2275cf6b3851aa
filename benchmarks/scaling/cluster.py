"""A model of training on many GPUs: what a step waits for, in closed form and as a simulation of single steps.

    cluster = Cluster(image_seconds=1 / 9000, …)
    work = Work(images=1_281_167, samples=310 * 1_281_167, …)
    plan(cluster, work, gpus=64)              # one line of benchmarks/scaling/plans.py's tables
    simulate(cluster, work, 64, steps=200)    # seconds of a step, with chance in it

Times are in seconds, sizes in bytes, rates in so many per second. A step is, on each GPU: wait for a batch, forward,
backward, and while that goes on the reduction of the gradients, bucket by bucket as engine/loop.py has them;
then the optimizer. All GPUs wait for the slowest. Not modelled: what reduction takes from the GPU that computes,
traffic of data and gradients on one wire, a congested network, the first epoch's cold caches.
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
    """What joins GPUs: seconds of one message's way, and bytes per second of each end."""
    latency: float
    bandwidth: float


@dataclass(frozen=True)
class Cluster:
    """Machines of one kind, and how fast one model trains on one of their GPUs.

    Attributes:
        image_seconds, fixed_seconds: of a step of B images the GPU takes B * image_seconds + fixed_seconds.
        host_seconds: that its launches take; a step is at least as long.
        forward_share: of B * image_seconds; the rest is the backward pass.
        node, network: join the GPUs of a node, and nodes; `network` is of a whole node.
        hidden: part of a reduction's time that the GPU can compute in; 0 where both need the same cores.
        jitter: standard deviation of the logarithm of a GPU's time for a step.
        loader_rate, evaluation_rate: images per second that one core makes batches of, in training and evaluation.
        inference_rate: images per second of one GPU in evaluation.
        disk, memory: of a node, the bytes per second of its disk, and the bytes that it can keep in memory.
        store_node, store: bytes per second that an object store gives to one node, and to all.
        save_seconds, write_seconds: that a checkpoint holds training up, and is written in the background; the next
            one waits for that.
        restart_seconds: from a failure to the next step.
        failure_gpu_seconds: seconds of a GPU between two failures.
    """
    image_seconds: float
    fixed_seconds: float = 0.
    host_seconds: float = 0.
    forward_share: float = 1 / 3
    gpus_per_node: int = 8
    node: Link = Link(0., math.inf)
    network: Link = Link(0., math.inf)
    hidden: float = 1.
    jitter: float = 0.
    cores_per_gpu: float = math.inf
    loader_rate: float = math.inf
    evaluation_rate: float = math.inf
    inference_rate: float = math.inf
    disk: float = math.inf
    memory: float = 0.
    store_node: float = math.inf
    store: float = math.inf
    save_seconds: float = 0.
    write_seconds: float = 0.
    restart_seconds: float = 0.
    failure_gpu_seconds: float = math.inf


@dataclass(frozen=True)
class Work:
    """A training: so many samples of a data set.

    Attributes:
        images: of the data set.
        samples: images that are trained on in all.
        image_bytes: mean size of an image as it is stored.
        local_batch: images per step and GPU, unless that would make a step larger than largest_batch.
        largest_batch: images per step, of all GPUs, that the optimizer can do with.
        gradients: (part of the backward pass after which it is there, bytes) of each parameter, in order.
        evaluated: images that are evaluated after each epoch.
        in_store: whether the data lies in an object store, not on the disk of each node.
    """
    images: float
    samples: float
    image_bytes: float = 0.
    local_batch: int = 256
    largest_batch: float = math.inf
    gradients: tuple[tuple[float, float], ...] = ()
    evaluated: int = 0
    in_store: bool = False

    @functools.cached_property
    def buckets(self) -> list[tuple[float, float]]:
        return fill_buckets(self.gradients)

    def batch(self, gpus: int) -> float:
        """Images per step on each GPU.

        Raises:
            ValueError: there are more GPUs than images in the largest batch.
        """
        batch = min(self.local_batch, self.largest_batch // gpus)
        if batch < 1:
            raise ValueError(f'{gpus} GPUs share a batch of {self.largest_batch}')
        return batch


# ---------------------------------------------------------------------------------------------------------------------
# Parts of a step

def fill_buckets(gradients) -> list[tuple[float, float]]:
    """(part of the backward pass after which it is full, bytes) of each bucket; each is closed once it has its size."""
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
    """Seconds to sum so many bytes over all GPUs: a ring in each node, and between nodes a ring or a tree.

    Within a node of g GPUs a ring takes 2(g-1) messages of 1/g of the bytes. Between N nodes the GPUs of a node sum
    their parts with those of other nodes at the same time: in a ring 2(N-1) messages of 1/N, or in a tree as many bytes
    as twice the whole, with 2 log2 N messages one after the other; whichever takes less.
    """
    in_node = min(gpus, cluster.gpus_per_node)
    nodes = math.ceil(gpus / cluster.gpus_per_node)
    within = 2 * (in_node - 1) * (cluster.node.latency + amount / in_node / cluster.node.bandwidth)
    link = cluster.network
    ring = 2 * (nodes - 1) * (link.latency + amount / nodes / link.bandwidth)
    tree = 2 * math.ceil(math.log2(nodes)) * link.latency + 2 * amount / link.bandwidth
    return within + min(ring, tree) * (nodes > 1)


def compute_seconds(cluster: Cluster, batch: float) -> tuple[float, float, float]:
    """Forward, backward, and what comes after, of a step of `batch` images on one GPU, as long as its launches take."""
    passes = max(batch * cluster.image_seconds, cluster.host_seconds - cluster.fixed_seconds)
    return cluster.forward_share * passes, (1 - cluster.forward_share) * passes, cluster.fixed_seconds


@functools.cache
def waiting_factor(jitter: float, gpus: int) -> float:
    """The mean of the slowest of so many log-normal times, as a multiple of the mean of one."""
    if not jitter or gpus == 1:
        return 1.
    quantiles = (np.arange(2000) + 0.5) / 2000  # of the slowest: its u is the u^(1/n) of one
    normal = NormalDist()
    slowest = np.exp([jitter * normal.inv_cdf(float(u)) for u in quantiles ** (1 / gpus)]).mean()
    return float(slowest) / math.exp(jitter**2 / 2)


def input_rates(cluster: Cluster, work: Work, gpus: int) -> dict[str, float]:
    """Images per second that each part of the way of the data allows, for all GPUs together."""
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
    """Seconds of a step, in closed form: what GPUs compute, wait for the slowest, for gradients and for the input.

    The GPU's part is that of its batch and of its launches; a step is the sum of all parts.
    """
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


# What is taken away to see what it costs, and how.
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
    """Seconds of a step, in closed form."""
    return sum(step_parts(cluster, work, gpus).values())


def limiter(cluster: Cluster, work: Work, gpus: int) -> str:
    """What limits a step: that of WITHOUT without which it would be shortest."""
    whole = step_seconds(cluster, work, gpus)
    gains = {name: 1 - step_seconds(without(cluster), work, gpus) / whole for name, without in WITHOUT.items()}
    best = max(gains, key=gains.__getitem__)
    if gains[best] > LEAST_GAIN:
        return best
    rates = input_rates(cluster, work, gpus)  # two of them are equally slow
    return min(rates, key=rates.__getitem__)


# ---------------------------------------------------------------------------------------------------------------------
# Chance

def simulate(cluster: Cluster, work: Work, gpus: int, *, steps: int = 200, seed: int = 0, prefetch: int = 2) -> float:
    """Seconds of a step, the mean of `steps` simulated ones, after as many that fill the queues.

    Each node has a queue of `prefetch` batches; a batch's time in the loader varies as a GPU's does.
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
    """Part of the time that is training, with a checkpoint every `interval` seconds of it.

    J. T. Daly, A higher order estimate of the optimum checkpoint interval, 2006, equation 20: failures come as a
    Poisson process, also while a checkpoint is written and while the training starts again.
    """
    between, needed = cluster.failure_gpu_seconds / gpus, interval + saving_seconds(cluster, interval)
    if math.isinf(between):
        return interval / needed
    return interval / (between * math.exp(cluster.restart_seconds / between) * math.expm1(needed / between))


def saving_seconds(cluster: Cluster, interval: float) -> float:
    """Seconds that a checkpoint costs, `interval` seconds of training after the one before."""
    return cluster.save_seconds + max(0., cluster.write_seconds - interval)


def best_interval(cluster: Cluster, gpus: int) -> float:
    """Seconds of training between checkpoints that lose least: J. W. Young, 1974; no shorter than one is written in."""
    if math.isinf(cluster.failure_gpu_seconds):
        return math.inf
    return max(cluster.write_seconds, math.sqrt(2 * cluster.save_seconds * cluster.failure_gpu_seconds / gpus))


def simulate_failures(cluster: Cluster, gpus: int, interval: float, *, segments: int = 10_000, seed: int = 0) -> float:
    """The part of the time that is training, as `goodput`, by drawing failures."""
    random = np.random.default_rng(seed)
    between = cluster.failure_gpu_seconds / gpus
    whole = interval + saving_seconds(cluster, interval)
    time, failure = 0., random.exponential(between)
    for _ in range(segments):
        needed = whole
        while time + needed > failure:
            time, failure = failure, failure + random.exponential(between)
            needed = cluster.restart_seconds + whole
        time += needed
    return segments * interval / time


# ---------------------------------------------------------------------------------------------------------------------
# A training

def evaluation_seconds(cluster: Cluster, work: Work, gpus: int) -> float:
    """Seconds that the evaluation after an epoch takes."""
    per_gpu = min(cluster.inference_rate, cluster.cores_per_gpu * cluster.evaluation_rate)
    return work.evaluated / (gpus * per_gpu)


def training_parts(cluster: Cluster, work: Work, gpus: int, step: float) -> dict[str, float]:
    """Seconds of the whole training with steps of `step` seconds, by what takes them.

    A checkpoint comes after each epoch, and within epochs every best_interval.
    """
    steps, epochs = work.samples / (gpus * work.batch(gpus)), work.samples / work.images
    stepping = steps * step
    interval = max(step, min(best_interval(cluster, gpus), stepping / epochs))
    saving = stepping * saving_seconds(cluster, interval) / interval
    return {'steps': stepping, 'evaluation': epochs * evaluation_seconds(cluster, work, gpus), 'checkpoints': saving,
            'failures': stepping / goodput(cluster, gpus, interval) - stepping - saving}


def plan(cluster: Cluster, work: Work, gpus: int, steps: int = 200) -> dict:
    """A training on so many GPUs: its rate and what limits it, its hours and what takes most of them.

    images_per_second is of steps, simulated, and closed_form the same without chance; efficiency is against GPUs that
    never wait for anything, at work.local_batch.
    """
    batch = work.batch(gpus)
    seconds = simulate(cluster, work, gpus, steps=steps)
    rate = gpus * batch / seconds
    never_waiting = work.local_batch / (work.local_batch * cluster.image_seconds + cluster.fixed_seconds)
    parts = training_parts(cluster, work, gpus, seconds)
    hours = sum(parts.values()) / 3600
    return {'gpus': gpus, 'batch': batch, 'global_batch': gpus * batch, 'images_per_second': rate,
            'closed_form': gpus * batch / step_seconds(cluster, work, gpus), 'efficiency': rate / gpus / never_waiting,
            'limiter': limiter(cluster, work, gpus), 'step_milliseconds': 1000 * seconds,
            'parts_milliseconds': {name: 1000 * value for name, value in step_parts(cluster, work, gpus).items()},
            'read_bytes_per_second': rate * work.image_bytes, 'hours': hours, 'gpu_hours': gpus * hours,
            'hours_of': {name: value / 3600 for name, value in parts.items()},
            'most': max(parts, key=parts.__getitem__)}
