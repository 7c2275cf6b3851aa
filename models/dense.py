"""A classifier's logits at every position of its last feature map, for token labels.

    logits = dense_logits(model, images)      # [B, classes, H, W]

Each position is handed to the model's own head as if it were the whole map, so that what the head has beside its linear
layer (a norm, a 1 × 1 convolution) is applied too.
"""

import torch
from timm.layers import AttentionPool2d, AttentionPoolLatent, RotAttentionPool2d
from torch import nn

from utils.errors import UserError
from utils.timm_model import TimmModel

# Heads that weigh the positions against one another: they say nothing about one of them.
ATTENTION_POOLS = (AttentionPool2d, AttentionPoolLatent, RotAttentionPool2d)


def dense_logits(model: TimmModel, images: torch.Tensor) -> torch.Tensor:
    """Return the logits [B, classes, H, W] of images [B, 3, height, width] at each position of the last feature map.

    Of a vision transformer these are its tokens without the class token. A model trained by token labeling has a
    classifier for them, its auxiliary head.

    Raises:
        UserError: the features are no map of positions, or the head cannot be applied to one of them.
    """
    features = model.forward_features(images)
    count = len(images)
    if not isinstance(features, torch.Tensor) or features.ndim not in (3, 4):
        found = f'{features.ndim} dimensions' if isinstance(features, torch.Tensor) else type(features).__name__
        raise _no_map(model, f'its features are no map ({found})')
    if features.ndim == 3:
        return _of_tokens(model, features, images.shape[-2:])
    if getattr(model, 'output_fmt', 'NCHW') == 'NHWC':
        height, width, channels = features.shape[1:]
        positions = features.reshape(-1, 1, 1, channels)  # [B · H · W, 1, 1, C]
    else:
        channels, height, width = features.shape[1:]
        positions = features.permute(0, 2, 3, 1).reshape(-1, channels, 1, 1)
    logits = _logits(model, positions)
    return logits.reshape(count, height, width, -1).permute(0, 3, 1, 2)


def _of_tokens(model: TimmModel, tokens: torch.Tensor, size: tuple[int, ...]) -> torch.Tensor:
    """Return the logits [B, classes, H, W] of tokens [B, prefix + H · W, C] of images of `size`."""
    prefix = getattr(model, 'num_prefix_tokens', int(hasattr(model, 'cls_token')))
    tokens = tokens[:, prefix:]
    count, places, channels = tokens.shape
    height = round((places * size[0] / size[1]) ** 0.5)
    if not height or places % height:
        raise _no_map(model, f'{places} tokens are no grid over {size[0]} × {size[1]} pixels')
    aux_head = getattr(model, 'aux_head', None)
    if isinstance(aux_head, nn.Linear):
        logits = aux_head(tokens)
    else:
        # A sequence of nothing but this token: the head may take the class token, or the mean of the others.
        logits = _logits(model, tokens.reshape(-1, 1, channels).expand(-1, prefix + 1, -1))
    return logits.reshape(count, height, places // height, -1).permute(0, 3, 1, 2)


def _logits(model: TimmModel, positions: torch.Tensor) -> torch.Tensor:
    logits = model.forward_head(positions)
    expected = (len(positions), model.num_classes)
    if not isinstance(logits, torch.Tensor) or logits.shape != expected:
        found = list(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
        raise _no_map(model, f'its head gives {found} for {len(positions)} positions')
    return logits


@torch.no_grad()
def check_dense(model: TimmModel, img_size: tuple[int, int]) -> tuple[int, int]:
    """Return the grid (H, W) of `dense_logits` for images of `img_size`, tried on a black one.

    Raises:
        UserError: the model, in evaluation mode, has no logits at each position.
    """
    if pool := next((part for part in model.modules() if isinstance(part, ATTENTION_POOLS)), None):
        raise _no_map(model, f'it pools by attention ({type(pool).__name__}), which needs all positions at once')
    try:
        logits = dense_logits(model, torch.zeros(1, 3, *img_size))
    except UserError:
        raise
    except Exception as error:  # a head may fail in any way at a map of one position
        raise _no_map(model, (str(error).splitlines() or [type(error).__name__])[0][:160]) from error
    return logits.shape[2], logits.shape[3]


def _no_map(model: nn.Module, reason: str) -> UserError:
    return UserError(f'the teacher, a {type(model).__name__}, cannot classify each position: {reason}; take a CNN with '
                     'average pooling, or a vision transformer')
