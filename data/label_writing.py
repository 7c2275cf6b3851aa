"""Writes token labels in either form, file by file, resumable after an interruption: the work of tools/token_labels.py.

    writer = LabelWriter(Path('/labels'), names, shape, form='packed', per_file=40_000, recipe={…})
    with writer.begin():                         # in one process
        for number in writer.pending():          # in any
            writer.write(number, names, labels)
        writer.finish(classes)

A file always gets the same labels, and has its name only when it is whole. So files are kept, and the manifest is
written last; a folder without one is no set of packed labels yet. RECIPE says how the labels are made: a folder that
was begun in another way is refused.
"""
import contextlib
import fcntl
import hashlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from data.classes import name_some
from data.label_store import (
    MAX_CLASSES,
    LabelManifest,
    LabelStore,
    PackedLabels,
    check_values,
    labels_name,
    list_published,
    map_labels,
    packed_file,
    read_names,
    write_published,
)
from data.shards.manifest import MANIFEST, Shard
from utils.disk import make_folder, read_text, write_whole
from utils.errors import UserError

FORMS = ('packed', 'published')
# How the labels in a folder are made, until a manifest says so; published ones keep it.
RECIPE = '.token_labels.json'
# A killed process's workers live this long.
LOCK_SECONDS = 8


class Written(NamedTuple):
    """A whole packed file, with the names of its labels and the largest class in them."""
    shard: Shard
    names: list[str]
    largest_class: int


class LabelWriter:
    """Writes the labels of the images `names`, float16 of `shape` (2, K, H, W), into the folder `out`.

    form: of FORMS. per_file: labels in a packed file, and in a step of the published form.
    recipe: how the labels are made, as plain values.
    """

    def __init__(self, out: Path, names: Sequence[str], shape: tuple[int, ...], *, form: str, per_file: int,
                 recipe: dict):
        self.out, self.names, self.shape, self.is_packed, self.per_file = out, names, shape, form == 'packed', per_file
        self.recipe = json.loads(json.dumps({'form': form, **recipe, 'per_file': per_file}))

    @contextlib.contextmanager
    def begin(self) -> Iterator[None]:
        """Make or take up the folder, and keep other processes from writing into it.

        Raises:
            UserError: it holds something else, or labels that are made in another way.
        """
        make_folder(self.out, 'OUT')
        with _locked(self.out):
            with _explained(self.out):
                self._take_up()
            yield

    def _take_up(self) -> None:
        before = self._recipe_before()
        if before is None:
            if strange := sorted(path.name for path in self.out.iterdir()):
                raise UserError(f'{self.out} holds {name_some(strange, 3)}, and no labels that could be continued; '
                                'name an empty folder')
            write_whole(self.out / RECIPE, json.dumps(self.recipe, indent=1) + '\n')
        elif before != self.recipe:
            name = next(name for name in {**self.recipe, **before} if before.get(name) != self.recipe.get(name))
            raise UserError(f'{self.out} was begun with {name} {before.get(name)!r}, not {self.recipe.get(name)!r}; '
                            'give the same, or another folder')

    def _recipe_before(self) -> dict | None:
        if (self.out / MANIFEST).exists():
            return LabelManifest.read(str(self.out)).recipe
        if not (self.out / RECIPE).exists():
            return None
        try:
            return dict(json.loads(read_text(self.out / RECIPE)))
        except (ValueError, TypeError, RecursionError):
            raise UserError(f'{self.out / RECIPE} is damaged; remove the folder, and begin again') from None

    @property
    def numbers(self) -> range:
        """The numbers of all files."""
        return range(-(-len(self.names) // self.per_file))

    def members(self, number: int) -> range:
        """Return the numbers of the images whose labels belong into file `number`."""
        return range(number * self.per_file, min((number + 1) * self.per_file, len(self.names)))

    def pending(self) -> list[int]:
        """Return the numbers of the files that are not yet written."""
        if self.is_packed:
            return [number for number in self.numbers if not (self.out / labels_name(number)).exists()]
        written = set(list_published(str(self.out)))
        return [number for number in self.numbers if not all(self.names[k] in written for k in self.members(number))]

    def write(self, number: int, names: Sequence[str], labels: torch.Tensor) -> None:
        """Write file `number` with the labels [n, 2, K, H, W] of those of its images that could be decoded."""
        with _explained(self.out):
            if self.is_packed:
                write_whole(self.out / labels_name(number), packed_file(names, labels))
            else:
                for name, label in zip(names, labels, strict=True):
                    write_published(self.out, name, label)

    def describe(self, number: int) -> Written | None:
        """Return what the manifest says of file `number`; None in the published form."""
        if not self.is_packed:
            return None
        path = self.out / labels_name(number)
        names, labels = read_names(str(path)), map_labels(str(path), self.shape)
        largest = int(labels.numpy()[:, 1].max(initial=0))
        return Written(Shard(path.name, path.stat().st_size, len(names), hash_file(path)), names, largest)

    def finish(self, written: Sequence[Written | None], classes: list[str] | None = None) -> list[str]:
        """Write the manifest from `describe` of all files; return the names of the images without a label."""
        files = [file for file in written if file]
        found = {name for file in files for name in file.names} if self.is_packed else set(
            list_published(str(self.out)))
        left_out = [name for name in self.names if name not in found]
        if not found:
            raise UserError(f'{self.out}: not one label could be made; check the images')
        with _explained(self.out):
            if self.is_packed:
                LabelManifest(self.shape, [file.shard for file in files], max(file.largest_class for file in files),
                              classes, self.recipe, left_out).write(self.out)
                (self.out / RECIPE).unlink(missing_ok=True)
        return left_out


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    handle = os.open(folder, os.O_RDONLY)
    try:
        end = time.monotonic() + LOCK_SECONDS
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                if time.monotonic() > end:
                    raise UserError(f'{folder}: another process writes into it; wait for it, or name another '
                                    'folder') from None
                time.sleep(0.1)
        yield
    finally:
        os.close(handle)


@contextlib.contextmanager
def _explained(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f'{error.filename or out}: {error.strerror or error}; what is whole stays: mend it, and the '
                        'same command goes on') from None


def hash_file(path: str | os.PathLike) -> str:
    """Return the SHA-256 of a file, as hexadecimal digits."""
    with open(path, 'rb') as file:
        return hashlib.file_digest(file, 'sha256').hexdigest()


def verify_rows(store: LabelStore, rows: range, num_classes: int) -> list[tuple[str, str]]:
    """Return (where, what) for each fault of the labels `rows` of a store."""
    faults = []
    for row in rows:
        try:
            mistake = check_values(store.read(row), num_classes)
        except UserError as error:
            mistake = str(error).removeprefix(f'{store.where(row)}: ')
        if mistake:
            faults.append((store.where(row), mistake))
    return faults


def verify_part(store: LabelStore, number: int, per_part: int) -> list[tuple[str, str]]:
    """Return the faults of packed file `number`, or of a part of the published labels."""
    if not isinstance(store, PackedLabels):
        return verify_rows(store, range(number * per_part, min((number + 1) * per_part, len(store))), MAX_CLASSES)
    shard = store.manifest.shards[number]
    path = os.path.join(store.folder, shard.name)
    if hash_file(path) != shard.sha256:
        return [(path, 'another checksum than in the manifest: its content has changed')]
    return verify_rows(store, store.rows_of(number), store.num_classes or MAX_CLASSES)
