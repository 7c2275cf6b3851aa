"""Weights from elsewhere: the one place where a known checkpoint gets into a model.

    model = timm.create_model('t2t_vit_14')
    print(load_weights(model, '81.5_T2T_ViT_14.pth.tar'))

Three steps, each usable alone: `utils.checkpoint_reader.read_checkpoint` (file → dict, running no code from the file),
`state_dict_of` (dict → flat state dict with our keys; see formats.py), `load_weights` (state dict → model,
with a report). Where weights do not fit, models/weights/identity.py says what they are of.
"""
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import timm
from timm.layers import resample_abs_pos_embed
from timm.models import PretrainedCfg
from torch import nn

from models.tokens_to_token import SOFT_SPLITS
from models.weights.formats import StateDict, extract, recorded_arch, recorded_img_size, shortened
from models.weights.identity import grid_of, identify, patch_size_of
from utils.checkpoint_reader import read_checkpoint
from utils.errors import UserError

# The layers of ours that see pixels, channel by channel as unfold orders them: what they have of each in which
# dimension is summed for one channel (True) or averaged (False).
FIRST_LAYERS = {
    'tokens_to_token.attention1.norm1.weight': False,
    'tokens_to_token.attention1.norm1.bias': False,
    'tokens_to_token.attention1.kqv.weight': True,
    'tokens_to_token.attention1.attn.qkv.weight': True,
}
LISTED_KEYS = 20  # of one kind in an error, where they are all that is wrong; fewer for another architecture


def state_dict_of(checkpoint: Mapping[str, Any], use_ema: bool = True) -> StateDict:
    """Return the weights in a checkpoint as a flat dict of tensors under our keys and in our layout.

    Args:
        checkpoint: what `read_checkpoint` returns.
        use_ema: prefer the averaged weights; without it they are never taken.

    Raises:
        UserError: there are no weights in it, or only averaged ones and use_ema is False.
    """
    return extract(checkpoint, use_ema).state


@dataclass(frozen=True)
class LoadReport:
    """What `load_weights` did; `str()` of it is a sentence for the log, `lines()` has every key."""
    source: str  # path of the file, or 'checkpoint in memory'
    format: str  # name of the format, one of FORMATS
    entry: str | None  # entry of the checkpoint that held the weights; None for a flat state dict
    loaded: tuple[str, ...]  # keys copied into the model
    renamed: tuple[tuple[str, str], ...] = ()  # (key in the file, our key)
    transposed: tuple[str, ...] = ()  # keys of linear layers that the file keeps as [in, out]
    dropped: tuple[str, ...] = ()  # keys in the file that are no weights
    adapted: tuple[str, ...] = ()  # what was resampled or adapted, each with both sizes
    head_replaced: str | None = None  # why the model kept its own classifier, None where it was loaded
    missing: tuple[str, ...] = ()  # keys of the model that kept their values, but for that classifier
    unexpected: tuple[str, ...] = ()  # keys of the weights that have no place, but for that classifier

    def __str__(self) -> str:
        parts = [self._headline()]
        parts += [f'{len(keys)} {what}' for what, keys in (('renamed', self.renamed), ('transposed', self.transposed),
                                                            ('dropped as no weights', self.dropped)) if keys]
        parts += self.adapted
        if self.head_replaced:
            parts.append(f'classifier not loaded: {self.head_replaced}')
        if self.missing:
            parts.append(f'{len(self.missing)} not given and kept as initialised: {shortened(self.missing)}')
        if self.unexpected:
            parts.append(f'{len(self.unexpected)} ignored, having no place: {shortened(self.unexpected)}')
        return '; '.join(parts)

    def lines(self) -> list[str]:
        """Return everything that was not simply copied, one key a line."""
        return [
            self._headline(),
            *(f'renamed: {old} → {new}' for old, new in self.renamed),
            *(f'transposed: {key}' for key in self.transposed),
            *(f'dropped, no weights: {key}' for key in self.dropped),
            *(f'adapted: {what}' for what in self.adapted),
            *([f'classifier not loaded: {self.head_replaced}'] if self.head_replaced else []),
            *(f'missing, kept as initialised: {key}' for key in self.missing),
            *(f'ignored, no place: {key}' for key in self.unexpected),
        ]

    def _headline(self) -> str:
        kind = self.format if self.entry is None else f'{self.format}, {self.entry}'
        return f'{len(self.loaded)} tensors loaded from {self.source} ({kind})'


def load_weights(
        model: nn.Module,
        path_or_checkpoint: str | os.PathLike | Mapping[str, Any],
        *,
        use_ema: bool = True,
        strict: bool = True,
        replace_head: bool = False,
        img_size: tuple[int, int] | None = None,
        source: str = 'checkpoint in memory',
) -> LoadReport:
    """Load weights from a file or a checkpoint into any timm model and report what was done.

    A position embedding of another grid is resampled, and the first layer of a T2T-ViT adapted to other channels.
    Either everything fits and is copied, or an error says why not and the model stays as it was.

    Args:
        model: target; its classifier's name is read from `model.pretrained_cfg`.
        path_or_checkpoint: file, dict as `read_checkpoint` returns it, or state dict.
        use_ema: prefer averaged weights; without it they are never taken.
        strict: refuse keys that are missing or have no place. Other shapes are refused in any case.
        replace_head: where the weights have another number of classes than the model, or no classifier, keep
            the model's own, fresh one (transfer learning) instead of raising.
        img_size: height and width, in pixels, of the images that the weights were trained at; by default what the
            checkpoint records, if it gives the positions in the weights; else see `resize_pos_embed`.
        source: what a checkpoint that is no path is called in messages.

    Raises:
        UserError: unreadable file, weights of another model, other number of classes without `replace_head`, an
            `img_size` that the position embedding does not fit.
    """
    if isinstance(path_or_checkpoint, Mapping):
        checkpoint = path_or_checkpoint
    else:
        source, checkpoint = os.fspath(path_or_checkpoint), read_checkpoint(path_or_checkpoint)
    try:
        given = extract(checkpoint, use_ema)
        weights, adapted = fit_to_model(given.state, model, img_size, recorded=recorded_img_size(checkpoint))
    except UserError as error:
        raise UserError(f'{source}: {error}') from error

    target = model.state_dict()
    head_conflict, classifier = _compare_heads(model, weights, target)
    body = {key: tensor for key, tensor in weights.items() if key not in classifier}
    missing = [key for key in target if key not in weights and key not in classifier]
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
                            'save it in the kind of numbers that the model has')
    model.load_state_dict(loaded, strict=False)  # complete and of the right shapes, as checked above
    return LoadReport(source, given.format, given.entry, tuple(loaded), given.renamed, given.transposed, given.dropped,
                      adapted, head_conflict, tuple(missing), tuple(unexpected))


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


def fit_to_model(
        weights: StateDict,
        model: nn.Module,
        img_size: tuple[int, int] | None = None,
        recorded: tuple[int, int] | None = None,
) -> tuple[StateDict, tuple[str, ...]]:
    """Adapt a state dict of ours to the image size and the channels of a model.

    Args:
        weights: state dict; it is left as it is.
        model: target.
        img_size: height and width, in pixels, of the images that the weights were trained at.
        recorded: the same as the checkpoint says it, which is used where it fits and there is no `img_size`.

    Returns:
        The adapted state dict, and a phrase for everything that was done.

    Raises:
        UserError: as `resize_pos_embed`.
    """
    weights, resized = resize_pos_embed(weights, model, img_size, recorded)
    weights, adapted = adapt_in_chans(weights, model)
    return weights, tuple(phrase for phrase in (resized, adapted) if phrase)


def resize_pos_embed(
        weights: StateDict,
        model: nn.Module,
        img_size: tuple[int, int] | None = None,
        recorded: tuple[int, int] | None = None,
) -> tuple[StateDict, str | None]:
    """Resample `pos_embed` of a state dict to the grid of the model, in float32.

    Works for every model that keeps [1, prefix + rows · columns, C] in `pos_embed` and its grid in
    `grid_size` or `patch_embed.grid_size`; other state dicts come back as they are.

    The grid of the weights is that of the images they were trained at, where `img_size` or `recorded` gives exactly
    their positions. Else as many positions as the model has are taken for its grid, and others for a square.

    Args:
        weights, model, img_size, recorded: as in `fit_to_model`.

    Returns:
        The state dict (the given one is left as it is) and what was done, None for nothing.

    Raises:
        UserError: `img_size` does not give the positions of the weights, or nothing tells the shape of their grid.
    """
    given, wanted = weights.get('pos_embed'), getattr(model, 'pos_embed', None)
    holder = model if hasattr(model, 'grid_size') else getattr(model, 'patch_embed', None)
    grid = getattr(holder, 'grid_size', None)
    if given is None or wanted is None or grid is None or given.dim() != 3 or given.shape[-1] != wanted.shape[-1]:
        return weights, None  # weights of another model, which the caller finds out
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
    """Return the grid of `positions` that images have in a model, None where they have no such grid."""
    patches = getattr(model, 'patch_embed', None)
    if hasattr(model, 'tokens_to_token'):
        patch_size = None
    elif patches is not None and hasattr(patches, 'feat_ratio'):
        patch_size = tuple(patches.feat_ratio(as_scalar=False))
    else:
        patch_size = patch_size_of(positions, img_size)
    return grid_of(positions, img_size, patch_size)


def adapt_in_chans(weights: StateDict, model: nn.Module) -> tuple[StateDict, str | None]:
    """Adapt the first token layer of a state dict to images with other channels, in float32.

    As timm adapts a first convolution: what the layer has for each channel is summed for one channel; for others
    it is repeated in turn, scaled so that the sum stays of the same size. The norm before it is averaged or repeated.

    Returns:
        The state dict (the given one is left as it is) and what was done, None for nothing.
    """
    target = {key: tensor for key, tensor in model.state_dict().items() if key in FIRST_LAYERS}
    patch = SOFT_SPLITS[0][0] ** 2
    adapted, phrase = {}, None
    for key, is_summed in FIRST_LAYERS.items():
        if key not in target or key not in weights or weights[key].dim() != target[key].dim():
            continue
        old, new = (tensor.shape[-1] // patch for tensor in (weights[key], target[key]))
        if old == new or old == 0 or weights[key].shape[-1] % patch:
            continue
        channels = weights[key].float().unflatten(-1, (old, patch))  # [..., old, 49]
        if new == 1:
            channels = channels.sum(-2, keepdim=True) if is_summed else channels.mean(-2, keepdim=True)
        else:
            channels = channels[..., [i % old for i in range(new)], :] * (old / new if is_summed else 1)
        adapted[key] = channels.flatten(-2)  # [..., new · 49]
        phrase = f'first layer adapted from {old} to {new} channel{"s" * (new > 1)}'
    return {**weights, **adapted}, phrase


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
        weights: StateDict,
        checkpoint: Mapping[str, Any],
        model: nn.Module,
        shapes: list[str],
        missing: list[str],
        unexpected: list[str],
) -> str:
    """Say in one line what weights are of, if that is another model, how they differ from this one, and what to do."""
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


def count_classes(model_name: str, checkpoint: Mapping[str, Any], use_ema: bool = True,
                  source: str = 'checkpoint in memory') -> int | None:
    """The number of classes of the classifier in a checkpoint of `model_name`; None if it holds no classifier.

    Without a checkpoint (an empty one), that of the model's pretrained weights.
    """
    config = published_config(model_name).to_dict()
    if not checkpoint:
        return config['num_classes']
    try:
        weights = state_dict_of(checkpoint, use_ema)
    except UserError as error:
        raise UserError(f'{source}: {error}') from error
    keys = [f'{name}.weight' for name in classifier_names(config)]
    # A classifier may be a convolution too, with four dimensions.
    return max((len(weights[key]) for key in keys if key in weights and weights[key].dim() >= 2), default=None)


def published_config(model_name: str) -> PretrainedCfg:
    """What timm knows of a model's published weights; its defaults for a registered model of which it knows nothing."""
    return timm.get_pretrained_cfg(model_name) or PretrainedCfg()


def count_channels(model_name: str, weights: StateDict) -> int | None:
    """The channels of the images that weights of `model_name` are for, as its first convolution tells; else None."""
    first = published_config(model_name).first_conv
    tensor = weights.get(f'{first}.weight') if isinstance(first, str) else None
    return tensor.shape[1] if tensor is not None and tensor.dim() == 4 else None


def classifier_names(pretrained_cfg: Mapping[str, Any]) -> tuple[str, ...]:
    """The names of a model's classifiers: one, several (distilled DeiT) or none."""
    names = pretrained_cfg.get('classifier') or ()
    return (names,) if isinstance(names, str) else tuple(names)
