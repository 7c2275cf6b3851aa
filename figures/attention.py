"""Draw what a model attends to in an image: maps of the class token, attention rollout, weights of the token layers.

    from figures.attention import attention_figure
    attention_figure(model, image, picture).savefig('attention.png')
"""
import math
import textwrap
from collections.abc import Sequence

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.image import AxesImage

from figures.explain import SeenAttention, Stage, classifier_attention, has_soft_splits, token_stages
from utils.errors import UserError
from utils.pictures import ORANGE, SEQUENTIAL, drawable, new_figure

PUBLISHED_BLOCKS = (4, 5)  # shown in the authors' figure of attention, counted from 1
WIDTH = 11.5  # inches, of a figure
LEAST_COLUMNS = 4  # of a row of panels; fewer panels are centred


def attention_figure(model: torch.nn.Module, image: torch.Tensor, picture: np.ndarray, *,
                     blocks: Sequence[int] | None = None, queries: Sequence[tuple[int, int]] | None = None,
                     title: str = '') -> Figure:
    """Draw the attention of the classifier's input in all blocks, of chosen heads, and of tokens in the token layers.

    Args:
        model: a T2T-ViT, or a ViT of timm, which has no token layers.
        image: normalised, [1, C, height, width].
        picture: the same for people, uint8 [height, width, 3].
        blocks: blocks whose heads are shown, counted from 1; by default 4 and 5, as published.
        queries: (row, column) on the last grid of tokens whose token layers are shown; three by default.
        title: above the figure.

    Raises:
        UserError: no such block or token; NotSeen if the model has no attention that can be shown.
    """
    seen = classifier_attention(model, image)
    blocks = check_blocks(blocks, len(seen.blocks))
    H, W = seen.rollout.shape
    queries = [check_token(query, (H, W)) for query in queries or _default_queries(H, W)]
    stages = token_stages(model, image)[:2] if has_soft_splits(model) else []
    stages = [stage for stage in stages if stage.weights is not None]

    depth, heads = seen.blocks.shape[:2]
    shape = picture.shape[0] / picture.shape[1]
    most = min(max(round(8 * math.sqrt(shape)), 4), 10)  # panels beside one another: more if they are narrow
    columns, heads_in_row = (math.ceil(count / math.ceil(count / most)) for count in (depth, heads))

    def height(rows, columns):  # inches, of panels with their titles
        return rows * (min((WIDTH - 1) / columns, 1.8) * shape + 0.3) + 0.5

    heights = [min(4.5 * shape, 4.5) + 0.8, height(math.ceil(depth / columns), columns),
               height(len(blocks) * math.ceil(heads / heads_in_row), heads_in_row)]
    if stages:
        heights.append(height(1, max(2 * len(queries), LEAST_COLUMNS)) + 0.2)
    figure = new_figure(WIDTH, sum(heights) + 0.4)
    parts = iter(figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False).ravel())
    _draw_rollout(next(parts), picture, seen, queries if stages else [])
    _draw_maps(next(parts), picture, columns,
               [(f'block {number + 1}', block.mean(0)) for number, block in enumerate(seen.blocks)],
               f'What each block attends to: {seen.source}, mean of the heads  '
               '(in brackets: the largest value over an even share)')
    names = ' and '.join(map(str, blocks)) if len(blocks) < 3 else ', '.join(map(str, blocks))
    padding = [None] * (-heads % heads_in_row)  # so that each block begins a row
    _draw_maps(next(parts), picture, heads_in_row,
               [panel for block in blocks for panel in (*(
                   (f'{block} · head {head + 1}', seen.blocks[block - 1, head]) for head in range(heads)), *padding)],
               f'Each head of block{"s" * (len(blocks) > 1)} {names}: {seen.source}')
    if stages:
        _draw_token_layers(next(parts), picture, stages, queries, (H, W))
    add_title(figure, title)
    return figure


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
    """Draw values [H, W], enlarged to the picture [height, width, 3], over the picture in grey."""
    height, width = picture.shape[:2]
    axes.imshow(picture.mean(2), cmap='gray', vmin=0, vmax=255)
    style = {'cmap': SEQUENTIAL, 'alpha': 0.65, 'interpolation': 'nearest', **style}
    drawn = axes.imshow(values, extent=(-0.5, width - 0.5, height - 0.5, -0.5), **style)
    axes.set_axis_off()
    axes.set_title(title, fontsize=8, pad=3)
    return drawn


def add_colorbar(part: SubFigure, drawn: AxesImage, panels, label: str, **place) -> None:
    """Add a color bar with small text beside panels, by default a thin one."""
    bar = part.colorbar(drawn, ax=panels, **(place or {'fraction': 0.03, 'pad': 0.01, 'aspect': 25}))
    bar.set_label(label, fontsize=8)
    bar.ax.tick_params(labelsize=7)


def _mark_token(axes: Axes, token: tuple[int, int], grid: tuple[int, int], picture: np.ndarray,
                label: str = '') -> None:
    """Mark the centre of a token of `grid` on a picture, with a label."""
    y, x = ((position + 0.5) / cells * pixels - 0.5
            for position, cells, pixels in zip(token, grid, picture.shape, strict=False))
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


def _draw_attention(axes: Axes, picture: np.ndarray, values: torch.Tensor, name: str) -> AxesImage:
    strengths, peak = _strengths(values)
    return draw_overlay(axes, picture, strengths, f'{name}  ({peak:.1f}×)', vmin=0, vmax=1)


def _panels(part: SubFigure, rows: int, columns: int, count: int) -> np.ndarray:
    """Return axes [rows, columns] without frames; for a single row, those from the first of `count` centred ones."""
    panels = part.subplots(rows, columns, squeeze=False)
    for axes in panels.ravel():
        axes.set_axis_off()
    start = (columns - count) // 2 if rows == 1 else 0
    return panels.ravel()[start:].reshape(1, -1) if start else panels


def _draw_rollout(part: SubFigure, picture: np.ndarray, seen: SeenAttention, queries: Sequence[tuple[int, int]]):
    image, rollout = part.subplots(1, 2)
    image.imshow(picture, interpolation='nearest')
    image.set_axis_off()
    image.set_title('Image' + (', and tokens whose token layers are shown below' if queries else ''), fontsize=9)
    for letter, query in zip('ABC', queries, strict=False):
        _mark_token(image, query, (seen.rollout.shape[0], seen.rollout.shape[1]), picture, letter)
    drawn = _draw_attention(rollout, picture, seen.rollout, '')
    rollout.set_title(f'Attention rollout over all {len(seen.blocks)} blocks, {seen.source}\n'
                      f'(largest {_strengths(seen.rollout)[1]:.1f} times an even share)', fontsize=9)
    add_colorbar(part, drawn, [rollout], 'part of the largest')


def _draw_maps(part: SubFigure, picture: np.ndarray, columns: int, maps: Sequence[tuple[str, torch.Tensor] | None],
               title: str):
    """Draw (name, attention [H, W]) in rows of panels, None as an empty panel, with a common scale."""
    panels = _panels(part, math.ceil(len(maps) / columns), columns, len(maps))
    for axes, named in zip(panels.ravel(), maps, strict=False):
        if named:
            drawn = _draw_attention(axes, picture, named[1], named[0])
    part.suptitle(title, fontsize=10)
    add_colorbar(part, drawn, panels, 'part of the largest')


def _draw_token_layers(part: SubFigure, picture: np.ndarray, stages: Sequence[Stage],
                       queries: Sequence[tuple[int, int]], last_grid: tuple[int, int]):
    count = len(stages) * len(queries)
    panels = _panels(part, 1, max(count, LEAST_COLUMNS), count)
    places = iter(panels[0])
    for number, stage in enumerate(stages):
        H, W = stage.grid
        # The token of this grid at the centre of the last grid's.
        tokens = [(int((row + 0.5) / last_grid[0] * H), int((column + 0.5) / last_grid[1] * W))
                  for row, column in queries]
        assert stage.weights is not None, 'attention_figure passes only stages with weights'
        rows = stage.weights.rows([row * W + column for row, column in tokens])[0]  # [queries, H · W]
        for letter, token, row in zip('ABC', tokens, rows, strict=False):
            axes, total, name = next(places), float(row.sum()), f'stage {("one", "two")[number]}, {letter}'
            # A Performer's token may attend to nothing; the remaining pattern must not look like attention.
            drawn = _draw_attention(axes, picture, row.view(H, W) if total >= 0.01 else torch.zeros(H, W), name)
            if total < 0.99:
                axes.set_title(f'{axes.get_title()}\nsum {total:.2f}' if total >= 0.01 else f'{name}\nnothing (sum 0)',
                               fontsize=8, pad=3)
            _mark_token(axes, token, stage.grid, picture)
    kind = 'implied weights of the Performer' if 'Performer' in type(stages[0].weights).__name__ else 'softmax weights'
    sizes = ' and '.join('{} × {}'.format(*stage.grid) for stage in stages)
    part.suptitle(f'Token layers: {kind} of the marked tokens, on {sizes} tokens', fontsize=10)
    add_colorbar(part, drawn, panels, 'part of the largest')
