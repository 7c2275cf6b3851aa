"""Multinomial logistic regression on features: the best linear classifier for them, by L-BFGS or SGD.

The loss is the mean cross-entropy plus decay / 2 times the squared norm of the weights; the bias does not decay.
Features are standardised first, so that one range of decays fits all models.

Dimensions: n images, C features, K classes.
"""
import logging
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from utils.console import progress_bar

_logger = logging.getLogger(__name__)

# Images whose logits are in memory together.
CHUNK = 16384
# L-BFGS ends when no entry of the gradient is larger than this, or after so many iterations.
TOLERANCE, MOST_ITERATIONS = 1e-6, 1000
# One image of this many of each class is held out.
HELD_OUT = 5


@dataclass(frozen=True)
class LinearClassifier:
    """A classifier of standardised features.

    Attributes:
        weight, bias: float64 [K, C] and [K].
        mean, std: of the features that it was fitted to, float64 [C].
    """
    weight: torch.Tensor
    bias: torch.Tensor
    mean: torch.Tensor
    std: torch.Tensor

    def of_features(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return weight [K, C] and bias [K] of the same classifier for features as they are."""
        weight = self.weight / self.std
        return weight, self.bias - weight @ self.mean

    def judge(self, features: torch.Tensor, targets: torch.Tensor) -> tuple[float, float]:
        """Return top-1 in percent and the mean cross-entropy, for features [n, C] and targets [n]."""
        weight, bias = self.of_features()
        right = loss = 0.0
        for part, target in zip(features.split(CHUNK), targets.split(CHUNK), strict=True):
            logits = F.linear(part.double(), weight, bias)
            right += (logits.argmax(1) == target).sum().item()
            loss += F.cross_entropy(logits, target, reduction='sum').item()
        return 100 * right / len(targets), loss / len(targets)


def hold_out(targets: torch.Tensor, seed: int) -> torch.Tensor:
    """Return which images to hold out, one in `HELD_OUT` of each class, by chance: bool [n] for targets [n]."""
    order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(seed))
    order = order[targets[order].argsort(stable=True)]  # class after class
    counts = targets.bincount()
    rank = torch.arange(len(targets)) - (counts.cumsum(0) - counts).repeat_interleave(counts)
    is_held_out = torch.zeros(len(targets), dtype=torch.bool)
    is_held_out[order] = rank < (counts // HELD_OUT).repeat_interleave(counts)
    return is_held_out


def fit_lbfgs(features: torch.Tensor, targets: torch.Tensor, classes: int, decay: float,
              start: LinearClassifier | None = None) -> LinearClassifier:
    """Return the classifier with the lowest loss, in float64 and with all images in each step.

    Args:
        features: float32 [n, C]; targets: int64 [n], on the same device.
        start: a classifier to start from, such as that of a near decay.
    """
    scaled, mean, std = _standardise(features)
    shape = (classes, features.shape[1])
    weight, bias = ((start.weight.clone(), start.bias.clone()) if start else
                    (features.new_zeros(shape, dtype=torch.float64), features.new_zeros(classes, dtype=torch.float64)))
    parameters = [weight.requires_grad_(), bias.requires_grad_()]
    optimizer = torch.optim.LBFGS(parameters, max_iter=MOST_ITERATIONS, max_eval=2 * MOST_ITERATIONS, history_size=20,
                                  tolerance_grad=TOLERANCE, tolerance_change=0, line_search_fn='strong_wolfe')

    def loss_and_gradient() -> torch.Tensor:
        optimizer.zero_grad()
        loss = decay / 2 * weight.square().sum()
        loss.backward()
        for part, target in zip(scaled.split(CHUNK), targets.split(CHUNK), strict=True):
            part_loss = F.cross_entropy(F.linear(part.double(), weight, bias), target, reduction='sum') / len(targets)
            part_loss.backward()
            loss = loss + part_loss
        return loss.detach()

    optimizer.step(loss_and_gradient)
    loss_and_gradient()
    gradient = max(parameter.grad.abs().max().item() for parameter in parameters if parameter.grad is not None)
    if gradient > 10 * TOLERANCE:
        _logger.warning('decay %g: the classifier is not at its optimum after %d iterations (gradient %.1g)', decay,
                        MOST_ITERATIONS, gradient)
    return LinearClassifier(weight.detach(), bias.detach(), mean, std)


def fit_sgd(features: torch.Tensor, targets: torch.Tensor, classes: int, decay: float, *, lr: float, momentum: float,
            batch_size: int, epochs: int, seed: int) -> LinearClassifier:
    """Return a classifier after `epochs` of SGD from zero weights, with a cosine schedule from `lr` to 0.

    It needs less time than `fit_lbfgs` for millions of images, and ends near the optimum. Arguments as there.
    """
    scaled, mean, std = _standardise(features)
    layer = torch.nn.Linear(features.shape[1], classes, device=features.device)
    torch.nn.init.zeros_(layer.weight)
    torch.nn.init.zeros_(layer.bias)
    groups: list[dict] = [{'params': [layer.weight], 'weight_decay': decay}, {'params': [layer.bias]}]
    optimizer = torch.optim.SGD(groups, lr=lr, momentum=momentum, weight_decay=0.0)
    generator = torch.Generator().manual_seed(seed)
    step, steps = 0, epochs * math.ceil(len(targets) / batch_size)
    with progress_bar(total=steps, desc=f'decay {decay:g}') as bar:
        for _ in range(epochs):
            for batch in torch.randperm(len(targets), generator=generator).to(features.device).split(batch_size):
                for group in optimizer.param_groups:
                    group['lr'] = lr * (1 + math.cos(math.pi * step / steps)) / 2
                optimizer.zero_grad()
                F.cross_entropy(layer(scaled[batch]), targets[batch]).backward()
                optimizer.step()
                step += 1
                bar.update()
    weight, bias = layer.weight.detach().double(), layer.bias.detach().double()
    return LinearClassifier(weight, bias, mean, std)


def _standardise(features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return features [n, C] with mean 0 and standard deviation 1, float32, and both numbers before, float64 [C]."""
    parts = features.split(CHUNK)
    mean = torch.stack([part.double().sum(0) for part in parts]).sum(0) / len(features)
    variance = torch.stack([(part.double() - mean).square().sum(0) for part in parts]).sum(0) / len(features)
    std = variance.sqrt()
    std = torch.where(std > 1e-6 * (mean.abs() + std), std, 1.0)  # a feature that is always the same says nothing
    return torch.cat([((part.double() - mean) / std).float() for part in parts]), mean, std
