"""Models that answer with the mean probability of several views of an image, or of several models."""
import math
from collections.abc import Sequence

import torch
from torch import nn

from utils.errors import UserError

# Stands for the checkpoint of several models.
ENSEMBLE = 'ensemble (mean probability)'


def mean_probability(logits: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the logarithm of the mean of the softmax of several logits [B, K]: [B, K], themselves logits of the mean.

    Of one, return its logits unchanged.
    """
    if len(logits) == 1:
        return logits[0]
    return torch.stack([one.log_softmax(1) for one in logits]).logsumexp(0) - math.log(len(logits))


class OfViews(nn.Module):
    """`model` for batches that have several views of each image: it averages the probabilities of its own ones.

    Args:
        views: positions of its views in the batch.
        columns: which of the model's outputs are judged, and in which order; None for all. The probabilities are those
            among them.
    """

    def __init__(self, model: nn.Module, views: Sequence[int], columns: Sequence[int] | None = None):
        super().__init__()
        self.model, self.views = model, tuple(views)
        self.register_buffer('columns', None if columns is None else torch.tensor(columns), persistent=False)

    def forward(self, batch: Sequence[torch.Tensor]) -> torch.Tensor:
        """Map views [B, C, H, W] each, of one size or of several, to logits [B, K] in float32."""
        logits = [self.model(batch[view]).float() for view in self.views]
        if self.columns is not None:
            logits = [one[:, self.columns] for one in logits]
        return mean_probability(logits)


@torch.no_grad()
def check_sizes(model: nn.Module, name: str, sizes: Sequence[tuple[int, int]]) -> None:
    """Raise UserError unless `model` takes images of all `sizes` (height, width), which --tta multi-scale needs."""
    for height, width in sizes:
        try:
            model(torch.zeros(1, 3, height, width))
        except Exception as error:  # a model may fail in any way at an image of another size
            reason = next(iter(str(error).splitlines()), type(error).__name__)[:120]
            raise UserError(f'--tta multi-scale: {name} does not take images of {height} × {width} pixels ({reason}); '
                            'choose --tta flip or five (a ViT of timm takes any size with --model-kwargs '
                            'dynamic_img_size=True)') from error
