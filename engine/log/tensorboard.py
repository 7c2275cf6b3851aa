"""TensorBoard events of a run, in its folder. The x-axis of every chart and picture counts images seen.

    tensorboard --logdir output/train

There are training, learning rate, evaluation and the rest of each epoch's record, a batch as the model saw it, and
wrong predictions. HPARAMS compares runs by the options in COMPARED and by their results.

A resumed run continues what was written before the point at which it resumes.
"""
import threading

import yaml

from engine.log.sink import EPOCH, FIRST_BATCH, TRAIN, WRONG_PREDICTIONS, Run, Sink
from utils.faults import fault_point

TRAINING, EVALUATION, RATE, RUN = (f'{what} by images seen' for what in (
    'training', 'evaluation', 'learning rate', 'run'))
SHOWN_OF_TRAINING = ('loss', 'gradient_norm', 'images_per_second', 'gpu_memory_gib', 'skipped_steps')
RESULTS = tuple(f'{prefix}{name}' for prefix in ('', 'ema_')
                for name in ('loss', 'top1', 'top5', 'balanced_accuracy', 'macro_f1'))
# Options by which HPARAMS compares runs. All others are in the tab TEXT.
COMPARED = (
    'model', 'img_size', 'pretrained', 'initial_checkpoint', 'transfer_model', 'data', 'dataset', 'batch_size',
    'accum_steps', 'epochs', 'warmup_epochs', 'opt', 'lr', 'min_lr', 'sched', 'weight_decay', 'aa', 'mixup', 'cutmix',
    'smoothing', 'reprob', 'drop_path', 'model_ema', 'amp', 'seed')


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
        compared = {name: _number_or_text(run.options.get(name)) for name in COMPARED}
        compared['img_size'] = str(compared['img_size'])  # which may be 192x256
        # The description of the experiment is left out, so that TensorBoard finds out what differs, and shows it first.
        _, start, self._end = hparams(compared, {})
        # In a file of their own: TensorBoard believes the first that it reads, and a resumed run may have others. It is
        # created before the other, which TensorBoard then watches.
        for earlier in run.folder.glob('*.options'):
            earlier.unlink()
        with SummaryWriter(run.folder, filename_suffix='.options') as writer:
            writer._get_file_writer().add_summary(start)
        self._writer = SummaryWriter(run.folder, purge_step=run.images_seen + 1 if run.images_seen else 0)
        self._writer.add_text('options', '```yaml\n' + yaml.safe_dump(run.options) + '```', run.images_seen)
        self._writer.add_custom_scalars({'The weights beside their average (EMA)': {
            title: ['Multiline', [f'{EVALUATION}/{prefix}{name}$' for prefix in ('', 'ema_')]]
            for title, name in (('top-1 accuracy, %', 'top1'), ('top-5 accuracy, %', 'top5'), ('loss', 'loss'))}})

    def record(self, record: dict) -> None:
        seen = record['images_seen']
        if record['kind'] == TRAIN:
            for name in SHOWN_OF_TRAINING:
                self._add(f'{TRAINING}/{name}', record.get(name), seen)
            for name, rate in record.get('rates', {}).items():
                self._add(f'{RATE}/{name}', rate, seen)
            return
        for name, value in record.items():
            if name in RESULTS:
                self._add(f'{EVALUATION}/{name}', value, seen)
            elif name != 'images_seen':  # the number of the epoch is a curve, too
                self._add(f'{RUN}/{name}', value + 1 if name == 'epoch' else value, seen)

    def image(self, name: str, pixels, point: int) -> None:
        fault_point('log.board')
        self._writer.add_image(f'{TRAINING if name == FIRST_BATCH else EVALUATION}/{name}', pixels, point)

    def flush(self) -> None:
        self._writer.flush()

    def close(self, finished: bool) -> None:
        if finished:
            self._writer._get_file_writer().add_summary(self._end)
        self._writer.close()

    def _add(self, tag: str, value, step: int) -> None:
        if isinstance(value, (int, float)):
            fault_point('log.board')
            self._writer.add_scalar(tag, value, step)


def _number_or_text(value) -> float | str:
    """Return an option as HPARAMS compares it: False as text, since it would be shown as the number 0."""
    if value is None:
        return ''
    return value if isinstance(value, int | float) and not isinstance(value, bool) else str(value)


def _quiet_for_tensorboard(args) -> None:
    if not type(args.thread).__module__.startswith('tensorboard.'):
        threading.__excepthook__(args)
