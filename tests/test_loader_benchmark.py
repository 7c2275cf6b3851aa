"""benchmarks/loader.py: both loaders give the same kind of batches, turns are accounted, the last line is promised."""

import io
import json
import re
import tarfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import loader as benchmark
from data.datasets import open_eval
from tests.conftest import run_module, succeeded
from utils.errors import UserError

ARGS = SimpleNamespace(batch_size=4, img_size=32, seed=1)


def jpeg(number: int) -> bytes:
    noise = np.random.default_rng(number).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).resize((80, 60)).save(file, format='JPEG')
    return file.getvalue()


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """Six images in two classes."""
    root = tmp_path_factory.mktemp('benchmark') / 'images'
    for number in range(6):
        path = root / f'class{number % 2}' / f'{number}.JPEG'
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(number))
    return root


def names(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob('*') if path.is_file())


def test_images_come_from_a_folder_of_classes_or_splits_or_a_tar_and_go_nowhere_else(folder, tmp_path):
    with tarfile.open(tmp_path / 'images.tar', 'w') as tar:
        tar.add(folder, 'sample/val')
        for name in ('../../outside.JPEG', 'sample/val/class0/../../inside.JPEG'):
            member = tarfile.TarInfo(name)
            member.size = 3
            tar.addfile(member, io.BytesIO(b'abc'))
        link = tarfile.TarInfo('sample/val/class0/link.JPEG')
        link.type, link.linkname = tarfile.SYMTYPE, '/etc/passwd'
        tar.addfile(link)
    for number, (source, split) in enumerate([(folder, 'train'), (folder.parent, 'images'),
                                              (tmp_path / 'images.tar', 'train')]):
        out = tmp_path / 'out' / str(number) / 'images'
        out.mkdir(parents=True)
        benchmark.copy_images(source, split, 4, out)
        assert len(names(out)) == 4 and set(names(out)) <= set(names(folder))
    assert not list(tmp_path.rglob('*side.JPEG'))
    (tmp_path / 'none.tar').write_bytes(b'nothing')
    with pytest.raises(UserError, match='neither a folder nor a tar'):
        benchmark.copy_images(tmp_path / 'none.tar', 'train', 4, tmp_path)
    with pytest.raises(UserError, match='no images'):
        benchmark.copy_images(folder / 'class0', 'train', 4, tmp_path)


@pytest.mark.parametrize('task', ['training', 'evaluation'])
def test_contenders_give_the_same_kind_of_batches(folder, task):
    datasets = {benchmark.FOLDERS: open_eval('folder', str(folder))}
    contenders = benchmark.list_contenders(task, datasets, folder, count=8, workers=1, args=ARGS)
    shapes = {}
    for contender in contenders:
        batches = list((running := contender.start()).epoch())
        assert [images.dtype for images, _ in batches] == [torch.float32] * 2
        shapes[contender.label] = batches[0][0].shape, batches[0][1].shape
        running.close()
        contender.open()
        contender.turns.append(contender.ask(benchmark.take_turn))
        assert min(contender.turns[0]) > 0
        contender.peak_bytes = contender.ask(benchmark.peak_memory)
        assert contender.peak_bytes > 1e6 and contender.row(8)['images_per_second_and_core'] > 1
        contender.close()
        assert contender.process.exitcode == 0
    targets = (4, benchmark.NUM_CLASSES) if task == 'training' else (4,)
    assert shapes.pop(benchmark.DECODE, ((4, 3, 1, 1), (4,))) == ((4, 3, 1, 1), (4,))
    assert set(shapes.values()) == {((4, 3, 32, 32), targets)}
    assert set(shapes) >= {'timm, folders', 'ours, folders'}


def test_one_contender_that_fails_ends_them_all(folder):
    datasets = {benchmark.FOLDERS: open_eval('folder', str(folder))}
    running, *_ = benchmark.list_contenders('training', datasets, folder, count=8, workers=1, args=ARGS)
    failing = benchmark.Contender('the second', lambda: 1 / 0)
    with pytest.raises(UserError, match='the second: its process has ended'):
        benchmark.measure([running, failing], SimpleNamespace(rounds=1, seed=1), 'training')
    # One that still waits for its next task would be waited for at the end of the program.
    assert running.process.exitcode == 0 and failing.process.exitcode == 1


@pytest.mark.slow
def test_the_command_ends_with_the_ratios(folder, tmp_path):
    small = ('--workers', '1', '-b', '4', '--img-size', '32', '--rounds', '1', '--batches', '1', '--short-side', '40')
    out = succeeded(run_module('benchmarks.loader', folder, *small, '--output', tmp_path, cwd=tmp_path))
    last = out.strip().splitlines()[-1]
    assert re.fullmatch(r'training, ours / timm: folders \d+\.\d\d, shards \d+\.\d\d', last)
    record = json.loads((tmp_path / 'loader.json').read_text())
    assert [table['task'] for table in record['tables']] == ['training', 'evaluation']
    assert str(folder) not in (tmp_path / 'loader.md').read_text() and last in (tmp_path / 'loader.md').read_text()
