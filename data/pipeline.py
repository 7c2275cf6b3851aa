"""From options to the engine's input: data sets, then the loaders and preparers of training and evaluation."""
import logging
import os
from collections import Counter
from typing import Any, NamedTuple

from timm.data import ImageNetInfo, resolve_data_config

from data.base import ImageDataset, evenly_spaced
from data.batch import BatchPreparer, TokenLabelPreparer, TrainBatchPreparer
from data.classes import are_positions, read_class_map
from data.datasets import has_eval_split, open_eval, open_train_val
from data.folders import ImageFiles
from data.loader import Loader, create_loader
from data.places import address_of_shards, is_same_place
from data.samplers import EvalSampler, TrainSampler
from data.shards.cache import Cache
from data.shards.dataset import open_without_classes
from data.shards.foreign import NoClassError
from data.token_labels import open_token_labels
from data.token_targets import WHOLE
from data.transforms import create_eval_transform, create_train_transform
from options.checks import check_images
from options.datasets import DATASETS
from utils.distributed import World, one_per_machine_first
from utils.errors import UserError

_logger = logging.getLogger(__name__)

# Statistics of CIFAR's pixels, under the names of timm's configurations.
CIFAR_STATS = {'mean': (0.4914, 0.4822, 0.4465), 'std': (0.2023, 0.1994, 0.2010)}


class InputConfig(NamedTuple):
    """A model's input: size (height, width), crop, interpolation, and mean and standard deviation of the pixels."""
    img_size: tuple[int, int]
    crop_pct: float
    interpolation: str
    crop_mode: str
    mean: tuple[float, ...]
    std: tuple[float, ...]


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
            val_fraction=args.val_fraction,
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
    val_fraction = args.val_fraction or _recorded_fraction(args, root, world)
    if args.class_map:
        classes = read_class_map(args.class_map)

    def open_with(classes):
        # Missing classes are no mistake: the map is the model's.
        return open_eval(args.dataset, root, split=args.val_split, val_fraction=val_fraction,
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
    data, val_fraction = getattr(args, 'trained_on', (None, None))
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
    """The epoch loop's input: this rank's loaders, the preparers of their batches, and names as from `name_classes`."""
    train_loader: Loader
    prepare_train: TrainBatchPreparer
    val_loader: Loader
    prepare_val: BatchPreparer
    img_size: tuple[int, int]
    class_names: list[str]


# The grid (rows, columns) of a model's tokens, and what of an image it covers (see token_targets.crop_targets).
TokenLayout = tuple[tuple[int, int], tuple[float, ...]]


def create_training_input(args, train_set, val_set, pretrained_cfg: dict, num_classes: int, world: World, *,
                          layout: TokenLayout | None = None) -> TrainingInput:
    """Return loaders and preparers for the options; input settings left out are the model's (`pretrained_cfg`).

    layout: that of the model, required for --token-labels.
    Raises UserError as `open_token_labels`.
    """
    config = resolve_input(args, pretrained_cfg)
    return TrainingInput(*_create_train_loader(args, train_set, config, num_classes, world, layout),
                         *create_eval_loader(args, val_set, config, world), config.img_size,
                         _name_in_words(train_set.classes, num_classes))


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
                           accum_steps=args.accum_steps, shard_offsets=dataset.shard_offsets())
    # Those of the next step, or of the next two (see engine/ahead.py).
    held = args.accum_steps * (2 if world.size > 1 else 1)
    loader = create_loader(dataset, _create_train_transform(args, config), sampler, seed=args.seed,
                           workers=args.workers, pin_memory=args.pin_mem and world.device.type == 'cuda',
                           max_bad_images=args.max_bad_images, held=held, token_labels=labels)
    return loader, _create_train_preparer(args, config, num_classes, world.device, layout)


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
    batch_size = args.batch_size * args.validation_batch_size_multiplier
    sampler = EvalSampler(len(dataset), batch_size, rank=world.rank, world_size=world.size)
    loader = create_loader(dataset, _create_eval_transform(args, config), sampler, seed=args.seed, workers=args.workers,
                           pin_memory=args.pin_mem and world.device.type == 'cuda',
                           max_bad_images=args.max_bad_val_images)
    return loader, prepare


def _create_eval_transform(args, config: InputConfig):
    return create_eval_transform(config.img_size, crop_pct=config.crop_pct, interpolation=config.interpolation,
                                 crop_mode=config.crop_mode, mean=config.mean, fast=args.fast_eval)
