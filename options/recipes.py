"""Recipes: YAML files of options. Whatever is wrong in one is a UserError that names the file, the key and a remedy.

    defaults = read_recipe(Path('configs/t2t_vit_14.yaml'), parser)

This module imports no torch, as options/groups.py, whose parsers say what a recipe may hold.
"""
import argparse
import re
from pathlib import Path

import yaml

from utils.errors import UserError, did_you_mean


class RecipeParser(argparse.ArgumentParser):
    """What recipes are checked against; `gone` has a line for each option that is refused: what to do instead."""
    gone: dict[str, str]


class _RecipeLoader(yaml.SafeLoader):
    """YAML with numbers as people write them (5e-4 is a string to PyYAML) and no key twice."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key_node, _ in node.value:
            problem = None
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag == 'tag:yaml.org,2002:merge':
                problem = 'a key is the name of an option'
            elif key_node.value.replace('-', '_') in seen:
                problem = f'the key {key_node.value!r} is there twice'
            if problem:
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
            seen.add(key_node.value.replace('-', '_'))
        return super().construct_mapping(node, deep)

    def construct_number(self, node):
        """As Python reads it: 010 is ten, and 1:30 no number (to YAML they are eight, and ninety)."""
        for kind in (int, float):
            try:
                return kind(node.value)
            except ValueError:
                continue
        return super().construct_yaml_float(node) if node.value.lstrip('+-').lower() in ('.inf', '.nan') else node.value


_RecipeLoader.add_constructor('tag:yaml.org,2002:int', _RecipeLoader.construct_number)
_RecipeLoader.add_constructor('tag:yaml.org,2002:float', _RecipeLoader.construct_number)
_RecipeLoader.add_implicit_resolver(
    'tag:yaml.org,2002:float', re.compile(r'[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)$'), list('-+.0123456789'))


def read_recipe(path: Path, parser: RecipeParser, *, complete: bool = True) -> dict:
    """Reads a YAML recipe and checks every key and value against the parser's options.

    With `complete` a key that no option has is an error; without, such keys are left out, for a reader that wants a
    part of the recipe. Raises UserError that names the file, the key and the nearest right name, or the value and what
    was expected.
    """
    try:
        values = yaml.load(path.read_text(encoding='utf-8'), _RecipeLoader)
    except OSError as e:
        raise UserError(f'-c {path}: {e.strerror}: give a recipe such as configs/t2t_vit_14.yaml') from None
    except Exception as e:  # PyYAML raises more than its own errors: ValueError, RecursionError, …
        mark = getattr(e, 'problem_mark', None)
        where = f', line {mark.line + 1}' if mark else ''
        problem = getattr(e, 'problem', None) or f'{type(e).__name__}: {e}'.splitlines()[0]
        raise UserError(f'{path}{where}: not a recipe: {problem}') from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f'{path}: a recipe is lines of "option: value", not a {type(values).__name__}')
    return check_values(values, parser, source=path, complete=complete)


def check_values(values: dict, parser: RecipeParser, *, source, complete: bool = True) -> dict:
    """The values of a recipe as the parser would have read them; `source` and `complete` as for `read_recipe`."""
    actions = {a.dest: a for a in parser._actions
               if a.help is not argparse.SUPPRESS and a.dest not in ('help', 'config')}
    gone = {option.removeprefix('--').replace('-', '_'): instead for option, instead in parser.gone.items()}
    recipe = {}
    for key, value in values.items():
        name = str(key).replace('-', '_')
        if name in gone:
            raise UserError(f'{source}: {key} is gone: {gone[name]}')
        if name not in actions and not complete:
            continue
        if name not in actions:
            raise UserError(f'{source}: {key!r} is no option{did_you_mean(name, actions)}')
        recipe[name] = _checked(source, key, value, actions[name])
    return recipe


def _checked(source, key: str, value, action: argparse.Action):
    """The recipe's value as the option would have parsed it from the command line."""
    if value is None and action.default is None:
        return None
    if isinstance(action, argparse.BooleanOptionalAction):
        if not isinstance(value, bool):
            raise UserError(f'{source}: {key}: {value!r} is neither true nor false')
        return value
    if action.nargs in ('+', 2):
        if not isinstance(value, list) or (action.nargs == 2 and len(value) != 2) or not value:
            wanted = 'two numbers' if action.nargs == 2 else 'values, as [a, b]'
            raise UserError(f'{source}: {key}: {value!r} is no list of {wanted}')
        return [_scalar(source, key, v, action) for v in value]
    return _scalar(source, key, value, action)


def _scalar(source, key: str, value, action: argparse.Action):
    kind = getattr(action.type, 'kind', str)
    kinds = kind if isinstance(kind, tuple) else (int, float) if kind is float else (kind,)
    # bool is an int to Python, but `epochs: true` is a mistake.
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        wanted = {int: 'an integer', float: 'a number', str: 'a string (quote it)', bool: 'true or false'}
        expected = ' or '.join(wanted[k] for k in kinds if (k, kind) != (int, float))
        raise UserError(f'{source}: {key}: {repr(value)[:80]} is not {expected}')
    if callable(action.type):
        try:
            value = action.type(str(value))
        except argparse.ArgumentTypeError as e:
            raise UserError(f'{source}: {key}: {e}') from None
    if action.choices is not None and value not in action.choices:
        choices = [str(choice) for choice in action.choices]
        raise UserError(f'{source}: {key}: {value!r} is not one of {", ".join(choices)}'
                        f'{did_you_mean(str(value), choices)}')
    return value
