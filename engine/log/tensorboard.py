"""What TensorBoard shows of a run; groups of charts say in their names what their x-axis counts.

    tensorboard --logdir output/train

- training, learning rate, evaluation *by images seen*, and a batch as the model saw it, in the run's own folder;
- evaluation and run *by epoch*, with wrong predictions, in its folder `epochs`, counted from 1, as ended. The options
  are there, too, so that HPARAMS shows runs with what differs between them beside these results.

A resumed run continues what was written before the point at which it resumes.
"""
from pathlib import Path

import numpy as np
import torch
import yaml
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from utils.faults import fault_point

TRAINING, EVALUATION, RATE = 'training by images seen', 'evaluation by images seen', 'learning rate by images seen'
EVALUATION_BY_EPOCH, RUN_BY_EPOCH = 'evaluation by epoch', 'run by epoch'
SHOWN_OF_TRAINING = ('loss', 'gradient_norm', 'images_per_second', 'gpu_memory_gib', 'skipped_steps')
RESULTS = tuple(f'{prefix}{name}' for prefix in ('', 'ema_') for name in ('loss', 'top1', 'top5'))


class Board:
    """Writes the events of a run; whatever keeps it from writing is raised.

    Args:
        images_seen, epoch: where the run starts; later points in the folder are those of a run that is repeated now.
    """

    def __init__(self, folder: Path, options: dict, *, images_seen: int, epoch: int):
        self._by_images = SummaryWriter(folder, purge_step=images_seen + 1 if images_seen else 0)
        self._by_images.add_text('options', '```yaml\n' + yaml.safe_dump(options) + '```', images_seen)
        # As text, since False would be shown as the number 0.
        flat = {name: str(value) if isinstance(value, bool) else value for name, value in options.items()
                if isinstance(value, (bool, int, float, str))}
        # Not the description of an experiment, which would be one for all runs: TensorBoard compares what it finds.
        _, start, self._end = hparams(flat, {})
        # In a file of their own: TensorBoard believes the first that it reads, and a resumed run may have others.
        for earlier in (folder / 'epochs').glob('*.options'):
            earlier.unlink()
        with SummaryWriter(folder / 'epochs', filename_suffix='.options') as writer:
            writer._get_file_writer().add_summary(start)
        self._by_epoch = SummaryWriter(folder / 'epochs', purge_step=epoch + 1 if epoch else 0)
        self._by_epoch.add_custom_scalars({'The weights beside their average (EMA), by epoch': {
            title: ['Multiline', [f'{EVALUATION_BY_EPOCH}/{prefix}{name}$' for prefix in ('', 'ema_')]]
            for title, name in (('top-1 accuracy, %', 'top1'), ('top-5 accuracy, %', 'top5'), ('loss', 'loss'))}})

    def train(self, record: dict) -> None:
        for name in SHOWN_OF_TRAINING:
            self._add(self._by_images, f'{TRAINING}/{name}', record.get(name), record['images_seen'])
        for name, rate in record['rates'].items():
            self._add(self._by_images, f'{RATE}/{name}', rate, record['images_seen'])

    def epoch(self, record: dict) -> None:
        for name, value in record.items():
            if name in RESULTS:
                self._add(self._by_images, f'{EVALUATION}/{name}', value, record['images_seen'])
                self._add(self._by_epoch, f'{EVALUATION_BY_EPOCH}/{name}', value, record['epoch'] + 1)
            elif name not in ('epoch', 'images_seen'):
                self._add(self._by_epoch, f'{RUN_BY_EPOCH}/{name}', value, record['epoch'] + 1)

    def first_batch(self, grid: torch.Tensor, images_seen: int) -> None:
        """grid: float [3, H, W] in 0…1."""
        fault_point('log.board')
        self._by_images.add_image(f'{TRAINING}/first batch of the epoch', grid, images_seen)

    def wrong_predictions(self, of: str, sheet: np.ndarray, epoch: int) -> None:
        """of: whose they are. sheet: uint8 [H, W, 3]."""
        fault_point('log.board')
        self._by_epoch.add_image(f'{EVALUATION_BY_EPOCH}/wrong predictions of the {of}', sheet, epoch + 1,
                                 dataformats='HWC')

    def finish(self) -> None:
        """The run has come to the end of its schedule."""
        self._by_epoch._get_file_writer().add_summary(self._end)

    def flush(self) -> None:
        for writer in (self._by_images, self._by_epoch):
            writer.flush()

    def close(self) -> None:
        for writer in (self._by_images, self._by_epoch):
            writer.close()

    def _add(self, writer: SummaryWriter, tag: str, value, step: int) -> None:
        if isinstance(value, (int, float)):
            fault_point('log.board')
            writer.add_scalar(tag, value, step)
