"""Create any model by name for the scripts: ours and timm's, with errors that say what to type instead."""
import difflib
import logging
import os
import pickle
import re
from collections.abc import Mapping
from numbers import Real
from pathlib import Path
from typing import Any, NamedTuple, cast

import timm
from timm.models import split_model_name_tag
from torch import nn

from models.weights.formats import recorded_arch, recorded_classes, recorded_img_size, recorded_options
from models.weights.identity import identify
from models.weights.loading import count_classes, load_weights, published_config, state_dict_of
from options.checks import check_trained_model
from options.groups import augmentation_options, batch_norm_options, input_options, model_options
from options.parser import Options, create_parser
from options.recipes import check_values, read_recipe
from options.types import keywords
from utils.checkpoint_reader import read_checkpoint
from utils.errors import UserError
from utils.timm_model import TimmModel

_logger = logging.getLogger(__name__)

# Arguments that some architectures have no use for (a ResNet takes any image size): left out there.
OPTIONAL_ARGUMENTS = ('img_size', 'global_pool', 'drop_rate', 'attn_drop_rate', 'drop_path_rate')


def create_model(
        name: str,
        *,
        pretrained: bool = False,
        num_classes: int | None = None,
        img_size: int | tuple[int, int] | None = None,
        in_chans: int | None = None,
        global_pool: str | None = None,
        drop_rate: float | None = None,
        attn_drop_rate: float | None = None,
        drop_path_rate: float | None = None,
        **kwargs: Any,
) -> TimmModel:
    """Create a model registered with timm and log what was resolved; None leaves a value to the model.

    Args:
        name: registered name, in any case ('T2t_vit_14', as before June 2021, is t2t_vit_14).
        pretrained: download the released weights.
        num_classes: rows of the classifier; 0 for none.
        img_size: pixels, one number or (height, width); not passed to models that take any size.
        in_chans: channels of the images.
        global_pool: pooling before the classifier.
        drop_rate: dropout probability.
        attn_drop_rate: dropout probability of attention weights, where the model has them.
        drop_path_rate: stochastic depth of the last block, where the model has it.
        kwargs: further arguments of the model; unlike the above, they must exist.

    Raises:
        UserError: unknown name, value out of range, or weights that could not be fetched.
    """
    name = resolve_name(name)
    rates: dict[str, Any] = {'drop_rate': drop_rate, 'attn_drop_rate': attn_drop_rate, 'drop_path_rate': drop_path_rate}
    for argument, rate in rates.items():
        if rate is not None and not (isinstance(rate, Real) and 0 <= float(rate) < 1):
            raise UserError(f'{argument} is {rate!r}; give a number from 0 up to, but not including, 1')
    _check_count('num_classes', num_classes, minimum=0)
    _check_count('in_chans', in_chans, minimum=1)
    arguments = {
        'num_classes': num_classes, 'img_size': _checked_img_size(img_size), 'in_chans': in_chans,
        'global_pool': global_pool, **rates, **kwargs,
    }
    arguments = {argument: value for argument, value in arguments.items() if value is not None}
    given = {argument: value for argument, value in kwargs.items() if value is not None}
    try:
        model, left_out = _create(name, pretrained, arguments)
    except UserError:
        raise
    except (TypeError, RuntimeError, ZeroDivisionError) as error:
        if not given:  # what has a name here is checked above, so that this is no mistake of the user
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f'model {name} with {given}: {reason}') from error
    for argument in left_out:
        # Any other argument changes nothing at its default; an image size is a mere hint to such a model.
        level = logging.WARNING if argument != 'img_size' and arguments[argument] else logging.INFO
        _logger.log(level, '%s takes no %s: %r is not used', name, argument, arguments[argument])
    settings = {argument: value for argument, value in arguments.items() if argument not in left_out}
    _logger.info('model %s: %.2f M parameters, %s weights%s', name,
                 sum(parameter.numel() for parameter in model.parameters()) / 1e6,
                 'pretrained' if pretrained else 'random',
                 ''.join(f', {argument} {value!r}' for argument, value in settings.items()))
    return model


def resolve_name(name: str) -> str:
    """Return the registered name for `name` in any case, or raise UserError with the nearest names."""
    registered = {known.lower(): known for known in timm.list_models()}
    architecture, tag = split_model_name_tag(name)
    if architecture.lower() not in registered:
        near = difflib.get_close_matches(architecture.lower(), registered, n=3)
        hint = ' or '.join(registered[match] for match in near) or 'a name that timm.list_models() lists'
        raise UserError(f'model {name!r} does not exist; use {hint}')
    architecture = registered[architecture.lower()]
    if not tag:
        return architecture
    tagged = timm.list_models(f'{architecture}.*', pretrained=True)
    if f'{architecture}.{tag}' not in tagged:
        known = ' or '.join([architecture, *tagged])
        raise UserError(f'model {architecture} has no weights {tag!r}; use {known}')
    return f'{architecture}.{tag}'


def _create(name: str, pretrained: bool, arguments: dict[str, Any]) -> tuple[TimmModel, list[str]]:
    """Create a model, leaving out optional arguments it does not know; return it and the names of those."""
    left_out: list[str] = []
    while True:
        try:
            known = {argument: value for argument, value in arguments.items() if argument not in left_out}
            return cast(TimmModel, timm.create_model(name, pretrained=pretrained, **known)), left_out
        except TypeError as error:
            # timm's entry points take any keyword and hand it down: only trying tells what a model knows.
            refused = re.search(r"unexpected keyword argument '(\w+)'", str(error))
            if refused is None or refused.group(1) not in known:
                raise
            if refused.group(1) not in OPTIONAL_ARGUMENTS:
                raise UserError(f'model {name} takes no argument {refused.group(1)}; leave it out') from error
            left_out.append(refused.group(1))
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            if not pretrained:
                raise
            if 'No pretrained weights exist' in str(error):
                raise UserError(f'no weights of {name} were published; leave --pretrained out, or give a checkpoint '
                                '(--initial-checkpoint)') from error
            reason = f'{type(error).__name__}: {error}'.splitlines()[0][:200]
            raise UserError(
                f'pretrained weights of {name} could not be fetched or do not fit ({reason}); '
                'without a network, download them elsewhere and load the file as a checkpoint') from error
        except (ValueError, AssertionError) as error:  # timm asserts what its models support
            raise UserError(f'model {name}: {error}') from error


def _checked_img_size(img_size: int | tuple[int, int] | None) -> tuple[int, int] | None:
    """Return (height, width), or raise UserError unless given one or two positive whole numbers."""
    if img_size is None:
        return None
    sides = (img_size, img_size) if isinstance(img_size, int) else img_size
    whole = isinstance(sides, (tuple, list)) and all(isinstance(side, int) and side > 0 for side in sides)
    if not whole or len(sides) != 2:
        raise UserError(f'img_size is {img_size!r}; give one positive number of pixels, or height and width')
    height, width = sides
    return height, width


def _check_count(argument: str, value: int | None, minimum: int) -> None:
    """Raise UserError unless a count is absent or a whole number from `minimum`."""
    if value is not None and (not isinstance(value, int) or value < minimum):
        raise UserError(f'{argument} is {value!r}; give a whole number from {minimum}')


def create_model_from_options(args, *, num_classes: int, transfer_from: str | None = None) -> TimmModel:
    """The model that a script's options name, with the weights of --initial-checkpoint or `transfer_from`, if any.

    Args:
        args: options of options.groups.model_options; in scripts that train, also regularization and batch norm.
        num_classes: rows of the classifier.
        transfer_from: checkpoint of another data set, whose classifier need not fit.

    Raises:
        UserError: as create_model and load_weights.
    """
    further = {'drop_block_rate': 'drop_block', 'bn_momentum': 'bn_momentum', 'bn_eps': 'bn_eps'}
    model = create_model(
        args.model, pretrained=args.pretrained, num_classes=num_classes, img_size=args.img_size, global_pool=args.gp,
        drop_rate=getattr(args, 'drop', None), drop_path_rate=getattr(args, 'drop_path', None),
        **{name: getattr(args, option, None) for name, option in further.items()}, **_further_arguments(args))
    for path, replace_head in ((args.initial_checkpoint, False), (transfer_from, True)):
        if path:
            _logger.info('%s', load_weights(model, path, use_ema=args.use_ema, replace_head=replace_head))
    return model


def create_from_config(path: str | os.PathLike, **overrides: Any) -> TimmModel:
    """The model of a recipe, with the weights that it names, if any.

        model = create_from_config('configs/t2t_vit_14.yaml')
        backbone, head = split_head(create_from_config('configs/t2t_vit_14.yaml', num_classes=10))

    Args:
        path: a recipe such as configs/t2t_vit_14.yaml; what it says of data and training has no effect. Where it does
            not say num_classes, they are those of the model's published weights.
        overrides: options that the recipe does not have, or that it has otherwise: num_classes, img_size,
            initial_checkpoint, pretrained, …; of the types that a recipe has.

    Raises:
        UserError: no such file, a value of the wrong type, no model in it, and as create_model and load_weights.
    """
    groups = (model_options, augmentation_options, batch_norm_options)
    parser = create_parser('', groups)
    recipe = read_recipe(Path(path), parser, complete=False)
    if 'model' not in recipe:
        raise UserError(f'{path} names no model; add a line such as "model: t2t_vit_14"')
    defaults = vars(parser.parse_args([]))
    unknown = overrides.keys() - defaults.keys()
    if unknown:
        raise UserError(f'{min(unknown)!r} is no option of a model; the options are those of train.py --help')
    overrides = {name: 'x'.join(map(str, value)) if isinstance(value, tuple) else value
                 for name, value in overrides.items()}
    overrides = check_values(overrides, parser, source='create_from_config')
    args = Options(**{**defaults, **recipe, **overrides})
    return create_model_from_options(args, num_classes=args.num_classes)


class TrainedModel(NamedTuple):
    """A model with its weights; the options, completed by what its checkpoint recorded; the names of its classes.

    `classes` is in the order of the logits, None where the checkpoint does not tell.
    """
    model: TimmModel
    args: Options
    classes: list[str] | None


# What a training recorded of its images and its model, for options that are left open.
RECORDED = ('gp', 'model_kwargs', 'crop_pct', 'mean', 'std', 'interpolation')


def open_trained_model(args) -> TrainedModel:
    """The model of --checkpoint, or --pretrained weights, for scripts that train nothing.

    What the command line leaves open is as the checkpoint says: the model, the image size, the pooling, the further
    arguments of the model, crop and statistics of the pixels.

    Args:
        args: options of options.groups.model_options, input_options and trained_model_options.

    Raises:
        UserError: none or both of these are given, or as read_checkpoint, create_model and load_weights.
    """
    check_trained_model(args)
    checkpoint = read_checkpoint(args.eval_checkpoint) if args.eval_checkpoint else {}
    source = args.eval_checkpoint
    recorded = {name: list(value) if isinstance(value, tuple) else value
                for name, value in recorded_options(checkpoint).items()
                if name in RECORDED and value and not getattr(args, name)}
    parser = create_parser('', (model_options, input_options))
    recorded = check_values(recorded, parser, source=f'{source}, options of its training')
    if args.model and resolve_name(args.model) != (recorded_arch(checkpoint) or '').lower():
        recorded = {name: recorded[name] for name in recorded.keys() - {'model_kwargs', 'gp'}}  # another model's

    name, size = args.model or 't2t_vit_14', None
    if checkpoint and not (args.model and args.img_size):
        name, size = model_of_checkpoint(checkpoint, args.model, args.use_ema, source=source)
    name = resolve_name(name)
    height, width = size or published_config(name).input_size[-2:]
    args = args.replacing(model=name, img_size=args.img_size or (height if height == width else (height, width)),
                          **recorded)
    num_classes = args.num_classes or count_classes(name, checkpoint, args.use_ema, source=source)
    if not num_classes:
        raise UserError(f'{source or name} holds no classifier; give weights that have one')
    model = create_model_from_options(args, num_classes=num_classes)
    if checkpoint:
        _logger.info('%s', load_weights(model, checkpoint, use_ema=args.use_ema, source=source))
    return TrainedModel(model.eval(), args, recorded_classes(checkpoint))


def model_of_checkpoint(
        checkpoint: Mapping[str, Any],
        name: str | None = None,
        use_ema: bool = True,
        source: str = 'checkpoint in memory',
) -> tuple[str, tuple[int, int] | None]:
    """The name of the model that a checkpoint is of, and the image size it was trained at (None: it does not tell).

    Without a `name`, it is the recorded one, else that of the model of ours with these keys and shapes; of several
    such models the first, with a warning.

    Raises:
        UserError: neither tells; or as state_dict_of.
    """
    try:
        weights = state_dict_of(checkpoint, use_ema)
    except UserError as error:
        raise UserError(f'{source}: {error}') from error
    identity = identify(weights, recorded_img_size(checkpoint))
    if name:
        return resolve_name(name), identity.img_size
    recorded = (recorded_arch(checkpoint) or '').lower()
    if timm.is_model(split_model_name_tag(recorded)[0]):
        return recorded, identity.img_size
    if not identity.names:
        raise UserError(f'{source} does not say what model it is of ({identity.description}); give --model')
    if len(identity.names) > 1:
        _logger.warning('%s is taken for %s, but has the shapes of %s too; if it is that, give --model',
                        source, identity.names[0], ' and '.join(identity.names[1:]))
    return identity.names[0], identity.img_size


def split_head(model: TimmModel) -> tuple[TimmModel, nn.Module]:
    """Take a model apart: a backbone that gives pooled features, and the classifier, so that head(backbone(x)) is
    what model(x) was.

    The backbone is `model` itself, without its classifier.

    Raises:
        UserError: the model has several classifiers, or its classifier is more than a layer behind the pooling.
    """
    head = model.get_classifier()
    if not isinstance(head, nn.Linear):
        raise UserError(f'the classifier is a {type(head).__name__}, no linear layer; use model.forward_features and '
                        'model.forward_head instead')
    model.reset_classifier(0)
    return model, head


def _further_arguments(args) -> dict[str, Any]:
    """The arguments of --model-kwargs; those that have an option of their own are refused."""
    further = keywords(args.model_kwargs)
    named = {'num_classes': '--num-classes', 'img_size': '--img-size', 'global_pool': '--gp', 'drop_rate': '--drop',
             'drop_path_rate': '--drop-path', 'pretrained': '--pretrained', 'drop_block_rate': '--drop-block',
             'bn_momentum': '--bn-momentum', 'bn_eps': '--bn-eps'}
    for name in further.keys() & named.keys():
        raise UserError(f'--model-kwargs {name}: use {named[name]}')
    return further
