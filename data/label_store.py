"""Token labels on disk, in two forms; `open_store` opens either.

published   DIR/CLASS/IMAGE.pt: one file of torch.save for each image, named up to the first dot of the image's name
packed      DIR/manifest.json and DIR/labels-000000.safetensors …, each with the tensors
                labels      float16 [n, 2, K, H, W]: the K highest logits at each of H × W positions, then their classes
                names       uint8, the images' names without their endings, one after the other
                name_ends   int64 [n], where each of them ends

A million small files are slow to copy and to list. Packed labels are mapped into memory, which all processes share.
Half precision holds whole numbers up to MAX_CLASSES exactly.
"""
import io
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from data.base import PathList
from data.shards.manifest import CONTROL, MANIFEST, Shard
from utils.checkpoint_reader import read_tensor
from utils.disk import read_text, write_whole
from utils.errors import UserError

FORMAT, VERSION = 't2t-token-labels', 1
MAX_CLASSES = 2048
ENDING = '.pt'
MEND = 'copy it again, or see what is wrong with python tools/token_labels.py --verify'


def labels_name(number: int) -> str:
    return f'labels-{number:06d}.safetensors'


class LabelStore(ABC):
    """A numbered list of token labels.

    names: of the images, without their endings. shape: (2, K, H, W), the same of all labels.
    classes, num_classes: the names and number of the teacher's classes; None if they are unknown.
    """
    classes: list[str] | None = None
    num_classes: int | None = None

    def __init__(self, folder: str, names: Sequence[str], shape: tuple[int, ...]):
        self.folder, self.names, self.shape = folder, names, shape

    def __len__(self) -> int:
        return len(self.names)

    @abstractmethod
    def read(self, row: int) -> torch.Tensor:
        """Return label `row`, float16 [2, K, H, W], not to be written to. Raises UserError for a damaged file."""

    @abstractmethod
    def where(self, row: int) -> str:
        """Return where label `row` is, for messages."""


def open_store(folder: str | os.PathLike) -> LabelStore:
    """Return the labels in `folder`. Raises UserError if there are none, or if a file is missing or incomplete."""
    folder = os.path.expanduser(os.fspath(folder)).rstrip('/') or '/'
    if not os.path.isdir(folder):
        state = 'is not a folder' if os.path.lexists(folder) else 'does not exist'
        raise UserError(f'folder of token labels {folder!r} {state}; check the path')
    is_packed = os.path.exists(os.path.join(folder, MANIFEST))
    return PackedLabels(folder) if is_packed else PublishedLabels(folder)


def check_values(label: torch.Tensor, num_classes: int) -> str:
    """Return what is wrong with the numbers in labels [..., 2, K, H, W], '' for nothing."""
    scores, classes = label.numpy()[..., 0, :, :, :], label.numpy()[..., 1, :, :, :]
    if not np.isfinite(scores).all():
        return f'its scores are not all finite; {MEND}'
    if not ((classes >= 0) & (classes == np.floor(classes))).all():
        return f'its classes are not all whole numbers; {MEND}'
    if (largest := int(classes.max(initial=0))) >= num_classes:
        return (f'it has the class {largest}, and the model {num_classes} classes, from 0; give labels of a teacher of '
                'the same classes')
    return ''


# ---------------------------------------------------------------------------------------------------------------------
# The published form


class PublishedLabels(LabelStore):
    """One file for each image. Their names are listed once; nothing but the first file is opened until it is read."""

    def __init__(self, folder: str):
        names = sorted(list_published(folder))
        if not names:
            raise UserError(f'{folder}: no token labels in it; CLASS/IMAGE{ENDING} or {MANIFEST} are expected')
        super().__init__(folder, PathList(names), ())
        self.shape = tuple(self._read(0).shape)

    def read(self, row: int) -> torch.Tensor:
        label = self._read(row)
        if tuple(label.shape) != self.shape:
            raise UserError(f'{self.where(row)}: a label of shape {list(label.shape)}, and {list(self.shape)} in '
                            f'{self.where(0)}; the labels of a folder have one shape')
        return label

    def _read(self, row: int) -> torch.Tensor:
        path = self.where(row)
        label = read_tensor(path)
        is_label = (label.dtype == torch.float16 and label.layout == torch.strided and label.ndim == 4
                    and label.shape[0] == 2 and min(label.shape) > 0
                    and label.untyped_storage().nbytes() >= label.nbytes)  # a few bytes can claim to be any number
        if not is_label:
            raise UserError(f'{path}: {str(label.dtype).removeprefix("torch.")} {list(label.shape)} is no token label, '
                            'which is float16 [2, K, height, width]')
        return label.contiguous()

    def where(self, row: int) -> str:
        return os.path.join(self.folder, self.names[row] + ENDING)


def list_published(folder: str) -> list[str]:
    """Return the names of the images that have a file in `folder`, without looking at the files."""
    names = []
    for inner, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith('.')]
        prefix = '' if inner == folder else os.path.relpath(inner, folder) + '/'
        names += [prefix + name.removesuffix(ENDING) for name in files
                  if name.endswith(ENDING) and not name.startswith('.')]
    return names


def write_published(folder: Path, name: str, label: torch.Tensor) -> None:
    """Write the label, float16 [2, K, H, W], of the image `name`. A process that is killed leaves no half a file."""
    path = folder / (name + ENDING)
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()  # torch would store the name of a file in it
    torch.save(label.clone(), buffer)
    temporary = path.with_name(f'.{path.name}.tmp')
    temporary.write_bytes(buffer.getvalue())
    temporary.replace(path)


# ---------------------------------------------------------------------------------------------------------------------
# The packed form


@dataclass
class LabelManifest:
    """What manifest.json says of packed labels.

    shape: (2, K, H, W). shards: the files, `samples` labels each. largest_class: the largest number in the labels.
    classes: the names of the teacher's classes; None if they are unknown. recipe: how the labels were made.
    left_out: names of the images that could not be decoded.
    """
    shape: tuple[int, ...]
    shards: list[Shard]
    largest_class: int
    classes: list[str] | None = None
    recipe: dict = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)

    def write(self, folder: Path) -> None:
        content = {'format': FORMAT, 'version': VERSION, 'labels': sum(shard.samples for shard in self.shards),
                   **asdict(self)}
        write_whole(folder / MANIFEST, json.dumps(content, indent=1) + '\n')

    @classmethod
    def read(cls, folder: str) -> 'LabelManifest':
        """Raises UserError if manifest.json is not one, or contradicts itself."""
        path = os.path.join(folder, MANIFEST)
        try:
            content = json.loads(read_text(path))
            if content['format'] != FORMAT:
                raise ValueError(f'its format is {str(content["format"])[:40]!r}')
            if content['version'] != VERSION:
                raise UserError(f'{path}: version {str(content["version"])[:40]} of the format; this program knows '
                                f'{VERSION}')
            classes = content['classes']
            manifest = cls(tuple(int(side) for side in content['shape']),
                           [Shard(str(shard['name']), int(shard['bytes']), int(shard['samples']), str(shard['sha256']))
                            for shard in content['shards']],
                           int(content['largest_class']), None if classes is None else [str(name) for name in classes],
                           dict(content['recipe']), [str(name) for name in content['left_out']])
            numbers = [shard.samples for shard in manifest.shards]
            if len(manifest.shape) != 4 or manifest.shape[0] != 2 or min(manifest.shape) < 1:
                raise ValueError(f'its labels have the shape {content["shape"]}')
            if any(shard.name != labels_name(number) for number, shard in enumerate(manifest.shards)):
                raise ValueError('its files have other names')
            if min(numbers, default=0) < 0 or not sum(numbers) or sum(numbers) != content['labels']:
                raise ValueError(f'{content["labels"]} labels, {sum(numbers)} in its files')
            if any(map(CONTROL.search, manifest.classes or ())):  # these would reach the console
                raise ValueError('names of classes hold control characters')
        except UserError:
            raise
        except OSError as error:
            raise UserError(f'{path} cannot be read ({error.strerror}); {MEND}') from None
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            reason = f'no {error}' if isinstance(error, KeyError) else str(error)
            raise UserError(f'{path} is damaged, or no manifest of token labels ({reason}); {MEND}') from None
        return manifest


class PackedLabels(LabelStore):
    """Labels in a few files, mapped into memory: `read` copies nothing, and processes share what they read."""

    def __init__(self, folder: str):
        self.manifest = manifest = LabelManifest.read(folder)
        self._starts = np.cumsum([0] + [shard.samples for shard in manifest.shards])
        names: list[str] = []
        for number, shard in enumerate(manifest.shards):
            path = os.path.join(folder, shard.name)
            check_length(path, shard)
            names += read_names(path)
            if len(names) != self._starts[number + 1]:
                raise UserError(f'{path}: not the {shard.samples} labels that {MANIFEST} names; {MEND}')
        super().__init__(folder, PathList(names), manifest.shape)
        self.classes = manifest.classes
        self.num_classes = len(manifest.classes) if manifest.classes else manifest.largest_class + 1
        self._maps: dict[int, torch.Tensor] = {}

    def __getstate__(self) -> dict:
        return {**self.__dict__, '_maps': {}}  # each process maps the files itself, but for forked ones

    def read(self, row: int) -> torch.Tensor:
        number = int(np.searchsorted(self._starts, row, 'right')) - 1
        if number not in self._maps:
            self._maps[number] = map_labels(os.path.join(self.folder, self.manifest.shards[number].name), self.shape)
        return self._maps[number][row - int(self._starts[number])]

    def rows_of(self, number: int) -> range:
        """Return the rows of the labels in file `number`."""
        return range(int(self._starts[number]), int(self._starts[number + 1]))

    def where(self, row: int) -> str:
        number = int(np.searchsorted(self._starts, row, 'right')) - 1
        return f'{os.path.join(self.folder, self.manifest.shards[number].name)}::{self.names[row]}'


def check_length(path: str, shard: Shard) -> None:
    """Raise UserError unless a file is there, as long as the manifest says."""
    try:
        size = os.stat(path).st_size
    except OSError as error:
        raise UserError(f'{path} cannot be read ({error.strerror}); {MEND}') from None
    if size != shard.bytes:
        raise UserError(f'{path} {"ends early" if size < shard.bytes else "is too long"}: {size:,} bytes, '
                        f'{shard.bytes:,} in its manifest; {MEND}')


def map_labels(path: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Return the labels of a packed file, float16 [n, 2, K, H, W], mapped into memory."""
    labels = _tensors(path, 'labels')[0]
    if labels.dtype != torch.float16 or tuple(labels.shape[1:]) != shape:
        raise UserError(f'{path}: its labels are {labels.dtype} {list(labels.shape)}, not float16 [n, '
                        f'{", ".join(map(str, shape))}]; {MEND}')
    return labels


def read_names(path: str) -> list[str]:
    """Return the names of the images in a packed file."""
    names, ends = _tensors(path, 'names', 'name_ends')
    if names.dtype != torch.uint8 or ends.dtype != torch.int64 or names.ndim != 1 or ends.ndim != 1:
        raise UserError(f'{path}: no names of images; {MEND}')
    content, limits = names.numpy().tobytes(), [0, *ends.tolist()]
    if limits != sorted(limits) or limits[-1] != len(content):
        raise UserError(f'{path}: the names of its images have impossible lengths; {MEND}')
    if ((names < 32) | (names == 127)).any():  # these would reach the console
        raise UserError(f'{path}: names of images hold control characters; {MEND}')
    found = [os.fsdecode(content[start:end]) for start, end in pairwise(limits)]
    if outside := next((name for name in found if name.startswith('/') or '..' in name.split('/') or not name), None):
        raise UserError(f'{path}: {outside!r} is no name of an image in a data set; {MEND}')
    return found


def _tensors(path: str, *names: str) -> list[torch.Tensor]:
    try:
        with safe_open(path, 'pt') as file:
            return [file.get_tensor(name) for name in names]
    except (SafetensorError, OSError) as error:
        raise UserError(f'{path} is damaged or incomplete ({str(error)[:160]}); {MEND}') from None


def packed_file(names: Sequence[str], labels: torch.Tensor) -> bytes:
    """Return the content of a packed file: the labels, float16 [n, 2, K, H, W], of images `names`."""
    encoded = [os.fsencode(name) for name in names]
    return save({'labels': labels.contiguous(), 'names': torch.tensor(list(b''.join(encoded)), dtype=torch.uint8),
                 'name_ends': torch.tensor([len(name) for name in encoded], dtype=torch.int64).cumsum(0)})
