"""Attributes of the models in timm's registry, including ours, that torch.nn.Module does not declare."""
from collections.abc import Callable
from typing import Any

from torch import nn


class TimmModel(nn.Module):
    """Type for annotations only; no model inherits from it."""
    num_classes: int
    pretrained_cfg: dict[str, Any]
    forward_features: Callable[..., Any]
    forward_head: Callable[..., Any]
    get_classifier: Callable[[], nn.Module | tuple[nn.Module, ...]]
    reset_classifier: Callable[..., None]
    no_weight_decay: Callable[[], set[str]]
