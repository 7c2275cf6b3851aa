"""Class names and their numbers: class-map files, subsets of classes, and the check that two splits agree.

A target is a position in a list of class names. If two lists differ by one folder, every later class gets another
number, and only a bad accuracy shows it. So one list rules, and a difference is an error.
"""
import os
import re
from collections import Counter
from collections.abc import Sequence

from timm.data import ImageNetInfo

from data.base import ClassView, ImageDataset
from utils.disk import read_text
from utils.errors import UserError


def read_class_map(path: str | os.PathLike) -> list[str]:
    """Return the class names in the file `path`, in order of their numbers.

    The file has a class name per line, or a name and its number on every line; empty lines are skipped. The word
    'imagenet' stands for the 1,000 synsets of ImageNet-1k in their usual order.
    Raises UserError if the file cannot be read, names a class twice, or numbers its classes wrongly.
    """
    if path == 'imagenet':
        return ImageNetInfo('imagenet-1k').label_names()
    try:
        lines = [line.strip() for line in read_text(path).split('\n') if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, 'strerror', None) or 'not UTF-8 text'
        raise UserError(f'class map {path}: {reason}; give a text file, one class name per line') from None
    numbered = [match for line in lines if (match := re.fullmatch(r'(.*\S)\s+(\d+)', line))]
    # 'boeing 747' is a name; only if every line ends in a number are these the numbers of classes.
    if lines and len(numbered) == len(lines):
        pairs = sorted((int(match[2]), match[1]) for match in numbered)
        if [number for number, _ in pairs] != list(range(len(pairs))):
            raise UserError(f'class map {path}: classes are not numbered 0 to {len(pairs) - 1}; '
                            'number each once, or leave the numbers out')
        lines = [name for _, name in pairs]
    if repeated := [name for name, count in Counter(lines).items() if count > 1]:
        raise UserError(f'class map {path}: repeats {name_some(repeated)}; name every class once')
    if not lines:
        raise UserError(f'class map {path}: empty; give one class name per line')
    return lines


def select_classes(dataset: ImageDataset, only_classes: str | None) -> ImageDataset:
    """Return `dataset` reduced to some classes, renumbered from 0 in their old order; all of it for None or ''.

    only_classes: names, numbers and ranges of either, separated by commas: '0-4', 'cat,dog', 'cat-frog,9'. The name of
    a class is taken as that name even if it looks like a number.
    Raises UserError if an item is no class of `dataset`, or if fewer than two classes are left.
    """
    if not only_classes:
        return dataset
    chosen = set()
    for item in str(only_classes).split(','):
        chosen.update(_class_range(item.strip(), dataset.classes))
    if len(chosen) < 2:
        raise UserError(f'only_classes {only_classes!r} leaves {len(chosen)} class; name at least two')
    view = ClassView(dataset, [dataset.classes[target] for target in sorted(chosen)])
    if not len(view):
        raise UserError(f'only_classes {only_classes!r} leaves no images; choose classes that have some')
    return view


def _class_range(item: str, classes: list[str]) -> list[int]:
    """Return the targets of `item`: one class, or all from a first to a last class."""
    if (target := class_number(item, classes)) is not None:
        return [target]
    # Names may contain hyphens, so every hyphen is tried as the one between first and last.
    for hyphen in re.finditer('-', item):
        first = class_number(item[:hyphen.start()].strip(), classes)
        last = class_number(item[hyphen.end():].strip(), classes)
        if first is not None and last is not None and first <= last:
            return list(range(first, last + 1))
    raise UserError(f'--only-classes: {item!r} is none of the {len(classes)} classes ({name_some(classes)}); '
                    f'give names, numbers from 0 to {len(classes) - 1}, or ranges such as 0-4')


def class_number(text: str, classes: Sequence[str]) -> int | None:
    """Return the number of a class given by its name or its number, counted from 0; None for neither."""
    if text in classes:
        return classes.index(text)
    return int(text) if text.isdecimal() and int(text) < len(classes) else None


def match_classes(dataset: ImageDataset, classes: Sequence[str], *, where: str, map_source: str,
                  allow_missing: bool = False) -> ImageDataset:
    """Return `dataset` with the class numbers of `classes`.

    where: what messages call `dataset`. map_source: what they call the owner of `classes`.
    Raises UserError with the classes that `classes` lacks, or that `dataset` lacks unless `allow_missing`.
    """
    if dataset.classes == list(classes):
        return dataset
    known, present = set(classes), set(dataset.classes)
    extra = [name for name in dataset.classes if name not in known]
    missing = [name for name in classes if name not in present]
    if extra:
        raise UserError(f'{where}: {_count_classes(extra)} not in the class map of {map_source} '
                        f'({len(classes)} classes): {name_some(extra)}; remove them or use its class map')
    if missing and not allow_missing:
        raise UserError(f'{where}: lacks {_count_classes(missing)} of {map_source}: {name_some(missing)}; '
                        'complete it (the folder of a class may be empty), or evaluate apart, with validate.py')
    return ClassView(dataset, classes)


def are_positions(names: Sequence[str], count: int) -> bool:
    """Return whether all names are numbers from 0 up to, but not including, `count`, as in ImageNet-V2."""
    return all(name.isdecimal() and len(name) < 10 and int(name) < count for name in names)


def _count_classes(names: list[str]) -> str:
    return f'{len(names)} class{"es" if len(names) > 1 else ""}'


def name_some(names: Sequence[str], limit: int = 5) -> str:
    """Return the first `limit` of `names` in quotation marks and how many more there are, for messages."""
    shown = ', '.join(repr(name) for name in names[:limit])
    return shown if len(names) <= limit else f'{shown} and {len(names) - limit} more'
