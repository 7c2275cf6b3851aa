"""The layers of a model, from its stem to its classifier: which of them learn, and which are recomputed.

Layers are those of timm's `group_matcher`: the stem is layer 0, each block is one, and the classifier is the last.
"""
import logging
from collections.abc import Iterator

from timm.models import group_parameters
from timm.optim import auto_group_layers
from torch import nn

from utils.console import plural
from utils.errors import UserError
from utils.timm_model import TimmModel

_logger = logging.getLogger(__name__)

BACKBONE = 'backbone'


def classifier_parameters(model: TimmModel) -> set[int]:
    """Return the `id` of each parameter of the classifier, which can have several heads (distilled DeiT)."""
    classifier = model.get_classifier()
    heads = classifier if isinstance(classifier, tuple | list) else (classifier,)
    return {id(parameter) for head in heads for parameter in head.parameters()}


def number_layers(model: TimmModel) -> dict[str, int]:
    """Return the layer of each parameter by its name, as timm's `param_groups_layer_decay` numbers them."""
    if hasattr(model, 'group_matcher'):
        return group_parameters(model, model.group_matcher(coarse=False), reverse=True)
    return auto_group_layers(model)


def prepare_layers(model: TimmModel, args) -> None:
    """Freeze what --freeze names, and recompute activations with --grad-checkpointing.

    Raises:
        UserError: the model has no such block, no numbered blocks, or cannot recompute its activations.
    """
    if args.freeze is not None:
        freeze(model, args.freeze)
    if args.grad_checkpointing:
        try:
            model.set_grad_checkpointing(True)
        except (AttributeError, AssertionError):  # timm asserts what a model supports
            raise UserError(f'--grad-checkpointing: {type(model).__name__} cannot recompute its activations; leave it '
                            'out, or lower --batch-size and raise --accum-steps') from None


def freeze(model: TimmModel, part: str | int) -> None:
    """Let parameters learn no more: all but the classifier's, or those of the stem and of the first blocks.

    Args:
        part: 'backbone', or the number of blocks. The final norm counts as part of the last block.
    Raises:
        UserError: the model does not have so many blocks, or does not number them.
    """
    in_head = classifier_parameters(model)
    layers = number_layers(model)
    blocks = max(layers.values()) - 1
    if part != BACKBONE:
        if not hasattr(model, 'group_matcher'):
            raise UserError(f'--freeze {part}: {type(model).__name__} does not number its blocks; say --freeze '
                            f'{BACKBONE}')
        if int(part) > blocks:
            raise UserError(f'--freeze {part}: the model has {plural(blocks, "block")}; give 0 (its stem alone) to '
                            f'{blocks}, or {BACKBONE}')
    # Some of timm's models do not list all their tokens in the stem.
    of_root = {name for name, _ in model.named_parameters(recurse=False)}
    frozen = total = 0
    for name, parameter in model.named_parameters():
        layer = 0 if name in of_root and layers[name] > blocks else layers[name]
        if id(parameter) not in in_head and (part == BACKBONE or layer <= int(part)):
            parameter.requires_grad_(False)
            frozen += parameter.numel()
        total += parameter.numel()
    _logger.info('%.2f of %.2f M parameters are frozen (--freeze %s)', frozen / 1e6, total / 1e6, part)


def set_training_mode(model: nn.Module) -> None:
    """Bring `model` into training mode, but its frozen parts into evaluation mode.

    So a frozen part maps an image to the same features in every epoch: its batch norms use their running statistics
    and leave them as they are, and it drops nothing. What it drops between frozen modules counts as a part of it.
    """
    model.train()
    for module in _frozen_parts(model):
        module.eval()


def _frozen_parts(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the largest modules inside `module` without a parameter that learns, up to the last that has a frozen one.

    Modules without parameters, such as dropout, are applied in the order in which a model holds them.
    """
    children = [(child, [p.requires_grad for p in child.parameters()]) for child in module.children()]
    last = max((index for index, (_, learns) in enumerate(children) if not all(learns)), default=-1)
    for child, learns in children[:last + 1]:
        if not any(learns):
            yield child
        elif not all(learns):
            yield from _frozen_parts(child)
