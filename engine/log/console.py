"""The lines of a run on the console."""
import logging
import re

from engine.log.sink import EPOCH, TRAIN, Sink

_logger = logging.getLogger(__name__)

# The parts of a line, each with the number that it needs.
PARTS = {
    TRAIN: (('steps_per_epoch', 'Train: {number} [{step:4d}/{steps_per_epoch}]'), ('loss', 'Loss: {loss:.4f}'),
            ('step_seconds', 'Time: {step_seconds:.3f}s, {images_per_second:.1f}/s'), ('lr', 'LR: {lr:.3e}'),
            ('left', 'Left: {left}')),
    EPOCH: (('not_evaluated', 'Epoch {number}: training loss {train_loss:.4f}, not evaluated'),
            ('top1', 'Epoch {number}: Acc@1 {top1:.3f}'), ('top5', 'Acc@5 {top5:.3f}'), ('loss', 'Loss {loss:.4f}'),
            ('ema_top1', 'EMA Acc@1 {ema_top1:.3f}'), ('better', 'Better: {better}'), ('count', '({count} images)')),
}


class Console(Sink):
    name = 'console'

    def record(self, record: dict) -> None:
        record = {**record, 'number': record['epoch'] + 1}  # people count from 1
        if record['kind'] == EPOCH and 'top1' not in record:
            record['not_evaluated'] = True
        _logger.info('  '.join(
            re.sub('{.*}', 'none', text) if record[name] is None else text.format(**record)
            for name, text in PARTS[record['kind']] if name in record))
