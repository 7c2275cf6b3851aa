"""What training minimises: a model together with the loss that judges it, as one module for DDP to wrap."""
from collections.abc import Callable

import torch
from torch import nn

from engine.loss import create_loss


class Objective(nn.Module):
    """A model and its loss. DDP wraps both, so that it averages the gradients of everything that learns.

    Args:
        model: the raw model, images [B, C, H, W] → logits [B, num_classes].
        loss: (logits, targets) → scalar.
    """

    def __init__(self, model: nn.Module, loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]):
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return the loss of a batch as the preparer made it: images [B, C, H, W], targets as the loss takes them."""
        # On CPUs autocast would compute the loss in bfloat16.
        return self.loss(self.model(images).float(), targets)


def create_objective(args, model: nn.Module, *, soft_targets: bool) -> Objective:
    """Return the objective that the options name.

    Args:
        soft_targets: targets are distributions over classes instead of class numbers.
    """
    return Objective(model, create_loss(args, soft_targets=soft_targets))
