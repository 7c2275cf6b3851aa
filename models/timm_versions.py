"""What newer versions of timm add to the oldest one that these models work with (utils/versions.py).

Raises UserError when it is imported beside an older one: scripts have said so before, programs of others have not.
"""
import timm
from torch import nn

from utils.versions import check_timm

check_timm()
try:
    from timm.models._input import update_model_input_size as _note_size  # no public name leads to it
except ImportError:
    _note_size = None  # type: ignore[assignment]  # what an import that failed leaves

SAVES_ARGUMENTS = hasattr(timm.models, 'get_model_args')  # of a model with its weights: from 1.0.31 on


def update_model_input_size(model: nn.Module, img_size: int | tuple[int, int]) -> None:
    """Note the image size in what timm saves with the weights; before 1.0.31 it saves none."""
    if _note_size is not None:
        _note_size(model, img_size)
