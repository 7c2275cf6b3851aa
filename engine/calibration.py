"""How far a number may be trusted: the interval of an accuracy, and the error of a model's own confidence."""
import math

import numpy as np

# Quantile of the normal distribution for an interval that holds the true value with 95 %.
Z_95 = 1.959963984540054
BINS = 15


def wilson_interval(right: int, count: int) -> tuple[float, float]:
    """Return both ends, in percent, of the 95 % interval of an accuracy of `right` out of `count` images.

    Wilson's score interval (1927): unlike the normal one it is within 0…100, and right for few images too.
    """
    share, squared = right / count, Z_95 ** 2
    centre = (share + squared / (2 * count)) / (1 + squared / count)
    half = Z_95 / (1 + squared / count) * math.sqrt(share * (1 - share) / count + squared / (4 * count ** 2))
    # An end at 0 or 1 is exact; computed, it is so but for rounding.
    return 100 * (centre - half) if right else 0.0, 100 * (centre + half) if right < count else 100.0


def calibration_error(confidence: np.ndarray, right: np.ndarray) -> float:
    """Return the expected calibration error in percent; NaN if a confidence is.

    It is the mean distance between confidence and accuracy over 15 bins of equal width, weighted by their images
    (Guo et al. 2017, equation 3).

    Args:
        confidence: probability of the first guess, [n] in 0…1.
        right: whether that guess is right, [n].
    """
    if not np.isfinite(confidence).all():
        return math.nan
    confidence = confidence.astype(np.float64)
    bins = np.clip(np.ceil(confidence * BINS).astype(np.int64) - 1, 0, BINS - 1)  # bin m holds (m / 15, (m + 1) / 15]
    gaps = np.bincount(bins, weights=confidence - right, minlength=BINS)  # images times (confidence - accuracy)
    return 100 * float(np.abs(gaps).sum()) / len(confidence)
