"""What tools/doctor prints: findings with a mark, a figure and a remedy, and the three lines that sum them up."""
import textwrap
import traceback
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from utils.disk import ROOT
from utils.errors import UserError

ROOMS_OF_A_RUN = ('data', 'engine', 'models', 'utils')
OK, LOOK, STOP, FAIL = 'ok', 'look', 'stop', 'fail'
WIDTH = 100
INDENT = 27  # where figures begin


class Finding(NamedTuple):
    """One thing that was looked at.

    mark: OK; LOOK, where something is wasted or may be meant otherwise; STOP, where the run would end early or its
        result be wrong; FAIL, where the check itself crashed, so that nothing is known.
    title: what was looked at, in up to 18 letters. figure: what there is, without a full stop. details: what it
        counts, a line each. remedy: sentences on what to do, where there is something. numbers: for programs, by name.
    """
    mark: str
    title: str
    figure: str
    remedy: str = ''
    details: Sequence[str] = ()
    numbers: dict[str, Any] = {}


class NotMeasured(Exception):
    """What a section needs has not come out of an earlier one; the message says what."""


def examine(title: str, check, case) -> list[Finding]:
    """What `check` finds in `case`; an exception that ends it early is its last finding, of this title."""
    found = []
    try:
        for finding in check(case):
            found.append(finding)
    except NotMeasured as error:
        found.append(Finding(LOOK, title, f'Not looked at: {error}'))
    except UserError as error:
        problem, _, remedy = str(error).partition('; ')
        found.append(Finding(STOP, title, problem, sentence(remedy)))
    except Exception as error:
        found.append(_crash(title, error))
    return found


def _crash(title: str, error: Exception) -> Finding:
    """Names the exception and the last line of ours that it came through; its traceback is among the numbers.

    A line of what a run is made of is one that train.py would come through as well; any other is a bug of the doctor.
    """
    frames = [frame for frame in traceback.extract_tb(error.__traceback__)
              if Path(frame.filename).is_relative_to(ROOT) and 'site-packages' not in frame.filename]
    where = f'{Path(frames[-1].filename).relative_to(ROOT)}:{frames[-1].lineno}'
    reason = next(iter(str(error).splitlines()), '')
    what = f'at {where} ({type(error).__name__}{": " * bool(reason)}{reason})'
    numbers = {'where': where, 'traceback': ''.join(traceback.format_exception(error))}
    if where.partition('/')[0] in ROOMS_OF_A_RUN:
        return Finding(STOP, title, f'What the run would do crashes {what}',
                       'train.py would end there too: see to the traceback that is on standard error.', numbers=numbers)
    remedy = ('This is a bug of the doctor, and says nothing of your run: report it with the traceback that is on '
              'standard error.')
    return Finding(FAIL, title, f'The check itself crashed {what}', remedy, numbers=numbers)


def sentence(text: str) -> str:
    """'do this' → 'Do this.'"""
    return text and text[0].upper() + text[1:] + '.' * (not text.endswith(('.', '!', '?')))


def name_up_to(items: Sequence[str], limit: int = 20) -> list[str]:
    """The first `limit` of `items`, and a line that counts the others."""
    more = len(items) - limit
    return [*items[:limit], *([f'and {more:,} more'] if more > 0 else [])]


def plural(count: int, singular: str, several: str | None = None) -> str:
    """1 → '1 image', 1000 → '1,000 images'."""
    return f'{count:,} {singular if count == 1 else several or singular + "s"}'


def duration(seconds: float) -> str:
    """5025 → '1.4 hours', in the unit in which it is easily said."""
    for unit, length in (('days', 86400), ('hours', 3600), ('minutes', 60)):
        if seconds >= 2 * length or (unit == 'hours' and seconds >= length):
            return f'{seconds / length:,.1f} {unit}'
    return f'{seconds:.1f} seconds' if seconds < 10 else f'{seconds:.0f} seconds'


def gib(count: float) -> str:
    """1.5 * 2**30 → '1.5 GiB'."""
    return f'{count / 2**30:.1f} GiB' if count >= 2**30 else f'{count / 2**20:.1f} MiB'


def section_text(number: int, title: str, findings: Iterable[Finding]) -> str:
    """A section of the page."""
    lines = ['', f'{number}  {title}']
    for finding in findings:
        lines += _wrapped(f'   {finding.mark:<5}{finding.title:<18} ', f'{finding.figure}.')
        for detail in finding.details:
            lines += _wrapped(' ' * INDENT + '- ', detail)
        if finding.remedy:
            lines += _wrapped(' ' * INDENT + '→ ', finding.remedy)
    return '\n'.join(lines)


def _wrapped(start: str, text: str) -> list[str]:
    # A path is not broken: it is to be copied.
    return textwrap.wrap(text, WIDTH, initial_indent=start, subsequent_indent=' ' * len(start), break_long_words=False,
                         break_on_hyphens=False)


def summary(findings: Sequence[Finding], starving: str) -> dict[str, str]:
    """The three lines at the end: will it run, what starves, what to mend first."""
    stops = [finding for finding in findings if finding.mark == STOP]
    fails = [finding for finding in findings if finding.mark == FAIL]
    looks = [finding for finding in findings if finding.mark == LOOK]
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
