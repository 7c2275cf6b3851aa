"""data/batch.py: normalising, mixing and erasing are timm's, in order, from the global generators."""

import random

import numpy as np
import pytest
import torch
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing

from data.batch import BatchPreparer, PairwiseMixup, TrainBatchPreparer
from utils.errors import UserError

SEED = 3
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.fixture
def batch():
    print('seed', SEED)
    generator = torch.Generator().manual_seed(SEED)
    images = torch.randint(0, 256, (8, 3, 20, 24), dtype=torch.uint8, generator=generator)
    return images, torch.arange(8) % 5


@pytest.fixture(autouse=True)
def seeded():
    random.seed(SEED)
    np.random.seed(SEED)
    torch.manual_seed(SEED)


def normalised(images):
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    return (images / 255 - mean) / std


@pytest.mark.parametrize('channels_last', [False, True])
def test_normalising(batch, channels_last):
    before = batch[0].clone()
    images, targets = BatchPreparer('cpu', channels_last=channels_last)(*batch)
    assert images.dtype == torch.float32 and torch.equal(targets, batch[1])
    torch.testing.assert_close(images, normalised(batch[0]), rtol=1e-5, atol=1e-5)
    assert images.is_contiguous(memory_format=torch.channels_last) == channels_last
    assert torch.equal(batch[0], before)  # pinned memory that the loader may still need


def test_one_mean_and_std_for_all_channels(batch):
    images, _ = BatchPreparer('cpu', mean=(0.5,), std=(0.25,))(*batch)
    torch.testing.assert_close(images, (batch[0] / 255 - 0.5) / 0.25, rtol=1e-5, atol=1e-5)
    with pytest.raises(UserError, match='std'):
        BatchPreparer('cpu', std=(0.1, 0.2))


def test_training_without_mixing_keeps_hard_targets(batch):
    prepare = TrainBatchPreparer('cpu', batch_size=8, num_classes=5)
    images, targets = prepare(*batch)
    assert torch.equal(images, BatchPreparer('cpu')(*batch)[0]) and torch.equal(targets, batch[1])
    assert not prepare.mixing and not prepare.mixup_enabled


@pytest.mark.parametrize('mode', ['batch', 'pair', 'elem'])
@pytest.mark.parametrize('alphas', [
    (0.8, 0.0, None), (0.0, 1.0, None), (0.8, 1.0, None), (0.0, 0.0, (0.2, 0.8)),
], ids=str)
def test_mixing_is_timms_and_repeats_from_saved_states(batch, mode, alphas):
    mixup_alpha, cutmix_alpha, minmax = alphas
    prepare = TrainBatchPreparer('cpu', batch_size=8, num_classes=5, mixup_alpha=mixup_alpha,
                                 cutmix_alpha=cutmix_alpha, cutmix_minmax=minmax, mixup_mode=mode, smoothing=0.1)
    reference = Mixup(mixup_alpha, cutmix_alpha, minmax, mode=mode, label_smoothing=0.1, num_classes=5)
    for _ in range(4):
        state = np.random.get_state()
        images, targets = prepare(*batch)
        np.random.set_state(state)
        again = prepare(*batch)
        np.random.set_state(state)
        expected = reference(BatchPreparer('cpu')(*batch)[0], batch[1])
        for results in ((images, targets), again):
            assert torch.equal(results[0], expected[0]) and torch.equal(results[1], expected[1])
        assert targets.shape == (8, 5) and torch.allclose(targets.sum(1), torch.ones(8))
        assert not torch.equal(images, BatchPreparer('cpu')(*batch)[0])


def test_mixing_can_be_turned_off_and_targets_stay_smoothed(batch):
    prepare = TrainBatchPreparer('cpu', batch_size=8, num_classes=5, mixup_alpha=0.8, cutmix_alpha=1.0, smoothing=0.1)
    assert prepare.mixup_enabled
    prepare.mixup_enabled = False
    assert not prepare.mixup_enabled and prepare.mixing
    images, targets = prepare(*batch)
    assert torch.equal(images, BatchPreparer('cpu')(*batch)[0])
    expected = torch.nn.functional.one_hot(batch[1], 5) * 0.9 + 0.02
    torch.testing.assert_close(targets, expected)


@pytest.mark.parametrize('mode', ['pixel', 'rand', 'const'])
def test_erasing_is_timms_and_repeats_from_saved_states(batch, mode):
    prepare = TrainBatchPreparer('cpu', batch_size=8, num_classes=5, erase_prob=0.7, erase_mode=mode, erase_count=3)
    reference = RandomErasing(0.7, mode=mode, max_count=3, device='cpu')
    states = random.getstate(), torch.get_rng_state()
    images, _ = prepare(*batch)
    for repeat in (lambda: prepare(*batch)[0], lambda: reference(BatchPreparer('cpu')(*batch)[0])):
        random.setstate(states[0])
        torch.set_rng_state(states[1])
        assert torch.equal(repeat(), images)
    changed = (images != BatchPreparer('cpu')(*batch)[0]).flatten(1).any(1)
    assert 0 < changed.sum() < 8


def test_erasing_comes_after_mixing(batch):
    prepare = TrainBatchPreparer('cpu', batch_size=8, num_classes=5, mixup_alpha=0.8, erase_prob=1.0,
                                 erase_mode='const')
    images, _ = prepare(*batch)
    # Mixed after erasing, a zero would only be left where the erased regions of two images meet.
    assert ((images == 0).all(dim=1).flatten(1).sum(1) > 5).all()


def test_splits_come_out_one_after_the_other_and_the_first_is_not_erased(batch):
    splits = torch.stack([batch[0], batch[0] // 2, batch[0] // 3], dim=1)  # [B, S, C, H, W]
    prepare = TrainBatchPreparer('cpu', batch_size=8, num_classes=5, aug_splits=3, erase_prob=1.0, erase_splits=True)
    images, targets = prepare(splits, batch[1])
    assert images.shape == (24, 3, 20, 24)
    assert torch.equal(targets, batch[1].repeat(3))
    for number, divisor in enumerate((1, 2, 3)):
        same = images[8 * number:8 * number + 8] == normalised_exactly(batch[0] // divisor)
        assert same.float().mean() > 0.5
        assert same.flatten(1).all(1).tolist() == [number == 0] * 8


def test_without_augmix_the_first_half_can_be_spared(batch):
    prepare = TrainBatchPreparer('cpu', batch_size=8, num_classes=5, erase_prob=1.0, erase_splits=True)
    same = (prepare(*batch)[0] == normalised_exactly(batch[0])).flatten(1).all(1)
    assert same.tolist() == [True] * 4 + [False] * 4


def normalised_exactly(images):
    return BatchPreparer('cpu')(images, torch.zeros(len(images)))[0]


@pytest.mark.parametrize('options, named', [
    (dict(batch_size=7, mixup_alpha=0.8), 'batch size 7'),
    (dict(cutmix_alpha=1.0, aug_splits=3), '--aug-splits 3'),
    (dict(mixup_alpha=0.8, mixup_mode='half'), 'half'),
    (dict(mixup_alpha=-1.0), '-1.0'),
    (dict(cutmix_minmax=(0.8, 0.2)), '--cutmix-minmax'),
    (dict(mixup_prob=1.5), 'mixup_prob 1.5'),
    (dict(erase_prob=0.2, erase_mode='noise'), 'noise'),
    (dict(erase_prob=0.2, erase_count=0), 'erase_count 0'),
    (dict(smoothing=-0.1), 'smoothing'),
], ids=str)
def test_mistakes_are_explained_when_the_preparer_is_made(options, named):
    with pytest.raises(UserError, match=named) as caught:
        TrainBatchPreparer('cpu', **{'batch_size': 8, 'num_classes': 5} | options)
    assert '\n' not in str(caught.value) and ';' in str(caught.value)


def test_an_odd_batch_is_fine_without_mixing():
    TrainBatchPreparer('cpu', batch_size=7, num_classes=5, erase_prob=0.2)


@pytest.mark.parametrize('options', [
    dict(mixup_alpha=0.8, cutmix_alpha=1.0), dict(mixup_alpha=0.8, prob=0.5), dict(cutmix_alpha=1.0, mixup_alpha=0.0),
    dict(cutmix_minmax=(0.2, 0.8)), dict(mixup_alpha=0.8, cutmix_alpha=1.0, mode='elem'),
], ids=str)
def test_pairs_are_mixed_as_by_timm(batch, options):
    images = batch[0].float()
    for seed in range(12):
        results = []
        for kind in (Mixup, PairwiseMixup):
            np.random.seed(seed)
            results.append((*kind(num_classes=5, **options)(images.clone(), batch[1]), np.random.rand()))
        (expected, expected_targets, draw), (found, targets, found_draw) = results
        assert torch.equal(found, expected) and torch.equal(targets, expected_targets) and found_draw == draw


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU')
def test_batches_from_pinned_memory_arrive_whole():
    """Copies have a stream of their own: the one that computes must wait for them, and free memory must wait for it."""
    prepare, alone = BatchPreparer('cuda'), BatchPreparer('cpu')
    batches = [torch.full((64, 3, 64, 64), level, dtype=torch.uint8) for level in range(40)]
    found = [prepare(batch.pin_memory(), torch.zeros(64, dtype=torch.int64).pin_memory())[0] for batch in batches]
    for images, batch in zip(found, batches, strict=True):
        torch.testing.assert_close(images.cpu(), alone(batch, torch.zeros(64))[0])
