"""What differs between the versions of timm: the lowest that has all these models need, and what newer ones add.

Raises UserError when it is imported beside an older timm, before a name that is missing there ends in a traceback.
"""
import re

import timm
from torch import nn

from utils.errors import UserError

try:
    from timm.models._input import update_model_input_size as _note_size  # no public name leads to it
except ImportError:
    _note_size = None  # type: ignore[assignment]  # what an import that failed leaves

LOWEST = '1.0.22'  # layers take a device and a dtype from 1.0.21 on, which initialises timm's LayerScale wrongly
SAVES_ARGUMENTS = hasattr(timm.models, 'get_model_args')  # of a model with its weights: from 1.0.31 on


def version_numbers(version: str) -> list[int]:
    """Return [1, 0, 22] for '1.0.22', so that versions compare as numbers."""
    return [int(number) for number in re.findall(r'\d+', version)[:3]]


if version_numbers(timm.__version__) < version_numbers(LOWEST):
    raise UserError(f"timm {timm.__version__} is too old for these models; pip install 'timm>={LOWEST}'")


def update_model_input_size(model: nn.Module, img_size: int | tuple[int, int]) -> None:
    """Note the image size in what timm saves with the weights; before 1.0.31 it saves none."""
    if _note_size is not None:
        _note_size(model, img_size)
