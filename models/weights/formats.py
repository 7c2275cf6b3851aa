"""The kinds of checkpoints there are of T2T-ViT, and the way from each to a flat state dict of ours.

    weights = extract(read_checkpoint('T2T_ViT_14.pdparams'))
    weights.format, weights.state['tokens_to_token.attention1.kqv.weight']

Files are told apart by what is in them, never by their name. A new kind is one entry in FORMATS.
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

# Where a checkpoint keeps its weights; first match wins. Published accuracies are those of the average (EMA).
CONTAINERS = ('state_dict_ema', 'state_dict', 'model_ema', 'model', 'net')
EMA_CONTAINERS = ('state_dict_ema', 'model_ema')

MAX_SIDE = 2 ** 16  # pixels of an image, beyond which a recorded size is taken for a mistake
PADDLE_NAME_TABLE = 'StructuredToParameterName@@'  # what paddle.save adds to a state dict: its own names of the keys


# --- The table --------------------------------------------------------------------------------------------------------

class Format(NamedTuple):
    """A kind of checkpoint: how to know it, and what in it is not as ours.

    Attributes:
        name: what reports call it.
        recognises: looks at the whole checkpoint and at its flat state dict.
        renamed: patterns of re.sub, each applied to every key, in this order.
        dropped: pattern of the keys, whole, that are no weights.
        transposed: whether linear layers keep [in, out] instead of [out, in].
    """
    name: str
    recognises: Callable[[Mapping[str, Any], dict[str, Any]], bool]
    renamed: tuple[tuple[str, str], ...] = ()
    dropped: str | None = None
    transposed: bool = False


def _has_arrays(state: Mapping[str, Any]) -> bool:
    """Tell whether the weights are numpy's, as read_checkpoint gives them from PaddlePaddle's files."""
    return any(isinstance(_without_name(value), np.ndarray) for value in state.values())


def _has_keys(state: Mapping[str, Any], start: str) -> bool:
    return any(key.startswith(start) for key in state)


# PaddleViT's names, and those of PASSL before it took over the authors'.
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
    # Its EMA hook has already put the averages in the place of the weights; `ema_*` are the weights before that.
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
    """The weights in a checkpoint under our keys and in our layout, and what was done to them."""
    format: str  # name of the format, one of FORMATS
    entry: str | None  # entry of the checkpoint that held the weights; None for a flat state dict
    state: StateDict
    renamed: tuple[tuple[str, str], ...] = ()  # (key in the file, our key)
    transposed: tuple[str, ...] = ()  # our keys
    dropped: tuple[str, ...] = ()  # keys in the file


def extract(checkpoint: Mapping[str, Any], use_ema: bool = True) -> Weights:
    """Return the weights in a checkpoint of any kind in FORMATS.

    Args:
        checkpoint: what `read_checkpoint` returns.
        use_ema: prefer the averaged weights; without it they are never taken.

    Raises:
        UserError: there are no weights in it, or only averaged ones and use_ema is False.
    """
    wanted = [entry for entry in CONTAINERS if use_ema or entry not in EMA_CONTAINERS]
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
    """Tell whether a checkpoint holds averaged weights."""
    return any(_has_weights(checkpoint, entry) for entry in EMA_CONTAINERS)


def has_plain(checkpoint: Mapping[str, Any]) -> bool:
    """Tell whether a checkpoint holds weights that are no averages."""
    plain = [entry for entry in CONTAINERS if entry not in EMA_CONTAINERS]
    return not has_ema(checkpoint) or any(_has_weights(checkpoint, entry) for entry in plain)


def _has_weights(checkpoint: Mapping[str, Any], entry: str) -> bool:
    """Tell whether an entry is there and filled: trainers write None where they keep no average."""
    return isinstance(checkpoint.get(entry), Mapping) and len(checkpoint[entry]) > 0


def _without_wrappers(key: str) -> str:
    """Strip what DistributedDataParallel (at the front) and torch.compile (anywhere) add to a key."""
    key = key.replace('_orig_mod.', '')
    while key.startswith('module.'):
        key = key.removeprefix('module.')
    return key


def _without_name(value: Any) -> Any:
    """Return the array of a (name, array) pair, as which PaddlePaddle saves a tensor; all else as it is."""
    if isinstance(value, tuple) and len(value) == 2 and isinstance(value[1], np.ndarray):
        return value[1]
    return value


def _to_tensor(array: np.ndarray) -> torch.Tensor:
    """Copy an array, in any byte order or layout, into a tensor."""
    array = np.array(array, dtype=array.dtype.newbyteorder('='), order='C')
    if array.dtype == np.uint16:  # numpy has no bfloat16, PaddlePaddle no uint16
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _checked(key: str, tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor of plain numbers that has as many as its shape claims: 10¹² fit in a file that repeats one."""
    if tensor.is_meta:
        raise UserError(f'{key} has a shape, but no numbers (device meta); save the model once it has its weights')
    if tensor.is_quantized:
        raise UserError(f'{key} is quantized ({tensor.dtype}); save it as floats: tensor.dequantize()')
    if tensor.is_complex():
        raise UserError(f'{key} holds complex numbers ({tensor.dtype}), which no model here has; save real ones')
    if tensor.layout != torch.strided:
        raise UserError(f'{key} is a {tensor.layout} tensor; save it dense: tensor.to_dense()')
    if tensor.untyped_storage().nbytes() < tensor.numel() * tensor.element_size():
        raise UserError(f'{key} has the shape {list(tensor.shape)}, but the file holds fewer numbers; '
                        'save it whole: tensor.clone()')
    return tensor


def shortened(items: Iterable[str], limit: int = 3) -> str:
    """Join the first items by commas and say how many more there are."""
    items = list(items)
    rest = f' and {len(items) - limit} more' if len(items) > limit else ''
    return ', '.join(items[:limit]) + rest


# --- What else a checkpoint says --------------------------------------------------------------------------------------

def recorded_options(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that a training saved with its checkpoint; none for other checkpoints."""
    options = checkpoint.get('args')
    if isinstance(options, argparse.Namespace):
        options = vars(options)
    return dict(options) if isinstance(options, Mapping) else {}


def recorded_arch(checkpoint: Mapping[str, Any]) -> str | None:
    """Return the name of the model that a checkpoint says it is of, if it says so."""
    names = (checkpoint.get('arch'), recorded_options(checkpoint).get('model'))
    return next((name for name in names if isinstance(name, str) and name), None)


def recorded_classes(checkpoint: Mapping[str, Any]) -> list[str] | None:
    """Return the names of the classes in a checkpoint, in the order of their numbers, if it has them."""
    classes = checkpoint.get('classes')
    if isinstance(classes, list | tuple) and classes and all(isinstance(name, str) for name in classes):
        return list(classes)
    return None


def recorded_img_size(checkpoint: Mapping[str, Any]) -> tuple[int, int] | None:
    """Return (height, width) of the images that a checkpoint says it was trained at, if it says so."""
    sizes = (checkpoint.get('img_size'), recorded_options(checkpoint).get('img_size'))
    return next((sides for size in sizes if (sides := _sides(size))), None)


def _sides(size: Any) -> tuple[int, int] | None:
    """Return (height, width) as written by anyone: 224, '224', '192x256' or [192, 256]; None for all else."""
    if isinstance(size, str) and re.fullmatch(r'[0-9]{1,5}(x[0-9]{1,5})?', size):
        size = [int(side) for side in size.split('x')]
    sides = tuple(size) if isinstance(size, list | tuple) else (size,)
    if len(sides) not in (1, 2) or not all(type(side) is int and 1 <= side <= MAX_SIDE for side in sides):
        return None  # bool is no int here
    return sides[0], sides[-1]
