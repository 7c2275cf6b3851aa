"""Prints the README's table of options, from the parsers themselves.

    python tools/options_table.py
"""
import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import train
import transfer
import validate
from utils import options


def table() -> str:
    """Markdown: one row for each option of train.py, and below those that only the other scripts have."""
    parsers = {
        'train.py': options.create_parser('', train.GROUPS),
        'validate.py': options.create_parser('', (*validate.GROUPS, validate.validate_options)),
        'transfer.py': options.create_parser('', (*transfer.GROUPS, transfer.transfer_options)),
    }
    lines, seen = [], set()
    for script, parser in parsers.items():
        for group in parser._action_groups:
            actions = [a for a in group._group_actions if a.dest not in seen | {'help', 'config'}
                       and a.help is not argparse.SUPPRESS]
            if not actions:
                continue
            where = '' if script == 'train.py' else f' ({script})'
            lines += [f'| **{group.title}**{where} | | |'] + [_row(action) for action in actions]
            seen |= {a.dest for a in actions}
    changed = ', '.join(f'`{_written(name, value)}`' for name, value in transfer.DEFAULTS.items())
    return '\n'.join(['| option | default | meaning |', '|---|---|---|', *lines, '',
                      f'transfer.py starts from other defaults: {changed}.']) + '\n'


def _written(name: str, value) -> str:
    """A default as it would be typed."""
    option = name.replace('_', '-')
    if isinstance(value, bool):
        return f'--{option}' if value else f'--no-{option}'
    return f'--{option} {value!r}' if value == '' else f'--{option} {value}'


def _row(action: argparse.Action) -> str:
    spellings = [name for name in action.option_strings if not name.startswith('--no-')] or [action.metavar]
    names = ', '.join(f'`{name}`' for name in spellings)
    default = action.default
    if default in (None, '', argparse.SUPPRESS):
        default = ''
    elif isinstance(default, bool):
        default = 'on' if default else 'off'
    elif isinstance(default, list):
        default = ' '.join(f'{value:.4g}' for value in default)
    text = action.help.replace('|', '\\|')
    if action.choices and str(action.choices[-1]) not in text:
        text += f" ({', '.join(str(choice) or 'none' for choice in action.choices)})"
    return f'| {names} | {default} | {text} |'


if __name__ == '__main__':
    print(table(), end='')
