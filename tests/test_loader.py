"""data/loader.py: the same bytes for any workers and from any position; bad images; dead workers."""

import logging
import multiprocessing
import multiprocessing.queues
import os
import pickle
import random
import shutil
import signal
import subprocess
import tempfile
import time

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import ImageDataset as TimmImageDataset, create_loader as create_timm_loader

from data.batch import BatchPreparer
from data.datasets import open_eval
from data.loader import BatchSource, _socket_folder, create_loader, explain_worker_death
from data.memory import BatchMemory
from data.samplers import EvalSampler, TrainSampler
from data.seeding import derive_seed
from data.transforms import create_eval_transform, create_train_transform
from utils.errors import UserError

SEED = 11


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A split with two classes of 20 images each, of different sizes."""
    print('seed', SEED)
    root = tmp_path_factory.mktemp('images')
    generator = np.random.default_rng(SEED)
    for number in range(40):
        path = root / f'class{number // 20}' / f'{number:02}.{"jpg" if number % 3 else "png"}'
        path.parent.mkdir(exist_ok=True)
        height, width = generator.integers(30, 60, 2)
        noise = generator.integers(0, 256, (5, 5, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((int(width), int(height)), Image.Resampling.BICUBIC).save(path)
    return root


@pytest.fixture
def damaged(folder, tmp_path):
    """The same with number 7 truncated and number 39, the last, empty."""
    for path in sorted(folder.rglob('*.*g')):
        copy = tmp_path / path.relative_to(folder)
        copy.parent.mkdir(exist_ok=True)
        content = path.read_bytes()
        copy.write_bytes({'07': content[:-150], '39': b''}.get(path.stem, content))
    return tmp_path


@pytest.fixture
def train_transform():
    return create_train_transform(24, auto_augment='rand-m9-mstd0.5-inc1')


@pytest.fixture
def loader_of():
    """create_loader with another order of arguments, whose loaders are closed at the end."""
    loaders = []

    def create(root, sampler, transform=None, workers=0, **options):
        dataset = open_eval('folder', root)
        loaders.append(create_loader(dataset, transform or create_eval_transform(24), sampler, workers=workers,
                                     seed=SEED, **options))
        return loaders[-1]

    yield create
    for loader in loaders:
        loader.close()


def epoch_of(loader, epoch, start_batch=0):
    """All images and targets of an epoch, from a batch on."""
    loader.set_position(epoch, start_batch)
    batches = list(loader)
    return torch.cat([images for images, _ in batches]), torch.cat([targets for _, targets in batches])


def test_workers_and_position_do_not_change_a_byte(loader_of, folder, train_transform):
    reference = loader_of(folder, TrainSampler(40, 8), train_transform)
    expected = {epoch: epoch_of(reference, epoch) for epoch in (0, 1, 2)}
    with_workers = loader_of(folder, TrainSampler(40, 8), train_transform, workers=2)
    for epoch, start in ((0, 0), (1, 0), (2, 3), (1, 4), (2, 0)):  # persistent workers, forth and back
        images, targets = epoch_of(with_workers, epoch, start)
        assert images.dtype == torch.uint8 and targets.dtype == torch.int64
        assert torch.equal(images, expected[epoch][0][8 * start:])
        assert torch.equal(targets, expected[epoch][1][8 * start:])
    assert not torch.equal(expected[0][0], expected[1][0])
    assert len(with_workers) == 5


def test_ranks_load_what_one_rank_would(loader_of, folder, train_transform):
    alone = epoch_of(loader_of(folder, TrainSampler(40, 8), train_transform), 1)[0]
    samplers = [TrainSampler(40, 4, rank=rank, world_size=2) for rank in (0, 1)]
    ranks = [loader_of(folder, sampler, train_transform) for sampler in samplers]
    parts = [epoch_of(loader, 1)[0].unflatten(0, (5, 4)) for loader in ranks]
    assert torch.equal(torch.cat(parts, dim=1).flatten(0, 1), alone)


def test_a_repeat_is_augmented_otherwise_and_the_first_time_as_ever(loader_of, folder, train_transform):
    sampler = TrainSampler(40, 6, repeats=3)
    images, targets = epoch_of(loader_of(folder, sampler, train_transform), 1)
    first = sampler.remaining().ravel()[::3]
    assert len(images) == 36 and targets[::3].tolist() == targets[1::3].tolist() == targets[2::3].tolist()
    assert not any(torch.equal(images[k + i], images[k + j]) for k in range(0, 36, 3) for i, j in ((0, 1), (1, 2)))
    plain = TrainSampler(40, 6)
    plain.set_position(1)
    assert plain.remaining().ravel()[:12].tolist() == first.tolist()
    assert torch.equal(images[::3], epoch_of(loader_of(folder, plain, train_transform), 1)[0][:12])
    assert torch.equal(images[24:], epoch_of(loader_of(folder, sampler, train_transform, workers=2), 1, 4)[0])


def test_the_augmentation_of_a_sample_is_new_in_every_epoch_and_with_every_seed(folder, train_transform):
    dataset = open_eval('folder', folder)
    keys = [(seed, epoch) for seed in (1, 2) for epoch in (0, 1, 2)]
    versions = []
    for seed, epoch in keys:
        source = BatchSource(dataset, train_transform, training=True, seed=seed, max_bad_images=0,
                             memory=BatchMemory(0, 1))
        versions.append(source.__getitems__([(epoch, 5, 0)])[0])
    assert len({version.numpy().tobytes() for version in versions}) == len(keys)


def test_seeds_differ_for_all_neighbours():
    seeds = {derive_seed(a, b, c) for a in range(10) for b in range(10) for c in range(10)}
    assert len(seeds) == 1000
    assert derive_seed(0, 1, 2) == 8_901_564_848_246_840_783  # the order of resumed runs rests on it


def test_leaving_an_epoch_early_does_not_disturb_the_next(loader_of, folder, train_transform):
    loader = loader_of(folder, TrainSampler(40, 8), train_transform, workers=2)
    expected = epoch_of(loader_of(folder, TrainSampler(40, 8), train_transform), 1)[0]
    loader.set_position(0)
    for _ in loader:
        break
    assert torch.equal(epoch_of(loader, 1)[0], expected)


@pytest.mark.parametrize('workers', [0, 1])
def test_the_generators_of_the_main_process_are_left_alone(loader_of, folder, train_transform, workers):
    def states():
        numpy_state = np.random.get_state()
        return random.getstate(), numpy_state[1].tobytes(), numpy_state[2:], torch.get_rng_state().numpy().tobytes()

    before = states()
    epoch_of(loader_of(folder, TrainSampler(40, 8), train_transform, workers), 0)
    assert len(list(loader_of(folder, EvalSampler(40, 16), workers=workers))) == 3
    assert states() == before


def test_splits_come_as_a_dimension(loader_of, folder):
    transform = create_train_transform(24, auto_augment='augmix-m3-w2', aug_splits=3)
    loader = loader_of(folder, TrainSampler(40, 8), transform)
    images, targets = next(iter(loader))
    assert images.shape == (8, 3, 3, 24, 24) and images.dtype == torch.uint8
    assert targets.shape == (8,)


@pytest.mark.parametrize('size', [32, (24, 40)])
@pytest.mark.parametrize('workers', [0, 1])
def test_evaluation_batches_are_those_of_timm(loader_of, folder, size, workers):
    options = dict(interpolation='bicubic', crop_pct=0.9)
    input_size = (3, *np.broadcast_to(size, 2).tolist())
    theirs = create_timm_loader(TimmImageDataset(str(folder)), input_size, batch_size=16, num_workers=0,
                                device=torch.device('cpu'), **options)
    ours = loader_of(folder, EvalSampler(40, 16), create_eval_transform(size, **options), workers)
    prepare = BatchPreparer('cpu')
    pairs = [(prepare(*batch), reference) for batch, reference in zip(ours, theirs, strict=True)]
    assert [len(targets) for (_, targets), _ in pairs] == [16, 16, 8]
    for (images, targets), (their_images, their_targets) in pairs:
        assert torch.equal(images, their_images) and torch.equal(targets, their_targets)


def test_what_workers_get_can_be_sent_to_a_fresh_process(folder, train_transform):
    source = BatchSource(open_eval('folder', folder), train_transform, training=True, seed=1, max_bad_images=0,
                             memory=BatchMemory(0, 1))
    copy = pickle.loads(pickle.dumps(source))
    keys = [(0, 3, 0), (0, 30, 0)]
    assert torch.equal(copy.__getitems__(keys)[0], source.__getitems__(keys)[0])


# ----------------------------------------------------------------------------------------------------------
# Bad images


@pytest.mark.parametrize('workers', [0, 1])
@pytest.mark.parametrize('training', [True, False])
def test_a_bad_image_ends_the_loading_with_one_line(loader_of, damaged, workers, training):
    loader = loader_of(damaged, TrainSampler(40, 8) if training else EvalSampler(40, 8), workers=workers)
    with pytest.raises(UserError) as caught:
        for _ in loader:
            pass
    message = str(caught.value)
    assert '\n' not in message and 'Traceback' not in message
    assert message.startswith(f'image {damaged}') and ('07.' in message or '39.' in message)


@pytest.mark.parametrize('workers', [0, 2])
def test_in_training_the_next_image_takes_the_place_of_a_bad_one(loader_of, damaged, workers, caplog):
    loader = loader_of(damaged, TrainSampler(40, 8, shuffle=False), workers=workers, max_bad_images=2)
    with caplog.at_level(logging.WARNING):
        images, targets = epoch_of(loader, 0)
        epoch_of(loader, 1)
    assert len(images) == 40
    assert torch.equal(images[7], images[8]) and not torch.equal(images[8], images[9])
    assert torch.equal(images[39], images[0]) and targets[39] == targets[0] == 0  # with the target of its own class
    assert sorted(os.path.basename(path)[:2] for path in loader.bad_images) == ['07', '39']
    assert loader.take_bad_count() == 4 and loader.take_bad_count() == 0  # two images in two epochs
    assert len([record for record in caplog.records if 'tolerated' in record.message]) == 2  # not once an epoch


@pytest.mark.parametrize('workers', [0, 2])
def test_in_evaluation_bad_images_are_left_out(loader_of, damaged, workers):
    loader = loader_of(damaged, EvalSampler(40, 13), workers=workers, max_bad_images=2)
    assert [len(targets) for _, targets in loader] == [12, 13, 13]  # of 13, 13, 13 and the bad one alone
    assert len(loader.bad_images) == loader.take_bad_count() == 2


@pytest.mark.parametrize('workers', [0, 1])
def test_bad_images_above_the_budget_end_the_loading(loader_of, damaged, workers):
    loader = loader_of(damaged, EvalSampler(40, 8), workers=workers, max_bad_images=1)
    with pytest.raises(UserError, match='2 images cannot be decoded, 1 are tolerated'):
        list(loader)


def test_a_dataset_of_bad_images_does_not_loop_for_ever(loader_of, tmp_path):
    for name in 'ab':
        (tmp_path / name).mkdir()
        (tmp_path / name / 'image.jpg').touch()
    loader = loader_of(tmp_path, TrainSampler(2, 1), max_bad_images=5)
    with pytest.raises(UserError, match='none of 2 images'):
        list(loader)


@pytest.mark.parametrize('options', [dict(workers=-1), dict(max_bad_images=-1)], ids=str)
def test_negative_numbers_are_refused(loader_of, folder, options):
    with pytest.raises(UserError, match='-1'):
        loader_of(folder, EvalSampler(40, 8), **options)


# ----------------------------------------------------------------------------------------------------------
# Workers and signals


@pytest.fixture
def loader_with_worker(loader_of, folder):
    others = set(multiprocessing.active_children())
    loader = loader_of(folder, EvalSampler(40, 8), workers=1)
    assert sum(len(targets) for _, targets in loader) == 40
    worker, = set(multiprocessing.active_children()) - others
    return loader, worker


@pytest.mark.skipif(not hasattr(signal, 'sigtimedwait'), reason='only Linux tells who sent a signal')
def test_a_worker_outlives_signals_to_the_job_but_not_its_main_process_terminating_it(loader_with_worker):
    loader, worker = loader_with_worker
    for name in ('TERM', 'INT', 'HUP', 'USR1', 'USR2'):
        subprocess.run(['kill', f'-{name}', str(worker.pid)], check=True)
        assert sum(len(targets) for _, targets in loader) == 40
        assert worker.is_alive()
    worker.terminate()
    worker.join(10)
    assert not worker.is_alive()


def test_a_killed_worker_is_explained(loader_with_worker):
    loader, worker = loader_with_worker
    # PyTorch notices in a signal handler: the error may come up before the loader is asked again.
    with pytest.raises(UserError) as caught:
        os.kill(worker.pid, signal.SIGKILL)
        list(loader)
    error = caught.value
    assert error.exit_code == 128 + signal.SIGKILL, 'a launcher starts such a job again'
    assert 'fewer --workers' in str(error) and str(worker.pid) in str(error) and '\n' not in str(error)
    assert explain_worker_death(RuntimeError('CUDA error')) is None


def test_a_killed_worker_is_explained_wherever_the_main_process_is(loader_with_worker):
    """Far from the loader, as in the midst of a training step."""
    _, worker = loader_with_worker
    with pytest.raises(UserError, match='fewer --workers'):
        os.kill(worker.pid, signal.SIGKILL)
        for _ in range(100):
            time.sleep(0.1)


def test_a_worker_without_a_thread_of_its_own_is_explained(loader_of, folder, monkeypatch, capfd):
    """As where few processes are allowed: the worker starts, but cannot hand over a batch."""
    start = multiprocessing.queues.Queue._start_thread

    def refused(queue):
        if multiprocessing.parent_process():
            raise RuntimeError("can't start new thread")
        start(queue)

    monkeypatch.setattr(multiprocessing.queues.Queue, '_start_thread', refused)
    loader = loader_of(folder, EvalSampler(40, 8), workers=1)
    with pytest.raises(UserError, match=r'processes \(ulimit -u\) ran out; use fewer --workers') as caught:
        list(loader)
    assert 'Details are lost' not in str(caught.value) and 'Traceback' not in capfd.readouterr().err


def test_closing_a_loader_ends_its_worker(loader_with_worker):
    loader, worker = loader_with_worker
    loader.close()
    assert not worker.is_alive() and worker.exitcode == 0


def memory_of(images):
    """What tells the shared memory of a batch from all other."""
    return os.fstat(images.untyped_storage()._share_fd_cpu_()[0]).st_ino


def test_memory_of_batches_is_used_again_once_nobody_holds_them(loader_of, folder, train_transform):
    loader = loader_of(folder, TrainSampler(36, 2, seed=SEED), train_transform, workers=1)
    expected = epoch_of(loader_of(folder, TrainSampler(36, 2, seed=SEED), train_transform), 0)[0]
    for _ in range(2):
        loader.set_position(0)
        kept = [(memory_of(images), images[1:]) for images, _ in loader]  # a part of a batch holds it
        assert len({number for number, _ in kept}) == len(kept)
        assert torch.equal(torch.cat([images for _, images in kept]), expected[1::2])
        del kept

        loader.set_position(0)
        next(iter(loader))  # left early, with batches under way, which may hold blocks through the next epoch
        for _ in range(2):
            loader.set_position(0)
            passing = [(memory_of(images), images[1:].clone()) for images, _ in loader]
            assert torch.equal(torch.cat([images for _, images in passing]), expected[1::2])
        assert len({number for number, _ in passing}) <= 4 < len(passing)


def test_what_is_in_use_is_never_free_not_for_a_moment():
    """A worker with tasks of an epoch that was left early looks for free blocks while the next one begins."""
    memory = BatchMemory(1, 2)
    memory._taken.fill_(1)  # as a worker has
    images = torch.zeros(4, dtype=torch.uint8).share_memory_()
    memory.give_back(images, 1)
    looks = multiprocessing.get_context('fork').Process(target=look_until_free, args=(memory._taken[1:].numpy(),))
    looks.start()
    while looks.is_alive():
        memory.restart()
        assert memory._taken.tolist() == [0, 1]
    assert looks.exitcode == 0


def look_until_free(taken):
    until = time.monotonic() + 0.3
    while time.monotonic() < until:
        if not taken.all():
            os._exit(1)
    os._exit(0)


def test_sockets_have_short_paths_whatever_the_folder_of_temporary_files(tmp_path, monkeypatch):
    """A socket's path has at most 107 bytes; on clusters TMPDIR alone may have as many."""
    folder = tmp_path / ('long' * 30)
    folder.mkdir()
    monkeypatch.setattr(tempfile, 'tempdir', str(folder))
    monkeypatch.delitem(multiprocessing.current_process()._config, 'tempdir', raising=False)
    sockets = _socket_folder()
    shutil.rmtree(sockets)
    assert sockets.startswith('/tmp/pymp-') and tempfile.gettempdir() == str(folder)
