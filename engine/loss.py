"""The training loss. Evaluation always measures plain cross-entropy."""
import logging
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from timm.loss import BinaryCrossEntropy, JsdCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import nn

from utils.console import plural
from utils.errors import UserError

_logger = logging.getLogger(__name__)

FOCAL_GAMMA = 2.0


def create_loss(args, *, soft_targets: bool, class_counts: Sequence[int] | None = None) -> nn.Module:
    """Return the loss that the options name.

    Args:
        soft_targets: targets are distributions over classes, already smoothed by Mixup, instead of class numbers.
        class_counts: training images of each class, for --class-weights; None checks the options without them.
    Raises:
        UserError: options that do not go together.
    """
    if args.focal_gamma is not None and args.loss != 'focal':
        raise UserError(f'--focal-gamma {args.focal_gamma:g} beside --loss {args.loss}; say --loss focal, or leave it '
                        'out')
    if args.bce_target_thresh is not None and args.loss != 'bce':
        raise UserError(f'--bce-target-thresh {args.bce_target_thresh:g} beside --loss {args.loss}; say --loss bce, '
                        'or leave it out')
    if args.jsd:
        if args.aug_splits < 2:
            raise UserError(f'--jsd compares augmentation splits: add --aug-splits 3 (it is {args.aug_splits})')
        if args.loss != 'ce' or args.class_weights:
            raise UserError('--jsd is a loss of its own; leave --loss and --class-weights out, or --jsd')
        return JsdCrossEntropy(num_splits=args.aug_splits, smoothing=args.smoothing)
    weights = balanced_weights(class_counts) if args.class_weights and class_counts is not None else None
    if args.loss == 'bce':
        return WeightedBinaryCrossEntropy(args.smoothing, args.bce_target_thresh, weights)
    smoothing = 0.0 if soft_targets else args.smoothing
    if args.loss == 'focal':
        gamma = FOCAL_GAMMA if args.focal_gamma is None else args.focal_gamma
        return FocalLoss(gamma, smoothing, weights)
    if weights is not None:
        return WeightedCrossEntropy(weights, smoothing)
    if soft_targets:
        return SoftTargetCrossEntropy()
    if smoothing:
        return LabelSmoothingCrossEntropy(smoothing)
    return nn.CrossEntropyLoss()


def balanced_weights(counts: Sequence[int]) -> torch.Tensor:
    """Return weights with which all classes count the same in the sum over n images, and their mean over them is 1.

    A class with n_c images has n / (K n_c), where K classes have images; as scikit-learn's 'balanced'. The weight of a
    class without images is 0. float32 [classes].
    """
    number = torch.tensor(counts, dtype=torch.float64)
    present = number > 0
    weights = torch.where(present, number.sum() / (present.sum() * number.clamp(min=1)), 0)
    some = weights[present]
    missing = len(counts) - len(some)
    _logger.info('--class-weights balanced: from %.3g to %.3g%s', some.min().item(), some.max().item(),
                 f'; {plural(missing, "class", "classes")} without a training image count nothing' if missing else '')
    return weights.float()


class WeightedCrossEntropy(nn.CrossEntropyLoss):
    """Cross-entropy with a weight for each class, averaged over images.

    torch would divide by the weights of a batch, so that the loss depended on how images are divided into batches and
    processes. With Mixup, each class of an image counts with its share and its weight.
    """

    def __init__(self, weight: torch.Tensor, smoothing: float):
        super().__init__(weight=weight, label_smoothing=smoothing, reduction='none')

    def forward(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return the mean loss of logits [B, classes] and targets [B] or [B, classes]."""
        return super().forward(logits, targets).mean()


class WeightedBinaryCrossEntropy(BinaryCrossEntropy):
    """timm's binary cross-entropy, one decision for each class (Wightman et al. 2021, "ResNet strikes back").

    An image counts with the weight of its class; with Mixup, with the mean weight of its classes.

    Args:
        threshold: soft targets above it are 1, others 0; None leaves them as they are.
        class_weights: [classes], or None for equal ones.
    """

    def __init__(self, smoothing: float, threshold: float | None, class_weights: torch.Tensor | None):
        super().__init__(smoothing=smoothing, target_threshold=threshold,
                         reduction='mean' if class_weights is None else 'none')
        self.register_buffer('class_weights', class_weights)

    def forward(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return the mean over images and classes, of logits [B, classes] and targets [B] or [B, classes]."""
        loss = super().forward(logits, targets)
        if self.class_weights is None:
            return loss
        of_images = targets @ self.class_weights if targets.ndim == 2 else self.class_weights[targets]  # [B]
        return (loss.mean(1) * of_images).mean()


class FocalLoss(nn.Module):
    """Cross-entropy that counts images less which are classified well (Lin et al. 2017, equation 4).

    The term of a class with probability p is multiplied by (1 - p)^gamma. Smoothed and soft targets weigh the terms.
    """

    def __init__(self, gamma: float, smoothing: float = 0.0, class_weights: torch.Tensor | None = None):
        super().__init__()
        self.gamma, self.smoothing = gamma, smoothing
        self.register_buffer('class_weights', class_weights)

    def forward(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return the mean loss of logits [B, classes] and targets [B] or [B, classes]."""
        classes = logits.shape[1]
        if targets.ndim == 1:
            targets = F.one_hot(targets, classes) * (1 - self.smoothing) + self.smoothing / classes
        log_p = logits.log_softmax(1)  # [B, classes]
        # The gradient of 0^gamma is not finite for gamma < 1.
        miss = (-log_p.expm1()).clamp(min=torch.finfo(log_p.dtype).tiny)  # 1 - p
        terms = -targets * miss ** self.gamma * log_p
        return (terms if self.class_weights is None else terms * self.class_weights).sum(1).mean()
