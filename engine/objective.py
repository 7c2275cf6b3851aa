"""What training minimises: a model together with the loss that judges it, as one module for DDP to wrap."""
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from timm.loss import SoftTargetCrossEntropy
from torch import nn

from engine.loss import create_loss
from engine.teacher import LogitsAndFeatures, Teacher
from utils.timm_model import TimmModel


class Objective(nn.Module):
    """A model and its loss. DDP wraps both, so that it averages the gradients of everything that learns.

    Args:
        model: the raw model, images [B, C, H, W] → logits [B, num_classes].
        loss: (logits, targets) → scalar.
    Attributes:
        model: what `forward` calls: the model itself, or what calls it to get more than logits.
    """

    def __init__(self, model: nn.Module, loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]):
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, images: torch.Tensor, targets: Any) -> torch.Tensor:
        """Return the loss of a batch as the preparer made it: images [B, C, H, W], targets as the loss takes them."""
        # On CPUs autocast would compute the loss in bfloat16.
        return self.loss(self.model(images).float(), targets)


class LogitsOfTokens(nn.Module):
    """A model as token labels train it: its `forward_dense` is what is called, and compiled as a whole."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor, exchanged: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return logits [B, classes] and logits of tokens [B, N, classes] of images whose tokens are exchanged."""
        return self.model.forward_dense(images, exchanged)  # type: ignore[operator]  # a T2TViT's


class TokenLabelObjective(Objective):
    """A model with a classifier of each token, and the weighted sum of the losses of its images and of its tokens.

    Jiang et al. 2021, equation 4, with soft targets for both.

    Args:
        model: has `forward_dense` (see T2TViT).
        cls_weight, dense_weight: of the two losses.
    """

    def __init__(self, model: nn.Module, *, cls_weight: float, dense_weight: float):
        super().__init__(LogitsOfTokens(model), SoftTargetCrossEntropy())
        self.cls_weight, self.dense_weight = cls_weight, dense_weight

    def forward(self, images: torch.Tensor, targets: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """Return the loss of images [B, C, H, W].

        targets: of images [B, classes], of tokens [B, N, classes], and which tokens are exchanged, bool [N].
        """
        of_images, of_tokens, exchanged = targets
        logits, token_logits = self.model(images, exchanged)
        return (self.cls_weight * self.loss(logits.float(), of_images)
                + self.dense_weight * self.loss(token_logits.float(), of_tokens))


class Distillation(Objective):
    """An objective that also learns what a teacher says of the same images; targets are a pair of both.

    With the loss L of the targets, a share A, a temperature T, and logits z of the model and t of the teacher:

        soft      (1 - A) L + A T² KL(softmax(t / T) || softmax(z / T))     Hinton et al. 2015; Touvron et al. 2021,
                                                                            "DeiT", equation 2
        hard      (1 - A) L + A CE(z, argmax t)                             DeiT, equation 3, where A is 1/2
        feature   L + A mean((P f - g)²)                                    as timm's FeatureDistillationTask

    KL is the mean over images; f and g are the pooled features of model and teacher; P is the teacher's projection, or
    nothing if both are equally wide. DeiT's own code divides its KL by the number of classes too.
    """

    def __init__(self, model: nn.Module, loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], teacher: Teacher,
                 *, temperature: float, weight: float):
        super().__init__(LogitsAndFeatures(cast(TimmModel, model)) if teacher.kind == 'feature' else model, loss)
        self.kind, self.temperature, self.weight = teacher.kind, temperature, weight
        self.projection = teacher.projection or nn.Identity()

    def forward(self, images: torch.Tensor, targets: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """Return the loss of images [B, C, H, W].

        targets: those of the loss, and the teacher's logits [B, classes] or features [B, F].
        """
        labels, answer = targets
        if self.kind == 'feature':
            logits, features = self.model(images)
            return self.loss(logits.float(), labels) + self.weight * F.mse_loss(
                self.projection(features).float(), answer)
        logits = self.model(images).float()
        if self.kind == 'hard':
            distilled = F.cross_entropy(logits, answer.argmax(dim=1))
        else:
            distilled = self.temperature ** 2 * F.kl_div(
                (logits / self.temperature).log_softmax(dim=1), (answer / self.temperature).log_softmax(dim=1),
                reduction='batchmean', log_target=True)
        return (1 - self.weight) * self.loss(logits, labels) + self.weight * distilled


def create_objective(args, model: nn.Module, *, soft_targets: bool, class_counts: Sequence[int] | None = None,
                     teacher: Teacher | None = None) -> Objective:
    """Return the objective that the options name, on the device of `model`.

    Args:
        soft_targets: targets are distributions over classes instead of class numbers.
        class_counts: training images of each class, which --class-weights needs.
        teacher: the one that the options name, if they do.
    """
    if args.token_labels:
        return TokenLabelObjective(model, cls_weight=args.cls_weight, dense_weight=args.dense_weight)
    loss = create_loss(args, soft_targets=soft_targets, class_counts=class_counts)
    loss.to(next(model.parameters()).device)
    if teacher:
        weight = 0.5 if args.distill_weight is None else args.distill_weight
        return Distillation(model, loss, teacher, temperature=args.distill_temperature or 1.0, weight=weight)
    return Objective(model, loss)
