"""data/transforms.py: the pixels are timm's, uint8, or in the fast forms near them, and mistakes are explained."""

import logging
import random

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform
from timm.data.transforms import RandomResizedCropAndInterpolation

from data.decode import EncodedImage
from data.seeding import seed_generators
from data.transforms import (
    FastEvalTransform,
    FastTrainTransform,
    create_eval_transform,
    create_train_transform,
    draw_crop,
)
from utils.errors import UserError

SEED = 7


@pytest.fixture
def image():
    print('seed', SEED)
    noise = np.random.default_rng(SEED).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((120, 90), Image.Resampling.BICUBIC)


def drawn(transform, image, seed):
    seed_generators(seed)
    return transform(image)


@pytest.mark.parametrize('size', [48, (48, 32)])
@pytest.mark.parametrize('options', [
    {}, {'auto_augment': None}, {'auto_augment': '3a', 'interpolation': 'bicubic'}, {'no_aug': True},
    {'vflip': 0.5, 'scale': (0.5, 1.0)},
], ids=str)
def test_training_pixels_are_those_of_timm(image, size, options):
    ours = create_train_transform(size, fast=False, **options)
    recipe = dict(auto_augment='rand-m9-mstd0.5-inc1', interpolation='random', color_jitter=0.4)
    timms = create_transform(size, is_training=True, use_prefetcher=True, **recipe | options)
    results = [drawn(ours, image, seed) for seed in range(6)]
    for seed, result in enumerate(results):
        assert result.dtype == torch.uint8
        assert result.shape == (3, *(size if isinstance(size, tuple) else (size, size)))
        assert torch.equal(result, drawn(timms, image, seed))
    assert torch.equal(results[0], results[1]) == ('no_aug' in options)


def image_of(size, seed):
    noise = np.random.default_rng((SEED, seed)).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


@pytest.mark.parametrize('options', [
    {}, {'interpolation': 'bicubic', 'vflip': 0.5}, {'scale': (0.9, 1.0), 'ratio': (0.2, 0.3)},
], ids=str)
def test_the_fast_form_crops_flips_and_resizes_as_timm(options):
    """A pixel of the crop more or less, the other filter or no flip would be more than the levels allowed."""
    options = dict(auto_augment=None, color_jitter=0) | options
    fast, timms = (create_train_transform((36, 48), fast=fast, **options) for fast in (True, False))
    assert isinstance(fast, FastTrainTransform) and fast.takes_encoded
    for seed in range(60):
        image = image_of([(120, 90), (31, 77), (300, 8), (48, 36), (1, 1)][seed % 5], seed)
        expected = drawn(timms, image, seed), random.random(), torch.rand(1)
        found = drawn(fast, EncodedImage(image, 'image'), seed), random.random(), torch.rand(1)
        assert found[1:] == expected[1:] and found[0].dtype == torch.uint8
        distance = (found[0].int() - expected[0].int()).abs()
        assert distance.max() <= 2 and distance.float().mean() < 0.1


@pytest.mark.parametrize(('scale', 'ratio'), [((0.08, 1.0), (3 / 4, 4 / 3)), ((0.9, 1.0), (0.2, 0.3))])
def test_crops_are_drawn_as_by_timm(scale, ratio):
    sizes = [(120, 90), (31, 77), (300, 8), (8, 300), (48, 36), (1, 1), (224, 224)]
    for seed in range(300):
        width, height = sizes[seed % len(sizes)]
        random.seed(seed)
        expected = RandomResizedCropAndInterpolation.get_params(Image.new('L', (width, height)), scale, ratio)
        after = random.random()
        random.seed(seed)
        assert draw_crop(height, width, scale, ratio) == expected and random.random() == after


def test_the_fast_form_of_the_whole_recipe_is_near_that_of_timm():
    fast, timms = (create_train_transform(64, fast=fast) for fast in (True, False))
    distances = []
    for seed in range(120):
        image = image_of((120, 90), seed % 10)
        difference = drawn(fast, EncodedImage(image, 'image'), seed).int() - drawn(timms, image, seed).int()
        distances.append(difference.abs().float().mean())
    assert np.mean(distances) < 0.2


@pytest.mark.parametrize('options', [
    {'crop_mode': 'pad'}, {'aug_splits': 2, 'auto_augment': 'augmix-m3'}, {'interpolation': 'lanczos'},
], ids=str)
def test_what_has_no_fast_form_is_timms_and_said(caplog, options):
    with caplog.at_level(logging.INFO):
        transform = create_train_transform(32, **options)
    assert not getattr(transform, 'takes_encoded', False)
    name, = caplog.messages
    assert next(iter(options)) in name and 'no fast form' in name


@pytest.mark.parametrize('size', [40, (40, 24)])
@pytest.mark.parametrize('options', [{}, {'crop_pct': 1.0, 'interpolation': 'bilinear'}, {'crop_mode': 'squash'}],
                         ids=str)
def test_fast_evaluation_is_near_that_of_timm(caplog, size, options):
    fast, timms = (create_eval_transform(size, fast=fast, **options) for fast in (True, False))
    has_form = size == 40 or options.get('crop_mode') == 'squash'
    assert isinstance(fast, FastEvalTransform) == has_form
    for seed, shape in enumerate([(120, 90), (31, 77), (300, 20), (44, 44), (12, 200)] * has_form):
        image = image_of(shape, seed)
        found, expected = fast(EncodedImage(image, 'image')), timms(image)
        assert found.dtype == torch.uint8 and found.shape == expected.shape
        distance = (found.int() - expected.int()).abs()
        assert distance.max() <= 2 and distance.float().mean() < 0.1


@pytest.mark.parametrize('size, shape', [(40, (40, 40)), ((40, 24), (40, 24))])
def test_pad_mode_crops_out_of_a_frame_of_an_eighth(size, shape):
    white = Image.new('RGB', (60, 60), 'white')
    transform = create_train_transform(size, crop_mode='pad', auto_augment=None, color_jitter=0, hflip=0)
    borders = set()
    for seed in range(60):
        result = drawn(transform, white, seed)
        assert result.shape == (3, *shape)
        rows = (result[0] > 0).any(dim=1).nonzero()
        borders.add((rows[0].item(), shape[0] - 1 - rows[-1].item()))
    assert {top for top, _ in borders} >= {0, 5} and max(max(pair) for pair in borders) == shape[0] // 8
    assert all(0 in pair for pair in borders)  # black on one side at most


def test_pad_mode_flips_and_augments_if_asked(image):
    plain = create_train_transform(32, crop_mode='pad', auto_augment=None, color_jitter=0, hflip=0)
    flipped = create_train_transform(32, crop_mode='pad', auto_augment=None, color_jitter=0, hflip=1.0)
    augmented = create_train_transform(32, crop_mode='pad', auto_augment='rand-m9-p1.0', hflip=0)
    assert torch.equal(drawn(flipped, image, 3), drawn(plain, image, 3).flip(2))
    assert not torch.equal(drawn(augmented, image, 3), drawn(plain, image, 3))


def test_corners_that_augmentation_uncovers_get_the_mean():
    white = Image.new('RGB', (64, 64), 'white')
    mean = (0.1, 0.5, 0.9)
    options = dict(scale=(1.0, 1.0), ratio=(1.0, 1.0), auto_augment='rand-m10-n4-p1.0-mstd0', fast=False)
    transform = create_train_transform(64, mean=mean, **options)
    expected = torch.tensor([round(255 * value) for value in mean], dtype=torch.uint8)
    found = 0
    for seed in range(40):
        result = drawn(transform, white, seed)
        found += (result == expected[:, None, None]).all(dim=0).sum().item() > 10
    assert found > 5


@pytest.mark.parametrize('fast', [False, True])
@pytest.mark.parametrize('policy', [
    'rand-m10-n6-p1.0-mstd0-inc1', 'rand-m0-n6-p1.0-mstd0', 'augmix-m10-w3-mstd0.5', 'original', 'v0-mstd0.5', '3a',
])
def test_no_policy_fails_at_its_ends(image, policy, fast):
    transform = create_train_transform(24, fast=fast, auto_augment=policy, scale=(1.0, 1.0), hflip=0)
    image = EncodedImage(image, 'image') if fast else image
    assert len({drawn(transform, image, seed).numpy().tobytes() for seed in range(60)}) > 20


def test_posterizing_to_no_bits_is_black(image):
    augment = create_train_transform(24, auto_augment='rand-m10-mstd0-inc1', fast=False).transforms[2]
    operation, = [operation for operation in augment.ops if operation.name == 'PosterizeIncreasing']
    operation.prob = 1.0
    assert np.asarray(operation(image)).max() == 0


def test_splits_are_one_clean_crop_and_augmentations_of_it(image):
    options = dict(scale=(0.5, 1.0), interpolation='bilinear')
    splits = drawn(create_train_transform(48, aug_splits=3, auto_augment='augmix-m5-w4-d2', **options), image, 5)
    clean = drawn(create_train_transform(48, auto_augment=None, color_jitter=0, fast=False, **options), image, 5)
    assert splits.shape == (3, 3, 48, 48) and splits.dtype == torch.uint8
    assert torch.equal(splits[0], clean)
    assert not torch.equal(splits[1], clean) and not torch.equal(splits[1], splits[2])
    difference = (splits[1].float() - clean.float()).abs().mean()
    assert difference < (splits[1].float() - clean.flip(1).float()).abs().mean()


@pytest.mark.parametrize('size', [40, (48, 32)])
@pytest.mark.parametrize('options', [
    {}, {'crop_pct': 1.0, 'interpolation': 'bilinear'}, {'crop_mode': 'squash'}, {'crop_mode': 'border'},
], ids=str)
def test_evaluation_pixels_are_those_of_timm(image, size, options):
    ours = create_eval_transform(size, **options)
    recipe = dict(crop_pct=0.9, interpolation='bicubic')
    state = random.getstate(), torch.get_rng_state()
    result = ours(image)
    assert random.getstate() == state[0] and torch.equal(torch.get_rng_state(), state[1])
    assert torch.equal(result, create_transform(size, use_prefetcher=True, **recipe | options)(image))
    assert result.dtype == torch.uint8


@pytest.mark.parametrize('create, arguments, named', [
    (create_train_transform, dict(auto_augment='rand-m9-x5'), 'rand-m9-x5'),
    (create_train_transform, dict(auto_augment='nonsense'), 'nonsense'),
    (create_train_transform, dict(interpolation='cubic'), 'cubic'),
    (create_train_transform, dict(crop_mode='center'), 'center'),
    (create_train_transform, dict(scale=(1.0, 0.08)), 'scale'),
    (create_train_transform, dict(ratio=(0.0, 1.0)), 'ratio'),
    (create_train_transform, dict(aug_splits=1), '--aug-splits 1'),
    (create_train_transform, dict(aug_splits=3, no_aug=True), '--no-aug'),
    (create_train_transform, dict(mean=(0.5, 0.5)), 'mean'),
    (create_eval_transform, dict(img_size=0), 'img_size 0'),
    (create_eval_transform, dict(img_size=(8, 8, 8)), 'img_size'),
    (create_eval_transform, dict(crop_pct=90), '--crop-pct 90'),
    (create_eval_transform, dict(interpolation='random'), 'random'),
], ids=lambda value: getattr(value, '__name__', str(value)))
def test_mistakes_are_explained_in_one_line(create, arguments, named):
    with pytest.raises(UserError, match=named) as caught:
        create(**arguments)
    assert '\n' not in str(caught.value) and ';' in str(caught.value)


def test_one_mean_is_for_all_channels(image):
    options = dict(auto_augment='rand-m9-p1.0', fast=False)
    one = create_train_transform(32, mean=(0.5,), **options)
    three = create_train_transform(32, mean=(0.5, 0.5, 0.5), **options)
    assert all(torch.equal(drawn(one, image, seed), drawn(three, image, seed)) for seed in range(10))


@pytest.mark.parametrize('size', [(100, 350), (150, 400), (90, 200), (300, 301), (301, 300), (99, 1000)])
def test_tall_images_are_resized_in_the_order_of_pil(size):
    """PIL resizes some images along columns first; in the other order, pixels differ by up to 20 levels."""
    noise = np.random.default_rng(SEED).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    timms = create_eval_transform(64, crop_pct=1.0)(image)
    fast = create_eval_transform(64, crop_pct=1.0, fast=True)(EncodedImage(image, 'noise'))
    assert (torch.as_tensor(timms).int() - fast.int()).abs().max() <= 1
    options = {'auto_augment': None, 'color_jitter': None, 'hflip': 0.0, 'interpolation': 'bicubic'}
    slow, quick = (create_train_transform(48, fast=fast, **options) for fast in (False, True))
    for seed in range(8):
        expected, found = drawn(slow, image, seed), drawn(quick, EncodedImage(image, 'noise'), seed)
        assert (torch.as_tensor(expected).int() - found.int()).abs().max() <= 1
