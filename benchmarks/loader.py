"""Measure the input pipeline: timm's `create_loader` and ours, side by side, in training and in evaluation.

    python -m benchmarks.loader /data/imagenet/val                     # 1, 2 and as many workers as there are cores
    python -m benchmarks.loader imagenet_sample.tar --workers 2 --rounds 20

DIR is a folder of class folders, a data set that has such a folder of --split, or a tar of either. --images of it are
copied to a temporary folder and packed by tools/pack.py: unchanged, and resized once.

Training is the recipe of ImageNet. Both loaders deliver float32 batches with soft targets. timm mixes in its workers
and normalises and erases on the device; ours does all three there. The device is the CPU of the main process.
`decode alone` takes one pixel of each image and is a bound for every pipeline.

Contenders take turns in random order, each with a process of its own. A turn is a whole epoch of --batches per worker.
Time on cores comes from the kernel and includes workers and the main process. Memory is the peak of the proportional
set size of all processes.
"""
import contextlib
import functools
import itertools
import multiprocessing
import os
import random
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.data import FastCollateMixup, ImageDataset as TimmImageDataset, create_loader as create_timm_loader

from benchmarks.shared.command import common_options, parse_command
from benchmarks.shared.records import markdown_table, new_record, save
from data.augment import allow_zero_bits
from data.base import ImageDataset, Part, evenly_spaced
from data.batch import BatchPreparer, TrainBatchPreparer
from data.datasets import open_eval
from data.decode import EXTENSIONS, EncodedImage
from data.loader import create_loader
from data.samplers import EvalSampler, TrainSampler
from data.transforms import create_eval_transform, create_train_transform
from options.types import positive_int
from utils.console import progress_bar
from utils.disk import ROOT
from utils.errors import UserError
from utils.runtime import keep_freed_memory
from utils.script import run_script

NUM_CLASSES = 1000
CPU = torch.device('cpu')
RESIZED = 'shards, resized once'
FOLDERS, SHARDS, DECODE = 'folders', 'shards', 'decode alone'


def loader_options(parser) -> None:
    add = parser.add_argument_group('What is measured').add_argument
    add('data', metavar='DIR', help='folder of class folders, or of splits of them, or a tar of either')
    add('--split', default='train', metavar='NAME', help='folder in DIR, if it has one of this name')
    add('--images', type=positive_int, default=1000, metavar='N', help='images from DIR; fewer are repeated')
    add('--workers', nargs='+', type=positive_int, metavar='N',
        help='worker processes, a table for each (default: 1, 2 and as many as there are cores)')
    add('--img-size', type=positive_int, default=224, metavar='N', help='input size in pixels')
    add('--short-side', type=positive_int, default=256, metavar='N', help='short side of images resized once')
    add = parser.add_argument_group('How').add_argument
    add('--rounds', type=positive_int, default=9, metavar='N', help='turns of each contender')
    add('--batches', type=positive_int, default=4, metavar='N', help='batches of each worker in a turn')
    common_options(add, batch_size=64, seed=42)


# --- Images -----------------------------------------------------------------------------------------------------------

def copy_images(source: Path, split: str, count: int, folder: Path) -> None:
    """Copy up to `count` evenly spaced images of `source`, a folder or a tar, to folder/CLASS/NAME."""
    with contextlib.ExitStack() as stack:
        if source.is_dir():
            below = source / split if (source / split).is_dir() else source
            files: dict[Path, Callable[[], bytes]] = {
                path.relative_to(below): path.read_bytes for path in below.glob('*/*')}
        else:
            try:
                tar = stack.enter_context(tarfile.open(source))
            except (OSError, tarfile.TarError) as error:
                raise UserError(f'{source}: neither a folder nor a tar of images ({error})') from None
            # Only the last two parts of a name determine where a file goes.
            files = {Path(*Path(member.name).parts[-2:]): functools.partial(_read_member, tar, member)
                     for member in tar if member.isreg()}
        names = sorted(name for name in files if name.suffix.lower() in EXTENSIONS and '..' not in name.parts)
        if not names:
            raise UserError(f'{source}: no images in class folders, or in those of {split}')
        for number in range(min(count, len(names))):
            name = names[number * len(names) // min(count, len(names))]
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(files[name]())


def _read_member(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    content = tar.extractfile(member)
    assert content is not None, 'a regular file has content'
    return content.read()


def pack(folder: Path, out: Path, *more: str) -> None:
    """Pack `folder` into shards in `out`; raise UserError if tools/pack.py fails."""
    done = subprocess.run([sys.executable, ROOT / 'tools/pack.py', folder, out, *more], capture_output=True, text=True)
    if done.returncode:
        raise UserError(done.stderr.strip().splitlines()[-1])


def repeat(dataset: ImageDataset, count: int) -> ImageDataset:
    """Return `count` evenly spaced images of `dataset`, or all of them repeated."""
    if count <= len(dataset):
        return evenly_spaced(dataset, count)
    return Part(dataset, np.arange(count) % len(dataset))


def stored_bytes(dataset: ImageDataset) -> int:
    stored = (dataset.read_bytes_or_image(index) for index in range(len(dataset)))
    return sum(len(content) for content in stored if isinstance(content, bytes))


# --- Contenders -------------------------------------------------------------------------------------------------------

class Timm:
    """timm's loader of the images in `folder`; `epoch` iterates over batches for a model."""

    def __init__(self, folder: Path, *, training: bool, count: int, workers: int, args):
        dataset = TimmImageDataset(str(folder))
        samples = dataset.reader.samples
        dataset.reader.samples = [samples[index % len(samples) if count > len(samples) else
                                          index * len(samples) // count] for index in range(count)]
        recipe: dict[str, Any] = dict(is_training=False, interpolation='bicubic', crop_pct=0.9)
        if training:
            mixing = FastCollateMixup(0.8, 1.0, label_smoothing=0.1, num_classes=NUM_CLASSES)
            recipe = dict(is_training=True, scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3), hflip=0.5, color_jitter=0.4,
                          auto_augment='rand-m9-mstd0.5-inc1', interpolation='random', re_prob=0.25, re_mode='pixel',
                          collate_fn=mixing)
        self._loader = create_timm_loader(dataset, (3, args.img_size, args.img_size), batch_size=args.batch_size,
                                          num_workers=workers, device=CPU, persistent_workers=True, **recipe)
        if training:
            allow_zero_bits(dataset.transform)

    def epoch(self) -> Iterator:
        return iter(self._loader)

    def close(self) -> None:
        self._loader = None


class Ours:
    """Our loader of `dataset` with the preparer of its batches; `epoch` works as Timm's."""

    def __init__(self, dataset: ImageDataset, *, training: bool, count: int, workers: int, args, transform=None):
        keep_freed_memory()  # as all our scripts do
        dataset = repeat(dataset, count)
        sampler: TrainSampler | EvalSampler
        self._prepare: BatchPreparer
        if training:
            transform = transform or create_train_transform(args.img_size)
            sampler = TrainSampler(count, args.batch_size, seed=args.seed, shard_offsets=dataset.shard_offsets())
            self._prepare = TrainBatchPreparer(CPU, batch_size=args.batch_size, num_classes=NUM_CLASSES,
                                               mixup_alpha=0.8, cutmix_alpha=1.0, erase_prob=0.25)
        else:
            transform = transform or create_eval_transform(args.img_size)
            sampler, self._prepare = EvalSampler(count, args.batch_size), BatchPreparer(CPU)
        self._loader = create_loader(dataset, transform, sampler, seed=args.seed, workers=workers)
        self._epochs = itertools.count() if training else None

    def epoch(self) -> Iterator:
        if self._epochs:
            self._loader.set_position(next(self._epochs))
        return (self._prepare(*batch) for batch in self._loader)

    def close(self) -> None:
        self._loader.close()


class OnePixel:
    """A transform from an image to one of its pixels, uint8 [3, 1, 1]."""
    takes_encoded = True

    def __call__(self, image: EncodedImage) -> torch.Tensor:
        return image.pixels()[:, :1, :1]


@dataclass
class Contender:
    """One row of a table, measured in its own process; `start` makes its loader.

    Attributes:
        turns: seconds, seconds on cores of the workers, and of the main process, for each turn.
    """
    label: str
    start: Callable[[], Timm | Ours]
    process: BaseProcess = field(init=False)
    connection: Connection = field(init=False)
    turns: list[tuple[float, float, float]] = field(default_factory=list)
    peak_bytes: int | None = None

    def open(self) -> None:
        self.connection, theirs = multiprocessing.Pipe()
        # It is forked, since closures cannot be sent; this process runs nothing else.
        self.process = multiprocessing.get_context('fork').Process(target=serve, args=(self.start, theirs))
        self.process.start()
        theirs.close()

    def ask(self, task: Callable):
        """Run `task`, a function of this module, in the contender's process and return its result."""
        try:
            self.connection.send(task.__name__)
            return self.connection.recv()
        except (EOFError, OSError):
            raise UserError(f'{self.label}: its process has ended; see its output above') from None

    def close(self) -> None:
        with contextlib.suppress(BrokenPipeError):  # it has failed
            self.connection.send(None)
        self.process.join()

    def row(self, images: int) -> dict:
        clock, workers, main = np.array(self.turns).T
        return {'contender': self.label, 'images_per_second': images / float(np.median(clock)),
                'images_per_second_and_core': images / float(np.median(workers + main)),
                'milliseconds_of_workers': 1000 * float(np.median(workers)) / images,
                'milliseconds_of_main': 1000 * float(np.median(main)) / images, 'peak_bytes': self.peak_bytes,
                'turns_seconds': clock.tolist(), 'turns_seconds_on_cores': (workers + main).tolist()}


def list_contenders(task: str, datasets: dict[str, ImageDataset], folder: Path, **settings) -> list[Contender]:
    """Return the rows of the table of `task`, 'training' or 'evaluation'."""
    training = task == 'training'

    def ours(source: str, **more) -> Callable:
        return lambda: Ours(datasets[source], **{'training': training, **settings, **more})

    rows = [Contender('timm, folders', lambda: Timm(folder, training=training, **settings))]
    rows += [Contender(f'ours, {source}', ours(source)) for source in datasets if training or source != RESIZED]
    if training:
        rows.append(Contender(DECODE, ours(FOLDERS, training=False, transform=OnePixel())))
    else:
        fast = create_eval_transform(settings['args'].img_size, fast=True)
        rows.append(Contender('ours, folders, --fast-eval', ours(FOLDERS, transform=fast)))
    return rows


# --- Measuring --------------------------------------------------------------------------------------------------------

def seconds_on_cores(processes: Iterable[int]) -> float:
    """Return the seconds that all threads of `processes` have run, from the kernel."""
    total = 0.0
    for process in processes:
        for task in Path(f'/proc/{process}/task').iterdir():
            with contextlib.suppress(OSError):  # a thread that has just ended
                total += int((task / 'schedstat').read_text().split()[0]) / 1e9
    return total


def proportional_bytes(processes: Iterable[int]) -> int:
    """Return the proportional set size of `processes` together."""
    total = 0
    for process in processes:
        for line in Path(f'/proc/{process}/smaps_rollup').read_text().splitlines():
            if line.startswith('Pss:'):
                total += int(line.split()[1]) * 1024
    return total


def take_turn(running: Timm | Ours, workers: list[int]) -> tuple[float, float, float]:
    main = [os.getpid()]
    before = seconds_on_cores(workers), seconds_on_cores(main)
    started = time.perf_counter()
    for _ in running.epoch():
        pass
    seconds = time.perf_counter() - started
    return seconds, seconds_on_cores(workers) - before[0], seconds_on_cores(main) - before[1]


def peak_memory(running: Timm | Ours, workers: list[int]) -> int:
    return max(proportional_bytes([os.getpid(), *workers]) for _ in running.epoch())


def serve(start: Callable[[], Timm | Ours], connection: Connection) -> None:
    """Run the requested tasks in a contender's process."""
    running = start()
    for _ in running.epoch():  # the first epoch starts the workers
        pass
    workers = [child.pid for child in multiprocessing.active_children() if child.pid]
    while task := connection.recv():
        connection.send({'take_turn': take_turn, 'peak_memory': peak_memory}[task](running, workers))
    running.close()


def measure(contenders: list[Contender], args, title: str) -> None:
    order = random.Random(args.seed)
    with contextlib.ExitStack() as stack:
        bar = stack.enter_context(progress_bar(total=len(contenders) * (1 + args.rounds), desc=title))
        for contender in contenders:
            contender.open()
            stack.callback(contender.close)
            contender.peak_bytes = contender.ask(peak_memory)
            bar.update()
        for _ in range(args.rounds):
            for contender in order.sample(contenders, len(contenders)):
                contender.turns.append(contender.ask(take_turn))
                bar.update()


# --- Tables -----------------------------------------------------------------------------------------------------------

def as_table(table: dict) -> str:
    """Return a table of the record in Markdown, with its heading."""
    rows = table['rows']
    lines = [[row['contender'], f'{row["images_per_second"]:.0f}', f'{row["images_per_second_and_core"]:.0f}',
              f'{row["milliseconds_of_workers"]:.2f}', f'{row["milliseconds_of_main"]:.2f}',
              '–' if row['contender'] == DECODE else f'{row["ratio"]:.2f}',
              f'{row["peak_bytes"] / 2**20:.0f}'] for row in rows]
    header = ['', 'img/s', 'img/s and core', 'ms of workers', 'ms of main', '× timm', 'MiB']
    return (f'## {table["task"].capitalize()}, {table["workers"]} worker{"s" * (table["workers"] > 1)}\n\n'
            + markdown_table(header, lines) + '\n')


def as_text(record: dict) -> str:
    parts = ['# The input pipeline\n', f'`{record["command"]}`\n',
             f'{record["machine"]["processor"]}, {record["cores"]} cores; {record["images"]} images of '
             f'{record["mean_size"]} pixels on average, {record["image_bytes"] / record["images"] / 1000:.0f} kB '
             f'({record["resized_bytes"] / record["images"] / 1000:.0f} kB resized once). Milliseconds are those of a '
             'core, for an image; "× timm" compares images per second and core.\n',
             *(as_table(table) for table in record['tables']), conclusion(record)]
    return '\n'.join(parts) + '\n'


def conclusion(record: dict) -> str:
    """Return the last line, for the most workers that do not exceed the cores."""
    tables = [table for table in record['tables'] if table['task'] == 'training']
    fitting = [table for table in tables if table['workers'] <= record['cores']] or tables[:1]
    ratios = {row['contender']: row['ratio'] for row in max(fitting, key=lambda table: table['workers'])['rows']}
    return (f'training, ours / timm: folders {ratios[f"ours, {FOLDERS}"]:.2f}, '
            f'shards {ratios[f"ours, {RESIZED}"]:.2f}')


def main() -> None:
    args = parse_command('Measure the input pipeline: timm and ours, in training and in evaluation.', 'loader',
                         loader_options)
    source, cores = Path(args.data).expanduser(), len(os.sched_getaffinity(0))
    if not source.exists():
        raise UserError(f'{source}: no such folder or tar; give images in class folders')
    torch.set_num_threads(1)  # of the main process; workers have one
    with tempfile.TemporaryDirectory() as temporary:
        scratch = Path(temporary)
        copy_images(source, args.split, args.images, scratch / FOLDERS)
        pack(scratch / FOLDERS, scratch / SHARDS)
        pack(scratch / FOLDERS, scratch / RESIZED, '--short-side', str(args.short_side))
        datasets = {name: open_eval('folder', ('wds:' if name != FOLDERS else '') + str(scratch / name))
                    for name in (FOLDERS, SHARDS, RESIZED)}
        sizes = np.array([datasets[FOLDERS].image(index).size for index in range(len(datasets[FOLDERS]))])
        record = {**new_record('loader', args, CPU, args.data), 'cores': cores, 'images': len(datasets[FOLDERS]),
                  'mean_size': '{:.0f} × {:.0f}'.format(*sizes.mean(0)), 'tables': [],
                  **{f'{key}_bytes': stored_bytes(datasets[name])
                     for key, name in (('image', FOLDERS), ('resized', RESIZED))}}
        for workers, task in itertools.product(args.workers or sorted({1, 2, cores}), ('training', 'evaluation')):
            count = args.batch_size * args.batches * workers
            contenders = list_contenders(task, datasets, scratch / FOLDERS, count=count, workers=workers, args=args)
            measure(contenders, args, f'{task}, {workers} workers')
            rows = [contender.row(count) for contender in contenders]
            for row in rows:
                row['ratio'] = row['images_per_second_and_core'] / rows[0]['images_per_second_and_core']
            record['tables'].append({'task': task, 'workers': workers, 'images_per_turn': count, 'rows': rows})
            print(as_table(record['tables'][-1]), flush=True)
        paths = save(args, record, as_text(record))
    print(*paths, conclusion(record), sep='\n')


if __name__ == '__main__':
    run_script(main)
