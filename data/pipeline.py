"""From options to the engine's input: data sets, then the loaders and preparers of training and evaluation."""
import logging
import os
from collections import Counter
from typing import Any, NamedTuple

import numpy as np
from timm.data import ImageNetInfo, resolve_data_config

from data.base import ImageDataset, Numbered, evenly_spaced
from data.batch import BatchPreparer, Readjustment, TokenLabelPreparer, TrainBatchPreparer
from data.classes import are_positions, name_some, read_class_map
from data.datasets import has_eval_split, open_eval, open_train_val
from data.folders import ImageFiles
from data.held_out import hold_out
from data.loader import Loader, create_loader
from data.places import address_of_shards, is_same_place
from data.samplers import EvalSampler, TrainSampler
from data.shards.cache import Cache
from data.shards.dataset import open_without_classes
from data.shards.foreign import NoClassError
from data.token_labels import open_token_labels
from data.token_targets import WHOLE
from data.transforms import InputConfig, Transform, create_eval_transform, create_train_transform
from data.views import Views, ViewsPreparer, create_views
from options.checks import check_fold, check_images
from options.datasets import DATASETS
from utils.console import plural
from utils.distributed import World, one_per_machine_first
from utils.errors import UserError

_logger = logging.getLogger(__name__)

# Statistics of CIFAR's pixels, under the names of timm's configurations.
CIFAR_STATS = {'mean': (0.4914, 0.4822, 0.4465), 'std': (0.2023, 0.1994, 0.2010)}


def resolve_input(args, pretrained_cfg: dict) -> InputConfig:
    """Return the input settings of the options; those left out are the model's own.

    Raises UserError for --mean or --std of another length than 1 or 3, or a crop out of range.
    """
    for name in ('mean', 'std'):
        values = getattr(args, name)
        if values is not None and len(values) not in (1, 3):
            raise UserError(f'--{name} {values}: give one number, or three for red, green and blue')
    if args.crop_pct is not None and args.crop_pct > 1:
        raise UserError(f'--crop-pct {args.crop_pct}: a part of the image, at most 1')
    size = (args.img_size, args.img_size) if isinstance(args.img_size, int) else tuple(args.img_size)
    asked = {'img_size': None, 'input_size': (3, *size), 'crop_pct': args.crop_pct, 'mean': args.mean, 'std': args.std,
             'interpolation': args.interpolation}
    config = resolve_data_config(asked, pretrained_cfg=pretrained_cfg)
    return InputConfig(size, config['crop_pct'], config['interpolation'], config['crop_mode'],
                 tuple(config['mean']), tuple(config['std']))


def open_training_data(args, world: World):
    """Return the training and the evaluation split of the options, with the training split's class numbers."""
    root, download = _locate(args)
    with one_per_machine_first(world):
        train, val = open_train_val(
            args.dataset, root, train_split=args.train_split, val_split=args.val_split,
            val_fraction=args.val_fraction, fold=(args.fold or 1, args.k_fold) if args.k_fold else None,
            download=download and world.local_rank == 0, only_classes=args.only_classes,
            num_classes=args.num_classes or 1000, image_size=args.img_size, cache=_cache(args, world))
    if world.is_main and is_same_split(train, val):
        _logger.warning('the training images are the evaluation images too (%s): the accuracy says nothing about '
                        'others; name another --val-split', os.path.dirname(os.path.dirname(val.path(0))))
    return train, val


def is_same_split(train: ImageDataset, val: ImageDataset) -> bool:
    """Tell whether both splits are the same folder of images or shards, whatever its names."""
    if not len(val) or len(train) != len(val):
        return False
    one, other = (dataset.path(len(dataset) - 1) for dataset in (train, val))
    is_file = '::' in one or os.path.exists(one)  # in a shard, or by itself
    return is_file and os.path.realpath(one) == os.path.realpath(other)


def open_evaluation_data(args, classes: list[str] | None, num_classes: int | None, world: World):
    """Return the evaluation split alone.

    --class-map numbers its classes, else `classes`, as a checkpoint has them. Without either, ImageNet's order numbers
    the classes for a model of 1,000 classes if all folders are named after ImageNet's synsets.

    Raises UserError as open_eval, or if nothing maps the data set's classes to the model's `num_classes`.
    """
    root, download = _locate(args)
    check_fold(args)
    if args.k_fold and not args.fold:
        raise UserError(f'--k-fold {args.k_fold}: which of the folds? add --fold, such as --fold 1')
    fold = (args.fold, args.k_fold) if args.k_fold else _recorded_fold(args, root, world)
    val_fraction = args.val_fraction or (None if fold else _recorded_fraction(args, root, world))
    if args.class_map:
        classes = read_class_map(args.class_map)

    def open_with(classes):
        # Missing classes are no mistake: the map is the model's.
        return open_eval(args.dataset, root, split=args.val_split, val_fraction=val_fraction, fold=fold,
                         train_split=getattr(args, 'trained_on', {}).get('train_split', 'train'),
                         classes=classes, only_classes=args.only_classes,
                         download=download and world.local_rank == 0, allow_missing_classes=True,
                         num_classes=num_classes or 1000, image_size=args.img_size, cache=_cache(args, world))

    with one_per_machine_first(world):
        dataset = open_with(classes)
    if classes is None and num_classes and len(dataset.classes) < num_classes and are_positions(dataset.classes,
                                                                                              num_classes):
        return open_with([str(number) for number in range(num_classes)])
    if classes is None and num_classes == 1000 and len(dataset.classes) < 1000:
        synsets = ImageNetInfo().label_names()
        if set(dataset.classes) <= set(synsets):
            return open_with(synsets)
    count = len(dataset.classes)
    if num_classes is not None and count != num_classes and (classes is None or count > num_classes):
        raise UserError(f'the model has {num_classes} classes, the data set {count}, and nothing says which is which; '
                        'give --class-map FILE with all their names in order')
    return dataset


def _recorded_fraction(args, root: str, world: World) -> float | None:
    """Return the --val-fraction that the checkpoint was trained with, if it belongs to the data set of the options.

    Raises UserError if nobody can tell: evaluating images of the training would be wrong without a word.
    """
    trained_on = getattr(args, 'trained_on', {})
    data, val_fraction = trained_on.get('data'), trained_on.get('val_fraction')
    if not val_fraction or args.val_split or DATASETS[args.dataset].opener or has_eval_split(
            root, cache=_cache(args, world)):
        return None
    if not (data and is_same_place(data, root)):
        raise UserError(f'the checkpoint was trained with --val-fraction {val_fraction:g} of '
                        f'{data or "a folder it does not name"}; if {root} is that data set, give --val-fraction '
                        f'{val_fraction:g}; to evaluate all its images, --val-split .')
    _logger.info('the checkpoint was trained with --val-fraction %g: the images held out then are evaluated',
                 val_fraction)
    return val_fraction


def _recorded_fold(args, root: str, world: World) -> tuple[int, int] | None:
    """Return the fold k of K that the checkpoint was not trained on, as (k, K), as `_recorded_fraction`."""
    trained_on = getattr(args, 'trained_on', {})
    if args.val_split or args.val_fraction or 'k_fold' not in trained_on:
        return None
    fold, folds = trained_on['fold'], trained_on['k_fold']
    data, dataset = (trained_on.get(name) for name in ('data', 'dataset'))
    of_same = is_same_place(data, root) if data and root else dataset == args.dataset and not args.data
    if not of_same and (DATASETS[args.dataset].opener or has_eval_split(root, cache=_cache(args, world))):
        return None
    given = f'--k-fold {folds} --fold {fold}'
    if not of_same:
        raise UserError(f'the checkpoint was trained with {given} of {data or dataset or "a folder it does not name"}; '
                        f'if {root} is that data set, give {given}; to evaluate all its images, --val-split .')
    _logger.info('the checkpoint was trained with %s: the images of that fold are evaluated (--val-split names others)',
                 given)
    return fold, folds


def open_images(args, classes: list[str] | None, num_classes: int | None, world: World, *,
                needs_classes: bool = False) -> ImageDataset:
    """Return the images of the options: files, with unknown targets of -1, or the evaluation images of a data set.

    needs_classes: False also opens tar files whose images have none, with targets of -1.
    Raises UserError if neither or both are given, or as ImageFiles and open_evaluation_data.
    """
    check_images(args)
    if address := next(filter(None, map(address_of_shards, args.images)), ''):
        raise UserError(f'{address}: images in tar files are a data set; give --data {address}')
    dataset: ImageDataset
    try:
        dataset = ImageFiles(args.images) if args.images else open_evaluation_data(args, classes, num_classes, world)
    except NoClassError as error:
        if needs_classes:
            raise
        dataset = open_without_classes(error.files)
    return evenly_spaced(dataset, args.samples) if args.samples else dataset


def name_classes(args, classes: list[str] | None, num_classes: int) -> list[str]:
    """Return a readable name for each class of a model, from --class-map, else from its checkpoint's `classes`.

    ImageNet's synsets become unique words. Without names, a model of 1,000 classes gets ImageNet's; any other gets
    numbers.

    Raises UserError if --class-map cannot be read, or names another number of classes.
    """
    if args.class_map:
        classes = read_class_map(args.class_map)
        if len(classes) != num_classes:
            raise UserError(f'--class-map {args.class_map} names {len(classes)} classes, the model has {num_classes}')
    return _name_in_words(classes, num_classes)


def _name_in_words(classes: list[str] | None, num_classes: int) -> list[str]:
    imagenet = ImageNetInfo()
    if classes is None and num_classes == len(imagenet.label_names()):
        classes = imagenet.label_names()
    if classes is None or len(classes) > num_classes:
        classes = []
    words = _name_synsets(imagenet)
    return [words.get(name, name) for name in classes] + [f'class {n}' for n in range(len(classes), num_classes)]


def _name_synsets(imagenet: ImageNetInfo) -> dict[str, str]:
    """Return the first word for each synset; all words if several share it; the synset, too, for the two cranes."""
    words = {synset: imagenet.label_name_to_description(synset) for synset in imagenet.label_names()}
    first = Counter(text.split(',')[0].lower() for text in words.values())
    every = Counter(words.values())
    return {synset: short if first[(short := text.split(',')[0]).lower()] == 1
            else text if every[text] == 1 else f'{text} ({synset})' for synset, text in words.items()}


def _locate(args) -> tuple[str, bool]:
    """Return the folder of the data, '' for data sets without one, and whether to download what it lacks."""
    if args.data:
        return args.data, bool(args.download)
    folder = DATASETS[args.dataset].folder
    if folder is None:
        raise UserError(f'--dataset {args.dataset} needs DIR, its folder' if DATASETS[args.dataset].opener else
                        'no data: give the folder that holds train/ and val/, or --dataset digits to try things out')
    return folder, args.download is not False


def _cache(args, world: World) -> Cache:
    """Return the cache of remote shards, which all processes of a machine share."""
    return Cache(args.shard_cache, max_bytes=args.shard_cache_size * 1e9, patience=args.shard_timeout,
                 sharers=world.local_size)


class TrainingInput(NamedTuple):
    """The epoch loop's input: this rank's loaders, the preparers of their batches, and names as from `name_classes`.

    class_counts: images to train on of each class, of all ranks.
    `val_loader` has the images on which the best epoch is chosen, `chosen_on` in words. If these are a part of the
    training images, `final_loader` has the evaluation images. `evaluated_on` says of which images the result is.
    """
    train_loader: Loader
    prepare_train: TrainBatchPreparer
    val_loader: Loader
    prepare_val: BatchPreparer
    img_size: tuple[int, int]
    class_names: list[str]
    class_counts: list[int]
    chosen_on: str
    evaluated_on: str
    final_loader: Loader | None = None
    for_teacher: Readjustment | None = None  # training images, prepared → as the teacher takes them


# The grid (rows, columns) of a model's tokens, and what of an image it covers (see token_targets.crop_targets).
TokenLayout = tuple[tuple[int, int], tuple[float, ...]]


def create_training_input(args, train_set, val_set, pretrained_cfg: dict, num_classes: int, world: World, *,
                          layout: TokenLayout | None = None, teacher=None) -> TrainingInput:
    """Return loaders and preparers for the options; input settings left out are the model's (`pretrained_cfg`).

    layout: that of the model, required for --token-labels.
    teacher: the model that the other one learns from, with its own options (models.open_teacher).
    Raises UserError as `open_token_labels`.
    """
    config = resolve_input(args, pretrained_cfg)
    chosen_on = evaluated_on = _describe_evaluation(args, len(val_set))
    final_loader = None
    if args.select_fraction:
        final_loader, _ = create_eval_loader(args, val_set, config, world)
        train_set, val_set = hold_out(train_set, args.select_fraction, where='training images',
                                      option='--select-fraction')
        if not len(val_set):
            raise UserError(f'--select-fraction {args.select_fraction:g}: no class has two training images, so none '
                            'can be held out; leave the option out')
        chosen_on = f'{plural(len(val_set), "held-out training image")} (--select-fraction {args.select_fraction:g})'
    return TrainingInput(*_create_train_loader(args, train_set, config, num_classes, world, layout),
                         *create_eval_loader(args, val_set, config, world), config.img_size,
                         _name_in_words(train_set.classes, num_classes),
                         np.bincount(train_set.targets, minlength=num_classes).tolist(), chosen_on, evaluated_on,
                         final_loader, teacher and _create_readjustment(config, teacher, world))


def _describe_evaluation(args, count: int) -> str:
    images = plural(count, 'evaluation image')
    if args.k_fold:
        return f'{images} (fold {args.fold or 1} of {args.k_fold})'
    return f'{images} (--val-fraction {args.val_fraction:g})' if args.val_fraction else images


def _create_readjustment(config: InputConfig, teacher, world: World) -> Readjustment:
    other = resolve_input(teacher.args, teacher.model.pretrained_cfg)
    return Readjustment(world.device, mean=config.mean, std=config.std, other_mean=other.mean, other_std=other.std,
                        other_size=other.img_size)


class ProbeInput(NamedTuple):
    """The input of a linear probe: both splits as an evaluation sees them, and the settings of that input."""
    train_loader: Loader
    prepare_train: BatchPreparer
    val_loader: Loader
    prepare_val: BatchPreparer
    config: InputConfig


def create_probe_input(args, train_set, val_set, pretrained_cfg: dict, world: World) -> ProbeInput:
    """Return the loaders of a linear probe. Up to --max-bad-images training images may be left out."""
    config = resolve_input(args, pretrained_cfg)
    of_training = args.replacing(max_bad_val_images=args.max_bad_images)
    return ProbeInput(*create_eval_loader(of_training, train_set, config, world),
                      *create_eval_loader(args, val_set, config, world), config)


def check_training_input(args) -> None:
    """Raise the UserError that `create_training_input` would raise for these options, before data is read."""
    config = resolve_input(args, {})
    _check_token_labels(args)
    args = args.replacing(fast_transform=False, fast_eval=False)  # the same mistakes
    _create_train_transform(args, config)
    _create_train_preparer(args, config, 2, 'cpu', ((1, 1), WHOLE))
    _create_eval_transform(args, config)


def _check_token_labels(args) -> None:
    """Raise UserError for options that need token labels, or with which they cannot be used."""
    if not args.token_labels:
        needing = {f'--token-label-crop {args.token_label_crop}': args.token_label_crop != 'straight',
                   f'--dense-weight {args.dense_weight:g}': args.dense_weight != 1,
                   f'--cls-weight {args.cls_weight:g}': args.cls_weight != 1, '--ground-truth': args.ground_truth}
        for option in (option for option, is_given in needing.items() if is_given):
            raise UserError(f'{option}: there are no token labels; give their folder with --token-labels DIR')
        return
    if args.mixup or args.cutmix or args.cutmix_minmax:
        raise UserError('--token-labels beside Mixup or CutMix: images exchange tokens instead; leave --mixup, '
                        '--cutmix and --cutmix-minmax out')
    if args.mixup_off_epoch:
        raise UserError(f'--token-labels with --mixup-off-epoch {args.mixup_off_epoch}: images exchange tokens in '
                        'every epoch; leave it out')
    unknown_crop = {'--no-aug': not args.aug, '--aug-splits': args.aug_splits, '--no-fast-transform': not
                    args.fast_transform, f'--train-crop-mode {args.train_crop_mode}': args.train_crop_mode != 'rrc'}
    for option in (option for option, is_given in unknown_crop.items() if is_given):
        raise UserError(f'--token-labels with {option}: labels follow random resized crops of the fast transform only; '
                        + ('say --train-crop-mode rrc' if 'mode' in option else 'leave it out'))


def _create_train_loader(args, dataset, config: InputConfig, num_classes: int, world: World,
                         layout: TokenLayout | None = None) -> tuple[Loader, TrainBatchPreparer]:
    """Return this rank's training loader, and the preparer of its batches."""
    labels = open_token_labels(args.token_labels, dataset, num_classes=num_classes,
                               max_missing=args.max_missing_labels) if args.token_labels else None
    if labels and world.is_main:
        _logger.info('token labels: images exchange tokens with one another (MixToken), in place of Mixup and CutMix')
    sampler = TrainSampler(len(dataset), args.batch_size, rank=world.rank, world_size=world.size, seed=args.seed,
                           accum_steps=args.accum_steps, shard_offsets=dataset.shard_offsets(),
                           targets=dataset.targets if args.sampler == 'balanced' else None, repeats=args.aug_repeats)
    if args.sampler == 'balanced' and world.is_main:
        _say_balance(dataset)
    # Those of the next step, or of the next two (see engine/ahead.py).
    held = args.accum_steps * (2 if world.size > 1 else 1)
    loader = create_loader(dataset, _create_train_transform(args, config), sampler, seed=args.seed,
                           workers=args.workers, pin_memory=args.pin_mem and world.device.type == 'cuda',
                           max_bad_images=args.max_bad_images, held=held, token_labels=labels)
    return loader, _create_train_preparer(args, config, num_classes, world.device, layout)


def _say_balance(dataset: ImageDataset) -> None:
    counts = np.bincount(dataset.targets, minlength=len(dataset.classes))
    has_any = counts > 0
    _logger.info('--sampler balanced: %s of %d to %d images come equally often', plural(
        int(has_any.sum()), 'class', 'classes'), counts[has_any].min(), counts.max())
    if empty := [dataset.classes[target] for target in np.flatnonzero(~has_any)]:
        _logger.warning('--sampler balanced: %s (%s) left out, without training images',
                        plural(len(empty), 'class', 'classes'), name_some(empty))


def _create_train_transform(args, config: InputConfig):
    return create_train_transform(
        config.img_size, crop_mode=args.train_crop_mode, scale=args.scale, ratio=args.ratio, hflip=args.hflip,
        vflip=args.vflip, color_jitter=args.color_jitter, auto_augment=args.aa, interpolation=args.train_interpolation,
        mean=config.mean, no_aug=not args.aug, aug_splits=args.aug_splits, fast=args.fast_transform)


def _create_train_preparer(args, config: InputConfig, num_classes: int, device,
                           layout: TokenLayout | None) -> TrainBatchPreparer:
    options: dict[str, Any] = dict(
        batch_size=args.batch_size, num_classes=num_classes, mean=config.mean, std=config.std,
        channels_last=args.channels_last, aug_splits=args.aug_splits, mixup_alpha=args.mixup, cutmix_alpha=args.cutmix,
        cutmix_minmax=args.cutmix_minmax, mixup_prob=args.mixup_prob, mixup_switch_prob=args.mixup_switch_prob,
        mixup_mode=args.mixup_mode, smoothing=args.smoothing, erase_prob=args.reprob if args.aug else 0.0,
        erase_mode=args.remode, erase_count=args.recount, erase_splits=args.resplit)
    if not args.token_labels:
        return TrainBatchPreparer(device, **options)
    assert layout is not None, 'token labels need the layout of the tokens'
    return TokenLabelPreparer(device, grid=layout[0], window=layout[1], ground_truth=args.ground_truth,
                              transposed=args.token_label_crop == 'published', **options)


def create_eval_loader(args, dataset, config: InputConfig, world: World) -> tuple[Loader, BatchPreparer]:
    """Return this rank's evaluation loader, and its preparer; over all ranks every image comes exactly once."""
    prepare = BatchPreparer(world.device, mean=config.mean, std=config.std, channels_last=args.channels_last)
    return _create_eval_loader(args, dataset, _create_eval_transform(args, config), world), prepare


def _create_eval_loader(args, dataset, transform: Transform, world: World) -> Loader:
    batch_size = args.batch_size * args.validation_batch_size_multiplier
    sampler = EvalSampler(len(dataset), batch_size, rank=world.rank, world_size=world.size)
    return create_loader(dataset, transform, sampler, seed=args.seed, workers=args.workers,
                         pin_memory=args.pin_mem and world.device.type == 'cuda',
                         max_bad_images=args.max_bad_val_images)


def create_views_loader(args, dataset, views: Views, world: World) -> tuple[Loader, ViewsPreparer]:
    """Return this rank's evaluation loader of several views of each image, and its preparer.

    The targets of its batches are the numbers of the images in `dataset`.
    """
    transform, prepare = create_views(views, fast=args.fast_eval, device=world.device, channels_last=args.channels_last)
    return _create_eval_loader(args, Numbered(dataset), transform, world), prepare


def _create_eval_transform(args, config: InputConfig):
    return create_eval_transform(config.img_size, crop_pct=config.crop_pct, interpolation=config.interpolation,
                                 crop_mode=config.crop_mode, mean=config.mean, fast=args.fast_eval)
