"""Draw what a model attends to in an image, what speaks for a class, and what the token layers attend to.

    from figures.attention import attention_figure
    attention_figure(model, image, picture).savefig('attention.png')
"""
import math
import textwrap
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure, SubFigure
from matplotlib.image import AxesImage

from figures.explain import (
    ClassRelevance,
    PerformerWeights,
    SeenAttention,
    Stage,
    class_relevance,
    classifier_attention,
    token_stages,
)
from figures.places import Places, has_soft_splits
from utils.console import percent
from utils.errors import UserError
from utils.pictures import ORANGE, SEQUENTIAL, drawable, new_figure

PUBLISHED_BLOCKS = (4, 5)  # shown in the authors' figure of attention, counted from 1
WIDTH = 11.5  # inches, of a figure
LEAST_COLUMNS = 4  # of a row of panels; fewer panels are centred
# Small values are transparent, so that the photograph stays visible.
OVERLAY = ListedColormap([(*colormaps[SEQUENTIAL](value)[:3], min(0.7, 1.4 * value))
                          for value in np.linspace(0, 1, 256)], name='overlay')


def attention_figure(model: torch.nn.Module, image: torch.Tensor, picture: np.ndarray, *,
                     names: Sequence[str] | None = None, target: int | None = None,
                     blocks: Sequence[int] | None = None, queries: Sequence[tuple[int, int]] | None = None,
                     title: str = '') -> Figure:
    """Draw the attention of the classifier's input in all blocks, of chosen heads, and of tokens in the token layers.

    Above them are what speaks for a class and for the most probable other one.

    Args:
        model: a T2T-ViT, or a ViT of timm, which has no token layers.
        image: normalised, [1, C, height, width].
        picture: the same for people, uint8 [height, width, 3].
        names: of the classes; their numbers by default.
        target: number of the class to explain, by default the most probable one.
        blocks: blocks whose heads are shown, counted from 1; by default 4 and 5, as published.
        queries: (row, column) on the last grid of tokens whose token layers are shown; three by default.
        title: above the figure.

    Raises:
        UserError: no such class, block or token; NotSeen if the model has no attention that can be shown.
    """
    seen = classifier_attention(model, image)
    reasons = explain_class(model, image, target)
    blocks = check_blocks(blocks, len(seen.blocks))
    H, W = seen.places.grid
    queries = [check_token(query, (H, W)) for query in queries or _default_queries(H, W)]
    stages = token_stages(model, image) if has_soft_splits(model) else []
    layers = _seen_in_layers(stages, seen.places, queries)

    depth, heads = seen.blocks.shape[:2]
    shape = picture.shape[0] / picture.shape[1]
    most = min(max(round(8 * math.sqrt(shape)), 4), 10)  # panels beside one another: more if they are narrow
    columns, heads_in_row = (math.ceil(count / math.ceil(count / most)) for count in (depth, heads))

    def height(rows, columns):  # inches, of panels with their titles
        return rows * (min((WIDTH - 1) / columns, 1.8) * shape + 0.3) + 0.5

    heights = [min((WIDTH - 1) / (2 + len(reasons)) * shape, 4.5) + 0.8, height(math.ceil(depth / columns), columns),
               height(len(blocks) * math.ceil(heads / heads_in_row), heads_in_row)]
    if layers:
        shown = sum(layer.total >= 0.01 for layer in layers)
        heights.append((height(1, max(shown, LEAST_COLUMNS)) if shown else 0.3) + 0.25 * (shown < len(layers)))
    figure = new_figure(WIDTH, sum(heights) + 0.4)
    parts = iter(figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False).ravel())
    _draw_reasons(next(parts), picture, seen, reasons, names, queries if layers else [])
    _draw_maps(next(parts), picture, seen.places, columns,
               [(f'block {number + 1}', block.mean(0)) for number, block in enumerate(seen.blocks)],
               f'What each block attends to: {seen.source}, mean of the heads  '
               '(in brackets: the largest value over an even share)')
    listed = ' and '.join(map(str, blocks)) if len(blocks) < 3 else ', '.join(map(str, blocks))
    padding = [None] * (-heads % heads_in_row)  # so that each block begins a row
    _draw_maps(next(parts), picture, seen.places, heads_in_row,
               [panel for block in blocks for panel in (*(
                   (f'{block} · head {head + 1}', seen.blocks[block - 1, head]) for head in range(heads)), *padding)],
               f'Each head of block{"s" * (len(blocks) > 1)} {listed}: {seen.source}')
    if layers:
        has_performer = isinstance(stages[0].weights, PerformerWeights)
        _draw_token_layers(next(parts), picture, layers,
                           'implied weights of the Performer' if has_performer else 'softmax weights')
    add_title(figure, title)
    return figure


def explain_class(model: torch.nn.Module, image: torch.Tensor, target: int | None) -> list[ClassRelevance]:
    """Return what speaks for a class, by default the most probable one, and for the most probable other one."""
    likely = class_relevance(model, image)
    if target is None or target == likely[0].number:
        return likely
    return [*class_relevance(model, image, [target]), likely[0]]


def check_blocks(blocks: Sequence[int] | None, depth: int) -> list[int]:
    """Return the given blocks, else the published ones that exist, else the last; raise UserError if out of range."""
    for block in blocks or ():
        if not 1 <= block <= depth:
            raise UserError(f'block {block} does not exist; the model has blocks 1 to {depth} that attend')
    return list(blocks or [block for block in PUBLISHED_BLOCKS if block <= depth] or [depth])


def check_token(token: Sequence[int], grid: tuple[int, int]) -> tuple[int, int]:
    """Return (row, column) of a token, or raise UserError if the grid does not have it."""
    if not (0 <= token[0] < grid[0] and 0 <= token[1] < grid[1]):
        raise UserError(f'token {token[0]} {token[1]} does not exist; the last grid has rows 0 to {grid[0] - 1} and '
                        f'columns 0 to {grid[1] - 1} at this image size')
    row, column = token
    return row, column


def add_title(figure: Figure, title: str) -> None:
    """Add a title, wrapped to the figure's width; file names may contain dollars and bytes that are not text."""
    title = textwrap.fill(drawable(title), int(8.5 * figure.get_figwidth()))
    if title:
        figure.suptitle(title, fontsize=13, parse_math=False)


def draw_overlay(axes: Axes, picture: np.ndarray, values: np.ndarray, title: str = '', **style) -> AxesImage:
    """Draw a value for each pixel [height, width] over the picture [height, width, 3] in grey."""
    axes.imshow(picture.mean(2), cmap='gray', vmin=0, vmax=255)
    drawn = axes.imshow(values, **{'cmap': OVERLAY, 'interpolation': 'nearest', **style})
    axes.set_axis_off()
    axes.set_title(title, fontsize=8, pad=3, parse_math=False)
    return drawn


def draw_attention(axes: Axes, picture: np.ndarray, values: torch.Tensor, places: Places, name: str = '') -> AxesImage:
    """Draw the values of tokens [H, W], as parts of the largest one, over the pixels where the tokens lie.

    The title is `name`, if given, and the largest value over an even share.
    """
    strengths, peak = _strengths(values)
    size = (picture.shape[0], picture.shape[1])
    title = f'{name}  ({peak:.1f}×)' if name else ''
    return draw_overlay(axes, picture, places.spread(strengths, size), title, vmin=0, vmax=1)


def add_colorbar(part: SubFigure, drawn: AxesImage, panels, label: str, **place) -> None:
    """Add a color bar with small text beside panels, by default a thin one."""
    bar = part.colorbar(drawn, ax=panels, **(place or {'fraction': 0.03, 'pad': 0.01, 'aspect': 25}))
    bar.set_label(label, fontsize=8)
    bar.ax.tick_params(labelsize=7)


def _mark(axes: Axes, pixel: tuple[float, float], label: str = '') -> None:
    """Mark a pixel (y, x) of a picture, with a label."""
    y, x = pixel
    axes.plot(x, y, 'o', markersize=7, markerfacecolor='none', markeredgecolor='white', markeredgewidth=3)
    axes.plot(x, y, 'o', markersize=7, markerfacecolor='none', markeredgecolor=ORANGE, markeredgewidth=1.5)
    if label:
        axes.annotate(label, (x, y), xytext=(6, 3), textcoords='offset points', fontsize=9, fontweight='bold',
                      bbox={'boxstyle': 'round,pad=0.15', 'facecolor': 'white', 'edgecolor': 'none', 'alpha': 0.85})


def _default_queries(H: int, W: int) -> list[tuple[int, int]]:
    """Return three tokens on the diagonal of a grid, or fewer of a small grid."""
    return list(dict.fromkeys((quarter * H // 4, quarter * W // 4) for quarter in (1, 2, 3)))


def _strengths(values: torch.Tensor) -> tuple[np.ndarray, float]:
    """Return attention relative to its largest value, and that value relative to an even share of all tokens."""
    numbers = values.double().cpu().numpy()
    peak = max(float(numbers.max()), 1e-30)
    return numbers / peak, peak / max(float(numbers.mean()), 1e-30)


def _panels(part: SubFigure, rows: int, columns: int, count: int) -> np.ndarray:
    """Return axes [rows, columns] without frames; for a single row, those from the first of `count` centred ones."""
    panels = part.subplots(rows, columns, squeeze=False)
    for axes in panels.ravel():
        axes.set_axis_off()
    start = (columns - count) // 2 if rows == 1 else 0
    return panels.ravel()[start:].reshape(1, -1) if start else panels


def _draw_reasons(part: SubFigure, picture: np.ndarray, seen: SeenAttention, reasons: Sequence[ClassRelevance],
                  names: Sequence[str] | None, queries: Sequence[tuple[int, int]]):
    """Draw the image with the queries marked, the rollout, and what speaks for each class."""
    image, rollout, *panels = part.subplots(1, 2 + len(reasons))
    image.imshow(picture, interpolation='nearest')
    image.set_axis_off()
    image.set_title('The image' + (', and tokens whose\ntoken layers are shown below' if queries else ''), fontsize=9)
    for letter, query in zip('ABC', queries, strict=False):
        _mark(image, seen.places.centre(query), letter)
    drawn = draw_attention(rollout, picture, seen.rollout, seen.places)
    rollout.set_title(f'Attention rollout, {seen.source}\n'
                      f'(largest {_strengths(seen.rollout)[1]:.1f} times an even share)', fontsize=9)
    for axes, reason in zip(panels, reasons, strict=True):
        draw_attention(axes, picture, reason.tokens, seen.places)
        name = names[reason.number] if names else f'class {reason.number}'
        said = 'What speaks for' if reason.tokens.any() else 'Nothing speaks for'
        axes.set_title(drawable(textwrap.shorten(f'{said} {name}', 34, placeholder='…'))
                       + f'\n({percent(reason.probability)} sure)', fontsize=9, parse_math=False)
    add_colorbar(part, drawn, [rollout, *panels], 'part of the largest')


def _draw_maps(part: SubFigure, picture: np.ndarray, places: Places, columns: int,
               maps: Sequence[tuple[str, torch.Tensor] | None], title: str):
    """Draw (name, attention [H, W]) in rows of panels, None as an empty panel, with a common scale."""
    panels = _panels(part, math.ceil(len(maps) / columns), columns, len(maps))
    for axes, named in zip(panels.ravel(), maps, strict=False):
        if named:
            drawn = draw_attention(axes, picture, named[1], places, named[0])
    part.suptitle(title, fontsize=10)
    add_colorbar(part, drawn, panels, 'part of the largest')


class _SeenInLayer(NamedTuple):
    """What the token of a token layer at a marked pixel has attended to."""
    name: str
    pixel: tuple[float, float]
    places: Places
    weights: torch.Tensor  # [H, W]

    @property
    def total(self) -> float:
        """Sum of the weights; a Performer's token may attend to nothing."""
        return float(self.weights.sum())


def _seen_in_layers(stages: Sequence[Stage], last: Places, queries: Sequence[tuple[int, int]]) -> list[_SeenInLayer]:
    """Return what the tokens at the centres of `queries`, tokens of the last grid, attend to in each token layer."""
    seen = []
    for stage, number in zip(stages, ('one', 'two', 'three'), strict=False):
        if stage.weights is None:
            continue
        pixels = [last.centre(query) for query in queries]
        tokens = [stage.places.nearest(pixel) for pixel in pixels]
        rows = stage.weights.rows([row * stage.grid[1] + column for row, column in tokens])[0]  # [queries, H · W]
        seen += [_SeenInLayer(f'stage {number}, {letter}', pixel, stage.places, row.unflatten(0, stage.grid))
                 for letter, pixel, row in zip('ABC', pixels, rows, strict=False)]
    return seen


def _draw_token_layers(part: SubFigure, picture: np.ndarray, layers: Sequence[_SeenInLayer], kind: str):
    """Draw what the marked tokens attend to; those that attend to nothing are named."""
    shown = [layer for layer in layers if layer.total >= 0.01]
    nothing = ' · '.join(layer.name for layer in layers if layer.total < 0.01)
    sizes = ' and '.join('{} × {}'.format(*grid) for grid in dict.fromkeys(layer.places.grid for layer in layers))
    title = f'Token layers: {kind} of the marked tokens, on {sizes} tokens'
    if nothing:
        title += f'\nThese attend to nothing (their weights sum to less than 0.01) and pass unchanged: {nothing}'
    part.suptitle(title, fontsize=10)
    if not shown:
        return
    panels = _panels(part, 1, max(len(shown), LEAST_COLUMNS), len(shown))
    for axes, layer in zip(panels[0], shown, strict=False):
        drawn = draw_attention(axes, picture, layer.weights, layer.places, layer.name)
        if layer.total < 0.99:
            axes.set_title(f'{axes.get_title()}\nsum {layer.total:.2f}', fontsize=8, pad=3)
        _mark(axes, layer.pixel)
    add_colorbar(part, drawn, panels, 'part of the largest')
