"""Figures of matplotlib: their colours and fonts, and sheets of images with captions."""
import functools
import logging
import math
from collections.abc import Iterable, Sequence

import numpy as np
from matplotlib import rcParams
from matplotlib.figure import Figure, SubFigure
from matplotlib.font_manager import FontProperties, findfont, fontManager, get_font
from PIL import Image

_logger = logging.getLogger(__name__)

# Okabe and Ito's colours, which colour-blind people can tell apart.
BLUE, ORANGE, GREEN = '#0072B2', '#D55E00', '#009E73'
SEQUENTIAL = 'viridis'
# Pixels of the longer side of an image in a sheet.
THUMBNAIL = 256
# Fonts with Chinese, Japanese and Korean letters, which matplotlib's own font lacks.
_WIDE_FONTS = ('Noto Sans CJK JP', 'Noto Sans CJK SC', 'Droid Sans Fallback', 'WenQuanYi Micro Hei', 'PingFang SC',
               'Hiragino Sans', 'Apple SD Gothic Neo', 'Microsoft YaHei', 'Yu Gothic', 'Malgun Gothic')


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure, sized in inches, whose text uses all suitable fonts of this machine."""
    _add_wide_fonts()  # before any text, which takes the fonts that are set at its creation
    return Figure(figsize=(width, height), layout='constrained')


@functools.cache  # once
def _add_wide_fonts() -> None:
    installed = {font.name for font in fontManager.ttflist}
    rcParams['font.family'] = [*rcParams['font.family'], *(name for name in _WIDE_FONTS if name in installed)]


def image_sheet(images: Iterable[np.ndarray], titles: Sequence[str], *, columns: int = 4, title: str = '',
                figure: Figure | SubFigure | None = None) -> Figure | SubFigure:
    """Draw images [H, W, 3] (uint8, or float in 0…1) in rows of `columns`, each under its title.

    Args:
        images: one per title; large uint8 images are scaled down one by one.
        figure: where to draw; a new one by default.
    """
    columns = max(1, min(columns, len(titles)))
    rows = max(1, math.ceil(len(titles) / columns))
    figure = figure or new_figure(2.3 * columns, 2.5 * rows + (0.4 if title else 0))
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for panel in axes:
        panel.set_axis_off()
    for panel, image, text in zip(axes[:len(titles)], images, titles, strict=True):
        panel.imshow(_thumbnail(image), interpolation='nearest')
        panel.set_title(drawable(text), fontsize=8, parse_math=False)  # names may have dollars
    if title:
        figure.suptitle(title, fontsize=11, parse_math=False)
    return figure


def drawable(text: str) -> str:
    """Return text with '?' for letters that no font has, of which it warns once, and for bytes that are no text."""
    _add_wide_fonts()
    known = _letters(tuple(rcParams['font.family']))
    lacking = {letter for letter in text if ord(letter) not in known and not letter.isspace()}
    if any(letter.isprintable() for letter in lacking):
        _warn_of_letters()
    return ''.join('?' if letter in lacking else letter for letter in text)


@functools.cache  # once
def _warn_of_letters() -> None:
    _logger.warning('pictures show ? for letters that no font here has; install a font that has them (such as Noto '
                    'Sans CJK), or name it under font.family in a matplotlibrc')


@functools.cache
def _letters(families: tuple[str, ...]) -> frozenset[int]:
    """Return the code points of all letters that matplotlib finds in the fonts of `families`."""
    fonts = (get_font(findfont(FontProperties(family=[family]))) for family in families)
    return frozenset().union(*(font.get_charmap() for font in fonts))


def _thumbnail(picture: np.ndarray) -> np.ndarray:
    """Scale a uint8 picture down to its size in a sheet; return others unchanged."""
    if picture.dtype != np.uint8 or max(picture.shape[:2]) <= THUMBNAIL:
        return picture
    image = Image.fromarray(picture)
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    return np.asarray(image)


def to_array(figure: Figure, dpi: int = 100) -> np.ndarray:
    """Return the pixels of a figure, uint8 [H, W, 3]."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    figure.set_dpi(dpi)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
