"""Parts of an HTML page, as the macros of page.html write them. Text is escaped unless it is Markup."""
import base64
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure, SubFigure

_environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined,
                           trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
_macros: Any = _environment.get_template('page.html').module

# page(title, lead, {heading: body}), note(text), facts(pairs of a name and a value)
page, note, facts = _macros.page, _macros.note, _macros.facts


def table(head: Sequence[str], rows: Iterable[Sequence], marked: Iterable[int] = ()) -> Markup:
    """Return a table with columns of numbers to the right, and the rows of the numbers `marked` coloured."""
    rows = [list(row) for row in rows]
    return _macros.table(head, rows, [all(map(_is_number, column)) for column in zip(*rows, strict=True)], set(marked))


def _is_number(cell) -> bool:
    """Tell whether a cell holds a number, or stands for a missing one."""
    try:
        float(str(cell).replace(',', ''))
    except ValueError:
        return str(cell) == '–'
    return True


def picture(figure: Figure | SubFigure, description: str, *, wide: bool = False) -> Markup:
    """Return a figure as a PNG inside the page, described for blind readers; `wide` ones scroll on phones."""
    buffer = io.BytesIO()
    figure.figure.savefig(buffer, format='png', dpi=100)
    return image(buffer.getvalue(), description, wide=wide)


def image(png: bytes, description: str, *, wide: bool = False) -> Markup:
    """Return a PNG file inside the page."""
    return _macros.image(base64.b64encode(png).decode(), description, wide)
