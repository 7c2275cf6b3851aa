"""The run that is checked, and what sections measure of it. A section gets what its parameters are annotated with."""
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from options.parser import Options
from utils.errors import UserError

if TYPE_CHECKING:
    import torch

    from data.base import ImageDataset
    from data.pipeline import TrainingInput
    from engine.state import TrainState
    from utils.distributed import World
    from utils.runtime import Precision


@dataclass(frozen=True)
class Case:
    """The run, and how closely to look at it."""
    args: Options
    world: 'World'
    precision: 'Precision'
    processes: int
    together: int  # processes to start for exchanging a gradient
    samples: int  # images to decode
    seconds: float  # for measuring the loader


@dataclass(frozen=True)
class Splits:
    """Both data sets, and the error that train.py would report for them."""
    missing: ClassVar[str] = 'the data was not opened'
    train: 'ImageDataset'
    val: 'ImageDataset | None' = None
    problem: UserError | None = None


@dataclass(frozen=True)
class Setup:
    """The loaders and the model with its optimizer, as train.py makes them."""
    missing: ClassVar[str] = 'there is no model to save'
    input: 'TrainingInput'
    state: 'TrainState'

    @property
    def gradient_bytes(self) -> int:
        return sum(p.numel() * p.element_size() for p in self.state.model.parameters() if p.requires_grad)


@dataclass(frozen=True)
class Loading:
    """A batch of each loader, and rates in images per second, of the workers of one process unless said otherwise."""
    missing: ClassVar[str] = 'no loader was measured'
    batch: 'tuple[torch.Tensor, torch.Tensor]'
    rate: float
    rate_per_core: float
    supply: float  # of all processes
    eval_batch: 'tuple[torch.Tensor, torch.Tensor] | None' = None
    eval_rate: float = 0.0


@dataclass(frozen=True)
class Steps:
    """Training steps of one process, and its rates in images per second."""
    missing: ClassVar[str] = 'no training step was measured'
    measured: dict[int, tuple[float, int]]  # number of images → (seconds, bytes of memory)
    too_large: int | None  # a number of images that did not fit into memory
    seconds: float  # of a step with all its accumulated batches
    rate: float
    forward_rate: float  # of an evaluation
    is_finite: bool = True  # the gradient


@dataclass(frozen=True)
class Rates:
    """Images per second of the whole run, and a sentence on what limits them."""
    missing: ClassVar[str] = Steps.missing
    total: float
    starving: str


@dataclass(frozen=True)
class Saved:
    """A checkpoint that was written once, in the folder that is to hold the run's."""
    missing: ClassVar[str] = 'no checkpoint was written'
    folder: Path
    bytes: int = 0
    seconds: float = 0.0
    has_locks: bool = False
    has_links: bool = False
    problem: str = ''


@dataclass(frozen=True)
class Schedule:
    """All optimizer steps of the run."""
    missing: ClassVar[str] = 'the steps were not counted'
    steps: int
