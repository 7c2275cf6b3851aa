"""Recipes: YAML files of options. A mistake in one is a UserError that names the file, the key and a remedy.

    defaults = read_recipe(Path('configs/t2t_vit_14.yaml'), parser)

This module imports no torch.
"""
import argparse
import re
from pathlib import Path

import yaml

from options.elsewhere import ELSEWHERE
from utils.disk import read_text
from utils.errors import UserError, did_you_mean

# Options of several values that were of one when recipes were written.
ALSO_SINGLE = ('eval_checkpoint',)
# What the Python types of values are called in messages.
KINDS = {int: 'an integer', float: 'a number', str: 'a string (quote it)', bool: 'true or false'}


class Removed(argparse.Action):
    """An option that was removed. `const` says what to do instead."""

    def __call__(self, parser, namespace, values, option_string=None):
        parser.error(f'{option_string} is gone: {self.const}')


class _RecipeLoader(yaml.SafeLoader):
    """YAML with numbers as people write them (PyYAML reads 5e-4 as a string), and without duplicate keys."""

    def compose_node(self, parent, index):
        is_alias = self.check_event(yaml.AliasEvent)
        node = super().compose_node(parent, index)
        if is_alias and not isinstance(node, yaml.ScalarNode):  # a few lines of them could grow without end
            raise yaml.constructor.ConstructorError(None, None, 'an alias (*) of more than one value; write them out',
                                                    node.start_mark)
        return node

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
        """Read a number as Python does: 010 is ten, and 1:30 is none (YAML reads eight, and ninety)."""
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


def read_recipe(path: Path, parser: argparse.ArgumentParser, *, complete: bool = True) -> dict:
    """Read a YAML recipe, and check every key and value against the parser's options.

    Args:
        complete: refuse keys that no option has; else leave them out.
    Raises:
        UserError: it names the file, the key and the nearest right name, or the value and what was expected.
    """
    try:
        values = yaml.load(read_text(path), _RecipeLoader)
    except OSError as error:
        raise UserError(f'-c {path}: {error.strerror}: give a recipe such as configs/t2t_vit_14.yaml') from None
    except Exception as error:  # PyYAML raises more than its own errors: ValueError, RecursionError, …
        mark = getattr(error, 'problem_mark', None)
        where = f', line {mark.line + 1}' if mark else ''
        problem = getattr(error, 'problem', None) or f'{type(error).__name__}: {error}'.splitlines()[0]
        raise UserError(f'{path}{where}: not a recipe: {problem}') from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f'{path}: a recipe is lines of "option: value", not a {type(values).__name__}')
    return check_values(values, parser, source=path, complete=complete)


def check_values(values: dict, parser: argparse.ArgumentParser, *, source, complete: bool = True) -> dict:
    """Return a recipe's values as the parser would have read them; `source` is where they come from, for messages."""
    actions = {a.dest: a for a in parser._actions if a.dest not in ('help', 'config', 'local_rank')}
    recipe = {}
    for key, value in values.items():
        name = str(key).replace('-', '_')
        action = actions.get(name)
        if isinstance(action, Removed):
            raise UserError(f'{source}: {key} is gone: {action.const}')
        if action:
            recipe[name] = _checked(f'{source}: {key}', value, action)
        elif complete:
            known = [name for name, action in actions.items() if not isinstance(action, Removed)]
            instead = ELSEWHERE.get('--' + name.replace('_', '-'))
            raise UserError(f'{source}: {key!r} is no option' + (f'; {instead}' if instead
                                                                 else did_you_mean(name, known)))
    return recipe


def _checked(where: str, value, action: argparse.Action):
    """Return a value as the option would have read it from the command line."""
    if value is None and action.default is None:
        return None
    if isinstance(action, argparse.BooleanOptionalAction):
        if not isinstance(value, bool):
            raise UserError(f'{where}: {value!r} is neither true nor false')
        return value
    if action.nargs in ('+', 2):
        if action.dest in ALSO_SINGLE and isinstance(value, str):
            value = [value]
        if not isinstance(value, list) or (action.nargs == 2 and len(value) != 2) or not value:
            wanted = 'two numbers' if action.nargs == 2 else 'values, as [a, b]'
            raise UserError(f'{where}: {value!r} is no list of {wanted}')
        return [_scalar(where, v, action) for v in value]
    return _scalar(where, value, action)


def _scalar(where: str, value, action: argparse.Action):
    kinds = getattr(action.type, 'kinds', (str,))
    fits = isinstance(value, kinds) or (float in kinds and isinstance(value, int))
    if isinstance(value, str) and re.search('[\0\ud800-\udc7f\udd00-\udfff]', value):
        raise UserError(f'{where}: {value!r} holds a letter that no name can have')
    # bool is an int to Python, but `epochs: true` is a mistake.
    if not fits or (isinstance(value, bool) and bool not in kinds):
        raise UserError(f'{where}: {repr(value)[:80]} is not {" or ".join(KINDS[kind] for kind in kinds)}')
    if callable(action.type):
        try:
            value = action.type(str(value))
        except argparse.ArgumentTypeError as error:
            raise UserError(f'{where}: {error}') from None
    if action.choices is not None and value not in action.choices:
        choices = [str(choice) for choice in action.choices]
        raise UserError(f'{where}: {value!r} is not one of {", ".join(choices)}{did_you_mean(str(value), choices)}')
    return value
