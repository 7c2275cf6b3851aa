"""Types of option values. Each knows which Python types a recipe may give for it."""
import argparse
import math
import operator
import re
from collections.abc import Callable
from typing import Any

# ImageNet's evaluation sets; data/evaluation_sets.py says what each is.
SETS = ('val', 'real', 'v2', 'a', 'r', 'sketch', 'c')
# Memory holds no tokens of larger images.
MAX_IMAGE_SIZE = 8192


class Converter:
    """A function that reads the text of an option, with the Python types that a recipe may give for it."""

    def __init__(self, convert: Callable[[Any], Any], kinds: tuple[type, ...]):
        self._convert, self.kinds = convert, kinds

    def __call__(self, text):
        return self._convert(text)


def recipe_kind(*kinds: type) -> Callable[[Callable[[Any], Any]], Converter]:
    """Decorate a function that reads the text of an option."""
    return lambda convert: Converter(convert, kinds)


def number(kind: type[int] | type[float], low=None, high=None, above=None, below=None) -> Converter:
    """Return a converter to int or float with bounds: low and high are inclusive, `above` and `below` exclusive."""
    bounds = ((low, operator.ge, 'too small: at least'), (above, operator.gt, 'too small: it must be more than'),
              (high, operator.le, 'too large: at most'), (below, operator.lt, 'too large: it must be less than'))

    @recipe_kind(kind)
    def convert(text):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f'{text!r} is not {"an integer" if kind is int else "a number"}') from None
        for bound, holds, problem in bounds:
            if bound is not None and not holds(value, bound):  # NaN fails every bound
                raise argparse.ArgumentTypeError(f'{text} is {problem} {bound}')
        if kind is float and not math.isfinite(value):
            raise argparse.ArgumentTypeError(f'{text} is not a finite number')
        if kind is int and abs(value) >= 2**63:
            raise argparse.ArgumentTypeError(f'{text[:20]}… is too large')
        return value

    return convert


count = number(int, low=0)
positive_int = number(int, low=1)
folds = number(int, low=2)
real = number(float)
rate = number(float, low=0)
positive = number(float, above=0)
probability = number(float, low=0, high=1)
fraction = number(float, low=0, below=1)
share = number(float, above=0, below=1)
seed = number(int, low=0, high=2**32 - 1)
decay = number(float, above=0, high=1)


@recipe_kind(int, str)
def image_size(text):
    """'224' → 224; '192x256' (height x width) → (192, 256)."""
    match = re.fullmatch(r'(\d+)(?:x(\d+))?', str(text))
    if not match:
        raise argparse.ArgumentTypeError(f'{text!r} is not an image size: give 224, or height x width as 192x256')
    height, width = int(match[1]), int(match[2] or match[1])
    if not 1 <= min(height, width) <= max(height, width) <= MAX_IMAGE_SIZE:
        raise argparse.ArgumentTypeError(f'{text} is out of range: give 1 to {MAX_IMAGE_SIZE} pixels')
    return height if height == width else (height, width)


@recipe_kind(int, str)
def frozen_part(text):
    """'backbone' → 'backbone'; '3' → 3, a number of blocks."""
    if str(text) == 'backbone' or re.fullmatch(r'\d{1,4}', str(text)):
        return 'backbone' if str(text) == 'backbone' else int(text)
    raise argparse.ArgumentTypeError(f'{text!r} is no part of a model: give backbone, or a number of blocks such as 3')


@recipe_kind(bool)
def boolean(text):
    """'True', 'yes', '1', … → True; 'False', 'no', '0', … → False. (The published script read 'False' as true.)"""
    if str(text).lower() in ('true', 'yes', 'on', '1'):
        return True
    if str(text).lower() in ('false', 'no', 'off', '0'):
        return False
    raise argparse.ArgumentTypeError(f'{text!r} is neither True nor False')


def set_folder(text):
    """Check 'SET=DIR' and return it unchanged, with an evaluation set of ImageNet's and where it is."""
    name, _, folder = text.partition('=')
    if name not in SETS or not folder:
        raise argparse.ArgumentTypeError(f'{text!r} is no evaluation set: give SET=DIR, with one of {", ".join(SETS)}; '
                                         'a DIR of its own goes before the options')
    return text


def keyword(text):
    """Check 'name=value' and return it unchanged: `utils.keywords` reads the value."""
    name, equals, _ = text.partition('=')
    if not equals or not name.isidentifier():
        raise argparse.ArgumentTypeError(f'{text!r} is no argument: give NAME=VALUE, such as aux_weight=0.25')
    return text
