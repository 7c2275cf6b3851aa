"""Parts of an HTML page that is one file: no script, no network, pictures inside; for any width, light or dark, paper.

Every function returns HTML; what it is given is text, and comes out as text whatever it holds, unless it is Html.
"""
import base64
import html
import io
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from matplotlib.figure import Figure, SubFigure

STYLE = '''
:root { color-scheme: light dark; --text: #1b1f24; --faint: #57606a; --back: #fff; --line: #d0d7de; --mark: #fff4d6;
  --link: #0072B2 }
@media (prefers-color-scheme: dark) { :root { --text: #e6e9ed; --faint: #9aa4af; --back: #14181d; --line: #3a424c;
  --mark: #4a3a10; --link: #6cb8e6 } }
* { box-sizing: border-box }
body { margin: 0; background: var(--back); color: var(--text); font: 16px/1.5 system-ui, sans-serif }
main { max-width: 1100px; margin: 0 auto; padding: 1rem }
h1 { line-height: 1.2; margin: .5rem 0; overflow-wrap: anywhere }
h2 { margin-top: 2.5rem; border-bottom: 1px solid var(--line) }
a { color: var(--link) }
nav a { margin-right: 1rem; display: inline-block }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr)); gap: .8rem }
dt, figcaption, .note { color: var(--faint) }
dd { margin: 0; font-weight: 600; overflow-wrap: anywhere }
figure { margin: 1rem 0; overflow-x: auto }
figure img { display: block; max-width: 100%; height: auto; background: #fff; border-radius: 4px }
.table { overflow: auto; max-height: 30rem }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums }
th, td { padding: .25rem .5rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top;
  overflow-wrap: break-word }
td.number, th.number { text-align: right }
td.number { white-space: nowrap }
th { position: sticky; top: 0; background: var(--back); vertical-align: bottom }
tr.marked td { background: var(--mark) }
@media (max-width: 600px) { figure.wide img { max-width: none; width: 900px } }
@media print { html { font-size: 10px } body { font-size: 1rem } nav { display: none }
  .table { max-height: none; overflow: visible } figure, tr { break-inside: avoid } h2 { break-after: avoid }
  th { position: static } }
'''


class Html(str):
    """Text that is HTML already."""


class Section(NamedTuple):
    """A part of the page under a heading."""
    title: str
    body: Html


def escape(value) -> Html:
    return value if isinstance(value, Html) else Html(html.escape(str(value)))


def page(title: str, lead: str, sections: Sequence[Section]) -> str:
    """A whole page; the browser itself is told to load nothing and run nothing."""
    links = ''.join(f'<a href="#{_anchor(part.title)}">{escape(part.title)}</a> ' for part in sections)
    body = '\n'.join(f'<section id="{_anchor(part.title)}">\n<h2>{escape(part.title)}</h2>\n{part.body}\n</section>'
                     for part in sections)
    return f'''<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{escape(title)}</title>
<link rel="icon" href="data:,">
<style>{STYLE}</style>
</head>
<body>
<main>
<header>
<h1>{escape(title)}</h1>
<p>{escape(lead)}</p>
<nav aria-label="Sections">{links}</nav>
</header>
{body}
</main>
</body>
</html>
'''


def note(text: str) -> Html:
    return Html(f'<p class="note">{escape(text)}</p>')


def facts(pairs: Iterable[tuple[str, object]]) -> Html:
    """Names and values side by side."""
    return Html('<dl>' + ''.join(f'<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>'
                                 for name, value in pairs) + '</dl>')


def table(head: Sequence[str], rows: Iterable[Sequence], marked: Iterable[int] = ()) -> Html:
    """A table; columns of numbers stand to the right, the `marked` rows, by number, are coloured."""
    rows, marked = [list(row) for row in rows], set(marked)
    classes = [' class=number' if all(map(_is_number, column)) else '' for column in zip(*rows, strict=True)]
    lines = []
    for number, row in enumerate(rows):
        cells = ''.join(f'<td{kind}>{escape(cell)}</td>' for kind, cell in zip(classes, row, strict=True))
        lines.append(f'<tr{" class=marked" if number in marked else ""}>{cells}</tr>')
    names = ''.join(f'<th scope="col"{kind}>{escape(name)}</th>' for kind, name in zip(classes, head, strict=True))
    # A part that scrolls is within reach of the keyboard.
    return Html('<div class="table" tabindex="0"><table>\n<thead><tr>' + names + '</tr></thead>\n<tbody>\n'
                + '\n'.join(lines) + '\n</tbody></table></div>')


def picture(figure: Figure | SubFigure, description: str, *, wide: bool = False) -> Html:
    """A figure as a PNG inside the page, described for those who do not see it; `wide` ones scroll on phones."""
    buffer = io.BytesIO()
    figure.figure.savefig(buffer, format='png', dpi=100)
    return image(buffer.getvalue(), description, wide=wide)


def image(png: bytes, description: str, *, wide: bool = False) -> Html:
    """A PNG file inside the page."""
    data = base64.b64encode(png).decode()
    return Html(f'<figure{" class=wide" if wide else ""}><img alt="{escape(description)}" '
                f'src="data:image/png;base64,{data}"></figure>')


def _anchor(title: str) -> str:
    return ''.join(letter if letter.isalnum() else '-' for letter in title.lower())


def _is_number(cell) -> bool:
    """Whether a cell holds a number, or stands for one that is missing."""
    try:
        float(str(cell).replace(',', ''))
    except ValueError:
        return str(cell) == '–'
    return True
