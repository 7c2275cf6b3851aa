"""The one place where DataLoaders are built: batches that are the same whoever makes them, and when.

    loader = create_loader(train, transform, TrainSampler(len(train), 64), seed=42, workers=8)
    for epoch in range(epochs):
        loader.set_position(epoch)
        for images, targets in loader:      # uint8 [B, C, H, W] or [B, S, C, H, W], int64 [B]

An image that cannot be decoded ends the loading, unless `max_bad_images` allows for some. Then it is logged
and counted; in training it is replaced by the next image of the dataset (after the last comes the first; in
image folders the next one nearly always is of the same class), augmented as the bad one would have been; in
evaluation it is left out. So what takes its place depends on the dataset alone: not on the number of workers
or ranks, and not on where a run was interrupted.
"""

import gc
import logging
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset
from torch.utils.data._utils import signal_handling

from data.base import ImageDataset
from data.decode import ImageError
from data.forking import RetryingForkContext
from data.memory import BatchMemory
from data.samplers import EvalSampler, TrainSampler
from data.seeding import preserved_generators, seed_generators
from data.transforms import Transform
from utils.errors import UserError
from utils.runtime import keep_freed_memory

_logger = logging.getLogger(__name__)

PREFETCH = 2
"""Batches that each worker prepares ahead."""


def create_loader(
    dataset: ImageDataset,
    transform: Transform,
    sampler: TrainSampler | EvalSampler,
    *,
    seed: int = 42,
    workers: int = 4,
    pin_memory: bool = False,
    max_bad_images: int = 0,
) -> 'Loader':
    """A Loader of the batches that `sampler` names, decoded and transformed in `workers` processes.

    dataset: an ImageDataset. transform: image → uint8 tensor of one fixed shape. The image is
        `dataset.encoded(index)` where the transform has `takes_encoded`, else the PIL image `dataset.image(index)`.
    sampler: a TrainSampler, which makes this a training loader, or an EvalSampler.
    seed: of the samples' randomness in training; evaluation has none.
    workers: 0 for doing the work in this process; they stay from epoch to epoch.
    pin_memory: for copies to a GPU that the program need not wait for.
    max_bad_images: how many different images may fail to decode, per rank and life of the process.
    """
    if workers < 0 or max_bad_images < 0:
        raise UserError(f'workers {workers}, max_bad_images {max_bad_images}; neither can be below 0')
    memory = BatchMemory(workers, PREFETCH + 2)  # one is used, and one on its way
    batches = BatchSource(dataset, transform, memory=memory, training=isinstance(sampler, TrainSampler), seed=seed,
                          max_bad_images=max_bad_images)
    options: dict[str, Any] = dict(num_workers=workers, pin_memory=pin_memory)
    if workers:
        # Workers compute with one thread each: PyTorch sets that itself.
        options.update(persistent_workers=True, prefetch_factor=PREFETCH, worker_init_fn=_prepare_worker)
        if sys.platform == 'linux':  # other systems have no safe fork
            options.update(multiprocessing_context=RetryingForkContext())
    # With a generator of its own an iterator takes nothing from the global one; what it draws has no effect.
    dataloader: DataLoader = DataLoader(batches, batch_sampler=sampler, collate_fn=_as_it_is,
                                        generator=torch.Generator(), **options)
    return Loader(dataloader, dataset, sampler, memory, max_bad_images)


class Loader:
    """Iterates over (images, targets). Made by `create_loader`.

    Iterating raises UserError for one bad image too many, and if a worker process died.

    blocks: of shared memory, each for a batch, that its worker processes come to have, and keep.
    bad_images: dict of the bad images met so far, {path: why it cannot be decoded}.
    take_bad_count(): how many samples they were.
    """

    def __init__(self, dataloader: DataLoader, dataset: ImageDataset, sampler: TrainSampler | EvalSampler,
                 memory: BatchMemory, max_bad_images: int):
        self._dataloader: DataLoader | None = dataloader
        self._memory = memory
        self.blocks = len(memory)
        self._dataset = dataset
        self.sampler = sampler
        self.max_bad_images = max_bad_images
        self.bad_images: dict[str, str] = {}
        self._bad_count = 0

    def __len__(self) -> int:
        """The number of batches of a whole epoch on this rank."""
        return len(self.sampler)

    def set_position(self, epoch: int, start_batch: int = 0):
        """The next iteration starts at batch `start_batch` of `epoch`; training only, before each epoch."""
        assert isinstance(self.sampler, TrainSampler), 'evaluation has one position, the beginning'
        self.sampler.set_position(epoch, start_batch)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        try:
            batches = self._batches()  # before what it starts: processes are not to be forked beside other threads
            with self._dataset.ahead(self.sampler.remaining()) as used:
                for images, block, targets, bad, bad_count, problem in batches:
                    self._note_bad_images(bad)
                    self._bad_count += bad_count
                    if problem is not None:
                        raise UserError(problem)
                    if len(targets):
                        self._memory.give_back(images, block)
                        yield images, targets
                    del images
                    self._memory.reclaim()
                    used(self.sampler.batch_size)
        except RuntimeError as error:
            if explanation := explain_worker_death(error):
                raise explanation from error
            raise

    def _batches(self) -> Iterator[tuple]:
        assert self._dataloader is not None, 'the loader is closed'
        self._memory.restart()
        batches = iter(self._dataloader)
        _explain_worker_deaths()
        return batches

    def take_bad_count(self) -> int:
        """The number of samples replaced or left out in the batches given since this was called last.

        Unlike the length of `bad_images` it counts an image each time it is met. Batches that workers have
        prepared but nobody has taken do not count: so the sum over an epoch is the same where it was interrupted.
        """
        count, self._bad_count = self._bad_count, 0
        return count

    def close(self):
        """Ends the worker processes. The loader cannot be used again.

        Forgetting the loader ends them too, in five seconds where that is left to the garbage collector.
        """
        self._dataloader = None

    def _note_bad_images(self, bad: dict[str, str]):
        for path, message in bad.items():
            if path in self.bad_images:
                continue  # every epoch meets it again
            self.bad_images[path] = message
            if len(self.bad_images) <= self.max_bad_images:
                _logger.warning('%s (%d of %d tolerated)', message, len(self.bad_images), self.max_bad_images)
            elif self.max_bad_images:
                raise UserError(f'{len(self.bad_images)} images cannot be decoded, {self.max_bad_images} are '
                                f'tolerated; the last one: {message}')
            else:
                raise UserError(message)


def explain_worker_death(error: RuntimeError) -> UserError | None:
    """A UserError with advice, if `error` is PyTorch's RuntimeError for a worker process that died, or None."""
    if not str(error).startswith('DataLoader worker'):
        return None
    event = str(error).splitlines()[0].rstrip('. ')
    return UserError(f'a data loading process died ({event}), mostly because memory or shared memory ran out; '
                     'use fewer --workers, a smaller --batch-size, or a larger /dev/shm')


def _explain_worker_deaths():
    """Makes PyTorch's error for a dead worker a UserError, wherever in the main process it comes up.

    PyTorch raises it in a handler of SIGCHLD, which it sets with the first worker: between any two lines of the
    training, far from this module. To be called when workers have been started; does nothing without them.
    """
    handler = signal.getsignal(signal.SIGCHLD) if hasattr(signal, 'SIGCHLD') else None
    is_theirs = getattr(handler, '__module__', None) == signal_handling.__name__
    if not (is_theirs and callable(handler)) or threading.current_thread() is not threading.main_thread():
        return

    def explaining_handler(number, frame):
        try:
            handler(number, frame)
        except RuntimeError as error:
            if explanation := explain_worker_death(error):
                raise explanation from error
            raise

    signal.signal(signal.SIGCHLD, explaining_handler)


class BatchSource(Dataset):
    """What a worker process holds: turns the keys of a batch, a list of (epoch, index), into the batch.

    `__getitems__` gives (images, block, targets, bad, bad_count, problem): block is the number of images' block in
    `memory`, bad is {path: message} of the images that cannot be decoded, bad_count the number of samples replaced or
    left out, problem the message of a UserError that prevents the batch, else None. The error is handed over as a value
    because PyTorch would put the worker's traceback into its message.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        transform: Transform,
        *,
        training: bool,
        seed: int,
        max_bad_images: int,
        memory: BatchMemory,
    ):
        self._dataset = dataset
        self._transform = transform
        self._memory = memory
        self._load = dataset.encoded if getattr(transform, 'takes_encoded', False) else dataset.image
        self._training = training
        self._seed = seed
        self._max_bad_images = max_bad_images

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitems__(self, keys: list[tuple[int, int]]) -> tuple:
        bad: dict[str, str] = {}
        try:
            if self._training:
                with preserved_generators():  # without worker processes these are the training loop's own
                    batch = self._gather(len(keys), (self._training_sample(*key, bad) for key in keys))
            else:
                batch = self._gather(len(keys), (self._sample(index, bad) for _, index in keys))
        except UserError as error:
            return None, None, None, bad, 0, str(error)
        # Of every sample its own image was tried first.
        bad_count = sum(self._dataset.path(index) in bad for _, index in keys) if bad else 0
        return *batch, bad, bad_count, None

    def _gather(self, count: int, samples: Iterable[tuple[torch.Tensor, int] | None]
                ) -> tuple[torch.Tensor | None, int | None, torch.Tensor]:
        """The images of up to `count` samples as rows of one tensor, where that lies, and their targets; None among
        `samples` is left out.

        Each is written where the main process will read it, as soon as it is made: there is no second copy of a batch.
        """
        images, block = None, None
        targets: list[int] = []
        for image, target in filter(None, samples):
            if images is None:
                images, block = self._memory.take((count, *image.shape), image.dtype)
            images[len(targets)] = image
            targets.append(target)
        return images if images is None else images[:len(targets)], block, torch.tensor(targets)

    def _training_sample(self, epoch: int, index: int, bad: dict[str, str]) -> tuple[torch.Tensor, int]:
        """The transformed image and the target of (epoch, index), or of the first good image after it."""
        for step in range(len(self)):
            seed_generators(self._seed, epoch, index)
            if (sample := self._sample((index + step) % len(self), bad)) is not None:
                return sample
        raise UserError(f'none of {len(self)} images can be decoded; check the dataset')

    def _sample(self, index: int, bad: dict[str, str]) -> tuple[torch.Tensor, int] | None:
        """The transformed image and the target of `index`; None if the image is bad, which `bad` then tells.

        Raises ImageError if the bad images of this batch alone are too many.
        """
        try:
            image = self._transform(self._load(index))
        except ImageError as error:
            bad[self._dataset.path(index)] = str(error)
            if len(bad) > self._max_bad_images:
                raise
            return None
        return image, int(self._dataset.targets[index])


def _as_it_is(batch):
    return batch


def _prepare_worker(worker_id: int):
    gc.freeze()  # what is there stays: to look through it takes time, and copies the pages that are shared
    keep_freed_memory()
    _shield_worker()


def _shield_worker():
    """Keeps signals that are sent to a whole job, by Ctrl-C, torchrun or Slurm, from ending a worker process.

    What they mean is for the main process to decide, and to save before it stops it still needs its batches.
    A SIGTERM from the main process itself, which is how PyTorch ends a worker that hangs, ends it as ever;
    and a worker whose main process is gone ends by itself.
    """
    for name in ('SIGINT', 'SIGHUP', 'SIGQUIT', 'SIGUSR1', 'SIGUSR2'):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    main_process = multiprocessing.parent_process()
    if main_process and hasattr(signal, 'sigwaitinfo'):  # on Linux; only this tells who sent a signal
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_await_termination, args=(main_process.pid,), daemon=True).start()


def _await_termination(main_process: int):
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != main_process:
        pass
    os._exit(0)
