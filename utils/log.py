"""What a run says, and where: console, progress bar, TensorBoard, metrics.jsonl, summary.csv, curves.png. Rank 0 only.

metrics.jsonl is the record: one JSON object per log line ("kind": "train") and per epoch ("kind": "epoch"). The summary
and the curves are drawn from it, so that a resumed run has one history.
"""
import csv
import json
import logging
import os
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch
import yaml
from tqdm import tqdm

from utils.errors import UserError

METRICS, SUMMARY, CURVES, ARGS = 'metrics.jsonl', 'summary.csv', 'curves.png', 'args.yaml'
SECONDS_BETWEEN_DRAWINGS = 30


class _ConsoleHandler(logging.Handler):
    """Lines to standard output, above the progress bar where there is one."""

    def emit(self, record):
        tqdm.write(self.format(record), file=sys.stdout)
        sys.stdout.flush()


def setup_logging(*, is_main: bool) -> None:
    """Rank 0 speaks; the others speak up only when something is wrong."""
    handler = _ConsoleHandler()
    handler.setFormatter(_Formatter('%(message)s'))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    for room in ('models', 'data', 'engine', 'utils', '__main__'):
        logging.getLogger(room).setLevel(logging.INFO if is_main else logging.WARNING)
    logging.captureWarnings(True)
    # The published default of 8 workers is more than a small machine has cores; the user can say otherwise.
    warnings.filterwarnings('ignore', message='This DataLoader will create')


class _Formatter(logging.Formatter):
    def format(self, record):
        text = super().format(record)
        return text if record.levelno < logging.WARNING else f'{record.levelname.lower()}: {text}'


def progress_bar(**kwargs) -> tqdm:
    """A bar with the time left, on rank 0 and only where a person can see it."""
    hidden = int(os.environ.get('RANK', 0)) > 0 or not sys.stderr.isatty()
    return tqdm(disable=hidden, leave=False, dynamic_ncols=True, **kwargs)


def format_seconds(seconds: float) -> str:
    """5025 → '1:23:45'."""
    minutes, seconds = divmod(round(seconds), 60)
    return f'{minutes // 60}:{minutes % 60:02d}:{seconds:02d}'


def make_folder(folder: Path, option: str) -> None:
    """Makes a folder that the user named by `option`, or raises UserError if nothing can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as e:
        raise UserError(f'{option}: {folder} cannot be written ({e.strerror}); name another folder') from None


class RunLog:
    """Writes a run's folder. With `folder` None (ranks other than 0) every call does nothing.

    Args:
        folder: the run's folder, made if it is not there.
        options: what was resolved, for args.yaml.
        global_step, epoch: where the run starts; what the folder says of later points, written before a crash by a run
            that is now repeated, is dropped.
    """

    def __init__(self, folder: Path | None, *, options: dict, global_step: int = 0, epoch: int = 0,
                 tensorboard: bool = True):
        self.folder = folder
        self._board = None
        self._drawn_at = time.monotonic()
        if folder is None:
            return
        make_folder(folder, '--output')
        (folder / ARGS).write_text(yaml.safe_dump(options, sort_keys=True))
        self._records = [r for r in read_metrics(folder)
                         if (r['epoch'] < epoch if r['kind'] == 'epoch' else r['global_step'] <= global_step)]
        (folder / METRICS).write_text(''.join(json.dumps(r) + '\n' for r in self._records))
        self._metrics = open(folder / METRICS, 'a', encoding='utf-8')
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter
            self._board = SummaryWriter(folder, purge_step=global_step + 1 if global_step else None)
            self._board.add_text('options', '```yaml\n' + yaml.safe_dump(options) + '```', global_step)

    def train(self, record: dict) -> None:
        """One line of the training: numbers by name, with 'epoch' and 'global_step'."""
        self._write({'kind': 'train', **record}, record['global_step'], 'train')

    def epoch(self, record: dict, global_step: int) -> None:
        """The results of an epoch; also rewrites the summary, and the curves where they have not been drawn lately."""
        self._write({'kind': 'epoch', **record}, global_step, 'epoch')
        if self.folder is None:
            return
        self._write_summary()
        if time.monotonic() - self._drawn_at > SECONDS_BETWEEN_DRAWINGS:
            self._draw()

    def images(self, name: str, images: torch.Tensor, global_step: int, *, as_file: bool = False) -> None:
        """A grid of up to 16 images, float [B, C, H, W] in 0…1, for TensorBoard and, if asked, a PNG in the folder."""
        if self.folder is None:
            return
        from torchvision.utils import make_grid, save_image
        grid = make_grid(images[:16].detach().float().cpu(), nrow=4)
        if self._board:
            self._board.add_image(name, grid, global_step)
        if as_file:
            save_image(grid, self.folder / f'{name}-{global_step:08d}.png')

    def close(self) -> None:
        if self.folder is None:
            return
        self._draw()
        self._metrics.close()
        if self._board:
            self._board.close()

    def _write(self, record: dict, global_step: int, prefix: str) -> None:
        if self.folder is None:
            return
        self._records.append(record)
        self._metrics.write(json.dumps(record) + '\n')
        self._metrics.flush()
        if self._board:
            for name, value in record.items():
                if isinstance(value, (int, float)) and name not in ('global_step', 'epoch'):
                    self._board.add_scalar(f'{prefix}/{name}', value, global_step)

    def _write_summary(self) -> None:
        epochs = [{k: v for k, v in r.items() if k != 'kind'} for r in self._records if r['kind'] == 'epoch']
        columns = list(dict.fromkeys(name for r in epochs for name in r))
        with open(self.folder / SUMMARY, 'w', newline='', encoding='utf-8') as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(epochs)

    def _draw(self) -> None:
        from utils.curves import draw_curves
        draw_curves(self._records, self.folder / CURVES)
        self._drawn_at = time.monotonic()


def read_metrics(folder: Path) -> list[dict]:
    """The records of a run's metrics.jsonl; a last line that a crash cut short is left out."""
    path = folder / METRICS
    records = []
    if path.exists():
        for line in path.read_text(encoding='utf-8').splitlines():
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:
                break
    return records
