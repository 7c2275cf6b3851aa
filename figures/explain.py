"""Compute what a model attends to, what its tokens have seen of the image, and which of its channels are dead.

    weights = attention_weights(model, images)                # of every block [B, h, N, N]
    rollout = attention_rollout([w.mean(1) for w in weights])  # through all blocks [B, N, N]
    reasons = class_relevance(model, image, classes=[281])     # what speaks for a class

Models run unchanged: hooks observe them, or the values are recomputed. Nothing here draws.

Dimensions: B images, h heads, N tokens, C channels, D token dimension, m random features, H × W grid.
"""
import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from figures.places import Grid, NotSeen, Places, has_soft_splits, model_name, split_places, token_places
from models.tokens_to_token import SOFT_SPLITS, TokenPerformer, TokenTransformer, without_autocast
from utils.errors import UserError, did_you_mean

# --- Attention of the backbone ----------------------------------------------------------------------------------------

class BlockAttention(NamedTuple):
    """Attention that a block has computed: queries, keys, values and outputs, [B, h, N, C / h] each."""
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    output: torch.Tensor
    bias: torch.Tensor | None  # added to the scores
    scale: float

    def weights(self) -> torch.Tensor:
        """Return the attention weights, [B, h, N, N], float32; rows sum to 1."""
        with torch.no_grad(), torch.autocast(self.query.device.type, enabled=False):
            scores = self.query.float() @ self.key.float().transpose(-2, -1) * self.scale
            return (scores if self.bias is None else scores + self.bias).softmax(-1)


class _AttentionListener(TorchFunctionMode):
    """Pass every fused attention to `heard`: its output, then its arguments."""

    def __init__(self, heard):
        super().__init__()
        self._heard = heard

    def __torch_function__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        if func is F.scaled_dot_product_attention:
            self._heard(output, *args, **(kwargs or {}))
        return output


@contextlib.contextmanager
def _evaluating(model: nn.Module, *hooks: RemovableHandle, gradients: bool = False) -> Iterator[None]:
    """Run the model in evaluation mode, without mixed precision, by default without gradients; remove the hooks."""
    was_training = model.training
    device_type = next((parameter.device.type for parameter in model.parameters()), 'cpu')
    model.eval()
    try:
        with torch.set_grad_enabled(gradients), without_autocast(device_type):
            yield
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()


def _attend(model: nn.Module, images: torch.Tensor, num_tokens: int, *,
            gradients: bool = False) -> tuple[torch.Tensor, list[BlockAttention]]:
    """Return the model's output and the attention of every block over all tokens, or raise NotSeen."""
    name = model_name(model)
    attentions: dict[int, BlockAttention] = {}
    current = None

    def enter(index):
        nonlocal current
        current = index

    def heard(output, query, key, value, attn_mask=None, dropout_p=0., is_causal=False, scale=None, enable_gqa=False):
        if current is None:
            return
        whole = query.shape[-2] == key.shape[-2] == num_tokens and query.shape[-3] == key.shape[-3]
        masked = is_causal or (attn_mask is not None and attn_mask.dtype == torch.bool)
        if current in attentions or masked or not whole:
            raise NotSeen(f'model {name}: block {current + 1} does not attend once over all tokens; its attention '
                          'cannot be shown')
        attentions[current] = BlockAttention(query, key, value, output, attn_mask, scale or query.shape[-1] ** -0.5)

    hooks = []
    for index, block in enumerate(model.get_submodule('blocks').children()):
        hooks.append(block.register_forward_pre_hook(lambda *_, index=index: enter(index)))
        hooks.append(block.register_forward_hook(lambda *_: enter(None)))
    with _evaluating(model, *hooks, gradients=gradients), _AttentionListener(heard):
        output = model(images)
    if not attentions:
        raise NotSeen(f'model {name} has no attention that can be shown')
    return output, list(attentions.values())


def attention_weights(model: nn.Module, images: torch.Tensor) -> list[torch.Tensor]:
    """Return the attention weights of every block with attention, first block first.

    The weights are [B, h, N, N], float32, with rows that sum to 1. Prefix tokens (class token, registers) come first,
    the grid follows row by row.

    Args:
        model: T2TViT, its ablations or timm's VisionTransformer family: a model with `blocks` that each call torch's
            scaled_dot_product_attention once, over all tokens.
        images: normalised, [B, C, height, width].

    Raises:
        NotSeen: the model has no such attention.
    """
    num_tokens = _num_prefix_tokens(model) + math.prod(token_places(model, images).grid)
    return [attention.weights() for attention in _attend(model, images, num_tokens)[1]]


def attention_rollout(averages: Sequence[torch.Tensor], tokens: Sequence[int] | None = None) -> torch.Tensor:
    """Return the attention rollout (Abnar and Zuidema 2020, section 3) of output tokens, [B, len(tokens), N].

    Each block passes on one half of a token itself (the residual) and one half of what it attends to. The rollout is
    the product over all blocks, the share of each input token in an output token; rows sum to 1.

    Args:
        averages: weights of each block averaged over the heads, [B, N, N], first block first.
        tokens: output tokens, all by default; a few cost only products of matrix and vector.
    """
    B, N, _ = averages[0].shape
    rows = torch.eye(N, device=averages[0].device, dtype=averages[0].dtype)
    rows = (rows if tokens is None else rows[list(tokens)]).expand(B, -1, -1)  # [B, len(tokens), N]
    for average in reversed(averages):
        rows = (rows + rows @ average) / 2
    return rows


class SeenAttention(NamedTuple):
    """Attention of the classifier's input in one image, as maps over the grid of tokens."""
    blocks: torch.Tensor  # weights of each block and head, [depth, h, H, W]
    rollout: torch.Tensor  # through all blocks, [H, W]
    source: str  # 'class token', 'mean of all tokens', or 'all tokens, on average' for another pooling
    places: Places  # of the tokens in the image


def classifier_attention(model: nn.Module, image: torch.Tensor) -> SeenAttention:
    """Return the attention of the class token over the grid of one image [1, C, height, width].

    If the classifier does not use the class token, return the mean over all tokens. Raises as `attention_weights`.
    """
    places = token_places(model, image)
    prefix, rows, source = _classifier_input(model)
    blocks, averages = [], []
    for attention in _attend(model, image, prefix + math.prod(places.grid))[1]:
        weights = attention.weights()  # one block at a time, since large images have many
        blocks.append(weights[0, :, rows, prefix:].mean(1).cpu())  # [h, N - prefix]
        averages.append(weights.mean(1).cpu())  # [1, N, N]
    N = averages[0].shape[-1]
    rollout = attention_rollout(averages, range(N)[rows]).mean(1)[0, prefix:]  # [N - prefix]
    return SeenAttention(torch.stack(blocks).unflatten(2, places.grid), rollout.unflatten(0, places.grid), source,
                         places)


class ClassRelevance(NamedTuple):
    """How much each token of an image speaks for a class."""
    number: int  # of the class
    probability: float
    tokens: torch.Tensor  # 0 or more, [H, W]; 0 everywhere if nothing speaks for the class


def class_relevance(model: nn.Module, image: torch.Tensor,
                    classes: Sequence[int] | None = None) -> list[ClassRelevance]:
    """Return how much each token of one image speaks for each of some classes.

    This is the rollout of Chefer et al. 2021 (Generic Attention-model Explainability, section 3.1) for self-attention:
    in each block, every weight is multiplied by the gradient of the class's logit with respect to it; the positive
    parts, averaged over the heads, are added to the residual.

    Args:
        model: as for `attention_weights`; its output is logits [1, number of classes].
        image: normalised, [1, C, height, width].
        classes: numbers of the classes, by default of the two most probable ones.

    Raises:
        UserError: no such class; NotSeen if the model has no attention that can be shown.
    """
    grid = token_places(model, image).grid
    prefix, rows, _ = _classifier_input(model)
    N = prefix + math.prod(grid)
    image = image.detach().clone().requires_grad_()  # so that gradients reach the blocks if no parameter wants them
    logits, attentions = _attend(model, image, N, gradients=True)
    probabilities = logits.detach().float().softmax(1)[0]
    if classes is None:
        classes = probabilities.topk(min(2, len(probabilities))).indices.tolist()
    for number in classes:
        if not 0 <= number < len(probabilities):
            raise UserError(f'class {number} does not exist; the model has classes 0 to {len(probabilities) - 1}')
    shares = torch.eye(N, device=image.device)[rows].mean(0)  # of the tokens that the classifier sees, [N]
    found = []
    for number in classes:
        chosen = torch.zeros_like(logits)
        chosen[0, number] = 1
        gradients = torch.autograd.grad(logits, [attention.output for attention in attentions], chosen,
                                        retain_graph=True, materialize_grads=True)
        relevance = shares
        for attention, gradient in zip(reversed(attentions), reversed(gradients), strict=True):
            of_weights = gradient.float() @ attention.value.detach().float().transpose(-2, -1)  # [1, h, N, N]
            relevance = relevance + relevance @ (attention.weights() * of_weights).clamp(min=0).mean(1)[0]
        found.append(ClassRelevance(number, float(probabilities[number]),
                                    (relevance - shares)[prefix:].cpu().unflatten(0, grid)))
    return found


def _classifier_input(model: nn.Module) -> tuple[int, slice, str]:
    """Return the number of prefix tokens, the tokens whose outputs the classifier takes, and their name."""
    prefix = _num_prefix_tokens(model)
    pooling = getattr(model, 'global_pool', 'token')
    if prefix > 0 and pooling == 'token':
        return prefix, slice(0, 1), 'class token'
    return prefix, slice(prefix, None), 'mean of all tokens' if pooling == 'avg' else 'all tokens, on average'


def _num_prefix_tokens(model: nn.Module) -> int:
    return getattr(model, 'num_prefix_tokens', 0)


# --- Token layers -----------------------------------------------------------------------------------------------------

class PerformerWeights:
    """Implied weights of a Performer token layer, A_ij = φ(q_i)·φ(k_j) / (φ(q_i)·Σφ(k) + eps), in float64.

    performer_attention(k, q, v, w) equals A v, but the layer never computes A.

    The sums of the rows are `sums` [B, N]: 1, or less for long q or k, whose features are not large compared to eps. A
    token with a sum near 0 attends to nothing, so the layer passes on v only.

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
        """Return the weights of chosen query tokens, [B, len(queries), N]."""
        return self._q[:, list(queries)] @ self._k.transpose(1, 2)

    def spread(self, relevance: torch.Tensor) -> torch.Tensor:
        """Map the relevance of the outputs [B, N] to that of the inputs, relevance · A [B, N], in linear time."""
        relevance = relevance.double().unsqueeze(1) @ self._q  # [B, 1, m]
        return (relevance @ self._k.transpose(1, 2)).squeeze(1)


class SoftmaxWeights:
    """Weights of a Transformer token layer, softmax(scale · q kᵀ) for k, q [B, N, D], in float64; all `sums` are 1."""

    def __init__(self, k: torch.Tensor, q: torch.Tensor, scale: float):
        self._k, self._q = k.double(), q.double() * scale
        self.sums = torch.ones_like(self._k[..., 0])

    def rows(self, queries: Sequence[int]) -> torch.Tensor:
        """Return the weights of chosen query tokens, [B, len(queries), N]."""
        return (self._q[:, list(queries)] @ self._k.transpose(1, 2)).softmax(-1)

    def spread(self, relevance: torch.Tensor) -> torch.Tensor:
        """Map the relevance of the outputs [B, N] to that of the inputs, relevance · A [B, N], by blocks of rows."""
        N = relevance.shape[1]
        out = torch.zeros_like(relevance, dtype=torch.float64)
        for start in range(0, N, 512):  # all of A would take 32 GiB at 1024 pixels
            queries = range(start, min(start + 512, N))
            out += (relevance[:, queries].double().unsqueeze(1) @ self.rows(queries)).squeeze(1)
        return out


class Stage(NamedTuple):
    """Output of one of the three stages of a tokens-to-token module."""
    tokens: torch.Tensor  # re-structurized, [B, channels, H, W]
    weights: PerformerWeights | SoftmaxWeights | None  # of the token layer; None after the last split or a convolution
    places: Places  # of the tokens in the image

    @property
    def grid(self) -> Grid:
        return self.places.grid


def token_stages(model: nn.Module, images: torch.Tensor) -> list[Stage]:
    """Return the stages of the tokens-to-token module at 1/4, 1/8 and 1/16 of the image size, or raise NotSeen.

    `images` are normalised, [B, C, height, width].
    """
    if not has_soft_splits(model):
        raise NotSeen(f'model {model_name(model)} has no tokens-to-token module; use a T2T-ViT')
    module = model.get_submodule('tokens_to_token')
    convolutions = not hasattr(module, 'attention1')
    names = ('soft_split0', 'soft_split1') if convolutions else ('attention1', 'attention2')
    steps = [module.get_submodule(name) for name in (*names, 'project')]
    inputs, outputs = {}, {}

    def heard(step, given, result):
        inputs[step], outputs[step] = given[0], result

    with _evaluating(model, *(step.register_forward_hook(heard) for step in steps)):
        module(images)
        stages = []
        for step, places in zip(steps, split_places((images.shape[-2], images.shape[-1])), strict=True):
            tokens = outputs[step].float()
            if not convolutions:
                tokens = tokens.transpose(1, 2).unflatten(2, places.grid)  # [B, channels, H, W]
            stages.append(Stage(tokens, _layer_weights(step, inputs[step]), places))
    return stages


def _layer_weights(layer: nn.Module, x: torch.Tensor) -> PerformerWeights | SoftmaxWeights | None:
    """Return the weights of a token layer for its input [B, C, H, W]; None for any other layer."""
    if not isinstance(layer, TokenPerformer | TokenTransformer):
        return None
    k, q, _ = layer.keys_queries_values(x)
    if isinstance(layer, TokenPerformer):
        return PerformerWeights(k, q, layer.w)
    return SoftmaxWeights(k, q, layer.attn.scale)


# --- From a token of the last grid back to the pixels -----------------------------------------------------------------

def receptive_field(token: Grid, img_size: Grid, splits: int = 3) -> torch.Tensor:
    """Return the number of paths from each pixel to a token of the last grid through the soft splits alone.

    With the token layers, which are global, a token sees the whole image; see `pixel_relevance`.

    Args:
        token: (row, column) on the last grid; IndexError if it does not exist.
        img_size: (height, width) of the image in pixels.
        splits: soft splits to go back: 3 to the pixels, 2 to the grid of 1/4, 1 to the grid of 1/8.

    Returns:
        int64 [height, width] of the pixels or of that grid; 0 outside of the receptive field.
    """
    sizes = [img_size, *(places.grid for places in split_places(img_size))]
    paths = torch.zeros(sizes[-1], dtype=torch.float64)
    paths[token] = 1
    for split, size in list(zip(SOFT_SPLITS, sizes, strict=False))[:-splits - 1:-1]:
        paths = _through_windows(paths[None], size, split)[0]
    return paths.long()


def pixel_relevance(stages: Sequence[Stage], token: Grid, img_size: Grid) -> torch.Tensor:
    """Return the share of each pixel in a token of the last grid, [B, height, width]: the rollout of this module.

    A soft split takes equal parts of its patch. A token layer takes, as in `attention_rollout`, one half of the token
    itself (the residual) and one half of what it attends to, less if its weights sum to less than 1. The shares of all
    pixels sum to 1.

    Args:
        stages: as returned by `token_stages` for B images of img_size.
        token: (row, column) on the last grid.
        img_size: (height, width) of the images in pixels.
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
        places = inside.sum(1).view(1, *relevance.shape[1:])  # of each patch inside the map
        relevance = _through_windows(relevance / places, sizes[index], SOFT_SPLITS[index])
    return relevance.float()


def _through_windows(values: torch.Tensor, size: Grid, split: tuple[int, int, int]) -> torch.Tensor:
    """Add the value of each token [B, H, W] to every place of its patch in a map [B, *size]."""
    kernel, stride, padding = split
    columns = values.flatten(1).unsqueeze(1).expand(-1, kernel ** 2, -1)  # [B, kernel², N]
    return F.fold(columns, size, kernel, stride=stride, padding=padding).squeeze(1)


# --- Channels ---------------------------------------------------------------------------------------------------------

def default_layers(model: nn.Module) -> list[str]:
    """Return the names of an early, a middle and a late layer from timm's `feature_info`, or raise NotSeen."""
    modules = [info['module'] for info in getattr(model, 'feature_info', None) or ()]
    if not modules:
        raise NotSeen(f'model {model_name(model)} does not list its layers; name some (--layers), of '
                      f'{", ".join(name for name, _ in model.named_children())} and their parts')
    # In a T2T-ViT, lines and edges are found before the backbone (section 3, Figure 2).
    early = 'tokens_to_token.attention1' if has_soft_splits(model) else modules[0]
    if has_soft_splits(model) and not hasattr(model.tokens_to_token, 'attention1'):
        early = 'tokens_to_token.soft_split0'
    return list(dict.fromkeys((early, modules[len(modules) // 2], modules[-1])))


def check_layers(model: nn.Module, names: Sequence[str]) -> None:
    """Raise UserError, with the nearest name, for a layer that the model does not have."""
    known = [name for name, _ in model.named_modules() if name]
    for name in names:
        if name not in known:
            hint = did_you_mean(name, known) or f'; use {known[0]} or another name from model.named_modules()'
            raise UserError(f'layer {name!r} does not exist in model {model_name(model)}{hint}')


def layer_maps(model: nn.Module, images: torch.Tensor, names: Sequence[str]) -> dict[str, torch.Tensor]:
    """Return the outputs of layers by name as maps [B, C, H, W]; tokens are reshaped to their grid, without prefix.

    Raises:
        UserError: no such layer, or its output is not a map; NotSeen if it is one of `default_layers`.
    """
    check_layers(model, names)
    modules = dict(model.named_modules())
    outputs = {}
    hooks = [modules[name].register_forward_hook(lambda _, __, result, name=name: outputs.update({name: result}))
             for name in dict.fromkeys(names)]
    with _evaluating(model, *hooks):
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
    """Return the error for a layer that cannot be shown: NotSeen if it is a default one, else UserError."""
    reason = f'layer {name!r} of model {model_name(model)} {reason}'
    defaults = default_layers(model) if getattr(model, 'feature_info', None) else []
    if name in defaults:
        return NotSeen(f'{reason}; name other layers (--layers)')
    return UserError(f'{reason}; name another' + (f', such as {defaults[-1]}' if defaults else ''))


def _has_channels_last(model: nn.Module, output: torch.Tensor, images: torch.Tensor) -> bool:
    """Return whether maps are [B, H, W, C] instead of [B, C, H, W], by comparing both grids with the image's shape.

    A model can have both kinds. If both grids fit, as in [B, 28, 28, 28], timm's `output_fmt` decides.
    """
    def distortion(H, W):
        return abs(math.log(H / W) - math.log(images.shape[-2] / images.shape[-1]))

    last, first = distortion(*output.shape[1:3]), distortion(*output.shape[2:])
    return last < first or (last == first and getattr(model, 'output_fmt', '') == 'NHWC')


def _grid_of(model: nn.Module, num_tokens: int, img_size: Grid) -> tuple[int, int, int]:
    """Return (rows, columns, prefix tokens) of N tokens: a grid of T2T-ViT, else the one closest to the image's."""
    prefixes = (_num_prefix_tokens(model), 0)
    if has_soft_splits(model):
        for H, W in (places.grid for places in split_places(img_size)):
            for prefix in prefixes:
                if num_tokens == prefix + H * W:
                    return H, W, prefix
    candidates = [(H, (num_tokens - prefix) // H, prefix) for prefix in prefixes
                  for H in range(1, num_tokens - prefix + 1) if (num_tokens - prefix) % H == 0]
    shape = math.log(img_size[0] / img_size[1])
    return min(candidates, key=lambda grid: abs(math.log(grid[0] / grid[1]) - shape))


class ChannelHealth(NamedTuple):
    """Dead and saturated channels of a layer, bool [C] each, as found by `channel_health`; no channel is both."""
    dead: torch.Tensor
    saturated: torch.Tensor


def channel_health(maps: torch.Tensor) -> ChannelHealth:
    """Find the channels of maps [B, C, H, W] that are constant (dead) or too large (saturated) everywhere.

    The paper (section 1, Figure 2) calls feature maps with zero or too large values invalid, without a threshold. Here:

    - A channel is *dead* if its range over all images and positions is at most 1 % of the layer's typical range, the
      75th percentile over the channels. With a single value per channel, none is called dead.
    - A channel is *saturated* if more than half of its values exceed 10 times the layer's typical size, the median
      over channels that are not dead of their root mean square. A few large values (Sun et al. 2024) do not count.

    Percentiles are robust against many dead and a few huge channels. Use several images: a healthy channel may look
    dead in one.
    """
    values = maps.float().transpose(0, 1).flatten(1)  # [C, B · H · W]
    ranges = values.amax(1) - values.amin(1)
    # Not torch.quantile, which would interpolate between a dead and another channel.
    typical_range = ranges.sort().values[math.ceil(0.75 * (len(ranges) - 1))]
    dead = (ranges <= 0.01 * typical_range) & (values.shape[1] > 1)
    sizes = values.square().mean(1).sqrt()
    typical_size = sizes[~dead].median() if not dead.all() else sizes.median()
    # Counted, since torch has no median along a dimension on a GPU under --deterministic.
    saturated = (values.abs() > 10 * typical_size).sum(1) > values.shape[1] / 2
    return ChannelHealth(dead & ~saturated, saturated)


class LayerFeatures(NamedTuple):
    """Output of a layer for a batch of images."""
    layer: str
    maps: torch.Tensor  # [B, C, H, W]
    health: ChannelHealth


def layer_features(model: nn.Module, images: torch.Tensor, names: Sequence[str] | None = None) -> list[LayerFeatures]:
    """Return the maps and the channel health of layers, by default of `default_layers`; raise as `layer_maps`."""
    maps = layer_maps(model, images, names or default_layers(model))
    return [LayerFeatures(name, values.float().cpu(), channel_health(values)) for name, values in maps.items()]
