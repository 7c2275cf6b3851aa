"""Runs of train.py that a benchmark compares. Each is made once, and continued where it was ended.

    with images_of(data, args.images) as (folder, images):
        runs = [Run(args.runs, 'ViT, seed 1', 'claims-vit-1', options, images)]
        results = train_all(runs, folder, workers=args.workers)
"""
import contextlib
import hashlib
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from benchmarks.shared.command import training_options
from data.folders import ImageFolder
from engine.checkpoint import LAST
from engine.log.metrics import read_metrics
from utils.checkpoint_reader import read_checkpoint
from utils.console import progress_bar
from utils.disk import ROOT
from utils.errors import UserError

LOOK_SECONDS = 1.0


class Run:
    """A run of train.py.

    Args:
        output: folder of the runs, as --output of train.py.
        label: what it is called for people.
        name: start of its folder's name. Other options or other images have another folder.
        options: what is computed, as options of train.py.
        images: which they are (ImageDataset.fingerprint).
    Attributes:
        epochs: its length.
        folder: the folder of the run.
    """

    def __init__(self, output: str, label: str, name: str, options: Sequence[str], images: str):
        self.label, self._output, self._options = label, output, list(options)
        parsed = training_options(*self._options)
        self.epochs = parsed.epochs + parsed.cooldown_epochs
        digest = hashlib.sha256(shlex.join([images, *self._options]).encode()).hexdigest()[:8]
        self._experiment = f'{name}-{digest}'
        self.folder = Path(output).expanduser() / 'train' / self._experiment

    def is_done(self) -> bool:
        return (self.folder / LAST).exists() and len(self._epoch_records()) == self.epochs

    def progress(self) -> float:
        """Return how many epochs its log shows, with the part of one."""
        return max((record['epoch_progress'] for record in read_metrics(self.folder) if record['kind'] == 'train'),
                   default=0)

    def _epoch_records(self) -> list[dict]:
        return [record for record in read_metrics(self.folder) if record['kind'] == 'epoch']

    def train(self, data: Path, workers: int, bar: tqdm) -> None:
        """Train to the end, from the start or from where it was ended, and move the bar.

        Raises:
            UserError: train.py failed; with the last line of its output.
        """
        command = [sys.executable, ROOT / 'train.py', data, *self._options, '-j', workers, '--output', self._output,
                   '--experiment', self._experiment, '--resume', 'auto']
        before = bar.n - self.progress()
        run_to_the_end(command, lambda: bar.update(before + self.progress() - bar.n))
        bar.update(before + self.epochs - bar.n)

    def result(self) -> dict:
        """Return the figures after the last epoch, with those of the data and the model."""
        epochs, state = self._epoch_records(), read_checkpoint(self.folder / LAST)
        return {'top1': epochs[-1]['top1'], 'loss': epochs[-1]['loss'],
                'parameters': sum(tensor.numel() for tensor in state['state_dict'].values()),
                'images': state['images'], 'seconds': sum(epoch['epoch_seconds'] for epoch in epochs)}


def run_to_the_end(command: Sequence[object], look=lambda: None) -> None:
    """Run a command, and call `look` every second.

    Raises:
        UserError: it failed; with the last line of its output.
    """
    process = subprocess.Popen([str(word) for word in command], text=True, stdin=subprocess.DEVNULL,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        while True:
            try:
                said = ''.join(process.communicate(timeout=LOOK_SECONDS))
                break
            except subprocess.TimeoutExpired:
                look()
    finally:
        if process.poll() is None:
            process.terminate()  # it saves its state
            process.communicate()
    if process.returncode:
        raise UserError((said.strip().splitlines() or [f'exit code {process.returncode}'])[-1])


def train_all(runs: Sequence[Run], data: Path, *, workers: int) -> list[dict]:
    """Train every run, or find that it is done; return the results."""
    results = []
    with progress_bar(total=sum(run.epochs for run in runs), initial=sum(run.progress() for run in runs),
                      bar_format='{l_bar}{bar}| {n:.2f}/{total} epochs [{elapsed}<{remaining}]') as bar:
        for number, run in enumerate(runs, start=1):
            bar.set_description(run.label)
            if not run.is_done():
                run.train(data, workers, bar)
            results.append(result := run.result())
            tqdm.write(f'{number:3d} of {len(runs)}: {run.label}: top-1 {result["top1"]:.2f} %')
            sys.stdout.flush()
    return results


@contextlib.contextmanager
def images_of(data: str, count: int) -> Iterator[tuple[Path, str]]:
    """Yield a data set with the first `count` training images of `data`, or all for 0, and which images these are."""
    folder = Path(data).expanduser()
    with tempfile.TemporaryDirectory(prefix='runs-') as links:
        if count:
            folder = _link_images(folder, count, Path(links))
        yield folder, ImageFolder(str(folder / 'train')).fingerprint()


def _link_images(data: Path, images: int, folder: Path) -> Path:
    """Return a data set of links in `folder`: the first training images of each class, and everything else of `data`.

    Raises:
        UserError: a class has fewer images.
    """
    train_set = ImageFolder(str(data / 'train'))
    each = images // len(train_set.classes)
    for target, name in enumerate(train_set.classes):
        found = np.flatnonzero(train_set.targets == target)[:each]
        if len(found) < each or not each:
            raise UserError(f'--images {images}: that is {each} of each class, and {name} has {len(found)}; give 0 for '
                            'all images')
        for index in found:
            image = Path(train_set.path(int(index))).resolve()
            link = folder / 'train' / name / f'{index}{image.suffix}'
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(image)
    for entry in data.iterdir():
        if entry.name != 'train':
            (folder / entry.name).symlink_to(entry.resolve())
    return folder
