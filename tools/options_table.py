"""Write the table of all options in docs/options.md, from the parsers themselves.

    python tools/options_table.py
"""
import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from options.parser import Parser
from options.scripts import SCRIPTS, TRANSFER_DEFAULTS
from utils.disk import ROOT
from utils.script import run_script

PAGE = ROOT / 'docs/options.md'
HEADER = '| option | default | meaning |\n|---|---|---|'


def table() -> str:
    """Return Markdown with a row for each option of train.py, and below those that only other scripts have."""
    parsers = {f'{script}.py': parser() for script, parser in SCRIPTS.items()}
    having: dict[str | None, list[str]] = {}  # a group's title → the scripts that have it
    for script, parser in parsers.items():
        for group in parser._action_groups:
            having.setdefault(group.title, []).append(script)
    lines, seen = [], set()
    for parser in parsers.values():
        for group in parser._action_groups:
            actions = [a for a in group._group_actions if a.help is not argparse.SUPPRESS
                       and (a.dest, a.help) not in seen and a.dest not in ('help', 'config')]
            if not actions:
                continue
            where = '' if 'train.py' in having[group.title] else f" ({', '.join(having[group.title])})"
            lines += [f'| **{group.title}**{where} | | |'] + [_row(action) for action in actions]
            seen |= {(action.dest, action.help) for action in actions}
    changed = ', '.join(f'`{_written(name, value)}`' for name, value in TRANSFER_DEFAULTS.items())
    return '\n'.join([HEADER, *lines, '', f'transfer.py starts from other defaults: {changed}.']) + '\n'


def _written(name: str, value) -> str:
    """Return a default as a user would type it."""
    option = name.replace('_', '-')
    if isinstance(value, bool):
        return f'--{option}' if value else f'--no-{option}'
    return f'--{option} {value!r}' if value == '' else f'--{option} {value}'


def _row(action: argparse.Action) -> str:
    spellings = [name for name in action.option_strings if not name.startswith('--no-')] or [str(action.metavar)]
    names = ', '.join(f'`{name}`' for name in spellings)
    default = action.default
    if default in (None, '', argparse.SUPPRESS):
        default = ''
    elif isinstance(default, bool):
        default = 'on' if default else 'off'
    elif isinstance(default, list):
        default = ' '.join(value if isinstance(value, str) else f'{value:.4g}' for value in default)
    text, choices = (action.help or '').replace('|', '\\|'), list(action.choices or ())
    if choices and str(choices[-1]) not in text:
        text += f" ({', '.join(str(choice) or 'none' for choice in choices)})"
    return f'| {names} | {default} | {text} |'


def page() -> str:
    """Return docs/options.md with a new table. What is above the table stays."""
    introduction, _, _ = PAGE.read_text(encoding='utf-8').partition(HEADER)
    return introduction + table()


def main() -> None:
    Parser(description='Write docs/options.md, the table of all options.').parse_args()
    PAGE.write_text(page(), encoding='utf-8')
    print(PAGE.relative_to(ROOT))


if __name__ == '__main__':
    run_script(main)
