"""What a model attends to, what its tokens have seen of the image, which of its channels say anything.

    weights = attention_weights(model, images)                # of every block [B, h, N, N]
    rollout = attention_rollout([w.mean(1) for w in weights])  # through all blocks [B, N, N]

Models compute as they always do: what is wanted is listened to, or worked out beside them. Nothing here draws.

Dimensions: B images, h heads, N tokens, C channels, D channels of a token layer, m random features, H × W grid.
"""
import contextlib
import difflib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from models.tokens_to_token import (
    SOFT_SPLITS,
    SoftSplit,
    TokenPerformer,
    TokenTransformer,
    token_grid,
    without_autocast,
)
from utils.errors import UserError

Grid = tuple[int, int]


class NotSeen(UserError):
    """A model has nothing of the kind that was to be shown; with another model it could be."""


# --- Attention of the backbone ----------------------------------------------------------------------------------------

class _Listener(TorchFunctionMode):
    """Hands the arguments of every fused attention to `heard`; inside, attention is not listened to."""

    def __init__(self, heard: Callable[..., None]):
        super().__init__()
        self._heard = heard

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            self._heard(*args, **kwargs)
        return func(*args, **kwargs)


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode, without gradients and mixed precision, for as long as this lasts."""
    was_training = model.training
    device_type = next((parameter.device.type for parameter in model.parameters()), 'cpu')
    model.eval()
    try:
        with torch.no_grad(), without_autocast(device_type):
            yield
    finally:
        model.train(was_training)


@contextlib.contextmanager
def _hooks(*handles: torch.utils.hooks.RemovableHandle) -> Iterator[None]:
    """Hooks that are gone in the end."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def attention_weights(
        model: nn.Module,
        images: torch.Tensor,
        keep: Callable[[torch.Tensor], Any] = lambda weights: weights,
) -> list[Any]:
    """The attention weights of every block that attends, first block first.

    Args:
        model: T2TViT and its ablations, timm's VisionTransformer family: a model with `blocks`, each of which calls
            torch's scaled_dot_product_attention once, over all tokens.
        images: normalised, [B, C, height, width].
        keep: what to keep of a block's weights [B, h, N, N] (float32, rows sum to 1); all by default. For large
            images, whose weights of all blocks no memory holds.

    Returns:
        keep(weights) of each block. Prefix tokens (class token, registers) come first, the grid follows row by row.

    Raises:
        NotSeen: the model has no such attention.
    """
    name = _name(model)
    num_tokens = _num_prefix_tokens(model) + math.prod(_backbone_grid(model, images))
    kept: dict[int, Any] = {}
    current = None

    def enter(index):
        nonlocal current
        current = index

    def heard(query, key, value, attn_mask=None, dropout_p=0., is_causal=False, scale=None, enable_gqa=False):
        if current is None:
            return
        whole = query.shape[-2] == key.shape[-2] == num_tokens and query.shape[-3] == key.shape[-3]
        masked = is_causal or (attn_mask is not None and attn_mask.dtype == torch.bool)
        if current in kept or masked or not whole:
            raise NotSeen(f'model {name}: block {current + 1} does not attend once over all tokens; its attention '
                            'cannot be shown')
        with torch.autocast(query.device.type, enabled=False):
            scores = query.float() @ key.float().transpose(-2, -1) * (scale or query.shape[-1] ** -0.5)
            kept[current] = keep((scores if attn_mask is None else scores + attn_mask).softmax(-1))  # [B, h, N, N]

    handles = []
    for index, block in enumerate(model.get_submodule('blocks').children()):
        handles.append(block.register_forward_pre_hook(lambda *_, index=index: enter(index)))
        handles.append(block.register_forward_hook(lambda *_: enter(None)))
    with _evaluating(model), _hooks(*handles), _Listener(heard):
        model(images)
    if not kept:
        raise NotSeen(f'model {name} has no attention that can be shown')
    return list(kept.values())


def attention_rollout(averages: Sequence[torch.Tensor], tokens: Sequence[int] | None = None) -> torch.Tensor:
    """How much of each input token reaches each token behind the last block (Abnar and Zuidema 2020, section 3).

    Each block passes on half of a token itself (the residual) and half of what it attends to; the product over all
    blocks is the rollout. Rows sum to 1.

    Args:
        averages: of each block, first block first, the weights averaged over the heads, [B, N, N].
        tokens: rows to compute, all if not given; for a few, the cost is that of matrix times vector.

    Returns:
        [B, len(tokens), N].
    """
    B, N, _ = averages[0].shape
    rows = torch.eye(N, device=averages[0].device, dtype=averages[0].dtype)
    rows = (rows if tokens is None else rows[list(tokens)]).expand(B, -1, -1)  # [B, len(tokens), N]
    for average in reversed(averages):
        rows = (rows + rows @ average) / 2
    return rows


class SeenAttention(NamedTuple):
    """What the classifier's token attends to in one image, as maps over the image.

    blocks: weights of each block and head, [depth, h, H, W]. rollout: through all blocks, [H, W].
    source: whose attention it is: 'class token'; 'mean of all tokens', where the classifier sees that; where it pools
    them in another way, 'all tokens, on average'.
    """
    blocks: torch.Tensor
    rollout: torch.Tensor
    source: str


def classifier_attention(model: nn.Module, image: torch.Tensor) -> SeenAttention:
    """The attention of what the classifier looks at, over the grid of one image [1, C, height, width].

    That is the class token, or the mean of the grid's tokens where the model pools those: by a mean, or in another way,
    of which nothing is shown. Raises as `attention_weights`.
    """
    H, W = _backbone_grid(model, image)
    prefix = _num_prefix_tokens(model)
    pooling = getattr(model, 'global_pool', 'token')
    by_class = prefix > 0 and pooling == 'token'
    rows = slice(0, 1) if by_class else slice(prefix, None)

    def keep(weights):
        return weights[0, :, rows, prefix:].mean(1).cpu(), weights.mean(1).cpu()  # [h, N - prefix], [1, N, N]

    blocks, averages = zip(*attention_weights(model, image, keep), strict=True)
    N = averages[0].shape[-1]
    rollout = attention_rollout(averages, range(N)[rows]).mean(1)[0, prefix:]  # [N - prefix]
    source = 'class token' if by_class else 'mean of all tokens' if pooling == 'avg' else 'all tokens, on average'
    return SeenAttention(torch.stack(blocks).unflatten(2, (H, W)), rollout.unflatten(0, (H, W)), source)


def _backbone_grid(model: nn.Module, images: torch.Tensor) -> Grid:
    """Rows and columns of the backbone's tokens. Raises NotSeen for a model that has no tokens on a grid."""
    patches: Any = getattr(model, 'patch_embed', None)
    if not hasattr(model, 'blocks') or not (has_soft_splits(model) or hasattr(patches, 'patch_size')):
        raise NotSeen(f'model {_name(model)} has no attention that can be shown; use a T2T-ViT or a ViT')
    height, width = images.shape[-2:]
    if has_soft_splits(model):
        return token_grid(height, width)
    if hasattr(patches, 'dynamic_feat_size'):  # of timm's layers; it counts the strides of a hybrid's convolutions too
        return tuple(patches.dynamic_feat_size((height, width)))
    size = patches.patch_size
    rows, columns = (size, size) if isinstance(size, int) else size
    return height // rows, width // columns


def _num_prefix_tokens(model: nn.Module) -> int:
    return getattr(model, 'num_prefix_tokens', 0)


def _name(model: nn.Module) -> str:
    return getattr(model, 'pretrained_cfg', {}).get('architecture') or type(model).__name__


# --- Token layers -----------------------------------------------------------------------------------------------------

class PerformerWeights:
    """The weights that a Performer token layer implies, A_ij = φ(q_i)·φ(k_j) / (φ(q_i)·Σφ(k) + eps).

    performer_attention(k, q, v, w) is A v, though the layer never computes A. Float64 holds the features' range as they
    are published, without the shifts that float32 needs.

    `sums` [B, N], of the rows, are 1, or less where q or k are so long that eps is not small beside their features: a
    sum near 0 is a token that attends to nothing, and of which the layer passes on v alone.

    Args:
        k, q: keys and queries, [B, N, D].
        w: fixed projections, [m, D].
        eps: published constant.
    """

    def __init__(self, k: torch.Tensor, q: torch.Tensor, w: torch.Tensor, eps: float = 1e-8):
        w = w.double()

        def features(x):
            x = x.double()
            return torch.exp(x @ w.t() - x.square().sum(-1, keepdim=True) / 2) / math.sqrt(w.shape[0])  # [B, N, m]

        self._k, q = features(k), features(q)
        total = self._k.sum(1).unsqueeze(2)  # [B, m, 1]
        self._q = q / (q @ total + eps)  # [B, N, m]
        self.sums = (self._q @ total).squeeze(2)

    def rows(self, queries: Sequence[int]) -> torch.Tensor:
        """The weights of chosen query tokens, [B, len(queries), N]."""
        return self._q[:, list(queries)] @ self._k.transpose(1, 2)

    def spread(self, relevance: torch.Tensor) -> torch.Tensor:
        """Relevance of the outputs [B, N] → that of the inputs, relevance · A [B, N], in linear time."""
        relevance = relevance.double().unsqueeze(1) @ self._q  # [B, 1, m]
        return (relevance @ self._k.transpose(1, 2)).squeeze(1)


class SoftmaxWeights:
    """The weights of a Transformer token layer, softmax(scale · q kᵀ), computed for the rows that are asked for.

    In float64 as those of the Performer, which autocast leaves alone. `sums` [B, N] of the rows are 1.

    Args:
        k, q: keys and queries, [B, N, D].
        scale: of the scores.
    """

    def __init__(self, k: torch.Tensor, q: torch.Tensor, scale: float):
        self._k, self._q = k.double(), q.double() * scale
        self.sums = torch.ones_like(self._k[..., 0])

    def rows(self, queries: Sequence[int]) -> torch.Tensor:
        """The weights of chosen query tokens, [B, len(queries), N]."""
        return (self._q[:, list(queries)] @ self._k.transpose(1, 2)).softmax(-1)

    def spread(self, relevance: torch.Tensor) -> torch.Tensor:
        """Relevance of the outputs [B, N] → that of the inputs, relevance · A [B, N], some rows at a time."""
        N = relevance.shape[1]
        out = torch.zeros_like(relevance, dtype=torch.float64)
        for start in range(0, N, 512):  # the whole of A is N × N: at 1024 pixels 32 GiB
            queries = range(start, min(start + 512, N))
            out += (relevance[:, queries].double().unsqueeze(1) @ self.rows(queries)).squeeze(1)
        return out


class Stage(NamedTuple):
    """What one of the three steps of a tokens-to-token module gives.

    tokens: on their grid, [B, channels, H, W]. weights: of the token layer that made them, None where there is none:
    behind the last soft split, and in a module of convolutions.
    """
    tokens: torch.Tensor
    weights: PerformerWeights | SoftmaxWeights | None

    @property
    def grid(self) -> Grid:
        H, W = self.tokens.shape[-2:]
        return H, W


def has_soft_splits(model: nn.Module) -> bool:
    """Whether the model has a tokens-to-token module, or convolutions of the same windows in its place."""
    return hasattr(model, 'tokens_to_token')


def token_stages(model: nn.Module, images: torch.Tensor) -> list[Stage]:
    """The tokens of the tokens-to-token module at 1/4, 1/8 and 1/16 of the images' size, with their token layers.

    images: normalised, [B, C, height, width]. Raises NotSeen for a model without such a module.
    """
    if not has_soft_splits(model):
        raise NotSeen(f'model {_name(model)} has no tokens-to-token module; use a T2T-ViT')
    module = model.get_submodule('tokens_to_token')
    convolutions = not hasattr(module, 'attention1')
    names = ('soft_split0', 'soft_split1') if convolutions else ('attention1', 'attention2')
    steps = [module.get_submodule(name) for name in (*names, 'project')]
    inputs, outputs = {}, {}

    def heard(step, given, result):
        inputs[step], outputs[step] = given[0], result

    grids = _soft_split_grids((images.shape[-2], images.shape[-1]))
    with _evaluating(model), _hooks(*(step.register_forward_hook(heard) for step in steps)):
        module(images)
        stages = []
        for step, (H, W) in zip(steps, grids, strict=True):
            tokens = outputs[step].float()
            if not convolutions:
                tokens = tokens.transpose(1, 2).unflatten(2, (H, W))  # [B, channels, H, W]
            stages.append(Stage(tokens, _layer_weights(step, inputs[step])))
    return stages


def _layer_weights(layer: nn.Module, x: torch.Tensor) -> PerformerWeights | SoftmaxWeights | None:
    """The weights of a token layer for its input [B, C, H, W]; None for any other layer."""
    if not isinstance(layer, TokenPerformer | TokenTransformer):
        return None
    k, q, _ = layer.keys_queries_values(x)
    return PerformerWeights(k, q, layer.w) if isinstance(layer, TokenPerformer) else SoftmaxWeights(
        k, q, layer.attn.scale)


# --- From a token of the last grid back to the pixels -----------------------------------------------------------------

def _soft_split_grids(img_size: Grid) -> list[Grid]:
    """Rows and columns behind each of the three soft splits."""
    grids = []
    for split in SOFT_SPLITS:
        img_size = SoftSplit(*split).grid_size(*img_size)
        grids.append(img_size)
    return grids


def receptive_field(token: Grid, img_size: Grid, splits: int = 3) -> torch.Tensor:
    """The number of paths from each pixel to a token of the last grid through the windows of the soft splits alone.

    Token layers are global: with them, a token has seen the whole image; `pixel_relevance` says how much of it.

    Args:
        token: row and column on the last grid. IndexError if it is not there.
        img_size: height and width of the image, of any size; windows end at its borders.
        splits: how many to go back: 3 to the pixels, 2 to the grid of 1/4, 1 to that of 1/8.

    Returns:
        int64, [height, width] of the pixels, or of that grid; 0 outside of the receptive field.
    """
    sizes = [img_size, *_soft_split_grids(img_size)]
    paths = torch.zeros(sizes[-1], dtype=torch.float64)
    paths[token] = 1
    for split, size in list(zip(SOFT_SPLITS, sizes, strict=False))[:-splits - 1:-1]:
        paths = _through_windows(paths[None], size, split)[0]
    return paths.long()


def pixel_relevance(stages: Sequence[Stage], token: Grid, img_size: Grid) -> torch.Tensor:
    """How much of each pixel is in a token of the last grid, token layers included: the rollout of this module.

    A soft split takes each place of its window in equal parts. A token layer takes the token itself (its residual) and
    what it attends to, as `attention_rollout` does: one half each, less for the attention where its weights do not sum
    to 1. The relevance of all pixels sums to 1.

    Args:
        stages: of `token_stages`, for B images of img_size.
        token: row and column on the last grid.
        img_size: height and width.

    Returns:
        [B, height, width].
    """
    B = len(stages[0].tokens)
    relevance = torch.zeros(B, *stages[-1].grid, dtype=torch.float64, device=stages[0].tokens.device)
    relevance[:, token[0], token[1]] = 1
    sizes = [img_size, *(stage.grid for stage in stages)]
    for index in reversed(range(len(stages))):
        weights = stages[index].weights
        if weights is not None:
            flat = relevance.flatten(1) / (1 + weights.sums)  # [B, N]
            relevance = (flat + weights.spread(flat)).view_as(relevance)
        inside = F.unfold(torch.ones(1, 1, *sizes[index], dtype=relevance.dtype, device=relevance.device),
                          SOFT_SPLITS[index][0], stride=SOFT_SPLITS[index][1], padding=SOFT_SPLITS[index][2])
        places = inside.sum(1).view(1, *relevance.shape[1:])  # of each window, those inside of the map
        relevance = _through_windows(relevance / places, sizes[index], SOFT_SPLITS[index])
    return relevance.float()


def _through_windows(values: torch.Tensor, size: Grid, split: tuple[int, int, int]) -> torch.Tensor:
    """Give the value of each token [B, H, W] to every place of its window, and add up: [B, *size]."""
    kernel, stride, padding = split
    columns = values.flatten(1).unsqueeze(1).expand(-1, kernel ** 2, -1)  # [B, kernel², N]
    return F.fold(columns, size, kernel, stride=stride, padding=padding).squeeze(1)


# --- Channels ---------------------------------------------------------------------------------------------------------

def default_layers(model: nn.Module) -> list[str]:
    """An early, a middle and a late layer of a model that lists its features as timm's do; NotSeen for any other."""
    modules = [info['module'] for info in getattr(model, 'feature_info', None) or ()]
    if not modules:
        raise NotSeen(f'model {_name(model)} does not list its layers; name some (--layers), of '
                      f'{", ".join(name for name, _ in model.named_children())} and what is in them')
    # Where lines and edges show in a T2T-ViT is before its backbone (section 3, Figure 2).
    early = 'tokens_to_token.attention1' if has_soft_splits(model) else modules[0]
    if has_soft_splits(model) and not hasattr(model.tokens_to_token, 'attention1'):
        early = 'tokens_to_token.soft_split0'
    return list(dict.fromkeys((early, modules[len(modules) // 2], modules[-1])))


def check_layers(model: nn.Module, names: Sequence[str]) -> None:
    """Raises the UserError, with the nearest name, of a layer that the model does not have."""
    known = [name for name, _ in model.named_modules() if name]
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0)
            raise UserError(f'layer {name!r} does not exist in model {_name(model)}; did you mean {near[0]}?')


def layer_maps(model: nn.Module, images: torch.Tensor, names: Sequence[str]) -> dict[str, torch.Tensor]:
    """The outputs of layers, by their names, as maps [B, C, H, W]; tokens are laid on their grid, without prefix ones.

    Raises:
        UserError: no such layer, or its output is no map; NotSeen, where it is one of `default_layers`.
    """
    check_layers(model, names)
    modules = dict(model.named_modules())
    outputs = {}
    handles = [modules[name].register_forward_hook(lambda _, __, result, name=name: outputs.update({name: result}))
               for name in dict.fromkeys(names)]
    with _evaluating(model), _hooks(*handles):
        model(images)
    return {name: _as_map(model, outputs.get(name), images, name) for name in names}


def _as_map(model: nn.Module, output: Any, images: torch.Tensor, name: str) -> torch.Tensor:
    if not isinstance(output, torch.Tensor) or output.ndim not in (3, 4):
        shape = list(output.shape) if isinstance(output, torch.Tensor) else type(output).__name__
        raise _no_map(model, name, f'gives no map of the image but {shape}')
    if len(output) != len(images):
        raise _no_map(model, name, f'gives {len(output)} windows of {len(images)} images, and no map of each')
    if output.ndim == 4:
        return output.permute(0, 3, 1, 2) if _has_channels_last(model, output, images) else output
    H, W, prefix = _grid_of(model, output.shape[1], (images.shape[-2], images.shape[-1]))
    return output[:, prefix:].transpose(1, 2).unflatten(2, (H, W))  # [B, C, H, W]


def _no_map(model: nn.Module, name: str, reason: str) -> UserError:
    """The error of a layer that cannot be shown: NotSeen where nobody need have named it."""
    reason = f'layer {name!r} of model {_name(model)} {reason}'
    defaults = default_layers(model) if getattr(model, 'feature_info', None) else []
    if name in defaults:
        return NotSeen(f'{reason}; name other layers (--layers)')
    return UserError(f'{reason}; name another' + (f', such as {defaults[-1]}' if defaults else ''))


def _has_channels_last(model: nn.Module, output: torch.Tensor, images: torch.Tensor) -> bool:
    """Whether maps are [B, H, W, C]: one model can have both, and the grid is what has the shape of the image.

    Where both do, as in [B, 28, 28, 28], it is what timm says of the model's features.
    """
    def strangeness(H, W):
        return abs(math.log(H / W) - math.log(images.shape[-2] / images.shape[-1]))

    last, first = strangeness(*output.shape[1:3]), strangeness(*output.shape[2:])
    return last < first or (last == first and getattr(model, 'output_fmt', '') == 'NHWC')


def _grid_of(model: nn.Module, num_tokens: int, img_size: Grid) -> tuple[int, int, int]:
    """Rows, columns and prefix tokens of N tokens: a grid known of T2T-ViT, else that nearest to the image's shape."""
    prefixes = (_num_prefix_tokens(model), 0)
    if has_soft_splits(model):
        for H, W in _soft_split_grids(img_size):
            for prefix in prefixes:
                if num_tokens == prefix + H * W:
                    return H, W, prefix
    candidates = [(H, (num_tokens - prefix) // H, prefix) for prefix in prefixes
                  for H in range(1, num_tokens - prefix + 1) if (num_tokens - prefix) % H == 0]
    shape = math.log(img_size[0] / img_size[1])
    return min(candidates, key=lambda grid: abs(math.log(grid[0] / grid[1]) - shape))


class ChannelHealth(NamedTuple):
    """Which channels of a layer say nothing: bool [C] each; no channel is both. See `channel_health`."""
    dead: torch.Tensor
    saturated: torch.Tensor


def channel_health(maps: torch.Tensor) -> ChannelHealth:
    """Find the channels that are the same everywhere, and those that are too large everywhere.

    The paper (section 1, Figure 2) calls feature maps invalid that have zero or too large values, and puts no number
    on it. Here, over all images and positions of maps [B, C, H, W]:

    - A channel is *dead* if its range, largest minus smallest value, is at most 1 % of the layer's typical range, the
      75th percentile of its channels' ranges. Zero everywhere is dead, and so is any other constant. Of a single value
      (one image, one position) nothing is known, and no channel is called dead.
    - A channel is *saturated* if more than half of its values are more than 10 times the layer's typical size, the
      median over its channels that are not dead of their root mean square. (A few large values at some places, as Sun
      et al. 2024 found in many transformers, do not saturate a channel by this measure.) One that is constant and this
      large counts as saturated.

    Percentiles, so that neither many dead channels nor a few huge ones move the measure itself. A healthy channel may
    look dead where the images are all alike: judge by more than one.
    """
    values = maps.float().transpose(0, 1).flatten(1)  # [C, B · H · W]
    ranges = values.amax(1) - values.amin(1)
    # Not torch.quantile, which interpolates: with few channels, between a dead and a living one.
    typical_range = ranges.sort().values[math.ceil(0.75 * (len(ranges) - 1))]
    dead = (ranges <= 0.01 * typical_range) & (values.shape[1] > 1)
    sizes = values.square().mean(1).sqrt()
    typical_size = sizes[~dead].median() if not dead.all() else sizes.median()
    # Counted, for torch has no median along a dimension on a GPU under --deterministic.
    saturated = (values.abs() > 10 * typical_size).sum(1) > values.shape[1] / 2
    return ChannelHealth(dead & ~saturated, saturated)


class LayerFeatures(NamedTuple):
    """What a layer makes of images: `maps` [B, C, H, W], and which of its channels say nothing of any of them."""
    layer: str
    maps: torch.Tensor
    health: ChannelHealth


def layer_features(model: nn.Module, images: torch.Tensor, names: Sequence[str] | None = None) -> list[LayerFeatures]:
    """The maps of layers, an early, a middle and a late one if none are named, with the health of their channels.

    Args and errors as `layer_maps` and `default_layers`.
    """
    maps = layer_maps(model, images, names or default_layers(model))
    return [LayerFeatures(name, values.float().cpu(), channel_health(values)) for name, values in maps.items()]
