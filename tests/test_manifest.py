"""manifest.py: shards as tar, webdataset and its own reader see them; manifests and tar files that are refused."""
import io
import json
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest

from data.shards.manifest import INDEX, MANIFEST, Manifest, ShardWriter, key_of, member_key, sha256
from data.shards.tar import BLOCK, scan_tar
from tests.store import write_shards
from utils.errors import UserError

NAMES = ['ant/a.jpg', 'ant/b_1.JPEG', f'{"bee" * 30}/{"c" * 60}.png', f'{"d" * 160}.jpg', 'é/ü.jpg', 'v1.5/e.jpg',
         'ant/f.jpg']
SAMPLES = [(name, bytes([number]) * (number * 700), number % 3) for number, name in enumerate(NAMES)]


@pytest.fixture
def split(tmp_path) -> Path:
    write_shards(tmp_path, SAMPLES, ['ant', 'bee', 'cat'], samples_per_shard=3, source='a test')
    return tmp_path


def read(folder: Path) -> Manifest:
    return Manifest.read(lambda name: (folder / name).read_bytes(), str(folder))


def test_what_is_written_is_read(split):
    manifest = read(split)
    assert manifest.classes == ['ant', 'bee', 'cat'] and manifest.source == 'a test'
    assert manifest.shard_offsets.tolist() == [0, 3, 6, 7]
    found = []
    for shard, first, last in zip(manifest.shards, manifest.shard_offsets, manifest.shard_offsets[1:], strict=False):
        content = (split / shard.name).read_bytes()
        assert len(content) == shard.bytes
        found += [(manifest.index.name(k), content[manifest.index.offset[k]:][:manifest.index.size[k]],
                   int(manifest.index.target[k])) for k in range(first, last)]
    assert found == SAMPLES


def test_tar_and_the_scan_agree_on_every_member(split):
    for shard in read(split).shards:
        with tarfile.open(split / shard.name) as tar, open(split / shard.name, 'rb') as file:
            members = list(scan_tar(file, shard.name))
            assert [(m.name, m.offset, m.size) for m in members] == [(m.name, m.offset_data, m.size) for m in tar]
            assert all(m.mtime == m.uid == 0 and m.mode == 0o644 for m in tar)


def test_webdataset_reads_the_same_samples(split):
    wds = pytest.importorskip('webdataset')
    shards = [str(split / shard.name) for shard in read(split).shards]
    for sample, (name, content, target) in zip(wds.WebDataset(shards, shardshuffle=False), SAMPLES, strict=True):
        key, ending = key_of(name)
        assert (sample['__key__'], sample[ending.lower()], sample['cls']) == (key, content, b'%d' % target)


def test_shards_of_webdataset_and_of_tar_are_scanned(tmp_path):
    wds = pytest.importorskip('webdataset')
    with wds.TarWriter(str(tmp_path / 'a.tar')) as writer:
        for name, content, target in SAMPLES:
            writer.write({'__key__': key_of(name)[0], 'jpg': content, 'cls': target})
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        with tarfile.open(tmp_path / f'{form}.tar', 'w', format=form) as tar:
            for name, content, _ in SAMPLES:
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
        with open(tmp_path / f'{form}.tar', 'rb') as file:
            members = list(scan_tar(file, 'x'))
            assert [m.name for m in members] == NAMES
            assert [(file.seek(m.offset), file.read(m.size))[1] for m in members] == [s[1] for s in SAMPLES]
    with open(tmp_path / 'a.tar', 'rb') as file:
        assert sum(member.name.endswith('.jpg') for member in scan_tar(file, 'a')) == len(SAMPLES)


def test_equal_samples_make_equal_bytes(split, tmp_path_factory):
    again = tmp_path_factory.mktemp('again')
    write_shards(again, SAMPLES, ['ant', 'bee', 'cat'], samples_per_shard=3, source='a test')
    assert {f.name: f.read_bytes() for f in split.iterdir()} == {f.name: f.read_bytes() for f in again.iterdir()}


def test_keys_follow_the_rule_of_the_first_dot():
    assert member_key('v1.5/a.b.jpg') == 'v1.5/a_b'
    assert key_of('v1.5/a.seg.png') == ('v1.5/a', 'seg.png')


def test_a_shard_that_is_not_finished_is_not_there(tmp_path):
    with pytest.raises(ZeroDivisionError), ShardWriter(tmp_path, 0) as writer:
        writer.add('a.jpg', b'x', 0)
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []
    with ShardWriter(tmp_path, 0) as writer, pytest.raises(UserError, match='twice'):
        writer.add('a.jpg', b'x', 0)
        writer.add('a.png', b'x', 0)


def edited(**changes):
    return lambda folder: rewrite(folder, lambda content: content | changes)


def rewrite(folder: Path, change) -> None:
    (folder / MANIFEST).write_text(json.dumps(change(json.loads((folder / MANIFEST).read_text()))))


def first_shard(**changes):
    return lambda folder: rewrite(folder, lambda content: content | {
        'shards': [content['shards'][0] | changes, *content['shards'][1:]]})


def other_index(**columns):
    """Another index.npz, which the manifest is right about."""
    def change(folder):
        with np.load(folder / INDEX) as file:
            index = {**file, **columns}
        np.savez(folder / INDEX, **{name: column for name, column in index.items() if column is not None})
        admit_index(folder)
    return change


def admit_index(folder: Path) -> None:
    content = (folder / INDEX).read_bytes()
    edited(index={'name': INDEX, 'bytes': len(content), 'sha256': sha256(content)})(folder)


def zip_bomb(folder: Path) -> None:
    with zipfile.ZipFile(folder / INDEX, 'w', zipfile.ZIP_DEFLATED) as archive:
        for name in ('offset', 'size', 'target', 'name_ends', 'names'):
            archive.writestr(f'{name}.npy', bytes(1 << 20))
    admit_index(folder)


def huge_array(folder: Path) -> None:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {'descr': '<i8', 'fortran_order': False, 'shape': (1 << 50,)})
    with np.load(folder / INDEX) as file, zipfile.ZipFile(folder / INDEX, 'w') as archive:
        for name in file:
            archive.writestr(f'{name}.npy', header.getvalue())
    admit_index(folder)


def damaged_inside(folder: Path) -> None:
    content = bytearray((folder / INDEX).read_bytes())
    content[60:70] = b'\xff' * 10
    (folder / INDEX).write_bytes(content)
    admit_index(folder)


def twice(folder: Path) -> None:
    with np.load(folder / INDEX) as file:
        columns = {name: file[name] for name in ('offset', 'size')}
    for column in columns.values():
        column[1] = column[0]
    other_index(**columns)(folder)


def pickled_index(folder: Path) -> None:
    np.savez(folder / INDEX, offset=np.array([{}] * 7), size=[1] * 7, target=[0] * 7, name_ends=[1] * 7, names=[1])
    admit_index(folder)


FAULTS = {
    'no JSON': (lambda folder: (folder / MANIFEST).write_text('{"format":'), 'damaged'),
    'another format': (edited(format='zip'), "format is 'zip'"),
    'a later version': (edited(version=2), 'version 2'),
    'a wrong count': (edited(samples=8), 'disagrees with itself: 8 samples, 7'),
    'no shards': (edited(shards=[], samples=0), 'no samples'),
    'shards are no list': (edited(shards=3), 'damaged'),
    'a shard elsewhere': (first_shard(name='../x.tar'), 'no name of a shard'),
    'a shard by address': (first_shard(name='http://x/y.tar'), 'no name of a shard'),
    'a negative length': (first_shard(bytes=-1), '-1 bytes'),
    'a checksum that is a path': (first_shard(sha256='../../x'), 'SHA-256'),
    'a length of another type': (first_shard(bytes='1'), 'no int'),
    'a short shard': (first_shard(bytes=1024), 'disagrees with its index'),
    'a class too few': (edited(classes=['ant', 'bee']), 'disagrees with its index'),
    'a class twice': (edited(classes=['ant', 'bee', 'bee']), 'twice'),
    'classes that are no list': (edited(classes='abc'), 'no list'),
    'classes that would move the cursor': (edited(classes=['ant', 'b\x1b[2J', 'cat']), 'control characters'),
    'no checksum of the index': (edited(index={'name': INDEX, 'bytes': 1}), "no 'sha256'"),
    'a note of another type': (edited(packing='x'), 'no dict'),
    'another index': (lambda folder: (folder / INDEX).write_bytes(b'x'), 'not the one that'),
    'an index that is none': (lambda folder: ((folder / INDEX).write_bytes(b'x'), admit_index(folder)), 'damaged'),
    'an index without a column': (other_index(size=None), 'it holds'),
    'an index of other length': (other_index(size=np.ones(3, np.int64)), 'not 7 samples'),
    'an offset outside': (other_index(offset=np.full(7, 1 << 40)), 'disagrees with its index'),
    'an offset before the first header': (other_index(offset=np.zeros(7, np.int64)), 'disagrees with its index'),
    'a negative size': (other_index(size=np.full(7, -1)), 'disagrees with its index'),
    'offsets that are no whole numbers': (other_index(offset=np.full(7, 1024.5)), 'damaged'),
    'sizes that are no numbers': (other_index(size=np.full(7, np.nan)), 'damaged'),
    'targets that wrap around': (other_index(target=np.full(7, 1 << 32)), 'damaged'),
    'a column of one number': (other_index(size=np.array(3)), 'damaged'),
    'an array larger than any memory': (huge_array, 'damaged'),
    'an index that is damaged where it is compressed': (damaged_inside, 'damaged'),
    'an image twice': (twice, 'disagrees with its index'),
    'names that wrap around': (
        other_index(name_ends=np.array([0, 0, 0, 0, (1 << 63) - 1, -1 << 63, -1])), 'not 7 samples'),
    'names that go back': (other_index(name_ends=np.arange(7)[::-1]), 'not 7 samples'),
    'names that would move the cursor': (
        other_index(names=np.full(sum(len(name.encode()) for name in NAMES), 27, np.uint8)), 'control characters'),
    'an index of zeros without end': (zip_bomb, 'more than 7 samples need'),
    'a pickled index': (pickled_index, 'damaged'),
}


@pytest.mark.parametrize('fault', FAULTS)
def test_a_manifest_that_is_wrong_is_named_and_explained(split, fault):
    change, message = FAULTS[fault]
    change(split)
    with pytest.raises(UserError, match=message) as error:
        read(split)
    assert str(split) in str(error.value)


def test_a_tar_file_that_ends_early_is_refused_wherever_it_ends(tmp_path):
    with ShardWriter(tmp_path, 0) as writer:
        writer.add('ant/a.jpg', b'x' * 700, 0)
        writer.add('ant/b.jpg', b'y' * 100, 1)
    content = (tmp_path / 'shard-000000.tar').read_bytes()
    for length in range(0, len(content), 100):
        with pytest.raises(UserError, match='ends early'):
            list(scan_tar(io.BytesIO(content[:length]), 'cut.tar'))
    assert len(list(scan_tar(io.BytesIO(content + bytes(9 * BLOCK)), 'padded.tar'))) == 4


@pytest.mark.parametrize('kind', [tarfile.DIRTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE])
@pytest.mark.timeout(10)
def test_a_member_of_negative_length_is_no_way_back(kind):
    member = tarfile.TarInfo('a')
    member.type = kind
    header = bytearray(member.tobuf())
    header[124:136], header[148:156] = b'-1000'.ljust(12, b'\0'), b' ' * 8
    header[148:156] = b'%06o\0 ' % sum(header)
    with pytest.raises(UserError, match='no tar file'):
        list(scan_tar(io.BytesIO(bytes(header) + bytes(2 * BLOCK)), 'a.tar'))


@pytest.mark.parametrize('content, message', [
    (b'\x1f\x8b' + bytes(600), 'compressed'), (b'<html>' + b'x' * 600, 'no tar file')])
def test_what_is_no_tar_file_is_told(content, message):
    with pytest.raises(UserError, match=message):
        list(scan_tar(io.BytesIO(content), 'a.tar'))
