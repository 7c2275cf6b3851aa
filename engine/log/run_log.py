"""Everything that a run writes beside its checkpoints: `RunLog` passes each record and image on to all sinks.

A sink that fails, because a disk is full or a package is missing, costs one warning, and training goes on.
"""
import json
import logging
import math
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

import torch
import torch.nn.functional as F
import yaml

from engine.log.batches import SavedBatches
from engine.log.console import Console
from engine.log.curves import SECONDS_BETWEEN_DRAWINGS, Curves
from engine.log.metrics import ARGS, ENVIRONMENT, Metrics, read_environment, read_metrics
from engine.log.result import ResultFile
from engine.log.sink import EPOCH, FIRST_BATCH, SAVED_BATCH, TRAIN, WRONG_PREDICTIONS, Run, Sink
from engine.log.summary import Summary
from engine.log.tensorboard import TensorBoard
from utils.disk import make_folder, write_whole
from utils.errors import UserError
from utils.faults import fault_point

_logger = logging.getLogger(__name__)

# Every sink there is, in the order in which they are called.
SINKS: tuple[type[Sink], ...] = (Console, Metrics, TensorBoard, Summary, Curves, SavedBatches, ResultFile)
# Of a sheet of images: how many it shows, and how long their longer side is in a tracker.
IMAGES_SHOWN, PIXELS_SHOWN = 16, 112


class RunLog:
    """Writes a run's folder, on rank 0. On other ranks `folder` is None, and every call does nothing.

    Args:
        folder: the run's folder; created if missing.
        options: the resolved options, for args.yaml; they also turn sinks on and off.
        environment: what the run is computed on, for this start's entry in environment.json.
        global_step, images_seen, epoch: where the run starts. Records of later points are dropped: they are of a run
            that crashed, and will be repeated.
    Raises:
        UserError: the folder cannot be written at the start. Any later failure is a warning.
    """

    def __init__(self, folder: Path | None, *, options: dict, environment: dict | None = None, global_step: int = 0,
                 images_seen: int = 0, epoch: int = 0):
        self._sinks: list[Sink] = []
        self._failing: set[str] = set()
        self._finished = False
        # Wrong predictions that are not drawn yet, with their images seen.
        self._pending: tuple[dict, int] | None = None
        self._drawn_at = -math.inf
        if folder is None:
            return
        self._folder = folder
        make_folder(folder, '--output')
        self._attempt(ARGS, write_whole, folder / ARGS, yaml.safe_dump(options, sort_keys=True))
        self._attempt(ENVIRONMENT, self._note_start, {'global_step': global_step, **(environment or {})})
        self._records = [r for r in read_metrics(folder)
                         if (r['epoch'] < epoch if r['kind'] == EPOCH else r['global_step'] <= global_step)]
        run = Run(folder, options, images_seen, epoch, self._records)
        for sink in SINKS:
            if not sink.option or options.get(sink.option, True):
                self._attempt(sink.name, self._open, sink, run, is_fragile=sink.is_fragile)
        self.sync()

    def _open(self, sink: type[Sink], run: Run) -> None:
        self._sinks.append(sink(run))

    def wants(self, kind: str) -> bool:
        """Tell whether any sink takes records or images of this kind."""
        return any(kind in sink.kinds for sink in self._sinks)

    def train(self, record: dict, **now) -> None:
        """Record a log line: numbers by name, with 'epoch', 'global_step', 'images_seen' and 'rates'.

        Args:
            now: further values for sinks to show that the run's record does not keep.
        """
        self._record({'kind': TRAIN, **record}, now)

    def epoch(self, record: dict) -> None:
        """Record the results of an epoch."""
        self._record({'kind': EPOCH, **record}, {})

    def result(self, record: dict) -> None:
        """Record what the run has reached: numbers of the best epoch, and of which images they are."""
        self._call('result', None, record)

    def first_batch(self, images: torch.Tensor, images_seen: int) -> None:
        """Show up to 16 images of an epoch's first batch, float [B, C, H, W] in 0…1."""
        if self.wants(FIRST_BATCH):
            self._call('image', FIRST_BATCH, FIRST_BATCH, _grid(_shrink(images[:IMAGES_SHOWN].float())), images_seen)

    def save_batch(self, images: torch.Tensor, global_step: int) -> None:
        """Save up to 16 images, float [B, C, H, W] in 0…1, as a file."""
        if self.wants(SAVED_BATCH):
            self._call('image', SAVED_BATCH, SAVED_BATCH, _grid(images[:IMAGES_SHOWN].float()), global_step)

    def wrong_predictions(self, of: dict[str, tuple[torch.Tensor, Sequence[str]]], images_seen: int) -> None:
        """Show wrong predictions of each model: {its name: (images [n, 3, H, W] in 0…1, n captions)}.

        Drawing them takes longer than some epochs. A process draws its first and last epoch, and between them those
        that end long enough after the previous drawing.
        """
        if not self.wants(WRONG_PREDICTIONS) or not of:
            return
        sheets = {model: (_shrink(images).cpu(), captions) for model, (images, captions) in of.items()}
        self._pending = sheets, images_seen
        if time.monotonic() - self._drawn_at > SECONDS_BETWEEN_DRAWINGS:
            self._show_pending()

    def sync(self) -> None:
        """Return when the records are on the disk, or a warning says that they are not."""
        self._call('flush', None)

    def finish(self) -> None:
        """Note that the run has reached the end of its schedule."""
        self._finished = True

    def close(self) -> None:
        self._show_pending()
        self._call('close', None, self._finished)

    def _record(self, record: dict, now: dict) -> None:
        if self._sinks:
            self._records.append(record)
            self._call('record', record['kind'], {**record, **now})

    def _show_pending(self) -> None:
        if not self._pending or not self.wants(WRONG_PREDICTIONS):
            return
        (sheets, images_seen), self._pending = self._pending, None
        for model, (images, captions) in sheets.items():
            self._attempt(WRONG_PREDICTIONS, self._draw, f'{WRONG_PREDICTIONS} of the {model}', images, captions,
                          images_seen)
        self._drawn_at = time.monotonic()

    def _draw(self, name: str, images: torch.Tensor, captions: Sequence[str], images_seen: int) -> None:
        from utils.pictures import image_sheet, to_array
        # Two columns, so that the text can be read on TensorBoard's narrow cards.
        figure = image_sheet(list(images.permute(0, 2, 3, 1).numpy()), captions, columns=2).figure
        width, height = figure.get_size_inches()
        figure.set_size_inches(0.8 * width, 0.8 * height)
        self._call('image', WRONG_PREDICTIONS, name, to_array(figure).transpose(2, 0, 1), images_seen)

    def _note_start(self, entry: dict) -> None:
        fault_point('log.environment')
        starts = [*read_environment(self._folder), {'time': datetime.now(UTC).isoformat(timespec='seconds'), **entry}]
        write_whole(self._folder / ENVIRONMENT, json.dumps(starts, indent=2) + '\n')

    def _call(self, method: str, kind: str | None, *args) -> None:
        """Call a method of every sink that has it and takes this kind; drop a fragile sink that fails."""
        for sink in list(self._sinks):
            action = getattr(sink, method, None)
            if action and (kind is None or kind in sink.kinds):
                succeeded = self._attempt(sink.name, action, *args, is_fragile=sink.is_fragile)
                if sink.is_fragile and not succeeded:
                    self._sinks.remove(sink)

    def _attempt(self, name: str, action: Callable, *args, is_fragile: bool = False) -> bool:
        """Return whether `action` succeeds. A warning says when it begins to fail, a line when it works again."""
        try:
            action(*args)
        except UserError:  # comes from elsewhere, such as the end of a loader's worker
            raise
        except Exception as error:  # libraries raise more than OSError on a full disk
            text = ' '.join(str(error).split())[:200]
            reason = getattr(error, 'strerror', None) or f'{type(error).__name__}: {text}'
            if is_fragile:
                _logger.warning('%s cannot be written to %s (%s); training goes on without them', name, self._folder,
                                reason)
            elif name not in self._failing:
                _logger.warning('%s cannot be written (%s); training goes on', self._folder / name, reason)
            self._failing.add(name)
            return False
        if name in self._failing:
            self._failing.discard(name)
            _logger.info('%s is written again', self._folder / name)
        return True


def _grid(images: torch.Tensor) -> torch.Tensor:
    from torchvision.utils import make_grid
    return make_grid(images.detach().cpu(), nrow=4)


def _shrink(images: torch.Tensor) -> torch.Tensor:
    """Return [n, C, H, W] with no side longer than PIXELS_SHOWN."""
    scale = PIXELS_SHOWN / max(images.shape[-2:])
    return images if scale >= 1 else F.interpolate(images, scale_factor=scale, mode='area')
