"""data/datasets.py, folders.py, classes.py, base.py: the right targets for images, or one clear line."""

import logging
import os
import pickle
import re
import shutil

import numpy as np
import pytest
import torchvision.datasets as tv_datasets
from PIL import Image

from data import open_eval, open_train_val, read_class_map
from data.arrays import ArrayImages, SyntheticImages
from data.base import ClassView, PathList
from data.classes import select_classes
from data.folders import ImageFiles, ImageFolder
from data.places import parse_place
from options.recipes import read_recipe
from options.scripts import train_parser
from tools.doctor.data import survey
from utils.errors import UserError


def make_split(split, classes, images=2):
    """Class folders with `images` files each, of a grey that is 10 · class + image."""
    for target, name in enumerate(classes):
        (split / name).mkdir(parents=True, exist_ok=True)
        for number in range(images):
            Image.new('RGB', (8, 6), (10 * target + number,) * 3).save(split / name / f'{number}.png')


@pytest.fixture
def root(tmp_path):
    make_split(tmp_path / 'train', ['ant', 'bee', 'cat'], 3)
    make_split(tmp_path / 'val', ['ant', 'bee', 'cat'])
    return tmp_path


def contents(dataset):
    """[(grey, target)] of all images."""
    return [(dataset.image(index).getpixel((0, 0))[0], target) for index, target in enumerate(dataset.targets)]


def error_of(call, *arguments, **options):
    """The message of the UserError that the call raises: one line, with a remedy."""
    with pytest.raises(UserError) as caught:
        call(*arguments, **options)
    message = str(caught.value)
    assert '\n' not in message and re.search('[;:?]', message)
    return message


# ----------------------------------------------------------------------------------------------------------
# Image folders


@pytest.mark.parametrize('name', ['folder', 'imagenet', '', 'cifar10'])
def test_folders_give_images_targets_and_paths(root, name):
    train, val = open_train_val(name, str(root))
    assert train.classes == val.classes == ['ant', 'bee', 'cat']
    assert contents(train) == [(0, 0), (1, 0), (2, 0), (10, 1), (11, 1), (12, 1), (20, 2), (21, 2), (22, 2)]
    assert contents(val) == [(0, 0), (1, 0), (10, 1), (11, 1), (20, 2), (21, 2)]
    assert train.targets.tolist() == [0] * 3 + [1] * 3 + [2] * 3
    assert val.path(5) == str(root / 'val' / 'cat' / '1.png')
    assert contents(open_eval(name, str(root))) == contents(val)


@pytest.mark.parametrize('split', ['valid', 'validation', 'test'])
def test_the_evaluation_split_is_found(root, split):
    (root / 'val').rename(root / split)
    assert contents(open_train_val('folder', root)[1]) == contents(open_eval('folder', root))
    assert open_eval('folder', root).path(0).startswith(str(root / split))


def test_val_comes_before_test_and_a_named_split_before_both(root):
    make_split(root / 'test', ['ant', 'bee', 'cat'], 1)
    make_split(root / 'other', ['ant', 'bee', 'cat'], 4)
    assert len(open_eval('folder', root)) == 6
    assert len(open_train_val('folder', root, val_split='test')[1]) == 3
    train, val = open_train_val('folder', root, train_split='other', val_split='train')
    assert (len(train), len(val)) == (12, 9)
    assert len(open_eval('folder', root, split='other')) == 12


def test_classes_are_in_natural_order_and_images_are_found_at_any_depth(tmp_path):
    make_split(tmp_path, ['1', '2', '9', '10', 'b', 'A'])
    (tmp_path / '9' / 'deep' / 'er').mkdir(parents=True)
    (tmp_path / '9' / '1.png').rename(tmp_path / '9' / 'deep' / 'er' / 'x.PNG')
    dataset = ImageFolder(tmp_path)
    assert dataset.classes == ['1', '2', '9', '10', 'A', 'b']
    assert [os.path.relpath(dataset.path(index), tmp_path) for index in (4, 5, 6)] == \
        ['9/0.png', '9/deep/er/x.PNG', '10/0.png']


def test_a_link_to_a_class_folder_is_followed_and_a_circle_ends(root, tmp_path):
    (root / 'elsewhere').mkdir()
    (root / 'train' / 'cat').rename(root / 'elsewhere' / 'cat')
    (root / 'train' / 'cat').symlink_to(root / 'elsewhere' / 'cat')
    (root / 'train' / 'ant' / 'circle').symlink_to(root / 'train')
    assert len(open_train_val('folder', root)[0]) == 9


def test_links_within_class_folders_are_followed_and_loops_are_named(root, caplog):
    store = root.parent / f'{root.name}-store'
    make_split(store, ['deep'], 2)
    ant, bee = root / 'train' / 'ant', root / 'train' / 'bee'
    (ant / 'more').symlink_to(store)  # ant/more/deep/0.png
    (ant / 'linked.png').symlink_to(store / 'deep' / '0.png')
    (store / 'deep' / 'back').symlink_to(store)
    (store / 'home').symlink_to(root)  # over ant back to the link
    (bee / 'first').symlink_to(store / 'deep')
    (bee / 'again').symlink_to(store / 'deep')  # twice, as the user has it
    (root / 'train' / 'cat' / 'itself').symlink_to('.')
    (root / 'train' / 'all').symlink_to('../train')  # no class
    train, val = open_train_val('folder', root)
    assert np.bincount(train.targets).tolist() == [3 + 1 + 2, 3 + 2 * 2, 3] and len(val) == 6
    relative = [os.path.relpath(train.path(index), ant) for index in range(6)]
    assert relative == ['0.png', '1.png', '2.png', 'linked.png', 'more/deep/0.png', 'more/deep/1.png']
    assert contents(train)[4:6] == [(0, 0), (1, 0)]
    assert "6 links are not followed, since they lead back to themselves: 'all', 'ant/more/deep/back'" in caplog.text
    assert train.classes == ['ant', 'bee', 'cat']
    assert survey(root / 'train').counts == {'ant': 6, 'bee': 7, 'cat': 3}
    (root / 'train' / 'all').unlink()
    shutil.rmtree(root / 'train' / 'bee')
    ImageFolder(root / 'train')
    assert "3 links are not followed, since they lead back to themselves: 'ant/more/deep/back', 'ant/more/home', " \
        "'cat/itself'" in caplog.text
    assert len(ImageFiles([ant])) == 6


def test_oddities_are_counted_and_logged(root, caplog):
    (root / 'train' / 'README.txt').touch()
    (root / 'train' / 'ant' / 'Thumbs.db').touch()
    (root / 'train' / 'ant' / '._0.png').touch()
    (root / 'train' / 'bee' / 'copy.DB').touch()
    (root / 'train' / '.ipynb_checkpoints').mkdir()
    (root / 'train' / 'dog').mkdir()
    (root / 'val' / 'dog').mkdir()
    with caplog.at_level(logging.INFO):
        train, val = open_train_val('folder', root)
    assert train.classes == val.classes == ['ant', 'bee', 'cat', 'dog'] and train.num_ignored == 4
    for part in ('9 images of 4 classes', 'ignored 4 files', ': 2 .db, 1 ', "1 class folders without images: 'dog'"):
        assert part in caplog.text
    caplog.clear()
    assert len(ImageFiles([root / 'train'])) == 9
    assert 'train: ignored 4 files that are no images: 2 .db, ' in caplog.text


# ----------------------------------------------------------------------------------------------------------
# Folders that are not as they should be


def test_a_class_that_one_split_lacks_is_an_error_that_names_it(root):
    make_split(root / 'val', ['dog'])
    assert "not in the class map" in (message := error_of(open_train_val, 'folder', root)) and "'dog'" in message
    assert "'dog'" in error_of(open_eval, 'folder', root)
    (root / 'val' / 'dog').rename(root / 'train' / 'dog')
    for call in (open_train_val, open_eval):
        assert "'dog'" in (message := error_of(call, 'folder', root)) and 'lacks 1 class of' in message
        assert 'may be empty' in message
    (root / 'val' / 'dog').mkdir()
    assert contents(open_train_val('folder', root)[1]) == contents(open_eval('folder', root))


def test_missing_classes_can_be_allowed_and_keep_the_targets_of_the_others(root):
    (root / 'val' / 'ant').rename(root / 'elsewhere')
    expected = [(10, 1), (11, 1), (20, 2), (21, 2)]
    _, val = open_train_val('folder', root, allow_missing_classes=True)
    assert contents(val) == expected and val.classes == ['ant', 'bee', 'cat']
    val = open_eval('folder', root / 'val', classes=['ant', 'bee', 'cat'], allow_missing_classes=True)
    assert contents(val) == expected
    assert val.path(0) == str(root / 'val' / 'bee' / '0.png')


def test_many_differing_classes_are_counted_not_listed(root):
    make_split(root / 'val', [f'extra{number}' for number in range(30)], 1)
    message = error_of(open_eval, 'folder', root)
    assert '30 classes' in message and "'extra4' and 25 more" in message


LAYOUTS = {
    'no such folder': (lambda root: root / 'typo', 'does not exist'),
    'a file': (lambda root: root / 'train' / 'ant' / '0.png', 'is not a folder'),
    'no folder': (lambda root: None, 'no data folder'),
    'the split itself': (lambda root: root / 'train', 'give .* instead'),
    'the folder above': (lambda root: root.parent, 'did you mean'),
}


@pytest.mark.parametrize('path, explanation', LAYOUTS.values(), ids=LAYOUTS.keys())
def test_a_wrong_data_folder_is_explained(tmp_path, path, explanation):
    root = tmp_path / 'data'
    make_split(root / 'train', ['ant', 'bee'])
    make_split(root / 'val', ['ant', 'bee'])
    path = path(root)
    message = error_of(open_train_val, 'folder', path and str(path))
    assert re.search(explanation, message)
    if explanation == 'did you mean':
        assert repr(str(root)) in message


def test_a_flat_validation_folder_is_explained(root):
    for path in list((root / 'val').rglob('*.png')):
        path.rename(root / 'val' / f'{path.parent.name}{path.name}')
    for path in list((root / 'val').iterdir()):
        if path.is_dir():
            path.rmdir()
    assert '6 images but no class folders' in error_of(open_train_val, 'folder', root)


def test_missing_splits_are_explained(root):
    (root / 'val').rename(root / 'holdout')
    message = error_of(open_train_val, 'folder', root)
    assert 'val, valid, validation or test' in message and "'holdout'" in message and '--val-fraction' in message
    assert "no folder 'typo'" in error_of(open_train_val, 'folder', root, val_split='typo')
    assert "no folder 'typo'" in error_of(open_eval, 'folder', root, split='typo')
    assert 'val, valid, validation or test' in error_of(open_eval, 'folder', root)


@pytest.mark.parametrize('name, named', [
    ('train-00000-of-00002.parquet', '1 file in the Parquet format'), ('data.mdb', 'LMDB'), ('x.tfrecord', 'TFRecord'),
    ('train.ZIP', 'unpack them first'), ('a.tar.gz', 'unpack them first')])
@pytest.mark.parametrize('inner', ['', 'data'])
def test_data_sets_in_other_formats_are_explained(tmp_path, name, named, inner):
    (tmp_path / inner).mkdir(exist_ok=True)
    (tmp_path / inner / name).touch()
    (tmp_path / 'README.md').touch()
    for call in (open_train_val, open_eval):
        assert named in error_of(call, 'folder', tmp_path)


def test_tiny_imagenet(tmp_path, caplog):
    """train/CLASS/images/NAME.JPEG, val/images/NAME.JPEG and val/val_annotations.txt."""
    for split in ('train', 'val'):
        make_split(tmp_path / split, ['n02', 'n01', 'n10'], 2)
    for folder in (tmp_path / 'train').iterdir():
        (folder / 'images').mkdir()
        for image in list(folder.glob('*.png')):
            image.rename(folder / 'images' / image.name)
        (folder / f'{folder.name}_boxes.txt').touch()
    (tmp_path / 'val/images').mkdir()
    lines = []
    for number, (name, image) in enumerate([('n10', '0'), ('n01', '0'), ('n01', '1'), ('n02', '1')]):
        (tmp_path / 'val' / name / f'{image}.png').rename(tmp_path / 'val/images' / f'val_{number}.png')
        lines.append(f'val_{number}.png\t{name}\t0\t32\t44\t62\n')
    for name in ('n01', 'n02', 'n10'):
        shutil.rmtree(tmp_path / 'val' / name)
    (tmp_path / 'val/val_annotations.txt').write_text(''.join(lines))
    train, val = open_train_val('folder', tmp_path)
    assert contents(train) == [(10, 0), (11, 0), (0, 1), (1, 1), (20, 2), (21, 2)]
    assert contents(val) == [(10, 0), (11, 0), (1, 1), (20, 2)] == contents(open_eval('folder', tmp_path))
    assert val.path(0) == f'{tmp_path}/val/images/val_1.png'
    assert [found.counts for found in map(survey, (tmp_path / 'train', str(tmp_path / 'val')))] == [
        {'n01': 2, 'n02': 2, 'n10': 2}, {'n01': 2, 'n02': 1, 'n10': 1}]
    for text, named in ((''.join(lines[1:]), "no class for 1 image ('images/val_0.png')"), ('val_0.png n10\n', 'a tab'),
                        ('val_0.png\t../x\n', 'a tab')):
        (tmp_path / 'val/val_annotations.txt').write_text(text)
        assert named in error_of(open_eval, 'folder', tmp_path)


def test_folders_named_by_number_are_positions_in_the_class_map_of_a_model(tmp_path, caplog):
    make_split(tmp_path / 'v2', ['2', '0', '11'], 1)
    classes = [f'class{number}' for number in range(12)]
    caplog.set_level(logging.INFO)
    dataset = open_eval('folder', tmp_path / 'v2', classes=classes, allow_missing_classes=True)
    assert dataset.classes == classes and contents(dataset) == [(10, 0), (0, 2), (20, 11)]
    assert 'its classes are numbers, taken for positions in the class map of the model' in caplog.text
    assert contents(open_eval('folder', tmp_path / 'v2', classes=[*classes, '2', '0', '11'],
                              allow_missing_classes=True)) == [(10, 13), (0, 12), (20, 14)]  # names before positions
    assert 'not in the class map' in error_of(open_eval, 'folder', tmp_path / 'v2', classes=classes[:11])
    make_split(tmp_path / 'both' / 'train', ['ant', 'bee'], 1)
    make_split(tmp_path / 'both' / 'val', ['0', '1'], 1)
    assert 'not in the class map' in error_of(open_train_val, 'folder', tmp_path / 'both')


def test_folders_without_images_are_explained(tmp_path):
    (tmp_path / 'val').mkdir()
    assert 'no class folders' in error_of(open_eval, 'folder', tmp_path)
    (tmp_path / 'val' / 'ant').mkdir()
    assert 'no images in its 1 folders' in error_of(open_eval, 'folder', tmp_path)


def test_a_single_class_folder_is_an_error(root):
    (root / 'inner').mkdir()
    (root / 'train').rename(root / 'inner' / 'train')  # train/train/CLASS
    (root / 'inner').rename(root / 'train')
    assert "single class folder, 'train'" in error_of(open_train_val, 'folder', root)
    make_split(root / 'alone' / 'images', ['x'])
    assert "single class folder, 'images'" in error_of(open_eval, 'folder', root / 'alone')


@pytest.mark.parametrize('folder', ['train', 'train/bee', 'val/ant'])
def test_a_folder_that_may_not_be_read_is_named(root, folder, monkeypatch):
    def scan(path, really=os.scandir):
        if str(path) == str(root / folder):  # chmod would not stop the superuser
            raise PermissionError(13, 'Permission denied', path)
        return really(path)

    monkeypatch.setattr(os, 'scandir', scan)
    message = error_of(open_train_val, 'folder', root)
    assert f"'{root / folder}' cannot be read (Permission denied)" in message


# ----------------------------------------------------------------------------------------------------------
# Class maps and parts of the classes


def test_evaluation_alone_takes_the_classes_that_are_given(root):
    classes = ['cat', 'bee', 'ant']
    assert contents(open_eval('folder', root, classes=classes)) == [
        (0, 2), (1, 2), (10, 1), (11, 1), (20, 0), (21, 0)]
    assert "'cat'" in error_of(open_eval, 'folder', root, classes=['ant', 'bee'])
    assert "'dog'" in error_of(open_eval, 'folder', root, classes=[*classes, 'dog'])


def test_evaluation_alone_needs_no_train_folder(root):
    own = contents(open_eval('folder', root / 'val'))
    assert own == [(0, 0), (1, 0), (10, 1), (11, 1), (20, 2), (21, 2)]
    (root / 'train').rename(root / 'elsewhere')
    assert contents(open_eval('folder', root)) == own


@pytest.mark.parametrize('text, expected', [
    ('n01\nn02\n\nn03\n', ['n01', 'n02', 'n03']),
    ('cat 1\ndog 0\n', ['dog', 'cat']),
    ('golden retriever 1\ntabby\t0\n', ['tabby', 'golden retriever']),
    ('boeing 747\nhang glider', ['boeing 747', 'hang glider']),
    ('7\n8', ['7', '8']),
])
def test_class_map_files(tmp_path, text, expected):
    path = tmp_path / 'map.txt'
    path.write_text(text)
    assert read_class_map(path) == expected


@pytest.mark.parametrize('encoding', ['utf-8-sig', 'utf-16', 'utf-8'])
def test_text_files_of_other_programs(tmp_path, encoding):
    """Notepad and Excel begin UTF-8 with a byte order mark, PowerShell writes UTF-16."""
    (tmp_path / 'map.txt').write_bytes('zürich\r\nbee\r\n'.encode(encoding))
    assert read_class_map(tmp_path / 'map.txt') == ['zürich', 'bee']
    (tmp_path / 'map.txt').write_bytes('zürich 1\nbee 0'.encode(encoding))
    assert read_class_map(tmp_path / 'map.txt') == ['bee', 'zürich']
    (tmp_path / 'recipe.yaml').write_bytes('epochs: 7\r\nmodel: t2t_vit_7\r\n'.encode(encoding))
    recipe = read_recipe(tmp_path / 'recipe.yaml', train_parser())
    assert recipe == {'epochs': 7, 'model': 't2t_vit_7'}


@pytest.mark.parametrize('content, named', [
    (b'', 'empty'), (b'a\nb\na\n', "'a'"), (b'a 0\nb 2\n', '0 to 1'), (b'a 1\nb 1', '0 to 1'),
    (b'\xff\xfe\x00', 'UTF-8'),
])
def test_bad_class_map_files(tmp_path, content, named):
    path = tmp_path / 'map.txt'
    path.write_bytes(content)
    assert named in (message := error_of(read_class_map, path)) and str(path) in message
    assert 'No such file' in error_of(read_class_map, tmp_path / 'typo.txt')


def test_the_class_map_of_imagenet(tmp_path):
    classes = read_class_map('imagenet')
    assert len(classes) == 1000 and classes[0] == 'n01440764' and classes[999] == 'n15075141'
    make_split(tmp_path, [classes[999], classes[3]], 1)
    val = open_eval('folder', tmp_path, classes=classes, allow_missing_classes=True)
    assert sorted(val.targets.tolist()) == [3, 999]


NAMES = ['airplane', 'polar-bear', 'cat', '7', 'cat-fish']


@pytest.mark.parametrize('text, kept', [
    ('0-1', ['airplane', 'polar-bear']),
    ('2, 0', ['airplane', 'cat']),
    ('cat-fish,cat', ['cat', 'cat-fish']),
    ('polar-bear-7', ['polar-bear', 'cat', '7']),
    ('cat-cat-fish', ['cat', '7', 'cat-fish']),
    ('0,7', ['airplane', '7']),
    ('0-4', NAMES),
])
def test_only_classes(text, kept):
    images = np.arange(10, dtype=np.uint8).repeat(12).reshape(10, 4, 3)
    dataset = ArrayImages('test', images, NAMES, list(range(5)) * 2)
    part = select_classes(dataset, text)
    assert part.classes == kept
    expected = [(index, kept.index(NAMES[index % 5])) for index in range(10) if NAMES[index % 5] in kept]
    assert contents(part) == expected
    assert part.path(1) == f'test[{expected[1][0]}]'


@pytest.mark.parametrize('text, named', [
    ('0-5', "'0-5'"), ('dog,cat', "'dog'"), ('cat', 'at least two'), ('4-2', "'4-2'"), ('0,', "''"), ('-1', "'-1'"),
])
def test_only_classes_that_do_not_exist(text, named):
    dataset = ArrayImages('test', np.zeros((5, 4, 3), dtype=np.uint8), NAMES, range(5))
    assert named in error_of(select_classes, dataset, text)


def test_parts_of_the_classes_train_and_evaluate_alike(root):
    for text in ('1-2', 'bee,cat'):
        train, val = open_train_val('folder', root, only_classes=text)
        assert train.classes == val.classes == ['bee', 'cat']
        assert contents(val) == [(10, 0), (11, 0), (20, 1), (21, 1)]
        assert contents(open_eval('folder', root, only_classes=text, classes=train.classes)) == contents(val)
    assert 'lacks' in error_of(open_eval, 'folder', root, only_classes='0-1', classes=['ant', 'bee', 'cat'])
    digits = [open_train_val('digits', only_classes=text)[0] for text in ('0-4', '5-9')]
    assert digits[0].classes == list('01234') and digits[1].classes == list('56789')
    assert set(digits[1].targets.tolist()) == set(range(5)) and sum(map(len, digits)) == 1438


# ----------------------------------------------------------------------------------------------------------
# Datasets that are not folders


def test_digits_are_those_of_scikit_learn():
    source = pytest.importorskip('sklearn.datasets').load_digits()
    is_val = np.zeros(len(source.target), dtype=bool)
    for target in range(10):
        own = np.flatnonzero(source.target == target)
        is_val[np.random.RandomState(target).permutation(own)[:round(len(own) / 5)]] = True
    for dataset, chosen in zip(open_train_val('digits'), (~is_val, is_val), strict=True):
        images = np.stack([np.asarray(dataset.image(index)) for index in range(len(dataset))])
        expected = np.rint(source.images[chosen] * 255 / 16)
        np.testing.assert_array_equal(images, expected[..., None].repeat(3, axis=3))
        np.testing.assert_array_equal(dataset.targets, source.target[chosen])


def test_digits_need_no_folder_and_are_split_evenly():
    train, val = open_train_val('digits')
    assert (len(train), len(val)) == (1438, 359) and train.classes == list('0123456789')
    assert len(open_eval('digits', None)) == 359 and len(open_eval('digits', split='train')) == 1438
    assert np.bincount(val.targets).min() >= 35
    image = val.image(0)
    assert image.mode == 'RGB' and image.size == (8, 8) and val.targets.dtype == np.int64
    assert "no split 'typo'" in error_of(open_eval, 'digits', split='typo')


def test_a_folder_beside_a_data_set_that_needs_none_is_refused(tmp_path):
    for name in ('digits', 'synthetic'):
        for opened in (open_train_val, open_eval):
            assert f'{tmp_path}: the dataset {name} needs no folder' in error_of(opened, name, tmp_path)


def test_synthetic_images_are_random_and_repeatable():
    train, val = open_train_val('synthetic', num_images=20, image_size=(32, 48), num_classes=3)
    assert len(train) == len(val) == 20 and len(train.classes) == 3
    images = [np.asarray(train.image(index)) for index in range(20)]
    assert images[0].shape == (32, 48, 3)
    assert len({image.tobytes() for image in images}) == 20
    again = SyntheticImages(20, (32, 48), 3)
    assert all(np.array_equal(again.image(index), image) for index, image in enumerate(images))
    assert not np.array_equal(val.image(0), images[0])
    assert all(image.std() > 20 for image in images)  # neither zeros nor one colour
    assert sorted(np.bincount(train.targets)) == [6, 7, 7]
    with pytest.raises(IndexError):
        train.image(20)
    assert 'at least 1' in error_of(open_train_val, 'synthetic', num_images=0)


@pytest.fixture(params=['cifar10', 'cifar100'])
def cifar(request, tmp_path, monkeypatch):
    """The binary files of a small CIFAR, whose MD5 torchvision is told not to check."""
    source, labels = {'cifar10': (tv_datasets.CIFAR10, 'labels'), 'cifar100': (tv_datasets.CIFAR100, 'fine_labels')}[
        request.param]
    folder = tmp_path / source.base_folder
    folder.mkdir()
    for attribute in ('train_list', 'test_list'):
        files = [(name, None) for name, _ in getattr(source, attribute)]
        monkeypatch.setattr(source, attribute, files)
        for number, (name, _) in enumerate(files):
            pixels = np.zeros((2, 3, 32, 32), dtype=np.uint8)
            pixels[0, 0], pixels[1, 2] = 200, 10 + number  # the first red, the second dark blue
            with open(folder / name, 'wb') as file:
                pickle.dump({'data': pixels.reshape(2, -1), labels: [1, 0]}, file)
    monkeypatch.setattr(source, 'meta', source.meta | {'md5': None})
    with open(folder / source.meta['filename'], 'wb') as file:
        pickle.dump({source.meta['key']: ['ant', 'bee']}, file)
    return request.param, tmp_path, folder


def test_cifar_from_the_binary_files(cifar):
    name, root, _ = cifar
    train, val = open_train_val(name, root)
    assert len(train) == {'cifar10': 10, 'cifar100': 2}[name] and len(val) == 2
    assert train.classes == val.classes == ['ant', 'bee']
    image, target = train.image(0), train.targets[0]
    assert image.getpixel((31, 31)) == (200, 0, 0) and image.size == (32, 32) and target == 1
    assert train.image(len(train) - 1).getpixel((0, 0)) == (0, 0, 10 + len(train) // 2 - 1)
    assert len(open_eval(name, root)) == 2 and name in val.path(1)


def test_cifar_that_is_not_there_or_incomplete(cifar):
    name, root, folder = cifar
    next(path for path in folder.iterdir() if 'test' in path.name).unlink()
    assert 'damaged or incomplete' in error_of(open_train_val, name, root)
    assert 'missing' in (message := error_of(open_train_val, name, root / 'typo')) and 'download' in message
    assert 'needs a data folder' in error_of(open_eval, name)


def test_cifar_downloads_are_explained_where_they_fail(tmp_path, monkeypatch):
    def refuse(*arguments, **options):
        raise OSError('no network')

    monkeypatch.setattr('torchvision.datasets.cifar.download_and_extract_archive', refuse)
    message = error_of(open_train_val, 'cifar10', tmp_path, download=True)
    assert 'no network' in message and 'cifar-10-python.tar.gz' in message


@pytest.mark.parametrize('name, hint', [('cifr10', "; did you mean cifar10?"), ('mnist_like', 'choose from folder')])
def test_an_unknown_dataset_gets_the_nearest_name(name, hint):
    assert hint in error_of(open_train_val, name, '.')
    assert hint in error_of(open_eval, name, '.')


# ----------------------------------------------------------------------------------------------------------
# Small parts


def test_a_path_list_is_a_list_of_paths():
    paths = ['', 'a/b.jpg', 'zürich/ß.png', os.fsdecode(b'not\xffutf8'), 'a']
    packed = PathList(paths)
    assert list(packed) == paths and len(packed) == 5
    with pytest.raises(IndexError):
        packed[5]


def test_a_fingerprint_tells_images_and_their_order_wherever_they_are(root, tmp_path):
    before = ImageFolder(root / 'train').fingerprint()
    assert before.startswith('9 images with the checksum ')
    shutil.copytree(root / 'train', root / 'copy')
    assert ImageFolder(root / 'copy').fingerprint() == before
    seen = {before, open_eval('folder', root).fingerprint()}
    for before, after in (('ant/0', 'ant/3'), ('ant/3', 'ant/03'), ('ant/1', 'bee/01'), ('ant/2', '../out')):
        (root / 'copy' / f'{before}.png').rename(root / 'copy' / f'{after}.png')
        seen.add(ImageFolder(root / 'copy').fingerprint())
    assert len(seen) == 6
    train = open_eval('folder', root, split='train')
    parts = [select_classes(train, text) for text in ('0-1', '1-2')]
    assert len({part.fingerprint() for part in (train, *parts)}) == 3
    assert len({dataset.fingerprint() for dataset in open_train_val('digits')}) == 2


def test_a_view_numbers_by_the_given_names():
    images = np.arange(6, dtype=np.uint8).repeat(12).reshape(6, 4, 3)
    dataset = ArrayImages('x', images, ['a', 'b', 'c'], [0, 1, 2] * 2)
    view = ClassView(dataset, ['c', 'unknown', 'a'])
    assert contents(view) == [(0, 2), (2, 0), (3, 2), (5, 0)]
    assert contents(ClassView(view, ['a', 'c'])) == [(0, 0), (2, 1), (3, 0), (5, 1)]


def test_an_empty_name_of_a_split_is_the_folder_itself(image_folder):
    """Not the first evaluation split, on which a model would be trained."""
    assert 'not in the class map' in error_of(open_train_val, '', image_folder, train_split='')
    train, val = open_train_val('', image_folder / 'train', train_split='', val_split='../val')
    assert (len(train), len(val)) == (36, 15)


@pytest.mark.parametrize('name', ['train/', 'train//', 'train'])
def test_a_split_is_joined_by_one_slash(name):
    assert str(parse_place('wds:https://host/imagenet/').join(name).join('a.tar')) == 'https://host/imagenet/train/a.tar'
    assert str(parse_place('/data').join(name)) == '/data/train'
