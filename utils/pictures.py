"""What all pictures share: colours that everybody can tell apart, and sheets of images with a line of text each."""
import math
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure, SubFigure

# Okabe and Ito's colours, which people who see colours differently can tell apart.
BLUE, ORANGE, GREEN = '#0072B2', '#D55E00', '#009E73'
SEQUENTIAL, DIVERGING = 'viridis', 'RdBu_r'


def image_sheet(images: Sequence[np.ndarray], titles: Sequence[str], *, columns: int = 4,
                colors: Sequence[str] | None = None, title: str = '',
                figure: Figure | SubFigure | None = None) -> Figure | SubFigure:
    """A figure of images [H, W, 3] (uint8, or float in 0…1) in rows of `columns`, each under its own title.

    colors: of the titles, black if not given. figure: where to draw; a new one if not given.
    """
    columns = max(1, min(columns, len(images)))
    rows = max(1, math.ceil(len(images) / columns))
    figure = figure or Figure(figsize=(2.3 * columns, 2.5 * rows + (0.4 if title else 0)), layout='constrained')
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for number, panel in enumerate(axes):
        panel.set_axis_off()
        if number < len(images):
            panel.imshow(images[number], interpolation='nearest')
            panel.set_title(titles[number], fontsize=8, color=colors[number] if colors else 'black')
    if title:
        figure.suptitle(title, fontsize=11)
    return figure


def to_array(figure: Figure, dpi: int = 100) -> np.ndarray:
    """The pixels of a figure, uint8 [H, W, 3]."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    figure.set_dpi(dpi)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
