"""The training loss. Evaluation always measures plain cross-entropy."""
from timm.loss import JsdCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import nn

from utils.errors import UserError


def create_loss(args, *, soft_targets: bool) -> nn.Module:
    """Return the loss that the options name.

    Args:
        soft_targets: targets are distributions over classes, already smoothed by Mixup, instead of class numbers.
    """
    if args.jsd:
        if args.aug_splits < 2:
            raise UserError(f'--jsd compares augmentation splits: add --aug-splits 3 (it is {args.aug_splits})')
        return JsdCrossEntropy(num_splits=args.aug_splits, smoothing=args.smoothing)
    if soft_targets:
        return SoftTargetCrossEntropy()
    if args.smoothing:
        return LabelSmoothingCrossEntropy(args.smoothing)
    return nn.CrossEntropyLoss()
