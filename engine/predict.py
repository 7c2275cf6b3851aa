"""The most probable classes of single images."""
import logging
from typing import NamedTuple

import numpy as np
import torch

from utils.console import progress_bar

_logger = logging.getLogger(__name__)


class Predictions(NamedTuple):
    """`indices` of n images in the data set [n], their k most probable `classes` [n, k] and `probabilities` [n, k].

    They are ordered by index. Images that could not be decoded are left out.
    """
    indices: np.ndarray
    classes: np.ndarray
    probabilities: np.ndarray


@torch.no_grad()
def predict(model, loader, prepare, *, precision, k: int = 5, log_interval: int = 50) -> Predictions:
    """Return the k most probable classes of every image of `loader`, in this process alone.

    Args:
        loader: gives (images, indices) of a `data.Numbered` data set.
        prepare: (uint8 images [B, C, H, W], indices [B]) → (normalised images, indices) on the device.
        k: number of classes; a model with fewer gives all of them.
    """
    was_training = model.training
    model.eval()
    found = []
    bar = progress_bar(total=len(loader), desc='Predict')
    for batch, (images, indices) in enumerate(loader, start=1):
        images, indices = prepare(images, indices)
        with precision.autocast():
            logits = model(images)
        probabilities, classes = logits.float().softmax(1).topk(min(k, logits.shape[1]))  # [B, k] each
        found.append((indices.cpu().numpy(), classes.cpu().numpy(), probabilities.cpu().numpy()))
        bar.update()
        if batch % log_interval == 0:
            _logger.info('Predict: [%4d/%d]', batch, len(loader))
    bar.close()
    model.train(was_training)
    if not found:
        return Predictions(np.zeros(0, int), np.zeros((0, k), int), np.zeros((0, k), np.float32))
    indices, classes, probabilities = (np.concatenate(parts) for parts in zip(*found, strict=True))
    order = np.argsort(indices)
    return Predictions(indices[order], classes[order], probabilities[order])
