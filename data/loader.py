"""The one place where DataLoaders are built: batches that do not depend on the number of workers or ranks.

    loader = create_loader(train, transform, TrainSampler(len(train), 64), seed=42, workers=8)
    for epoch in range(epochs):
        loader.set_position(epoch)
        for images, targets in loader:      # uint8 [B, C, H, W] or [B, S, C, H, W], int64 [B]

With `token_labels` a batch is (images, targets, maps, boxes), where `token_targets.crop_targets` tells what these are.

An image that cannot be decoded raises an error, unless `max_bad_images` allows for some. Then it is logged and counted.
Training replaces it by the next image of the data set (after the last, the first) with its targets, augmented as the
bad one would have been. Evaluation leaves it out. So the replacement depends on the data set alone, not on where a run
was interrupted.
"""
import gc
import logging
import math
import multiprocessing
import multiprocessing.queues
import multiprocessing.util
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Iterable, Iterator
from types import FrameType, TracebackType
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info
from torch.utils.data._utils import signal_handling

from data.base import ImageDataset
from data.decode import ImageError
from data.forking import RetryingForkContext
from data.memory import SHARED_MEMORY, BatchMemory, share, tell_where
from data.samplers import EvalSampler, TrainSampler
from data.seeding import preserved_generators, seed_generators
from data.token_labels import TokenLabels
from data.token_targets import certain_map
from data.transforms import Transform
from utils.errors import UserError, WorkerKilledError
from utils.exits import temporary_folder
from utils.faults import fault_point
from utils.runtime import keep_freed_memory
from utils.signals import StalledError

_logger = logging.getLogger(__name__)

# Batches that each worker prepares ahead.
PREFETCH = 2
# Between a worker's two looks whether its main process lives.
PARENT_SECONDS = 5.0


def create_loader(dataset: ImageDataset, transform: Transform, sampler: TrainSampler | EvalSampler, *, seed: int = 42,
                  workers: int = 4, pin_memory: bool = False, max_bad_images: int = 0, held: int = 1,
                  token_labels: TokenLabels | None = None) -> 'Loader':
    """Return a Loader of the batches that `sampler` names, decoded and transformed in `workers` processes.

    transform: image → uint8 tensor of one fixed shape. The image is `dataset.encoded(index)` if the transform has
        `takes_encoded`, else the PIL image `dataset.image(index)`.
    sampler: a TrainSampler for a training loader, or an EvalSampler.
    seed: of the samples' randomness in training; evaluation has none.
    workers: 0 does the work in this process; workers live from epoch to epoch.
    pin_memory: page-locked batches, which are copied to a GPU in the background.
    max_bad_images: how many different images may fail to decode, per rank and process.
    held: how many batches the reader has in hand at a time.
    token_labels: those of `dataset`, for a transform that has `located`, as FastTrainTransform has.
    """
    if workers < 0 or max_bad_images < 0:
        raise UserError(f'workers {workers}, max_bad_images {max_bad_images}; neither can be below 0')
    in_hand = 1 if pin_memory else math.ceil(held / max(workers, 1))  # of each worker; pinned batches are copies
    memory = BatchMemory(workers, PREFETCH + 1 + in_hand)  # one in transfer
    batches = BatchSource(dataset, transform, memory=memory, training=isinstance(sampler, TrainSampler), seed=seed,
                          max_bad_images=max_bad_images, token_labels=token_labels)
    options: dict[str, Any] = dict(num_workers=workers, pin_memory=pin_memory)
    if workers:
        tell_where()
        # All workers share this folder for their sockets. Without it each makes its own, which stays if it is killed.
        temporary_folder(_socket_folder)
        # Workers compute with one thread each: PyTorch sets that itself.
        options.update(persistent_workers=True, prefetch_factor=PREFETCH, worker_init_fn=_prepare_worker)
        if sys.platform == 'linux':  # fork is not safe on other systems
            options.update(multiprocessing_context=RetryingForkContext())
    # Its own generator, which has no effect, keeps the iterator from drawing from the global one.
    dataloader: DataLoader = DataLoader(batches, batch_sampler=sampler, collate_fn=_unchanged,
                                        generator=torch.Generator(), **options)
    return Loader(dataloader, dataset, sampler, memory, max_bad_images, token_labels)


class Loader:
    """Iterates over (images, targets), or with token labels (images, targets, maps, boxes). Made by `create_loader`.

    Iterating raises UserError for one bad image too many, and if a worker process died.

    blocks: number of shared memory blocks of its workers, each for a batch.
    bad_images: {path: why it cannot be decoded} of the bad images so far.
    """

    def __init__(self, dataloader: DataLoader, dataset: ImageDataset, sampler: TrainSampler | EvalSampler,
                 memory: BatchMemory, max_bad_images: int, token_labels: TokenLabels | None = None):
        self._dataloader: DataLoader | None = dataloader
        self._memory = memory
        self.blocks = len(memory)
        self._dataset = dataset
        self._token_labels = token_labels
        self.sampler = sampler
        self.max_bad_images = max_bad_images
        self.bad_images: dict[str, str] = {}
        self._bad_count = 0

    def __len__(self) -> int:
        """Return the number of batches of a whole epoch on this rank."""
        return len(self.sampler)

    def fingerprint(self) -> str:
        """Return that of the data set."""
        return self._dataset.fingerprint()

    def label_fingerprint(self) -> str:
        """Return that of the token labels, '' without."""
        return self._token_labels.fingerprint() if self._token_labels is not None else ''

    def set_position(self, epoch: int, start_batch: int = 0) -> None:
        """Let the next iteration start at batch `start_batch` of `epoch`; required before each epoch of training."""
        assert isinstance(self.sampler, TrainSampler), 'evaluation always starts at the beginning'
        self.sampler.set_position(epoch, start_batch)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, ...]]:
        try:
            batches = self._batches()  # first: no process may be forked once the threads of `ahead` run
            with self._dataset.ahead(self.sampler.remaining()) as used:
                for images, block, others, bad, bad_count, problem in batches:
                    self._note_bad_images(bad)
                    self._bad_count += bad_count
                    if problem is not None:
                        raise UserError(problem)
                    if images is not None:
                        self._memory.give_back(images, block)
                        yield images, *others
                    del images, others
                    self._memory.reclaim()
                    used(self.sampler.batch_size)
        except StalledError:
            self._end_workers()
            raise
        except RuntimeError as error:
            if explanation := explain_worker_death(error, self._exit_codes()):
                raise explanation from error
            raise

    def _batches(self) -> Iterator[tuple]:
        assert self._dataloader is not None, 'the loader is closed'
        self._memory.restart()
        try:
            batches = iter(self._dataloader)
        except OSError as error:  # no process, no descriptor, no semaphore
            raise UserError(f'loader workers cannot be started ({error.strerror}); use fewer --workers, or raise the '
                            f'limits on processes, files (ulimit -u, -n) and {SHARED_MEMORY}') from error
        _explain_worker_deaths()
        return batches

    def take_bad_count(self) -> int:
        """Return the number of samples replaced or left out since the last call.

        It counts an image each time it is met, in batches that were read. So the sum over an epoch does not depend on
        interruptions.
        """
        count, self._bad_count = self._bad_count, 0
        return count

    def close(self) -> None:
        """End the worker processes. The loader cannot be used again."""
        self._dataloader = None

    def _end_workers(self) -> None:
        """End the workers, which wait for data. PyTorch would give each of them 5 seconds to end by itself."""
        iterator: Any = self._dataloader and self._dataloader._iterator
        if iterator is None or not self._dataloader or not self._dataloader.num_workers:
            return
        if iterator._worker_pids_set:  # else PyTorch would report their end as a crash
            signal_handling._remove_worker_pids(id(iterator))
            iterator._worker_pids_set = False
        for worker in iterator._workers:
            worker.kill()

    def _exit_codes(self) -> list[int | None]:
        iterator: Any = self._dataloader and self._dataloader._iterator
        return [worker.exitcode for worker in getattr(iterator, '_workers', ())]

    def _note_bad_images(self, bad: dict[str, str]) -> None:
        for path, message in bad.items():
            if path in self.bad_images:
                continue  # met in an earlier epoch
            self.bad_images[path] = message
            if len(self.bad_images) <= self.max_bad_images:
                _logger.warning('%s (%d of %d tolerated)', message, len(self.bad_images), self.max_bad_images)
            elif self.max_bad_images:
                raise UserError(f'{len(self.bad_images)} images cannot be decoded, {self.max_bad_images} are '
                                f'tolerated; the last one: {message}')
            else:
                raise UserError(message)


def _socket_folder() -> str:
    """Return the temporary folder for sockets of this process and its workers, in /tmp if TMPDIR has a long path.

    A socket's path has at most 107 bytes, of which multiprocessing takes 32 within TMPDIR.
    """
    usual = tempfile.tempdir
    if len(os.fsencode(tempfile.gettempdir())) > 75:
        tempfile.tempdir = '/tmp'
    try:
        return multiprocessing.util.get_temp_dir()
    finally:
        tempfile.tempdir = usual


def explain_worker_death(error: RuntimeError, exit_codes: Iterable[int | None] = ()) -> UserError | None:
    """Return a UserError with advice if `error` is PyTorch's RuntimeError for a worker that died.

    `exit_codes` are those of the workers, which PyTorch's message does not always tell.
    """
    if not str(error).startswith('DataLoader worker'):
        return None
    event = str(error).splitlines()[0].partition(' Details are lost')[0].rstrip('. ')
    was_killed = event.endswith('killed by signal: Killed') or -signal.SIGKILL in exit_codes
    kind = WorkerKilledError if was_killed else UserError
    return kind(f'a data loading process died ({event}), mostly because memory, {SHARED_MEMORY}, open files '
                '(ulimit -n) or processes (ulimit -u) ran out; use fewer --workers, a smaller --batch-size, or a '
                'higher limit')


def _explain_worker_deaths() -> None:
    """Turn PyTorch's error for a dead worker into a UserError, wherever in the main process it is raised.

    PyTorch raises it in its SIGCHLD handler, between any two lines of the training. Call this once workers are started;
    without them it does nothing.
    """
    handler = signal.getsignal(signal.SIGCHLD) if hasattr(signal, 'SIGCHLD') else None
    is_theirs = getattr(handler, '__module__', None) == signal_handling.__name__
    if not (is_theirs and callable(handler)) or threading.current_thread() is not threading.main_thread():
        return

    def explaining_handler(number, frame):
        try:
            handler(number, frame)
        except RuntimeError as error:
            if _is_in(frame, '_shutdown_workers'):
                return  # the loader is ending them, after an error of its own
            if explanation := explain_worker_death(error):
                raise explanation from error
            raise

    signal.signal(signal.SIGCHLD, explaining_handler)


def _is_in(frame: FrameType | None, function: str) -> bool:
    while frame and frame.f_code.co_name != function:
        frame = frame.f_back
    return frame is not None


class BatchSource(Dataset):
    """Turns the keys of a batch, a list of (epoch, index, repeat), into the batch, in a worker process.

    `__getitems__` returns (images, block, others, bad, bad_count, problem). images: None if no sample is left. block:
    number of their block in `memory`. others: (targets,), or with token labels (targets, maps, boxes). bad: {path:
    message} of the images that cannot be decoded. bad_count: samples replaced or left out. problem: message of a
    UserError that prevents the batch, or None. PyTorch would add a traceback to a raised error.
    """

    def __init__(self, dataset: ImageDataset, transform: Transform, *, training: bool, seed: int, max_bad_images: int,
                 memory: BatchMemory, token_labels: TokenLabels | None = None):
        self._dataset = dataset
        self._token_labels = token_labels
        self._transform: Any = transform
        self._memory = memory
        self._load = dataset.encoded if getattr(transform, 'takes_encoded', False) else dataset.image
        self._training = training
        self._seed = seed
        self._max_bad_images = max_bad_images

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitems__(self, keys: list[tuple[int, int, int]]) -> tuple:
        fault_point('data.train' if self._training else 'data.val')
        bad: dict[str, str] = {}
        try:
            if self._training:
                with preserved_generators():  # without worker processes these are the training loop's own
                    batch = self._gather(len(keys), (self._training_sample(*key, bad) for key in keys))
            else:
                batch = self._gather(len(keys), (self._sample(index, bad) for _, index, _ in keys))
        except UserError as error:
            return None, None, None, bad, 0, str(error)
        # The own image of every sample was tried first.
        bad_count = sum(self._dataset.path(index) in bad for _, index, _ in keys) if bad else 0
        return *batch, bad, bad_count, None

    def _gather(self, count: int, samples: Iterable[tuple[torch.Tensor, tuple] | None]
                ) -> tuple[torch.Tensor | None, int | None, list[torch.Tensor]]:
        """Return the images of up to `count` samples as one tensor, its block, and the others; None is left out.

        Each image is written directly into the shared memory of the batch.
        """
        images, block = None, None
        rows: list[tuple] = []
        for image, row in filter(None, samples):
            if images is None:
                images, block = self._memory.take((count, *image.shape), image.dtype)
            images[len(rows)] = image
            rows.append(row)
        others = [torch.stack(column) if isinstance(column[0], torch.Tensor) else torch.tensor(column)
                  for column in zip(*rows, strict=True)]
        if get_worker_info() is not None:  # the queue would put them into /dev/shm
            others = [share(part.shape, part.dtype).copy_(part) for part in others]
        return images if images is None else images[:len(rows)], block, others

    def _training_sample(self, epoch: int, index: int, repeat: int, bad: dict[str, str]) -> tuple[torch.Tensor, tuple]:
        """Return the transformed image and the others of (epoch, index), or of the first good image after it.

        repeat: how often the image has come in the epoch before; each time it is augmented otherwise.
        """
        for step in range(len(self)):
            seed_generators(self._seed, epoch, index, *([repeat] if repeat else []))
            if (sample := self._sample((index + step) % len(self), bad)) is not None:
                return sample
        raise UserError(f'none of {len(self)} images can be decoded; check the dataset')

    def _sample(self, index: int, bad: dict[str, str]) -> tuple[torch.Tensor, tuple] | None:
        """Return the transformed image and the others of `index`; None for a bad image, which is added to `bad`.

        Raises ImageError if the bad images of this batch alone are too many.
        """
        target = int(self._dataset.targets[index])
        try:
            image = self._load(index)
            if self._token_labels is None:
                return self._transform(image), (target,)
            image, placement = self._transform.located(image)
        except ImageError as error:
            bad[self._dataset.path(index)] = str(error)
            if len(bad) > self._max_bad_images:
                raise
            return None
        label_map = self._token_labels.read(index)
        if label_map is None:
            label_map = certain_map(target, self._token_labels.shape)
        return image, (target, label_map.flip(placement.flips), placement.box)


def _unchanged(batch):
    return batch


def _prepare_worker(worker_id: int) -> None:
    gc.freeze()  # collecting inherited objects takes time, and copies shared pages
    keep_freed_memory()
    # A batch that cannot be sent would be lost, with a traceback, and the main process would wait for it forever.
    queue: Any = multiprocessing.queues.Queue
    queue._on_queue_feeder_error = staticmethod(_end_worker)
    sys.excepthook = _end_worker_without_files
    _shield_worker()


def _end_worker(error: Exception, batch: Any) -> None:
    os._exit(1)  # the main process notices, and says what helps


def _end_worker_without_files(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """End this worker if the thread that hands over its memory lacks open files; show any other error."""
    if isinstance(error, OSError):
        os._exit(1)
    sys.__excepthook__(kind, error, trace)


def _shield_worker() -> None:
    """Keep signals to the whole job, from Ctrl-C, torchrun or Slurm, from ending a worker process.

    The main process handles them, and needs its batches until it has saved. SIGTERM from the main process itself, with
    which PyTorch ends a hanging worker, still works. A worker whose main process is gone ends, also in a wait for data.
    """
    for name in ('SIGINT', 'SIGHUP', 'SIGQUIT', 'SIGUSR1', 'SIGUSR2'):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    main_process = multiprocessing.parent_process()
    if main_process and hasattr(signal, 'sigtimedwait'):  # Linux; only this tells the sender of a signal
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_await_termination, args=(main_process.pid,), daemon=True).start()


def _await_termination(main_process: int) -> None:
    while os.getppid() == main_process:
        sent = signal.sigtimedwait({signal.SIGTERM}, PARENT_SECONDS)
        if sent and sent.si_pid == main_process:
            break
    os._exit(0)
