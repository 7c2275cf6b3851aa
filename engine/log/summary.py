"""summary.csv: one row per epoch, counted from 1, with a column for each number of any epoch."""
import csv
import io

from engine.log.metrics import SUMMARY
from engine.log.sink import EPOCH, Sink
from utils.disk import write_whole
from utils.faults import fault_point


class Summary(Sink):
    name, kinds = SUMMARY, (EPOCH,)

    def record(self, record: dict) -> None:
        epochs = [{k: v for k, v in r.items() if k != 'kind'} | {'epoch': r['epoch'] + 1}
                  for r in self.run.records if r['kind'] == EPOCH]
        text = io.StringIO()
        # Those that were evaluated have the most numbers, and give the order of columns.
        columns = dict.fromkeys(name for r in sorted(epochs, key=len, reverse=True) for name in r)
        writer = csv.DictWriter(text, list(columns))
        writer.writeheader()
        writer.writerows(epochs)
        fault_point('log.summary')
        write_whole(self.run.folder / SUMMARY, text.getvalue())
