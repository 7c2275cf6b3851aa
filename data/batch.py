"""From the loader's uint8 batches to the model's input: normalised, mixed and erased on the device.

The training step calls a preparer when it uses the batch, never ahead. Mixup draws from numpy's global generator,
erasing from those of `random` and torch. So a checkpoint that saves their states continues with the same numbers.
"""
from collections.abc import Sequence

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, Mixup
from timm.data.mixup import cutmix_bbox_and_lam
from timm.data.random_erasing import RandomErasing
from torch.nn.functional import interpolate

from data.token_targets import WHOLE, TokenTargets, add_truth, crop_targets, draw_box, exchange
from data.transforms import per_channel
from utils.errors import UserError


class BatchPreparer:
    """Moves a batch to the device and normalises it: uint8 [B, C, H, W] → float32 (x − 255·mean) / (255·std).

    mean, std: three values, or one, for images in 0…1.
    """

    def __init__(self, device: torch.device | str, *, mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
                 std: Sequence[float] = IMAGENET_DEFAULT_STD, channels_last: bool = False):
        self.device = torch.device(device)
        self._mean = self._as_levels('mean', mean)
        self._std = self._as_levels('std', std)
        self._memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self._copies = torch.cuda.Stream(self.device) if self.device.type == 'cuda' else None

    def __call__(self, images: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return `images`, uint8 [B, C, H, W], as float32, and `targets`, int64 [B], both on the device."""
        images, targets = self._move(images), self._move(targets)
        if self.device.type == 'cpu':
            return self._normalize_one_by_one(images), targets
        # Reorder before the conversion: one byte per pixel instead of four.
        images = images.contiguous(memory_format=self._memory_format).to(torch.float32)
        return images.sub_(self._mean).div_(self._std), targets

    def _move(self, batch: torch.Tensor) -> torch.Tensor:
        """Return `batch` on the device; from pinned memory it is copied while the device still computes."""
        if self._copies is None or not batch.is_pinned():
            return batch.to(self.device)
        with torch.cuda.stream(self._copies):
            moved = batch.to(self.device, non_blocking=True)
        computing = torch.cuda.current_stream(self.device)
        computing.wait_stream(self._copies)
        moved.record_stream(computing)  # no later copy may take its memory before it is read
        return moved

    def _normalize_one_by_one(self, images: torch.Tensor) -> torch.Tensor:
        """Return the same numbers on a CPU, whose caches hold an image but not a batch."""
        normalized = torch.empty_like(images, dtype=torch.float32, memory_format=self._memory_format)
        for row, image in zip(normalized, images, strict=True):
            row.copy_(image).sub_(self._mean[0]).div_(self._std[0])
        return normalized

    def denormalize(self, images):
        """Return normalised images [B, C, H, W] as 0…1, for people to look at."""
        return (images * self._std + self._mean).div(255).clamp(0, 1)

    def _as_levels(self, name, values):
        levels = [255 * value for value in per_channel(name, values)]
        return torch.tensor(levels, device=self.device).view(1, 3, 1, 1)


class TrainBatchPreparer(BatchPreparer):
    """Adds timm's Mixup or CutMix, then its random erasing, in the order of the published training.

    Images may also be uint8 [B, S, C, H, W] with the S = `aug_splits` versions of AugMix. The output is then
    [S·B, C, H, W], all first versions first, with the targets repeated.

    batch_size: B, checked here and not only in the first step.
    num_classes, smoothing: of Mixup's soft targets.
    mixup_alpha, cutmix_alpha: of the beta distributions; 0 for off.
    cutmix_minmax: (min, max) of the box's edge as a fraction of the image's, replaces cutmix_alpha.
    mixup_prob: of mixing at all. mixup_switch_prob: of CutMix if both are on.
    mixup_mode: what shares random numbers: 'batch', 'pair' or 'elem'; with the last two the host waits for the device.
    erase_prob, erase_mode ('pixel', 'rand', 'const'), erase_count: of random erasing.
    erase_splits: do not erase AugMix's first versions, or without AugMix the first half of the batch.

    Raises UserError for an odd batch with Mixup, Mixup together with AugMix, and values out of range.

    mixing: whether targets are soft, float32 [B, num_classes]; it never changes.
    """

    def __init__(
            self, device: torch.device | str, *, batch_size: int, num_classes: int,
            mean: Sequence[float] = IMAGENET_DEFAULT_MEAN, std: Sequence[float] = IMAGENET_DEFAULT_STD,
            channels_last: bool = False, aug_splits: int = 0, mixup_alpha: float = 0.0, cutmix_alpha: float = 0.0,
            cutmix_minmax: Sequence[float] | None = None, mixup_prob: float = 1.0, mixup_switch_prob: float = 0.5,
            mixup_mode: str = 'batch', smoothing: float = 0.1, erase_prob: float = 0.0, erase_mode: str = 'pixel',
            erase_count: int = 1, erase_splits: bool = False):
        super().__init__(device, mean=mean, std=std, channels_last=channels_last)
        for name, value in (('mixup_prob', mixup_prob), ('mixup_switch_prob', mixup_switch_prob),
                            ('erase_prob', erase_prob), ('smoothing', smoothing)):
            if not 0 <= value <= 1:
                raise UserError(f'{name} {value}; give a fraction from 0 to 1')
        if min(mixup_alpha, cutmix_alpha) < 0:
            raise UserError(f'mixup_alpha {mixup_alpha}, cutmix_alpha {cutmix_alpha}; give 0 or more')
        self._aug_splits = aug_splits
        self._mixup: Mixup | None = None
        self.mixing = mixup_alpha > 0 or cutmix_alpha > 0 or cutmix_minmax is not None
        if self.mixing:
            _check_mixing(batch_size, aug_splits, mixup_mode, cutmix_minmax)
            kind = PairwiseMixup if self.device.type == 'cpu' else Mixup
            self._mixup = kind(mixup_alpha, cutmix_alpha, cutmix_minmax, prob=mixup_prob, mode=mixup_mode,
                               switch_prob=mixup_switch_prob, label_smoothing=smoothing, num_classes=num_classes)
        self._erase = None
        if erase_prob:
            if erase_mode not in ('pixel', 'rand', 'const') or erase_count < 1:
                raise UserError(f'erase_mode {erase_mode!r}, erase_count {erase_count}; '
                                'choose pixel, rand or const, and at least 1')
            num_splits = (aug_splits or 2) if erase_splits else 0
            self._erase = RandomErasing(erase_prob, mode=erase_mode, max_count=erase_count,
                                        num_splits=num_splits, device=self.device)

    @property
    def mixup_enabled(self) -> bool:
        """Whether batches are mixed now. False, for the last epochs, leaves smoothed targets."""
        return self._mixup is not None and self._mixup.mixup_enabled

    @mixup_enabled.setter
    def mixup_enabled(self, enabled: bool):
        if self._mixup:
            self._mixup.mixup_enabled = enabled

    def __call__(self, images: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return `images`, uint8 [B, C, H, W] or [B, S, C, H, W], and `targets`, int64 [B], as the model takes them."""
        if self._aug_splits:
            # On the device: a copy on the host would not be page-locked.
            images, targets = self._move(images), self._move(targets)
            images = images.transpose(0, 1).flatten(0, 1)  # [S·B, C, H, W]
            targets = targets.repeat(self._aug_splits)  # [S·B]
        images, targets = super().__call__(images, targets)
        if self._mixup:
            images, targets = self._mixup(images, targets)
        if self._erase:
            images = self._erase(images)
        return images, targets


class TokenLabelPreparer(TrainBatchPreparer):
    """Adds random erasing, and makes targets of token labels for images that exchange tokens (MixToken).

    grid: rows and columns of the model's tokens. window: what they cover of an image (see `crop_targets`).
    transposed: crop label maps at transposed coordinates, as the published code does.
    ground_truth: add a share of the true class to the target of an image.
    options: of TrainBatchPreparer, without Mixup and CutMix.
    """

    def __init__(self, device: torch.device | str, *, grid: tuple[int, int], window: Sequence[float] = WHOLE,
                 transposed: bool = False, ground_truth: bool = False, num_classes: int, smoothing: float = 0.1,
                 **options):
        super().__init__(device, num_classes=num_classes, smoothing=smoothing, **options)
        self._grid, self._window, self._transposed = grid, window, transposed
        self._num_classes, self._smoothing, self._ground_truth = num_classes, smoothing, ground_truth

    def __call__(  # type: ignore[override]  # the loader of token labels gives more
            self, images: torch.Tensor, targets: torch.Tensor, maps: torch.Tensor,
            boxes: torch.Tensor) -> tuple[torch.Tensor, TokenTargets]:
        """Return images as TrainBatchPreparer, and their targets; `maps` and `boxes` as `crop_targets` takes them."""
        images, truth = super().__call__(images, targets)
        image, tokens = crop_targets(
            self._move(maps), self._move(boxes), num_classes=self._num_classes, grid=self._grid,
            smoothing=self._smoothing, window=self._window, transposed=self._transposed)
        if self._ground_truth:
            image = add_truth(image, truth, smoothing=self._smoothing)
        return images, exchange(image, tokens, draw_box(self._grid), self._grid)


class Readjustment:
    """Turns images as one model takes them into those that another one takes: other statistics, another size.

    For a teacher, which sees what its student sees, but as its own training showed it. Images that need no change are
    returned as they are.

    Args:
        mean, std, other_mean, other_std: three values, or one, for images in 0…1.
        other_size: (height, width) in pixels.
    """

    def __init__(self, device: torch.device | str, *, mean: Sequence[float], std: Sequence[float],
                 other_mean: Sequence[float], other_std: Sequence[float], other_size: tuple[int, int]):
        own, others = (torch.tensor([per_channel('mean', one), per_channel('std', two)], dtype=torch.float64)
                       .view(2, 1, 3, 1, 1) for one, two in ((mean, std), (other_mean, other_std)))
        self._is_same = torch.equal(own, others)
        self._scale = (own[1] / others[1]).to(device, torch.float32)  # [1, 3, 1, 1], as the next
        self._shift = ((own[0] - others[0]) / others[1]).to(device, torch.float32)
        self._size = tuple(other_size)

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Return normalised images [B, 3, H, W] as float32 [B, 3, h, w], resized with antialiased bicubic."""
        if not self._is_same:
            images = torch.addcmul(self._shift, images, self._scale)
        if tuple(images.shape[-2:]) != self._size:
            images = interpolate(images, self._size, mode='bicubic', antialias=True)
        return images


class PairwiseMixup(Mixup):
    """timm's Mixup with the same numbers, pair by pair, for a CPU whose caches hold images but not a batch."""

    def _mix_batch(self, x: torch.Tensor) -> float:
        lam, use_cutmix = self._params_per_batch()
        if lam == 1:
            return lam
        if use_cutmix:
            (top, bottom, left, right), lam = cutmix_bbox_and_lam(
                x.shape, lam, ratio_minmax=self.cutmix_minmax, correct_lam=self.correct_lam)
            x = x[:, :, top:bottom, left:right]
        for first in range(len(x) // 2):
            one, other = x[first], x[-1 - first]
            before = one.clone()
            if use_cutmix:
                one.copy_(other)
                other.copy_(before)
            else:
                one.mul_(lam).add_(other * (1 - lam))
                other.mul_(lam).add_(before.mul_(1 - lam))
        return lam


def _check_mixing(batch_size: int, aug_splits: int, mode: str, cutmix_minmax: Sequence[float] | None):
    if batch_size % 2:
        raise UserError(f'batch size {batch_size} with Mixup or CutMix, which pair images; use an even one')
    if aug_splits:
        raise UserError(f'Mixup or CutMix with --aug-splits {aug_splits}; use one or the other')
    if mode not in ('batch', 'pair', 'elem'):
        raise UserError(f'mixup_mode {mode!r}; choose from batch, pair, elem')
    if cutmix_minmax is not None:
        if len(cutmix_minmax) != 2 or not 0 <= cutmix_minmax[0] < cutmix_minmax[1] <= 1:
            raise UserError(f'--cutmix-minmax {cutmix_minmax}; give two fractions such as 0.2 0.8')
