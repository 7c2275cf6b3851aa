"""Recognise the formats of T2T-ViT checkpoints by their content, and convert each to a state dict with our keys.

    weights = extract(read_checkpoint('T2T_ViT_14.pdparams'))
    weights.format, weights.state['tokens_to_token.attention1.kqv.weight']

A new format is one entry in FORMATS.
"""
import argparse
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from utils.errors import UserError

StateDict = dict[str, torch.Tensor]

# Entries that may hold the weights; the first one wins. Published accuracies are those of the averaged weights (EMA).
CONTAINERS = ('state_dict_ema', 'state_dict', 'model_ema', 'model', 'net')
EMA_CONTAINERS = ('state_dict_ema', 'model_ema')

MAX_SIDE = 2 ** 16  # pixels; a larger recorded image size is ignored
PADDLE_NAME_TABLE = 'StructuredToParameterName@@'  # entry that paddle.save adds to a state dict


# --- The table --------------------------------------------------------------------------------------------------------

class Format(NamedTuple):
    """A format of checkpoints, and its differences from ours."""
    name: str  # in reports
    recognises: Callable[[Mapping[str, Any], dict[str, Any]], bool]  # called with the checkpoint and its state dict
    renamed: tuple[tuple[str, str], ...] = ()  # (pattern, replacement) of re.sub, applied in this order
    dropped: str | None = None  # pattern of whole keys that are not weights
    transposed: bool = False  # whether linear layers are stored as [in, out]


def _has_arrays(state: Mapping[str, Any]) -> bool:
    """Return whether the weights are numpy arrays, as read from PaddlePaddle's files."""
    return any(isinstance(_without_name(value), np.ndarray) for value in state.values())


def _has_keys(state: Mapping[str, Any], start: str) -> bool:
    return any(key.startswith(start) for key in state)


# Names of PaddleViT, and of PASSL before it used the authors' names.
PADDLEVIT_NAMES = ((r'^patch_embed\.attn(\d+)\.', r'tokens_to_token.attention\1.'),
                   (r'^patch_embed\.proj\.', 'tokens_to_token.project.'))

# First match wins.
FORMATS = (
    Format('PASSL', lambda content, state: _has_arrays(state) and _has_keys(state, 'backbone.'),
           renamed=((r'^backbone\.', ''), (r'^head\.fc_cls\.', 'head.'), *PADDLEVIT_NAMES),
           dropped=PADDLE_NAME_TABLE, transposed=True),
    Format('PaddleViT', lambda content, state: _has_arrays(state) and _has_keys(state, 'patch_embed.attn'),
           renamed=PADDLEVIT_NAMES, dropped=PADDLE_NAME_TABLE, transposed=True),
    Format('PaddlePaddle', lambda content, state: _has_arrays(state), dropped=PADDLE_NAME_TABLE, transposed=True),
    # Its EMA hook has replaced the weights by the averages; `ema_*` are the weights before that.
    Format('mmpretrain', lambda content, state: _has_keys(state, 'backbone.encoder.'),
           renamed=((r'^backbone\.', ''), (r'^encoder\.', 'blocks.'), (r'^head\.layers\.head\.', 'head.'),
                    (r'\.ln([12])\.', r'.norm\1.'), (r'\.ffn\.layers\.0\.0\.', '.mlp.fc1.'),
                    (r'\.ffn\.layers\.1\.', '.mlp.fc2.')),
           dropped='ema_.*'),
    Format('timm pull request 2426', lambda content, state: _has_keys(state, 'patch_embed.attention1.'),
           renamed=((r'^patch_embed\.', 'tokens_to_token.'),)),
    Format('token-labeling release',
           lambda content, state: set(content) == {'state_dict_ema'} and _has_keys(state, 'aux_head.')),
    Format('official release', lambda content, state: set(content) == {'state_dict_ema'}),
    Format('official training run', lambda content, state: isinstance(content.get('args'), argparse.Namespace)),
    Format('official CIFAR checkpoint', lambda content, state: {'net', 'acc'} <= set(content)),
    Format('training run', lambda content, state: {'global_step', 'ranks', 'classes'} <= set(content)),  # ours
    Format('checkpoint', lambda content, state: any(_has_weights(content, entry) for entry in CONTAINERS)),
    Format('flat state dict', lambda content, state: True),
)


# --- Checkpoint → weights ---------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Weights:
    """The weights of a checkpoint with our keys and layout, and the changes."""
    format: str  # name of one of FORMATS
    entry: str | None  # entry of the checkpoint that held the weights; None for a flat state dict
    state: StateDict
    renamed: tuple[tuple[str, str], ...] = ()  # (key in the file, our key)
    transposed: tuple[str, ...] = ()  # our keys
    dropped: tuple[str, ...] = ()  # keys in the file


def extract(checkpoint: Mapping[str, Any], use_ema: bool | None = None) -> Weights:
    """Return the weights of a checkpoint in any of FORMATS.

    Args:
        checkpoint: as returned by `read_checkpoint`.
        use_ema: prefer the averaged weights; False never takes them. None takes those that a training run recorded as
            the better ones, else the averaged ones.

    Raises:
        UserError: it has no weights, or only averaged ones and use_ema is False.
    """
    wanted = [entry for entry in CONTAINERS if use_ema is not False or entry not in EMA_CONTAINERS]
    if use_ema is None and (preferred := preferred_entry(checkpoint)):
        wanted.insert(0, preferred)
    entry = next((entry for entry in wanted if _has_weights(checkpoint, entry)), None)
    if entry is None and has_ema(checkpoint):
        raise UserError('the checkpoint holds averaged weights (EMA) only; use them (use_ema=True)')

    given = checkpoint if entry is None else checkpoint[entry]
    bare = {_without_wrappers(str(key)): value for key, value in given.items()}
    kind = next(known for known in FORMATS if known.recognises(checkpoint, bare))
    state: StateDict = {}
    renamed, transposed, dropped, others = [], [], [], []
    for old_key, value in given.items():
        key = _without_wrappers(str(old_key))
        if kind.dropped and re.fullmatch(kind.dropped, key):
            dropped.append(str(old_key))
            continue
        for pattern, replacement in kind.renamed:
            key = re.sub(pattern, replacement, key)
        if key in state:
            raise UserError(f'the checkpoint holds {key} twice, with and without a prefix; remove one')
        value = _without_name(value)
        if not isinstance(value, torch.Tensor | np.ndarray):
            others.append(str(old_key))
            continue
        if kind.transposed and key.endswith('.weight') and value.ndim == 2:
            transposed.append(key)
            value = value.T
        state[key] = _checked(key, _to_tensor(value) if isinstance(value, np.ndarray) else value)
        if key != old_key:
            renamed.append((str(old_key), key))
    if others or not state:
        raise UserError(f'no weights found: looked for {", ".join(wanted)} or a flat state dict, '
                        f'but the checkpoint holds {shortened(others) or "nothing"}')
    return Weights(kind.name, entry, state, tuple(renamed), tuple(transposed), tuple(dropped))


def has_ema(checkpoint: Mapping[str, Any]) -> bool:
    """Return whether a checkpoint holds averaged weights."""
    return any(_has_weights(checkpoint, entry) for entry in EMA_CONTAINERS)


def has_plain(checkpoint: Mapping[str, Any]) -> bool:
    """Return whether a checkpoint holds weights that are not averaged."""
    plain = set(CONTAINERS) - set(EMA_CONTAINERS)
    return not has_ema(checkpoint) or any(_has_weights(checkpoint, entry) for entry in plain)


def _has_weights(checkpoint: Mapping[str, Any], entry: str) -> bool:
    """Return whether an entry exists and is not empty, since trainers without an average write None."""
    return isinstance(checkpoint.get(entry), Mapping) and len(checkpoint[entry]) > 0


def _without_wrappers(key: str) -> str:
    """Strip the prefixes of DistributedDataParallel (at the front) and torch.compile (anywhere) from a key."""
    key = key.replace('_orig_mod.', '')
    while key.startswith('module.'):
        key = key.removeprefix('module.')
    return key


def _without_name(value: Any) -> Any:
    """Return the array of a (name, array) pair, PaddlePaddle's form of a tensor; return other values unchanged."""
    if isinstance(value, tuple) and len(value) == 2 and isinstance(value[1], np.ndarray):
        return value[1]
    return value


def _to_tensor(array: np.ndarray) -> torch.Tensor:
    """Copy an array of any byte order and layout to a tensor."""
    array = np.array(array, dtype=array.dtype.newbyteorder('='), order='C')
    if array.dtype == np.uint16:  # numpy has no bfloat16, PaddlePaddle no uint16
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _checked(key: str, tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor, or raise UserError unless it is dense and has as many numbers as its shape claims."""
    if tensor.is_meta:
        raise UserError(f'{key} has a shape, but no numbers (device meta); save the model after loading its weights')
    if tensor.is_quantized:
        raise UserError(f'{key} is quantized ({tensor.dtype}); save it as floats: tensor.dequantize()')
    if tensor.is_complex():
        raise UserError(f'{key} holds complex numbers ({tensor.dtype}), but no model here does; save real ones')
    if tensor.layout != torch.strided:
        raise UserError(f'{key} is a {tensor.layout} tensor; save it dense: tensor.to_dense()')
    if tensor.untyped_storage().nbytes() < tensor.numel() * tensor.element_size():
        raise UserError(f'{key} has the shape {list(tensor.shape)}, but the file holds fewer numbers; '
                        'save it whole: tensor.clone()')
    return tensor


def shortened(items: Iterable[str], limit: int = 3) -> str:
    """Join the first items by commas, with the number of the others."""
    items = list(items)
    rest = f' and {len(items) - limit} more' if len(items) > limit else ''
    return ', '.join(items[:limit]) + rest


# --- Other content of checkpoints -------------------------------------------------------------------------------------

def preferred_entry(checkpoint: Mapping[str, Any]) -> str | None:
    """Return the entry that a training run recorded as that of the better weights, if it did."""
    entry = checkpoint.get('preferred')
    return entry if isinstance(entry, str) and entry in CONTAINERS else None


def recorded_options(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that a training saved with its checkpoint; {} if there are none."""
    options = checkpoint.get('args')
    if isinstance(options, argparse.Namespace):
        options = vars(options)
    return dict(options) if isinstance(options, Mapping) else {}


def recorded_arch(checkpoint: Mapping[str, Any]) -> str | None:
    """Return the model name that a checkpoint records, if any."""
    names = (checkpoint.get('arch'), recorded_options(checkpoint).get('model'))
    return next((name for name in names if isinstance(name, str) and name), None)


def recorded_classes(checkpoint: Mapping[str, Any]) -> list[str] | None:
    """Return the names of the classes in the order of the logits, if a checkpoint records them."""
    classes = checkpoint.get('classes')
    if isinstance(classes, list | tuple) and classes and all(isinstance(name, str) for name in classes):
        return list(classes)
    return None


def recorded_img_size(checkpoint: Mapping[str, Any]) -> tuple[int, int] | None:
    """Return the (height, width) of the training images, if a checkpoint records it."""
    sizes = (checkpoint.get('img_size'), recorded_options(checkpoint).get('img_size'))
    return next((sides for size in sizes if (sides := _sides(size))), None)


def _sides(size: Any) -> tuple[int, int] | None:
    """Return (height, width) of an image size such as 224, '224', '192x256' or [192, 256]; None for other values."""
    if isinstance(size, str) and re.fullmatch(r'[0-9]{1,5}(x[0-9]{1,5})?', size):
        size = [int(side) for side in size.split('x')]
    sides = tuple(size) if isinstance(size, list | tuple) else (size,)
    if len(sides) not in (1, 2) or not all(type(side) is int and 1 <= side <= MAX_SIDE for side in sides):
        return None  # `type`, since bool is a subclass of int
    return sides[0], sides[-1]
