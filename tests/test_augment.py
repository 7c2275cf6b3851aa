"""data/augment.py: each operation does to a tensor what timm's does to a PIL image, by the same draws."""

import random
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import auto_augment as timm_augment, create_transform

from data.augment import OPERATIONS, allow_zero_bits, as_image, rotate, take_tensors
from data.decode import EXTENSIONS, as_array, decode_rgb
from data.seeding import seed_generators

SEED = 23
PHOTOGRAPHS = Path(__file__).resolve().parents[2] / 'shared/data'
BILINEAR, BICUBIC = Image.Resampling.BILINEAR, Image.Resampling.BICUBIC
FILL = (124, 116, 104)

TABLES = {
    'auto_contrast': [()], 'equalize': [()], 'invert': [()], 'posterize': [(1,), (4,), (8,)],
    'solarize': [(0,), (30,), (256,)], 'solarize_add': [(0,), (99,)], 'brightness': [(0.1,), (1.0,), (1.83,)],
    'contrast': [(0.1,), (0.6,), (1.83,)], 'color': [(0.19,), (1.0,), (1.81,)], 'sharpness': [(0.19,), (1.81,)],
}
SHIFTS = {
    'shear_x': [(0.27,), (-0.3,), (0.0,)], 'shear_y': [(0.27,), (-0.3,), (0.01,)],
    'translate_x_rel': [(0.4,), (-0.0531,)], 'translate_y_rel': [(0.4,), (-0.0531,)],
    'translate_x_abs': [(13.3,), (-500.0,)], 'translate_y_abs': [(-3.7,), (0.0,)],
}


def smooth_image(number: int, size: tuple[int, int] = (48, 37)) -> Image.Image:
    noise = np.random.default_rng((SEED, number)).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, BICUBIC)


@pytest.fixture(scope='module')
def images():
    """Smooth ones, one of a single colour, one that is narrow, and noise."""
    print('seed', SEED)
    noise = np.random.default_rng(SEED).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    return [*map(smooth_image, range(8)), Image.new('RGB', (30, 20), (7, 90, 255)), smooth_image(9, (2, 50)),
            Image.fromarray(noise)]


def difference(name: str, arguments: tuple, image: Image.Image, **options) -> np.ndarray:
    """int [H, W, 3]: ours less timm's."""
    timms = getattr(timm_augment, name)
    ours = OPERATIONS[timms](as_array(image).contiguous(), *arguments, **options)
    assert ours.dtype == torch.uint8
    return ours.permute(1, 2, 0).numpy().astype(int) - np.asarray(timms(image, *arguments, **options))


@pytest.mark.parametrize('name', TABLES)
def test_colours_are_those_of_pil(images, name):
    for image in images:
        for arguments in TABLES[name]:
            assert not difference(name, arguments, image, resample=BICUBIC, fillcolor=FILL).any(), arguments


@pytest.mark.parametrize('resample', [BILINEAR, BICUBIC], ids=lambda value: value.name)
@pytest.mark.parametrize('name', SHIFTS)
def test_lines_are_moved_as_by_pil(images, name, resample):
    for image in images:
        for arguments in SHIFTS[name]:
            found = np.abs(difference(name, arguments, image, resample=resample, fillcolor=FILL))
            assert found.max() <= 1 and (found > 0).mean() < 0.06, arguments


def test_posterizing_to_no_bits_is_black(images):
    assert OPERATIONS[timm_augment.posterize](as_array(images[0]), 0).max() == 0


def test_images_are_turned_as_by_pil(images):
    image = images[0]
    for degrees in (20, -31.7, 0, 33.3):
        turned = rotate(as_array(image), degrees, resample=BICUBIC, fillcolor=FILL)
        assert as_image(turned).tobytes() == image.rotate(degrees, BICUBIC, fillcolor=FILL).tobytes()
        turned = rotate(as_array(image), degrees, resample=BILINEAR, fillcolor=FILL)
        expected = as_array(image.rotate(degrees, BILINEAR, fillcolor=FILL))
        distance = (turned.int() - expected.int()).abs()
        assert distance.max() <= 1 and distance.float().mean() < 0.01


def policies(policy: str, **options):
    """The augmentation of `policy` for PIL images and for tensors."""
    both = [create_transform(224, is_training=True, use_prefetcher=True, separate=True, auto_augment=policy,
                             **options)[1] for _ in range(2)]
    for augment in both:
        allow_zero_bits(augment)
    take_tensors(both[1])
    return both


def draws() -> tuple:
    """What the generators give next."""
    return random.random(), np.random.rand(), torch.rand(1).item()


@pytest.mark.parametrize('policy, options', [
    ('rand-m9-mstd0.5-inc1', {}), ('rand-m10-n4-p1.0-mstd0-inc1', {}),
    ('rand-m4-n3-mstd1', dict(interpolation='bilinear')), ('rand-m9-tweights', {}),
    ('original', {}), ('v0-mstd0.5', {}), ('3a', {}), ('augmix-m5-w2', {}), ('augmix-m10-mstd0.5', {}), (None, {}),
], ids=str)
def test_equal_seeds_make_equal_decisions(images, policy, options):
    timms, ours = policies(policy, color_jitter=0.4, **options)
    distances = []
    for seed in range(60):
        image = images[seed % 8]
        seed_generators(SEED, seed)
        expected = np.asarray(timms(image)).astype(int), draws()
        seed_generators(SEED, seed)
        found = ours(as_array(image)).permute(1, 2, 0).numpy(), draws()
        assert found[1] == expected[1]  # as many numbers of each kind
        distances.append(np.abs(found[0] - expected[0]).mean())
    # A table that follows a shift can make more of a level; another magnitude or operation changes tens of levels.
    assert np.mean(distances) < 0.05 and max(distances) < 2


def photographs(count: int) -> list[Image.Image]:
    """`count` images of 224 × 224: crops of the photographs beside the repository, where they are, else smooth ones."""
    archive = PHOTOGRAPHS / 'imagenet_sample.tar'
    if not archive.exists():
        return [smooth_image(number, (224, 224)) for number in range(count)]
    with tarfile.open(archive) as tar:
        files = [tar.extractfile(member).read() for member in tar
                 if member.isreg() and member.name.lower().endswith(EXTENSIONS)]
    generator = np.random.default_rng(SEED)
    crops = []
    for number in range(count):
        image = decode_rgb(files[number % len(files)], 'a photograph')
        part = min(image.size) * generator.uniform(0.4, 1)
        left, top = (generator.uniform(0, edge - part) for edge in image.size)
        crops.append(image.resize((224, 224), BICUBIC, box=(left, top, left + part, top + part)))
    return crops


@pytest.mark.slow
def test_the_statistics_of_every_operation_are_those_of_timm():
    """Over 1,000 images, each operation with its own draws of magnitude, sign and interpolation on either side."""
    crops = photographs(1000)
    timms, ours = policies('rand-m9-p1.0-mstd0.5-inc1')
    for theirs, mine in zip(timms.transforms[0].ops, ours.transforms[0].ops, strict=True):
        assert (theirs.name, theirs.magnitude, theirs.level_fn) == (mine.name, mine.magnitude, mine.level_fn)
        histograms, moments = np.zeros((2, 256)), []
        for number, image in enumerate(crops):
            seed_generators(SEED, number)
            expected = np.asarray(theirs(image))
            seed_generators(SEED, number)
            found = mine(as_array(image)).permute(1, 2, 0).numpy()
            for row, levels in enumerate((expected, found)):
                histograms[row] += np.bincount(levels.ravel(), minlength=256)
            moments.append((found.mean() - expected.mean(), found.std() - expected.std(),
                            np.abs(found.astype(int) - expected).mean()))
        # Where a shift is a multiple of a fifth, many sums are whole numbers but for PIL's rounding in float64.
        assert np.abs(moments).max() < 0.5, (theirs.name, np.abs(moments).max(0))
        assert np.abs(moments).mean(0).max() < 0.02, (theirs.name, np.abs(moments).mean(0))
        distance = np.abs(histograms[0] - histograms[1]).sum() / 2 / histograms[0].sum()
        assert distance < 0.02, (theirs.name, distance)
