"""Draw the channels of layers for an image, models side by side, with dead and saturated channels framed.

    from figures.features import features_figure
    from figures.explain import layer_features
    features_figure({'T2T-ViT': layer_features(model, images)}).savefig('features.png')
"""
import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from figures.attention import add_title
from figures.explain import ChannelHealth, LayerFeatures
from utils.console import plural
from utils.pictures import BLUE, ORANGE, SEQUENTIAL, new_figure

CHANNELS_SHOWN = 49  # of each layer
SIDE = 3.6  # inches, of the square that they fill
CELL, GAP = 64, 6  # pixels of a channel's map, and between two maps


def features_figure(models: Mapping[str, Sequence[LayerFeatures]], index: int = 0, *, title: str = '') -> Figure:
    """Draw channels of layers as maps, one column for each model; dead and saturated channels are framed.

    Up to 49 evenly spaced channels are shown; the shares are of all channels. The colours span a channel's range over
    all images, but at least 5 % of the layer's typical range, so that noise looks flat.

    Args:
        models: name → layers, as returned by `figures.explain.layer_features`.
        index: number of the image in their batch.
        title: above the figure.
    """
    images = f'in {plural(len(next(iter(models.values()))[0].maps), "image")}'
    alone = len(models) == 1
    rows, columns = max(map(len, models.values())), len(models)
    size = (max(SIDE * rows, 7), SIDE + 1.2) if alone else (SIDE * columns, (SIDE + 0.3) * rows + 1)
    figure = new_figure(*size)
    figure.set_layout_engine('constrained', wspace=0.06, hspace=0.02)
    # The layers of a single model are side by side.
    panels = figure.subplots(*((1, rows) if alone else (rows, columns)), squeeze=False)
    panels = panels.T if alone else panels
    for column, (name, layers) in enumerate(models.items()):
        for row, axes in enumerate(panels[:, column]):
            axes.set_axis_off()
            if row < len(layers):
                _draw_channels(axes, layers[row], index, '' if row or alone else f'{name}\n')
    frames = [Patch(fill=False, edgecolor=colour, linewidth=2, label=f'{what} {images}')
              for colour, what in ((ORANGE, 'dead: the same everywhere'), (BLUE, 'saturated: too large everywhere'))]
    figure.legend(handles=frames, loc='outside lower center', ncols=2, fontsize=9, frameon=False)
    add_title(figure, title or (next(iter(models)) if alone else ''))
    return figure


def describe_health(health: ChannelHealth) -> str:
    """Return the shares of invalid channels: '3.1 % dead, 0.4 % saturated of 256 channels'."""
    dead, saturated = (100 * float(marks.float().mean()) for marks in health)
    return f'{dead:.1f} % dead, {saturated:.1f} % saturated of {len(health.dead)} channels'


def _draw_channels(axes: Axes, layer: LayerFeatures, index: int, name: str) -> None:
    maps = layer.maps[index].numpy()  # [C, H, W]
    C, H, W = maps.shape
    count = min(C, CHANNELS_SHOWN)
    in_row = min(max(round(math.sqrt(count * H / W)), 1), count)  # so that all maps fill a square
    count -= count % in_row
    low, high = layer.maps.amin((0, 2, 3)).numpy(), layer.maps.amax((0, 2, 3)).numpy()
    least = max(np.sort(high - low)[math.ceil(0.75 * (C - 1))] / 20, 1e-12)

    # In pixels: the longer side of a cell is CELL for maps of any size.
    cell_height, cell_width = (round(CELL * side / max(H, W)) for side in (H, W))
    for place in range(count):
        channel = place * C // count
        top, left = place // in_row * (cell_height + GAP), place % in_row * (cell_width + GAP)
        middle, half = (high[channel] + low[channel]) / 2, max(high[channel] - low[channel], least) / 2
        axes.imshow(maps[channel], extent=(left, left + cell_width, top + cell_height, top), cmap=SEQUENTIAL,
                    vmin=middle - half, vmax=middle + half, interpolation='nearest')
        for marks, colour in ((layer.health.dead, ORANGE), (layer.health.saturated, BLUE)):
            if marks[channel]:
                axes.add_patch(Rectangle((left - 1, top - 1), cell_width + 2, cell_height + 2, fill=False,
                                         edgecolor=colour, linewidth=2.5))
    axes.set_xlim(-GAP, in_row * (cell_width + GAP))
    axes.set_ylim(math.ceil(count / in_row) * (cell_height + GAP), -GAP)
    axes.set_title(f'{name}{layer.layer}, {H} × {W}\n{describe_health(layer.health)}', fontsize=9)
