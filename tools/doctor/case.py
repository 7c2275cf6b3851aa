"""The run that is looked at, and what each section has found out for those behind it."""
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from options.parser import Options
from utils.errors import UserError

if TYPE_CHECKING:
    import torch

    from data.base import ImageDataset
    from data.pipeline import TrainingInput
    from engine.state import TrainState
    from utils.distributed import World
    from utils.runtime import Precision


@dataclass
class Case:
    """The run that is looked at, and what each section has found out for those behind it.

    processes: of the run. together: that are started to exchange a gradient. samples: images to decode.
    seconds: for the loader. problem: what train.py would say to the data set, if anything.
    input, state: what train.py would make. steps: (seconds, bytes) by images of a step.
    Rates are images per second: of the loader with the workers of one process (loader_rate) and of all (supply), of the
        model in one process (step_rate, forward_rate), of the run (total_rate).
    """
    args: Options
    world: 'World'
    precision: 'Precision'
    processes: int
    together: int
    samples: int
    seconds: float
    train: 'ImageDataset' = field(init=False)
    val: 'ImageDataset | None' = None
    problem: UserError | None = None
    input: 'TrainingInput' = field(init=False)
    state: 'TrainState' = field(init=False)
    batch: 'tuple[torch.Tensor, torch.Tensor]' = field(init=False)
    eval_batch: 'tuple[torch.Tensor, torch.Tensor] | None' = None
    gradient_bytes: int = 0
    loader_rate: float = 0.0
    eval_loader_rate: float = 0.0
    rate_per_core: float = 0.0
    supply: float = 0.0
    steps: dict[int, tuple[float, int]] = field(default_factory=dict)
    too_large: int | None = None
    step_seconds: float = 0.0
    step_rate: float = 0.0
    forward_rate: float = 0.0
    total_rate: float = 0.0
    total_steps: int = 0
    saved: dict | None = None
    starving: str = 'Not known: loader and training step could not both be measured.'
