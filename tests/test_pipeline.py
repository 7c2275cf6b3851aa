"""From options to data: whose classes number an evaluation, where CIFAR is, what a model's input is."""
import io
import shutil
import tarfile

import pytest
import timm
import torch

from data import pipeline
from tests.conftest import run_script, succeeded, write_images
from tests.test_options import parse
from utils.distributed import World
from utils.errors import UserError

ONE = World(rank=0, local_rank=0, size=1, device=torch.device('cpu'))


def evaluation_data(root, *options, classes=None, num_classes=None):
    args = parse(str(root), *options, script='validate')
    return pipeline.open_evaluation_data(args, classes, num_classes, ONE)


def test_a_part_of_imagenet_is_numbered_as_imagenet(tmp_path):
    synsets = ('n01440764', 'n01443537', 'n15075141')  # the first two and the last
    dataset = evaluation_data(write_images(tmp_path, {'val': 2}, classes=synsets), num_classes=1000)
    assert len(dataset.classes) == 1000 and sorted(dataset.targets.tolist()) == [0, 0, 1, 1, 999, 999]


def test_numbered_folders_are_positions_for_a_model_without_names(tmp_path):
    dataset = evaluation_data(write_images(tmp_path, {'val': 1}, classes=('4', '332')), num_classes=1000)
    assert len(dataset.classes) == 1000 and sorted(dataset.targets.tolist()) == [4, 332]
    with pytest.raises(UserError, match='nothing says which is which'):
        evaluation_data(tmp_path, num_classes=332)


def test_images_in_tar_files_may_have_no_class_where_none_is_needed(tmp_path):
    with tarfile.open(tmp_path / 'a.tar', 'w') as tar:
        for number, name in enumerate(('x/1.jpg', 'x/1.cls', 'x/2.jpg')):
            member = tarfile.TarInfo(name)
            member.size = 1
            tar.addfile(member, io.BytesIO(b'%d' % number))
    args = parse('--data', f'wds:{tmp_path}', script='predict')
    dataset = pipeline.open_images(args, ['ant', 'bee'], 2, ONE)
    assert dataset.targets.tolist() == [-1, -1] and dataset.classes == []
    assert [dataset.read_bytes_or_image(k) for k in (0, 1)] == [b'0', b'2']
    assert dataset.path(1) == f'{tmp_path}/a.tar::x/2.jpg'
    with pytest.raises(UserError, match="'x/2.jpg' has no class"):
        pipeline.open_images(args, ['ant', 'bee'], 2, ONE, needs_classes=True)
    with pytest.raises(UserError, match="'x/2.jpg' has no class"):
        evaluation_data(f'wds:{tmp_path}')
    for image in (f'{tmp_path}/a.tar', f'wds:{tmp_path}/a.tar'):
        with pytest.raises(UserError, match=f'give --data wds:{tmp_path}/a.tar'):
            pipeline.open_images(parse('photo.jpg', image, script='predict'), None, 2, ONE)


def test_classes_come_from_the_map_then_the_checkpoint_then_the_folders(tmp_path):
    root = write_images(tmp_path / 'data', {'val': 1}, classes=('bee', 'cat'))
    (tmp_path / 'map.txt').write_text('cat\nbee\nant\n')
    assert evaluation_data(root).classes == ['bee', 'cat']
    of_checkpoint = evaluation_data(root, classes=['ant', 'bee', 'cat'])
    assert sorted(of_checkpoint.targets.tolist()) == [1, 2]
    of_map = evaluation_data(root, '--class-map', str(tmp_path / 'map.txt'), classes=['ant', 'bee', 'cat'])
    assert of_map.classes == ['cat', 'bee', 'ant'] and sorted(of_map.targets.tolist()) == [0, 1]


def test_where_cifar_is_looked_for(monkeypatch):
    asked = []
    monkeypatch.setattr(pipeline, 'open_train_val', lambda *a, **k: asked.append((a, k['download'])) or ((), ()))
    for argv in ('--dataset cifar10', '/data/c --dataset cifar10', '/data/c --dataset cifar100 --download',
                 '--dataset cifar10 --no-download'):
        pipeline.open_training_data(parse(*argv.split()), ONE)
    assert asked == [
        (('cifar10', './data_cifar'), True), (('cifar10', '/data/c'), False), (('cifar100', '/data/c'), True),
        (('cifar10', './data_cifar'), False)]
    with pytest.raises(UserError, match='no data: give the folder'):
        pipeline.open_training_data(parse(), ONE)


def test_training_on_the_evaluation_images_is_said(tmp_path, caplog):
    """Whatever the folder is called; as files or in shards; and not of splits that only look alike."""
    root = write_images(tmp_path / 'data', {'train': 2, 'val': 2})
    (root / 'linked').symlink_to('train')
    packed = tmp_path / 'packed'
    succeeded(run_script('tools/pack.py', root / 'train', packed / 'train', cwd=tmp_path))
    shutil.copytree(packed / 'train', packed / 'val')
    (packed / 'linked').symlink_to('train')

    def said(*options) -> bool:
        caplog.clear()
        pipeline.open_training_data(parse(*map(str, options)), ONE)
        return any('the training images are the evaluation images too' in message for message in caplog.messages)

    for place in (root, packed):
        assert not said(place) and not said(place, '--only-classes', '0-1')
        assert said(place, '--val-split', 'train') and said(place, '--val-split', 'linked', '--only-classes', '0-1')
        assert said(place, '--train-split', 'val')
    assert not said('--dataset', 'digits') and not said('--dataset', 'synthetic')


def test_input_is_the_models_own_unless_said_otherwise():
    config = timm.get_pretrained_cfg('deit_small_patch16_224').to_dict()
    image = pipeline.resolve_input(parse('/data', '--img-size', '192x256', '--mean', '0.5'), config)
    assert image.img_size == (192, 256) and image.interpolation == 'bicubic' and image.crop_pct == config['crop_pct']
    assert image.mean == (0.5, 0.5, 0.5) and image.std == tuple(config['std']) and image.crop_mode == 'center'
    other = pipeline.resolve_input(parse('/data', '--crop-pct', '0.8', '--interpolation', 'bilinear'), config)
    assert (other.crop_pct, other.interpolation) == (0.8, 'bilinear')
    with pytest.raises(UserError, match='--mean'):
        pipeline.resolve_input(parse('/data', '--mean', '0.5', '0.5'), config)
    with pytest.raises(UserError, match='--crop-pct 2.0'):
        pipeline.resolve_input(parse('/data', '--crop-pct', '2'), config)
