"""Splits whose tar files lie together in one folder, as timm and the Hugging Face Hub have them.

    splits_together(parse_place('wds:/data/imagenet1k'))    # {'train': Place(…), 'val': Place(…)}
"""
import json
import os
import re
from collections.abc import Callable

from data.classes import name_some
from data.places import Place
from data.shards.remote import NotFoundError
from utils.errors import UserError

# timm's list of the splits.
INFO = '_info.json'
# Splits, and the words in names that mean them.
WORDS = {'train': ('train', 'training'), 'val': ('val', 'valid', 'validation', 'dev'), 'test': ('test', 'testing')}
_SPLIT_OF = {word: split for split, words in WORDS.items() for word in words}


def splits_together(place: Place, read: Callable[[str], bytes]) -> dict[str, Place]:
    """Return the splits in the folder or at the address `place`, by the names in WORDS; {} if its names tell none.

    _info.json lists them; without it, on this machine, the names of the tar files tell them.

    read: returns the content of a file in `place`.
    Raises UserError for an _info.json that is none, and for tar files of which only some names tell a split.
    """
    if place.is_pattern:
        return {}
    try:
        content = read(INFO) if place.is_remote or os.path.exists(place.join(INFO).path) else None
    except NotFoundError:
        content = None
    if content is not None:
        listed = _read_info(content, str(place.join(INFO)))
        return {split_of(name) or name: place.with_files(name, files) for name, files in listed.items()}
    found: dict[str | None, list[str]] = {}
    for tar in place.tars():
        name = os.path.basename(tar.path)
        found.setdefault(split_of(name), []).append(name)
    if not found.keys() - {None}:
        return {}
    if others := found.pop(None, None):
        raise UserError(f'{place}: some of its tar files tell their split by their names, others do not '
                        f'({name_some(others)}); give each split a folder, or name them with --train-split and '
                        '--val-split, such as train-{0000..0099}.tar')
    return {name: place.with_files(name, files) for name, files in found.items() if name}


def split_of(name: str) -> str | None:
    """Return the split that a name tells by its last such word: 'imagenet1k-validation-00.tar' → 'val'."""
    words = re.split(r'[^a-z]+', name.lower())
    return next((_SPLIT_OF[word] for word in reversed(words) if word in _SPLIT_OF), None)


def _read_info(content: bytes, where: str) -> dict[str, list[str]]:
    """Return the tar files of each split that _info.json lists."""
    try:
        listed = {str(name): [str(file) for file in split['filenames']]
                  for name, split in json.loads(content)['splits'].items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(f'{where} lists no splits as timm writes them, {{"splits": {{"train": {{"filenames": …}}}}}}; '
                        'correct it, or remove it if the names of the tar files tell their split') from None
    for name in (file for files in listed.values() for file in files):
        if not re.fullmatch(r'\w[\w.-]*\.tar', name):  # it becomes a path
            raise UserError(f'{where}: {name[:80]!r} is no name of a tar file in its folder; correct it')
    return {name: files for name, files in listed.items() if files}
