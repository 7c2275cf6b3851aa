"""curves.png: loss, accuracy and learning rate against epochs."""
import time
from pathlib import Path
from typing import IO

from engine.best import AVERAGED, PREFIXES, WEIGHTS, best_record
from engine.log.metrics import CURVES
from engine.log.sink import EPOCH, Run, Sink
from utils.faults import fault_point

# Drawing takes longer than some epochs.
SECONDS_BETWEEN_DRAWINGS = 30


class Curves(Sink):
    name, kinds = CURVES, (EPOCH,)

    def __init__(self, run: Run):
        super().__init__(run)
        self._drawn_at = time.monotonic()

    def record(self, record: dict) -> None:
        if time.monotonic() - self._drawn_at > SECONDS_BETWEEN_DRAWINGS:
            self.close(False)

    def close(self, finished: bool) -> None:
        self._drawn_at = time.monotonic()  # also if drawing fails, so that no epoch pays for the attempt
        fault_point('log.curves')
        draw_curves(self.run.records, self.run.folder / CURVES, self.run.options.get('eval_metric', 'top1'))


def draw_curves(records: list[dict], path: Path | IO[bytes], metric: str = 'top1') -> None:
    """Draw the records of a metrics.jsonl as a PNG file. Epoch 1 is the first one that ended.

    Args:
        metric: decides which epoch, and which of its weights, are marked as the best.
    """
    from matplotlib.ticker import MaxNLocator

    from utils.pictures import BLUE, GREEN, ORANGE, new_figure

    epochs = [r for r in records if r['kind'] == 'epoch']
    steps = [r for r in records if r['kind'] == 'train']
    figure = new_figure(13, 3.8)
    loss, accuracy, rate = figure.subplots(1, 3)
    ended = [r['epoch'] + 1 for r in epochs]
    marker = 'o' if len(ended) < 30 else None

    loss.plot([r['epoch_progress'] for r in steps], [r['loss'] for r in steps], color=BLUE, alpha=0.3, linewidth=1)
    loss.plot(ended, [r['train_loss'] for r in epochs], color=BLUE, marker=marker, markersize=3, label='training')
    for name, color in ((WEIGHTS, ORANGE), (AVERAGED, GREEN)):
        prefix = PREFIXES[name]
        have = [r for r in epochs if f'{prefix}top1' in r]
        if not have:
            continue
        highest = max(have, key=lambda r: r[f'{prefix}top1'])
        style = {'color': color, 'marker': marker, 'markersize': 3}
        x = [r['epoch'] + 1 for r in have]
        loss.plot(x, [r[f'{prefix}loss'] for r in have], **style, label=f'evaluation, {name}')
        accuracy.plot(x, [r[f'{prefix}top1'] for r in have], **style,
                      label=f"{name}: highest {highest[prefix + 'top1']:.2f} % (epoch {highest['epoch'] + 1})")
    if best := best_record(epochs, metric):
        record, result = best
        prefix = PREFIXES[result.of]
        for axes, value in ((loss, record.get(f'{prefix}loss')), (accuracy, record.get(f'{prefix}top1'))):
            if value is not None:
                axes.plot(record['epoch'] + 1, value, '*', color='black', markersize=10, zorder=3,
                          label=f"model_best: epoch {record['epoch'] + 1}, {result.of}")
    rate.plot([r['epoch_progress'] for r in steps], [r['lr'] for r in steps], color=BLUE)

    for axes, title in ((loss, 'Loss'), (accuracy, 'Top-1 accuracy, %'), (rate, 'Learning rate')):
        axes.set_title(title)
        axes.set_xlabel('epochs')
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
    for axes in (loss, accuracy):
        if axes.lines:
            axes.legend(fontsize=8)
    rate.ticklabel_format(axis='y', style='sci', scilimits=(-2, 2))
    figure.savefig(path, dpi=110)
