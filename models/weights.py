"""Weights from elsewhere: the one place where a known checkpoint becomes a state dict of ours.

    model = timm.create_model('t2t_vit_14')
    print(load_weights(model, '81.5_T2T_ViT_14.pth.tar'))

Three steps, each usable alone: `utils.files.read_checkpoint` (file → dict, running no code from the file),
`state_dict_of` (dict → flat state dict with our keys), `load_weights` (state dict → model, with a report).
A new format is one entry in FORMATS.
"""
import argparse
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import timm
import torch
from timm.layers import resample_abs_pos_embed
from torch import nn

from utils.errors import UserError
from utils.files import read_checkpoint

StateDict = dict[str, torch.Tensor]

# Where a checkpoint keeps its weights; first match wins. Published accuracies are those of the average (EMA).
CONTAINERS = ('state_dict_ema', 'state_dict', 'model_ema', 'model', 'net')
EMA_CONTAINERS = ('state_dict_ema', 'model_ema')


# --------------------------------------------------------------------------------------------------
# Dict → state dict of ours

def _identity(state: dict[str, Any]) -> dict[str, Any]:
    return state


class Format(NamedTuple):
    """A kind of checkpoint."""
    name: str  # what the report calls it
    recognises: Callable[[Mapping[str, Any]], bool]  # looks at the whole checkpoint
    to_ours: Callable[[dict[str, Any]], dict[str, Any]] = _identity  # flat state dict → our keys and layout


# First match wins.
FORMATS = (
    Format('official release', lambda content: set(content) == {'state_dict_ema'}),
    Format('official training run', lambda content: isinstance(content.get('args'), argparse.Namespace)),
    Format('official CIFAR checkpoint', lambda content: {'net', 'acc'} <= set(content)),
    Format('training checkpoint', lambda content: any(_has_weights(content, entry) for entry in CONTAINERS)),
    Format('flat state dict', lambda content: True),
)


def state_dict_of(checkpoint: Mapping[str, Any], use_ema: bool = True) -> StateDict:
    """Return the weights in a checkpoint as a flat dict of tensors under our keys.

    Args:
        checkpoint: what `read_checkpoint` returns.
        use_ema: prefer the averaged weights; without it they are never taken.

    Raises:
        UserError: there are no weights in it, or only averaged ones and use_ema is False.
    """
    return _extract(checkpoint, use_ema)[2]


def _extract(checkpoint: Mapping[str, Any], use_ema: bool) -> tuple[str, str | None, StateDict]:
    """Return the name of the format, the entry that held the weights (None if flat), and the weights."""
    checkpoint_format = next(known for known in FORMATS if known.recognises(checkpoint))
    wanted = [entry for entry in CONTAINERS if use_ema or entry not in EMA_CONTAINERS]
    entry = next((entry for entry in wanted if _has_weights(checkpoint, entry)), None)
    if entry is None and any(_has_weights(checkpoint, average) for average in EMA_CONTAINERS):
        raise UserError('the checkpoint holds averaged weights (EMA) only; use them (use_ema=True)')

    state: dict[str, Any] = {}
    for key, value in (checkpoint if entry is None else checkpoint[entry]).items():
        plain_key = _without_wrappers(str(key))
        if plain_key in state:
            raise UserError(f'the checkpoint holds {plain_key} twice, with and without a prefix; remove one')
        state[plain_key] = value
    state = checkpoint_format.to_ours(state)

    others = [key for key, value in state.items() if not isinstance(value, torch.Tensor)]
    if others or not state:
        raise UserError(f'no weights found: looked for {", ".join(wanted)} or a flat state dict, '
                        f'but the checkpoint holds {_shortened(others) or "nothing"}')
    return checkpoint_format.name, entry, state


def _has_weights(checkpoint: Mapping[str, Any], entry: str) -> bool:
    """Tell whether an entry is there and filled: trainers write None where they keep no average."""
    return isinstance(checkpoint.get(entry), Mapping) and len(checkpoint[entry]) > 0


def _without_wrappers(key: str) -> str:
    """Strip what DistributedDataParallel (at the front) and torch.compile (anywhere) add to a key."""
    key = key.replace('_orig_mod.', '')
    while key.startswith('module.'):
        key = key.removeprefix('module.')
    return key


# --------------------------------------------------------------------------------------------------
# State dict → model

@dataclass(frozen=True)
class LoadReport:
    """What `load_weights` did; `str()` of it is a sentence for the log."""
    source: str  # path of the file, or 'checkpoint in memory'
    format: str  # name of the format, one of FORMATS
    entry: str | None  # entry of the checkpoint that held the weights; None for a flat state dict
    loaded: tuple[str, ...]  # keys copied into the model
    resized: tuple[str, ...] = ()  # what was resampled, each with both grids
    head_replaced: str | None = None  # why the model kept its own classifier, None where it was loaded
    missing: tuple[str, ...] = ()  # keys of the model that kept their values, but for that classifier
    unexpected: tuple[str, ...] = ()  # keys of the weights that have no place, but for that classifier

    def __str__(self) -> str:
        kind = self.format if self.entry is None else f'{self.format}, {self.entry}'
        parts = [f'{len(self.loaded)} tensors loaded from {self.source} ({kind})']
        parts += [f'{what} resized' for what in self.resized]
        if self.head_replaced:
            parts.append(f'classifier not loaded: {self.head_replaced}')
        if self.missing:
            parts.append(f'{len(self.missing)} not given and kept as initialised: {_shortened(self.missing)}')
        if self.unexpected:
            parts.append(f'{len(self.unexpected)} ignored, having no place: {_shortened(self.unexpected)}')
        return '; '.join(parts)


def load_weights(
        model: nn.Module,
        path_or_checkpoint: str | os.PathLike | Mapping[str, Any],
        *,
        use_ema: bool = True,
        strict: bool = True,
        replace_head: bool = False,
        source: str = 'checkpoint in memory',
) -> LoadReport:
    """Load weights from a file or a checkpoint into any timm model and report what was done.

    A position embedding of another grid is resampled. Either everything fits and is copied, or an error says
    why not and the model stays as it was.

    Args:
        model: target; its classifier's name is read from `model.pretrained_cfg`.
        path_or_checkpoint: file, dict as `read_checkpoint` returns it, or state dict.
        use_ema: prefer averaged weights; without it they are never taken.
        strict: refuse keys that are missing or have no place. Other shapes are refused in any case.
        replace_head: where the weights have another number of classes than the model, or no classifier, keep
            the model's own, fresh one (transfer learning) instead of raising.
        source: what a checkpoint that is no path is called in messages.

    Raises:
        UserError: unreadable file, weights of another model, other number of classes without `replace_head`.
    """
    if isinstance(path_or_checkpoint, Mapping):
        checkpoint = path_or_checkpoint
    else:
        source, checkpoint = os.fspath(path_or_checkpoint), read_checkpoint(path_or_checkpoint)
    try:
        format_name, entry, weights = _extract(checkpoint, use_ema)
        weights, resized = resize_pos_embed(weights, model)
    except UserError as error:
        raise UserError(f'{source}: {error}') from error

    target = model.state_dict()
    head_conflict, classifier = _compare_heads(model, weights, target)
    body = {key: tensor for key, tensor in weights.items() if key not in classifier}
    missing = [key for key in target if key not in weights and key not in classifier]
    unexpected = [key for key in body if key not in target]
    other_shape = [key for key in body if key in target and body[key].shape != target[key].shape]
    if other_shape or (strict and (missing or unexpected)) or len(unexpected) == len(body):
        raise UserError(f'{source}: {_explain_mismatch(body, target, missing, unexpected, other_shape)}')
    if head_conflict and not replace_head:
        raise UserError(f'{source}: {head_conflict}; use as many classes (--num-classes), or transfer.py, which '
                        'gives the model a new classifier (replace_head=True)')
    loaded = {key: tensor for key, tensor in body.items() if key in target}
    model.load_state_dict(loaded, strict=False)  # complete and of the right shapes, as checked above
    return LoadReport(source, format_name, entry, tuple(loaded), (resized,) if resized else (), head_conflict,
                      tuple(missing), tuple(unexpected))


def load_for_transfer_learning(
        model: nn.Module,
        checkpoint_path: str | os.PathLike,
        use_ema: bool = True,
        strict: bool = False,
        num_classes: int = 1000,
) -> LoadReport:
    """Load weights for fine-tuning, under the name and arguments that the authors' repository gave this.

    Args:
        model: target, already with the new number of classes.
        checkpoint_path: file with the pretrained weights.
        use_ema: prefer averaged weights.
        strict: refuse keys that are missing or have no place.
        num_classes: classes of the model; anything but ImageNet's 1000 allows it to keep its own classifier.
    """
    return load_weights(
        model, checkpoint_path, use_ema=use_ema, strict=strict, replace_head=num_classes != 1000)


def resize_pos_embed(weights: StateDict, model: nn.Module) -> tuple[StateDict, str | None]:
    """Resample `pos_embed` of a state dict to the grid of the model, in float32.

    Works for every model that keeps [1, prefix + rows · columns, C] in `pos_embed` and its grid in
    `grid_size` or `patch_embed.grid_size`; other state dicts come back as they are.

    Returns:
        The state dict (the given one is left as it is) and what was done, None for nothing.

    Raises:
        UserError: the grid of the weights is not square, so that its shape cannot be told from its length.
    """
    given, wanted = weights.get('pos_embed'), getattr(model, 'pos_embed', None)
    holder = model if hasattr(model, 'grid_size') else getattr(model, 'patch_embed', None)
    grid = getattr(holder, 'grid_size', None)
    if given is None or wanted is None or grid is None or given.shape == wanted.shape:
        return weights, None
    if given.dim() != 3 or given.shape[-1] != wanted.shape[-1]:
        return weights, None  # weights of another model, which the caller finds out
    prefix = 0 if getattr(model, 'no_embed_class', False) else getattr(model, 'num_prefix_tokens', 1)
    positions = given.shape[1] - prefix
    side = math.isqrt(max(positions, 0))
    if side == 0 or side ** 2 != positions:
        raise UserError(f'pos_embed has {positions} grid positions, no square, so its rows are unknown; '
                        'create the model with the image size (img_size) that the weights were trained at')
    pos_embed = resample_abs_pos_embed(given, list(grid), [side, side], num_prefix_tokens=prefix)
    return {**weights, 'pos_embed': pos_embed}, f'pos_embed from {side} × {side} to {grid[0]} × {grid[1]}'


def _compare_heads(model: nn.Module, weights: StateDict, target: StateDict) -> tuple[str | None, set[str]]:
    """Return how the classifiers differ in classes, and their keys; (None, no keys) where they agree."""
    names = classifier_names(getattr(model, 'pretrained_cfg', None) or {})
    keys = {f'{name}.{kind}' for name in names for kind in ('weight', 'bias')}

    def described(state: StateDict) -> str:
        classes = sorted({state[key].shape[0] for key in keys & state.keys() if state[key].dim() > 0})
        return ' and '.join(map(str, classes)) + ' classes' if classes else 'no classifier'

    if described(weights) == described(target):
        return None, set()
    return f'the weights have {described(weights)}, the model has {described(target)}', keys


def _explain_mismatch(
        body: StateDict,
        target: StateDict,
        missing: list[str],
        unexpected: list[str],
        other_shape: list[str],
) -> str:
    """Describe in one line how weights differ from a model and, if another variant fits them, name it."""
    parts = ['the weights do not fit the model']
    if other_shape:
        shapes = [f'{key} {list(body[key].shape)} for {list(target[key].shape)}' for key in other_shape]
        parts.append(f'{len(other_shape)} of other shape ({_shortened(shapes)})')
    if missing:
        parts.append(f'{len(missing)} missing ({_shortened(missing)})')
    if unexpected:
        parts.append(f'{len(unexpected)} without a place ({_shortened(unexpected)})')
    fitting = _fitting_variants(body)
    parts.append(f'they fit {" or ".join(fitting)}' if fitting else 'check the name of the model')
    return '; '.join(parts)


def _fitting_variants(body: StateDict) -> list[str]:
    """Return the registered T2T-ViT variants with the keys and shapes of `body`, pos_embed and head aside."""
    ignored = ('pos_embed', 'head.')

    def backbone(state: StateDict) -> dict[str, torch.Size]:
        return {key: tensor.shape for key, tensor in state.items() if not key.startswith(ignored)}

    given = backbone(body)
    fitting = []
    for name in timm.list_models('t2t_vit*'):
        with torch.device('meta'):  # shapes only, no memory
            variant = timm.create_model(name, num_classes=0)
        if backbone(variant.state_dict()) == given:
            fitting.append(name)
    return fitting


def _shortened(items: Iterable[str], limit: int = 3) -> str:
    """Join the first items by commas and say how many more there are."""
    items = list(items)
    rest = f' and {len(items) - limit} more' if len(items) > limit else ''
    return ', '.join(items[:limit]) + rest


def count_classes(model_name: str, checkpoint: Mapping[str, Any], use_ema: bool = True,
                  source: str = 'checkpoint in memory') -> int | None:
    """The number of classes of the classifier in a checkpoint of `model_name`; None if it holds no classifier.

    Without a checkpoint (an empty one), that of the model's pretrained weights.
    """
    config = timm.get_pretrained_cfg(model_name).to_dict()
    if not checkpoint:
        return config['num_classes']
    try:
        weights = state_dict_of(checkpoint, use_ema)
    except UserError as error:
        raise UserError(f'{source}: {error}') from error
    return max((len(weights[key]) for name in classifier_names(config) if (key := f'{name}.weight') in weights),
               default=None)


def classifier_names(pretrained_cfg: Mapping[str, Any]) -> tuple[str, ...]:
    """The names of a model's classifiers: one, several (distilled DeiT) or none."""
    names = pretrained_cfg.get('classifier') or ()
    return (names,) if isinstance(names, str) else tuple(names)
