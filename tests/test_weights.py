"""Tests of models/weights.py: every kind of checkpoint, wrong and hostile files, loading into other models.

    python -m pytest tests/test_weights.py
"""
import argparse
import os
import pickle

import pytest
import safetensors.torch
import timm
import torch
import torch.nn.functional as F

from models import load_for_transfer_learning, load_weights, read_checkpoint, state_dict_of
from utils.errors import UserError


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(42)
    print('seed 42')  # shown by pytest when a test fails


def tiny_model(**kwargs) -> torch.nn.Module:
    """A registered T2T-ViT, shrunk so that files of it are small."""
    return timm.create_model('t2t_vit_7', **{
        'img_size': 64, 'num_classes': 5, 'embed_dim': 32, 'depth': 2, 'num_heads': 2, **kwargs})


def wrapped(state: dict, prefix: str = 'module.') -> dict:
    return {prefix + key: tensor for key, tensor in state.items()}


def assert_loaded(model: torch.nn.Module, expected: dict) -> None:
    actual = model.state_dict()
    assert actual.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.equal(actual[key], tensor), key


def assert_refused(model: torch.nn.Module, checkpoint, message: str, **kwargs) -> str:
    """Loading must raise a one-line UserError with `message` and leave the model as it was."""
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(UserError, match=message) as caught:
        load_weights(model, checkpoint, **kwargs)
    assert '\n' not in str(caught.value)
    assert_loaded(model, before)
    return str(caught.value)


# ------------------------------------------------------------------------------------------------------------
# Formats

def checkpoints(state: dict, other: dict) -> dict[str, tuple[dict, str, str | None]]:
    """Name → (file content with `state` as the weights that count, format, entry)."""
    options = {'lr': 5e-4, 'model': 't2t_vit_14', 'img_size': None}
    return {
        'release': ({'state_dict_ema': state}, 'official release', 'state_dict_ema'),
        'training run': (
            {'epoch': 309, 'arch': 't2t_vit_14', 'state_dict': other, 'optimizer': {'state': {}},
             'args': argparse.Namespace(**options), 'amp_scaler': {'scale': 65536.}, 'state_dict_ema': state,
             'version': 2, 'metric': 81.5}, 'official training run', 'state_dict_ema'),
        'cifar': ({'net': wrapped(state), 'acc': 98.3, 'epoch': 59}, 'official CIFAR checkpoint', 'net'),
        'ours': ({'state_dict': other, 'state_dict_ema': state, 'args': options, 'format': 1, 'epoch': 3},
                 'training checkpoint', 'state_dict_ema'),
        'ours, no average': ({'state_dict': state, 'state_dict_ema': None, 'args': options},
                             'training checkpoint', 'state_dict'),
        'compiled': ({'state_dict': wrapped(state, '_orig_mod.')}, 'training checkpoint', 'state_dict'),
        'compiled blocks': (
            {'state_dict': {key.replace('mlp.', 'mlp._orig_mod.'): value for key, value in state.items()}},
            'training checkpoint', 'state_dict'),
        'wrapped twice': ({'model': wrapped(state, 'module._orig_mod.')}, 'training checkpoint', 'model'),
        'deit': ({'model': other, 'model_ema': state}, 'training checkpoint', 'model_ema'),
        'flat': (state, 'flat state dict', None),
    }


@pytest.mark.parametrize('legacy', [False, True], ids=['zip', 'legacy'])
@pytest.mark.parametrize('name', checkpoints({}, {}))
def test_known_formats(name, legacy, tmp_path):
    state, other = tiny_model().state_dict(), tiny_model().state_dict()
    content, expected_format, expected_entry = checkpoints(state, other)[name]
    path = tmp_path / 'checkpoint.pth.tar'
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    model = tiny_model()
    report = load_weights(model, path)
    assert_loaded(model, state)
    assert (report.format, report.entry, report.source) == (expected_format, expected_entry, str(path))
    assert set(report.loaded) == set(state)
    assert report.resized == report.missing == report.unexpected == () and report.head_replaced is None


def test_safetensors(tmp_path):
    state = tiny_model().state_dict()
    path = tmp_path / 'weights.bin'  # told by its content, not by its name
    safetensors.torch.save_file(state, path)
    model = tiny_model()
    load_weights(model, path)
    assert_loaded(model, state)


def test_the_average_is_taken_only_when_wanted():
    average, last = tiny_model().state_dict(), tiny_model().state_dict()
    checkpoint = {'state_dict': last, 'state_dict_ema': average, 'model_ema': average}
    assert torch.equal(state_dict_of(checkpoint)['cls_token'], average['cls_token'])
    assert torch.equal(state_dict_of(checkpoint, use_ema=False)['cls_token'], last['cls_token'])
    assert_refused(tiny_model(), {'state_dict_ema': average}, 'averaged weights .* only', use_ema=False)


@pytest.mark.parametrize('checkpoint, message', [
    ({}, 'holds nothing'),
    ({'epoch': 3, 'weights': {}}, 'no weights found.*holds epoch, weights'),
    ({'state_dict': {}}, 'no weights found'),
    ({'state_dict': {'cls_token': [0.]}}, 'no weights found.*holds cls_token'),
    ({'cls_token': torch.zeros(1), 'module.cls_token': torch.zeros(1)}, 'cls_token twice'),
])
def test_checkpoints_without_weights(checkpoint, message):
    assert_refused(tiny_model(), checkpoint, message)


# ------------------------------------------------------------------------------------------------------------
# Files that are no checkpoints

@pytest.mark.parametrize('content, message', [
    (b'', 'is empty'),
    (b'version https://git-lfs.github.com/spec/v1\noid sha256:0\n', 'Git LFS pointer.*git lfs pull'),
    (b'/annex/objects/SHA256E-s1--0.pth\n', 'git-annex pointer'),
    (b'\n<!DOCTYPE html><html><body>Not found</body></html>', 'a web page'),
    (b'<HTML>', 'a web page'),
    (b'some text that is long enough to be read as something', 'not a PyTorch checkpoint'),
    (bytes(range(256)) * 16, 'not a PyTorch checkpoint'),
    ((1 << 40).to_bytes(8, 'little') + b'{"a": 1}', 'damaged'),
    (pickle.dumps({'a': 1}, protocol=2), 'not a PyTorch checkpoint'),
])
def test_other_files(content, message, tmp_path):
    path = tmp_path / 'checkpoint.pth'
    path.write_bytes(content)
    assert str(path) in assert_refused(tiny_model(), path, message)


def test_paths_that_are_no_files(tmp_path):
    assert_refused(tiny_model(), tmp_path / 'missing.pth', 'missing.pth does not exist')
    assert_refused(tiny_model(), str(tmp_path), 'is a folder')


@pytest.mark.parametrize('content', [[1, 2], torch.zeros(3)])
def test_not_a_dict(content, tmp_path):
    torch.save(content, tmp_path / 'a.pth')
    assert_refused(tiny_model(), tmp_path / 'a.pth', f'holds a {type(content).__name__}')


@pytest.mark.parametrize('kind', ['zip', 'legacy', 'safetensors'])
def test_truncated_files(kind, tmp_path):
    state, path = tiny_model().state_dict(), tmp_path / 'a.pth'
    if kind == 'safetensors':
        safetensors.torch.save_file(state, path)
    else:
        torch.save({'state_dict': state}, path, _use_new_zipfile_serialization=kind == 'zip')
    whole = path.read_bytes()
    for length in (1, 9, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match='damaged|not a PyTorch checkpoint') as caught:
            read_checkpoint(path)
        assert '\n' not in str(caught.value)


class Hostile:
    """Pickles as a call that creates a file."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize('container', ['zip', 'legacy', 'pickle'])
@pytest.mark.parametrize('attack', ['system', 'mkdir', 'exec', 'namespace'])
def test_no_code_of_a_file_is_executed(attack, container, tmp_path):
    canary, path = tmp_path / 'canary', tmp_path / 'checkpoint.pth'
    attacks = {
        'system': Hostile(os.system, f'touch {canary}'),
        'mkdir': Hostile(os.mkdir, str(canary)),
        'exec': Hostile(exec, f'open({str(canary)!r}, "w")'),
        # The one class that is allowed must not carry anything else in.
        'namespace': argparse.Namespace(lr=Hostile(os.mkdir, str(canary))),
    }
    content = {'state_dict_ema': tiny_model().state_dict(), 'args': attacks[attack]}
    if container == 'pickle':
        path.write_bytes(pickle.dumps({'args': attacks[attack]}, protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=container == 'zip')
    message = 'refers to .*(system|mkdir|exec), which could run code' if container != 'pickle' else str(path)
    assert_refused(tiny_model(), path, message)
    assert not canary.exists()

    pickle.loads(pickle.dumps(attacks[attack]))  # the attack itself works
    assert canary.exists()


def test_the_allowance_ends_with_the_call(tmp_path):
    torch.save({'state_dict': {'a': torch.zeros(1)}, 'args': argparse.Namespace(lr=1.)}, tmp_path / 'a.pth')
    assert read_checkpoint(tmp_path / 'a.pth')['args'].lr == 1.
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / 'a.pth', weights_only=True)


# ------------------------------------------------------------------------------------------------------------
# Loading

def test_another_image_size_resamples_the_position_embedding():
    source = tiny_model(img_size=64)
    with torch.no_grad():
        source.pos_embed.normal_()
    model = tiny_model(img_size=(96, 48))
    report = load_weights(model, source.state_dict())
    grid = source.pos_embed[:, 1:].reshape(1, 4, 4, 32).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(6, 3), mode='bicubic', antialias=True).flatten(2).transpose(1, 2)
    assert torch.equal(model.pos_embed, torch.cat((source.pos_embed[:, :1], grid), dim=1))
    assert report.resized == ('pos_embed from 4 × 4 to 6 × 3',) and report.resized[0] in str(report)

    # Both models see the same picture with the same resampled table, whichever of them does the resampling.
    images = torch.randn(1, 3, 96, 48)
    torch.testing.assert_close(model.eval()(images), source.eval()(images))
    assert_refused(tiny_model(), model.state_dict(), '18 grid positions, no square.*img_size')


def test_another_number_of_classes():
    source, model = tiny_model(num_classes=7).state_dict(), tiny_model(num_classes=5)
    assert_refused(model, source, 'weights have 7 classes, the model has 5 classes.*replace_head')
    assert_refused(model, source, 'weights have 7 classes', strict=False)

    head = model.head.weight.clone()
    report = load_weights(model, source, replace_head=True)
    assert torch.equal(model.head.weight, head)
    assert torch.equal(model.cls_token, source['cls_token'])
    assert 'weights have 7 classes, the model has 5' in str(report)
    assert not any(key.startswith('head') for key in (*report.loaded, *report.missing, *report.unexpected))


def test_no_classifier_on_one_side():
    complete, headless = tiny_model(num_classes=5), tiny_model(num_classes=0)
    assert_refused(headless, complete.state_dict(), '5 classes, the model has no classifier')
    load_weights(headless, complete.state_dict(), replace_head=True)
    assert torch.equal(headless.cls_token, complete.cls_token)
    assert_refused(complete, headless.state_dict(), 'no classifier, the model has 5 classes')
    assert load_weights(complete, headless.state_dict(), replace_head=True).head_replaced


def test_equal_number_of_classes_loads_the_head():
    source, model = tiny_model().state_dict(), tiny_model()
    assert load_weights(model, source, replace_head=True).head_replaced is None
    assert_loaded(model, source)


def test_load_for_transfer_learning(tmp_path):
    source, other = tiny_model(num_classes=7).state_dict(), tiny_model(num_classes=7).state_dict()
    torch.save({'state_dict': other, 'state_dict_ema': source}, tmp_path / 'a.pth')
    model = tiny_model(num_classes=5, img_size=96)
    report = load_for_transfer_learning(model, tmp_path / 'a.pth', use_ema=False, num_classes=5)
    assert torch.equal(model.cls_token, other['cls_token'])
    assert report.head_replaced and report.resized
    with pytest.raises(UserError, match='7 classes'):
        load_for_transfer_learning(model, tmp_path / 'a.pth')


def test_strict_refuses_what_does_not_fit():
    state = tiny_model().state_dict()
    del state['norm.weight'], state['norm.bias']
    state.update({f'aux_head.{i}': torch.zeros(1) for i in range(5)})
    message = assert_refused(tiny_model(), state, 'do not fit')
    assert '2 missing (norm.weight, norm.bias)' in message
    assert '5 without a place (aux_head.0, aux_head.1, aux_head.2 and 2 more)' in message

    model = tiny_model()
    report = load_weights(model, state, strict=False)
    assert torch.equal(model.cls_token, state['cls_token'])
    assert report.missing == ('norm.weight', 'norm.bias') and len(report.unexpected) == 5
    assert 'norm.weight' in str(report) and 'aux_head.0' in str(report)


def test_other_shapes_are_never_accepted():
    state = tiny_model(embed_dim=48).state_dict()
    for strict in (True, False):
        assert_refused(tiny_model(), state, r'cls_token \[1, 1, 48\] for \[1, 1, 32\]', strict=strict)
    assert_refused(tiny_model(), {'something.else': torch.zeros(1)}, 'do not fit', strict=False)


@pytest.mark.parametrize('name, options', [
    ('t2t_vit_10', {}), ('t2t_vit_t_14', {'num_classes': 10}), ('t2t_vit_14', {'img_size': 384})])
def test_weights_of_another_variant_are_named(name, options):
    with torch.device('meta'):
        state = timm.create_model(name, **options).state_dict()
    message = assert_refused(timm.create_model('t2t_vit_7', img_size=64), state, 'do not fit')
    assert message.endswith(f'they fit {name}')


@pytest.mark.parametrize('name, classifier, options', [
    ('resnet18', 'fc', {}), ('mobilenetv2_050', 'classifier', {}),
    ('vit_tiny_patch16_224', 'head', {'img_size': 96}),
    ('deit_tiny_distilled_patch16_224', 'head_dist', {'img_size': 96}),
])
def test_models_of_timm(name, classifier, options):
    source = timm.create_model(name, num_classes=7)
    state = source.state_dict()
    target = timm.create_model(name, num_classes=7, **options)
    report = load_weights(target, {'state_dict': wrapped(state)})
    assert len(report.loaded) == len(state)
    assert torch.equal(target.state_dict()[f'{classifier}.weight'], state[f'{classifier}.weight'])
    assert len(report.resized) == len(options)

    transfer = timm.create_model(name, num_classes=3, **options)
    assert_refused(transfer, state, '7 classes, the model has 3 classes')
    assert load_weights(transfer, state, replace_head=True).head_replaced
    assert transfer.state_dict()[f'{classifier}.weight'].shape[0] == 3


# ------------------------------------------------------------------------------------------------------------
# timm's own way to pretrained weights

def test_pretrained_through_timm(tmp_path):
    state = timm.create_model('t2t_vit_7').state_dict()
    path = tmp_path / '71.7_T2T_ViT_7.pth.tar'
    torch.save({'state_dict_ema': wrapped(state)}, path)
    overlay = {'url': path.as_uri()}
    model = timm.create_model(
        't2t_vit_7', pretrained=True, pretrained_cfg_overlay=overlay, cache_dir=tmp_path / 'cache')
    assert_loaded(model, state)

    model = timm.create_model(
        't2t_vit_7', pretrained=True, pretrained_cfg_overlay=overlay, cache_dir=tmp_path / 'cache',
        num_classes=10, img_size=(96, 64))
    assert model.head.weight.shape == (10, 256) and model.pos_embed.shape == (1, 1 + 6 * 4, 256)
    assert torch.equal(model.cls_token, state['cls_token'])
