"""Open the teacher of a distillation: any trained model, with its own input and classes.

    check_teacher(args)                                              # before data is scanned
    teacher = open_teacher(args, classes, num_classes, world)        # None if the options name no teacher
"""
import contextlib
import logging
import re

import timm
import torch

from models.factory import TrainedModel, open_trained_model, resolve_name
from options.checks import check_distillation, has_teacher
from options.parser import Options, create_parser
from options.scripts import FROM_CHECKPOINT, TRAINED_MODEL
from utils.distributed import World, one_per_machine_first
from utils.errors import UserError
from utils.weight_sources import kind_of_address

_logger = logging.getLogger(__name__)


def check_teacher(args) -> None:
    """Raise the UserError of options that do not go together, or of a teacher that does not exist.

    Addresses are left to `open_teacher`.
    """
    check_distillation(args)
    if not args.teacher or kind_of_address(args.teacher):
        return
    with _blaming_the_teacher():
        name = resolve_name(args.teacher)
    config = timm.get_pretrained_cfg(name)
    if not args.teacher_checkpoint and not (config and config.has_weights):
        raise UserError(f'--teacher {args.teacher}: no weights of it were published; give --teacher-checkpoint PATH')


def open_teacher(args, classes: list[str], num_classes: int, world: World) -> TrainedModel | None:
    """Return the teacher that the options name, in evaluation mode on the CPU, or None.

    Its options and its checkpoint alone decide what it is, never the student's --gp, --drop or --mean. No random number
    of the student's is used up. The first process of a machine downloads what is missing.

    Args:
        classes: names of the data set's classes.
        num_classes: outputs of the student's classifier.
    Raises:
        UserError: as open_trained_model, or the teacher tells other classes apart; its features may be those of any.
    """
    if not has_teacher(args):
        return None
    defaults = vars(create_parser('', TRAINED_MODEL, FROM_CHECKPOINT).parse_args([]))
    own = Options(**{**defaults, 'model': args.teacher, 'eval_checkpoint': args.teacher_checkpoint,
                     'pretrained': not args.teacher_checkpoint, 'img_size': args.teacher_img_size})
    gives_features = args.distill == 'feature'
    _logger.info('the teacher is %s', args.teacher_checkpoint or args.teacher)
    with one_per_machine_first(world), torch.random.fork_rng(devices=()), _blaming_the_teacher():
        teacher = open_trained_model(own, needs_classifier=not gives_features)
    if not gives_features:
        _check_classes(args, teacher, classes, num_classes)
    return teacher


def _check_classes(args, teacher: TrainedModel, classes: list[str], num_classes: int) -> None:
    name = args.teacher_checkpoint or args.teacher
    remedy = 'give a teacher of these classes, or learn from its features alone: --distill feature'
    if teacher.model.num_classes != num_classes:
        raise UserError(f'teacher {name}: it has {teacher.model.num_classes} classes, the model {num_classes}; '
                        f'{remedy}')
    if teacher.classes is None:
        if len(classes) == num_classes:
            return
        raise UserError(f'teacher {name}: its {num_classes} classes have no names, and the data set has '
                        f'{len(classes)}: nothing says which is which; {remedy}')
    if list(teacher.classes) == list(classes):
        return
    number = next((n for n, pair in enumerate(zip(teacher.classes, classes, strict=False)) if pair[0] != pair[1]), None)
    difference = f'names {len(teacher.classes)} classes, the data set {len(classes)}' if number is None else (
        f'class {number} is {teacher.classes[number]!r}, in the data set it is {classes[number]!r}')
    raise UserError(f'teacher {name}: {difference}; {remedy}')


@contextlib.contextmanager
def _blaming_the_teacher():
    """Say of a UserError in this block that the teacher is meant, by the names of its options."""
    try:
        yield
    except UserError as error:
        text = re.sub(r'--(model|checkpoint|initial-checkpoint)(?![\w-])',
                      lambda option: '--teacher' if option[1] == 'model' else '--teacher-checkpoint', str(error))
        raise UserError(f'teacher: {text}') from error
