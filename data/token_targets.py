"""Targets of a training crop from token labels: a teacher's highest classes at every position of the whole image.

    image, tokens = crop_targets(maps, boxes, num_classes=1000, grid=(14, 14))      # maps and boxes from the loader

Jiang et al., "All Tokens Matter: Token Labeling for Training Better Vision Transformers", NeurIPS 2021.

Dimensions: B images, K classes of a position, C classes, H × W positions of a label map, N tokens of a grid.
"""
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import torchvision.ops  # noqa: F401, registers torch.ops.torchvision

WHOLE = (0., 0., 1., 1.)
# A score so far above the others' zeros that its class gets all probability.
CERTAIN = 100.


class TokenTargets(NamedTuple):
    """What the loss of token labels compares the model's logits with.

    image: float32 [B, C], of images whose tokens are exchanged.
    tokens: float32 [B, N, C], of the images as they were.
    exchanged: which tokens of an image are those of its partner, bool [N].
    """
    image: torch.Tensor
    tokens: torch.Tensor
    exchanged: torch.Tensor


def certain_map(target: int, shape: Sequence[int]) -> torch.Tensor:
    """Return a label map of `shape` [2, K, H, W] that gives class `target` all probability at every position."""
    scores_and_classes = torch.tensor([CERTAIN, target], dtype=torch.float16)
    return scores_and_classes.view(2, 1, 1, 1).expand(*shape)


def crop_targets(maps: torch.Tensor, boxes: torch.Tensor, *, num_classes: int, grid: tuple[int, int],
                 smoothing: float = 0.1, window: Sequence[float] = WHOLE,
                 transposed: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the targets of crops as wholes, float32 [B, C], and of their tokens, row by row, float32 [B, N, C].

    The scores of the K classes, and zeros for all others, are averaged over the place of the crop, or of a token. Then
    softmax makes them probabilities, which `smoothing` scales and raises.

    Args:
        maps: scores and their classes, float16 [B, 2, K, H, W], flipped as the images were.
        boxes: top, left, height and width of the crops, as shares of the flipped images, float32 [B, 4].
        grid: rows and columns of tokens.
        window: top, left, bottom and right of what the tokens cover, as shares of the crop; may reach beyond it.
        transposed: exchange rows and columns of the boxes and ignore the window, as the published code does.
    """
    top, left, height, width = boxes.float().unbind(1)
    if transposed:
        top, left, height, width, window = left, top, width, height, WHOLE
    if beyond := max(-window[0], -window[1], window[2] - 1, window[3] - 1, 0):
        # Where tokens reach out of the image, its outermost labels go on; roi_align would find zeros.
        maps, top, left, height, width = _widened(maps, top, left, height, width, beyond)
    scores = _scatter(maps, num_classes)  # [B, C, H, W]
    of_image = _average(scores, top, left, top + height, left + width, (1, 1), widens=transposed)
    of_tokens = _average(scores, top + window[0] * height, left + window[1] * width, top + window[2] * height,
                         left + window[3] * width, grid, widens=transposed)
    image, tokens = (_smooth(averages.flatten(2).transpose(1, 2).softmax(dim=2), smoothing)
                     for averages in (of_image, of_tokens))
    return image[:, 0], tokens


def _widened(maps, top, left, height, width, beyond: float) -> tuple[torch.Tensor, ...]:
    """Return label maps with repeated edges of at least the share `beyond`, and the same boxes on them."""
    rows, columns = maps.shape[-2:]
    above, beside = math.ceil(beyond * rows), math.ceil(beyond * columns)
    wide = F.pad(maps.flatten(1, 2), (beside, beside, above, above), mode='replicate').unflatten(1, maps.shape[1:3])
    by_rows, by_columns = rows / (rows + 2 * above), columns / (columns + 2 * beside)
    return (wide, (top + above / rows) * by_rows, (left + beside / columns) * by_columns, height * by_rows,
            width * by_columns)


def _scatter(maps: torch.Tensor, num_classes: int) -> torch.Tensor:
    """Return the scores of all classes, float32 [B, C, H, W], zero for those that a position does not name."""
    scores, classes = maps.unbind(1)  # each [B, K, H, W]
    zeros = scores.new_zeros(len(maps), num_classes, *maps.shape[-2:], dtype=torch.float32)
    return zeros.scatter_(1, classes.long(), scores.float())


def _average(scores: torch.Tensor, top, left, bottom, right, grid: tuple[int, int], *, widens: bool) -> torch.Tensor:
    """Return the averages of `scores` [B, C, H, W] over the cells of a grid on boxes, [B, C, *grid].

    widens: boxes of less than one position become as large as one, as in the published code.
    """
    rows, columns = scores.shape[-2:]
    corners = torch.stack((left * columns, top * rows, right * columns, bottom * rows), dim=1)
    corners = corners - 0.5 if widens else corners
    numbers = torch.arange(len(scores), dtype=corners.dtype, device=corners.device)
    # The operator itself, since with --deterministic the function around it, whose gradient would not be, needs memory
    # for all cells of all tokens. Without a sampling ratio it averages over as many points as there are cells.
    boxes = torch.cat((numbers[:, None], corners), dim=1)
    return torch.ops.torchvision.roi_align(scores, boxes, 1., *grid, -1, not widens)


def _smooth(probabilities: torch.Tensor, smoothing: float) -> torch.Tensor:
    low = smoothing / probabilities.shape[-1]
    return probabilities.mul_(1 - smoothing + low).add_(low)


def add_truth(image: torch.Tensor, truth: torch.Tensor, *, smoothing: float = 0.1) -> torch.Tensor:
    """Return targets of images, [B, C], with a share of their true classes `truth`, int64 [B]: --ground-truth.

    The share is half where both name the same class, and a tenth elsewhere, as in the published code.
    """
    num_classes = image.shape[1]
    # Smoothed as usual, so that they sum to 1. Those of `_smooth` sum to a little more, as published.
    true = F.one_hot(truth, num_classes).to(image.dtype) * (1 - smoothing) + smoothing / num_classes
    own = 0.9 - 0.4 * (image.argmax(dim=1) == true.argmax(dim=1)).to(image.dtype)[:, None]  # [B, 1]
    return image * own + true * (1 - own)


def draw_box(grid: tuple[int, int]) -> tuple[int, int, int, int]:
    """Return top, left, bottom and right of a box of tokens to exchange, from numpy's global generator (MixToken).

    Its sides are √(1 − λ) of the grid's with λ from Beta(1, 1), and what lies outside of the grid is cut off.
    """
    share = np.sqrt(1 - np.random.beta(1., 1.))
    sides = [int(length * share) for length in grid]
    middles = [np.random.randint(length) for length in grid]
    top, left = (max(middle - side // 2, 0) for middle, side in zip(middles, sides, strict=True))
    bottom, right = (min(middle + side // 2, length) for middle, side, length in zip(middles, sides, grid, strict=True))
    return top, left, bottom, right


def exchange(image: torch.Tensor, tokens: torch.Tensor, box: tuple[int, int, int, int],
             grid: tuple[int, int]) -> TokenTargets:
    """Return the targets of images that exchange the tokens in `box` with the batch in reverse order.

    The targets of tokens stay, because the model puts the tokens back. Those of images are mixed by the box's share.
    """
    top, left, bottom, right = box
    # Comparisons with plain numbers: a mask made on the host would have to be copied, and waited for.
    rows, columns = (torch.arange(length, device=image.device) for length in grid)
    mask = ((rows >= top) & (rows < bottom))[:, None] & ((columns >= left) & (columns < right))
    share = (bottom - top) * (right - left) / (grid[0] * grid[1])
    return TokenTargets(image * (1 - share) + image.flip(0) * share, tokens, mask.flatten())
