"""data/samplers.py: which sample comes when on which rank; the same for any number of ranks, each once."""

import numpy as np
import pytest
import torch

from data.samplers import EvalSampler, TrainSampler
from utils.errors import UserError


def indices(sampler):
    return [[index for _, index, _ in batch] for batch in sampler]


@pytest.mark.parametrize('world_size', [2, 4])
def test_global_batches_do_not_depend_on_the_number_of_ranks(world_size):
    alone = TrainSampler(101, 8, seed=3)
    ranks = [TrainSampler(101, 8 // world_size, rank=rank, world_size=world_size, seed=3) for rank in range(world_size)]
    for epoch in (0, 1, 7):
        for sampler in (alone, *ranks):
            sampler.set_position(epoch)
        together = [sum(parts, []) for parts in zip(*map(indices, ranks), strict=True)]
        assert together == indices(alone)


@pytest.mark.parametrize('starts', [None, [0, 30, 61, 99, 131]])
@pytest.mark.parametrize(('world_size', 'batch_size', 'accum_steps'), [(1, 8, 3), (2, 4, 3), (3, 2, 4), (4, 6, 1)])
def test_a_step_of_as_many_images_is_of_the_same_ones(starts, world_size, batch_size, accum_steps):
    """However the 24 images of a step are shared, in the middle of an epoch too."""

    def steps(world_size, batch_size, accum_steps):
        ranks = [TrainSampler(131, batch_size, rank=rank, world_size=world_size, seed=3, accum_steps=accum_steps,
                              shard_offsets=starts) for rank in range(world_size)]
        for sampler in ranks:
            sampler.set_position(2, start_batch=accum_steps)
        batches = [sum(parts, []) for parts in zip(*map(indices, ranks), strict=True)]
        return [sum(batches[i:i + accum_steps], []) for i in range(0, len(batches), accum_steps)]

    assert steps(world_size, batch_size, accum_steps) == steps(1, 24, 1)
    assert len(steps(1, 24, 1)) == 4


def test_an_epoch_is_a_permutation_without_its_incomplete_end():
    sampler = TrainSampler(50, 8, seed=5)
    seen = sum(indices(sampler), [])
    assert len(seen) == len(set(seen)) == 48 and set(seen) <= set(range(50))
    assert seen != sorted(seen)
    assert len(sampler) == 6


def test_the_order_follows_epoch_and_seed_alone():
    def order(seed, epoch):
        sampler = TrainSampler(40, 10, seed=seed)
        sampler.set_position(epoch)
        return indices(sampler)

    assert order(0, 1) == order(0, 1)
    assert order(0, 1) != order(0, 2)
    assert order(0, 1) != order(1, 1)
    assert order(0, 1) != order(1, 0)  # as a sum of seed and epoch would have it


def test_without_shuffling_it_is_the_order_of_the_dataset():
    assert sum(indices(TrainSampler(20, 4, shuffle=False)), []) == list(range(20))


def test_keys_carry_the_epoch_and_a_position_is_the_rest_of_the_epoch():
    sampler = TrainSampler(40, 4, seed=1, rank=1, world_size=2)
    sampler.set_position(9)
    whole = list(sampler)
    assert {epoch for batch in whole for epoch, _, _ in batch} == {9}
    for start in (0, 2, len(sampler)):
        sampler.set_position(9, start)
        assert list(sampler) == whole[start:]
        assert len(sampler) == 5


def test_batches_fill_groups_of_accumulation_steps():
    assert len(TrainSampler(70, 10, accum_steps=1)) == 7
    assert len(TrainSampler(70, 10, accum_steps=3)) == 6
    assert len(indices(TrainSampler(70, 10, accum_steps=3))) == 6


@pytest.mark.parametrize('arguments, remedy', [
    (dict(num_samples=10, batch_size=8, world_size=2), 'batch size of at most 5'),
    (dict(num_samples=10, batch_size=2, world_size=2, accum_steps=3), 'batch size of at most 1'),
    (dict(num_samples=3, batch_size=1, world_size=4), 'fewer processes'),
    (dict(num_samples=10, batch_size=0), 'at least 1'),
])
def test_too_few_samples_for_a_step_are_an_error_with_numbers_that_fit(arguments, remedy):
    with pytest.raises(UserError, match=remedy):
        TrainSampler(**arguments)


def test_the_batch_size_that_the_error_proposes_fits():
    assert len(TrainSampler(10, 5, world_size=2)) == 1
    assert len(TrainSampler(10, 1, world_size=2, accum_steps=3)) == 3


@pytest.mark.parametrize('world_size', [1, 2, 3])
def test_evaluation_meets_every_sample_exactly_once(world_size):
    for num_samples in range(1, 34):
        for batch_size in (1, 4, 16):
            ranks = [EvalSampler(num_samples, batch_size, rank=rank, world_size=world_size)
                     for rank in range(world_size)]
            batches = [indices(sampler) for sampler in ranks]
            assert sorted(sum(sum(batches, []), [])) == list(range(num_samples))
            assert [len(sampler) for sampler in ranks] == [len(rank) for rank in batches]
            assert all(0 < len(batch) <= batch_size for rank in batches for batch in rank)


# ---------------------------------------------------------------------------------------------------------------------
# An order with locality

STARTS = np.concatenate([[0], np.cumsum(np.random.default_rng(0).integers(40, 60, 200))])


def global_order(world_size, global_batch=64, *, epoch=2, start=0, starts=STARTS, **options):
    """[batches, ranks, samples]"""
    ranks = [TrainSampler(int(starts[-1]), global_batch // world_size, rank=rank, world_size=world_size,
                          shard_offsets=starts, **options) for rank in range(world_size)]
    for sampler in ranks:
        sampler.set_position(epoch, start)
    return np.stack([sampler.remaining() for sampler in ranks], axis=1)


def test_with_locality_too_an_epoch_is_a_permutation():
    for global_batch in (1, 6, 48, 64, 1000):
        order = global_order(1, global_batch).ravel()
        assert len(order) == len(set(order.tolist())) == STARTS[-1] // global_batch * global_batch
        assert order.min() >= 0 and order.max() < STARTS[-1]


@pytest.mark.parametrize('world_size', [2, 4, 64])
def test_with_locality_too_it_is_the_same_for_any_number_of_ranks_and_after_a_resume(world_size):
    alone = global_order(1)
    assert (global_order(world_size).reshape(alone.shape) == alone).all()
    assert (global_order(world_size, start=17) == global_order(world_size)[17:]).all()
    assert (global_order(1, 16, accum_steps=4).ravel() == alone.ravel()).all(), 'what counts is an optimizer step'


def test_with_locality_too_it_follows_epoch_and_seed_alone():
    assert (global_order(1) == global_order(1)).all()
    assert not (global_order(1, epoch=3) == global_order(1)).all()
    assert not (global_order(1, seed=1) == global_order(1)).all()


def test_few_shards_are_in_use_at_a_time_and_ranks_have_shards_of_their_own():
    def shards(samples):
        return len(np.unique(np.searchsorted(STARTS, samples.ravel(), 'right')))

    order = global_order(1)
    # 32 lanes of 6 shards' length each; windows of two shards' length may touch four.
    assert max(shards(order[batch:batch + 3]) for batch in range(len(order))) <= 32 * 4
    assert shards(global_order(1, 1, epoch=0)[:90]) <= 4, 'of one lane, two shards at a time'
    for world_size in (2, 8, 32):
        own = [shards(global_order(world_size)[:, rank]) for rank in range(world_size)]
        assert max(own) <= 200 / world_size + 3


def test_with_locality_neighbours_are_shuffled_and_shards_come_in_another_order_every_epoch():
    starts = np.arange(0, 20 * 100 + 1, 100)
    order = global_order(1, 1, starts=starts).ravel()
    assert not (np.sort(order[:200]) == order[:200]).all()
    assert len({shard for shard in order[:200] // 100}) == 2 and set(order[:200]) == set(
        sample for shard in set(order[:200] // 100) for sample in range(shard * 100, shard * 100 + 100))
    firsts = {tuple(sorted(set(global_order(1, 1, epoch=epoch, starts=starts).ravel()[:200] // 100)))
              for epoch in range(8)}
    assert len(firsts) > 4


def test_evaluation_says_what_remains():
    assert EvalSampler(10, 2, rank=1, world_size=3).remaining().tolist() == [1, 4, 7]


# --- Balanced classes, repeated images --------------------------------------------------------------------------------

TARGETS = np.repeat([0, 1, 3], [50, 5, 26])  # class 2 has no image


def whole_epoch(world_size, batch_size, **options):
    """The keys of the second epoch's global batches."""
    ranks = [TrainSampler(len(TARGETS), batch_size, rank=rank, world_size=world_size, seed=3, **options)
             for rank in range(world_size)]
    for sampler in ranks:
        sampler.set_position(1)
    return [sum(parts, []) for parts in zip(*ranks, strict=True)]


@pytest.mark.parametrize('options', [{'targets': TARGETS}, {'repeats': 3}, {'targets': TARGETS, 'repeats': 3}])
def test_a_step_of_balanced_or_repeated_images_is_of_the_same_ones_on_any_number_of_ranks(options):
    alone = whole_epoch(1, 8, **options)
    for world_size in (2, 4):
        together = whole_epoch(world_size, 8 // world_size, **options)
        assert [sorted(batch) for batch in together] == [sorted(batch) for batch in alone]
    assert len(alone) == 10
    keys = sum(alone, [])
    assert len(set(keys)) == len(keys), 'an image that comes again must be augmented otherwise'
    seen: dict[int, int] = {}
    for _, index, repeat in keys:
        assert repeat == seen.get(index, 0)
        seen[index] = repeat + 1
    part = TrainSampler(len(TARGETS), 4, rank=1, world_size=2, seed=3, **options)
    part.set_position(1)
    whole = list(part)
    part.set_position(1, 7)
    assert list(part) == whole[7:] and part.remaining().tolist() == [[key[1] for key in batch] for batch in whole[7:]]


def test_balanced_classes_come_equally_often_and_their_images_too():
    indices = [index for _, index, _ in sum(whole_epoch(1, 27, targets=TARGETS), [])]
    assert len(indices) == len(TARGETS)
    assert np.bincount(TARGETS[indices], minlength=4).tolist() == [27, 27, 0, 27]
    times = np.bincount(indices, minlength=len(TARGETS))
    assert set(times[:50]) == {0, 1} and set(times[50:55]) == {5, 6} and set(times[55:]) == {1, 2}
    assert (np.diff(TARGETS[indices]) != 0).sum() > 40, 'classes are mixed'
    counts = np.bincount(TARGETS[[index for _, index, _ in sum(whole_epoch(1, 10, targets=TARGETS), [])]])
    assert counts.max() - counts[counts > 0].min() <= 4  # one more, and one in the batch that is left out


def test_shards_that_are_fetched_are_not_balanced():
    with pytest.raises(UserError, match='--sampler balanced: these shards are fetched one by one'):
        TrainSampler(len(TARGETS), 4, targets=TARGETS, shard_offsets=[0, 40, len(TARGETS)])


def test_repeats_are_those_of_timm():
    """The same images in the same places of the same ranks, from the same permutation."""
    from timm.data.distributed_sampler import RepeatAugSampler

    for rank in range(2):
        theirs = RepeatAugSampler(range(48), num_replicas=2, rank=rank, num_repeats=3, selected_round=0)
        theirs.set_epoch(5)
        ours = TrainSampler(48, 8, rank=rank, world_size=2, repeats=3)
        ours._generator = lambda: torch.Generator().manual_seed(5)
        assert sum(indices(ours), []) == list(theirs) and len(ours) == 3


def test_repeats_of_shards_from_elsewhere_keep_their_order():
    starts = [0, 30, 61, 99, 131]
    plain, repeated = (TrainSampler(131, 24, seed=3, shard_offsets=starts, **options)
                       for options in ({}, {'repeats': 3}))
    order = sum(indices(repeated), [])
    assert order[::3] == sum(indices(plain), [])[:len(order) // 3] and order[::3] == order[1::3] == order[2::3]
