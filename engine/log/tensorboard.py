"""TensorBoard events of a run. The names of chart groups say what their x-axis counts.

    tensorboard --logdir output/train

- The run's folder holds training, learning rate and evaluation *by images seen*, and a batch as the model saw it.
- Its folder `epochs` holds evaluation and run *by epoch*, counted from 1, and wrong predictions. It also holds the
  options, so HPARAMS compares runs by the options that differ and by these results.

A resumed run continues what was written before the point at which it resumes.
"""
import threading

import yaml

from engine.log.sink import EPOCH, FIRST_BATCH, TRAIN, WRONG_PREDICTIONS, Run, Sink
from utils.faults import fault_point

TRAINING, EVALUATION, RATE = 'training by images seen', 'evaluation by images seen', 'learning rate by images seen'
EVALUATION_BY_EPOCH, RUN_BY_EPOCH = 'evaluation by epoch', 'run by epoch'
SHOWN_OF_TRAINING = ('loss', 'gradient_norm', 'images_per_second', 'gpu_memory_gib', 'skipped_steps')
RESULTS = tuple(f'{prefix}{name}' for prefix in ('', 'ema_')
                for name in ('loss', 'top1', 'top5', 'balanced_accuracy', 'macro_f1'))


class TensorBoard(Sink):
    name, option, kinds = 'TensorBoard events', 'tensorboard', (TRAIN, EPOCH, FIRST_BATCH, WRONG_PREDICTIONS)
    is_fragile = True  # TensorBoard's writer is a thread that a full disk ends

    def __init__(self, run: Run):
        super().__init__(run)
        fault_point('log.board')
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams
        # Its threads pass an error on to the next call, and would print a traceback as well.
        threading.excepthook = _quiet_for_tensorboard
        self._by_images = SummaryWriter(run.folder, purge_step=run.images_seen + 1 if run.images_seen else 0)
        self._by_images.add_text('options', '```yaml\n' + yaml.safe_dump(run.options) + '```', run.images_seen)
        # As text, since False would be shown as the number 0.
        flat = {name: str(value) if isinstance(value, bool) else value for name, value in run.options.items()
                if isinstance(value, (bool, int, float, str))}
        # The description of the experiment is left out, since it would be one for all runs.
        _, start, self._end = hparams(flat, {})
        # In a file of their own: TensorBoard believes the first that it reads, and a resumed run may have others.
        folder = run.folder / 'epochs'
        for earlier in folder.glob('*.options'):
            earlier.unlink()
        with SummaryWriter(folder, filename_suffix='.options') as writer:
            writer._get_file_writer().add_summary(start)
        self._by_epoch = SummaryWriter(folder, purge_step=run.epoch + 1 if run.epoch else 0)
        self._by_epoch.add_custom_scalars({'The weights beside their average (EMA), by epoch': {
            title: ['Multiline', [f'{EVALUATION_BY_EPOCH}/{prefix}{name}$' for prefix in ('', 'ema_')]]
            for title, name in (('top-1 accuracy, %', 'top1'), ('top-5 accuracy, %', 'top5'), ('loss', 'loss'))}})

    def record(self, record: dict) -> None:
        seen = record['images_seen']
        if record['kind'] == TRAIN:
            for name in SHOWN_OF_TRAINING:
                self._add(self._by_images, f'{TRAINING}/{name}', record.get(name), seen)
            for name, rate in record.get('rates', {}).items():
                self._add(self._by_images, f'{RATE}/{name}', rate, seen)
            return
        for name, value in record.items():
            if name in RESULTS:
                self._add(self._by_images, f'{EVALUATION}/{name}', value, seen)
                self._add(self._by_epoch, f'{EVALUATION_BY_EPOCH}/{name}', value, record['epoch'] + 1)
            elif name not in ('epoch', 'images_seen'):
                self._add(self._by_epoch, f'{RUN_BY_EPOCH}/{name}', value, record['epoch'] + 1)

    def image(self, name: str, pixels, point: int) -> None:
        fault_point('log.board')
        if name == FIRST_BATCH:
            self._by_images.add_image(f'{TRAINING}/{name}', pixels, point)
        else:
            self._by_epoch.add_image(f'{EVALUATION_BY_EPOCH}/{name}', pixels, point + 1)

    def flush(self) -> None:
        for writer in (self._by_images, self._by_epoch):
            writer.flush()

    def close(self, finished: bool) -> None:
        if finished:
            self._by_epoch._get_file_writer().add_summary(self._end)
        for writer in (self._by_images, self._by_epoch):
            writer.close()

    def _add(self, writer, tag: str, value, step: int) -> None:
        if isinstance(value, (int, float)):
            fault_point('log.board')
            writer.add_scalar(tag, value, step)


def _quiet_for_tensorboard(args) -> None:
    if not type(args.thread).__module__.startswith('tensorboard.'):
        threading.__excepthook__(args)
