"""open_trained_model: the model of a checkpoint, and what its training recorded where the options leave it open."""
import argparse
import re

import pytest
import torch

from models import create_model, open_trained_model
from options.groups import input_options, model_options, trained_model_options
from options.parser import create_parser, parse_options
from options.scripts import FROM_CHECKPOINT
from utils.errors import UserError

SMALL = {'depth': 2, 'embed_dim': 64, 'num_heads': 2}
RECORDED = {'model': 't2t_vit_7', 'img_size': '32x48', 'crop_pct': 1.0, 'interpolation': 'bilinear',
            'mean': [0.5, 0.4, 0.3], 'std': None, 'gp': 'avg', 'lr': 0.1,
            'model_kwargs': [f'{name}={value}' for name, value in SMALL.items()]}


@pytest.fixture(scope='module')
def model():
    torch.manual_seed(0)
    return create_model('t2t_vit_7', num_classes=3, img_size=(32, 48), global_pool='avg', **SMALL).eval()


def write(model, path, recorded, **content):
    torch.save({'arch': 't2t_vit_7', 'state_dict': model.state_dict(), 'args': recorded, **content}, path)
    return path


def opened(*words):
    groups = (model_options, trained_model_options, input_options)
    parser = create_parser('', groups, FROM_CHECKPOINT)
    return open_trained_model(parse_options(parser, [str(word) for word in words]))


def test_what_was_recorded_holds_where_nothing_else_is_asked_for(model, tmp_path):
    path = write(model, tmp_path / 'run.pth', RECORDED, classes=['ant', 'bee', 'cat'])
    trained = opened('--checkpoint', path)
    images = torch.randn(2, 3, 32, 48, generator=torch.Generator().manual_seed(1))
    assert torch.equal(trained.model(images), model(images))
    assert not trained.model.training and trained.classes == ['ant', 'bee', 'cat']
    args = trained.args
    assert (args.model, args.img_size, args.gp) == ('t2t_vit_7', (32, 48), 'avg')
    assert (args.crop_pct, args.interpolation, args.mean, args.std) == (1.0, 'bilinear', [0.5, 0.4, 0.3], None)
    assert not hasattr(args, 'lr')


def test_the_command_line_wins(model, tmp_path):
    path = write(model, tmp_path / 'run.pth', RECORDED)
    trained = opened('--checkpoint', path, '--crop-pct', '0.8', '--mean', '0.1', '--img-size', '64', '--gp', 'token')
    args = trained.args
    assert (args.crop_pct, args.mean, args.img_size, args.gp) == (0.8, [0.1], 64, 'token')
    assert trained.model.global_pool == 'token' and trained.model.grid_size == (4, 4)
    assert trained.classes is None


def test_options_of_the_authors_training_are_read_too(model, tmp_path):
    path = write(model, tmp_path / 'theirs.pth', argparse.Namespace(**{**RECORDED, 'mean': (0.5, 0.5, 0.5)}))
    assert opened('--checkpoint', path).args.mean == [0.5, 0.5, 0.5]


def test_arguments_of_another_model_are_not_taken_over(model, tmp_path):
    wide = create_model('t2t_vit_10', num_classes=3, img_size=(32, 48))
    path = write(wide, tmp_path / 'run.pth', {**RECORDED, 'gp': None})
    trained = opened('--checkpoint', path, '--model', 't2t_vit_10')
    assert len(trained.model.blocks) == 10


@pytest.mark.parametrize('name, value, remedy', [('crop_pct', 'much', '--crop-pct'), ('mean', 3, '--mean')])
def test_a_senseless_record_is_named_and_not_used(model, tmp_path, caplog, name, value, remedy):
    path = write(model, tmp_path / 'run.pth', {**RECORDED, name: value})
    opened('--checkpoint', path)
    assert re.search(f'run.pth, options of its training: {name}: .*{value}.*; it is not used', caplog.text)
    caplog.clear()
    opened('--checkpoint', path, remedy, '0.5')
    assert 'not used' not in caplog.text


@pytest.mark.parametrize('words', [[], ['--pretrained', '--checkpoint', 'x'], ['--initial-checkpoint', 'x']])
def test_weights_come_from_one_source(words):
    with pytest.raises(UserError, match='which weights. give --checkpoint PATH'):
        opened(*words)


def test_weights_without_a_classifier_are_refused(tmp_path):
    headless = create_model('t2t_vit_7', num_classes=0, img_size=32)
    torch.save(headless.state_dict(), tmp_path / 'headless.pth')
    with pytest.raises(UserError, match='holds no classifier'):
        opened('--checkpoint', tmp_path / 'headless.pth')
