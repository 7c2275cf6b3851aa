"""result.json: what a run has reached. It appears when the run is complete."""
import json
from pathlib import Path

from engine.log.sink import Run, Sink
from utils.disk import write_whole
from utils.faults import fault_point
from utils.results import finite

RESULT = 'result.json'


class ResultFile(Sink):
    name, kinds = RESULT, ()

    def __init__(self, run: Run):
        super().__init__(run)
        (run.folder / RESULT).unlink(missing_ok=True)  # the run goes on

    def result(self, record: dict) -> None:
        fault_point('log.result')
        write_whole(self.run.folder / RESULT, json.dumps(finite(record), indent=2) + '\n')


def read_result(folder: Path) -> dict:
    """Return the content of a run's result.json; {} if the run is not complete, or the file cannot be read."""
    try:
        result = json.loads((folder / RESULT).read_bytes())
    except (OSError, ValueError):
        return {}
    return result if isinstance(result, dict) else {}
