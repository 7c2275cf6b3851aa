"""What tools/doctor prints: findings with a mark, a figure and a remedy, and the three lines that sum them up."""
import textwrap
import traceback
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import NoneType
from typing import Any, NamedTuple, get_args, get_type_hints

from utils.console import ROOMS, plural
from utils.disk import ROOT
from utils.errors import UserError, explain_limit

OK, LOOK, STOP, FAIL = 'ok', 'look', 'stop', 'fail'
WIDTH = 100
# Where figures begin.
INDENT = 27


class Finding(NamedTuple):
    """One thing that was checked.

    Attributes:
        mark: OK; LOOK: something is wasted or may be meant otherwise; STOP: the run would end early or its result be
            wrong; FAIL: the check itself crashed, so nothing is known.
        title: what was checked, in up to 18 letters.
        figure: what was found, without a full stop.
        remedy: sentences on what to do, if there is something.
        details: items that the figure counts, one per line.
        numbers: the same for programs, by name.
    """
    mark: str
    title: str
    figure: str
    remedy: str = ''
    details: Sequence[str] = ()
    numbers: dict[str, Any] = {}


class Section(NamedTuple):
    """A section of the page. Its check yields findings and measurements.

    The annotations of the check's parameters say which measurements it needs, or can use where it says `| None`. Its
    return annotation names those that it yields.
    """
    title: str
    check: Callable[..., Iterable]

    def gives(self, kind: type) -> bool:
        """Tell whether the check yields measurements of this kind."""
        items, *_ = get_args(get_type_hints(self.check).get('return')) or (None,)
        return kind in get_args(items)


class NotMeasured(Exception):
    """A section needs a measurement that does not exist; the message names it."""


def examine(section: Section, known: dict[type, Any], sections: Sequence[Section]) -> list[Finding]:
    """Return a section's findings, and add its measurements to `known`. An exception becomes its last finding."""
    title, found = section.title, []
    try:
        for item in section.check(**_arguments(section, known, sections)):
            if isinstance(item, Finding):
                found.append(item)
            else:
                known[type(item)] = item
    except NotMeasured as error:
        found.append(Finding(LOOK, title, f'Not measured: {error}'))
    except UserError as error:
        found.append(refusal(title, error))
    except Exception as error:
        explained = explain_limit(error)
        found.append(refusal(title, explained) if explained else _crash(title, error))
    return found


def _arguments(section: Section, known: dict[type, Any], sections: Sequence[Section]) -> dict[str, Any]:
    arguments = {}
    for name, hint in get_type_hints(section.check).items():
        if name == 'return':
            continue
        kind, *others = get_args(hint) or (hint,)
        arguments[name] = known.get(kind)
        if kind not in known and NoneType not in others:
            source = next(other.title for other in sections if other.gives(kind))
            raise NotMeasured(f'{kind.missing}, see "{source}"')
    return arguments


def refusal(title: str, error: UserError) -> Finding:
    """Return a user's mistake, which would stop the run, as a finding."""
    problem, _, remedy = str(error).partition('; ')
    return Finding(STOP, title, problem, sentence(remedy))


def _crash(title: str, error: Exception) -> Finding:
    """Return the exception and the last line of this project that it came through; `numbers` holds its traceback.

    A run would crash at a line of its own folders too. A line of any other folder is a bug of the doctor.
    """
    frames = [frame for frame in traceback.extract_tb(error.__traceback__)
              if Path(frame.filename).is_relative_to(ROOT) and 'site-packages' not in frame.filename]
    where = f'{Path(frames[-1].filename).relative_to(ROOT)}:{frames[-1].lineno}'
    reason = next(iter(str(error).splitlines()), '')
    what = f'at {where} ({type(error).__name__}{": " * bool(reason)}{reason})'
    numbers = {'where': where, 'traceback': ''.join(traceback.format_exception(error))}
    if where.partition('/')[0] in ROOMS:
        return Finding(STOP, title, f'Code of the run crashes {what}',
                       'train.py would end there too: see the traceback on standard error.', numbers=numbers)
    return Finding(FAIL, title, f'The check itself crashed {what}', 'This is a bug of the doctor and says nothing '
                   'about your run: report it with the traceback on standard error.', numbers=numbers)


def sentence(text: str) -> str:
    """'do this' → 'Do this.'"""
    return text and text[0].upper() + text[1:] + '.' * (not text.endswith(('.', '!', '?')))


def name_up_to(items: Sequence[str], limit: int = 20) -> list[str]:
    """Return the first `limit` of `items`, and a line that counts the others."""
    more = len(items) - limit
    return [*items[:limit], *([f'and {more:,} more'] if more > 0 else [])]


def duration(seconds: float) -> str:
    """5025 → '1.4 hours', in the unit that reads best."""
    for unit, length in (('days', 86400), ('hours', 3600), ('minutes', 60)):
        if seconds >= 2 * length or (unit == 'hours' and seconds >= length):
            return f'{seconds / length:,.1f} {unit}'
    return f'{seconds:.1f} seconds' if seconds < 10 else f'{seconds:.0f} seconds'


def gib(count: float) -> str:
    """1.5 * 2**30 → '1.5 GiB'."""
    return f'{count / 2**30:.1f} GiB' if count >= 2**30 else f'{count / 2**20:.1f} MiB'


def section_text(number: int, title: str, findings: Iterable[Finding]) -> str:
    """Return a section of the page."""
    lines = ['', f'{number}  {title}']
    for finding in findings:
        lines += _wrapped(f'   {finding.mark:<5}{finding.title:<18} ', f'{finding.figure}.')
        for detail in finding.details:
            lines += _wrapped(' ' * INDENT + '- ', detail)
        if finding.remedy:
            lines += _wrapped(' ' * INDENT + '→ ', finding.remedy)
    return '\n'.join(lines)


def _wrapped(start: str, text: str) -> list[str]:
    # Paths stay whole, so that they can be copied.
    return textwrap.wrap(text, WIDTH, initial_indent=start, subsequent_indent=' ' * len(start), break_long_words=False,
                         break_on_hyphens=False)


def summary(findings: Sequence[Finding], starving: str) -> dict[str, str]:
    """Return the three lines at the end: will it run, what starves, what to mend first."""
    stops, fails, looks = ([finding for finding in findings if finding.mark == mark] for mark in (STOP, FAIL, LOOK))
    also = f'; {plural(len(fails), "check")} crashed' if fails else ''
    also += f'; {plural(len(looks), "finding")} to look at' if looks else ''
    if stops:
        runs = f'No: {_titles(stops)}{also}.'
    elif fails:
        runs = f'Not known: {_titles(fails)}{also}.'
    else:
        runs = f'Yes, by all that was looked at{also}.'
    first = next((finding for finding in (*stops, *fails, *looks) if finding.remedy), None)
    mend = 'Nothing.' if first is None else f'{first.title}: {first.remedy}'
    return {'Will it run?': runs, 'What starves?': starving, 'Mend first': mend}


def _titles(findings: Iterable[Finding]) -> str:
    return ', '.join(dict.fromkeys(finding.title.lower() for finding in findings))


def summary_text(lines: dict[str, str]) -> str:
    return '\n'.join(['', *(line for name, text in lines.items() for line in _wrapped(f'{name:<15} ', text))])
