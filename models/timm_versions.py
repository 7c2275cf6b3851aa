"""Functions of timm that its oldest supported version (utils/versions.py) lacks.

Importing this module raises UserError if timm is too old, for programs that do not start as one of our scripts.
"""
import timm
from torch import nn

from utils.versions import check_timm

check_timm()
try:
    from timm.models._input import update_model_input_size as _update  # there is no public name
except ImportError:
    _update = None  # type: ignore[assignment]  # older timm

SAVES_ARGUMENTS = hasattr(timm.models, 'get_model_args')  # of a model, with its weights: since 1.0.31


def update_model_input_size(model: nn.Module, img_size: int | tuple[int, int]) -> None:
    """Record the image size that timm saves with the weights; do nothing before 1.0.31, which saves none."""
    if _update is not None:
        _update(model, img_size)
