"""What the models of timm's registry have, ours too, and torch.nn.Module does not declare."""
from collections.abc import Callable
from typing import Any

from torch import nn


class TimmModel(nn.Module):
    """For annotations alone: no model inherits from it."""
    num_classes: int
    pretrained_cfg: dict[str, Any]
    get_classifier: Callable[[], nn.Module | tuple[nn.Module, ...]]
    reset_classifier: Callable[..., None]
    no_weight_decay: Callable[[], set[str]]
