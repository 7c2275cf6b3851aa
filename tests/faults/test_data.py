"""Bad and odd images, workers that are killed, evaluation on few images: handled, counted, and the same for all.

    python -m pytest tests/faults/test_data.py
"""

import io
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data.arrays import SyntheticImages
from data.datasets import open_eval
from data.loader import create_loader
from data.samplers import EvalSampler, TrainSampler
from data.transforms import create_eval_transform, create_train_transform
from models import create_model
from tests.conftest import ROOT, launch, run_command, run_script, succeeded, write_images

SEED = 20211011
SMALL = ('--model', 't2t_vit_7', '--img-size', '32', '--device', 'cpu', '--no-tensorboard')
SHORT = ('-b', '6', '--epochs', '1', '--warmup-epochs', '0', '--cooldown-epochs', '0', '--experiment', 'run')


def saved(image: Image.Image, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, **options)
    return file.getvalue()


def noise(mode='RGB') -> Image.Image:
    print('seed', SEED)
    pixels = np.random.default_rng(SEED).integers(0, 256, (40, 36, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def png_of(width: int, height: int) -> bytes:
    """The header of a PNG file of any size, without its pixels."""
    chunks = b'\x89PNG\r\n\x1a\n'
    for name, body in ((b'IHDR', struct.pack('>IIBBBBB', width, height, 8, 2, 0, 0, 0)), (b'IEND', b'')):
        chunks += struct.pack('>I', len(body)) + name + body + struct.pack('>I', zlib.crc32(name + body))
    return chunks


def with_wrong_checksum(png: bytes) -> bytes:
    """One bit of the compressed pixels flipped: the checksum of their chunk says so."""
    place = png.index(b'IDAT') + 40
    return png[:place] + bytes([png[place] ^ 1]) + png[place + 1:]


def bad_images() -> dict[str, bytes]:
    jpeg, png = saved(noise(), format='JPEG', quality=90), saved(noise(), format='PNG')
    return {
        'truncated JPEG': jpeg[:len(jpeg) // 2],
        'JPEG without its last bytes': jpeg[:-200],
        'truncated PNG': png[:len(png) // 2],
        'empty': b'',
        'text': b'this is no image\n',
        'web page': b'<!DOCTYPE html><html><body>404</body></html>',
        'Git LFS pointer': b'version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1234\n',
        'JPEG header only': jpeg[:20],
        'PNG header only': png[:33],
        'bomb': png_of(50_000, 50_000),
        'bomb by its length': saved(Image.new('RGB', (1, 201)), format='PNG'),
        'PNG with a wrong checksum': with_wrong_checksum(png),
        'vector graphics': b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>',
        'PostScript': b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n',
        'zeros': bytes(5000),
        'floating-point TIFF': saved(Image.fromarray(np.zeros((40, 36), np.float32)), format='TIFF'),
    }


def odd_images() -> dict[str, bytes]:
    """Images of kinds that not everybody expects, and that are read."""
    turned = Image.Exif()
    turned[0x0112] = 6
    ramp = np.linspace(0, 65_535, 40 * 36).round().astype(np.uint16).reshape(40, 36)
    frames = [noise('P'), Image.new('P', (36, 40))]
    return {
        'CMYK JPEG': saved(noise('CMYK'), format='JPEG'),
        'greyscale JPEG': saved(noise('L'), format='JPEG'),
        'turned JPEG': saved(noise(), format='JPEG', exif=turned),
        '16-bit PNG': saved(Image.fromarray(ramp), format='PNG'),
        'palette with transparency': saved(noise('P'), format='PNG', transparency=b'\x00\x80\xff'),
        'PNG with alpha': saved(noise('RGBA'), format='PNG'),
        'PNG of one bit': saved(noise('1'), format='PNG'),
        'animated GIF': saved(frames[0], format='GIF', save_all=True, append_images=frames[1:]),
        'BMP': saved(noise(), format='BMP'),
        'one pixel': saved(Image.new('RGB', (1, 1)), format='PNG'),
        'a line': saved(Image.new('RGB', (1, 200)), format='PNG'),
    }


@pytest.fixture(scope='module')
def bad_folder(tmp_path_factory) -> Path:
    """train/ and val/ of three classes with 12 and 5 good images in each, and every bad and odd kind in one of them."""
    root = write_images(tmp_path_factory.mktemp('bad'), {'train': 12, 'val': 5})
    for split in ('train', 'val'):
        for kinds, named in ((bad_images(), 'bad'), (odd_images(), 'odd')):
            for number, content in enumerate(kinds.values()):
                (root / split / 'bee' / f'{named}{number:02}.jpg').write_bytes(content)  # whatever is in it
    return root


NUM_BAD, NUM_ODD = len(bad_images()), len(odd_images())


def loader_of(root: Path, *, training: bool, workers: int, rank=0, world_size=1, batch_size=7, bad=99):
    dataset = open_eval('folder', str(root))
    position = {'rank': rank, 'world_size': world_size}
    if training:
        return create_loader(dataset, create_train_transform(24), TrainSampler(len(dataset), batch_size, **position),
                             seed=SEED, workers=workers, max_bad_images=bad)
    return create_loader(dataset, create_eval_transform(24), EvalSampler(len(dataset), batch_size, **position),
                         seed=SEED, workers=workers, max_bad_images=bad)


# ----------------------------------------------------------------------------------------------------------
# Bad and odd images


@pytest.mark.parametrize('kind', [*bad_images(), *odd_images()])
def test_every_kind_is_handled_and_counted(kind, tmp_path):
    """A bad one is refused with its path at once, or counted where it is allowed for; an odd one is read."""
    content = {**bad_images(), **odd_images()}[kind]
    for name in ('a/0.jpg', 'b/0.jpg', 'b/1.jpg'):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content if name == 'b/0.jpg' else saved(noise(), format='JPEG'))
    is_bad = kind in bad_images()
    for training, batch_size in ((True, 1), (True, 3), (False, 1), (False, 2)):
        loader = loader_of(tmp_path, training=training, workers=0, batch_size=batch_size, bad=1)
        seen = sum(len(targets) for _, targets in loader)
        assert seen == (3 if training or not is_bad else 2)
        assert loader.take_bad_count() == is_bad and list(loader.bad_images) == [str(tmp_path / 'b/0.jpg')] * is_bad
        if is_bad:
            with pytest.raises(ValueError, match='b/0.jpg') as error:
                list(loader_of(tmp_path, training=training, workers=0, batch_size=batch_size, bad=0))
            assert '\n' not in str(error.value)


def test_there_are_twelve_kinds_and_more():
    assert NUM_BAD >= 12 and NUM_ODD >= 8


def test_replacements_depend_neither_on_workers_nor_on_where_an_epoch_begins(bad_folder):
    root = bad_folder / 'train'
    reference = loader_of(root, training=True, workers=0)
    expected, counts = [], []
    for batch in reference:
        expected.append(batch)
        counts.append(reference.take_bad_count())
    assert sum(counts) == len(reference.bad_images) == NUM_BAD
    for workers, start in ((1, 0), (2, 0), (2, 3), (0, 5)):
        loader = loader_of(root, training=True, workers=workers)
        loader.set_position(0, start)
        for index, (images, targets) in enumerate(loader, start):
            assert torch.equal(images, expected[index][0]) and torch.equal(targets, expected[index][1])
            assert loader.take_bad_count() == counts[index]  # of this batch, whatever workers have prepared
        loader.close()


def test_the_ranks_count_together_what_one_rank_counts(bad_folder):
    for training, world_size in ((True, 1), (True, 3), (False, 1), (False, 2), (False, 3)):
        bad, seen = 0, 0
        for rank in range(world_size):
            loader = loader_of(bad_folder / ('train' if training else 'val'), training=training, workers=0, rank=rank,
                               world_size=world_size, batch_size=9 // world_size)
            seen += sum(len(targets) for _, targets in loader)
            bad += loader.take_bad_count()
        assert bad == NUM_BAD
        assert seen == (63 if training else 15 + NUM_ODD)


@pytest.mark.faults
def test_train_and_validate_count_bad_images_and_say_so(bad_folder, tmp_path):
    options = (bad_folder, *SMALL, *SHORT, '-j', '1')
    for allowed, split in (((), 'train'), (('--max-bad-images', '99'), 'val')):
        result = run_script('train.py', *options, *allowed, cwd=tmp_path)
        assert result.returncode == 2 and len(result.stderr.splitlines()) == 1, result.stderr
        assert f'error: image {bad_folder / split / "bee" / "bad"}' in result.stderr
        shutil.rmtree(tmp_path / 'output')
    out = succeeded(run_script('train.py', *options, '--max-bad-images', '99', '--max-bad-val-images', '99',
                               cwd=tmp_path))
    run = tmp_path / 'output/train/run'
    record = [json.loads(line) for line in open(run / 'metrics.jsonl')][-1]
    assert record['train_bad_images'] + 3 >= NUM_BAD >= record['train_bad_images'] > 0  # 3 images fill no batch
    assert (record['count'], record['bad_images']) == (15 + NUM_ODD, NUM_BAD)
    assert out.count('of 99 tolerated') == record['train_bad_images'] + NUM_BAD

    evaluate = (bad_folder, *SMALL[:-1], '-b', '4', '--eval-checkpoint', run / 'last.pth.tar', '--results-file', 'r')
    out = succeeded(launch(2, *evaluate, '-j', '0', '--max-bad-val-images', '99', cwd=tmp_path, SCRIPT='validate.py'))
    assert f'Evaluated {15 + NUM_ODD} images, {NUM_BAD} left out that cannot be decoded' in out
    result = json.loads((tmp_path / 'r.json').read_text())
    assert (result['count'], result['bad_images']) == (15 + NUM_ODD, NUM_BAD)


def test_an_evaluation_without_any_image_left_is_one_line(bad_folder, tmp_path):
    for name in ('a', 'b'):
        (tmp_path / 'val' / name).mkdir(parents=True)
        (tmp_path / 'val' / name / 'empty.jpg').touch()
    checkpoint = tmp_path / 'w.pth'
    torch.save(create_model('t2t_vit_7', num_classes=2, img_size=32).state_dict(), checkpoint)
    result = run_script('validate.py', tmp_path, *SMALL[:-1], '-j', '0', '--eval-checkpoint', checkpoint,
                        '--max-bad-val-images', '5', cwd=tmp_path)
    assert result.returncode == 2 and 'none of 2 evaluation images can be decoded' in result.stderr
    assert len(result.stderr.splitlines()) == 1


# ----------------------------------------------------------------------------------------------------------
# Evaluation counts every image once

EVALUATION = '''
import json, sys
import torch
from torch import nn
from data.batch import BatchPreparer
from data.arrays import SyntheticImages
from data.loader import create_loader
from data.samplers import EvalSampler
from data.transforms import create_eval_transform
from engine.evaluate import evaluate
from utils.distributed import init_process_group, destroy_process_group
from utils.runtime import Precision

world = init_process_group('cpu')
torch.manual_seed(0)
model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 7))
found = {}
for number in map(int, filter(str.isdigit, sys.argv)):
    dataset = SyntheticImages(number, 8, 7)
    loader = create_loader(dataset, create_eval_transform(8), EvalSampler(number, 4, rank=world.rank,
                           world_size=world.size), workers=0)
    found[number] = evaluate(model, loader, BatchPreparer('cpu'), precision=Precision(world.device, enabled=False)
                             ).as_dict()
if world.is_main:
    print(json.dumps(found))
destroy_process_group()
'''


@pytest.mark.faults
def test_evaluation_is_exact_on_real_processes_for_1_to_33_images(tmp_path, record_property):
    """Each N on one process and on two: the same sums, and the number of images as it is."""
    numbers = range(1, 34)
    (tmp_path / 'script.py').write_text(EVALUATION)
    results = {}
    script = (tmp_path / 'script.py', *numbers, '--device', 'cpu')
    together = [sys.executable, '-m', 'launch.launcher', 2, *script]
    for num_proc, run in ((1, lambda: run_script(*script, cwd=ROOT)),
                          (2, lambda: run_command(together, ROOT, PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1'))):
        out = succeeded(run())
        text = next(line for line in out.splitlines() if line.startswith('{'))
        results[num_proc] = {int(number): result for number, result in json.loads(text).items()}
    assert list(results[1]) == list(numbers)
    for number in numbers:
        alone, together = results[1][number], results[2][number]
        assert alone['count'] == together['count'] == number
        assert (alone['top1'], alone['top5']) == (together['top1'], together['top5'])
        assert alone['loss'] == pytest.approx(together['loss'], rel=1e-6)
    record_property('images', f'{numbers[0]} … {numbers[-1]}')
    record_property('processes', ' and '.join(map(str, results)))


def test_the_samples_of_evaluation_are_those_of_the_dataset():
    for world_size in (1, 2):
        for number in range(1, 34):
            dataset, targets = SyntheticImages(number, 8, number), []
            for rank in range(world_size):
                sampler = EvalSampler(number, 4, rank=rank, world_size=world_size)
                loader = create_loader(dataset, create_eval_transform(8), sampler, workers=0)
                targets += [target for _, batch in loader for target in batch.tolist()]
            assert sorted(targets) == list(range(number))


# ----------------------------------------------------------------------------------------------------------
# A worker that is killed


def children_of(pid: int) -> list[int]:
    return [int(child) for task in Path(f'/proc/{pid}/task').iterdir()
            for child in (task / 'children').read_text().split()]


def test_a_killed_worker_ends_the_run_with_one_line(image_folder, tmp_path):
    """As the system does it where memory has run out: 137, for which a launcher starts the run again."""
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONUNBUFFERED': '1'}
    options = [str(o) for o in (image_folder, *SMALL, *SHORT, '--epochs', '9999', '--log-interval', '1', '-j', '2')]
    process = subprocess.Popen([sys.executable, ROOT / 'train.py', *options], cwd=tmp_path, env=env, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
    watchdog = threading.Timer(120, process.kill)
    watchdog.start()
    try:
        next(line for line in process.stdout if line.startswith('Train: 1 [   2'))
        os.kill(children_of(process.pid)[0], signal.SIGKILL)
        started = time.monotonic()
        _, err = process.communicate()
    finally:
        watchdog.cancel()
        process.kill()
    assert process.returncode == 137, err
    assert len(err.splitlines()) == 1 and err.startswith('train.py: error: a data loading process died'), err
    assert '--workers' in err and '/dev/shm' in err
    assert time.monotonic() - started < 30


# --- A small /dev/shm -------------------------------------------------------------------------------------------------

def place_of(address: int) -> str:
    """Return the file whose memory lies at an address of this process."""
    for line in Path('/proc/self/maps').read_text().splitlines():
        bounds, *_, name = line.split(maxsplit=5) + [''] * (6 - len(line.split(maxsplit=5)))
        start, end = (int(bound, 16) for bound in bounds.split('-'))
        if start <= address < end:
            return name
    return ''


@pytest.mark.skipif(not hasattr(os, 'memfd_create'), reason='only Linux has memory of this kind')
def test_batches_of_workers_take_no_room_of_dev_shm():
    loader = create_loader(SyntheticImages(24), create_eval_transform(32), EvalSampler(24, 8), workers=2)
    for images, targets in loader:
        assert place_of(images.data_ptr()).startswith('/memfd:') and place_of(targets.data_ptr()).startswith('/memfd:')
        assert images.shape == (8, 3, 32, 32) and len(targets) == 8
    loader.close()


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which('unshare'), reason='mounting a /dev/shm needs root')
def test_training_with_less_of_dev_shm_than_a_batch_takes(tmp_path):
    """As in a container, but smaller: 512 KiB, where a batch takes 648. With 16 KiB, no worker can be started."""
    write_images(tmp_path / 'data', {'train': 12, 'val': 4}, classes=('a', 'b'))
    options = (*SMALL, *SHORT, '--img-size', 96, '-b', 24, '-j', 2)
    command = ' '.join(map(str, (sys.executable, ROOT / 'train.py', tmp_path / 'data', *options)))
    results = [run_command(['unshare', '-m', 'sh', '-c', f'mount -t tmpfs -o size={size} tmpfs /dev/shm || exit 77; '
                            f'exec {command} --output {size}'], cwd=tmp_path) for size in ('512k', '16k')]
    if results[0].returncode == 77:
        pytest.skip('this machine mounts nothing')
    assert '/dev/shm has only 0 MiB: the batches of --workers are in other memory' in succeeded(results[0])
    assert results[1].returncode == 2 and 'Traceback' not in results[1].stderr
    assert 'loader workers cannot be started (No space left on device); use fewer --workers' in results[1].stderr


def test_too_few_descriptors_are_one_line(image_folder, tmp_path):
    command = ' '.join(map(str, (sys.executable, ROOT / 'train.py', image_folder, *SMALL, *SHORT, '-j', 2, '--output',
                                 tmp_path)))
    result = run_command(['sh', '-c', f'ulimit -n 24; exec {command}'], cwd=tmp_path)
    assert result.returncode == 2 and 'Traceback' not in result.stderr
    assert len(result.stderr.splitlines()) == 1 and 'ulimit -n' in result.stderr and '--workers' in result.stderr
