"""What all sinks have in common. A sink is one place that a run is written to: a file, the console, a tracker."""
from dataclasses import dataclass, field
from pathlib import Path

# Kinds of records, then kinds of images.
TRAIN, EPOCH = 'train', 'epoch'
FIRST_BATCH, SAVED_BATCH, WRONG_PREDICTIONS = 'first batch of the epoch', 'train_batch', 'wrong predictions'


@dataclass(frozen=True)
class Run:
    """The run that a sink writes.

    Attributes:
        folder: exists and is writable.
        options: all options of the run, by name.
        images_seen, epoch: where this start of the run begins; it repeats whatever the folder holds of later points.
        records: the records up to this start; `RunLog` appends each new one before it calls a sink.
    """
    folder: Path
    options: dict
    images_seen: int = 0
    epoch: int = 0
    records: list[dict] = field(default_factory=list)


class Sink:
    """Base class of all sinks. The constructor opens the sink; a subclass has those of these methods that it needs:

        record(record)              numbers by name; record['kind'] is TRAIN (a log line) or EPOCH (its results)
        image(name, pixels, point)  pixels [3, H, W], uint8 or float in 0…1; `name` begins with the kind; `point` counts
                                    images seen, but steps of SAVED_BATCH
        result(record)              what the run has reached, once at its end
        flush()                     returns when everything so far is on the disk
        close(finished)             the process is about to end; `finished`: the schedule is complete

    All of them raise what goes wrong. `RunLog` turns it into one warning, and training goes on.

    Attributes:
        name: the file in the run's folder, or the service, in messages.
        option: the option that turns the sink on; '' for a sink that is always on.
        kinds: the kinds of records and images that the sink takes.
        is_fragile: `RunLog` drops the sink at its first failure, instead of trying again at the next call.
    """
    name = ''
    option = ''
    kinds: tuple[str, ...] = (TRAIN, EPOCH)
    is_fragile = False

    def __init__(self, run: Run):
        self.run = run
