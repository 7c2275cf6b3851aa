"""data/shards: shards give what the folder gave that they were packed from, wherever they are."""
import contextlib
import errno
import fcntl
import io
import json
import os
import pickle
import socket
import sys
import tarfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest

import data.shards.cache
import data.shards.dataset
import data.shards.remote
from data.base import Numbered, Part
from data.datasets import open_eval, open_train_val
from data.decode import ImageError
from data.folders import ImageFolder
from data.loader import create_loader
from data.places import Place, expand, parse_place
from data.samplers import EvalSampler, TrainSampler
from data.shards.cache import Cache
from data.shards.dataset import open_shards
from data.shards.manifest import INDEX, MANIFEST, member_key
from data.shards.remote import RemoteFile, describe_remote, read_bytes
from data.shards.together import split_of
from data.shards.verifying import index_folder
from data.transforms import create_eval_transform, create_train_transform
from tests.conftest import run_script, succeeded, write_images
from tests.store import Store, write_shards
from utils.errors import UserError

PER_SHARD = 10


@pytest.fixture(scope='module')
def images(tmp_path_factory) -> Path:
    return write_images(tmp_path_factory.mktemp('images'), {'train': 20, 'val': 11}, size=(130, 120))


@pytest.fixture(scope='module')
def shards(images, tmp_path_factory) -> Path:
    """The same images, in the same order, so that sample numbers are equal."""
    root = tmp_path_factory.mktemp('shards')
    for split in ('train', 'val'):
        pack(images / split, root / split)
    return root


def pack(folder: Path, out: Path) -> None:
    dataset = ImageFolder(str(folder))
    paths = [os.path.relpath(dataset.path(k), folder) for k in range(len(dataset))]
    samples = [(member_key(path) + os.path.splitext(path)[1], dataset.read_bytes_or_image(k), int(dataset.targets[k]))
               for k, path in enumerate(paths)]
    write_shards(out, samples, dataset.classes, samples_per_shard=PER_SHARD)


@pytest.fixture
def copied(shards, tmp_path) -> Path:
    """shards/val, to be damaged."""
    for file in (shards / 'val').iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


@pytest.fixture
def store(shards):
    with Store(shards) as store:
        yield store


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Cache:
    monkeypatch.setattr(data.shards.remote, '_last_warning', [-np.inf])
    return Cache(tmp_path / 'cache', patience=20)


def remote(address: str) -> Place:
    return parse_place(address, is_shards=True)


def batches(dataset, sampler, *, workers=0, transform=None, **options) -> list[tuple]:
    """(bytes of the images, targets) of every batch."""
    loader = create_loader(dataset, transform or create_eval_transform(24), sampler, workers=workers, **options)
    try:
        return [(pixels.numpy().tobytes(), targets.tolist()) for pixels, targets in loader]
    finally:
        loader.close()


# ---------------------------------------------------------------------------------------------------------------------
# The same samples


@pytest.mark.parametrize('workers', [0, 1, 2])
def test_batches_are_those_of_the_folder(images, shards, workers):
    transform = create_train_transform(24, auto_augment='rand-m9-mstd0.5-inc1')
    folder, packed = open_train_val('', images)[0], open_train_val('', f'wds:{shards}')[0]
    for rank in range(2):
        sampler = TrainSampler(len(folder), 4, rank=rank, world_size=2)
        sampler.set_position(3)
        whole = batches(folder, sampler, transform=transform)
        sampler.set_position(3, 2)
        assert batches(packed, sampler, workers=workers, transform=transform) == whole[2:]


@pytest.mark.parametrize('world_size', [1, 2])
def test_evaluation_counts_are_exact(shards, world_size):
    dataset = open_eval('', f'wds:{shards}')
    for number in range(1, 34):
        part = Numbered(Part(dataset, range(number)))
        seen = [target for rank in range(world_size) for _, targets in batches(
            part, EvalSampler(number, 4, rank=rank, world_size=world_size)) for target in targets]
        assert sorted(seen) == list(range(number))


def test_a_data_set_of_shards_can_be_sent_to_another_process_and_keeps_few_files_open(shards, monkeypatch):
    dataset = open_eval('', f'wds:{shards}')
    expected = [dataset.read_bytes_or_image(k) for k in range(len(dataset))]
    monkeypatch.setattr(data.shards.dataset, 'MAX_OPEN', 2)
    sent = pickle.loads(pickle.dumps(dataset))
    order = np.random.default_rng(0).permutation(len(dataset)).tolist()
    assert [sent.read_bytes_or_image(k) for k in order] == [expected[k] for k in order]
    assert len(sent._open) == 2


# ---------------------------------------------------------------------------------------------------------------------
# Shards that are not as they should be


@pytest.mark.parametrize('change, message', [
    (lambda f: (f / 'shard-000001.tar').unlink(), 'shard-000001.tar is missing'),
    (lambda f: os.truncate(f / 'shard-000002.tar', 5000), 'shard-000002.tar ends early: 5,000 bytes, '),
    (lambda f: os.truncate(f / 'shard-000002.tar', 1 << 20), 'shard-000002.tar is too long'),
    (lambda f: [os.truncate(f / f'shard-{k:06d}.tar', 9) for k in range(4)], '3 more such shards'),
    (lambda f: (f / INDEX).unlink(), 'index.npz cannot be read'),
    (lambda f: (f / INDEX).write_bytes((f / INDEX).read_bytes()[:-1] + b'x'), 'index.npz is not the one'),
])
def test_what_is_wrong_with_shards_is_told_when_they_are_opened(copied, change, message):
    change(copied)
    with pytest.raises(UserError, match=message) as error:
        open_eval('', str(copied))
    assert str(copied) in str(error.value) and 'tools/pack.py --verify' in str(error.value)


def test_a_shard_that_changes_later_counts_as_bad_images(copied, caplog):
    """Row 7: evaluation fails, or leaves the image out; training takes the next one."""
    dataset = open_eval('', str(copied))
    whole = batches(dataset, EvalSampler(len(dataset), 33))
    with open(copied / 'shard-000001.tar', 'r+b') as file:
        file.seek(int(dataset._index.offset[12]) - 400)
        file.write(b'another')
    os.truncate(copied / 'shard-000003.tar', int(dataset._index.offset[32]) + 10)
    with pytest.raises(ImageError, match='shard-000001.tar::bee/bee_.*.jpg: there is no member in its place'):
        dataset.read_bytes_or_image(12)
    with pytest.raises(ImageError, match='ends early'):
        dataset.read_bytes_or_image(32)
    with pytest.raises(UserError, match='shard-000001.tar::'):
        batches(dataset, EvalSampler(len(dataset), 33))
    (left, targets), = batches(dataset, EvalSampler(len(dataset), 33), max_bad_images=2)
    size = len(whole[0][0]) // 33
    assert left == whole[0][0][:12 * size] + whole[0][0][13 * size:32 * size] and len(targets) == 31
    assert '(2 of 2 tolerated)' in caplog.text


def test_a_shard_in_place_of_another_is_noticed(tmp_path):
    write_shards(tmp_path, [(f'{name}.jpg', name.encode(), 0) for name in 'abcd'], ['ant', 'bee'], samples_per_shard=2)
    dataset = open_shards(str(tmp_path), Cache(tmp_path / 'cache'))
    os.replace(tmp_path / 'shard-000001.tar', tmp_path / 'shard-000000.tar')
    with pytest.raises(ImageError, match="shard-000000.tar::a.jpg: there is 'c.jpg' of 1 bytes in its place"):
        dataset.read_bytes_or_image(0)


# ---------------------------------------------------------------------------------------------------------------------
# Paths


def test_shards_need_no_prefix_where_there_is_a_manifest(shards):
    train, val = open_train_val('', str(shards))
    assert (len(train), len(val)) == (60, 33) and train.classes == val.classes == ['ant', 'bee', 'cat']
    for root in (shards, shards / 'val', f'wds:{shards}/val', f'wds:file://{shards}/val/'):
        assert len(open_eval('imagenet', root)) == 33
    assert len(open_eval('', shards, split='train')) == 60
    assert len(open_eval('', shards, only_classes='ant,cat')) == 22


def test_shards_and_folders_may_be_one_data_set(images, shards, tmp_path):
    (tmp_path / 'train').symlink_to(shards / 'train')
    (tmp_path / 'val').symlink_to(images / 'val')
    assert [type(split).__name__ for split in open_train_val('', tmp_path)] == ['Shards', 'ImageFolder']


def test_the_training_split_numbers_the_classes(shards, tmp_path):
    write_shards(tmp_path / 'train', [('a.jpg', b'', 0), ('b.jpg', b'', 1)], ['ant', 'bee'], samples_per_shard=9)
    (tmp_path / 'val').symlink_to(shards / 'val')
    with pytest.raises(UserError, match="1 class not in the class map of .*train.*'cat'"):
        open_train_val('', tmp_path)
    with pytest.raises(UserError, match="'cat'"):
        open_eval('', tmp_path)


@pytest.mark.parametrize('root, message', [
    ('wds:', 'no path'),
    ('wds:pipe:touch canary', 'commands are not run'),
    ('wds:ftp://host/x', "kind 'ftp' are not read"),
    ('https://host/x', 'give wds:https://host/x'),
    ('wds:/nowhere', "'/nowhere' does not exist"),
    ('wds:{images}', 'holds class folders; leave out "wds:"'),
    ('wds:/nowhere/a-{{0..2}}.tar', '/nowhere/a-0.tar: No such file'),
    ('wds:/nowhere/a-{{2..0}}.tar', 'no range'),
    ('wds:/nowhere/a-{{2', 'brace is left open'),
    ('wds:http://127.0.0.1:1/x', 'no answer for .*connect'),
])
def test_mistakes_in_paths_are_explained(images, root, message, monkeypatch, cache):
    monkeypatch.setattr(data.shards.cache, 'OPENING_SECONDS', 1)
    with pytest.raises(UserError, match=message):
        open_eval('', root.format(images=images), cache=cache)


def test_splits_may_be_patterns(shards, store, cache):
    splits = {'train_split': 'train/shard-{000000..000005}.tar', 'val_split': 'val/shard-{000000..000003}.tar'}
    for root in (f'wds:{shards}', f'wds:{store.url}'):
        assert [len(split) for split in open_train_val('', root, cache=cache, **splits)] == [60, 33]
        assert len(open_eval('', root, split=splits['val_split'], cache=cache)) == 33


def test_a_manifest_of_another_kind_is_none(images, tmp_path):
    (tmp_path / 'ant').symlink_to(images / 'val/ant')
    (tmp_path / 'bee').symlink_to(images / 'val/bee')
    (tmp_path / 'manifest.json').write_text('{"name": "a web page"}')
    assert len(open_eval('', tmp_path)) == 22


def test_a_split_is_no_data_set_to_train_on(shards):
    with pytest.raises(UserError, match='it is a split itself: give'):
        open_train_val('', shards / 'val')
    with pytest.raises(UserError, match='one split, but two are needed'):
        open_train_val('', f'wds:{shards}/val/shard-{{000000..000003}}.tar')
    with pytest.raises(UserError, match="'digits'.*leave out --dataset"):
        open_train_val('digits', f'wds:{shards}')


def test_braces():
    assert expand('a-{08..11}.tar') == ['a-08.tar', 'a-09.tar', 'a-10.tar', 'a-11.tar']
    assert expand('{x,y}{0..1}') == ['x0', 'x1', 'y0', 'y1']
    assert sorted(expand('a-{{00..01},{10..12}}.tar')) == [f'a-{k}.tar' for k in ('00', '01', '10', '11', '12')]


# ---------------------------------------------------------------------------------------------------------------------
# Tar files without a manifest


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, 'w') as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


@pytest.mark.parametrize('labels, classes, targets', [
    ([{'cls': b'2'}, {'cls': b'0\n'}, {'cls': b'2'}], ['0', '1', '2'], [2, 0, 2]),
    ([{'cls': b'dog'}, {'cls': b'cat10'}, {'cls': b'cat9'}], ['cat9', 'cat10', 'dog'], [2, 1, 0]),
    ([{'cls': b'\xef\xbb\xbfdog\r\n'}, {'json': b'\xef\xbb\xbf{"label": "dog"}'}, {'cls': b'cat'}], ['cat', 'dog'],
     [1, 1, 0]),
    ([{'json': b'{"label": 1}'}, {'json': b'{"cls": 0, "url": ""}'}, {'txt': b'', 'cls': b'1'}], ['0', '1'], [1, 0, 1]),
])
def test_labels_of_tar_files_from_elsewhere(tmp_path, cache, labels, classes, targets):
    for number, label in enumerate(labels):
        write_tar(tmp_path / f's-{number}.tar', {
            'x/._0.JPG': b'hidden', 'x/0.JPG': b'%d' % number, 'x/LICENSE': b'no ending', 'x/0.seg.png': b'',
            **{f'x/0.{ending}': text for ending, text in label.items()},
            'x/._1.txt': b'hidden', 'x/1.txt': b'no image', '._x.jpg': b'hidden'})
    for path in (f'{tmp_path}/s-{{0..2}}.tar', f'file://{tmp_path}/s-{{0..2}}.tar', str(tmp_path)):
        dataset = open_shards(path, cache)
        assert (dataset.classes, dataset.targets.tolist()) == (classes, targets)
        assert [dataset.read_bytes_or_image(k) for k in range(3)] == [b'0', b'1', b'2']
        assert dataset.path(1) == f'{tmp_path}/s-1.tar::x/0.JPG'


def test_headers_are_read_once(tmp_path, cache, monkeypatch):
    path = write_tar(tmp_path / 's.tar', {'a.jpg': b'1', 'a.cls': b'0', 'b.jpg': b'2', 'b.cls': b'1'})
    open_shards(str(path), cache)
    with monkeypatch.context() as patched:
        patched.setattr(data.shards.dataset, 'index_shards', lambda files: pytest.fail('looked through again'))
        assert len(open_shards(str(path), cache)) == 2
    write_tar(path, {'a.jpg': b'1', 'a.cls': b'0', 'c.jpg': b'22', 'c.cls': b'1', 'd.jpg': b'2', 'd.cls': b'1'})
    os.utime(path, (1, 1))
    assert len(open_shards(str(path), cache)) == 3


def test_two_jobs_may_keep_the_same_headers_at_the_same_moment(tmp_path, cache, caplog):
    path = str(write_tar(tmp_path / 's.tar', {'a.jpg': b'1', 'a.cls': b'0'}))
    original = os.replace
    with pytest.MonkeyPatch.context() as patched:
        def replace_second(source, target):
            patched.undo()
            open_shards(path, cache)  # another job has written all of it meanwhile
            original(source, target)

        patched.setattr(os, 'replace', replace_second)
        assert len(open_shards(path, cache)) == 1
    assert os.replace is original and 'cannot be written' not in caplog.text


def test_numbers_are_positions_in_the_class_map(tmp_path, cache):
    write_tar(tmp_path / 'train/s.tar', {'a.jpg': b'1', 'a.cls': b'0', 'b.jpg': b'2', 'b.cls': b'2'})
    write_tar(tmp_path / 'val/s.tar', {'a.jpg': b'1', 'a.cls': b'0', 'b.jpg': b'2', 'b.cls': b'1'})
    train, val = open_train_val('', f'wds:{tmp_path}', cache=cache)
    assert train.classes == val.classes == ['0', '1', '2'] and val.targets.tolist() == [0, 1]
    with pytest.raises(UserError, match='tar files; to read them as shards give wds:'):
        open_train_val('', tmp_path, cache=cache)
    assert open_eval('', f'wds:{tmp_path}', cache=cache, classes=['ant', 'bee', 'cat']).targets.tolist() == [0, 1]
    with pytest.raises(UserError, match='not in the class map'):
        open_eval('', f'wds:{tmp_path}/train/s.tar', cache=cache, classes=['ant', 'bee'])


TOGETHER = ('imagenet-train-0000.tar', 'imagenet-train-0001.tar', 'imagenet-validation-00.tar')


def write_together(folder: Path, labels=(b'0', b'2', b'1'), names=TOGETHER) -> Path:
    """Tar files of two samples each, of two splits in one folder; the class, which is the image too, tells the file."""
    for number, name in enumerate(names):
        write_tar(folder / name, {f'{k}{number}.{ending}': labels[number] for k in 'ab' for ending in ('jpg', 'cls')})
    return folder


def test_splits_that_lie_together_are_told_by_the_names_of_their_tar_files(tmp_path, cache):
    root = f'wds:{write_together(tmp_path)}'
    train, val = open_train_val('', root, cache=cache)
    assert [train.read_bytes_or_image(k) for k in range(len(train))] == [b'0', b'0', b'2', b'2']
    assert [val.read_bytes_or_image(k) for k in range(len(val))] == [b'1', b'1'] and val.targets.tolist() == [1, 1]
    for dataset in (open_eval('', root, cache=cache, classes=['a', 'b', 'c']),
                    open_eval('', root, cache=cache, split='validation', classes=['a', 'b', 'c'])):
        assert [dataset.path(k) for k in range(len(dataset))] == [
            f'{tmp_path}/imagenet-validation-00.tar::{k}2.jpg' for k in 'ab']
    assert len(open_eval('', root, cache=cache, split='train')) == 4
    assert len(open_eval('', f'{root}/imagenet-{{train-0000,validation-00}}.tar', cache=cache)) == 4  # as it is named
    with pytest.raises(UserError, match='3 tar files; to read them as shards give wds:'):
        open_train_val('', tmp_path, cache=cache)
    with pytest.raises(UserError, match='2 splits \\(train, val\\) lie together, .*own, or use them as they are: wds:'):
        index_folder(str(tmp_path), jobs=1)
    assert not (tmp_path / 'manifest.json').exists()
    with pytest.raises(UserError, match='has an evaluation split'):
        open_train_val('', root, cache=cache, val_fraction=0.5)
    write_tar(tmp_path / 'more.tar', {'x.jpg': b'0', 'x.cls': b'0'})
    with pytest.raises(UserError, match="others do not \\('more.tar'\\)"):
        open_train_val('', root, cache=cache)


def test_classes_of_splits_that_lie_together_are_those_of_the_training_split(tmp_path, cache):
    root = f'wds:{write_together(tmp_path, (b"ant", b"cat", b"cat"))}'
    assert open_eval('', root, cache=cache, allow_missing_classes=True).targets.tolist() == [1, 1]


def test_one_split_in_a_folder_is_evaluated_whole(tmp_path, cache):
    for name in ('train', 'val', 'part'):
        root = write_together(tmp_path / name, names=[f'{name}-{k}.tar' for k in range(3)])
        assert len(open_eval('', f'wds:{root}', cache=cache)) == 6
        assert len(index_folder(str(root), jobs=1).index) == 6


@pytest.mark.parametrize('is_remote', [False, True])
def test_splits_that_lie_together_are_those_of_timms_list(tmp_path, cache, is_remote):
    write_together(tmp_path)
    # The list has the last word, here against the names.
    listed = {'train': {'filenames': TOGETHER[1:]}, 'validation': {'filenames': TOGETHER[:1], 'shard_lengths': [2]}}
    (tmp_path / '_info.json').write_text(json.dumps({'splits': listed}))
    with Store(tmp_path) if is_remote else contextlib.nullcontext(SimpleNamespace(url=tmp_path)) as place:
        train, val = open_train_val('', f'wds:{place.url}', cache=cache)
        alone = open_eval('', f'wds:{place.url}', cache=cache, classes=['a', 'b', 'c'])
        assert [len(train), len(val), len(alone)] == [4, 2, 2]
        assert {dataset.read_bytes_or_image(1) for dataset in (val, alone)} == {b'0'}


@pytest.mark.parametrize('content', ['', '[]', '{"splits": {"train": 1}}', '{"splits": {"train": {"filenames": [1]}}}',
                                     '{"splits": {"train": {"filenames": ["../x.tar"]}}}'])
def test_a_list_of_splits_that_is_none(tmp_path, cache, content):
    (write_together(tmp_path) / '_info.json').write_text(content)
    with pytest.raises(UserError, match='_info.json.*; ?.*correct it'):
        open_train_val('', f'wds:{tmp_path}', cache=cache)


@pytest.mark.parametrize('name, split', [
    ('imagenet1k-train-0000.tar', 'train'), ('val_000.tar', 'val'), ('x.valid.3.tar', 'val'),
    ('Validation00.tar', 'val'), ('i1k-testing-1.tar', 'test'), ('test-pictures-train-2.tar', 'train'),
    ('constrained-0.tar', None), ('000.tar', None)])
def test_the_split_in_a_name(name, split):
    assert split_of(name) == split


def test_a_thousand_numbers_are_those_of_imagenet(tmp_path, cache):
    members = {f'{k}.{ending}': b'%d' % k for k in range(1000) for ending in ('jpg', 'cls')}
    dataset = open_eval('', f'wds:{write_tar(tmp_path / "s.tar", members)}', cache=cache)
    assert dataset.classes[1] == 'n01443537' and dataset.targets[1] == 1


@pytest.mark.parametrize('members, message', [
    ({'a.jpg': b''}, "'a.jpg' has no class"),
    ({'a.jpg': b'', 'a.json': b'{"x": 1}'}, "'a.jpg' has no class"),
    ({'a.jpg': b'', 'a.json': b'{'}, "'a.json' is no label"),
    ({'a.jpg': b'', 'a.cls': b'\xff'}, "'a.cls' is no label"),
    ({'a.jpg': b'', 'a.cls': b'12345678'}, 'is of class 12345678'),
    ({'a.jpg': b'', 'a.cls': b'9' * 5000}, 'is of class 9{20};'),
    ({'a.jpg': b'', 'a.png': b'', 'a.cls': b'0'}, 'two images of one key'),
    ({'a.jpg': b'', 'a.cls': b'0', 'b.jpg': b'', 'b.cls': b'dog'}, "partly names \\('dog'\\)"),
    ({'a.jpg': b'', 'a.cls': b'0', 'b.jpg': b'', 'b.cls': b'1', 'a.txt': b''}, "'a.txt' is apart"),
    ({'a.txt': b''}, 'no images'),
])
def test_tar_files_that_cannot_be_a_data_set_say_why(tmp_path, cache, members, message):
    with pytest.raises(UserError, match=message):
        open_shards(str(write_tar(tmp_path / 's.tar', members)), cache)


# ---------------------------------------------------------------------------------------------------------------------
# From elsewhere


@pytest.fixture(scope='module')
def expected(shards) -> list[tuple]:
    """Two ranks' batches in the order of shards that are elsewhere."""
    dataset = open_train_val('', shards)[0]
    return [batches(dataset, remote_sampler(dataset, rank)) for rank in range(2)]


def remote_sampler(dataset, rank, start=0) -> TrainSampler:
    sampler = TrainSampler(len(dataset), 4, rank=rank, world_size=2, shard_offsets=dataset._starts)
    sampler.set_position(1, start)
    return sampler


@pytest.mark.parametrize('trouble', [{}, {'drop_after': 70_000}, {'seconds': 0.05}, {'ranges': False}], ids=str)
@pytest.mark.timeout(60)
def test_batches_come_whole_through_any_trouble(store, cache, expected, trouble, monkeypatch):
    monkeypatch.setattr(data.shards.remote, 'PAUSES', (0.01,))
    vars(store).update(trouble)
    dataset = open_train_val('', f'wds:{store.url}', cache=cache)[0]
    assert all(shard.bytes > 70_000 for shard in dataset._files.remote[1]), 'else no connection drops'
    assert dataset.shard_offsets().tolist() == [0, 10, 20, 30, 40, 50, 60]
    for rank in range(2):
        assert batches(dataset, remote_sampler(dataset, rank, 2), workers=rank + 1) == expected[rank][2:]
    if 'drop_after' not in trouble:
        assert len(store.fetched()) == len(set(store.fetched())) == 6, 'each shard once, for all processes'
    assert not [thread for thread in threading.enumerate() if thread.name.startswith('shards-')]


def test_a_server_that_goes_away_costs_time_alone(store, cache, expected, caplog):
    dataset = open_train_val('', f'wds:{store.url}', cache=cache)[0]
    store.leave()
    threading.Timer(1.2, store.come_back).start()
    began = time.monotonic()
    assert batches(dataset, remote_sampler(dataset, 0)) == expected[0]
    assert 1 < time.monotonic() - began < 10
    assert f'{store.url}/train/shard-' in caplog.text and 'trying again, for' in caplog.text


def test_a_server_that_stays_away_ends_it_in_one_line(store, cache):
    dataset = open_train_val('', f'wds:{store.url}', cache=cache)[0]
    dataset._files.remote[0].patience = 1
    store.leave()
    try:
        with pytest.raises(UserError, match='/train/shard-.*no answer for .* s .*start again'):
            batches(dataset, remote_sampler(dataset, 0), workers=1)
    finally:
        store.come_back()


def test_waiting_for_another_who_waits_is_patience_too(store, cache, caplog):
    dataset = open_train_val('', f'wds:{store.url}', cache=cache)[0]
    cache.patience = 1
    store.leave()
    is_held = threading.Event()

    def hold():
        with cache._locked(f'{dataset._files.remote[1][0].key}.lock'):
            is_held.set()
            time.sleep(1.2)

    threading.Thread(target=hold).start()
    is_held.wait()
    try:
        with pytest.raises(UserError, match='no answer for 1 s'):
            dataset.read_bytes_or_image(0)
    finally:
        store.come_back()
    assert 'trying again' not in caplog.text


def test_content_that_is_not_what_was_announced_is_fetched_once_more(store, cache, expected, monkeypatch):
    store.lies = {'shard-000001.tar'}
    dataset = open_train_val('', f'wds:{store.url}', cache=cache)[0]
    with pytest.raises(UserError, match=r'shard-000001.tar: its content is not what its manifest says \(SHA-256\)'):
        dataset.read_bytes_or_image(10)
    assert store.fetched() == ['shard-000001.tar'] * 2
    warn = data.shards.cache.warn_rarely
    monkeypatch.setattr(data.shards.cache, 'warn_rarely', lambda message: (store.lies.clear(), warn(message)))
    assert batches(dataset, remote_sampler(dataset, 0)) == expected[0]


def test_a_part_that_is_there_is_not_fetched_again(store, shards, cache):
    dataset = open_train_val('', f'wds:{store.url}', cache=cache)[0]
    content = (shards / 'train/shard-000000.tar').read_bytes()
    cache.part(dataset._files.remote[1][0]).write_bytes(content[:10_000])
    assert dataset.read_bytes_or_image(0) == open_train_val('', shards)[0].read_bytes_or_image(0)
    assert [start for name, start in store.requests if name.endswith('.tar')] == [10_000]


def test_what_comes_whole_is_fetched_once(tmp_path, cache):
    content = bytes(range(256)) * (3 << 12)
    (tmp_path / 'a.tar').write_bytes(content)
    with Store(tmp_path) as store:
        store.ranges = False
        cache.make()
        file = RemoteFile(remote(f'{store.url}/a.tar'), len(content))
        cache.part(file).write_bytes(content + b'more')  # nobody knows whence: it begins again
        assert cache.open(file).read() == content and len(store.requests) == 1


def test_a_file_of_another_user_in_the_cache_can_be_read(cache, monkeypatch):
    cache.make()
    file = RemoteFile(remote('http://nowhere/a.tar'), 1)
    cache.path(file).write_bytes(b'a')
    monkeypatch.setattr(os, 'utime', Mock(side_effect=PermissionError))
    assert cache.open(file).read() == b'a'


def test_a_cache_that_has_become_read_only_can_be_read(cache, monkeypatch):
    cache.make()
    file = RemoteFile(remote('http://nowhere/a.tar'), 1)
    cache.path(file).write_bytes(b'a')
    monkeypatch.setattr(os, 'utime', Mock(side_effect=OSError(errno.EROFS, 'Read-only file system')))
    assert cache.open(file).read() == b'a'


def test_a_cache_without_locks_is_refused(store, cache, monkeypatch):
    dataset = open_train_val('', f'wds:{store.url}', cache=cache)[0]
    monkeypatch.setattr(fcntl, 'flock', Mock(side_effect=OSError(errno.ENOLCK, 'No locks available')))
    with pytest.raises(UserError, match='cannot be locked .No locks available.; name a folder on a disk of this'):
        dataset.read_bytes_or_image(0)


def test_a_user_without_a_home_reads_folders(images, monkeypatch):
    """As in a container: HOME is not set, and the user is in no list."""
    monkeypatch.setattr(os.path, 'expanduser', lambda path: path)
    monkeypatch.delenv('XDG_CACHE_HOME', raising=False)
    assert len(open_eval('', images)) == 33 and Cache().folder.is_absolute()


def test_a_small_cache_forgets_what_was_used_longest_ago(store, tmp_path, expected):
    size = 1e6 // 4
    cache = Cache(tmp_path, max_bytes=size)
    (tmp_path / 'mine.tar').write_bytes(bytes(1000))
    dataset = open_train_val('', f'wds:{store.url}', cache=cache)[0]
    assert sum(file.bytes for file in dataset._files.remote[1]) > size > 2 * dataset._files.remote[1][0].bytes
    assert batches(dataset, remote_sampler(dataset, 0), workers=2) == expected[0]
    assert (tmp_path / 'mine.tar').exists(), 'the folder may hold what is not of the cache'
    left = sum(file.stat().st_size for file in tmp_path.glob('*.tar'))
    assert left <= 1000 + size + dataset._files.remote[1][0].bytes, 'two workers and a thread may have fetched at once'
    with pytest.raises(UserError, match='--shard-cache-size 1e-05: a shard takes'):
        open_train_val('', f'wds:{store.url}', cache=Cache(tmp_path, max_bytes=1e4))


def test_an_open_shard_outlives_its_removal_from_the_cache(store, cache):
    dataset = open_train_val('', f'wds:{store.url}', cache=cache)[0]
    first = dataset.read_bytes_or_image(0)
    for file in cache.folder.glob('*.tar'):
        file.unlink()
    assert dataset.read_bytes_or_image(0) == first and len(store.fetched()) == 1
    dataset.read_bytes_or_image(10)  # which closes what is gone
    assert dataset.read_bytes_or_image(0) == first and len(store.fetched()) == 3


def test_shards_are_fetched_in_the_order_of_need_and_no_longer_than_for_the_iteration(store, cache, monkeypatch):
    monkeypatch.setattr(data.shards.cache, 'FETCHERS', 1)
    dataset = open_train_val('', f'wds:{store.url}', cache=cache)[0]
    sampler = TrainSampler(len(dataset), 4, shard_offsets=dataset.shard_offsets(), shuffle=False)
    loader = create_loader(dataset, create_eval_transform(24), sampler, workers=0)
    iterator = iter(loader)
    next(iterator)
    deadline = time.monotonic() + 10
    while len(store.fetched()) < 6 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert store.fetched() == [f'shard-{number:06d}.tar' for number in range(6)], 'ahead of need'
    iterator.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith('shards-')]


def test_what_is_fetched_ahead_leaves_room(store, tmp_path, monkeypatch):
    monkeypatch.setattr(data.shards.cache, 'FETCHERS', 1)
    dataset = open_train_val('', f'wds:{store.url}', cache=Cache(tmp_path, max_bytes=4 * 90_000))[0]
    with dataset.ahead(np.arange(60)) as used:
        time.sleep(0.5)
        assert store.fetched() == ['shard-000000.tar', 'shard-000001.tar'][:len(store.fetched())] and store.fetched()
        before = len(store.fetched())
        used(10)
        deadline = time.monotonic() + 5
        while len(store.fetched()) == before and time.monotonic() < deadline:
            time.sleep(0.02)
        assert len(store.fetched()) == before + 1, 'the next one, when one is done with'


def test_a_process_that_is_forked_holds_no_lock_of_its_parent(cache):
    """Workers are forked while threads fetch; a lock that they kept would make others wait for as long as they live."""
    cache.make()
    reader, writer = os.pipe()
    is_up, say_up = os.pipe()
    with cache._locked('a.lock'):
        if not (child := os.fork()):
            os.write(say_up, b'x')
            os.close(writer)
            os.read(reader, 1)  # until the parent closes its end
            os._exit(0)
        os.read(is_up, 1)
    try:
        with open(cache.folder / 'a.lock') as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        os.close(writer)
        os.waitpid(child, 0)


@pytest.mark.parametrize('status, message', [
    (404, '/val/manifest.json: not found; give the address'), (403, r'access is refused \(403\)'),
    (400, r'refused by the server \(400\)'), (503, 'no answer for .*503')])
def test_answers_of_a_server_are_explained(store, cache, status, message, monkeypatch):
    monkeypatch.setattr(data.shards.cache, 'OPENING_SECONDS', 0.2)
    store.status = status
    with pytest.raises(UserError, match=message):
        open_eval('', f'wds:{store.url}', cache=cache)


@pytest.mark.parametrize('length', [100_000, 60_000, 0])
def test_a_shard_that_ends_early_on_the_server_is_named_at_once(shards, tmp_path, cache, length, monkeypatch):
    monkeypatch.setattr(data.shards.cache, 'MAX_PIECE', 1 << 16)
    for file in (shards / 'train').iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    whole = (tmp_path / 'shard-000000.tar').stat().st_size
    length = min(length, whole - 1)
    os.truncate(tmp_path / 'shard-000000.tar', length)
    with Store(tmp_path) as store:
        dataset = open_shards(store.url, cache)
        with pytest.raises(UserError, match=f'shard-000000.tar ends early: {length:,} bytes, {whole:,} in'):
            dataset.read_bytes_or_image(0)


def test_a_full_disk_is_no_bad_image(store, cache):
    dataset = open_train_val('', f'wds:{store.url}', cache=cache)[0]
    cache.folder.rename(cache.folder.with_name('gone'))
    with pytest.raises(UserError, match='--shard-cache: .* cannot be written') as error:
        dataset.read_bytes_or_image(0)
    assert not isinstance(error.value, ImageError)


@pytest.mark.parametrize('cause, message', [
    (socket.gaierror(socket.EAI_NONAME, 'Name or service not known'), 'there is no such server'),
    (socket.gaierror(socket.EAI_AGAIN, 'Temporary failure in name resolution'), 'no answer for'),
    (type('NoCredentialsError', (Exception,), {})('Unable to locate credentials'), 'no credentials were found'),
    (ConnectionResetError('reset by peer'), 'no answer for'),
])
def test_what_will_not_pass_is_told_from_what_may(cache, monkeypatch, cause, message):
    def fail(url, **_):
        raise FileNotFoundError(url) from cause  # as fsspec has it of any failure

    monkeypatch.setattr(data.shards.cache, 'OPENING_SECONDS', 0.1)
    monkeypatch.setattr(data.shards.remote, 'filesystem', lambda place: SimpleNamespace(
        open=fail, kwargs={'headers': {}}))
    with pytest.raises(UserError, match=f'https://host/x/val/manifest.json: {message}'):
        open_eval('', 'wds:https://host/x', cache=cache)


def test_an_answer_is_read_only_as_far_as_it_may_be_long(store, cache, monkeypatch):
    file = parse_place(f'wds:{store.url}/val/{MANIFEST}')
    whole = read_bytes(file, limit=1 << 20)
    assert whole == (store.folder / 'val' / MANIFEST).read_bytes() and read_bytes(file, 3, 9, limit=6) == whole[3:9]
    monkeypatch.setattr(data.shards.remote, 'CHUNK', 5)
    assert read_bytes(file, limit=10) == whole[:15]
    monkeypatch.setattr(data.shards.remote, 'MAX_SMALL', 10)
    with pytest.raises(UserError, match='more than 0 MiB, which no file of this kind has'):
        open_eval('', f'wds:{store.url}', cache=cache)


def test_a_proxy_of_the_environment_is_used(store, cache, monkeypatch):
    monkeypatch.setenv('http_proxy', store.url)
    monkeypatch.setenv('no_proxy', '')
    assert len(open_shards('http://behind.invalid/val', cache)) == 33


def test_a_missing_shard_and_a_missing_library_are_named(store, cache, monkeypatch):
    dataset = open_shards(f'{store.url}/val', cache)
    dataset._files.remote[1][0] = RemoteFile(remote(f'{store.url}/val/gone.tar'), 1, 'x')
    with pytest.raises(UserError, match='/val/gone.tar: not found'):
        dataset.read_bytes_or_image(0)
    monkeypatch.setitem(sys.modules, 'aiohttp', None)
    with pytest.raises(UserError, match='aiohttp is missing; pip install -r requirements-shards.txt'):
        open_shards(f'{store.url}/val', cache)
    monkeypatch.setitem(sys.modules, 'gcsfs', None)
    with pytest.raises(UserError, match='gcsfs is missing; pip install gcsfs'):
        open_shards('gs://bucket/val', cache)


def test_tar_files_without_a_manifest_from_elsewhere(store, shards, cache):
    dataset = open_shards(f'{store.url}/val/shard-{{000000..000003}}.tar', cache)
    local = open_eval('', shards)
    assert [dataset.read_bytes_or_image(k) for k in (0, 32)] == [local.read_bytes_or_image(k) for k in (0, 32)]
    assert dataset.targets.tolist() == local.targets.tolist()
    store.requests.clear()
    assert len(open_shards(f'{store.url}/val/shard-{{000000..000003}}.tar', cache)) == 33
    assert store.fetched() == []


@pytest.mark.parametrize('length, message', [(0, 'has been replaced on the server'), (512, 'is too long: ')])
def test_a_tar_file_that_is_replaced_while_it_is_fetched_is_named(tmp_path, cache, length, message):
    content = bytes(1 << 18)
    (tmp_path / 'a.tar').write_bytes(content)
    cache.make()
    with Store(tmp_path) as store:
        file = describe_remote(remote(f'{store.url}/a.tar'), 1)
        cache.part(file).write_bytes(content[:1000])
        (tmp_path / 'a.tar').write_bytes(b'x' * (len(content) + length))
        store.ranges = not length
        with pytest.raises(UserError, match=f'a.tar {message}'):
            cache.open(file)
    assert not list(cache.folder.glob('*.tar'))


def test_s3(shards, cache, monkeypatch):
    pytest.importorskip('s3fs')
    with Store(shards.parent) as store:
        for name, value in (('ENDPOINT_URL', store.url), ('ACCESS_KEY_ID', 'key'), ('SECRET_ACCESS_KEY', 'secret'),
                            ('DEFAULT_REGION', 'us-east-1')):
            monkeypatch.setenv(f'AWS_{name}', value)
        dataset = open_eval('', f'wds:s3://{shards.name}', cache=cache)
        folder = open_eval('', shards)
        sampler = EvalSampler(len(dataset), 8)
        assert batches(dataset, sampler, workers=1) == batches(folder, sampler)
        with pytest.raises(UserError, match='s3://nothing/val/manifest.json: not found'):
            open_eval('', 'wds:s3://nothing', cache=cache)

        manifest = parse_place(f'wds:s3://{shards.name}').join('val').join(MANIFEST)
        whole = read_bytes(manifest, limit=1 << 20)
        assert whole == (shards / 'val' / MANIFEST).read_bytes() and read_bytes(manifest, 3, 9, limit=6) == whole[3:9]
        monkeypatch.setattr(data.shards.remote, 'CHUNK', 5)
        assert read_bytes(manifest, limit=10) == whole[:15]  # not all of an answer without end


def test_training_over_http(store, tmp_path):
    """Through the command line; every shard of both splits is fetched once, whatever processes there are.

    In mid-epoch the run cannot go on with shards of this machine, which are read in another order.
    """
    options = ('--model', 't2t_vit_7', '--img-size', '32', '--model-kwargs', 'embed_dim=32', 'depth=2', 'num_heads=2',
               '-b', '20', '--epochs', '1', '--warmup-epochs', '0', '--cooldown-epochs', '0', '-j', '1', '--device',
               'cpu', '--no-tensorboard', '--experiment', 'run', '--shard-cache', 'shards', '--checkpoint-steps', '2')
    out = succeeded(run_script('train.py', f'wds:{store.url}', *options, cwd=tmp_path))
    assert f'{store.url}/train: 60 images of 3 classes in 6 shards' in out
    assert len(list((tmp_path / 'shards').glob('*.tar'))) == len(store.fetched()) == 10
    assert (tmp_path / 'output/train/run/last.pth.tar').exists()
    middle = 'output/train/run/checkpoint-00000002.pth.tar'
    refused = run_script('train.py', store.folder, *options, '--resume', middle, cwd=tmp_path)
    assert refused.returncode == 2 and (f'{middle}: stands in the middle of an epoch of 60 images in 6 shards from '
                                        'elsewhere, this run has 60 images, in another order') in refused.stderr


def test_a_worker_without_standard_error_warns_nobody(monkeypatch):
    monkeypatch.setattr(data.shards.remote, '_last_warning', [-np.inf])
    monkeypatch.setattr(data.shards.remote.multiprocessing, 'parent_process', lambda: SimpleNamespace(pid=1))
    monkeypatch.setattr(sys, '__stderr__', None)
    data.shards.remote.warn_rarely('the server is away')
