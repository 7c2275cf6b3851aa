"""Tests of tools/pack.py, data/shards/packing.py, data/shards/verifying.py and data/shards/ilsvrc.py.

    python -m pytest tests/test_pack.py
"""
import contextlib
import hashlib
import io
import os
import re
import shutil
import tarfile
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.decode import decode_rgb
from data.folders import ImageFolder
from data.shards import ilsvrc, packing, plan
from data.shards.manifest import Manifest, key_of
from tests.conftest import run_script, succeeded, write_images
from tools.pack import main
from utils.errors import UserError
from utils.parallel import in_processes

SEED = 20211011


@pytest.fixture(autouse=True, scope='module')
def loggers_of_the_tests():
    """The tool would set up its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr('utils.console.setup_logging', lambda **_: None)
        yield


def pack(*options) -> str:
    """What the tool prints; it must succeed."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        main([str(option) for option in options])
    return out.getvalue()


def refused(message: str, *options) -> None:
    with pytest.raises(UserError) as caught:
        pack(*options)
    assert re.search(message, str(caught.value)) and '\n' not in str(caught.value), str(caught.value)


def faults(folder: Path, *options) -> str:
    """What --verify prints of a folder with something wrong in it."""
    with contextlib.redirect_stdout(io.StringIO()) as out, pytest.raises(SystemExit) as caught:
        main(['--verify', str(folder), *options])
    assert caught.value.code == 1
    return out.getvalue()


def read(split: Path) -> Manifest:
    return Manifest.read(lambda name: (split / name).read_bytes(), str(split))


def samples(split: Path) -> dict[str, tuple[bytes, str]]:
    """Content and class of every image by its key, read by tarfile alone, which knows nothing of the index."""
    classes, found = read(split).classes, {}
    for path in sorted(split.glob('*.tar')):
        with tarfile.open(path) as file:
            members = {member.name: file.extractfile(member).read() for member in file}
        for name, content in members.items():
            key, ending = key_of(name)
            if ending != 'cls':
                found[key] = content, classes[int(members[f'{key}.cls'])]
    return found


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob('*')) if path.is_file()}


@pytest.fixture(scope='module')
def packed(tmp_path_factory, image_folder) -> Path:
    """Both splits of the image folder, seven images to a shard."""
    out = tmp_path_factory.mktemp('packed')
    printed = pack(image_folder, out, '--samples', 7, '-j', 2)
    assert '36 images of 3 classes in 6 shards' in printed and '15 images of 3 classes in 3 shards' in printed
    return out


@pytest.fixture
def copy(packed, tmp_path) -> Path:
    """A copy of the packed training split, to be damaged."""
    return Path(shutil.copytree(packed / 'train', tmp_path / 'shards'))


# ------------------------------------------------------------------------------------------------------------
# Packing

def test_every_image_is_packed_once_as_it_was(packed, image_folder):
    for split in ('train', 'val'):
        folder = ImageFolder(str(image_folder / split))
        found = samples(packed / split)
        assert len(found) == len(folder)
        for index, target in enumerate(folder.targets):
            name = os.path.relpath(folder.path(index), folder.folder)
            assert found[os.path.splitext(name)[0]] == (folder.read_bytes_or_image(index), folder.classes[target])


def test_index_says_where_images_lie(packed):
    manifest = read(packed / 'train')
    found = samples(packed / 'train')
    assert [shard.samples for shard in manifest.shards] == [7] * 5 + [1]
    for number, shard in enumerate(manifest.shards):
        stored = (packed / 'train' / shard.name).read_bytes()
        assert (len(stored), hashlib.sha256(stored).hexdigest()) == (shard.bytes, shard.sha256)
        for sample in range(manifest.shard_offsets[number], manifest.shard_offsets[number + 1]):
            start, size = manifest.index.offset[sample], manifest.index.size[sample]
            image, name = found[key_of(manifest.index.name(sample))[0]]
            assert stored[start:start + size] == image and manifest.classes[manifest.index.target[sample]] == name
    # Classes are mixed: no shard of seven holds one class alone.
    assert all(len(set(manifest.index.target[start:start + 7])) > 1 for start in range(0, 35, 7))


def test_shards_depend_on_images_and_options_alone(packed, image_folder, tmp_path):
    later = Path(shutil.copytree(image_folder, tmp_path / image_folder.name))
    for path in later.rglob('*.jpg'):
        os.utime(path, (1, 1))
    pack(later, tmp_path / 'one', '--samples', 7, '-j', 1)
    assert content(tmp_path / 'one') == content(packed)
    pack(later, tmp_path / 'other', '--samples', 7, '--seed', 1, '--split', 'val')
    assert samples(tmp_path / 'other/val') == samples(packed / 'val')
    assert content(tmp_path / 'other/val') != content(packed / 'val')


def test_shard_size(image_folder, tmp_path):
    pack(image_folder / 'train', tmp_path / 'out', '--shard-size', 0.02)
    sizes = [shard.bytes for shard in read(tmp_path / 'out').shards]
    assert len(sizes) > 2 and all(0.5 * 20_000 < size < 1.5 * 20_000 for size in sizes[:-1])


def test_names_that_tar_or_webdataset_would_confuse(tmp_path):
    names = ['ant/a.b.jpg', 'ant/a_b.jpg', 'ant/a.jpg', 'ant/a.JPEG', f'ant/deep/{"n" * 120}.jpg', 'ant/x\\y.jpg',
             'bee/ä ö.jpg', 'bee/a.jpg', 'bee/\udcff.jpg', 'bee\udcff/a.jpg']
    source = write_images(tmp_path / 'images', {'all': 1}, ('some',)) / 'all/some/some_0.jpg'
    for index, name in enumerate(names):
        path = tmp_path / 'data' / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(source.read_bytes() + bytes([index]) * index)  # what follows the end of a JPEG file is ignored
    (tmp_path / 'data/bee\udcff/b.jpg').write_bytes(b'bad')
    pack(tmp_path / 'data', tmp_path / 'out', '--max-bad-images', 1)
    manifest = read(tmp_path / 'out')
    assert manifest.classes == ['ant', 'bee', 'bee\udcff'] and manifest.left_out[0][0] == 'bee\udcff/b.jpg'
    found = samples(tmp_path / 'out')
    assert len(found) == len(names) and len({image for image, _ in found.values()}) == len(names)
    assert {'ant/a', 'ant/a_2', 'ant/a_b', 'ant/a_b_2', 'bee/ä ö', 'bee/a', 'ant/x_y'} <= found.keys()
    assert 'all well' in pack('--verify', tmp_path / 'out')


# ------------------------------------------------------------------------------------------------------------
# Resizing

@pytest.fixture(scope='module')
def resized(tmp_path_factory) -> tuple[Path, Path]:
    """A split of images of several kinds, and its shards with a short side of 64."""
    root = tmp_path_factory.mktemp('resized')
    (root / 'in/ant').mkdir(parents=True)
    print('seed', SEED)
    noise = np.random.default_rng(SEED).integers(0, 256, (12, 15, 3), dtype=np.uint8)
    photo = Image.fromarray(noise).resize((150, 120), Image.Resampling.BICUBIC)
    turned = Image.Exif()
    turned[0x0112] = 6
    photo.save(root / 'in/ant/large.jpg', quality=97, exif=turned, icc_profile=b'profile' * 20, comment=b'remark')
    photo.resize((100, 64)).save(root / 'in/ant/small.jpg')
    photo.convert('RGBA').save(root / 'in/ant/alpha.png')
    photo.convert('L').save(root / 'in/ant/grey.jpg')
    photo.transpose(Image.Transpose.ROTATE_90).save(root / 'in/ant/tall.webp', lossless=True)
    photo.resize((50, 40)).save(root / 'in/ant/little.png')
    pack(root / 'in', root / 'out', '--short-side', 64, '--quality', 92)
    return root / 'in', root / 'out'


def test_larger_images_are_resized_once_and_others_copied(resized):
    folder, out = resized
    found = samples(out)
    assert found['ant/small'][0] == (folder / 'ant/small.jpg').read_bytes()
    assert found['ant/little'][0] == (folder / 'ant/little.png').read_bytes()
    for name in ('large.jpg', 'alpha.png', 'grey.jpg', 'tall.webp'):
        size = (64, 80) if name == 'tall.webp' else (80, 64)
        with Image.open(io.BytesIO(found[f'ant/{name.split(".")[0]}'][0])) as image:
            assert (image.format, image.mode, image.size) == ('JPEG', 'RGB', size)
            assert not image.getexif() and not {'icc_profile', 'comment', 'exif'} & image.info.keys()
            pixels = np.asarray(image).astype(int)
        original = decode_rgb((folder / 'ant' / name).read_bytes(), name)
        expected = np.asarray(original.resize(size, Image.Resampling.BICUBIC)).astype(int)
        assert 0 < np.abs(pixels - expected).mean() < 8, name
    assert {read(out).index.name(sample).rpartition('.')[2] for sample in range(6)} == {'jpg', 'png'}


@pytest.mark.parametrize('side, is_resized', [(329, True), (330, False)])
def test_images_that_would_be_too_long_for_jpeg_are_copied(side, is_resized):
    buffer = io.BytesIO()
    Image.new('L', (331 * 199, 331)).save(buffer, 'PNG')
    content, resized = plan.prepare(buffer.getvalue(), '', plan.Recipe(short_side=side), plan.Loss())
    assert resized is is_resized is (content != buffer.getvalue())


def test_manifest_says_what_resizing_cost(resized):
    folder, out = resized
    said, errors, before, after = read(out).transcoded, [], 0, 0
    for key, (image, _) in samples(out).items():
        path = next(folder.glob(f'{key}.*'))
        if path.read_bytes() != image:
            saved = decode_rgb(image, key)
            whole = decode_rgb(path.read_bytes(), key).resize(saved.size, Image.Resampling.BICUBIC)
            errors.append(np.mean((np.asarray(saved, np.float64) - np.asarray(whole, np.float64)) ** 2))
            before, after = before + path.stat().st_size, after + len(image)
    psnr = np.mean(10 * np.log10(255 ** 2 / np.array(errors)))
    assert (said['short_side'], said['quality'], said['filter'], said['images']) == (64, 92, 'bicubic', 4)
    assert (said['bytes_before'], said['bytes_after']) == (before, after)
    assert abs(said['psnr_db'] - psnr) < 0.01 and said['psnr_images'] == 4


def test_of_several_splits_only_train_is_resized(image_folder, tmp_path):
    printed = pack(image_folder, tmp_path / 'out', '--short-side', 24)
    assert '36 images resized to 24, quality 95' in printed and printed.count('resized') == 1
    assert read(tmp_path / 'out/val').transcoded is None
    pack(image_folder, tmp_path / 'val', '--short-side', 24, '--split', 'val')
    assert read(tmp_path / 'val/val').transcoded['images'] == 15


# ------------------------------------------------------------------------------------------------------------
# Going on

class Stop(Exception):
    pass


@pytest.fixture
def begun(image_folder, tmp_path, monkeypatch) -> Path:
    """A packing of the training split that has ended after two of its six shards."""
    def two(work, items, **options):
        yield from in_processes(work, items[:2], **options)
        raise Stop

    monkeypatch.setattr(packing, 'in_processes', two)
    with pytest.raises(Stop):
        pack(image_folder / 'train', tmp_path / 'out', '--samples', 7)
    monkeypatch.undo()
    assert len(list((tmp_path / 'out').glob('*.tar'))) == 2 and not (tmp_path / 'out/manifest.json').exists()
    return tmp_path / 'out'


def test_goes_on_with_what_is_whole(begun, image_folder, packed, monkeypatch):
    refused('no manifest.json in it; .* start the same command again', '--verify', begun)
    written = {path.name: path.stat().st_mtime_ns for path in begun.glob('*.tar')}
    (begun / 'shard-000001.tar').write_bytes(b'cut off')  # as after a loss of power
    (begun / '.shard-000004.tar.tmp').write_bytes(b'half')
    pack(image_folder / 'train', begun, '--samples', 7)
    assert (begun / 'shard-000000.tar').stat().st_mtime_ns == written['shard-000000.tar']
    assert content(begun) == content(packed / 'train')
    before = content(begun)
    assert '36 images' in pack(image_folder / 'train', begun, '--samples', 7)  # done already
    assert content(begun) == before


def test_a_shard_that_goes_while_others_are_written_is_named(image_folder, tmp_path, monkeypatch):
    def losing(*arguments, **options):
        for found in in_processes(*arguments, **options):
            (tmp_path / 'out/shard-000000.tar').unlink(missing_ok=True)
            yield found

    monkeypatch.setattr(packing, 'in_processes', losing)
    refused(r'shard-000000\.tar has gone since it was written', image_folder / 'train', tmp_path / 'out', '-j', 1)
    assert not (tmp_path / 'out/manifest.json').exists()


def test_refuses_to_go_on_with_something_else(begun, image_folder, tmp_path):
    train = image_folder / 'train'
    refused('was begun with --samples 7, and is now to go on without --samples', train, begun)
    refused('with --seed 0, and is now to go on with --seed 3', train, begun, '--samples', 7, '--seed', 3)
    refused('without --short-side, and is now to go on with --short-side 20', train, begun, '--samples', 7,
            '--short-side', 20)
    other = Path(shutil.copytree(train, tmp_path / 'train'))
    (other / 'ant/ant_3.jpg').write_bytes(b'other')
    refused("other images \\(changed: 'ant/ant_3.jpg'\\)", other, begun, '--samples', 7)
    (other / 'ant/ant_3.jpg').rename(other / 'ant/new.jpg')
    refused("gone: 'ant/ant_3.jpg' and new: 'ant/new.jpg'", other, begun, '--samples', 7)


def test_refuses_a_folder_with_something_else_in_it(packed, image_folder, tmp_path):
    refused('train was begun with --samples 7, and is now to go on with --samples 8', image_folder, packed, '--samples',
            8)
    refused('other images', image_folder / 'val', packed / 'train', '--samples', 7)
    (tmp_path / 'notes.txt').write_text('mine')
    refused("holds 'notes.txt'", image_folder / 'train', tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ['notes.txt']
    refused('lies in', image_folder, image_folder / 'shards')
    refused('holds shards already; to check them: --verify', packed, tmp_path / 'again')
    (tmp_path / 'file').write_text('')
    refused('file cannot be written', image_folder / 'train', tmp_path / 'file')


def test_room_is_looked_for_first(image_folder, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, 'disk_usage', lambda path: usage._replace(free=20_000))
    refused(r'0\.1\d GB are needed and 0\.00 GB free|0\.0\d GB are needed and 0\.00 GB free', image_folder / 'train',
            tmp_path / 'out')
    assert not list((tmp_path / 'out').glob('*.tar'))


def test_one_packs_at_a_time(image_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(packing.time, 'sleep', lambda seconds: None)
    with packing._locked(tmp_path / 'out'):
        refused('is being packed by another process', image_folder / 'train', tmp_path / 'out')


# ------------------------------------------------------------------------------------------------------------
# Bad images

def test_bad_images_are_counted_named_and_left_out_when_asked(image_folder, tmp_path):
    folder = Path(shutil.copytree(image_folder / 'train', tmp_path / 'in'))
    whole = (folder / 'ant/ant_0.jpg').read_bytes()
    (folder / 'ant/ant_0.jpg').write_bytes(whole[:len(whole) // 2])
    (folder / 'bee/bee_0.jpg').write_bytes(b'')
    (folder / 'cat/gone.jpg').symlink_to(tmp_path / 'nowhere')
    out = tmp_path / 'out'
    message = (r"3 bad images, 0 allowed: 'ant/ant_0.jpg' \(cannot be decoded.*'bee/bee_0.jpg' \(the file is empty\), "
               r"'cat/gone.jpg' \(No such file.*--max-bad-images 3 leaves them out")
    refused(message, folder, out, '--samples', 10)
    refused('3 bad images, 2 allowed', folder, out, '--samples', 10, '--max-bad-images', 2)
    assert not (out / 'manifest.json').exists()
    written = {path: path.stat().st_mtime_ns for path in out.glob('*.tar')}
    assert '3 bad images are left out' in pack(folder, out, '--samples', 10, '--max-bad-images', 3)
    assert {path: path.stat().st_mtime_ns for path in out.glob('*.tar')} == written  # it had been done
    assert [name for name, _ in read(out).left_out] == ['ant/ant_0.jpg', 'bee/bee_0.jpg', 'cat/gone.jpg']
    assert str(tmp_path) not in (out / 'manifest.json').read_text()
    assert len(samples(out)) == 34 and 'all well' in pack('--verify', '--decode', out)


def test_decode_finds_what_headers_do_not_show(image_folder, tmp_path):
    folder = Path(shutil.copytree(image_folder / 'train', tmp_path / 'in'))
    path = folder / 'ant/ant_0.jpg'
    Image.open(path).save(path, progressive=True)  # so that there is a table behind the first scan
    whole = path.read_bytes()
    table = whole.rindex(b'\xff\xc4') + 5  # how many codes of each length there are: more than there can be
    path.write_bytes(whole[:table] + b'\xff' * 16 + whole[table + 16:])
    pack(folder, tmp_path / 'out')
    assert "1 bad images: ant/ant_0.jpg: cannot be decoded" in faults(tmp_path / 'out', '--decode')
    refused("1 bad images, 0 allowed: 'ant/ant_0.jpg'", folder, tmp_path / 'other', '--decode')


def test_a_disk_of_bad_images_ends_it(tmp_path, monkeypatch):
    monkeypatch.setattr(packing, 'ENOUGH', 5)
    (tmp_path / 'in/ant').mkdir(parents=True)
    for index in range(40):
        (tmp_path / f'in/ant/{index}.jpg').write_bytes(b'')
    refused('[67] bad images in |folder in: [67] bad images, 0 allowed', tmp_path / 'in', tmp_path / 'out', '-j', 1)


def test_splits_of_other_classes(image_folder, tmp_path):
    folder = Path(shutil.copytree(image_folder, tmp_path / 'in'))
    shutil.rmtree(folder / 'val/bee')
    refused("lacks 1 class of .*'bee'", folder, tmp_path / 'out')
    assert not (tmp_path / 'out').exists()
    pack(folder, tmp_path / 'out', '--split', 'val')
    assert read(tmp_path / 'out/val').classes == ['ant', 'cat']


# ------------------------------------------------------------------------------------------------------------
# Verifying

def test_all_is_well(packed):
    printed = succeeded(run_script('tools/pack.py', '--verify', '--decode', packed, cwd=packed))
    assert re.search(r'train: 36 images of 3 classes, 12 to 12 of each, in 6 shards of .* MB: all well', printed)
    assert re.search(r'val: 15 images of 3 classes, 5 to 5 of each, in 3 shards of .* MB: all well', printed)


def test_damaged_shards_are_named(copy):
    def change(name: str, position: int) -> None:
        damaged = bytearray((copy / name).read_bytes())
        damaged[position] ^= 1
        (copy / name).write_bytes(damaged)

    change('shard-000000.tar', 700)  # in an image
    (copy / 'shard-000001.tar').unlink()
    cut = (copy / 'shard-000002.tar').read_bytes()
    (copy / 'shard-000002.tar').write_bytes(cut[:-3000])
    shutil.copy(copy / 'shard-000003.tar', copy / 'shard-000004.tar')
    shutil.copy(copy / 'shard-000005.tar', copy / 'shard-000009.tar')
    result = run_script('tools/pack.py', '--verify', copy, cwd=copy)
    lines = [line.strip() for line in result.stdout.splitlines()]
    assert result.returncode == 1 and lines[0].endswith(': 7 faults'), result.stdout
    said = {name: [line for line in lines if line.startswith(name)] for name in
            (f'shard-00000{number}.tar' for number in (0, 1, 2, 3, 4, 9))}
    assert len(said['shard-000000.tar']) == 1 and 'another checksum' in said['shard-000000.tar'][0]
    assert 'No such file' in said['shard-000001.tar'][0]
    assert 'ends early' in said['shard-000002.tar'][0] and 'in the manifest' in said['shard-000002.tar'][1]
    assert not said['shard-000003.tar']
    assert any('7 images are in the index, not in it' in line for line in said['shard-000004.tar'])
    assert 'is not in the manifest' in said['shard-000009.tar'][0]


def test_a_manifest_that_disagrees(copy, image_folder):
    text = (copy / 'manifest.json').read_text()
    (copy / 'manifest.json').write_text(text.replace('"samples": 36', '"samples": 35'))
    assert 'manifest.json' in faults(copy) and 'disagrees' in faults(copy)
    (copy / 'manifest.json').write_text(text)
    manifest = read(copy)
    manifest.index.target[0] = (manifest.index.target[0] + 1) % 3
    manifest.index.offset[1] += 512
    manifest.write(copy)
    printed = faults(copy)
    assert '1 images have another class than in the index' in printed
    assert '1 images lie elsewhere than in the index' in printed
    (copy / 'index.npz').unlink()
    refused('index.npz cannot be read', image_folder / 'train', copy, '--samples', 7)


@pytest.fixture
def server(copy) -> Iterator[str]:
    """The address of a copy of the packed training split, by a server that knows ranges."""
    class Handler(SimpleHTTPRequestHandler):
        def do_GET(self):
            path = copy / self.path.lstrip('/')
            if not path.is_file():
                return self.send_error(404)
            data, asked = path.read_bytes(), re.match(r'bytes=(\d+)-(\d+)', self.headers.get('Range', ''))
            first, last = (int(asked[1]), int(asked[2])) if asked else (0, len(data) - 1)
            self.send_response(206 if asked else 200)
            self.send_header('Content-Length', str(len(data[first:last + 1])))
            self.send_header('Content-Range', f'bytes {first}-{last}/{len(data)}')
            self.end_headers()
            self.wfile.write(data[first:last + 1])

        def log_message(self, *arguments):
            pass

    with ThreadingHTTPServer(('127.0.0.1', 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f'http://127.0.0.1:{server.server_port}'
        server.shutdown()


def test_shards_on_a_server(server, copy):
    pytest.importorskip('aiohttp', reason='aiohttp is not installed (requirements-shards.txt)')
    assert 'in 6 shards of 0.1 MB: all well' in pack('--verify', f'wds:{server}', '-j', 2)
    (copy / 'shard-000001.tar').unlink()
    damaged = bytearray((copy / 'shard-000002.tar').read_bytes())
    damaged[700] ^= 1
    (copy / 'shard-000002.tar').write_bytes(damaged)
    printed = faults(server)
    assert '2 faults' in printed and re.search(r'shard-000001.tar  .*/shard-000001.tar', printed)
    assert re.search('shard-000002.tar  .*SHA-256', printed)
    refused('no manifest.json in it', '--verify', f'{server}/elsewhere')


def test_index_of_shards_from_elsewhere(packed, tmp_path):
    folder, original = tmp_path / 'shards', read(packed / 'train')
    folder.mkdir()
    for path in (packed / 'train').glob('*.tar'):
        shutil.copy(path, folder)
    (tmp_path / 'map.txt').write_text('ant\nbee\ncat\n')
    assert '36 images of 3 classes in 6 shards' in pack('--index', folder, '--class-map', tmp_path / 'map.txt')
    made = read(folder)
    assert made.classes == original.classes and made.shards == original.shards
    assert {name: value.tolist() for name, value in vars(made.index).items()} == {
        name: value.tolist() for name, value in vars(original.index).items()}
    assert 'all well' in pack('--verify', '--decode', folder)
    (folder / 'shard-000002.tar').write_bytes((folder / 'shard-000001.tar').read_bytes())
    assert 'another checksum' in faults(folder)
    refused('has a manifest.json already', '--index', folder)
    (folder / 'manifest.json').unlink()
    (tmp_path / 'map.txt').write_text('ant\nbee\n')
    refused('--class-map: it has 2 classes, and the classes of the shards are numbers up to 2', '--index', folder,
            '--class-map', tmp_path / 'map.txt')
    (folder / 'shard-000003.tar').rename(folder / 'what ever.tar')
    refused("'what ever.tar' is no name of a shard", '--index', folder)
    assert not (folder / 'manifest.json').exists()
    (folder / 'what ever.tar').unlink()
    (folder / 'index.npz').unlink()
    (folder / 'index.npz').mkdir()
    refused('shards cannot be written', '--index', folder)
    (folder / 'a.tar').mkdir()
    refused('a.tar cannot be read .Is a directory', '--index', folder)
    refused('no .tar files in it', '--index', tmp_path)


# ------------------------------------------------------------------------------------------------------------
# The original archives

WNIDS = ['n01440764', 'n02119789', 'n03000247', 'n09999999']  # the last is a group of others, and no class


def tar_of(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, 'w:gz' if path.suffix == '.gz' else 'w') as file:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return path


@pytest.fixture(scope='module')
def archives(tmp_path_factory) -> Path:
    """The three archives, of the structure of the originals: three classes of four images, six for validation."""
    scipy = pytest.importorskip('scipy.io', reason='scipy is not installed (requirements-shards.txt)')
    root = tmp_path_factory.mktemp('archives')
    images = write_images(root / 'images', {'train': 4, 'val': 2}, WNIDS[:3])
    inner = {}
    for wnid in (WNIDS[1], WNIDS[0], WNIDS[2]):
        inner[f'{wnid}.tar'] = tar_of(root / 'inner.tar', {
            path.name.replace('.jpg', '.JPEG'): path.read_bytes() for path in (images / 'train' / wnid).iterdir()
        }).read_bytes()
    tar_of(root / ilsvrc.ARCHIVES['train'], inner)
    paths = sorted((images / 'val').rglob('*.jpg'), key=lambda path: path.name[-5:] + path.name)
    tar_of(root / ilsvrc.ARCHIVES['val'], {
        f'ILSVRC2012_val_{number + 1:08d}.JPEG': paths[number].read_bytes() for number in (4, 1, 5, 0, 2, 3)})
    # ILSVRC's numbers follow no order of the WordNet ids.
    numbers = dict(zip(WNIDS, (3, 1, 2, 4), strict=True))
    kinds = [('ILSVRC2012_ID', 'O'), ('WNID', 'O'), ('words', 'O'), ('gloss', 'O'), ('num_children', 'O'),
             ('children', 'O'), ('wordnet_height', 'O'), ('num_train_images', 'O')]
    synsets = np.array([(numbers[wnid], wnid, f'{wnid}, word', 'a gloss', float(3 * (wnid == WNIDS[3])),
                         [1, 2, 3] if wnid == WNIDS[3] else [], 0, 4) for wnid in WNIDS], kinds).reshape(-1, 1)
    meta = io.BytesIO()
    scipy.savemat(meta, {'synsets': synsets})
    truth = ''.join(f'{numbers[path.parent.name]}\n' for path in paths)
    tar_of(root / ilsvrc.DEVKIT, {
        'ILSVRC2012_devkit_t12/readme.txt': b'read me', 'ILSVRC2012_devkit_t12/data/meta.mat': meta.getvalue(),
        'ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt': truth.encode()})
    (root / 'inner.tar').unlink()
    return root


def expected_files(archives: Path) -> dict[str, bytes]:
    paths = sorted((archives / 'images/val').rglob('*.jpg'), key=lambda path: path.name[-5:] + path.name)
    files = {f'val/{path.parent.name}/ILSVRC2012_val_{number + 1:08d}.JPEG': path.read_bytes()
             for number, path in enumerate(paths)}
    return files | {f'train/{path.parent.name}/{path.stem}.JPEG': path.read_bytes()
                    for path in (archives / 'images/train').rglob('*.jpg')}


def test_archives_to_folders(archives, tmp_path):
    pack(archives, tmp_path / 'out', '--to', 'folders', '-j', 2)
    shutil.rmtree(tmp_path / 'out/val')  # as if it had been interrupted then
    pack(archives, tmp_path / 'out', '--to', 'folders', '-j', 2)
    assert content(tmp_path / 'out') == expected_files(archives)
    next((tmp_path / 'out/train').rglob('*.JPEG')).unlink()
    refused('train is there already, without all', archives, tmp_path / 'out', '--to', 'folders')


def test_archives_to_folders_go_on(archives, tmp_path):
    partial = tmp_path / '.train.partial' / WNIDS[0]
    partial.mkdir(parents=True)
    (partial / f'{WNIDS[0]}_0.JPEG').write_bytes(b'half of it')
    pack(archives / ilsvrc.ARCHIVES['train'], tmp_path, '--to', 'folders')
    assert content(tmp_path) == {k: v for k, v in expected_files(archives).items() if k.startswith('train')}


def test_archives_to_shards(archives, tmp_path, caplog):
    pack(archives, tmp_path / 'out', '--samples', 5)
    assert 'train.tar: 12 images of 3 classes; ImageNet has 1281167 of 1000' in caplog.text
    found = {}
    for split in ('train', 'val'):
        assert read(tmp_path / 'out' / split).classes == WNIDS[:3]
        for key, (image, name) in samples(tmp_path / 'out' / split).items():
            assert key.startswith(f'{name}/')
            found[f'{split}/{key}.JPEG'] = image
    assert found == expected_files(archives)


def test_archives_that_are_not_right(archives, tmp_path):
    train, val = (archives / ilsvrc.ARCHIVES[split] for split in ('train', 'val'))
    refused("MD5 is [0-9a-f]{32}, that of ILSVRC2012_img_train.tar is 1d675b47d978889d74fa0da5fadfb00e", train,
            tmp_path / 'out', '--verify')
    refused('--split val: .* the archive of train alone', train, tmp_path / 'out', '--split', 'val')
    alone = Path(shutil.copy(val, tmp_path / 'renamed.tar'))
    refused('the classes of its images are in ILSVRC2012_devkit_t12.tar.gz', alone, tmp_path / 'out')
    refused('does not exist', alone, tmp_path / 'out', '--devkit', tmp_path / 'nothing.tar.gz')
    refused('is damaged, or not ILSVRC2012_devkit_t12', alone, tmp_path / 'out', '--devkit', alone)
    meta = {f'devkit/{name}': b'' for name in ('data/meta.mat', 'data/ILSVRC2012_validation_ground_truth.txt')}
    refused('is damaged, or not ILSVRC2012_devkit_t12', alone, tmp_path / 'out', '--devkit',
            tar_of(tmp_path / 'empty.tar.gz', meta))
    refused('neither .* it begins with', tar_of(tmp_path / 'a.tar', {'a.jpg': b''}), tmp_path / 'out')
    cut = tmp_path / 'cut.tar'
    cut.write_bytes(train.read_bytes()[:-4096 * 4])
    refused('ends early', cut, tmp_path / 'out')
    beyond = tar_of(tmp_path / 'beyond.tar', {'ILSVRC2012_val_00000007.JPEG': b'x'})
    refused('has the classes of 6 images', beyond, tmp_path / 'out', '--devkit', archives / ilsvrc.DEVKIT)
    with tarfile.open(tmp_path / 'inner.tar', 'w') as file:
        link = tarfile.TarInfo('n01440764_1.JPEG')
        link.type, link.linkname = tarfile.SYMTYPE, '/etc/passwd'
        file.addfile(link)
    empty = tar_of(tmp_path / 'empty.tar', {'n01440764.tar': bytes(1024)})
    refused('no images in it', empty, tmp_path / 'out')
    hostile = tar_of(tmp_path / 'hostile.tar', {'n01440764.tar': (tmp_path / 'inner.tar').read_bytes()})
    refused("n01440764.tar: member 'n01440764_1.JPEG' is a link", hostile, tmp_path / 'out')
    assert not (tmp_path / 'out').exists()


# ------------------------------------------------------------------------------------------------------------
# The command line

def test_mistakes(image_folder, tmp_path):
    refused('OUT is missing; give the folder', image_folder)
    refused("data folder '.*nothing' does not exist", tmp_path / 'nothing', tmp_path / 'out')
    refused('--split dev: no such folder', image_folder, tmp_path / 'out', '--split', 'dev')
    refused('lies in .*, and would be read as a part of it', image_folder, image_folder)
    refused('--devkit .* belongs to the archives', image_folder, tmp_path / 'out', '--devkit', 'x')
    refused('--to folders is for the archives', image_folder, tmp_path / 'out', '--to', 'folders')
    refused('no manifest.json in it', '--verify', tmp_path)
    refused('s3://bucket/x: shards are written to a folder of this machine', image_folder, 's3://bucket/x')
    refused('OUT: /dev/null/out cannot be written', image_folder, '/dev/null/out')
    for option, *others in (('--quality', 50), ('--shard-timeout', 9), ('--to', 'folders', '--seed', 3),
                            ('--to', 'folders', '--decode')):
        refused('it has no effect on .*; leave it out', image_folder, tmp_path / 'out', option, *others)
    refused('--short-side 9: it has no effect on --verify without OUT', '--verify', image_folder, '--short-side', 9)
    refused('--split .* has no effect on --index', '--index', image_folder, '--split', 'val')
    refused('OUT .* has no effect on --index', '--index', image_folder, tmp_path / 'out')
    assert not (tmp_path / 'out').exists()
    refused('--quality: 101 is too large', image_folder, tmp_path / 'out', '--quality', 101)


def test_a_folder_with_braces_in_its_name_is_no_pattern(image_folder, tmp_path):
    out = tmp_path / 'v{1}'
    assert 'all well' in pack(image_folder, out, '-j', 1, '--verify')
    assert 'all well' in pack('--verify', out / 'train', '-j', 1)


def test_any_name_may_be_that_of_the_new_folder(image_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pack(image_folder, 'pipe:x', '-j', 1)
    assert (tmp_path / 'pipe:x/train/manifest.json').exists()
