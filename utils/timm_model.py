"""Attributes of the models in timm's registry, including ours, that torch.nn.Module does not declare."""
from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class TimmModel(nn.Module):
    """Type for annotations only; no model inherits from it."""
    num_classes: int
    pretrained_cfg: dict[str, Any]
    get_classifier: Callable[[], nn.Module | tuple[nn.Module, ...]]
    reset_classifier: Callable[..., None]
    no_weight_decay: Callable[[], set[str]]
    forward_features: Callable[[torch.Tensor], torch.Tensor]
    forward_head: Callable[..., torch.Tensor]
    group_matcher: Callable[..., Any]
    set_grad_checkpointing: Callable[[bool], None]
