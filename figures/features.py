"""What the channels of layers show of an image, models side by side, and which channels say nothing.

    from figures.features import features_figure
    from models.explain import layer_features
    features_figure({'T2T-ViT': layer_features(model, images)}).savefig('features.png')
"""
import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from models.explain import ChannelHealth, LayerFeatures
from utils.pictures import BLUE, ORANGE, SEQUENTIAL

CHANNELS_IN_ROW = 7  # of the square of channels that is shown of each layer
CELL, GAP = 64, 6  # pixels of a channel's map and between two of them, in the picture


def features_figure(models: Mapping[str, Sequence[LayerFeatures]], index: int = 0, *, title: str = '') -> Figure:
    """Draw channels of layers as maps, one column for each model; dead and saturated channels are framed.

    Shown are up to 49 channels, evenly spread over all; the shares are of all channels. Each map has the colours of its
    own range, but a range below a twentieth of the layer's typical one is not stretched, so that noise stays flat.

    Args:
        models: name → layers, as `models.explain.layer_features` gives them.
        index: which of the images that they have seen.
        title: above the figure.
    """
    rows = max(map(len, models.values()))
    first = next(iter(models.values()))[0].maps
    side = 3.6 if len(models) > 1 else 4.6
    height = side * min(max(first.shape[2] / first.shape[3], 0.3), 3) + 0.3
    figure = Figure(figsize=(max(side * len(models), 6), height * rows + 1.2), layout='constrained')
    figure.get_layout_engine().set(wspace=0.06, hspace=0.02)
    panels = figure.subplots(rows, len(models), squeeze=False)
    for column, (name, layers) in enumerate(models.items()):
        for row, axes in enumerate(panels[:, column]):
            axes.set_axis_off()
            if row < len(layers):
                _draw_channels(axes, layers[row], index)
        panels[0, column].set_title(f'{name}\n{panels[0, column].get_title()}', fontsize=9)
    figure.legend(handles=[Patch(fill=False, edgecolor=ORANGE, linewidth=2, label='dead: the same everywhere'),
                           Patch(fill=False, edgecolor=BLUE, linewidth=2, label='saturated: too large everywhere')],
                  loc='outside lower center', ncols=2, fontsize=9, frameon=False)
    if title:
        figure.suptitle(title, fontsize=12)
    return figure


def describe_health(health: ChannelHealth) -> str:
    """The shares of invalid channels in words: '3.1 % dead, 0.4 % saturated of 256 channels'."""
    dead, saturated = (100 * float(marks.float().mean()) for marks in health)
    return f'{dead:.1f} % dead, {saturated:.1f} % saturated of {len(health.dead)} channels'


def _draw_channels(axes: Axes, layer: LayerFeatures, index: int) -> None:
    maps = layer.maps[index].numpy()  # [C, H, W]
    C, H, W = maps.shape
    in_row = min(CHANNELS_IN_ROW, math.isqrt(C - 1) + 1)
    count = min(C, in_row ** 2)
    ranges = np.sort(np.ptp(layer.maps.numpy(), axis=(0, 2, 3)))
    least = max(ranges[math.ceil(0.75 * (C - 1))] / 20, 1e-12)

    # In pixels of the picture: cells whose longer side is CELL, whatever the map's own size.
    cell_height, cell_width = (round(CELL * side / max(H, W)) for side in (H, W))
    for place in range(count):
        channel = place * C // count
        top, left = place // in_row * (cell_height + GAP), place % in_row * (cell_width + GAP)
        values = maps[channel]
        middle, half = (values.max() + values.min()) / 2, max(np.ptp(values), least) / 2
        axes.imshow(values, extent=(left, left + cell_width, top + cell_height, top), cmap=SEQUENTIAL,
                    vmin=middle - half, vmax=middle + half, interpolation='nearest')
        for marks, colour in ((layer.health.dead, ORANGE), (layer.health.saturated, BLUE)):
            if marks[channel]:
                axes.add_patch(Rectangle((left - 1, top - 1), cell_width + 2, cell_height + 2, fill=False,
                                         edgecolor=colour, linewidth=2.5))
    axes.set_xlim(-GAP, in_row * (cell_width + GAP))
    axes.set_ylim(math.ceil(count / in_row) * (cell_height + GAP), -GAP)
    axes.set_title(f'{layer.layer}, {H} × {W}\n{describe_health(layer.health)}', fontsize=9)
