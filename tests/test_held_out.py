"""data/held_out.py: --val-fraction holds out the same images every time, in every script."""
import csv
import logging
import os
import shutil

import numpy as np
import pytest
import torch

from data import open_eval, open_train_val
from data.arrays import ArrayImages
from data.folders import ImageFolder
from data.held_out import hold_out, hold_out_fold
from data.pipeline import open_evaluation_data
from data.shards.packing import pack
from data.shards.plan import Recipe, folder_input
from models import create_model, open_trained_model
from tests.conftest import run_script, succeeded, write_images
from tests.test_datasets import error_of
from tests.test_options import parse
from tests.test_pipeline import ONE

# The images of `folder` whose hash (BLAKE2b of the name without its ending, 8 bytes) is below 0.2, computed apart from
# this program. They must never change: a run that goes on would evaluate with images it was trained on.
HELD_OUT = ('ant/ant_11 ant/ant_12 ant/ant_13 ant/ant_2 ant/ant_3 ant/ant_5 bee/bee_1 bee/bee_11 bee/bee_17 bee/bee_6 '
            'cat/cat_18 cat/cat_4 cat/cat_6 cat/cat_8 cat/cat_9')


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp('held-out')
    write_images(root, {'flowers': 20}, size=(12, 12))
    return root / 'flowers'


def names(dataset, folder=None):
    found = [dataset.name(index) for index in range(len(dataset))]
    assert folder is None or found == [os.path.relpath(dataset.path(index), folder) for index in range(len(dataset))]
    return found


def test_each_image_is_on_one_side_and_always_the_same(folder, caplog):
    caplog.set_level(logging.INFO)
    train, val = open_train_val('folder', folder, val_fraction=0.2)
    assert sorted(names(train, folder) + names(val, folder)) == sorted(names(ImageFolder(str(folder))))
    assert '45 images to train on, 15 held out for evaluation (--val-fraction 0.2)' in caplog.text
    assert names(val) == [f'{name}.jpg' for name in HELD_OUT.split()]
    assert train.classes == val.classes == ['ant', 'bee', 'cat']
    assert all(name.startswith(val.classes[target]) for name, target in zip(names(val), val.targets, strict=True))
    assert names(open_eval('folder', folder, val_fraction=0.2)) == names(val)
    other_order = open_eval('folder', folder, val_fraction=0.2, classes=['cat', 'bee', 'ant'])
    assert names(other_order) == names(val) and np.bincount(other_order.targets).tolist() == [5, 4, 6]
    smaller = open_eval('folder', folder, val_fraction=0.1)
    assert 0 < len(smaller) < len(val) and set(names(smaller)) <= set(names(val))
    part, _ = open_train_val('folder', folder, val_fraction=0.2, only_classes='bee,cat')
    assert names(part) == [name for name in names(train) if not name.startswith('ant')]


def test_added_images_move_no_others_and_shards_are_split_alike(folder, tmp_path):
    train, val = open_train_val('folder', folder, val_fraction=0.2)
    grown = tmp_path / 'elsewhere' / 'grown'
    shutil.copytree(folder, grown)
    for number in range(30):
        shutil.copy(folder / 'ant/ant_0.jpg', grown / f'ant/another_{number}.png')
    more_train, more_val = open_train_val('folder', grown, val_fraction=0.2)
    assert set(names(train)) < set(names(more_train)) and set(names(val)) < set(names(more_val))
    assert len(more_train) + len(more_val) == 90
    pack(folder_input(str(folder)), tmp_path / 'shards', Recipe(samples=25), jobs=1)
    packed = open_train_val('folder', f'wds:{tmp_path}/shards', val_fraction=0.2)
    assert [sorted(names(part)) for part in packed] == [sorted(names(train)), sorted(names(val))]
    (tmp_path / 'inside').mkdir()
    shutil.copytree(folder, tmp_path / 'inside/train')
    assert names(open_train_val('folder', tmp_path / 'inside', val_fraction=0.2)[1]) == names(val)


def test_a_large_data_set_is_divided_evenly():
    class Named(ArrayImages):
        def name(self, index):
            return f'class{self.targets[index]}/{index}.jpg'

    count = 20_000
    dataset = Named('x', np.zeros((count, 1, 1), np.uint8), list('abcd'), np.arange(count) % 4)
    train, val = hold_out(dataset, 0.1, where='x')
    held_out = np.bincount(val.targets)
    assert len(train) + len(val) == count and not set(train._indices) & set(val._indices)
    assert (abs(held_out - 500) < 4 * np.sqrt(450)).all()  # four standard deviations


@pytest.mark.parametrize('share', [0.001, 0.999])
def test_a_class_that_falls_to_one_side_gets_an_image_on_the_other(folder, tmp_path, share, caplog):
    shutil.copytree(folder, tmp_path / 'x')
    for image in sorted((tmp_path / 'x/cat').iterdir())[1:]:
        image.unlink()
    train, val = open_train_val('folder', tmp_path / 'x', val_fraction=share)
    few, many = (val, train) if share < 0.5 else (train, val)
    counts = [np.bincount(part.targets, minlength=3)[:2].tolist() for part in (few, many)]
    assert counts == [[1, 1], [19, 19]]
    assert names(train).count('cat/cat_0.jpg') == 1 and len(train) + len(val) == 41
    assert "2 classes ('ant', 'bee'): by chance all their images fell to one side; one image was moved" in caplog.text
    assert "1 class ('cat'): a single image, which is trained on; nothing evaluates the class" in caplog.text


def test_what_chooses_the_best_epoch_is_apart_from_what_evaluates_it(folder, caplog):
    caplog.set_level(logging.INFO)
    train, val = open_train_val('folder', folder, val_fraction=0.2)
    rest, chosen_on = hold_out(train, 0.2, where='training images', option='--select-fraction')
    assert 'held out to choose the best epoch on (--select-fraction 0.2)' in caplog.text
    assert 'by chance' not in caplog.text and 3 < len(chosen_on) < 20
    assert sorted(names(rest) + names(chosen_on) + names(val)) == sorted(names(ImageFolder(str(folder))))


def test_what_a_fraction_does_not_go_with(folder, tmp_path):
    shutil.copytree(folder, tmp_path / 'train')
    shutil.copytree(folder, tmp_path / 'valid')
    message = error_of(open_train_val, 'folder', tmp_path, val_fraction=0.2)
    assert f'has an evaluation split, {tmp_path}/valid; leave the option out, or give {tmp_path}/train' in message
    assert 'has an evaluation split' in error_of(open_eval, 'folder', tmp_path, val_fraction=0.2)
    assert '--val-split valid' in error_of(open_train_val, 'folder', tmp_path, val_split='valid', val_fraction=0.2)
    assert 'digits has an evaluation split' in error_of(open_train_val, 'digits', val_fraction=0.2)
    shutil.copy(folder / 'ant/ant_0.jpg', tmp_path / 'train')  # outside of class folders
    assert 'has an evaluation split' in error_of(open_train_val, 'folder', tmp_path, val_fraction=0.2)
    (tmp_path / 'vehicles').mkdir()
    shutil.copytree(folder / 'ant', tmp_path / 'vehicles/car')
    shutil.copytree(folder / 'bee', tmp_path / 'vehicles/train')  # the name of a class
    train, val = open_train_val('folder', tmp_path / 'vehicles', val_fraction=0.2)
    assert train.classes == ['car', 'train'] and len(train) + len(val) == 40


def test_a_folder_of_class_folders_is_explained_with_the_remedy(folder, tmp_path):
    for name in ('folder', 'cifar10'):  # the default of transfer.py
        message = error_of(open_train_val, name, folder)
        assert "but 3 class folders ('ant', 'bee', 'cat')" in message and '--val-fraction 0.1' in message
        assert 'cifar' not in message
    shutil.copytree(folder, tmp_path / 'train')
    message = error_of(open_train_val, 'folder', tmp_path)
    assert 'val, valid, validation or test' in message and '--val-fraction 0.1 holds out a tenth of train' in message
    assert '--val-fraction' in error_of(open_train_val, 'folder', tmp_path / 'train')
    (tmp_path / 'test').mkdir()
    assert f"give '{tmp_path}' instead" in error_of(open_train_val, 'folder', tmp_path / 'train')


# --- Folds ------------------------------------------------------------------------------------------------------------

# The first fold of three, computed apart from this program: for each class by name, its images by their hash (BLAKE2b
# of the name without its ending, 8 bytes, person "fold"), of all of which every third one from the first on.
FIRST_FOLD = ('ant/ant_11 ant/ant_12 ant/ant_14 ant/ant_15 ant/ant_17 ant/ant_19 ant/ant_8 bee/bee_0 bee/bee_1 '
              'bee/bee_16 bee/bee_18 bee/bee_19 bee/bee_3 bee/bee_7 cat/cat_0 cat/cat_15 cat/cat_16 cat/cat_18 '
              'cat/cat_2 cat/cat_4')


def folds_of(folder, count, **options):
    return [open_train_val('folder', folder, fold=(number, count), **options) for number in range(1, count + 1)]


def test_each_image_is_in_one_fold_and_always_in_the_same(folder, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    folds = folds_of(folder, 3)
    assert 'fold 2 of 3: 40 images to train on, 20 held out for evaluation' in caplog.text
    every = sorted(names(ImageFolder(str(folder))))
    assert sorted(sum((names(val, folder) for _, val in folds), [])) == every
    for train, val in folds:
        assert sorted(names(train) + names(val)) == every and train.classes == val.classes == ['ant', 'bee', 'cat']
        assert set(np.bincount(val.targets)) == {6, 7}
    assert sorted(names(folds[0][1])) == sorted(f'{name}.jpg' for name in FIRST_FOLD.split())
    for number, (_, val) in enumerate(folds, start=1):
        reordered = open_eval('folder', folder, fold=(number, 3), classes=['cat', 'bee', 'ant'])
        assert names(reordered) == names(val) and np.bincount(reordered.targets)[0] == np.bincount(val.targets)[2]
    pack(folder_input(str(folder)), tmp_path / 'shards', Recipe(samples=25), jobs=1)
    packed = folds_of(f'wds:{tmp_path}/shards', 3)
    assert [sorted(names(val)) for _, val in packed] == [sorted(names(val)) for _, val in folds]
    part, _ = open_train_val('folder', folder, fold=(1, 3), only_classes='bee,cat')
    assert names(part) == [name for name in names(folds[0][0]) if not name.startswith('ant')]
    independent = set(names(folds[0][1])) & set(names(open_eval('folder', folder, val_fraction=0.2)))
    assert 0 < len(independent) < 15, 'the images of --val-fraction are dealt out like others'


def test_folds_are_of_the_training_images_alone(folder, tmp_path, caplog):
    shutil.copytree(folder, tmp_path / 'train')
    shutil.copytree(folder, tmp_path / 'val')
    assert [len(part) for part in open_train_val('folder', tmp_path, fold=(3, 4))] == [45, 15]
    assert [len(part) for part in open_train_val('digits', fold=(1, 5))] == [1150, 288]
    assert 'is not' not in caplog.text
    for image in sorted((tmp_path / 'train/cat').iterdir())[2:]:
        image.unlink()
    _, val = open_train_val('folder', tmp_path, fold=(1, 5))
    assert "1 class ('cat'): fewer images than the 5 folds" in caplog.text
    assert '--k-fold 43: ' in error_of(open_train_val, 'folder', tmp_path, fold=(1, 43))


def test_a_large_class_and_many_small_ones_are_dealt_out_evenly():
    targets = np.concatenate([np.zeros(101, int), np.arange(1, 50)])
    dataset = ArrayImages('x', np.zeros((150, 1, 1), np.uint8), [f'{k:02}' for k in range(50)], targets)
    folds = [hold_out_fold(dataset, fold, 4, where='x')[1] for fold in range(1, 5)]
    assert sorted(len(fold) for fold in folds) == [37, 37, 38, 38]
    assert sorted(int((fold.targets == 0).sum()) for fold in folds) == [25, 25, 25, 26]
    assert sorted(np.concatenate([fold._indices for fold in folds])) == list(range(150))


def test_a_checkpoint_knows_its_fold(folder, tmp_path):
    (tmp_path / 'a').mkdir()
    shutil.copytree(folder, tmp_path / 'a/train')
    shutil.copytree(folder / 'ant', tmp_path / 'a/val/ant')
    state = create_model('t2t_vit_7', num_classes=3, img_size=32).state_dict()
    recorded = {'data': str(tmp_path / 'a'), 'dataset': 'folder', 'train_split': 'train', 'k_fold': 3, 'fold': 2}
    torch.save({'state_dict': state, 'arch': 't2t_vit_7', 'classes': ['ant', 'bee', 'cat'], 'args': recorded},
               tmp_path / 'a.pth')

    def evaluated_names(root, *options):
        args = parse(str(root), '--checkpoint', str(tmp_path / 'a.pth'), *options, script='validate')
        model, args, classes = open_trained_model(args)
        return names(open_evaluation_data(args, classes, model.num_classes, ONE))

    second = names(open_eval('folder', folder, fold=(2, 3)))
    assert evaluated_names(tmp_path / 'a') == second
    assert len(evaluated_names(tmp_path / 'a', '--val-split', 'val')) == 20
    assert set(evaluated_names(tmp_path / 'a', '--k-fold', '3', '--fold', '1')).isdisjoint(second)
    message = error_of(evaluated_names, folder)
    assert f'if {folder} is that data set, give --k-fold 3 --fold 2' in message and '--val-split .' in message
    assert evaluated_names(folder, '--k-fold', '3', '--fold', '2') == second
    assert 'which of the folds? add --fold' in error_of(evaluated_names, folder, '--k-fold', '3')
    assert '--fold 4: --k-fold 3 has folds 1 to 3' in error_of(evaluated_names, folder, '--k-fold', '3', '--fold', '4')


RUN = ('--model', 't2t_vit_7', '--model-kwargs', 'embed_dim=32', 'depth=1', 'num_heads=2', '--img-size', '16',
       '-b', '8', '-j', '0', '--warmup-epochs', '0', '--cooldown-epochs', '0', '--device', 'cpu', '--no-tensorboard',
       '--output', 'out', '--experiment', 'a')


def test_the_scripts_evaluate_what_was_held_out(folder, tmp_path):
    out = succeeded(run_script('train.py', folder, *RUN, '--epochs', '1', '--val-fraction', '0.2', cwd=tmp_path))
    assert '(15 images)' in out
    assert 'val_fraction: 0.2' in (tmp_path / 'out/train/a/args.yaml').read_text()
    model = ('--checkpoint', 'out/train/a/last.pth.tar', '--device', 'cpu')
    out = succeeded(run_script('predict.py', '--data', folder, *model, '-o', 'p', cwd=tmp_path))
    assert 'trained with --val-fraction 0.2: the images held out then' in out
    rows = list(csv.DictReader((tmp_path / 'p.csv').read_text().splitlines()))
    assert [os.path.relpath(row['path'], folder) for row in rows] == names(open_eval('', folder, val_fraction=0.2))
    refused = run_script('train.py', folder, *RUN, '--epochs', '2', '--resume', 'auto', '--val-fraction', '0.3',
                         cwd=tmp_path)
    assert refused.returncode == 2 and 'give --val-fraction 0.2' in refused.stderr and refused.stderr.count('\n') == 1


def test_converted_and_stripped_checkpoints_know_it_too(folder, tmp_path):
    torch.save({'state_dict': create_model('t2t_vit_7', num_classes=3, img_size=32).state_dict(), 'arch': 't2t_vit_7',
                'args': {'data': str(folder), 'val_fraction': 0.2}}, tmp_path / 'a.pth')
    for command, file in (('strip', 'b.pth'), ('convert', 'b.safetensors')):
        succeeded(run_script('tools/checkpoint.py', command, 'a.pth', file, cwd=tmp_path))
        args = parse(str(folder), '--checkpoint', str(tmp_path / file), script='validate')
        assert open_trained_model(args).args.trained_on == {'data': str(folder), 'val_fraction': 0.2}


def test_a_checkpoint_knows_what_was_held_out(folder, tmp_path):
    torch.save({'state_dict': create_model('t2t_vit_7', num_classes=3, img_size=32).state_dict(), 'arch': 't2t_vit_7',
                'args': {'data': str(folder), 'val_fraction': 0.2}}, tmp_path / 'of_fraction.pth')

    def count(root, *options):
        args = parse(str(root), '--checkpoint', str(tmp_path / 'of_fraction.pth'), *options, script='validate')
        model, args, classes = open_trained_model(args)
        return len(open_evaluation_data(args, classes, model.num_classes, ONE))

    (tmp_path / 'link').symlink_to(folder)
    assert [count(root) for root in (folder, f'{folder}/', tmp_path / 'link')] == [15, 15, 15]
    assert count(folder, '--val-split', '.') == 60 and count(folder, '--val-fraction', '0.1') < 15
    other = shutil.copytree(folder, tmp_path / 'other')
    message = error_of(count, other)
    assert f'with --val-fraction 0.2 of {folder}; if {other} is that data set, give --val-fraction 0.2' in message
    assert count(other, '--val-fraction', '0.2') == 15 and count(other, '--val-split', '.') == 60
    bare = torch.load(tmp_path / 'of_fraction.pth')
    torch.save(bare | {'args': {'val_fraction': 0.2}}, tmp_path / 'of_fraction.pth')
    assert 'of a folder it does not name' in error_of(count, folder)
    (tmp_path / 'splits').mkdir()
    shutil.copytree(folder, tmp_path / 'splits/valid')
    assert count(tmp_path / 'splits') == 60  # its own evaluation split
    assert 'does not exist' in error_of(count, tmp_path / 'typo')
