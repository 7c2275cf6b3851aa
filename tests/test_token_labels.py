"""Tests of tools/token_labels.py, data/token_labels.py, label_store.py and label_writing.py, and of models/dense.py.

    python -m pytest tests/test_token_labels.py
"""
import contextlib
import io
import json
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn

from data.datasets import open_eval
from data.folders import ImageFolder
from data.label_store import open_store, write_published
from data.label_writing import RECIPE, LabelWriter
from data.token_labels import open_token_labels
from models.dense import check_dense, dense_logits
from tests.conftest import launch, succeeded, write_checkpoint, write_images
from tools import pack
from tools.token_labels import main
from utils.errors import UserError

SEED, SIZE = 20220310, 64
PER_CLASS = 5  # 15 images of three classes: two files of eight labels


@pytest.fixture(autouse=True, scope='module')
def quiet():
    """The tool would set up its own logging."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr('utils.runtime.setup_logging', lambda **_: None)
        patch.setattr('utils.console.setup_logging', lambda **_: None)
        yield


@pytest.fixture(scope='module')
def images(tmp_path_factory) -> Path:
    return write_images(tmp_path_factory.mktemp('images'), {'train': PER_CLASS, 'val': 1})


@pytest.fixture(scope='module')
def teacher() -> nn.Module:
    torch.manual_seed(SEED)
    return timm.create_model('test_resnet', num_classes=3).eval()


@pytest.fixture(scope='module')
def checkpoint(teacher, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp('teacher') / 'teacher.pth'
    write_checkpoint({'arch': 'test_resnet', 'state_dict': teacher.state_dict()}, path)
    return path


@pytest.fixture(scope='module')
def packed(images, checkpoint, tmp_path_factory) -> Path:
    return make(images, tmp_path_factory.mktemp('labels') / 'packed', checkpoint)


def call(*options) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        main([str(option) for option in options])
    return out.getvalue()


def make(images: Path, out: Path, checkpoint: Path, *options) -> Path:
    # 400 bytes hold 8 labels of 2 × 3 × 2 × 2 numbers: two batches of four.
    call(images, out, '--teacher-checkpoint', checkpoint, '--img-size', SIZE, '-b', 4, '-j', 0, '--device', 'cpu',
         '--file-size', 0.0004, *options)
    return out


def refused(message: str, function, *arguments, **options) -> None:
    with pytest.raises(UserError) as caught:
        function(*arguments, **options)
    assert re.search(message, str(caught.value)) and '\n' not in str(caught.value), str(caught.value)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob('*') if path.is_file()}


def published_label(seed: int, classes: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    scores, numbers = torch.randn(5, 2, 3, generator=generator), torch.randint(classes, (5, 2, 3), generator=generator)
    return torch.stack([scores, numbers]).half()


@pytest.fixture
def published(images, tmp_path) -> Path:
    dataset = ImageFolder(str(images / 'train'))
    for index in range(len(dataset)):
        write_published(tmp_path / 'published', dataset.name(index).removesuffix('.jpg'), published_label(index))
    return tmp_path / 'published'


# --- The teacher ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('name', ['test_resnet', 'test_convnext', 'test_efficientnet'])
def test_classifier_at_each_position_of_a_map(name):
    torch.manual_seed(SEED)
    model = timm.create_model(name, num_classes=7).eval()
    images = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        features = model.forward_features(images)  # [2, C, 2, 3]
        logits = dense_logits(model, images)
        for row, column in np.ndindex(2, 3):
            expected = model.forward_head(features[:, :, row:row + 1, column:column + 1])
            torch.testing.assert_close(logits[:, :, row, column], expected)
        if name != 'test_convnext':  # its head has a norm, and the mean of norms is not the norm of the mean
            torch.testing.assert_close(logits.mean((2, 3)), model(images))
    assert check_dense(model, (64, 96)) == (2, 3)


def test_classifier_at_each_position_of_a_map_with_channels_last():
    torch.manual_seed(SEED)
    model = timm.create_model('swin_tiny_patch4_window7_224', num_classes=5, img_size=(64, 96), window_size=2,
                              embed_dim=24, depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1)).eval()
    images = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        features = model.forward_features(images)  # [2, 2, 3, C]
        expected = model.head.fc(features).permute(0, 3, 1, 2)
        torch.testing.assert_close(dense_logits(model, images), expected)


@pytest.mark.parametrize(('name', 'options'), [
    ('test_vit', {'img_size': (64, 96)}), ('t2t_vit_7', {'img_size': (64, 96), 'depth': 1}),
    ('test_vit', {'img_size': (64, 96), 'global_pool': 'avg', 'fc_norm': True})])
def test_classifier_at_each_token(name, options):
    torch.manual_seed(SEED)
    model = timm.create_model(name, num_classes=7, **options).eval()
    images = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        tokens = model.forward_features(images)[:, 1:].unflatten(1, (4, 6))
        expected = model.head(getattr(model, 'fc_norm', nn.Identity())(tokens)).permute(0, 3, 1, 2)
        torch.testing.assert_close(dense_logits(model, images), expected)
    assert check_dense(model, (64, 96)) == (4, 6)


def test_auxiliary_head_is_the_classifier_of_tokens():
    torch.manual_seed(SEED)
    model = timm.create_model('t2t_vit_7', num_classes=7, img_size=32, depth=1, aux_head=True).eval()
    images = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        expected = model.aux_head(model.forward_features(images)[:, 1:])
        torch.testing.assert_close(dense_logits(model, images).flatten(2).transpose(1, 2), expected)


def test_teacher_that_pools_by_attention_is_refused():
    refused('pools by attention', check_dense, timm.create_model('test_vit3', num_classes=3).eval(), (160, 160))


# --- Making -----------------------------------------------------------------------------------------------------------

def test_labels_are_the_best_classes_of_the_whole_image(images, teacher, packed):
    dataset = open_eval('folder', images, split='train')
    labels = open_token_labels(str(packed), dataset, num_classes=3)
    assert labels.shape == (2, 3, 2, 2) and len(labels) == 15 and len(list(packed.glob('labels-*'))) == 2
    assert open_store(packed).classes == ['ant', 'bee', 'cat']
    config = teacher.pretrained_cfg
    for index in (0, 7, 8, 14):
        # Squashed, not cropped.
        image = dataset.image(index).resize((SIZE, SIZE), getattr(Image.Resampling, config['interpolation'].upper()))
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255
        pixels = (pixels - torch.tensor(config['mean']).view(3, 1, 1)) / torch.tensor(config['std']).view(3, 1, 1)
        with torch.no_grad():
            scores, classes = dense_logits(teacher, pixels)[0].topk(3, dim=0)
        found = labels.read(index)
        assert found.dtype == torch.float16
        torch.testing.assert_close(found[0].float(), scores, atol=2e-3, rtol=2e-3)
        assert torch.equal(found[1].long(), classes)


def test_interrupted_labels_are_continued_to_the_byte(images, checkpoint, packed, tmp_path, monkeypatch):
    write, out = LabelWriter.write, tmp_path / 'labels'

    def stop_at_the_second_file(self, number, names, labels):
        if number == 1:
            raise KeyboardInterrupt
        write(self, number, names, labels)

    monkeypatch.setattr(LabelWriter, 'write', stop_at_the_second_file)
    with pytest.raises(KeyboardInterrupt):
        make(images, out, checkpoint)
    refused('does not exist|no token labels', open_store, out)
    monkeypatch.setattr(LabelWriter, 'write', lambda self, number, *rest: number and write(self, number, *rest))
    (out / '.labels-000001.safetensors.tmp').write_bytes(b'half')
    refused("begun with batch_size 4, not 2", make, images, out, checkpoint, '-b', 2)
    make(images, out, checkpoint)
    assert contents(out) == contents(packed)
    refused("begun with top_k|begun with labels", make, images, out, checkpoint, '-k', 2)
    make(images, out, checkpoint)  # nothing is left to do
    assert contents(out) == contents(packed)


def test_both_forms_are_one_to_the_byte(images, checkpoint, packed, tmp_path):
    files = make(images, tmp_path / 'files', checkpoint, '--format', 'published')
    assert (files / 'bee').is_dir() and len(list(files.rglob('*.pt'))) == 15
    call('--unpack', packed, tmp_path / 'unpacked', '-j', 2)
    call('--pack', files, tmp_path / 'packed', '-j', 2, '--file-size', 0.0004)

    def labels_of(folder: Path) -> dict[str, bytes]:
        return {name: content for name, content in contents(folder).items() if not name.endswith('.json')}

    assert labels_of(tmp_path / 'unpacked') == labels_of(files)
    call('--unpack', tmp_path / 'packed', tmp_path / 'again')
    assert labels_of(tmp_path / 'again') == labels_of(files)
    dataset = ImageFolder(str(images / 'train'))
    prints = {open_token_labels(str(folder), dataset, num_classes=3).fingerprint()
              for folder in (files, packed, tmp_path / 'packed')}
    assert len(prints) == 1


def test_shards_have_the_labels_of_their_folders(images, checkpoint, packed, tmp_path):
    pack.main([str(images), str(tmp_path / 'shards'), '--samples', '8', '-j', '1'])
    assert 'all well' in call('--verify', f'wds:{tmp_path}/shards', packed)
    make(f'wds:{tmp_path}/shards', tmp_path / 'labels', checkpoint)
    folders, shards = ImageFolder(str(images / 'train')), open_eval('folder', f'wds:{tmp_path}/shards', split='train')
    ours, theirs = (open_token_labels(str(folder), dataset, num_classes=3)
                    for folder, dataset in ((packed, folders), (tmp_path / 'labels', shards)))
    place = {shards.name(index): index for index in range(len(shards))}
    for index in range(len(folders)):
        torch.testing.assert_close(ours.read(index), theirs.read(place[folders.name(index)]))


def test_two_processes_make_the_same_labels(images, checkpoint, packed, tmp_path):
    succeeded(launch(2, images, tmp_path / 'labels', '--teacher-checkpoint', checkpoint, '--img-size', SIZE, '-b', 4,
                     '-j', 0, '--device', 'cpu', '--file-size', 0.0004, cwd=tmp_path, SCRIPT='tools/token_labels.py'))
    assert contents(tmp_path / 'labels') == contents(packed)


def test_bad_images_have_no_label(checkpoint, tmp_path):
    images = write_images(tmp_path / 'images', {'train': 2})
    bad = sorted((images / 'train/bee').iterdir())[1]
    bad.write_bytes(bad.read_bytes()[:50])
    refused(bad.name, make, images, tmp_path / 'labels', checkpoint)
    make(images, tmp_path / 'labels', checkpoint, '--max-bad-images', 1)
    dataset = ImageFolder(str(images / 'train'))
    refused(rf"lacks the labels of 1 of 6 images \('bee/{bad.stem}'\).*--max-missing-labels 1", open_token_labels,
            str(tmp_path / 'labels'), dataset, num_classes=3)
    labels = open_token_labels(str(tmp_path / 'labels'), dataset, num_classes=3, max_missing=1)
    assert labels.missing.tolist() == [3] and labels.read(3) is None and labels.read(4) is not None
    assert json.loads((tmp_path / 'labels/manifest.json').read_text())['left_out'] == [f'bee/{bad.stem}']


def test_mistakes_in_making(images, checkpoint, tmp_path):
    out = tmp_path / 'labels'
    refused('which teacher', call, images, out)
    refused('OUT is missing', call, images, '--teacher', 'test_vit')
    refused('makes no labels', call, '--pack', images, out, '--teacher', 'test_vit')
    torch.manual_seed(SEED)
    other = timm.create_model('test_resnet', num_classes=4)
    write_checkpoint({'arch': 'test_resnet', 'state_dict': other.state_dict()}, tmp_path / 'other.pth')
    refused('the model has 4 classes, the data set 3', make, images, out, tmp_path / 'other.pth')
    out.mkdir()
    (out / 'notes.txt').write_text('mine')
    refused("holds 'notes.txt'", make, images, out, checkpoint)
    assert contents(out) == {'notes.txt': b'mine'}


# --- Reading ----------------------------------------------------------------------------------------------------------

def test_published_labels_are_read_by_the_names_of_images(images, published):
    labels = open_token_labels(str(published), ImageFolder(str(images / 'train')), num_classes=3)
    assert all(torch.equal(labels.read(index), published_label(index)) for index in range(15))
    again = pickle.loads(pickle.dumps(labels))
    assert torch.equal(again.read(3), labels.read(3))


def test_names_end_at_their_first_dot(tmp_path):
    for name in ('a.1', 'b'):
        (tmp_path / 'images/ant').mkdir(parents=True, exist_ok=True)
        Image.new('RGB', (8, 8)).save(tmp_path / f'images/ant/{name}.png')
    for seed, name in enumerate(('ant/a', 'ant/b', 'bee/c', 'cat/d')):
        write_published(tmp_path / 'labels', name, published_label(seed))
        if seed > 1:
            (tmp_path / 'images' / name).parent.mkdir()
            Image.new('RGB', (8, 8)).save(tmp_path / f'images/{name}.png')
    labels = open_token_labels(str(tmp_path / 'labels'), ImageFolder(str(tmp_path / 'images')), num_classes=3)
    assert torch.equal(labels.read(0), published_label(0))
    Image.new('RGB', (8, 8)).save(tmp_path / 'images/ant/a.2.png')
    refused("'ant/a.1.png', 'ant/a.2.png' would have one label, 'ant/a'", open_token_labels, str(tmp_path / 'labels'),
            ImageFolder(str(tmp_path / 'images')), num_classes=3)


def test_missing_labels_are_named_and_counted_before_training(images, published):
    dataset = ImageFolder(str(images / 'train'))
    gone = [dataset.name(index).removesuffix('.jpg') for index in (2, 9)]
    for name in gone:
        (published / f'{name}.pt').unlink()
    refused(f"lacks the labels of 2 of 15 images \\('{gone[0]}', '{gone[1]}'\\), 1 are tolerated", open_token_labels,
            str(published), dataset, num_classes=3, max_missing=1)
    assert open_token_labels(str(published), dataset, num_classes=3, max_missing=2).missing.tolist() == [2, 9]
    with contextlib.redirect_stdout(io.StringIO()) as out, pytest.raises(SystemExit):
        main(['--verify', str(images), str(published)])
    assert 'lacks the labels of 2 of 15 images' in out.getvalue()
    refused('lacks the labels of 15 of 15 images.*labels have names such as', open_token_labels, str(published),
            renamed(dataset), num_classes=3, max_missing=15)


def renamed(dataset: ImageFolder) -> ImageFolder:
    dataset.name = lambda index: f'elsewhere/{index}.jpg'
    return dataset


def test_labels_of_other_classes_are_refused(images, published, packed):
    dataset = ImageFolder(str(images / 'train'))
    refused('it has the class 2, and the model 2 classes', open_token_labels, str(published), dataset, num_classes=2)
    refused('labels of 3 classes, and the model has 2', open_token_labels, str(packed), dataset, num_classes=2)
    dataset.classes = ['ant', 'cat', 'bee']
    refused("class 1 is 'bee' there, 'cat' here", open_token_labels, str(packed), dataset, num_classes=3)
    dataset.classes = ['ant', 'bee', 'cat', 'dog']
    refused("class 3 is 'none' there, 'dog' here", open_token_labels, str(packed), dataset, num_classes=4)


@pytest.mark.parametrize(('label', 'message'), [
    (published_label(0)[:, :, :, :2], r'shape \[2, 5, 2, 2\]'),
    (published_label(0).float(), 'float32 .* is no token label'),
    (published_label(0) + torch.tensor([0, .5]).half().view(2, 1, 1, 1), 'not all whole numbers'),
    (published_label(0) * torch.tensor([float('inf'), 1]).half().view(2, 1, 1, 1), 'not all finite'),
    (torch.zeros(1).half().expand(2, 5, 400, 400), 'no token label'),
    ({'scores': 1}, 'holds a dict'), (None, 'damaged or incomplete')])
def test_damaged_published_labels_are_one_line(images, published, label, message):
    path = sorted(published.rglob('*.pt'))[4]
    if label is None:
        path.write_bytes(path.read_bytes()[:-100])
    else:
        torch.save(label, path)
    refused(f'{path.stem}.*{message}', open_token_labels, str(published), ImageFolder(str(images / 'train')),
            num_classes=3)


def test_damaged_packed_labels_are_one_line(images, packed, tmp_path):
    dataset = ImageFolder(str(images / 'train'))
    for number, (file, change, message) in enumerate((
            ('labels-000001.safetensors', lambda content: content[:-1], 'ends early'),
            ('labels-000000.safetensors', lambda content: b'\0' * len(content), 'damaged or incomplete'),
            ('manifest.json', lambda content: content[:-40], 'damaged, or no manifest'),
            ('manifest.json', lambda content: content.replace(b'"version": 1', b'"version": 2'), "version 2"))):
        folder = tmp_path / str(number)
        folder.mkdir()
        for name, content in contents(packed).items():
            (folder / name).write_bytes(change(content) if name == file else content)
        refused(f'{file}.*{message}', open_token_labels, str(folder), dataset, num_classes=3)
    (tmp_path / '0/labels-000001.safetensors').unlink()
    refused('labels-000001.safetensors cannot be read', open_store, tmp_path / '0')
    refused('does not exist', open_store, tmp_path / 'nowhere')
    refused('no token labels in it', open_store, images)


def test_verify_finds_a_changed_bit(packed, tmp_path):
    assert '15 labels: all well' in call('--verify', packed, '-j', 1)
    for name, content in contents(packed).items():
        (tmp_path / name).write_bytes(content)
    changed = bytearray((tmp_path / 'labels-000000.safetensors').read_bytes())
    changed[-1] ^= 1
    (tmp_path / 'labels-000000.safetensors').write_bytes(changed)
    with contextlib.redirect_stdout(io.StringIO()) as out, pytest.raises(SystemExit) as caught:
        main(['--verify', str(tmp_path), '-j', '1'])
    assert caught.value.code == 1 and 'another checksum' in out.getvalue()


def test_names_may_not_lead_out_of_the_folder(packed, tmp_path):
    from data.label_store import packed_file, read_names
    (tmp_path / 'labels.safetensors').write_bytes(packed_file(['../ant'], published_label(0)[None]))
    refused('no name of an image', read_names, str(tmp_path / 'labels.safetensors'))
    assert not (packed / RECIPE).exists()
