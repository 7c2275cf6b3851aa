"""Tests of tools/checkpoint.py through its command line: every command on small files, and what it refuses.

    python -m pytest tests/test_checkpoint_tool.py
"""
import argparse
import contextlib
import hashlib
import io
import json
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config

from models import load_weights, read_checkpoint, state_dict_of
from tests.conftest import ROOT, evaluated, run_script, run_script_cold, succeeded
from tools import checkpoint
from utils.errors import UserError

CLASSES = ['ant', 'bee', 'cat']


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(42)
    print('seed 42')  # shown by pytest when a test fails


def tool(*options, cwd: Path, in_process: bool = True) -> str:
    """What the tool prints; it must succeed and leave no temporary file. Most tests spare themselves a new Python."""
    if in_process:
        with contextlib.chdir(cwd), contextlib.redirect_stdout(io.StringIO()) as out:
            checkpoint.main(list(options))
        printed = out.getvalue()
    else:
        printed = succeeded(run_script('tools/checkpoint.py', *options, cwd=cwd))
    assert not list(cwd.rglob('.*.tmp'))
    return printed


def refused(message: str, *options, cwd: Path) -> None:
    """The tool must end with one line and change nothing."""
    before = {path: path.read_bytes() for path in cwd.rglob('*') if path.is_file()}
    with contextlib.chdir(cwd), pytest.raises(UserError) as caught:
        checkpoint.main(list(options))
    assert message in str(caught.value) and '\n' not in str(caught.value), str(caught.value)
    assert {path: path.read_bytes() for path in cwd.rglob('*') if path.is_file()} == before


def model(**kwargs) -> torch.nn.Module:
    return timm.create_model('t2t_vit_7', **{'img_size': (64, 32), 'num_classes': 3, **kwargs}).eval()


def training_run(source: torch.nn.Module, other: torch.nn.Module) -> dict:
    return {'state_dict': other.state_dict(), 'state_dict_ema': source.state_dict(), 'arch': 't2t_vit_7',
            'classes': CLASSES, 'epoch': 7, 'global_step': 80, 'ranks': [{}], 'metric': 61.25, 'optimizer': {},
            'args': {'lr': 5e-4, 'batch_size': 64, 'img_size': '64x32', 'model': 't2t_vit_7'}}


def assert_equal(path: Path, expected: dict) -> dict:
    """The weights in a file are `expected`, to the bit; returns what else it holds."""
    content = read_checkpoint(path)
    state = state_dict_of(content)
    assert state.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.equal(state[key], tensor) and state[key].dtype == tensor.dtype, key
    return {entry: value for entry, value in content.items() if entry != 'state_dict'}


# --- inspect ----------------------------------------------------------------------------------------------------------

def test_inspect(tmp_path):
    source, other = model(), model()
    torch.save(training_run(source, other), tmp_path / 'last.pth.tar')
    lines = dict(line.split(maxsplit=1) for line in tool(
        'inspect', 'last.pth.tar', cwd=tmp_path, in_process=False).splitlines())
    count = sum(tensor.numel() for tensor in source.state_dict().values())
    assert lines['file'].startswith('last.pth.tar (') and lines['format'] == 'training run, weights in state_dict_ema'
    assert lines['model'] == 't2t_vit_7' and 'recorded' not in lines
    assert lines['classes'] == '3: ant, bee, cat' and lines['channels'] == '3'
    assert lines['parameters'] == f'{count:,} in {len(source.state_dict())} tensors' and lines['dtype'] == 'float32'
    assert lines['average'] == '(EMA)  yes' and lines['epoch'] == '7' and lines['metric'] == '61.25'
    assert lines['image'] == 'size     64 × 32 (grid 4 × 2)'
    assert 'lr 0.0005' in lines['options'] and 'batch_size 64' in lines['options']

    out = tool('inspect', 'last.pth.tar', '--no-use-ema', '--keys', cwd=tmp_path)
    assert 'weights in state_dict\n' in out
    assert 'tokens_to_token.attention1.kqv.weight' in out and '[192, 147]' in out
    facts = json.loads(tool('inspect', 'last.pth.tar', '--json', '--keys', cwd=tmp_path))
    assert facts['models'] == ['t2t_vit_7'] and facts['img_size'] == [64, 32] and facts['ema'] is True
    assert facts['keys'] == {key: list(tensor.shape) for key, tensor in source.state_dict().items()}
    assert facts['parameters'] == count and facts['classes'] == CLASSES


def test_inspect_names_ties_and_other_kinds(tmp_path):
    with torch.device('meta'):
        shapes = timm.create_model('t2t_vit_14', num_classes=0).state_dict()
    release = {key: torch.zeros(tensor.shape, dtype=torch.float16) for key, tensor in shapes.items()}
    torch.save({'state_dict_ema': release}, tmp_path / 'a.pth.tar')
    out = tool('inspect', 'a.pth.tar', cwd=tmp_path)
    assert 't2t_vit_14 or t2t_vit_14_resnext' in out and '224 × 224' in out and 'float16' in out
    assert '(EMA)  only' in out and 'no classifier' in out

    arrays = {f'backbone.{key}': tensor.numpy() for key, tensor in model(depth=1).state_dict().items()}
    (tmp_path / 'b.pdparams').write_bytes(pickle.dumps(arrays))
    out = tool('inspect', 'b.pdparams', cwd=tmp_path)
    assert 'PASSL' in out and 'a T2T-ViT with performer tokens' in out and 'depth 1' in out

    resnet = timm.create_model('resnet18', num_classes=4, in_chans=2)
    torch.save({'state_dict': resnet.state_dict(), 'args': argparse.Namespace(model='resnet18')}, tmp_path / 'c.pth')
    out = tool('inspect', 'c.pth', cwd=tmp_path)
    assert 'recorded model resnet18' in out and 'classes        4' in out and 'channels       2' in out


# --- convert ----------------------------------------------------------------------------------------------------------

def paddle_file(path: Path, source: torch.nn.Module) -> None:
    """As PASSL's."""
    path.write_bytes(pickle.dumps({
        key.replace('head.', 'head.fc_cls.') if key.startswith('head.') else f'backbone.{key}':
            (tensor.T if key.endswith('.weight') and tensor.dim() == 2 else tensor).numpy()
        for key, tensor in source.state_dict().items()}, protocol=4))


@pytest.mark.parametrize('out', ['a.safetensors', 'a.pth', 'new/folder/a.pth.tar'])
def test_convert_to_a_file(out, tmp_path):
    source = model()
    torch.save(training_run(source, model()), tmp_path / 'last.pth.tar')
    printed = tool('convert', 'last.pth.tar', out, cwd=tmp_path, in_process=out != 'a.safetensors')
    assert 'differ by at most 0 (as t2t_vit_7)' in printed
    beside = assert_equal(tmp_path / out, source.state_dict())
    assert beside == {'arch': 't2t_vit_7', 'classes': CLASSES, 'img_size': [64, 32]}
    if out.endswith('.safetensors'):
        assert safetensors.torch.load_file(tmp_path / out).keys() == source.state_dict().keys()

    # And back, from what is said beside the weights alone: the grid of 4 × 2 is not known from its 8 positions.
    target = model(img_size=64)
    assert 'from 4 × 2 to 4 × 4' in str(load_weights(target, tmp_path / out))


def test_convert_without_the_average(tmp_path):
    other = model()
    torch.save(training_run(model(), other), tmp_path / 'last.pth.tar')
    tool('convert', 'last.pth.tar', 'a.pth', '--no-use-ema', cwd=tmp_path)
    assert_equal(tmp_path / 'a.pth', other.state_dict())


def test_convert_from_paddle(tmp_path):
    source = model(img_size=64)
    paddle_file(tmp_path / 'a.pdparams', source)
    assert 'differ by at most 0' in tool('convert', 'a.pdparams', 'a.safetensors', cwd=tmp_path)
    assert assert_equal(tmp_path / 'a.safetensors', source.state_dict()) == {'arch': 't2t_vit_7', 'img_size': [64, 64]}


def test_convert_of_images_that_were_not_square(tmp_path):
    source = model()
    torch.save(source.state_dict(), tmp_path / 'a.pth')
    refused('no square', 'convert', 'a.pth', 'b.pth', cwd=tmp_path)
    assert 'differ by at most 0' in tool('convert', 'a.pth', 'b.pth', '--img-size', '64x32', cwd=tmp_path)
    assert assert_equal(tmp_path / 'b.pth', source.state_dict()) == {'arch': 't2t_vit_7', 'img_size': [64, 32]}


def test_convert_of_images_that_the_weights_are_not_of(tmp_path):
    torch.save(model().state_dict(), tmp_path / 'a.pth')
    refused('64 × 64 pixels (--img-size) do not give', 'convert', 'a.pth', 'b.pth', '--img-size', '64', cwd=tmp_path)


@pytest.mark.parametrize('out', ['b.pth', 'hub/'])
@pytest.mark.parametrize('name', ['t2t_vit_c_14', 'vit_s_16'])
def test_convert_of_safetensors_of_convolutions(name, out, tmp_path):
    source = timm.create_model(name, img_size=32, in_chans=2, num_classes=2)
    safetensors.torch.save_file(source.state_dict(), tmp_path / 'a.safetensors')  # which sorts its keys
    assert 'differ by at most 0' in tool('convert', 'a.safetensors', out, cwd=tmp_path)


@pytest.mark.parametrize('name', ['vit_small_r26_s32_224', 'hiera_tiny_224', 'resnet18'])
def test_convert_of_models_of_timm_at_their_own_size(name, tmp_path):
    torch.save(timm.create_model(name, num_classes=2).state_dict(), tmp_path / 'a.pth')
    assert f'as {name}' in tool('convert', 'a.pth', 'b.safetensors', '--model', name, cwd=tmp_path)
    assert 'img_size' not in read_checkpoint(tmp_path / 'b.safetensors')


def test_inspect_writes_json_that_all_can_read(tmp_path):
    content = training_run(model(depth=1), model(depth=1))
    content |= {'metric': float('nan'), 'epoch': float('inf')}
    content['args'] |= {'lr': [float('-inf'), 1.], 'opt': {(1, 2): float('nan')}}
    torch.save(content, tmp_path / 'a.pth')
    facts = json.loads(tool('inspect', 'a.pth', '--json', cwd=tmp_path), parse_constant=pytest.fail)
    assert facts['metric'] == 'nan' and facts['epoch'] == 'inf'
    assert facts['options']['lr'] == ['-inf', 1.] and facts['options']['opt'] == {'(1, 2)': 'nan'}


def test_both_files_of_a_folder_reach_the_disk(tmp_path, monkeypatch):
    torch.save(model(img_size=32).state_dict(), tmp_path / 'a.pth')
    synced, fsync = [], os.fsync

    def noted(descriptor: int) -> None:
        synced.append(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    monkeypatch.setattr(os, 'fsync', noted)
    tool('convert', 'a.pth', 'hub/', cwd=tmp_path)
    assert {path.stat().st_ino for path in (tmp_path / 'hub').iterdir()} <= set(synced)


def test_convert_of_a_model_that_its_own_account_does_not_describe(tmp_path):
    state = timm.create_model('resnet18', num_classes=3).state_dict()
    torch.save({'state_dict': state, 'arch': 'resnet34'}, tmp_path / 'a.pth')
    printed = tool('convert', 'a.pth', 'b.pth', cwd=tmp_path)
    assert 'parity was not checked: a.pth: the weights are of' in printed and 'do not fit resnet34' in printed
    assert assert_equal(tmp_path / 'b.pth', state) == {}
    assert '(as resnet18)' in tool('convert', 'a.pth', 'c.pth', '--model', 'resnet18', cwd=tmp_path)
    refused('do not fit resnet34', 'convert', 'a.pth', 'd.pth', '--model', 'resnet34', cwd=tmp_path)


def test_convert_to_halves(tmp_path):
    source = model(img_size=64)
    torch.save(source.state_dict(), tmp_path / 'a.pth')
    printed = tool('convert', 'a.pth', 'b.safetensors', '--dtype', 'float16', cwd=tmp_path)
    assert 'differ by at most 0 ' not in printed and 'differ by at most' in printed
    assert_equal(tmp_path / 'b.safetensors', {key: tensor.half() for key, tensor in source.state_dict().items()})


def test_convert_of_an_unknown_model_says_what_was_not_checked(tmp_path):
    state = model(depth=2).state_dict()
    torch.save({'state_dict': state, 'img_size': '64x32', 'arch': 't2t_vit_7'}, tmp_path / 'a.pth')
    printed = tool('convert', 'a.pth', 'b.safetensors', cwd=tmp_path)
    assert 'parity was not checked: a T2T-ViT' in printed and 'depth 2 is not a registered model' in printed
    assert_equal(tmp_path / 'b.safetensors', state)
    refused('a folder in the form of timm needs a registered model', 'convert', 'a.pth', 'b/', cwd=tmp_path)
    refused('do not fit t2t_vit_7', 'convert', 'a.pth', 'c.pth', '--model', 't2t_vit_7', cwd=tmp_path)
    refused("model 't2t_vit_8' does not exist", 'convert', 'a.pth', 'c.pth', '--model', 't2t_vit_8', cwd=tmp_path)
    assert not (tmp_path / 'b').exists()


@pytest.mark.parametrize('name, kwargs', [
    ('t2t_vit_7', {'img_size': (64, 32), 'num_classes': 3}), ('t2t_vit_7', {'in_chans': 1, 'num_classes': 0}),
    ('resnet18', {'num_classes': 3, 'in_chans': 1}), ('vit_tiny_patch16_224', {'img_size': 96, 'num_classes': 3})])
def test_convert_to_a_folder_of_timm(name, kwargs, tmp_path):
    source = timm.create_model(name, **kwargs).eval()
    torch.save({'state_dict': source.state_dict(), 'arch': name, 'classes': CLASSES if kwargs['num_classes'] else None,
                'img_size': kwargs.get('img_size')}, tmp_path / 'a.pth')
    assert f'as {name}' in tool('convert', 'a.pth', 'hub/model/', cwd=tmp_path, in_process=name != 'resnet18')
    assert sorted(path.name for path in (tmp_path / 'hub/model').iterdir()) == ['config.json', 'model.safetensors']
    loaded = timm.create_model(f'local-dir:{tmp_path}/hub/model', pretrained=True).eval()
    size = kwargs.get('img_size', 224)
    images = torch.randn(1, kwargs.get('in_chans', 3), *(size if isinstance(size, tuple) else (size, size)))
    assert torch.equal(loaded(images), source(images))
    config = json.loads((tmp_path / 'hub/model/config.json').read_text())
    assert config['architecture'] == name
    assert config.get('label_names') == (CLASSES if kwargs['num_classes'] else None)

    refused('exists; give another name, or --force', 'convert', 'a.pth', 'hub/model', cwd=tmp_path)
    (tmp_path / 'hub/model/mine.txt').write_text('kept')
    tool('convert', 'a.pth', 'hub/model', '--force', cwd=tmp_path)
    assert (tmp_path / 'hub/model/mine.txt').read_text() == 'kept'


# --- What travels with the weights ------------------------------------------------------------------------------------

# Options that change what a picture gives, none of them the model's own.
RECORDED = {'crop_pct': 0.6, 'mean': [0.5, 0.4, 0.3], 'std': [0.3, 0.2, 0.25], 'interpolation': 'bilinear', 'gp': 'avg',
            'model_kwargs': ['num_heads=8']}


@pytest.mark.parametrize('command', [
    ('convert', 'a.pth', 'b.safetensors'), ('convert', 'a.pth', 'b.pth'), ('convert', 'a.pth', 'hub/'),
    ('strip', 'a.pth', 'b.safetensors'), ('average', 'a.pth', 'same.pth', '-o', 'b.pth')], ids=' '.join)
def test_all_that_a_picture_needs_travels(command, tmp_path):
    source = model(num_heads=8, global_pool='avg')
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)  # so that pictures make a difference
    content = training_run(source, source)
    content['args'] |= RECORDED
    torch.save(content, tmp_path / 'a.pth')
    shutil.copy(tmp_path / 'a.pth', tmp_path / 'same.pth')
    out = command[-1].rstrip('/')
    tool(*command, cwd=tmp_path)
    picture = tmp_path / 'picture.png'
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((140, 100)).save(picture)
    expected = evaluated(picture, '--checkpoint', 'a.pth')
    assert expected.keys() == set(CLASSES)
    assert evaluated(picture, '--checkpoint', out) == expected
    if out == 'hub':  # as timm reads it
        loaded = timm.create_model(f'local-dir:{tmp_path}/hub', pretrained=True).eval()
        config = resolve_data_config({}, pretrained_cfg=loaded.pretrained_cfg)
        images = create_transform(**config)(Image.open(picture))[None]
        with torch.inference_mode():
            probabilities = loaded(images).softmax(1)[0].tolist()
        assert probabilities == pytest.approx([expected[name] for name in CLASSES], abs=1e-5)
        again = tool('convert', 'hub', 'c.safetensors', cwd=tmp_path)
        assert 'differ by at most 0' in again and evaluated(picture, '--checkpoint', 'c.safetensors') == expected


def test_the_attention_of_mmpretrain_travels(tmp_path):
    """A converted file no longer says who trained it, so its numbers must."""
    source = timm.create_model('t2t_vit_t_14', img_size=32, num_classes=3, depth=1)
    state = {('head.layers.' if key.startswith('head') else 'backbone.') + key.replace('blocks.', 'encoder.'): tensor
             for key, tensor in source.state_dict().items()}
    content = {'meta': {'mmengine_version': '0.10.7'}, 'state_dict': state}
    torch.save(content, tmp_path / 'a.pth')
    printed = tool('convert', 'a.pth', 'b.pth', cwd=tmp_path)
    assert "queries and keys multiplied, as mmpretrain's attention scores are 8 q·k" in printed
    tool('strip', 'a.pth', 'c.pth', cwd=tmp_path)
    for name in ('b.pth', 'c.pth'):
        key = 'blocks.0.attn.qkv.weight'
        written, given = read_checkpoint(tmp_path / name)['state_dict'][key], source.state_dict()[key]
        assert torch.equal(written[:768], 8 * given[:768]) and torch.equal(written[768:], given[768:])


def test_the_comparison_sees_a_lost_crop(tmp_path, monkeypatch):
    """The two models must give the same for a picture, not only for a tensor."""
    content = training_run(model(), model())
    content['args'] |= {'crop_pct': 0.5}
    torch.save(content, tmp_path / 'a.pth')
    monkeypatch.setattr(checkpoint.Checkpoint, 'extras', lambda self, name: {'arch': name, 'img_size': [64, 32]})
    refused('b.pth was not written', 'convert', 'a.pth', 'b.pth', cwd=tmp_path)


def test_averages_of_other_inputs_are_refused(tmp_path):
    content = training_run(model(), model())
    for name, crop in (('a', 0.5), ('b', 0.9)):
        content['args'] |= {'crop_pct': crop}
        torch.save(content, tmp_path / f'{name}.pth')
    refused("differ in args: {'crop_pct': 0.9} and {'crop_pct': 0.5}", 'average', 'a.pth', 'b.pth', '-o', 'c.pth',
            cwd=tmp_path)


def test_words_for_classes_travel(tmp_path):
    timm.models.save_for_hf(model(), tmp_path / 'hub', safe_serialization=True, model_config={
        'label_names': CLASSES, 'label_descriptions': {'ant': 'an insect'}})
    tool('convert', 'hub', 'b.safetensors', cwd=tmp_path)
    tool('convert', 'b.safetensors', 'again/', cwd=tmp_path)
    config = json.loads((tmp_path / 'again/config.json').read_text())
    assert config['label_names'] == CLASSES and config['label_descriptions'] == {'ant': 'an insect'}


def test_folders_for_transformers_and_accelerate(tmp_path):
    """They refuse safetensors without 'format'; transformers passes num_classes and model_args to timm.create_model."""
    source = model()
    torch.save(training_run(source, source), tmp_path / 'a.pth')
    tool('convert', 'a.pth', 'hub/', cwd=tmp_path)
    tool('convert', 'a.pth', 'b.safetensors', cwd=tmp_path)
    for path in ('hub/model.safetensors', 'b.safetensors'):
        with safetensors.safe_open(tmp_path / path, 'pt') as file:
            assert file.metadata()['format'] == 'pt'
    config = json.loads((tmp_path / 'hub/config.json').read_text())
    loaded = timm.create_model(config['architecture'], num_classes=config['num_classes'], **config['model_args']).eval()
    loaded.load_state_dict(safetensors.torch.load_file(tmp_path / 'hub/model.safetensors'))
    images = torch.randn(1, 3, 64, 32)
    assert torch.equal(loaded(images), source(images))
    # Equal content has equal bytes, so equal hashes.
    assert (tmp_path / 'hub/model.safetensors').read_bytes() == (tmp_path / 'b.safetensors').read_bytes()


def test_ties_are_the_users_to_resolve(tmp_path):
    source = timm.create_model('t2t_vit_14_resnext', img_size=32, num_classes=2)
    torch.save({'state_dict_ema': source.state_dict()}, tmp_path / 'a.pth.tar')
    refused('--model t2t_vit_14 or --model t2t_vit_14_resnext', 'convert', 'a.pth.tar', 'hub/', cwd=tmp_path)
    tool('convert', 'a.pth.tar', 'open.pth', cwd=tmp_path)
    assert 'arch' not in assert_equal(tmp_path / 'open.pth', source.state_dict())
    tool('convert', 'a.pth.tar', 'told.safetensors', '--model', 'T2T_ViT_14_resnext', cwd=tmp_path)
    assert assert_equal(tmp_path / 'told.safetensors', source.state_dict())['arch'] == 't2t_vit_14_resnext'
    tool('convert', 'told.safetensors', 'hub/', cwd=tmp_path)  # what the file says resolves it
    assert json.loads((tmp_path / 'hub/config.json').read_text())['architecture'] == 't2t_vit_14_resnext'


def test_a_difference_in_logits_leaves_no_file(tmp_path):
    state = model(img_size=32).state_dict()
    state['norm.bias'][0] = float('nan')
    torch.save(state, tmp_path / 'a.pth')
    refused('was not written', 'convert', 'a.pth', 'b.pth', cwd=tmp_path)


# --- average, strip ---------------------------------------------------------------------------------------------------

def test_average(tmp_path):
    sources = [model(depth=2) for _ in range(3)]
    expected = {key: torch.stack([source.state_dict()[key].double() for source in sources]).mean(0).float()
                for key in sources[0].state_dict()}
    for index, source in enumerate(sources):
        state = source.state_dict()
        # Not the mean of three equal numbers in every arithmetic, and a count of batches as batch norm keeps it.
        state['pos_embed'] = sources[0].pos_embed * 1.1
        state['fixed'], state['steps'] = torch.full((99,), .1, dtype=torch.float64), torch.tensor(index * 10)
        torch.save({'state_dict_ema': state, 'classes': CLASSES, 'img_size': [64, 32]}, tmp_path / f'{index}.pth')
    expected |= {'pos_embed': sources[0].pos_embed * 1.1, 'steps': torch.tensor(20),
                 'fixed': torch.full((99,), .1, dtype=torch.float64)}
    for out in ('mean.safetensors', 'mean.pth.tar'):
        printed = tool('average', '0.pth', '1.pth', '2.pth', '-o', out, cwd=tmp_path, in_process=out != 'mean.pth.tar')
        assert 'average of 3 checkpoints' in printed
        assert assert_equal(tmp_path / out, expected) == {'classes': CLASSES, 'img_size': [64, 32]}
    tool('average', '2.pth', '2.pth', '-o', 'mean.pth.tar', '--force', cwd=tmp_path)
    assert_equal(tmp_path / 'mean.pth.tar', state)


def test_average_refuses_what_differs(tmp_path):
    state = model(depth=2).state_dict()
    others = {
        'more': {**state, 'aux_head.bias': torch.zeros(3)},
        'less': {key: tensor for key, tensor in state.items() if key != 'norm.bias'},
        'size': model(depth=2, img_size=64).state_dict(),
        'half': {key: tensor.half() for key, tensor in state.items()},
    }
    for name, other in {'a': state, **others}.items():
        torch.save({'state_dict': other, 'classes': CLASSES}, tmp_path / f'{name}.pth')
    torch.save({'state_dict': state, 'classes': CLASSES[::-1]}, tmp_path / 'classes.pth')
    for name, difference in (('more', 'aux_head.bias: float32 [3] and no such key'), ('less', 'norm.bias: no such key'),
                             ('size', 'pos_embed: float32 [1, 17, 256] and float32 [1, 9, 256]'),
                             ('half', 'cls_token: float16'), ('classes', 'classes')):
        refused(f'differ in {difference}', 'average', 'a.pth', f'{name}.pth', '-o', 'b.pth', cwd=tmp_path)
    refused('two checkpoints or more', 'average', 'a.pth', '-o', 'b.pth', cwd=tmp_path)


def test_strip(tmp_path):
    source, other = model(depth=2), model(depth=2)
    torch.save(training_run(source, other), tmp_path / 'last.pth.tar')
    printed = tool('strip', 'last.pth.tar', 'a.pth.tar', cwd=tmp_path, in_process=False)
    digest = hashlib.sha256((tmp_path / 'a.pth.tar').read_bytes()).hexdigest()
    assert f'sha256 {digest}\nhash   {digest[:8]}' in printed
    beside = assert_equal(tmp_path / 'a.pth.tar', source.state_dict())
    assert beside == {'classes': CLASSES, 'img_size': [64, 32]}  # of no registered model: depth 2
    assert (tmp_path / 'a.pth.tar').stat().st_size < .6 * (tmp_path / 'last.pth.tar').stat().st_size

    for name in ('b.safetensors', 'b.pth.tar'):
        for _ in range(4):  # the hash depends on nothing but the content
            tool('strip', 'last.pth.tar', name, '--hash', '--no-use-ema', '--force', cwd=tmp_path)
        hashed, = tmp_path.glob(name.replace('b.', 'b-*.'))
        assert hashed.name == name.replace('b.', f'b-{hashlib.sha256(hashed.read_bytes()).hexdigest()[:8]}.')
        assert_equal(hashed, other.state_dict())
        refused(f'{hashed.name} exists', 'strip', 'last.pth.tar', name, '--hash', '--no-use-ema', cwd=tmp_path)


# --- Mistakes ---------------------------------------------------------------------------------------------------------

def test_mistakes(tmp_path):
    torch.save({'state_dict_ema': model(img_size=32).state_dict()}, tmp_path / 'a.pth')
    (tmp_path / 'text.pth').write_text('no checkpoint')
    (tmp_path / 'folder').mkdir()
    (tmp_path / 'file').touch()
    for message, *options in (
        ('missing.pth does not exist', 'inspect', 'missing.pth'),
        ('not a PyTorch checkpoint', 'inspect', 'text.pth'),
        ('a.pth: the checkpoint holds averaged weights (EMA) only', 'inspect', 'a.pth', '--no-use-ema'),
        ('a.pth exists; give another name, or --force', 'convert', 'a.pth', 'a.pth'),
        ('a.pth exists', 'strip', 'a.pth', 'a.pth'),
        ('a.pth exists', 'average', 'a.pth', 'a.pth', '-o', 'a.pth'),
        ("OUT is 'a.onnx'; give a file that ends in .safetensors or .pth.tar or .pth", 'convert', 'a.pth', 'a.onnx'),
        ("OUT is '/', the root", 'convert', 'a.pth', '/'),
        ("OUT is '/', the root", 'strip', 'a.pth', '/', '--force'),
        ("OUT is 'folder'", 'strip', 'a.pth', 'folder'),
        ("OUT is '.pth'", 'strip', 'a.pth', '.pth'),
        ('file/b.pth cannot be written', 'strip', 'a.pth', 'file/b.pth'),
        ('file cannot be written', 'convert', 'a.pth', 'file/', '--model', 't2t_vit_7'),
    ):
        refused(message, *options, cwd=tmp_path)
    for options in (('inspect', 'text.pth'), ('convert', 'a.pth', 'a.pth'), ('inspct', 'a.pth'),
                    ('inspect', 'a.pth', '--kys')):
        result = run_script('tools/checkpoint.py', *options, cwd=tmp_path)
        assert result.returncode == 2 and result.stderr.startswith('checkpoint.py: error: ')
        assert result.stderr.count('\n') == 1 and not result.stdout
    result = run_script('tools/checkpoint.py', cwd=tmp_path)
    assert result.returncode == 2 and 'COMMAND' in result.stderr


def test_help_does_not_wait_for_torch(tmp_path):
    result = run_script_cold('tools/checkpoint.py', 'convert', '--help', cwd=tmp_path, PYTHONPROFILEIMPORTTIME='1')
    assert result.returncode == 0 and '--model' in result.stdout
    assert 'argparse' in result.stderr and 'torch' not in result.stderr and 'numpy' not in result.stderr


@pytest.mark.parametrize('out', ['b.pth', 'b.safetensors'])
def test_a_full_disk_leaves_the_old_file(out, tmp_path):
    torch.save(model(depth=1).state_dict(), tmp_path / 'a.pth')
    (tmp_path / out).write_bytes(b'old')
    limited = ('import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000)); '
               'sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name="__main__")')
    script = ROOT / 'tools/checkpoint.py'
    (tmp_path / 'limited.py').write_text(limited)
    result = run_script(tmp_path / 'limited.py', script, 'strip', 'a.pth', out, '--force', cwd=tmp_path)
    assert result.returncode == 2 and f'{out} cannot be written' in result.stderr and result.stderr.count('\n') == 1
    assert (tmp_path / out).read_bytes() == b'old'
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(['a.pth', 'limited.py', out])
