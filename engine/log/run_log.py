"""What a run says, and where: console, progress bar, TensorBoard, metrics.jsonl, summary.csv, curves.png. Rank 0 only.

metrics.jsonl is the record: one JSON object per log line ("kind": "train") and per epoch ("kind": "epoch"). The summary
and the curves are drawn from it, so that a resumed run has one history. environment.json has an entry for each start
of the run: when, at which step, on what.

What cannot be written, because a disk is full or a package is missing, is one warning, and training goes on. Lines that
metrics.jsonl lacks are written with the next one for which there is room.
"""
import contextlib
import csv
import io
import json
import logging
import math
import os
import threading
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
import yaml

from engine.log.metrics import ARGS, CURVES, ENVIRONMENT, METRICS, SUMMARY, read_environment, read_metrics
from utils.disk import make_folder, write_whole
from utils.errors import UserError
from utils.faults import fault_point

if TYPE_CHECKING:
    from engine.log.tensorboard import Board

_logger = logging.getLogger(__name__)

BOARD = 'TensorBoard events'
SECONDS_BETWEEN_DRAWINGS = 30
IMAGES_SHOWN, PIXELS_SHOWN = 16, 112


class RunLog:
    """Writes a run's folder. With `folder` None (ranks other than 0) every call does nothing.

    Raises UserError if the folder cannot be written at the start; from then on what fails is a warning.

    Args:
        folder: the run's folder, made if it is not there.
        options: what was resolved, for args.yaml.
        environment: what the run is computed on, for environment.json.
        global_step, images_seen, epoch: where the run starts; what the folder says of later points, written before a
            crash by a run that is now repeated, is dropped.
    """

    def __init__(self, folder: Path | None, *, options: dict, environment: dict | None = None, global_step: int = 0,
                 images_seen: int = 0, epoch: int = 0, tensorboard: bool = True):
        self.folder = folder
        self._board: Board | None = None
        self._drawn_at = self._shown_at = -math.inf
        self._not_shown: tuple[dict, int] | None = None
        self._failing: set[str] = set()
        if folder is None:
            return
        self._folder = folder
        self._drawn_at = time.monotonic()
        make_folder(folder, '--output')
        with self._warning_only(ARGS):
            write_whole(folder / ARGS, yaml.safe_dump(options, sort_keys=True))
        with self._warning_only(ENVIRONMENT):
            fault_point('log.environment')
            started = {'time': datetime.now(UTC).isoformat(timespec='seconds'), 'global_step': global_step}
            starts = [*read_environment(folder), {**started, **(environment or {})}]
            write_whole(folder / ENVIRONMENT, json.dumps(starts, indent=2) + '\n')
        self._records = [r for r in read_metrics(folder)
                         if (r['epoch'] < epoch if r['kind'] == 'epoch' else r['global_step'] <= global_step)]
        # How much of the records metrics.jsonl holds, and in how many bytes; None where it holds something else.
        self._written = 0
        self._size: int | None = None
        self._write_records()
        if tensorboard:
            self._open_board(options, images_seen, epoch)

    def _open_board(self, options: dict, images_seen: int, epoch: int) -> None:
        with self._warning_only(BOARD):
            fault_point('log.board')
            from engine.log.tensorboard import Board
            # Its threads hand an error on to the next call; on the console there would be a traceback as well.
            threading.excepthook = _quiet_for_tensorboard
            self._board = Board(self._folder, options, images_seen=images_seen, epoch=epoch)

    @property
    def shows_images(self) -> bool:
        return self._board is not None

    def train(self, record: dict) -> None:
        """One line of the training: numbers by name, with 'epoch', 'global_step' and 'images_seen', and 'rates'."""
        if self.folder is None:
            return
        self._write({'kind': 'train', **record})
        with self._warning_only(BOARD):
            if self._board:
                self._board.train(record)

    def epoch(self, record: dict) -> None:
        """The results of an epoch; also rewrites the summary, and the curves where they have not been drawn lately."""
        if self.folder is None:
            return
        self._write({'kind': 'epoch', **record})
        with self._warning_only(BOARD):
            if self._board:
                self._board.epoch(record)
        self._write_summary()
        if time.monotonic() - self._drawn_at > SECONDS_BETWEEN_DRAWINGS:
            self._draw()

    def first_batch(self, images: torch.Tensor, images_seen: int) -> None:
        """For TensorBoard, a sheet of up to 16 images of an epoch's first batch, float [B, C, H, W] in 0…1."""
        if not self._board:
            return
        from torchvision.utils import make_grid
        grid = make_grid(_shrink(images[:IMAGES_SHOWN].detach().float()).cpu(), nrow=4)
        with self._warning_only(BOARD):
            self._board.first_batch(grid, images_seen)

    def save_batch(self, images: torch.Tensor, global_step: int) -> None:
        """A sheet of up to 16 images, float [B, C, H, W] in 0…1, as a PNG in the folder."""
        if self.folder is None:
            return
        from torchvision.utils import make_grid, save_image
        grid = make_grid(images[:IMAGES_SHOWN].detach().float().cpu(), nrow=4)
        with self._warning_only('images'):
            fault_point('log.images')
            save_image(grid, self._folder / f'train_batch-{global_step:08d}.png')

    def wrong_predictions(self, of: dict[str, tuple[torch.Tensor, Sequence[str]]], epoch: int) -> None:
        """For TensorBoard, images that were taken for something else: {whose: ([n, 3, H, W] in 0…1, n captions)}.

        Some epochs take less time than such a sheet. So it is drawn of the first and the last epoch of a process, and
        of those between that end long enough after the sheet before.
        """
        if not self._board or not of:
            return
        self._not_shown = {whose: (_shrink(images).cpu(), captions) for whose, (images, captions) in of.items()}, epoch
        if time.monotonic() - self._shown_at > SECONDS_BETWEEN_DRAWINGS:
            self._show_wrong_predictions()

    def sync(self) -> None:
        """Returns when the records are on the disk, or a warning says that they are not."""
        if self.folder is None:
            return
        with self._warning_only(METRICS), open(self._folder / METRICS, 'rb') as file:
            os.fsync(file.fileno())
        with self._warning_only(BOARD):
            if self._board:
                self._board.flush()

    def finish(self) -> None:
        """The run has come to the end of its schedule."""
        with self._warning_only(BOARD):
            if self._board:
                self._board.finish()

    def close(self) -> None:
        if self.folder is None:
            return
        self._draw()
        self._write_records()
        self._show_wrong_predictions()
        with self._warning_only(BOARD):
            if self._board:
                self._board.close()

    def _write(self, record: dict) -> None:
        self._records.append(record)
        self._write_records()

    def _show_wrong_predictions(self) -> None:
        if not self._board or not self._not_shown:
            return
        sheets, epoch = self._not_shown
        for whose, (images, captions) in sheets.items():
            with self._warning_only('wrong predictions'):
                from utils.pictures import image_sheet, to_array
                # Two columns, so that the text can be read on a card of TensorBoard's, which is narrow.
                figure = image_sheet(list(images.permute(0, 2, 3, 1).numpy()), captions, columns=2).figure
                width, height = figure.get_size_inches()
                figure.set_size_inches(0.8 * width, 0.8 * height)
                sheet = to_array(figure)
                with self._warning_only(BOARD):
                    if self._board:
                        self._board.wrong_predictions(whose, sheet, epoch)
        self._not_shown, self._shown_at = None, time.monotonic()

    def _write_records(self) -> None:
        """Appends to metrics.jsonl what it lacks, over what a failed attempt has left; or writes it anew as a whole."""
        path = self._folder / METRICS
        with self._warning_only(METRICS):
            fault_point('log.metrics')
            size = self._size
            if size is None or not path.exists():
                text = ''.join(json.dumps(r) + '\n' for r in self._records)
                write_whole(path, text)
                size = 0
            else:
                text = ''.join(json.dumps(r) + '\n' for r in self._records[self._written:])
                with open(path, 'r+b') as file:
                    file.seek(size)
                    file.write(text.encode())
                    file.truncate()
            self._size = size + len(text.encode())
            self._written = len(self._records)

    def _write_summary(self) -> None:
        epochs = [{k: v for k, v in r.items() if k != 'kind'} for r in self._records if r['kind'] == 'epoch']
        text = io.StringIO()
        writer = csv.DictWriter(text, list(dict.fromkeys(name for r in epochs for name in r)))
        writer.writeheader()
        writer.writerows(epochs)
        with self._warning_only(SUMMARY):
            fault_point('log.summary')
            write_whole(self._folder / SUMMARY, text.getvalue())

    def _draw(self) -> None:
        with self._warning_only(CURVES):
            fault_point('log.curves')
            from engine.log.curves import draw_curves
            draw_curves(self._records, self._folder / CURVES)
        self._drawn_at = time.monotonic()

    @contextlib.contextmanager
    def _warning_only(self, what: str) -> Iterator[None]:
        """Around what writes `what`: a warning where it begins to fail, a line where it succeeds again.

        TensorBoard is given up at its first failure, since its writer cannot go on.
        """
        try:
            yield
        except UserError:  # comes from elsewhere, such as the end of a loader's worker
            raise
        except Exception as e:  # what libraries make of a full disk is not always an OSError
            said = ' '.join(str(e).split())[:200]
            reason = e.strerror if isinstance(e, OSError) and e.strerror else f'{type(e).__name__}: {said}'
            if what == BOARD:
                self._board = None
                _logger.warning('%s cannot be written to %s (%s); training goes on without them', what, self.folder,
                                reason)
            elif what not in self._failing:
                self._failing.add(what)
                _logger.warning('%s cannot be written (%s); training goes on', self._folder / what, reason)
        else:
            if what in self._failing:
                self._failing.discard(what)
                _logger.info('%s is written again', self._folder / what)


def _quiet_for_tensorboard(args) -> None:
    if not type(args.thread).__module__.startswith('tensorboard.'):
        threading.__excepthook__(args)


def _shrink(images: torch.Tensor) -> torch.Tensor:
    """[n, C, H, W] with no side of more than PIXELS_SHOWN."""
    scale = PIXELS_SHOWN / max(images.shape[-2:])
    return images if scale >= 1 else F.interpolate(images, scale_factor=scale, mode='area')
