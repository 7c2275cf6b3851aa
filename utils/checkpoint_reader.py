"""Reads checkpoint files of any origin without running their code."""
import argparse
import collections
import datetime
import hashlib
import json
import os
import pathlib
import pickle
import re
import zipfile
from typing import Any, cast

import numpy as np
import safetensors
import safetensors.torch
import torch

from utils import paddle_reader
from utils.errors import UserError

# Files that people mistake for a checkpoint: their first bytes, what they are, what to do.
IMPOSTORS = (
    (b'version https://git-lfs', 'a Git LFS pointer', 'fetch the file itself with git lfs pull'),
    (b'/annex/objects/', 'a git-annex pointer', 'fetch the file itself with git annex get'),
    (b'<!doctype html', 'a web page', 'download the file itself'),
    (b'<html', 'a web page', 'download the file itself'),
    (b'\x89hdf', 'an HDF5 file, as Keras writes', 'give weights saved by PyTorch'),
    (b'gguf', 'a GGUF file', 'give weights saved by PyTorch'),
    (b'\x1f\x8b', 'compressed by gzip', 'unpack it first'),
    (b'\xfd7zxz', 'compressed by xz', 'unpack it first'),
    (b'\x28\xb5\x2f\xfd', 'compressed by zstd', 'unpack it first'),
)
# The same of zip archives, by the end of a name in them.
IMPOSTOR_ARCHIVES = (
    ('.npy', 'an archive of numpy arrays (npz)', 'give weights saved by PyTorch'),
    ('constants.pkl', 'a TorchScript program', 'save its weights: torch.save(torch.jit.load(path).state_dict(), …)'),
    ('archive_format', 'an exported program (.pt2)', 'give the checkpoint that it was made from'),
    ('.pth', 'a zip archive of other files', 'unpack it first'),
    ('.safetensors', 'a zip archive of other files', 'unpack it first'),
)

# A map of msgpack: its number of entries, then a name of at least one letter.
MSGPACK = re.compile(rb'([\x81-\x8f]|\xde..|\xdf....)([\xa1-\xbf]|\xd9[^\x00])[A-Za-z0-9_]', re.DOTALL)

# The metadata entry in which our safetensors files store, as JSON, what a PyTorch checkpoint has beside 'state_dict'.
METADATA = 't2t_vit'

# A checkpoint of a run ends in its own checksum, as the comment of torch's zip archive: two bytes of length, then SEAL
# and the SHA-256 of everything before the length. Copies, links and renames keep it.
SEAL = b'sha256:'
SEAL_LENGTH = len(SEAL) + 2 * hashlib.sha256().digest_size
END_OF_ARCHIVE = b'PK\5\6'

# Codes of the dtypes of numbers, texts and dates.
DTYPE = re.compile(r'b1|[iu][1248]|f(2|4|8|16)|c(8|16)|[SU][0-9]{1,6}|[mM]8')


# --- What may stand beside weights ------------------------------------------------------------------------------------

def _as_list(items: Any = (), *_) -> list:
    return list(items) if isinstance(items, list | tuple | set) else []  # of a tensor it could take forever


class _Text(str):
    """A text; empty for anything else, whose text could be endless. A pickle makes it with `__new__`."""

    def __new__(cls, text: Any = '', *_):
        return str(text) if isinstance(text, str) else ''


def _as_dict(*_) -> dict:
    return {}


def _as_nothing(*_) -> None:
    return None


class _DType:
    """A dtype of a pickle. numpy's own takes flags from the pickle, and then bytes for the addresses of objects."""

    def __init__(self, code: Any = '', *_):
        self.code, self.order, self.unit = code, '=', ''

    def __setstate__(self, state: Any) -> None:
        """Take the byte order, and the unit of dates."""
        self.order = state[1]
        if len(state) > 8:  # (metadata, (unit, number of units, …))
            unit, count = state[8][1][:2]
            self.unit = f'[{int(count)}{bytes(unit).decode()}]' if isinstance(unit, bytes) else ''

    def is_of_objects(self) -> bool:
        return self.code in ('O', 'O8')

    def read(self, content: Any) -> np.ndarray:
        """Return the numbers or texts in bytes; none if they are of another kind, such as records."""
        known = isinstance(self.code, str) and DTYPE.fullmatch(self.code)
        if not known or self.order not in ('<', '>', '=', '|') or not isinstance(content, bytes):
            return np.empty(0, np.int8)
        return np.frombuffer(content, np.dtype(self.order + self.code + self.unit))


class _Array(np.ndarray):
    """An array of a pickle: empty until its state gives it shape and content."""

    def __new__(cls, *_):
        return super().__new__(cls, 0, np.int8)

    def __setstate__(self, state: Any) -> None:
        """Take the content, or raise ValueError unless it has as many items as the shape."""
        _, shape, dtype, is_fortran, content = state
        if dtype.is_of_objects():
            items = np.fromiter(_as_list(content), object)
        else:
            items = dtype.read(content)
        array = items.reshape(shape, order='F' if is_fortran else 'C') if items.size else items
        kept = list(array.flat) if array.dtype.hasobject else array.tobytes()
        super().__setstate__(cast(Any, (1, array.shape, array.dtype, False, kept)))

    def __reduce__(self):
        return np.asarray(self).__reduce__()


def _as_scalar(dtype: Any = None, content: Any = None, *_) -> Any:
    """Return a number of numpy, or None if it is of another kind."""
    if not isinstance(dtype, _DType) or dtype.is_of_objects():
        return content
    return next(iter(dtype.read(content)), None)


# Names that pickles of other programs hold → what stands for them here: never what could do anything. Dicts of options
# become OrderedDicts, objects with attributes Namespaces.
STAND_INS: dict[str, Any] = {
    'argparse.Namespace': argparse.Namespace,
    'types.SimpleNamespace': argparse.Namespace,
    'collections.deque': _as_list,
    'collections.defaultdict': _as_dict,
    **{f'builtins.{name}': _as_nothing for name in ('bool', 'dict', 'float', 'getattr', 'int', 'list', 'str', 'tuple')},
    'builtins.frozenset': _as_list,
    'builtins.range': _as_nothing,
    'builtins.slice': _as_nothing,
    'datetime.date': datetime.date,
    'datetime.datetime': datetime.datetime,
    'datetime.timedelta': datetime.timedelta,
    'torch.torch_version.TorchVersion': _Text,
    **{f'{module}.{name}': path for module in ('pathlib', 'pathlib._local')
       for name, path in (('PosixPath', pathlib.PurePosixPath), ('PurePosixPath', pathlib.PurePosixPath),
                          ('WindowsPath', pathlib.PureWindowsPath), ('PureWindowsPath', pathlib.PureWindowsPath))},
    'numpy.dtype': _DType,
    'numpy.ndarray': _Array,
    **{f'{module}.multiarray.{name}': function for module in ('numpy.core', 'numpy._core')
       for name, function in (('scalar', _as_scalar), ('_reconstruct', _Array))},
    **dict.fromkeys((
        'addict.addict.Dict', 'easydict.EasyDict', 'yacs.config.CfgNode', 'mmcv.utils.config.ConfigDict',
        'mmengine.config.config.ConfigDict', 'lightning.fabric.utilities.data.AttributeDict',
        'lightning.pytorch.utilities.parsing.AttributeDict', 'lightning_fabric.utilities.data.AttributeDict',
        'pytorch_lightning.utilities.parsing.AttributeDict'), collections.OrderedDict),
    **dict.fromkeys((
        'mmengine.logging.history_buffer.HistoryBuffer', 'omegaconf.base.ContainerMetadata', 'omegaconf.base.Metadata',
        'omegaconf.dictconfig.DictConfig', 'omegaconf.listconfig.ListConfig', 'omegaconf.nodes.AnyNode',
        'omegaconf.nodes.BooleanNode', 'omegaconf.nodes.FloatNode', 'omegaconf.nodes.IntegerNode',
        'omegaconf.nodes.StringNode', 'typing.Any'), argparse.Namespace),
    'deepspeed.runtime.fp16.loss_scaler.LossScaler': argparse.Namespace,
    'deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler': argparse.Namespace,
    'deepspeed.runtime.zero.config.ZeroStageEnum': _as_nothing,
    'deepspeed.utils.tensor_fragment.fragment_address': argparse.Namespace,  # made by __new__
}


# --- Reading ----------------------------------------------------------------------------------------------------------

def read_checkpoint(path: str | os.PathLike, *, verified: bool = False) -> dict[str, Any]:
    """Read a PyTorch, PaddlePaddle or safetensors file onto the CPU and return the dict it holds.

    The content tells the format. Weights are tensors, or numpy arrays from a PaddlePaddle file. A safetensors file is
    a flat state dict or, with METADATA, a dict with 'state_dict'.

    No code in the file is run: only tensors, arrays, plain containers and STAND_INS for what other programs keep
    beside weights are allowed, without a fallback.

    Args:
        verified: the file must have a checksum, as every checkpoint of a run has. Any checksum must fit in any case.
    Raises:
        UserError: the file is missing, is not a checkpoint, is damaged, or holds other objects.
    """
    path = os.fspath(path)
    head = _file_start(path)
    verify_checksum(path, required=verified)
    if head[8:9] == b'{':  # a safetensors file: eight bytes of length, then JSON
        return _read_safetensors(path)
    try:
        if paddle_reader.is_bare_pickle(head):
            return _read_paddle(path)
        with torch.serialization.safe_globals([(value, name) for name, value in STAND_INS.items()]):
            checkpoint = torch.load(path, map_location='cpu', weights_only=True)
    except UserError:
        raise
    except pickle.UnpicklingError as error:
        raise UserError(_explain_unpickling(path, error)) from error
    except Exception as error:  # a damaged file may cause any error: KeyError, EOFError, …
        raise UserError(f'{path} is damaged, incomplete or not a PyTorch checkpoint ({_first_line(error)}); '
                        'compare its size with the original and copy it again') from error
    if not isinstance(checkpoint, dict):
        raise UserError(f'{path} holds a {type(checkpoint).__name__}, not a checkpoint; '
                        'save a dict, such as model.state_dict()')
    return checkpoint


def read_tensor(path: str | os.PathLike) -> torch.Tensor:
    """Read a file of torch.save that holds a single tensor onto the CPU, without running code in it.

    Raises:
        UserError: as `read_checkpoint`, or the file holds another object.
    """
    path = os.fspath(path)
    _file_start(path)
    try:
        tensor = torch.load(path, map_location='cpu', weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(_explain_unpickling(path, error)) from error
    except Exception as error:  # a damaged file may cause any error: KeyError, EOFError, …
        raise UserError(f'{path} is damaged or incomplete ({_first_line(error)}); copy it again') from error
    if not isinstance(tensor, torch.Tensor):
        raise UserError(f'{path} holds a {type(tensor).__name__}, not a tensor; copy it again')
    return tensor


def seal(digest: str) -> bytes:
    """Return the end of a file whose SHA-256 so far is `digest`; torch ends its files with two zeros instead."""
    return SEAL_LENGTH.to_bytes(2, 'little') + SEAL + digest.encode()


def verify_checksum(path: str | os.PathLike, *, required: bool = True) -> None:
    """Compare a file with the checksum at its end, since torch does not notice changed bits of weights.

    Raises:
        UserError: the file is damaged or cannot be read, or it lacks a `required` checksum.
    """
    path = os.fspath(path)
    _file_start(path)
    try:
        with open(path, 'rb') as file:
            size = file.seek(0, os.SEEK_END)
            length = SEAL_LENGTH + 2
            file.seek(max(0, size - length - len(END_OF_ARCHIVE) - 16))
            end = file.read()
            if not _is_sealed(end):
                if required:
                    raise UserError(f'{path} has no checksum, as every checkpoint of a run has: it is damaged or of '
                                    'another kind; resume another one, or start from its weights with '
                                    '--initial-checkpoint')
                return
            digest = _hash(file, max(0, size - length))
    except OSError as error:
        raise UserError(f'{path} cannot be read ({error.strerror}); check the disk') from error
    if end[-length:] != seal(digest):
        raise UserError(f'{path} is damaged: its content does not fit its checksum; '
                        'copy it again, or take another checkpoint of the run')


def _is_sealed(end: bytes) -> bool:
    """Tell whether a file ends in a checksum, or did so before a bit changed or the end was cut off."""
    archive = end.rfind(END_OF_ARCHIVE)
    announced = archive >= 0 and end[archive + 20:archive + 22] == SEAL_LENGTH.to_bytes(2, 'little')
    return announced or end[-SEAL_LENGTH:].startswith(SEAL)


def _hash(file, length: int) -> str:
    """Return the SHA-256 of the first `length` bytes, as hexadecimal digits."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(2 ** 22))
    file.seek(0)
    while length > 0:
        count = file.readinto(buffer[:min(length, len(buffer))])
        if not count:
            break  # the file has become shorter, so the checksum will not fit
        digest.update(buffer[:count])
        length -= count
    return digest.hexdigest()


def _file_start(path: str) -> bytes:
    """Return the first bytes of a file, or raise UserError if it cannot be a checkpoint of any kind."""
    if not os.path.exists(path):
        raise UserError(f'checkpoint {path} does not exist; check the path')
    if os.path.isdir(path):
        if os.path.exists(os.path.join(path, '.metadata')):
            raise UserError(f'{path} is a sharded checkpoint of torch.distributed.checkpoint; write it as one file: '
                            f'{_gather_command(path)}')
        raise UserError(f'{path} is a folder; give the path of a checkpoint file in it')
    if path.endswith('.distcp') or os.path.basename(path) == '.metadata':
        folder = os.path.dirname(path) or '.'
        raise UserError(f'{path} is one part of a sharded checkpoint of torch.distributed.checkpoint; write its folder '
                        f'as one file: {_gather_command(folder)}')
    try:
        with open(path, 'rb') as file:
            head = file.read(256)
    except OSError as error:
        raise UserError(f'{path} cannot be read ({error.strerror}); check its permissions') from error
    if not head:
        raise UserError(f'{path} is empty; copy or download it again')
    for start, what, remedy in IMPOSTORS:
        if head.lstrip().lower().startswith(start):
            raise UserError(f'{path} is {what}, not a checkpoint; {remedy}')
    if MSGPACK.match(head) and head[8:9] != b'{':  # the length at the start of a safetensors file may look alike
        raise UserError(f'{path} is a msgpack file, as Flax writes, not a checkpoint; give weights saved by PyTorch, '
                        'or as safetensors with names of PyTorch')
    if head.startswith(b'PK'):
        _check_archive(path)
    return head


def _check_archive(path: str) -> None:
    """Raise UserError for a zip archive of a known kind that is no checkpoint. A damaged one is found later.

    Raise it also if the parts together are larger than the file: a few kilobytes could fill the memory.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names, grown = archive.namelist(), sum(part.file_size for part in archive.infolist())
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return
    for end, what, remedy in IMPOSTOR_ARCHIVES:
        if any(name.endswith(end) for name in names):
            raise UserError(f'{path} is {what}, not a checkpoint; {remedy}')
    if grown > (size := os.path.getsize(path)):  # torch.save does not compress
        raise UserError(f'{path} has {size:,} bytes, and would grow to {grown:,}; if you trust it, unpack it, and '
                        'pack it without compression: zip -0')


def _gather_command(folder: str) -> str:
    return f'python -m torch.distributed.checkpoint.format_utils dcp_to_torch {folder} weights.pth'


def _read_paddle(path: str) -> dict[str, Any]:
    """Read a file of paddle.save: a state dict of numpy arrays, or a dict with one in it."""
    with open(path, 'rb') as file:
        content = paddle_reader.load(file.read())
    # Arrays are in the dict itself, in (name, array) pairs, or one dict further down.
    values = list(content.values()) if isinstance(content, dict) else []
    values += [part for value in values for part in (value.values() if isinstance(value, dict) else ())]
    values += [part for value in values if isinstance(value, tuple) for part in value]
    if not any(isinstance(value, np.ndarray) for value in values):
        raise UserError(f'{path} is not a PyTorch checkpoint, and as a PaddlePaddle file it holds no arrays; '
                        'give a file saved by torch.save, paddle.save or safetensors')
    return content


def _read_safetensors(path: str) -> dict[str, Any]:
    """Read a safetensors file: a flat state dict and, in our own files, further entries as JSON."""
    try:
        with safetensors.safe_open(path, 'pt') as file:
            metadata = file.metadata() or {}
        state = safetensors.torch.load_file(path)
        beside = dict(json.loads(metadata[METADATA])) if METADATA in metadata else None
    except (safetensors.SafetensorError, OSError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f'{path} is damaged or incomplete ({_first_line(error)}); '
                        'compare its size with the original and copy it again') from error
    return state if beside is None else {**beside, 'state_dict': state}


def share_of_a_tensor(what: str, kind: str) -> str:
    """Return the message for a file with one process's shares of the weights."""
    return (f"{what} one process's share of the weights ({kind}, of FSDP); save them whole: "
            'get_model_state_dict(model, options=StateDictOptions(full_state_dict=True)) of '
            'torch.distributed.checkpoint.state_dict')


def _explain_unpickling(path: str, error: pickle.UnpicklingError) -> str:
    """Return one line on why torch refused a pickle: what it would have called, or that it holds no weights."""
    if shared := re.search('DTensor|ShardedTensor', str(error)):
        return share_of_a_tensor(f'{path} holds', shared[0])
    refused = re.search(r'GLOBAL ([\w.$]+)', str(error))
    if refused:
        return (f'{path} was not read because it refers to {refused.group(1)}, which could run code; '
                'if you trust it, save the weights alone: torch.save(model.state_dict(), path)')
    return f'{path} is damaged or not a PyTorch checkpoint; give a file saved by torch.save, paddle.save or safetensors'


def _first_line(error: Exception) -> str:
    """Return an error's name and the first line of its message, shortened."""
    return f'{type(error).__name__}: {error}'.splitlines()[0][:160]
