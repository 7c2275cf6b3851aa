"""Create any model by name, ours or timm's, from arguments, options, a recipe or a checkpoint."""
import logging
import os
import pickle
import re
from collections.abc import Mapping
from numbers import Real
from pathlib import Path
from typing import Any, NamedTuple, cast

import timm
import torch
from timm.models import split_model_name_tag
from torch import nn

from models.token_labels import check_dense_model
from models.weights.formats import (
    recorded_arch,
    recorded_classes,
    recorded_img_size,
    recorded_input,
    recorded_options,
)
from models.weights.identity import Architecture, identify
from models.weights.loading import (
    count_channels,
    count_classes,
    load_weights,
    published_config,
    read_chosen_weights,
    state_dict_of,
)
from options.checks import check_trained_model
from options.groups import augmentation_options, batch_norm_options, input_options, model_options
from options.parser import Options, create_parser
from options.recipes import check_values, read_recipe
from utils.errors import UserError, did_you_mean
from utils.keywords import keywords
from utils.timm_model import TimmModel
from utils.weight_sources import find_weights, kind_of_address, quiet_hub, read_model_config

_logger = logging.getLogger(__name__)

# Arguments that are left out for architectures that do not have them (a ResNet takes any image size).
OPTIONAL_ARGUMENTS = ('img_size', 'global_pool', 'drop_rate', 'attn_drop_rate', 'drop_path_rate')
# Arguments of models that have an option of their own.
OPTIONS_OF_ARGUMENTS = {
    'num_classes': 'num_classes', 'pretrained': 'pretrained', 'img_size': 'img_size', 'global_pool': 'gp',
    'drop_rate': 'drop', 'drop_path_rate': 'drop_path', 'drop_block_rate': 'drop_block', 'bn_momentum': 'bn_momentum',
    'bn_eps': 'bn_eps'}


def create_model(name: str, *, pretrained: bool = False, num_classes: int | None = None,
                 img_size: int | tuple[int, int] | None = None, in_chans: int | None = None,
                 global_pool: str | None = None, drop_rate: float | None = None, attn_drop_rate: float | None = None,
                 drop_path_rate: float | None = None, **kwargs: Any) -> TimmModel:
    """Create a model registered with timm and log its arguments; None means the model's default.

    Args:
        name: registered name in any case ('T2t_vit_14', the name before June 2021, is t2t_vit_14).
        pretrained: download the released weights.
        num_classes: outputs of the classifier; 0 for none.
        img_size: pixels, one number or (height, width); not passed to models that take any size.
        in_chans: channels of the images.
        global_pool: pooling before the classifier.
        drop_rate: dropout probability.
        attn_drop_rate: dropout probability of attention weights, if the model has them.
        drop_path_rate: stochastic depth of the last block, if the model has it.
        kwargs: further arguments, which the model must have.

    Raises:
        UserError: unknown name, value out of range, or weights that could not be fetched.
    """
    name = resolve_name(name)
    rates: dict[str, Any] = {'drop_rate': drop_rate, 'attn_drop_rate': attn_drop_rate, 'drop_path_rate': drop_path_rate}
    for argument, rate in rates.items():
        if rate is not None and not (isinstance(rate, Real) and 0 <= float(rate) < 1):
            raise UserError(f'{argument} is {rate!r}; give a number from 0 up to, but not including, 1')
    for argument, count, minimum in (('num_classes', num_classes, 0), ('in_chans', in_chans, 1)):
        if count is not None and (not isinstance(count, int) or count < minimum):
            raise UserError(f'{argument} is {count!r}; give a whole number from {minimum}')
    if img_size is not None:
        sides = (img_size, img_size) if isinstance(img_size, int) else img_size
        whole = isinstance(sides, tuple | list) and all(isinstance(side, int) and side > 0 for side in sides)
        if not whole or len(sides) != 2:
            raise UserError(f'img_size is {img_size!r}; give one positive number of pixels, or height and width')
        img_size = sides[0], sides[1]
    arguments = {'num_classes': num_classes, 'img_size': img_size, 'in_chans': in_chans, 'global_pool': global_pool,
                 **rates, **kwargs}
    arguments = {argument: value for argument, value in arguments.items() if value is not None}
    given = {argument: value for argument, value in kwargs.items() if value is not None}
    try:
        model, left_out = _create(name, pretrained, arguments)
    except UserError:
        raise
    except Exception as error:  # a model may fail in any way at an argument that it does not expect
        if not given:  # not the user's mistake, since all other arguments are checked above
            raise
        raise UserError(f'model {name} with {given}: {_first_line(error)}') from error
    for argument in left_out:
        # Leaving out an image size, or a rate of 0, changes nothing.
        level = logging.WARNING if argument != 'img_size' and arguments[argument] else logging.INFO
        _logger.log(level, '%s takes no %s: %r is not used', name, argument, arguments.pop(argument))
    _logger.info('model %s: %.2f M parameters%s%s', name,
                 sum(parameter.numel() for parameter in model.parameters()) / 1e6,
                 ', pretrained weights' if pretrained else '',
                 ''.join(f', {argument} {value!r}' for argument, value in arguments.items()))
    return model


def resolve_name(name: str) -> str:
    """Return the registered name for `name` in any case, or raise UserError with the nearest name."""
    if kind_of_address(name):
        raise UserError(f'{name} is an address, not the name of a model; give the name, and the address as its weights')
    registered = {known.lower(): known for known in timm.list_models()}
    architecture, tag = split_model_name_tag(name)
    if architecture.lower() not in registered:
        hint = did_you_mean(architecture.lower(), registered) or '; use a name from timm.list_models()'
        if '/' in name:
            hint = f'; a model of the Hugging Face Hub is hf-hub:{name}, a folder local-dir:{name}'
        raise UserError(f'model {name!r} does not exist{hint}')
    architecture = registered[architecture.lower()]
    if not tag:
        return architecture
    tagged = timm.list_models(f'{architecture}.*', pretrained=True)
    if f'{architecture}.{tag}' not in tagged:
        known = ' or '.join([architecture, *tagged])
        raise UserError(f'model {architecture} has no weights {tag!r}; use {known}')
    return f'{architecture}.{tag}'


def _create(name: str, pretrained: bool, arguments: dict[str, Any]) -> tuple[TimmModel, list[str]]:
    """Create a model without the optional arguments that it does not have; return it and their names."""
    left_out: list[str] = []
    while True:
        try:
            known = {argument: value for argument, value in arguments.items() if argument not in left_out}
            with quiet_hub():
                return cast(TimmModel, timm.create_model(name, pretrained=pretrained, **known)), left_out
        except TypeError as error:
            # timm's entry points accept any keyword, so only a trial shows what a model accepts.
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
            raise UserError(f'model {name}: {_first_line(error)}') from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def create_model_from_options(args, *, num_classes: int, transfer_from: str | None = None,
                              weights_follow: bool = False) -> TimmModel:
    """Return the model that options name, with the weights of --initial-checkpoint or `transfer_from`, if given.

    Args:
        args: options of options.groups.model_options; for training also regularization and batch norm.
        num_classes: outputs of the classifier.
        transfer_from: checkpoint whose classifier may have another size.
        weights_follow: the caller loads weights; otherwise a line says if the model's are random.

    Raises:
        UserError: as create_model and load_weights.
    """
    model = _create_from_options(args, num_classes)
    if args.model_kwargs:
        _check_logits(model, args)
    weights_follow = weights_follow or bool(getattr(args, 'resume', ''))
    if not (args.pretrained or args.initial_checkpoint or transfer_from or weights_follow):
        _logger.info('it starts from random weights')
    for path, replace_head in ((args.initial_checkpoint, False), (transfer_from, True)):
        if path:
            _logger.info('%s', load_weights(model, path, use_ema=args.use_ema, weights_key=args.weights_key,
                                             replace_head=replace_head))
    return model


def _create_from_options(args, num_classes: int | None) -> TimmModel:
    further = keywords(args.model_kwargs)
    for argument in further.keys() & OPTIONS_OF_ARGUMENTS.keys():
        raise UserError(f'--model-kwargs {argument}: use --{OPTIONS_OF_ARGUMENTS[argument].replace("_", "-")}')
    arguments = {argument: getattr(args, option, None) for argument, option in OPTIONS_OF_ARGUMENTS.items()}
    return create_model(args.model, **{**arguments, **further, 'num_classes': num_classes})


def _check_logits(model: TimmModel, args) -> None:
    """Raise UserError unless a model with --model-kwargs maps RGB images to logits, as the scripts need.

    Without a classifier, it must map them to its features.
    """
    outputs = getattr(model, 'num_classes', None) or getattr(model, 'num_features', None)
    size = (args.img_size, args.img_size) if isinstance(args.img_size, int) else args.img_size
    is_training = model.training
    try:
        with torch.no_grad():
            logits = model.eval()(torch.zeros(1, 3, *size))
        found = f'{list(logits.shape)} numbers' if isinstance(logits, torch.Tensor) else f'a {type(logits).__name__}'
        reason = '' if found == f'{[1, outputs]} numbers' else f'{found} for an image'
    except Exception as error:  # a model may fail in any way at arguments that it does not expect
        reason = _first_line(error)
    model.train(is_training)
    if reason:
        raise UserError(f'--model-kwargs {" ".join(args.model_kwargs)}: {args.model} does not map RGB images of '
                        f'{size[0]} × {size[1]} pixels to logits ({reason}); change them or leave them out')


def resolve_model(args: Options) -> tuple[Options, str | None]:
    """Return options that name a registered model, and the weights to start from, or None; for scripts that train.

    For a --model such as hf-hub:timm/resnet18.a1_in1k or local-dir:FOLDER, its config.json gives the model, its
    arguments and its input; --pretrained asks for its weights, whose classifier may have another size.

    Raises:
        UserError: unknown model, as read_model_config, or arguments with which a script cannot use the model.
    """
    _check_channels_of_options(args)
    address = args.model
    if not kind_of_address(address):
        resolve_name(address)
        check_dense_model(args)
        return args, None
    config = read_model_config(address)
    if args.pretrained:
        find_weights(address)  # before the data is read
    recorded = _usable({**recorded_input(config), **recorded_options(config)}, args.replacing(model_kwargs=None),
                       f'{address}, config.json')
    if args.model_kwargs:  # the last of two values counts
        recorded['model_kwargs'] = [*recorded.get('model_kwargs', ()), *args.model_kwargs]
    args = args.replacing(**recorded, model=resolve_name(recorded_arch(config) or ''))
    _check_channels_of_options(args)
    check_dense_model(args)
    return args.replacing(pretrained=False), address if args.pretrained else None


def _check_channels_of_options(args: Options) -> None:
    """Raise UserError for another number of channels than images have, before data is read."""
    channels = keywords(args.model_kwargs).get('in_chans', 3)
    if channels != 3:
        raise UserError(f'--model-kwargs in_chans={channels}: images are read as RGB, with 3 channels; '
                        'leave it out, since grey images and weights for grey images work without it')


def create_from_config(path: str | os.PathLike, **overrides: Any) -> TimmModel:
    """Return the model of a recipe, with the weights that the recipe names, if any.

        backbone, head = split_head(create_from_config('configs/t2t_vit_14.yaml', num_classes=10))

    Args:
        path: a recipe such as configs/t2t_vit_14.yaml; its options for data and training are ignored. Without
            num_classes, the model has as many as its published weights.
        overrides: options that replace those of the recipe: num_classes, img_size, initial_checkpoint, …

    Raises:
        UserError: no such file, a value of the wrong type, no model in it, and as create_model and load_weights.
    """
    parser = create_parser('', (model_options, augmentation_options, batch_norm_options))
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
    model = _create_from_options(args, args.num_classes)
    if args.initial_checkpoint:
        _logger.info('%s', load_weights(model, args.initial_checkpoint, use_ema=args.use_ema,
                                         weights_key=args.weights_key))
    return model


class TrainedModel(NamedTuple):
    """A model with its weights, and what its checkpoint recorded."""
    model: TimmModel
    args: Options  # as given, completed from the checkpoint
    classes: list[str] | None  # names in the order of the logits; None if the checkpoint has none


# Options of the training that tell which images it held out.
RECORDED_SPLIT = {'data': str, 'dataset': str, 'train_split': str, 'val_fraction': float, 'k_fold': int, 'fold': int}
# Options of images and model that are read from the checkpoint unless they are given.
RECORDED = ('gp', 'model_kwargs', 'crop_pct', 'mean', 'std', 'interpolation')


def open_trained_model(args, *, needs_classifier: bool = True) -> TrainedModel:
    """Return the model of --checkpoint or --pretrained, in evaluation mode, for scripts that do not train.

    Options that are not given are read from the checkpoint: model, image size, pooling, further arguments of the
    model, crop and statistics of the pixels.

    Args:
        args: options of options.groups.model_options, input_options and trained_model_options.
        needs_classifier: False also opens weights without one, whose model gives pooled features.

    Raises:
        UserError: none or both of the two options are given, or as read_checkpoint, create_model and load_weights.
    """
    check_trained_model(args)
    if kind_of_address(args.model or ''):
        if args.eval_checkpoint:
            raise UserError(f'--model {args.model} with --checkpoint: which weights? leave one of them out')
        args = args.replacing(model=None, eval_checkpoint=args.model, pretrained=False)
    source = args.eval_checkpoint and str(find_weights(args.eval_checkpoint))
    args = args.replacing(eval_checkpoint=source)
    checkpoint = read_chosen_weights(source, args.weights_key, args.use_ema) if source else {}
    recorded = _usable(recorded_options(checkpoint), args, f'{source}, options of its training')
    if args.model and resolve_name(args.model) != (recorded_arch(checkpoint) or '').lower():
        recorded = {name: recorded[name] for name in recorded.keys() - {'model_kwargs', 'gp'}}  # of another model

    trained_on = _split_of_training(recorded_options(checkpoint))
    name, size = args.model or 't2t_vit_14', None
    if checkpoint and not (args.model and args.img_size):
        identity = identify(state_dict_of(checkpoint, args.use_ema, source), recorded_img_size(checkpoint))
        name, size = args.model or _model_of(checkpoint, identity, source), identity.img_size
    name = resolve_name(name)
    height, width = size or published_config(name).input_size[-2:]
    args = args.replacing(model=name, img_size=args.img_size or (height if height == width else (height, width)),
                          trained_on=trained_on, **recorded)
    _check_channels_of_options(args)
    num_classes = args.num_classes or count_classes(name, checkpoint, args.use_ema, source=source)
    if not num_classes and needs_classifier:
        raise UserError(f'{source or name} holds no classifier; give weights that have one')
    model = create_model_from_options(args, num_classes=num_classes or 0, weights_follow=bool(checkpoint))
    for setting, value in recorded_input(checkpoint).items():
        is_grey = setting in ('mean', 'std') and len(value) == 1
        model.pretrained_cfg[setting] = value * 3 if is_grey else value
    if checkpoint:
        _check_channels_of_weights(name, checkpoint, args.use_ema, source)
        _logger.info('%s', load_weights(model, checkpoint, use_ema=args.use_ema, source=source))
    return TrainedModel(model.eval(), args, recorded_classes(checkpoint))


def _usable(recorded: Mapping[str, Any], args: Options, source: str) -> dict[str, Any]:
    """Return those of RECORDED that are not given; values that mean nothing here are passed over with a warning."""
    parser = create_parser('', (model_options, input_options))
    usable: dict[str, Any] = {}
    for name in RECORDED:
        value = recorded.get(name)
        if value and not getattr(args, name):
            try:
                usable |= check_values({name: list(value) if isinstance(value, tuple) else value}, parser,
                                       source=source)
            except UserError as error:
                _logger.warning('%s; it is not used', error)
    return usable


def _check_channels_of_weights(name: str, checkpoint: Mapping[str, Any], use_ema: bool, source: str) -> None:
    """Raise UserError for weights whose images have other channels than RGB, or grey, which loading adapts."""
    channels = count_channels(name, state_dict_of(checkpoint, use_ema, source))
    if channels not in (None, 1, 3):
        raise UserError(f'{source}: the weights take images of {channels} channels; images are read as RGB, with 3; '
                        'give weights for RGB or grey images')


def _split_of_training(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of RECORDED_SPLIT that a training recorded, and that mean something."""
    found = {name: options[name] for name, kind in RECORDED_SPLIT.items() if isinstance(options.get(name), kind)}
    if not 0 < found.get('val_fraction', 0.5) < 1:
        del found['val_fraction']
    if not 1 <= found.get('fold', 0) <= found.get('k_fold', 0):
        found = {name: value for name, value in found.items() if name not in ('fold', 'k_fold')}
    return found


def _model_of(checkpoint: Mapping[str, Any], identity: Architecture, source: str) -> str:
    """Return the model name that a checkpoint records, else the first one with its shapes, or raise UserError."""
    recorded = (recorded_arch(checkpoint) or '').lower()
    if timm.is_model(split_model_name_tag(recorded)[0]):
        return recorded
    if not identity.names:
        raise UserError(f'{source} does not record its model ({identity.description}); give --model')
    first, *others = identity.names
    if others:
        _logger.warning('%s is read as %s, but also has the shapes of %s; if it is that, give --model',
                        source, first, ' and '.join(others))
    return first


def split_head(model: TimmModel) -> tuple[TimmModel, nn.Module]:
    """Return (backbone, head) of a model: head(backbone(x)) equals what model(x) was.

    The backbone gives pooled features. It is `model` itself, which loses its classifier.

    Raises:
        UserError: the classifier is not a single linear layer.
    """
    head = model.get_classifier()
    if not isinstance(head, nn.Linear):
        raise UserError(f'the classifier is a {type(head).__name__}, not a linear layer; use model.forward_features '
                        'and model.forward_head instead')
    model.reset_classifier(0)
    return model, head
