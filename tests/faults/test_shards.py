"""Shards that mean harm, servers that fail, processes that are killed while they read: refused, waited for, gone on.

    python -m pytest tests/faults/test_shards.py -m faults
"""
import io
import os
import pickle
import signal
import tarfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from data.folders import ImageFolder
from data.shards.cache import Cache
from data.shards.dataset import open_shards
from data.shards.tar import BLOCK, tar_header
from tests.conftest import run_script, write_images
from tests.faults.test_processes import STEP, Job, assert_ends_as
from tests.store import Store, write_shards
from utils.errors import UserError

pytestmark = pytest.mark.faults


# ---------------------------------------------------------------------------------------------------------------------
# Row 22: hostile shards


class Canary:
    """Unpickled, it makes a file."""

    def __init__(self, path: str):
        self.path = path

    def __reduce__(self):
        return open, (self.path, 'w')


def member(name='a.jpg', content=b'', kind=tarfile.REGTYPE, pax=None, form=tarfile.PAX_FORMAT, **fields) -> bytes:
    """A member as tarfile writes it."""
    info = tarfile.TarInfo(name)
    info.size, info.type, info.pax_headers = len(content), kind, pax or {}
    vars_of = {'linkname': '', 'devmajor': 0, **fields}
    for field, value in vars_of.items():
        setattr(info, field, value)
    return info.tobuf(form) + content + bytes(-len(content) % BLOCK)


def with_size(header: bytes, size: bytes) -> bytes:
    """A header block with another size field, and the checksum that fits."""
    block = header[:124] + size.ljust(12, b'\0') + header[136:]
    total = sum(block[:148]) + sum(block[156:]) + 8 * 32
    return block[:148] + b'%06o\0 ' % total + block[156:]


def named_by_pax(name: str) -> bytes:
    record = f'path={name}\n'
    return member('x', f'{len(record) + 4:03} {record}'.encode(), kind=tarfile.XHDTYPE)


def npy_of_objects(canary: str) -> bytes:
    file = io.BytesIO()
    np.save(file, np.array([Canary(canary)], dtype=object), allow_pickle=True)
    return file.getvalue()


GOOD = tar_header('a.jpg', 3) + b'abc'.ljust(BLOCK, b'\0') + tar_header('a.cls', 1) + b'0'.ljust(BLOCK, b'\0')
END = bytes(2 * BLOCK)
LONG = 'x' * 120

HOSTILE = {
    'a symbolic link': lambda canary: member('b.jpg', kind=tarfile.SYMTYPE, linkname=canary),
    'a hard link': lambda canary: member('b.jpg', kind=tarfile.LNKTYPE, linkname='../a'),
    'a device': lambda canary: member('b.jpg', kind=tarfile.CHRTYPE, devmajor=1),
    'a block device': lambda canary: member('b.jpg', kind=tarfile.BLKTYPE, devmajor=8),
    'a named pipe': lambda canary: member('b.jpg', kind=tarfile.FIFOTYPE),
    'a way up': lambda canary: member('x/../../b.jpg', b'x'),
    'a folder above': lambda canary: member('..', kind=tarfile.DIRTYPE),
    'an absolute name': lambda canary: member(canary, b'x'),
    'a name of another system': lambda canary: member('C:\\b.jpg', b'x'),
    'a command': lambda canary: member(f'pipe:touch {canary}', b'x'),
    'an address': lambda canary: member('http://host/b.jpg', b'x'),
    'control characters': lambda canary: member('b\x1b[2J.jpg', b'x'),
    'a pickle': lambda canary: member('a.pkl', pickle.dumps(Canary(canary))),
    'a pickled label': lambda canary: member('a.cls.pyd', pickle.dumps(Canary(canary))),
    'a pickle of PyTorch': lambda canary: member('a.pth', pickle.dumps(Canary(canary))),
    'an array of objects': lambda canary: member('a.npy', npy_of_objects(canary)),
    'a member twice': lambda canary: member('a.jpg', b'x'),
    'a key twice': lambda canary: member('b.cls', b'0') + member('a.txt', b'x'),
    'a sparse file': lambda canary: member('b.jpg', kind=tarfile.GNUTYPE_SPARSE),
    'a sparse file of pax': lambda canary: member('b.jpg', b'x', pax={'GNU.sparse.size': '1', 'GNU.sparse.name': 'c'}),
    'a size beyond everything': lambda canary: with_size(member('b.jpg'), b'\x80' + (1 << 60).to_bytes(11, 'big')),
    'a negative size': lambda canary: with_size(member('b.jpg'), b'\xff' * 12),
    'a negative size in octal': lambda canary: with_size(member('b', kind=tarfile.DIRTYPE), b'-1000'),
    'a size that is no number': lambda canary: with_size(member('b.jpg'), b'12x'),
    'a way up by pax': lambda canary: member('b.jpg', b'x', pax={'path': f'../{LONG}'}),
    'another name by pax': lambda canary: member('b.jpg', b'x', pax={'path': 'c.jpg'}),
    'another size by pax': lambda canary: member('b.jpg', b'x', pax={'size': '400'}),
    'a link by pax': lambda canary: member('b.jpg', b'x', pax={'linkpath': canary}),
    'a name for all by pax': lambda canary: member('g', b'15 path=/x.jpg\n', kind=tarfile.XGLTYPE),
    'a name by pax, then a header for all': lambda canary: (
        named_by_pax('c.pkl') + member('g', b'9 a=aaaa\n', kind=tarfile.XGLTYPE) + member('a.txt', b'x')),
    'two names by pax': lambda canary: named_by_pax(f'{LONG}.pkl') + named_by_pax(f'{LONG}.txt') + member(LONG[:100]),
    'two long names': lambda canary: member(f'{LONG}.pkl', form=tarfile.GNU_FORMAT)[:2 * BLOCK] + member(
        f'{LONG}.txt', form=tarfile.GNU_FORMAT),
    'a header of pax that is none': lambda canary: member('x', b'999999 path=x\n', kind=tarfile.XHDTYPE),
    'a long name that leads up': lambda canary: member(f'../{LONG}', b'x', form=tarfile.GNU_FORMAT),
    'a name without end': lambda canary: with_size(member('x', kind=tarfile.GNUTYPE_LONGNAME), b'77777777777'),
    'an unknown kind': lambda canary: member('b.jpg', b'x', kind=b'Z'),
    'a second tar file behind the end': lambda canary: END + GOOD,
}


@pytest.mark.parametrize('kind', HOSTILE)
def test_hostile_shards_are_refused_by_name(kind, tmp_path, record_property):
    canary = tmp_path / 'canary'
    folder = tmp_path / 'set'
    folder.mkdir()
    (folder / 'good-0.tar').write_bytes(GOOD + END)
    assert len(open_shards(str(folder), Cache(tmp_path / 'cache'))) == 1, 'without it the shard is read'
    (folder / 'hostile.tar').write_bytes(GOOD + HOSTILE[kind](str(canary)) + END)
    with pytest.raises(UserError) as error:
        open_shards(str(folder), Cache(tmp_path / 'cache'))
    assert str(folder / 'hostile.tar') in str(error.value) and '\n' not in str(error.value)
    assert '\x1b' not in str(error.value)
    assert not canary.exists()
    assert sorted(path.name for path in folder.iterdir()) == ['good-0.tar', 'hostile.tar']
    record_property('refusal', str(error.value).replace(str(tmp_path), ''))


def test_a_hostile_shard_ends_training_in_one_line(tmp_path):
    for split in ('train', 'val'):
        (tmp_path / split).mkdir()
        (tmp_path / split / 's-0.tar').write_bytes(GOOD + HOSTILE['a pickled label'](str(tmp_path / 'canary')) + END)
    result = run_script('train.py', f'wds:{tmp_path}', '--device', 'cpu', cwd=tmp_path)
    assert result.returncode == 2
    line, = result.stderr.strip().splitlines()
    assert f"{tmp_path}/train/s-0.tar: member 'a.cls.pyd' is a pickle, which could run code" in line
    assert not (tmp_path / 'canary').exists()


# ---------------------------------------------------------------------------------------------------------------------
# Servers and processes that fail


@pytest.fixture(scope='module')
def shards(tmp_path_factory) -> Path:
    """300 images of three classes in 30 shards, and 15 to evaluate with."""
    images = write_images(tmp_path_factory.mktemp('images'), {'train': 100, 'val': 5})
    root = tmp_path_factory.mktemp('shards')
    for split in ('train', 'val'):
        dataset = ImageFolder(str(images / split))
        order = np.random.default_rng(0).permutation(len(dataset)).tolist()
        samples = [(f'{k:05d}.jpg', dataset.read_bytes_or_image(k), int(dataset.targets[k])) for k in order]
        write_shards(root / split, samples, dataset.classes, samples_per_shard=10)
    return root


def train(cwd: Path, store: Store, *options, **environment) -> Job:
    return Job(cwd, f'wds:{store.url}', '--dataset', 'folder', '--experiment', 'run', '--shard-cache', 'cache',
               *options, **environment)


@pytest.fixture(scope='module')
def uninterrupted(shards, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp('uninterrupted')
    with Store(shards) as store, train(folder, store, '-j', '0') as job:
        code, said = job.ended()
        assert code == 0, said
        assert len(store.fetched()) == len(set(store.fetched())) + 2, 'each shard once; two names are in both splits'
    return folder / 'runs/train/run'


def test_a_kill_within_an_epoch_over_shards_costs_no_byte(shards, uninterrupted, tmp_path):
    """Also where the shards that were fetched are gone when it goes on."""
    with Store(shards) as store, train(tmp_path, store, '-j', '1', T2T_FAULTS=f'step@{STEP}#1=stop') as job:
        victim = job.stopped_rank(1)
        for file in (tmp_path / 'cache').glob('*.tar'):
            file.unlink()
        os.kill(victim, signal.SIGKILL)
        code, said = job.ended()
    assert code == 0, said
    assert 'restart 1 of 3' in said and 'Traceback' not in said
    assert_ends_as(uninterrupted, tmp_path / 'runs/train/run')


def test_a_server_that_is_away_for_20_seconds_costs_time_alone(shards, uninterrupted, tmp_path, record_property):
    with Store(shards) as store:
        store.seconds = 0.3
        began = time.monotonic()
        with train(tmp_path, store, '-j', '2') as job:
            while len(store.fetched()) < 8 and time.monotonic() < began + 60:
                time.sleep(0.05)
            assert len(store.fetched()) < 30, 'there has to be something left to fetch'
            store.leave()
            left = time.monotonic()
            threading.Timer(20, store.come_back).start()
            code, said = job.ended()
            record_property('seconds after the server came back', round(time.monotonic() - left - 20, 1))
        assert code == 0, said
        assert time.monotonic() - left > 20
    printed = ''.join(path.read_text() for path in tmp_path.glob('*.out')) + said
    assert f'{store.url}/train/shard-' in printed and 'trying again, for 1' in printed
    assert 'Traceback' not in printed
    assert_ends_as(uninterrupted, tmp_path / 'runs/train/run')


def test_connections_that_drop_and_content_that_was_altered_once_cost_no_byte(shards, uninterrupted, tmp_path):
    with Store(shards) as store:
        store.drop_after, store.lies = 20_000, {'shard-000003.tar'}
        with train(tmp_path, store, '-j', '1') as job:
            began = time.monotonic()
            while store.fetched().count('shard-000003.tar') < 2 and time.monotonic() < began + 60:
                time.sleep(0.01)
            store.lies, store.drop_after = set(), None
            code, said = job.ended()
    assert code == 0, said
    assert_ends_as(uninterrupted, tmp_path / 'runs/train/run')
