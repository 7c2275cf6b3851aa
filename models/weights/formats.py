"""Recognise the formats of T2T-ViT checkpoints by their content, and convert each to a state dict with our keys.

    weights = extract(read_checkpoint('T2T_ViT_14.pdparams'))
    weights.format, weights.state['tokens_to_token.attention1.kqv.weight']

A new format is one entry in FORMATS.
"""
import argparse
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import numpy as np
import torch

from utils.checkpoint_reader import share_of_a_tensor
from utils.errors import UserError

StateDict = dict[str, torch.Tensor]

# Entries that may hold the weights; the first one wins. Published accuracies are those of the averaged weights (EMA).
CONTAINERS = ('state_dict_ema', 'state_dict', 'model_ema', 'model', 'net')
EMA_CONTAINERS = ('state_dict_ema', 'model_ema')
# Other names of averaged weights, such as ema_state_dict.
AVERAGED = re.compile(r'(^|[_.])(ema|swa|avg|averaged?|shadow)([_.]|$)')
# Entries of state dicts that are no weights: counters of torch's AveragedModel and of thop.
COUNTERS = re.compile(r'(.*\.)?(n_averaged|total_ops|total_params)')

# DeepSpeed's script lies in the folder that holds its folders global_stepN.
PUT_TOGETHER = 'python zero_to_fp32.py . weights, beside the file latest'
LISTED_SETS = 20  # sets of weights that an error lists
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
    adapt: Callable[[StateDict], str] | None = None  # changes weights in place and returns a phrase for reports


def _has_arrays(state: Mapping[str, Any]) -> bool:
    """Return whether the weights are numpy arrays, as read from PaddlePaddle's files."""
    return any(isinstance(_without_name(value), np.ndarray) for value in state.values())


def _is_of_paddle(state: Mapping[str, Any]) -> bool:
    """Return whether linear layers are stored as [in, out], as PaddlePaddle stores them, in whatever kind of file.

    Their shapes tell: a bias has as many numbers as there are outputs, and queries, keys and values are three times as
    many as inputs. Square layers tell nothing.
    """
    if _has_arrays(state):
        return True
    outputs_first = outputs_last = False
    for key, value in state.items():
        if not key.endswith('.weight') or value.ndim != 2 or value.shape[0] == value.shape[1]:
            continue
        bias = state.get(f'{key.removesuffix("weight")}bias')
        if bias is not None and bias.ndim == 1:
            outputs = len(bias)
        elif re.search(r'(^|\.)blocks\.\d+\.attn\.qkv\.weight$', key):
            outputs = 3 * min(value.shape)
        else:
            continue
        outputs_first |= value.shape[0] == outputs
        outputs_last |= value.shape[1] == outputs
    return outputs_last and not outputs_first


def _has_keys(state: Mapping[str, Any], start: str) -> bool:
    return any(key.startswith(start) for key in state)


# Names of PaddleViT, and of PASSL before it used the authors' names.
PADDLEVIT_NAMES = ((r'^patch_embed\.attn(\d+)\.', r'tokens_to_token.attention\1.'),
                   (r'^patch_embed\.proj\.', 'tokens_to_token.project.'))

# mmpretrain's EMA hook has replaced the weights by the averages; `ema_*` are the weights before that.
MMPRETRAIN_DROPPED = 'ema_.*'
MMPRETRAIN_NAMES = (
    (r'^backbone\.', ''), (r'^encoder\.', 'blocks.'), (r'^head\.layers\.head\.', 'head.'),
    (r'\.ln([12])\.', r'.norm\1.'), (r'\.ffn\.layers\.0\.0\.', '.mlp.fc1.'), (r'\.ffn\.layers\.1\.', '.mlp.fc2.'))
# Channels of a head in every T2T-ViT that mmpretrain configures, and in its token layers.
MMPRETRAIN_HEAD_DIM = 64


def _is_of_mmengine(checkpoint: Mapping[str, Any]) -> bool:
    meta = checkpoint.get('meta')
    return isinstance(meta, Mapping) and 'mmengine_version' in meta


def _fold_attention_scale(state: StateDict) -> str:
    """Multiply queries and keys so that our attention gives the scores of mmpretrain from version 1.0 on.

    Where mmcls and the authors multiply q·k by 1/√n, mmpretrain's T2T-ViT divides it by 1/√d: d are the channels of a
    head, n those of a patch in the token layers and d in the backbone. Queries and keys share the factor √(n · d).
    """
    for key, weight in state.items():
        token_layer = re.fullmatch(r'tokens_to_token\.attention\d+\.attn\.qkv\.weight', key)
        if token_layer or re.fullmatch(r'blocks\.\d+\.attn\.qkv\.weight', key):
            n = weight.shape[1] if token_layer else MMPRETRAIN_HEAD_DIM
            factors = torch.ones(len(weight), 1)
            factors[:2 * len(weight) // 3] = (MMPRETRAIN_HEAD_DIM * n) ** 0.25
            state[key] = (weight.float() * factors).to(weight.dtype)
    return "queries and keys multiplied, as mmpretrain's attention scores are 8 q·k"


# First match wins.
FORMATS = (
    Format('PASSL', lambda content, state: _is_of_paddle(state) and _has_keys(state, 'backbone.'),
           renamed=((r'^backbone\.', ''), (r'^head\.fc_cls\.', 'head.'), *PADDLEVIT_NAMES),
           dropped=PADDLE_NAME_TABLE, transposed=True),
    Format('PaddleViT', lambda content, state: _is_of_paddle(state) and _has_keys(state, 'patch_embed.attn'),
           renamed=PADDLEVIT_NAMES, dropped=PADDLE_NAME_TABLE, transposed=True),
    Format('PaddlePaddle', lambda content, state: _is_of_paddle(state), dropped=PADDLE_NAME_TABLE, transposed=True),
    Format('mmpretrain ≥ 1.0',
           lambda content, state: _has_keys(state, 'backbone.encoder.') and _is_of_mmengine(content),
           renamed=MMPRETRAIN_NAMES, dropped=MMPRETRAIN_DROPPED, adapt=_fold_attention_scale),
    Format('mmpretrain', lambda content, state: _has_keys(state, 'backbone.encoder.'),
           renamed=MMPRETRAIN_NAMES, dropped=MMPRETRAIN_DROPPED),
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
    adapted: tuple[str, ...] = ()  # a phrase for each change of the numbers


def extract(checkpoint: Mapping[str, Any], use_ema: bool | None = None) -> Weights:
    """Return the weights of a checkpoint in any of FORMATS.

    Args:
        checkpoint: as returned by `read_checkpoint`.
        use_ema: prefer the averaged weights; False never takes them. None takes those that a training run recorded as
            the better ones, else the averaged ones.

    Raises:
        UserError: it has no weights, or only averaged ones and use_ema is False.
    """
    entry = _choose_entry(checkpoint, use_ema)
    given = checkpoint if entry is None else checkpoint[entry]
    if not _is_state_dict(given):
        if _is_optimizer_of_deepspeed(checkpoint):
            raise UserError("it holds one process's share of DeepSpeed's optimizer, and no model; with ZeRO-1 and 2 "
                            'give mp_rank_00_model_states.pt beside it, with ZeRO-3 put the shares together: '
                            f'{PUT_TOGETHER}')
        tried = [checkpoint[name] for name in CONTAINERS if isinstance(checkpoint.get(name), Mapping)]
        others = [str(key) for key, value in next(filter(None, tried), given).items() if not _is_array(value)]
        raise UserError('no weights found: looked for a state dict by itself or as an entry, '
                        f'but the checkpoint holds {shortened(others) or "nothing"}')

    weights, dropped = {}, []
    for old_key, value in given.items():
        if _is_array(value) and not COUNTERS.fullmatch(str(old_key)):
            weights[str(old_key)] = _without_name(value)
        else:
            dropped.append(str(old_key))
    bare = {key: _without_wrappers(key) for key in weights}
    kind = _format_of(checkpoint, bare, weights)
    prefix = '' if kind.renamed else _shared_prefix(bare.values())
    if prefix:
        bare = {key: name.removeprefix(prefix) for key, name in bare.items()}
        kind = _format_of(checkpoint, bare, weights)

    state: StateDict = {}
    renamed, transposed = [], []
    for old_key, value in weights.items():
        key = bare[old_key]
        if kind.dropped and re.fullmatch(kind.dropped, key):
            dropped.append(old_key)
            continue
        for pattern, replacement in kind.renamed:
            key = re.sub(pattern, replacement, key)
        if key in state:
            raise UserError(f'the checkpoint holds {key} twice, with and without a prefix; remove one')
        if kind.transposed and key.endswith('.weight') and value.ndim == 2:
            transposed.append(key)
            value = value.T
        state[key] = _checked(key, _to_tensor(value) if isinstance(value, np.ndarray) else value)
        if key != old_key:
            renamed.append((old_key, key))
    adapted = [f'prefix {prefix} removed'] if prefix else []
    if kind.adapt:
        adapted.append(kind.adapt(state))
    return Weights(kind.name, entry, state, tuple(renamed), tuple(transposed), tuple(dropped), tuple(adapted))


def _choose_entry(checkpoint: Mapping[str, Any], use_ema: bool | None) -> str | None:
    """Return the entry of a checkpoint that holds its weights; None if it is a state dict itself."""
    entries = _entries(checkpoint)
    wanted = [entry for entry in entries if use_ema is not False or not is_average(entry)]
    if entries and not wanted:
        raise UserError('the checkpoint holds averaged weights (EMA) only; use them (use_ema=True)')
    if use_ema is None and (preferred := preferred_entry(checkpoint)) in wanted:
        return preferred
    if not wanted or wanted[0] in CONTAINERS:
        return wanted[0] if wanted else None
    averages = [entry for entry in wanted if is_average(entry)]
    candidates = averages or wanted
    if len(candidates) > 1:
        raise UserError(several_sets(candidates))
    return candidates[0]


def several_sets(names: Iterable[str]) -> str:
    """Return the message for a checkpoint that holds more than one set of weights."""
    names = list(names)
    return (f'the checkpoint holds several sets of weights: {", ".join(names)}; say which one with --weights-key, '
            f'such as --weights-key {names[0]}')


def choose_weights(checkpoint: Mapping[str, Any], key: str | None, use_ema: bool | None = None) -> Mapping[str, Any]:
    """Return a checkpoint whose only weights are those under `key`, with everything else that it records.

        choose_weights({'student': …, 'teacher': …, 'classes': …}, 'teacher')       # {'classes': …, 'teacher': …}

    Args:
        checkpoint: as returned by `read_checkpoint`.
        key: the name of an entry or of a module in a state dict, or of one within the other, joined by dots; None
            changes nothing.
        use_ema: must be None beside a key, since it chooses too.

    Raises:
        UserError: there are no such weights, or both choices are made.
    """
    if key is None:
        return checkpoint
    if use_ema is not None:
        raise UserError(f'--weights-key {key} beside --{"" if use_ema else "no-"}use-ema: which weights? leave one of '
                        'them out')
    entries = _entries(checkpoint)
    found = _weights_under(key, checkpoint) or next(
        filter(None, (_weights_under(key, checkpoint[entry]) for entry in entries)), None)
    if found is None:
        modules = {f'{str(name).partition(".")[0]}' for name in checkpoint} if _is_state_dict(checkpoint) else set()
        raise UserError(f'--weights-key {key}: the checkpoint holds no weights of that name; it has '
                        f'{shortened(entries or sorted(modules), LISTED_SETS) or "none"}')
    beside = {name: value for name, value in checkpoint.items()
              if name not in (*entries, 'preferred') and not _is_array(value)}
    return {**beside, key: found}


def _weights_under(key: str, content: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return the state dict that is an entry or a module of this name in a mapping; None if there is none."""
    if _is_state_dict(content.get(key)):
        return content[key]
    bare = {_without_wrappers(str(name)): value for name, value in content.items()}
    module = {name.removeprefix(f'{key}.'): value for name, value in bare.items() if name.startswith(f'{key}.')}
    if _is_state_dict(module):
        return module
    dots = [place for place, letter in enumerate(key) if letter == '.']
    inner = ((key[place + 1:], content.get(key[:place])) for place in dots)
    return next((found for rest, part in inner if isinstance(part, Mapping)
                 and (found := _weights_under(rest, part))), None)


def _entries(checkpoint: Mapping[str, Any]) -> list[str]:
    """Return the entries that hold weights, in the order of CONTAINERS; others only if there is none of these."""
    if _is_state_dict(checkpoint):
        return []
    return [entry for entry in CONTAINERS if _has_weights(checkpoint, entry)] or [
        entry for entry, value in checkpoint.items() if isinstance(entry, str) and _is_state_dict(value)]


def _is_optimizer_of_deepspeed(checkpoint: Mapping[str, Any]) -> bool:
    state = checkpoint.get('optimizer_state_dict')
    return 'ds_version' in checkpoint and isinstance(state, Mapping) and 'zero_stage' in state


def is_average(entry: str) -> bool:
    """Return whether the name of an entry or a module says that its weights are averaged."""
    return entry in EMA_CONTAINERS or bool(AVERAGED.search(entry.lower()))


def _is_state_dict(value: Any) -> bool:
    """Return whether most entries of a mapping are arrays, some of them with fractions, unlike random states."""
    if not isinstance(value, Mapping):
        return False
    arrays = [_without_name(part) for part in value.values() if _is_array(part)]
    return 2 * len(arrays) > len(value) and any(
        array.dtype.kind in 'fcu' if isinstance(array, np.ndarray)
        else array.is_floating_point() or array.is_complex() or array.is_quantized for array in arrays)


def _is_array(value: Any) -> bool:
    return isinstance(_without_name(value), torch.Tensor | np.ndarray)


def _format_of(checkpoint: Mapping[str, Any], bare: Mapping[str, str], weights: Mapping[str, Any]) -> Format:
    state = {name: weights[key] for key, name in bare.items()}
    return next(known for known in FORMATS if known.recognises(checkpoint, state))


def _shared_prefix(keys: Iterable[str]) -> str:
    """Return the names of the modules that all keys are in: 'model.' of a LightningModule; '' if there are none."""
    rest, prefix = list(keys), ''
    while True:
        names = {key.partition('.')[0] for key in rest}
        name = next(iter(names), '')
        rest = [key.partition('.')[2] for key in rest]
        # A single layer is no model.
        if len(names) != 1 or name.isdecimal() or not all(rest) or not any('.' in key for key in rest):
            return prefix
        prefix += f'{name}.'


def has_ema(checkpoint: Mapping[str, Any]) -> bool:
    """Return whether a checkpoint holds averaged weights."""
    return any(is_average(entry) for entry in _entries(checkpoint))


def has_plain(checkpoint: Mapping[str, Any]) -> bool:
    """Return whether a checkpoint holds weights that are not averaged."""
    return not all(is_average(entry) for entry in _entries(checkpoint)) or not _entries(checkpoint)


def _has_weights(checkpoint: Mapping[str, Any], entry: str) -> bool:
    """Return whether an entry holds arrays, since trainers without an average write None, and others a name."""
    value = checkpoint.get(entry)
    return isinstance(value, Mapping) and any(_is_array(part) for part in value.values())


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
    if hasattr(tensor, 'placements'):  # a DTensor, which claims the shape of the whole
        share = cast(Any, tensor).to_local()
        if share.shape != tensor.shape:
            raise UserError(share_of_a_tensor(f'{key} is', 'DTensor'))
        tensor = share
    if tensor.numel() == 0 and key.endswith('.weight'):
        raise UserError(f"{key} is empty, as in the files of one process of DeepSpeed's ZeRO-3; put the "
                        f'shares together: {PUT_TOGETHER}')
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
    """Return the options that a training saved with its checkpoint, as ours are written; {} if there are none."""
    options = _args_of(checkpoint)
    arguments = options.get('model_kwargs')
    if isinstance(arguments, Mapping):  # timm's; the image size and the classes are found by themselves
        arguments = [f'{name}={value!r}' for name, value in arguments.items()
                     if name not in ('img_size', 'num_classes')]
        options = {**options, 'model_kwargs': arguments}
    return dict(options)


def _args_of(checkpoint: Mapping[str, Any]) -> Mapping[str, Any]:
    options = checkpoint.get('args')
    if isinstance(options, argparse.Namespace):
        options = vars(options)
    return options if isinstance(options, Mapping) else {}


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


def recorded_input(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Return the crop, interpolation, mean and std that timm's config.json gives with the weights; {} for none."""
    settings = checkpoint.get('pretrained_cfg')
    settings = settings if isinstance(settings, Mapping) else {}
    found: dict[str, Any] = {name: settings[name] for name in ('interpolation', 'crop_mode')
                             if isinstance(settings.get(name), str) and settings[name]}
    crop = settings.get('crop_pct')
    if isinstance(crop, int | float) and 0 < crop <= 1:
        found['crop_pct'] = crop
    for name in ('mean', 'std'):
        values = settings.get(name)
        if isinstance(values, list | tuple) and values and all(type(value) in (int, float) for value in values):
            found[name] = list(values)
    return found


def recorded_img_size(checkpoint: Mapping[str, Any]) -> tuple[int, int] | None:
    """Return the (height, width) of the training images, if a checkpoint records it."""
    options = _args_of(checkpoint)
    arguments, shape = options.get('model_kwargs'), options.get('input_size')  # as timm and DeiT write them
    sizes = (checkpoint.get('img_size'), options.get('img_size'),
             arguments.get('img_size') if isinstance(arguments, Mapping) else None,
             shape[1:] if isinstance(shape, list | tuple) and len(shape) == 3 else shape)
    return next((sides for size in sizes if (sides := _sides(size))), None)


def _sides(size: Any) -> tuple[int, int] | None:
    """Return (height, width) of an image size such as 224, '224', '192x256' or [192, 256]; None for other values."""
    if isinstance(size, str) and re.fullmatch(r'[0-9]{1,5}(x[0-9]{1,5})?', size):
        size = [int(side) for side in size.split('x')]
    sides = tuple(size) if isinstance(size, list | tuple) else (size,)
    if len(sides) not in (1, 2) or not all(type(side) is int and 1 <= side <= MAX_SIDE for side in sides):
        return None  # `type`, since bool is a subclass of int
    return sides[0], sides[-1]
