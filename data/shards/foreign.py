"""An index of tar files in WebDataset's format that have no manifest."""
import json
import os
from itertools import groupby
from operator import itemgetter
from typing import BinaryIO

from timm.utils.misc import natural_key

from data.classes import name_some
from data.decode import EXTENSIONS
from data.shards.cache import Files
from data.shards.manifest import Index, Manifest, Shard, key_of
from data.shards.tar import refusal, scan_tar
from utils.console import progress_bar
from utils.errors import UserError

# The `source` of a manifest whose classes are numbers without names.
NUMBERED = 'tar files without a manifest, whose classes are numbers'
# Longer labels, in bytes, are refused.
MAX_LABEL = 1 << 20


class NoClassError(UserError):
    """An image in the tar files `files` has no class."""

    files: Files


def index_shards(files: Files, *, with_classes: bool = True) -> Manifest:
    """Return a manifest of WebDataset's tar files from their headers: images with their class in a .cls or .json.

    Classes are names, in natural order, or numbers from 0, which `Shards.name_numbers` may name.

    with_classes: False gives all images one class, whatever is said of them.
    Raises UserError as `scan_tar`, NoClassError for an image without a class, and UserError for a mixture of names and
    numbers.
    """
    shards, members, labels = [], [], []
    with progress_bar(desc='scanning shards', total=len(files.names), unit='shard') as bar:
        for number, where in enumerate(files.names):
            try:
                with files.open(number) as file:
                    found = _index_tar(file, where, with_classes)
                    size = file.seek(0, os.SEEK_END)
            except NoClassError as error:
                error.files = files
                raise
            except OSError as error:
                raise UserError(f'{where} cannot be read ({error.strerror or error}); check the file') from None
            shards.append(Shard(_plain_name(number), size, len(found), ''))
            members += [member for member, _ in found]
            labels += [label for _, label in found]
            bar.update()
    if not members:
        raise UserError(f'{files.names[0]}: no images ({", ".join(EXTENSIONS)}) with a class (.cls or .json) in it'
                        f'{f" and {len(shards) - 1} more" if len(shards) > 1 else ""}')
    kinds = {type(label) for label in labels}
    if len(kinds) > 1:
        names = sorted({label for label in labels if isinstance(label, str)})
        raise UserError(f'{files.names[0]}: classes are partly numbers, partly names ({name_some(names)}); '
                        'pack the images again with either')
    if kinds == {int}:
        classes, targets, source = [str(number) for number in range(max(labels) + 1)], labels, NUMBERED
    else:
        source = 'tar files without a manifest'
        classes = sorted(sorted(set(labels)), key=natural_key)
        position = {name: target for target, name in enumerate(classes)}
        targets = [position[label] for label in labels]
    return Manifest(classes, shards, Index.of(members, targets), source)


def _plain_name(number: int) -> str:
    """Return a name for the manifest: the files' own names may be invalid, or the same."""
    return f'{number:06d}.tar'


def _index_tar(file: BinaryIO, where: str, with_classes: bool) -> list[tuple]:
    """Return the images of a tar file with their labels, or 'unknown': [(Member, int or str)]."""
    found, done = [], set()
    members = [(*key_of(member.name), member) for member in scan_tar(file, where)]
    # A hidden file, or one without ending, belongs to no sample.
    visible = [part for part in members if part[1] and os.path.basename(part[0])]
    for key, sample in groupby(visible, itemgetter(0)):
        parts = {ending.lower(): member for _, ending, member in sample}
        if key in done:
            raise refusal(where, next(iter(parts.values())).name, 'apart from the others of its key')
        done.add(key)
        if image := _image_of(parts, where):
            found.append((image, _label_of(parts, file, where, image) if with_classes else 'unknown'))
    return found


def _image_of(group: dict, where: str):
    images = [member for ending, member in group.items() if f'.{ending}' in EXTENSIONS]
    if len(images) > 1:
        raise UserError(f'{where}: {images[0].name!r} and {images[1].name!r}: two images of one key; keep one')
    return images[0] if images else None


def _label_of(group: dict, file: BinaryIO, where: str, image) -> int | str:
    """Return the class of a sample, from its .cls or .json; a number if it looks like one."""
    label = None
    for ending in ('cls', 'json'):
        if ending in group and label is None:
            member = group[ending]
            if member.size > MAX_LABEL:
                raise refusal(where, member.name, f'{member.size:,} bytes long, which is no label')
            file.seek(member.offset)
            try:
                text = file.read(member.size).decode('utf-8-sig').strip()
                if ending == 'json':
                    content = json.loads(text)
                    text = next((content[name] for name in ('cls', 'label', 'class') if name in content), '')
            except (ValueError, TypeError, RecursionError):
                raise UserError(f'{where}: {member.name!r} is no label: a number or a name is expected in a .cls, '
                                '{"label": …} in a .json') from None
            label = str(text) if isinstance(text, str | int) and str(text).isprintable() and str(text) else None
    if label is None:
        raise NoClassError(f'{where}: {image.name!r} has no class, neither as .cls nor as "label" in a .json; '
                        'training and evaluation need one')
    if not label.isdecimal():
        return label
    if len(label) > 100 or int(label) >= 1 << 20:
        raise UserError(f'{where}: {image.name!r} is of class {label[:20]}; numbers of classes begin with 0')
    return int(label)
