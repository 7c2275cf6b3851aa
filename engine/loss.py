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
    smoothing = 0.0 if soft_targets else args.smoothing
    gamma = FOCAL_GAMMA if args.focal_gamma is None else args.focal_gamma
    if args.class_weights and class_counts is not None:
        of_images: nn.Module = (
            BinaryCrossEntropy(args.smoothing, args.bce_target_thresh, reduction='none') if args.loss == 'bce' else
            FocalLoss(gamma, smoothing, reduction='none') if args.loss == 'focal' else
            nn.CrossEntropyLoss(label_smoothing=smoothing, reduction='none'))
        return WeightedLoss(of_images, balanced_weights(class_counts), smoothing=args.smoothing)
    if args.loss == 'bce':
        return BinaryCrossEntropy(args.smoothing, args.bce_target_thresh)
    if args.loss == 'focal':
        return FocalLoss(gamma, smoothing)
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


class WeightedLoss(nn.Module):
    """The mean over images of another loss, times the weight of the image's class.

    With Mixup, it is the mean weight of the image's classes by their shares, without the smoothing of targets. torch's
    cross-entropy would divide by the weights of a batch, so that the loss depended on how images are divided into
    batches and processes. It would also weigh the smoothed part of a target by all classes.

    Args:
        loss: (logits, targets) → loss of each image [B], or of each of its classes [B, classes].
        class_weights: float32 [classes].
        smoothing: of soft targets.
    """

    class_weights: torch.Tensor

    def __init__(self, loss: nn.Module, class_weights: torch.Tensor, *, smoothing: float):
        super().__init__()
        self.loss, self.smoothing = loss, smoothing
        self.register_buffer('class_weights', class_weights)

    def forward(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return the mean loss of logits [B, classes] and targets [B] or [B, classes]."""
        loss = self.loss(logits, targets)
        if targets.ndim == 2:
            shares = (targets - self.smoothing / targets.shape[1]) / (1 - self.smoothing)
            weights = shares @ self.class_weights  # [B]
        else:
            weights = self.class_weights[targets]  # [B]
        return (weights * loss.reshape(len(weights), -1).mean(1)).mean()


class FocalLoss(nn.Module):
    """Cross-entropy that counts images less which are classified well (Lin et al. 2017, equation 4).

    The term of a class with probability p is multiplied by (1 - p)^gamma. Smoothed and soft targets weigh the terms.

    Args:
        reduction: 'mean' over images, or 'none'.
    """

    def __init__(self, gamma: float, smoothing: float = 0.0, reduction: str = 'mean'):
        super().__init__()
        self.gamma, self.smoothing, self.reduction = gamma, smoothing, reduction

    def forward(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return the loss of logits [B, classes] and targets [B] or [B, classes]: [], or [B] without reduction."""
        classes = logits.shape[1]
        if targets.ndim == 1:
            targets = F.one_hot(targets, classes) * (1 - self.smoothing) + self.smoothing / classes
        log_p = logits.log_softmax(1)  # [B, classes]
        # The gradient of 0^gamma is not finite for gamma < 1.
        miss = (-log_p.expm1()).clamp(min=torch.finfo(log_p.dtype).tiny)  # 1 - p
        loss = -(targets * miss ** self.gamma * log_p).sum(1)
        return loss.mean() if self.reduction == 'mean' else loss
