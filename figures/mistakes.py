"""Draw a model's mistakes: confusion matrix, accuracy of each class, calibration, most confident errors.

    predictions = predict(model, loader, prepare, precision=precision)           # engine.predict
    figure = mistakes_figure(predictions, dataset.targets[predictions.indices], names, lambda i: picture of image i)
    figure.savefig('mistakes.png')

Each part is also a figure of its own. Rows of a confusion matrix [K, K] are true classes, columns predicted ones.
"""
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from utils.pictures import BLUE, ORANGE, SEQUENTIAL, drawable, image_sheet, new_figure

BINS = 15  # of confidence, as in Guo et al.
# Largest number of classes with counts in the cells, with names beside the rows, with own rows, and with own bars.
MOST_COUNTS, MOST_NAMES, MOST_ROWS, MOST_BARS = 12, 40, 200, 24
PAIRS, ERRORS = 16, 12  # confused pairs, and wrong images, shown


# --- Numbers ----------------------------------------------------------------------------------------------------------

class Calibration(NamedTuple):
    """Confidence and accuracy in `BINS` bins of equal width (Guo et al., 2017); NaN in empty bins."""
    counts: np.ndarray  # of images, [BINS]
    confidence: np.ndarray  # mean in 0…1, [BINS]
    accuracy: np.ndarray  # in 0…1, [BINS]
    error: float  # expected calibration error: mean of |accuracy - confidence| over images (equation 3)


def confusion_matrix(targets: np.ndarray, predicted: np.ndarray, num_classes: int) -> np.ndarray:
    """Return the numbers of images [K, K] by true class (row) and predicted class (column), from two arrays [n]."""
    pairs = np.asarray(targets) * num_classes + np.asarray(predicted)
    return np.bincount(pairs, minlength=num_classes ** 2).reshape(num_classes, num_classes)


def class_accuracy(matrix: np.ndarray) -> np.ndarray:
    """Return the accuracy of each class, [K] in 0…1; NaN for a class without images."""
    return _shares(matrix).diagonal()


def most_confused(matrix: np.ndarray, limit: int) -> list[tuple[int, int, int]]:
    """Return up to `limit` triples (true class, predicted class, number of images), most images first."""
    errors = matrix.copy()
    np.fill_diagonal(errors, 0)
    order = np.argsort(-errors, axis=None, kind='stable')[:limit]
    pairs = zip(*np.unravel_index(order, errors.shape), strict=True)
    return [(int(true), int(predicted), int(errors[true, predicted])) for true, predicted in pairs
            if errors[true, predicted]]


def calibrate(confidence: np.ndarray, right: np.ndarray) -> Calibration:
    """Return the calibration of predictions from their confidence in 0…1 [n] and whether they are right [n]."""
    edges = np.linspace(0, 1, BINS + 1)
    bins = np.digitize(confidence, edges[1:-1], right=True)  # a bin includes its upper edge
    counts = np.bincount(bins, minlength=BINS)
    with np.errstate(invalid='ignore'):
        means, accuracy = (np.bincount(bins, weights=values, minlength=BINS) / counts for values in (confidence, right))
    gaps = np.nan_to_num(np.abs(accuracy - means))
    return Calibration(counts, means, accuracy, float((gaps * counts).sum() / max(1, counts.sum())))


def most_confident_errors(predictions, targets: np.ndarray, limit: int) -> np.ndarray:
    """Return the rows of `predictions` with a wrong first class, the most probable first."""
    wrong = np.flatnonzero(predictions.classes[:, 0] != targets)
    return wrong[np.argsort(-predictions.probabilities[wrong, 0], kind='stable')][:limit]


def _shares(matrix: np.ndarray) -> np.ndarray:
    """Return each row divided by its sum; NaN if that is 0."""
    totals = matrix.sum(1, keepdims=True)
    return np.divide(matrix, totals, out=np.full(matrix.shape, np.nan), where=totals > 0)


# --- Figures ----------------------------------------------------------------------------------------------------------

def mistakes_figure(predictions, targets: np.ndarray, names: Sequence[str],
                    pictures: Callable[[int], np.ndarray]) -> Figure:
    """Draw all parts in one figure.

    Args:
        predictions: of engine.predict, for n images: `indices` [n], `classes` [n, k] and `probabilities` [n, k].
        targets: true classes [n].
        names: of all classes.
        pictures: index in the data set → image [H, W, 3], uint8.
    """
    targets = np.asarray(targets)
    matrix = confusion_matrix(targets, predictions.classes[:, 0], len(names))
    figure = new_figure(16, 13.5)
    above, below = figure.subfigures(2, 1, squeeze=False, height_ratios=(1.1, 1), hspace=0.04).ravel()
    left, right = above.subfigures(1, 2, width_ratios=(1.35, 1), wspace=0.03)
    confusion_figure(matrix, names, left)
    accuracy_figure(matrix, names, right)
    left, right = below.subfigures(1, 2, width_ratios=(1, 1.6), wspace=0.03)
    reliability_figure(predictions, targets, left)
    errors_figure(predictions, targets, names, pictures, right)
    return figure


def confusion_figure(matrix: np.ndarray, names: Sequence[str],
                     figure: Figure | SubFigure | None = None) -> Figure | SubFigure:
    """Draw a confusion matrix in shares of the true class; for many classes also list the most confused pairs."""
    figure = figure or new_figure(9, 7)
    count = len(names)
    right, total = int(matrix.trace()), int(matrix.sum())
    figure.suptitle(f'Confusion matrix: {right:,} of {total:,} images right ({100 * right / max(1, total):.1f} %)')
    ratios = (1,) if count <= MOST_COUNTS else (2, 1)
    axes, *beside = figure.subplots(1, len(ratios), squeeze=False, width_ratios=ratios)[0]
    step = -(-count // MOST_ROWS)  # very many classes share rows, so that no error falls between pixels
    edges = np.arange(0, count, step)
    shares = _shares(np.add.reduceat(np.add.reduceat(matrix, edges, axis=0), edges, axis=1))
    # Colours by the square root, so that errors are visible beside a diagonal near 1.
    image = axes.imshow(shares, norm=PowerNorm(0.5, 0, 1), cmap=SEQUENTIAL, interpolation='nearest', aspect='equal',
                        extent=(-0.5, count - 0.5, count - 0.5, -0.5))
    bar = figure.colorbar(image, ax=axes, shrink=0.7, ticks=(0, 0.01, 0.05, 0.2, 0.5, 1))
    bar.ax.yaxis.set_major_formatter(PercentFormatter(1, symbol=' %'))
    bar.set_label('share of the true class')
    axes.set_xlabel('predicted class' if step == 1 else f'predicted class (number; {step} to a column)')
    axes.set_ylabel('true class' if step == 1 else f'true class (number; {step} to a row)')
    if count <= MOST_NAMES:
        size = 9 if count <= MOST_COUNTS else 6.5
        short = [shorten(name, 18) for name in names]
        style = {'fontsize': size, 'parse_math': False}  # names may have dollars
        axes.set_xticks(range(count), short, rotation=0 if max(map(len, short)) < 4 else 90, **style)
        axes.set_yticks(range(count), short, **style)
    if count <= MOST_COUNTS:
        for (row, column), number in np.ndenumerate(matrix):
            if number:
                axes.text(column, row, f'{number:,}', ha='center', va='center', fontsize=8 if count > 4 else 14,
                          color='black' if shares[row, column] > 0.4 else 'white')
    for panel in beside:
        _write_pairs(panel, matrix, names)
    return figure


def _write_pairs(axes, matrix: np.ndarray, names: Sequence[str]) -> None:
    axes.set_axis_off()
    pairs = most_confused(matrix, PAIRS)
    lines = [f'{number:>4,}  {shorten(names[true], 18)} → {shorten(names[predicted], 18)}'
             for true, predicted, number in pairs]
    axes.set_title('Most confused: true → predicted', fontsize=9, loc='left')
    axes.text(0, 1, '\n'.join(lines) or 'no class is taken for another', fontsize=7.5, va='top', linespacing=1.6,
              transform=axes.transAxes, parse_math=False)


def accuracy_figure(matrix: np.ndarray, names: Sequence[str],
                    figure: Figure | SubFigure | None = None) -> Figure | SubFigure:
    """Draw the accuracy of each class as bars, worst first; for many classes only the worst and the best ones."""
    figure = figure or new_figure(7, 6)
    accuracy, counts = class_accuracy(matrix), matrix.sum(1)
    order = np.argsort(accuracy, kind='stable')[:np.isfinite(accuracy).sum()]  # NaN comes last
    shown, gap = list(order), 0
    if len(order) > MOST_BARS:
        gap = MOST_BARS // 2
        shown = [*order[:gap], *order[-gap:]]
    axes = figure.subplots()
    places = np.array([place + (place >= gap > 0) for place in range(len(shown))])
    values = 100 * accuracy[shown]
    axes.barh(places, values, color=BLUE, height=0.75)
    for place, value in zip(places, values, strict=True):
        axes.text(108, place, f'{value:.1f}', ha='right', va='center', fontsize=8)
    if gap:
        axes.text(1, gap, f'… {len(order) - 2 * gap:,} classes between …', va='center', fontsize=8)
    axes.set_yticks(places, [f'{shorten(names[k], 24)} ({counts[k]:,})' for k in shown], fontsize=8,
                    parse_math=False)
    axes.set_ylim(len(shown) + bool(gap) - 0.4, -0.6)
    axes.set_xlim(0, 109)
    axes.set_xticks(range(0, 101, 20))
    axes.set_xlabel('accuracy, % (in brackets: images of the class)')
    mean = 100 * np.nanmean(accuracy) if len(order) else 0.0
    axes.axvline(mean, color=ORANGE, linestyle='--', linewidth=1.2)
    without = len(accuracy) - len(order)
    figure.suptitle(f'Accuracy of each class; dashed: their mean, {mean:.1f} %'
                    + (f' ({without:,} have no images)' if without else ''))
    for side in ('top', 'right'):
        axes.spines[side].set_visible(False)
    return figure


def reliability_figure(predictions, targets: np.ndarray,
                       figure: Figure | SubFigure | None = None) -> Figure | SubFigure:
    """Draw accuracy against confidence in bins, with the number of images in each (Guo et al., 2017, figure 1)."""
    figure = figure or new_figure(6, 6)
    confidence = predictions.probabilities[:, 0]
    calibration = calibrate(confidence, predictions.classes[:, 0] == targets)
    edges = np.linspace(0, 1, BINS + 1)
    style = {'width': 1 / BINS, 'align': 'edge', 'edgecolor': 'white', 'linewidth': 0.8}
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    upper.bar(edges[:-1], calibration.accuracy, color=BLUE, label='accuracy', **style)
    low, high = (pick(calibration.accuracy, calibration.confidence) for pick in (np.minimum, np.maximum))
    upper.bar(edges[:-1], high - low, bottom=low, label='up or down to mean confidence', width=1 / BINS, align='edge',
              facecolor='none', edgecolor=ORANGE, hatch='////', linewidth=1)
    upper.plot([0, 1], [0, 1], color='black', linestyle='--', linewidth=1, label='as sure as right')
    upper.set_ylabel('accuracy')
    upper.set_ylim(0, 1)
    upper.legend(fontsize=8, loc='lower left', bbox_to_anchor=(0, 1), ncols=3, frameon=False, borderaxespad=0.2)
    lower.bar(edges[:-1], calibration.counts, color=BLUE, **style)
    lower.set_ylabel('images')
    lower.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    lower.set_xlim(0, 1)
    lower.set_xlabel('confidence: probability of the predicted class')
    figure.suptitle(f'Reliability: expected calibration error {100 * calibration.error:.1f} %')
    return figure


def errors_figure(predictions, targets: np.ndarray, names: Sequence[str], pictures: Callable[[int], np.ndarray],
                  figure: Figure | SubFigure | None = None) -> Figure | SubFigure:
    """Draw the wrongly classified images with the highest confidence."""
    rows = most_confident_errors(predictions, targets, ERRORS)
    titles = []
    for row in rows:
        true, predicted = (shorten(names[k], 24) for k in (targets[row], predictions.classes[row, 0]))
        line_break = '\n' if len(true) + len(predicted) > 20 else ' '
        titles.append(f'{true} →{line_break}{predicted} ({100 * predictions.probabilities[row, 0]:.1f} %)')
    wrong = int((predictions.classes[:, 0] != targets).sum())
    title = (f'The {len(rows)} most confident of {wrong:,} errors: true → predicted, probability' if wrong
             else f'No errors among {len(targets):,} images')
    return image_sheet((pictures(int(predictions.indices[row])) for row in rows), titles, columns=4, title=title,
                       figure=figure)


def shorten(name: str, length: int) -> str:
    """Return a name of at most `length` drawable letters on one line; draw it with parse_math=False."""
    name = drawable(' '.join(name.split()))
    return name if len(name) <= length else name[:length - 1].rstrip() + '…'
