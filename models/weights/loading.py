"""Load the weights of any checkpoint into a model.

    model = timm.create_model('t2t_vit_14')
    print(load_weights(model, '81.5_T2T_ViT_14.pth.tar'))

There are three steps: `utils.weight_sources.read_weights` (file → dict, without running code from the file),
`state_dict_of` (dict → flat state dict with our keys, see formats.py), `load_weights` (state dict → model). If weights
do not fit, identity.py finds the model that they belong to.
"""
import math
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import timm
import torch
from timm.layers import resample_abs_pos_embed
from timm.models import PretrainedCfg
from torch import nn

from models.tokens_to_token import SOFT_SPLITS
from models.weights.formats import (
    StateDict,
    choose_weights,
    extract,
    is_average,
    recorded_arch,
    recorded_img_size,
    several_sets,
    shortened,
)
from models.weights.identity import grid_of, identify, patch_size_of
from utils.console import plural
from utils.errors import UserError
from utils.weight_sources import find_weights, read_weights

# Layers of T2T-ViT applied to patches of pixels, channel by channel as in nn.Unfold. For images of one channel, the
# entries of all channels are summed (True) or averaged (False).
FIRST_LAYERS = {
    'tokens_to_token.attention1.norm1.weight': False,
    'tokens_to_token.attention1.norm1.bias': False,
    'tokens_to_token.attention1.kqv.weight': True,
    'tokens_to_token.attention1.attn.qkv.weight': True,
}
# Batch norms count batches since PyTorch 0.4.1. Weights from before lack the number, which evaluation does not use.
COUNTED = '.num_batches_tracked'
LISTED_KEYS = 20  # keys of a kind that an error lists; 3 for weights of another architecture


def state_dict_of(checkpoint: Mapping[str, Any], use_ema: bool | None = None, source: str | None = None) -> StateDict:
    """Return the weights of a checkpoint as `extract` does, without the report; messages begin with `source`."""
    try:
        return extract(checkpoint, use_ema).state
    except UserError as error:
        raise UserError(f'{source}: {error}' if source else str(error)) from error


def read_chosen_weights(source: str, weights_key: str | None = None, use_ema: bool | None = None) -> Mapping[str, Any]:
    """Return the checkpoint at `source`, as `read_weights` does, after `choose_weights`; messages begin with it."""
    checkpoint = read_weights(source)
    try:
        return choose_weights(checkpoint, weights_key, use_ema)
    except UserError as error:
        raise UserError(f'{source}: {error}') from error


@dataclass(frozen=True)
class LoadReport:
    """Report of `load_weights`: `str()` gives a sentence for the log, `lines()` lists every key."""
    source: str  # path of the file, or 'checkpoint in memory'
    format: str  # name of one of FORMATS
    entry: str | None  # entry of the checkpoint that held the weights; None for a flat state dict
    loaded: tuple[str, ...]  # keys copied into the model
    renamed: tuple[tuple[str, str], ...] = ()  # (key in the file, our key)
    transposed: tuple[str, ...] = ()  # keys of linear layers that the file stores as [in, out]
    dropped: tuple[str, ...] = ()  # keys in the file that are not weights
    adapted: tuple[str, ...] = ()  # a phrase for each change of the numbers
    head_replaced: str | None = None  # why the classifier was not loaded; None if it was
    missing: tuple[str, ...] = ()  # keys of the model that are not in the file, except that classifier
    unexpected: tuple[str, ...] = ()  # keys of the file that are not in the model, except that classifier

    def __str__(self) -> str:
        changes = {'renamed': self.renamed, 'transposed': self.transposed, 'dropped as not weights': self.dropped}
        parts = [self._headline(), *(f'{len(keys)} {what}' for what, keys in changes.items() if keys), *self.adapted]
        if self.head_replaced:
            parts.append(f'classifier not loaded: {self.head_replaced}')
        if self.missing:
            parts.append(f'{len(self.missing)} missing and kept as initialised: {shortened(self.missing)}')
        if self.unexpected:
            parts.append(f'{len(self.unexpected)} ignored, not in the model: {shortened(self.unexpected)}')
        return '; '.join(parts)

    def lines(self) -> list[str]:
        """Return a line for every key that was not simply copied."""
        details = {
            'renamed': [f'{old} → {new}' for old, new in self.renamed], 'transposed': self.transposed,
            'dropped, not weights': self.dropped, 'adapted': self.adapted,
            'classifier not loaded': [self.head_replaced] if self.head_replaced else [],
            'missing, kept as initialised': self.missing, 'ignored, not in the model': self.unexpected}
        return [self._headline(), *(f'{what}: {detail}' for what, parts in details.items() for detail in parts)]

    def _headline(self) -> str:
        kind = self.format if self.entry is None else f'{self.format}, {self.entry}'
        return f'{len(self.loaded)} tensors loaded from {self.source} ({kind})'


def load_weights(model: nn.Module, path_or_checkpoint: str | os.PathLike | Mapping[str, Any], *,
                 use_ema: bool | None = None, weights_key: str | None = None, strict: bool = True,
                 replace_head: bool = False, img_size: tuple[int, int] | None = None,
                 source: str = 'checkpoint in memory') -> LoadReport:
    """Load weights from a file or a checkpoint into any timm model.

    A position embedding of another grid is resampled; the first layer of a T2T-ViT is adapted to other channels. If
    the weights do not fit, an error is raised and the model stays unchanged.

    Args:
        model: target; the name of its classifier is read from `model.pretrained_cfg`.
        path_or_checkpoint: file or other address of `find_weights`, dict as returned by `read_checkpoint`, or state
            dict.
        use_ema: prefer averaged weights; False never takes them; None takes those that a run recorded as the better
            ones, else averaged ones.
        weights_key: name of the weights, instead, in a checkpoint that holds several; see `choose_weights`.
        strict: refuse missing and unexpected keys. Other shapes are always refused.
        replace_head: keep the model's classifier if the weights have none, or another number of classes (transfer
            learning), instead of raising.
        img_size: (height, width) in pixels of the images in the training of the weights; by default as recorded in
            the checkpoint, else see `resize_pos_embed`.
        source: name of a checkpoint without a path in messages.

    Raises:
        UserError: unreadable file, weights of another model, other number of classes without `replace_head`, or
            `img_size` does not fit the position embedding.
    """
    if isinstance(path_or_checkpoint, Mapping):
        checkpoint = path_or_checkpoint
    else:
        source = os.fspath(find_weights(path_or_checkpoint))
        checkpoint = read_weights(source)
    try:
        checkpoint = choose_weights(checkpoint, weights_key, use_ema)
        given = extract(checkpoint, use_ema)
        own, dropped, prefix = select_module(given.state, model, use_ema)
        named, phrase = name_as_timm(own, model)
        weights, adapted = fit_to_model(named, model, img_size, recorded=recorded_img_size(checkpoint))
    except UserError as error:
        raise UserError(f'{source}: {error}') from error
    found = f'prefix {prefix} removed' if prefix else None
    adapted = (*given.adapted, *filter(None, (found, phrase)), *adapted)

    target = model.state_dict()
    head_conflict, classifier = _compare_heads(model, weights, target)
    body = {key: tensor for key, tensor in weights.items() if key not in classifier}
    missing = [key for key in target if key not in weights and key not in classifier and not key.endswith(COUNTED)]
    unexpected = [key for key in body if key not in target]
    other_shape = [key for key in body if key in target and body[key].shape != target[key].shape]
    if other_shape or (strict and (missing or unexpected)) or len(unexpected) == len(body):
        shapes = [f'{key} {list(body[key].shape)} for {list(target[key].shape)}' for key in other_shape]
        raise UserError(f'{source}: {_explain_mismatch(given.state, checkpoint, model, shapes, missing, unexpected)}')
    if head_conflict and not replace_head:
        raise UserError(f'{source}: {head_conflict}; use as many classes (--num-classes), or transfer.py, which '
                        'gives the model a new classifier (replace_head=True)')
    loaded = {key: tensor for key, tensor in body.items() if key in target}
    for key, tensor in loaded.items():
        if tensor.is_floating_point() != target[key].is_floating_point():
            raise UserError(f'{source}: {key} has numbers of {tensor.dtype}, the model of {target[key].dtype}; '
                            'save it in the dtype of the model')
    model.load_state_dict(loaded, strict=False)  # the checks above cover keys and shapes
    return LoadReport(source, given.format, given.entry, tuple(loaded), given.renamed, given.transposed,
                      (*given.dropped, *dropped), adapted, head_conflict, tuple(missing), tuple(unexpected))


def select_module(weights: StateDict, model: nn.Module, use_ema: bool | None = None
                  ) -> tuple[StateDict, tuple[str, ...], str]:
    """Return the weights of the one module that is the model, the keys of everything else, and the module's prefix.

    A LightningModule also saves its losses and metrics, and often a second, averaged model.

    Raises:
        UserError: several modules are the model.
    """
    needed = _needed(model)
    if needed <= weights.keys():
        return weights, (), ''
    prefixes = {'.'.join(key.split('.')[:depth]) + '.' for key in weights for depth in (1, 2)
                if key.count('.') >= depth}
    found = sorted(prefix for prefix in prefixes if all(prefix + key in weights for key in needed))
    averages = [prefix for prefix in found if is_average(prefix.removesuffix('.'))]
    if averages and (use_ema is not False or len(averages) < len(found)):
        found = averages if use_ema is not False else [prefix for prefix in found if prefix not in averages]
    if not found:
        return weights, (), ''
    if len(found) > 1:
        raise UserError(several_sets(prefix.removesuffix('.') for prefix in found))
    return ({key.removeprefix(found[0]): value for key, value in weights.items() if key.startswith(found[0])},
            tuple(key for key in weights if not key.startswith(found[0])), found[0])


def name_as_timm(weights: StateDict, model: nn.Module) -> tuple[StateDict, str | None]:
    """Return weights from a model's authors with timm's names and shapes, and a phrase (None: unchanged).

    Many of timm's models have such a function, called checkpoint_filter_fn, for the files of their authors.
    """
    module = sys.modules[type(model).__module__]
    target, needed = model.state_dict(), _needed(model)
    if not module.__name__.startswith('timm.') or _fitting(weights, target, needed):
        return weights, None
    for name in dir(module):
        if name.endswith('filter_fn'):
            try:
                mapped = getattr(module, name)(dict(weights), model)
            except Exception:  # it is for other files, and may fail in any way on these
                continue
            if _fitting(mapped, target, needed):
                return mapped, f'named and shaped as timm does ({module.__name__})'
    return weights, None


def _needed(model: nn.Module) -> set[str]:
    """Return the keys that weights of a model must have, whatever their classifier."""
    classifiers = classifier_names(getattr(model, 'pretrained_cfg', None) or {})
    return {key for key in model.state_dict()
            if not key.endswith(COUNTED) and not key.startswith(tuple(f'{name}.' for name in classifiers))}


def _fitting(weights: Mapping[str, Any], target: StateDict, needed: set[str]) -> bool:
    return all(key in weights and weights[key].shape == target[key].shape for key in needed)


def load_for_transfer_learning(model: nn.Module, checkpoint_path: str | os.PathLike, use_ema: bool | None = None,
                               strict: bool = False, num_classes: int = 1000) -> LoadReport:
    """Load weights for fine-tuning, with the name and arguments of the function in the authors' repository.

    The model keeps its classifier, if the weights have another, unless num_classes is 1000.
    """
    return load_weights(model, checkpoint_path, use_ema=use_ema, strict=strict, replace_head=num_classes != 1000)


def fit_to_model(weights: StateDict, model: nn.Module, img_size: tuple[int, int] | None = None,
                 recorded: tuple[int, int] | None = None) -> tuple[StateDict, tuple[str, ...]]:
    """Return a state dict adapted to the image size and channels of a model, and a phrase for each change.

    Takes the arguments of `resize_pos_embed` and raises its errors.
    """
    weights, resized = resize_pos_embed(weights, model, img_size, recorded)
    weights, adapted = adapt_in_chans(weights, model)
    return weights, tuple(phrase for phrase in (resized, adapted) if phrase)


def resize_pos_embed(weights: StateDict, model: nn.Module, img_size: tuple[int, int] | None = None,
                     recorded: tuple[int, int] | None = None) -> tuple[StateDict, str | None]:
    """Return a state dict with `pos_embed` resampled in float32 to the grid of a model, and a phrase (None: unchanged).

    Works for every model with `pos_embed` [1, prefix + rows · columns, C] and its grid in `grid_size` or
    `patch_embed.grid_size`. The grid of the weights is that of the training images, if their size gives the number of
    positions. Otherwise it is the model's grid, if the number is the same, else a square.

    Args:
        weights: state dict; it is not changed.
        model: target.
        img_size: (height, width) in pixels of the images in the training of the weights.
        recorded: image size recorded in the checkpoint, used without `img_size` and only if it fits.

    Raises:
        UserError: `img_size` does not give the number of positions, or the grid of the weights is unknown.
    """
    given, wanted = weights.get('pos_embed'), getattr(model, 'pos_embed', None)
    holder = model if hasattr(model, 'grid_size') else getattr(model, 'patch_embed', None)
    grid = getattr(holder, 'grid_size', None)
    if given is None or wanted is None or grid is None or given.dim() != 3 or given.shape[-1] != wanted.shape[-1]:
        return weights, None  # weights of another model, which the caller detects
    prefix = 0 if getattr(model, 'no_embed_class', False) else getattr(model, 'num_prefix_tokens', 1)
    positions = given.shape[1] - prefix
    known = _grid_of_images(positions, model, size) if (size := img_size or recorded) else None
    if img_size and known is None:
        raise UserError(f'pos_embed has {positions} grid positions, but images of {img_size[0]} × {img_size[1]} pixels '
                        'give others; give the image size (img_size) that the weights were trained at')
    old = known or (tuple(grid) if given.shape == wanted.shape else grid_of(positions))
    if old is None:
        raise UserError(f'pos_embed has {positions} grid positions, no square, so its rows are unknown; '
                        'create the model with the image size (img_size) that the weights were trained at')
    if old == tuple(grid):
        return weights, None
    pos_embed = resample_abs_pos_embed(given.float(), list(grid), list(old), num_prefix_tokens=prefix)
    return {**weights, 'pos_embed': pos_embed}, 'pos_embed resized from {} × {} to {} × {}'.format(*old, *grid)


def _grid_of_images(positions: int, model: nn.Module, img_size: tuple[int, int]) -> tuple[int, int] | None:
    """Return the grid (rows, columns) of images in a model, or None if it does not have `positions` tokens."""
    patches = getattr(model, 'patch_embed', None)
    if hasattr(model, 'tokens_to_token'):
        patch_size = None
    elif patches is not None and hasattr(patches, 'feat_ratio'):
        patch_size = tuple(patches.feat_ratio(as_scalar=False))
    else:
        patch_size = patch_size_of(positions, img_size)
    return grid_of(positions, img_size, patch_size)


def adapt_in_chans(weights: StateDict, model: nn.Module) -> tuple[StateDict, str | None]:
    """Return a state dict with the first layers adapted to the model's channels, and a phrase (None: unchanged).

    As timm adapts a first convolution, in float32: for one channel, the weights of all channels are summed; otherwise
    they are repeated and scaled to the same sum. The norm before a token layer is averaged or repeated. So grey images
    look the same to a model for RGB as to the model of one channel. Convolutions change only from or to 3 channels, as
    other numbers may be those of parts of an image.
    """
    target = model.state_dict()
    adapted, phrase = {}, None
    for key, is_summed in {**dict.fromkeys(first_convolutions(model), True), **FIRST_LAYERS}.items():
        given, wanted = weights.get(key), target.get(key)
        if given is None or wanted is None or given.dim() != wanted.dim() or given.shape[2:] != wanted.shape[2:]:
            continue
        rows = wanted.shape[:1] if wanted.dim() > 1 else ()  # output channels; a norm has none
        patch = math.prod(wanted.shape[2:]) if wanted.dim() == 4 else SOFT_SPLITS[0][0] ** 2
        old, new = (tensor.numel() // (math.prod(rows) * patch) for tensor in (given, wanted))
        if old == new or given.numel() != math.prod(rows) * old * patch or (wanted.dim() == 4 and 3 not in (old, new)):
            continue
        channels = given.float().reshape(*rows, old, patch)
        if new == 1:
            channels = channels.sum(-2, keepdim=True) if is_summed else channels.mean(-2, keepdim=True)
        else:
            channels = channels[..., [i % old for i in range(new)], :] * (old / new if is_summed else 1)
        adapted[key] = channels.reshape(wanted.shape)
        phrase = f'first layer adapted from {old} to {plural(new, "channel")}'
    return {**weights, **adapted}, phrase


def _compare_heads(model: nn.Module, weights: StateDict, target: StateDict) -> tuple[str | None, set[str]]:
    """Return how the numbers of classes differ and the keys of the classifiers; (None, no keys) if they agree."""
    names = classifier_names(getattr(model, 'pretrained_cfg', None) or {})
    keys = {f'{name}.{kind}' for name in names for kind in ('weight', 'bias')}

    def described(state: StateDict) -> str:
        classes = sorted({state[key].shape[0] for key in keys & state.keys() if state[key].dim() > 0})
        return ' and '.join(map(str, classes)) + ' classes' if classes else 'no classifier'

    if described(weights) == described(target):
        return None, set()
    return f'the weights have {described(weights)}, the model has {described(target)}', keys


def _explain_mismatch(weights: StateDict, checkpoint: Mapping[str, Any], model: nn.Module, shapes: list[str],
                      missing: list[str], unexpected: list[str]) -> str:
    """Return a line that names the model of the weights, their differences from this model, and the remedy."""
    name = (getattr(model, 'pretrained_cfg', None) or {}).get('architecture') or type(model).__name__
    identity = identify(weights, recorded_img_size(checkpoint))
    is_other = bool(identity.names) and name not in identity.names
    kinds = ((shapes, 'of other shape'), (missing, 'missing'), (unexpected, 'without a place'))
    parts = ['the weights do not fit the model'] + [
        f'{len(keys)} {what} ({shortened(keys, 3 if is_other else LISTED_KEYS)})' for keys, what in kinds if keys]
    if is_other:
        parts[0] = f'the weights are of {identity.description} and do not fit {name}'
        parts.append(f'use --model {" or ".join(identity.names)}')
    elif not identity.names:
        recorded = recorded_arch(checkpoint)
        claim = f', by its own account {recorded}' if recorded else ''
        parts[0] = f'the weights are of {identity.description}{claim} and do not fit {name}'
        parts.append(f'use --model {recorded}' if recorded else 'check the name of the model')
    return '; '.join(parts)


def count_classes(model_name: str, checkpoint: Mapping[str, Any], use_ema: bool | None = None,
                  source: str = 'checkpoint in memory') -> int | None:
    """Return the number of classes in a checkpoint of `model_name`; None if it has no classifier.

    For an empty checkpoint, return that of the model's pretrained weights.
    """
    config = published_config(model_name).to_dict()
    if not checkpoint:
        return config['num_classes']
    weights = state_dict_of(checkpoint, use_ema, source)
    keys = [f'{name}.weight' for name in classifier_names(config)]
    if not any(key in weights for key in keys) and timm.is_model(model_name):
        with torch.device('meta'):
            weights, _ = name_as_timm(weights, timm.create_model(model_name))
    # A classifier may also be a convolution, with four dimensions.
    return max((len(weights[key]) for key in keys if key in weights and weights[key].dim() >= 2), default=None)


def published_config(model_name: str) -> PretrainedCfg:
    """Return timm's configuration of a model's published weights, or defaults if it has none."""
    return timm.get_pretrained_cfg(model_name) or PretrainedCfg()


def count_channels(model_name: str, weights: StateDict) -> int | None:
    """Return the channels of the images, from the first layer of `model_name`; None if that does not tell."""
    norm = weights.get('tokens_to_token.attention1.norm1.weight')
    if norm is not None:
        return norm.numel() // SOFT_SPLITS[0][0] ** 2 or None
    config = published_config(model_name)
    tensor = weights.get(f'{config.first_conv}.weight') if isinstance(config.first_conv, str) else None
    if tensor is None or tensor.dim() != 4:
        return None
    with torch.device('meta'):
        own = timm.create_model(model_name).state_dict()[f'{config.first_conv}.weight']
    # Some models fold pixels into channels before it.
    return tensor.shape[1] if own.shape[1] == config.input_size[0] else None


def first_convolutions(model: nn.Module) -> list[str]:
    """Return the keys of the weights of a model's first convolutions: one, several or none."""
    names = (getattr(model, 'pretrained_cfg', None) or {}).get('first_conv') or ()
    return [f'{name}.weight' for name in ((names,) if isinstance(names, str) else names)]


def classifier_names(pretrained_cfg: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the names of a model's classifiers: one, several (distilled DeiT) or none."""
    names = pretrained_cfg.get('classifier') or ()
    return (names,) if isinstance(names, str) else tuple(names)
