"""What training minimises: a model together with the loss that judges it, as one module for DDP to wrap."""
from collections.abc import Callable

import torch
from timm.loss import SoftTargetCrossEntropy
from torch import nn

from engine.loss import create_loss


class Objective(nn.Module):
    """A model and its loss. DDP wraps both, so that it averages the gradients of everything that learns.

    Args:
        model: the raw model, images [B, C, H, W] → logits [B, num_classes].
        loss: (logits, targets) → scalar.
    Attributes:
        called: the method of the model that `forward` calls.
    """
    called = 'forward'

    def __init__(self, model: nn.Module, loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]):
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return the loss of a batch as the preparer made it: images [B, C, H, W], targets as the loss takes them."""
        # On CPUs autocast would compute the loss in bfloat16.
        return self.loss(self.model(images).float(), targets)


class TokenLabelObjective(nn.Module):
    """A model with a classifier of each token, and the weighted sum of the losses of its images and of its tokens.

    Jiang et al. 2021, equation 4, with soft targets for both.

    Args:
        model: has `forward_dense` (see T2TViT).
        cls_weight, dense_weight: of the two losses.
    """
    called = 'forward_dense'

    def __init__(self, model: nn.Module, *, cls_weight: float, dense_weight: float):
        super().__init__()
        self.model = model
        self.cls_weight, self.dense_weight = cls_weight, dense_weight
        self.loss = SoftTargetCrossEntropy()

    def forward(self, images: torch.Tensor, targets: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """Return the loss of images [B, C, H, W].

        targets: of images [B, classes], of tokens [B, N, classes], and which tokens are exchanged, bool [N].
        """
        of_images, of_tokens, exchanged = targets
        logits, token_logits = self.model.forward_dense(images, exchanged)  # type: ignore[operator]  # a T2TViT's
        return (self.cls_weight * self.loss(logits.float(), of_images)
                + self.dense_weight * self.loss(token_logits.float(), of_tokens))


def create_objective(args, model: nn.Module, *, soft_targets: bool) -> Objective | TokenLabelObjective:
    """Return the objective that the options name.

    Args:
        soft_targets: targets are distributions over classes instead of class numbers.
    """
    if args.token_labels:
        return TokenLabelObjective(model, cls_weight=args.cls_weight, dense_weight=args.dense_weight)
    return Objective(model, create_loss(args, soft_targets=soft_targets))
