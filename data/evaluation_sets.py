"""ImageNet's evaluation sets, laid out as they are published, with the classes that a model is asked for.

    image_set = open_set('a', '/data/imagenet-a', args, known_classes, 1000, world)
    columns = columns_of(image_set, args, known_classes, 1000)  # which of the model's outputs are judged

| set | images | judged |
|---|---|---|
| val | a data set of any kind | as the model was trained |
| real | ImageNet's validation images, in any folders | against ReaL's labels (Beyer et al. 2020), one or several |
| v2 | ImageNet-V2 (Recht et al. 2019), in folders 0 … 999 | over the 1,000 classes |
| a, r | ImageNet-A and -R (Hendrycks et al. 2021), in folders of synsets | over their 200 classes |
| sketch | ImageNet-Sketch (Wang et al. 2019), in folders of synsets | over the 1,000 classes |
| c | ImageNet-C (Hendrycks and Dietterich 2019), CORRUPTION/STRENGTH/SYNSET/ | over the 1,000 classes |
"""
import functools
import json
import logging
import os
import pkgutil
import re
from collections.abc import Mapping
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from timm.data import ImageNetInfo

from data.base import ImageDataset, Joined, Part
from data.classes import are_positions, match_classes, name_some, read_class_map
from data.datasets import open_without_targets
from data.folders import ImageFolder, require_folder
from data.pipeline import name_classes, open_evaluation_data
from utils.console import plural
from utils.distributed import World
from utils.errors import UserError

_logger = logging.getLogger(__name__)

# Corruptions of ImageNet-C and AlexNet's top-1 error under each, a mean over the five strengths (Hendrycks and
# Dietterich 2019). A model's mean corruption error is relative to these.
ALEXNET_ERRORS = {
    'gaussian_noise': 0.886428, 'shot_noise': 0.894468, 'impulse_noise': 0.922640,
    'defocus_blur': 0.819880, 'glass_blur': 0.826268, 'motion_blur': 0.785948, 'zoom_blur': 0.798360,
    'snow': 0.866816, 'frost': 0.826572, 'fog': 0.819324, 'brightness': 0.564592,
    'contrast': 0.853204, 'elastic_transform': 0.646056, 'pixelate': 0.717840, 'jpeg_compression': 0.606500}
STRENGTHS = ('1', '2', '3', '4', '5')
VALIDATION_NAME = re.compile(r'ILSVRC2012_val_(\d{8})(\.\w+)?')


class ImageSet(NamedTuple):
    """Images and what is right for each.

    data: what the user gave. classes: the outputs that are judged, None if nothing names them; names: for people.
    truth: which of them are right, int64 [N], or several for each image, [N, L], which -1 fills up.
    parts: the first image of each corruption, and the one behind its last; {} for other sets than c.
    """
    name: str
    data: str
    dataset: ImageDataset
    truth: np.ndarray
    classes: list[str] | None
    names: list[str]
    parts: Mapping[str, tuple[int, int]] = {}


def open_set(name: str, folder: str | None, args, known_classes: list[str] | None, num_classes: int,
             world: World) -> ImageSet:
    """Return an evaluation set for a model whose checkpoint knows `known_classes`, if any.

    folder: where it is; None for the data set of the options.
    Raises UserError if its folders or names of files are not those of the set, or the model has other classes.
    """
    data = folder or args.data or args.dataset
    if name == 'val':
        dataset = open_evaluation_data(args.replacing(data=folder) if folder else args, known_classes, num_classes,
                                       world)
        classes = classes_of(args, known_classes, None)
        if classes is None and not are_positions(dataset.classes, num_classes):
            classes = dataset.classes
        return ImageSet(name, data, dataset, dataset.targets, classes,
                        name_classes(args, known_classes or dataset.classes, num_classes))
    _check_imagenet(name, classes_of(args, known_classes, num_classes), num_classes)
    synsets = asked = _synsets()
    parts: dict[str, tuple[int, int]] = {}
    if name == 'real':
        dataset, truth = _open_real(data, args, world)
    elif name == 'c':
        dataset, parts = _open_c(data)
        truth = dataset.targets
    else:
        dataset = _open_as_imagenet(data, args, world)
        if name in ('a', 'r'):
            asked = _info(f'imagenet_{name}_synsets.txt').split()
        position = {synset: number for number, synset in enumerate(asked)}
        truth = np.array([position.get(synset, -1) for synset in synsets])[dataset.targets]
        if strangers := sorted({synsets[target] for target in dataset.targets[truth < 0]}):
            raise UserError(f'--data {name}={data}: {plural(len(strangers), "folder")} of classes that ImageNet-'
                            f'{name.upper()} has not ({name_some(strangers)}); check which set it is')
        if missing := len(asked) - len(np.unique(truth)):
            _logger.warning('%s: %d of the %d classes have no images', data, missing, len(asked))
    return ImageSet(name, data, dataset, truth, asked,
                    name_classes(args.replacing(class_map=None), asked, len(asked)), parts)


def classes_of(args, known: list[str] | None, num_classes: int | None) -> list[str] | None:
    """Return the names of a model's classes: of --class-map, else `known`, else ImageNet's for a model of 1,000."""
    if args.class_map:
        return read_class_map(args.class_map)
    return known or (_synsets() if num_classes == 1000 else None)


def columns_of(image_set: ImageSet, args, known_classes: list[str] | None, num_classes: int) -> list[int] | None:
    """Return which of a model's outputs are those of the set; None if they are all of them, in their order.

    A model without names of its classes has those of the set if they are as many.
    Raises UserError if it has others; `args` are those of the model.
    """
    # The folders of `val` may be those of any 1,000 classes.
    asked, own = image_set.classes, classes_of(args, known_classes, None if image_set.name == 'val' else num_classes)
    if num_classes == len(image_set.names) and (asked is None or own is None or asked == own):
        return None
    if asked and own and len(asked) == len(image_set.names) and set(asked) <= set(own):
        position = {name: number for number, name in enumerate(own)}
        return [position[name] for name in asked]
    of_own, of_set = (f' ({name_some(names, 3)})' if names else '' for names in (own, asked))
    raise UserError(f'--checkpoint {args.eval_checkpoint}: its {num_classes} classes{of_own} are not those of the '
                    f'first model{of_set}; evaluate it apart')


def _check_imagenet(name: str, model_classes: list[str] | None, num_classes: int) -> None:
    if not set(_synsets()) <= set(model_classes or ()):
        own = f'the model has {num_classes}' + (f' ({name_some(model_classes, 3)})' if model_classes else '')
        raise UserError(f"--sets {name} asks for ImageNet's 1,000 classes, {own}; leave the set out"
                        + (', or say --class-map imagenet' if num_classes == 1000 else ''))


def _open_as_imagenet(data: str, args, world: World) -> ImageDataset:
    """Return a data set whose class folders are synsets, or numbers, with ImageNet's class numbers."""
    alone = args.replacing(data=data, dataset='folder', class_map=None, val_split=None, val_fraction=None,
                           only_classes=None, k_fold=None, fold=None, trained_on={})
    return open_evaluation_data(alone, _synsets(), 1000, world)


def _open_real(data: str, args, world: World) -> tuple[ImageDataset, np.ndarray]:
    """Return those of ImageNet's validation images that have ReaL labels, and these as `ImageSet.truth`."""
    dataset = open_without_targets(data, split=args.val_split) or _open_as_imagenet(data, args, world)
    names = [os.path.basename(dataset.name(index)) for index in range(len(dataset))]
    numbers = [int(match[1]) if (match := VALIDATION_NAME.fullmatch(name)) else 0 for name in names]
    labels = json.loads(_info('imagenet_real_labels.json'))
    problem = next((f'{name!r} is none of them' for name, number in zip(names, numbers, strict=True)
                    if not 1 <= number <= len(labels)), '')
    if not problem and len(set(numbers)) < len(numbers):
        twice = next(name for name, number in zip(names, numbers, strict=True) if numbers.count(number) > 1)
        problem = f'{twice!r} is there twice'
    if problem:
        raise UserError(f"--sets real: {data}: ReaL's labels are for ILSVRC2012_val_00000001.JPEG … "
                        f"{len(labels):08d}.JPEG, and {problem}; give ImageNet's validation images under their names")
    if len(numbers) < len(labels):
        _logger.warning('%s: %d of the %d validation images', data, len(numbers), len(labels))
    lists = [labels[number - 1] for number in numbers]
    kept = [index for index, own in enumerate(lists) if own]
    if not kept:
        raise UserError(f'--sets real: {data}: none of its {plural(len(names), "image")} has a ReaL label; give all '
                        "of ImageNet's validation images")
    _logger.info('%s: %s without ReaL labels left out', data, plural(len(lists) - len(kept), 'image'))
    truth = np.full((len(kept), max(len(lists[index]) for index in kept)), -1)
    for row, index in enumerate(kept):
        truth[row, :len(lists[index])] = lists[index]
    return Part(dataset, kept), truth


def _open_c(data: str) -> tuple[ImageDataset, dict[str, tuple[int, int]]]:
    """Return the corruptions of ImageNet-C that are there, each in all its strengths, and `ImageSet.parts`."""
    require_folder(data)
    synsets = _synsets()
    there = [name for name in ALEXNET_ERRORS if os.path.isdir(os.path.join(data, name))]
    if not there:
        raise UserError(f'--data c={data}: none of the corruptions of ImageNet-C in it '
                        f'({name_some([*ALEXNET_ERRORS])}); give the folder that holds them, as DIR/fog/1/n01440764/')
    folders = [os.path.join(data, name, strength) for name in there for strength in STRENGTHS]
    if lacking := next((folder for folder in folders if not os.path.isdir(folder)), None):
        raise UserError(f'--data c={data}: no folder {lacking}; each corruption has the strengths 1 to 5')
    if missing := [name for name in ALEXNET_ERRORS if name not in there]:
        _logger.warning('%s: the mean is over %d of 15 corruptions, without %s', data, len(there), ', '.join(missing))
    joined = Joined([match_classes(ImageFolder(folder), synsets, where=folder, map_source='ImageNet',
                                   allow_missing=True) for folder in folders])
    ends = joined.starts[::len(STRENGTHS)].tolist()
    return joined, dict(zip(there, pairwise(ends), strict=True))


@functools.cache
def _synsets() -> list[str]:
    """Return the synsets of ImageNet's 1,000 classes in their order."""
    return ImageNetInfo().label_names()  # which reads what all 21,841 are called


def _info(name: str) -> str:
    """Return the text of one of the files that timm ships for ImageNet."""
    content = pkgutil.get_data('timm.data', f'_info/{name}')
    assert content is not None, f'timm has no {name}'
    return content.decode()
