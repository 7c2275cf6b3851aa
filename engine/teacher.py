"""The teacher of a distillation: a frozen model, which says of each training image what its student learns from it.

    teacher = create_teacher(args, model, opened, inputs.for_teacher, precision, world)
    targets = targets, teacher(images)          # as engine.objective.Distillation takes them

It answers outside of the student's forward pass, so neither DDP nor the compiled student knows of it.
"""
import logging
from collections.abc import Callable

import torch
from torch import nn

from engine.compile import compile_model, has_blocks
from utils.distributed import World, broadcast_from_main
from utils.fingerprint import fingerprint_of
from utils.runtime import Precision, move_model
from utils.timm_model import TimmModel

_logger = logging.getLogger(__name__)


class LogitsAndFeatures(nn.Module):
    """A model that returns its logits [B, classes] and its pooled features [B, F], from one pass."""

    def __init__(self, model: TimmModel):
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features = self.model.forward_features(images)
        return self.model.forward_head(features), self.model.forward_head(features, pre_logits=True)


class Teacher:
    """A frozen model. It is no module, so that nothing trains, averages or saves it by accident.

    Args:
        model: on the device, in evaluation mode.
        kind: 'soft' or 'hard', for which it gives logits, or 'feature', for pooled features.
        readjust: images as the student takes them → as the teacher does.
        precision: of its forward pass.
        projection: maps the student's features to the width of the teacher's; learns with the student.
    Attributes:
        fingerprint: SHA-256 of its weights, in hexadecimal.
    """

    def __init__(self, model: TimmModel, *, kind: str, readjust: Callable[[torch.Tensor], torch.Tensor],
                 precision: Precision, compiled: str = '', projection: nn.Linear | None = None):
        self.kind, self.projection = kind, projection
        self.fingerprint = fingerprint_of(model.state_dict())
        self._called = LogitsAndFeatures(model).eval() if kind == 'feature' else model
        self._readjust, self._precision = readjust, precision
        compile_model(model, 'model' if compiled == 'blocks' and not has_blocks(model) else compiled, self._called)

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Return logits [B, classes] or features [B, F], float32, of images [B, 3, H, W] as the student takes them."""
        images = self._readjust(images)
        with self._precision.autocast():
            answer = self._called(images)
        answer = answer[1] if self.kind == 'feature' else answer
        # A copy, since a CUDA graph writes each answer into the same memory.
        return answer.to(torch.float32, copy=True)


def create_teacher(args, student: TimmModel, opened, readjust: Callable[[torch.Tensor], torch.Tensor] | None,
                   precision: Precision, world: World) -> Teacher | None:
    """Return the teacher of the options on its device, the same on all ranks; None without one.

    Args:
        opened: model, options and classes of the teacher, as models.open_teacher returns them, or None.
        readjust: images as the student takes them → as the teacher does.
    """
    if opened is None:
        return None
    assert readjust is not None, 'the images of a teacher come with it'
    model, kind = opened.model.requires_grad_(False).eval(), args.distill or 'soft'
    move_model(model, world.device, channels_last=args.channels_last)
    broadcast_from_main(model.state_dict().values())
    projection = None
    if kind == 'feature' and (widths := (_width(student), _width(model)))[0] != widths[1]:
        projection = nn.Linear(*widths).to(world.device)
        broadcast_from_main(projection.state_dict().values())
        _logger.info("a projection learns to map the model's %d features to the teacher's %d", *widths)
    return Teacher(model, kind=kind, readjust=readjust, precision=precision, compiled=args.compile,
                   projection=projection)


def _width(model: nn.Module) -> int:
    """Return F, the number of a model's pooled features."""
    width = getattr(model, 'head_hidden_size', None) or model.num_features
    assert isinstance(width, int), 'every model of timm says how many features it has'
    return width


def projection_groups(teacher: Teacher | None, weight_decay: float) -> list[dict]:
    """Return the parameter groups of a teacher's projection, in the form of engine.optimizer.param_groups."""
    if teacher is None or teacher.projection is None:
        return []
    return [{'params': [parameter], 'weight_decay': decay, 'lr_scale': 1.0, 'name': f'projection, {name}'}
            for parameter, decay, name in ((teacher.projection.weight, weight_decay, 'decayed'),
                                           (teacher.projection.bias, 0.0, 'not decayed'))]
