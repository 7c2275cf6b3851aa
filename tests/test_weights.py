"""Tests of models/weights: every kind of checkpoint, loading into other models, reports.

    python -m pytest tests/test_weights.py

The files of PaddlePaddle itself lie in ../shared, or in the folder that T2T_SHARED names.
"""
import argparse
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
import torch.nn.functional as F
from timm.models import adapt_input_conv

from models import (
    LoadReport,
    count_classes,
    fit_to_model,
    identify,
    layers,
    load_for_transfer_learning,
    load_weights,
    state_dict_of,
    tokens_to_token,
)
from models.weights.formats import recorded_img_size
from models.weights.identity import grid_of, our_models, patch_size_of
from models.weights.loading import count_channels
from tests.golden import SHARED, relative_error
from utils.errors import UserError

FIXTURES = SHARED / 'fixtures'


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(42)
    print('seed 42')  # shown by pytest when a test fails


def tiny_model(name: str = 't2t_vit_7', **kwargs) -> torch.nn.Module:
    """A registered T2T-ViT, shrunk so that files of it are small."""
    return timm.create_model(name, **{
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


# --- Formats. Each writer below turns a state dict of ours into what the file of another project holds. ---------------

class PaddleTensor:
    """Pickles as tensors of PaddlePaddle do: as the call tuple((name, array))."""

    def __init__(self, name: str, array: np.ndarray):
        self.parts = name, array

    def __reduce__(self):
        return tuple, (self.parts,)


def renamed(state: dict, *pairs: tuple[str, str]) -> dict:
    for pattern, replacement in pairs:
        state = {re.sub(pattern, replacement, key): value for key, value in state.items()}
    return state


def paddle_layout(state: dict) -> dict:
    return {key: (tensor.T if key.endswith('.weight') and tensor.dim() == 2 else tensor).numpy()
            for key, tensor in state.items()}


def passl(state: dict, as_tensors: bool) -> dict:
    arrays = renamed(paddle_layout(state), (r'^head\.', 'head.fc_cls.'), (r'^(?!head\.)', 'backbone.'))
    names = {key: f'linear_{index}.w_0' for index, key in enumerate(arrays)}
    if as_tensors:
        return {key: PaddleTensor(names[key], array) for key, array in arrays.items()}
    return {**arrays, 'StructuredToParameterName@@': names}


def old_passl(state: dict) -> dict:
    return {f'backbone.{key}' if not key.startswith('head.') else key.replace('head.', 'head.fc_cls.'): value
            for key, value in paddlevit(state).items() if '@@' not in key}


def paddlevit(state: dict) -> dict:
    arrays = renamed(paddle_layout(state), (r'^tokens_to_token\.attention', 'patch_embed.attn'),
                     (r'^tokens_to_token\.project', 'patch_embed.proj'))
    return {**arrays, 'StructuredToParameterName@@': {key: key for key in arrays}}


def mmpretrain(state: dict) -> dict:
    state = renamed(state, (r'\.norm([12])\.', r'.ln\1.'), (r'\.mlp\.fc1\.', '.ffn.layers.0.0.'),
                    (r'\.mlp\.fc2\.', '.ffn.layers.1.'), (r'^blocks\.', 'encoder.'), (r'^(?!head)', 'backbone.'),
                    (r'^head\.', 'head.layers.head.'))
    averages = {'ema_' + key.replace('.', '_'): torch.zeros(()) for key in state}
    return {'meta': {'epoch': 300, 'CLASSES': None}, 'state_dict': {**state, **averages}}


def training_run(state: dict, other: dict) -> dict:
    """What engine/state.py saves, in outline."""
    return {'version': 1, 'arch': 't2t_vit_7', 'epoch': 3, 'step': 0, 'global_step': 30, 'state_dict': other,
            'state_dict_ema': state, 'optimizer': {'state': {}}, 'amp_scaler': {}, 'metric': 81.5, 'ranks': [{}],
            'args': {'lr': 5e-4, 'model': 't2t_vit_7', 'img_size': 64}, 'classes': ['a', 'b', 'c', 'd', 'e']}


def save_torch(content: dict, path: Path) -> None:
    torch.save(content, path)


def save_legacy(content: dict, path: Path) -> None:
    torch.save(content, path, _use_new_zipfile_serialization=False)


def save_paddle(content: dict, path: Path, protocol: int = 4) -> None:
    path.write_bytes(pickle.dumps(content, protocol=protocol))


def save_old_paddle(content: dict, path: Path) -> None:
    save_paddle(content, path, protocol=2)


def save_flat(content: dict, path: Path) -> None:
    safetensors.torch.save_file(content, path)


OFFICIAL_RUN = {'epoch': 309, 'arch': 't2t_vit_14', 'optimizer': {'state': {}}, 'amp_scaler': {'scale': 65536.},
                'args': argparse.Namespace(lr=5e-4, model='t2t_vit_14', img_size=None), 'version': 2, 'metric': 81.5}
# What the test is called: (architecture, format, entry, how it is saved, content for (weights, other weights)).
KINDS = {
    'release': ('performer', 'official release', 'state_dict_ema', save_torch,
                lambda state, other: {'state_dict_ema': state}),
    'training run of the authors': (
        'performer', 'official training run', 'state_dict_ema', save_torch,
        lambda state, other: {**OFFICIAL_RUN, 'state_dict': other, 'state_dict_ema': state}),
    'cifar': ('performer', 'official CIFAR checkpoint', 'net', save_legacy,
              lambda state, other: {'net': wrapped(state), 'acc': 98.3, 'epoch': 59}),
    'PASSL': ('performer', 'PASSL', None, save_paddle, lambda state, other: passl(state, as_tensors=False)),
    'PASSL, tensors': ('transformer', 'PASSL', None, save_paddle, lambda state, other: passl(state, as_tensors=True)),
    'PASSL, protocol 2': ('performer', 'PASSL', None, save_old_paddle,
                          lambda state, other: passl(state, as_tensors=True)),
    'PASSL, before it took the names': ('performer', 'PASSL', None, save_paddle,
                                        lambda state, other: old_passl(state)),
    'PASSL, training run': ('performer', 'PASSL', 'state_dict', save_paddle, lambda state, other: {
        'epoch': 3, 'state_dict': passl(state, as_tensors=False), 'optimizer': {'x': np.zeros(3)}}),
    'PaddleViT': ('performer', 'PaddleViT', None, save_paddle, lambda state, other: paddlevit(state)),
    'PaddleViT, t': ('transformer', 'PaddleViT', None, save_old_paddle, lambda state, other: paddlevit(state)),
    'PaddlePaddle': ('performer', 'PaddlePaddle', None, save_paddle, lambda state, other: paddle_layout(state)),
    'mmpretrain': ('transformer', 'mmpretrain', 'state_dict', save_torch, lambda state, other: mmpretrain(state)),
    'timm': ('performer', 'timm pull request 2426', None, save_torch,
             lambda state, other: renamed(state, (r'^tokens_to_token\.', 'patch_embed.'))),
    'timm, safetensors': ('transformer', 'timm pull request 2426', None, save_flat,
                          lambda state, other: renamed(state, (r'^tokens_to_token\.', 'patch_embed.'))),
    'token labeling': ('labeled', 'token-labeling release', 'state_dict_ema', save_torch,
                       lambda state, other: {'state_dict_ema': state}),
    'ours': ('performer', 'training run', 'state_dict_ema', save_torch, training_run),
    'ours, no average': ('performer', 'training run', 'state_dict', save_torch,
                         lambda state, other: {**training_run(None, state)}),
    'ours, token labeling': ('labeled', 'training run', 'state_dict_ema', save_legacy, training_run),
    'compiled': ('performer', 'checkpoint', 'state_dict', save_torch,
                 lambda state, other: {'state_dict': wrapped(state, '_orig_mod.')}),
    'compiled blocks': ('performer', 'checkpoint', 'state_dict', save_torch, lambda state, other: {
        'state_dict': {key.replace('mlp.', 'mlp._orig_mod.'): value for key, value in state.items()}}),
    'wrapped twice': ('performer', 'checkpoint', 'model', save_torch,
                      lambda state, other: {'model': wrapped(state, 'module._orig_mod.')}),
    'deit': ('performer', 'checkpoint', 'model_ema', save_torch,
             lambda state, other: {'model': other, 'model_ema': state}),
    'flat': ('performer', 'flat state dict', None, save_legacy, lambda state, other: state),
    'safetensors': ('transformer', 'flat state dict', None, save_flat, lambda state, other: state),
}
ARCHITECTURES = {'performer': 't2t_vit_7', 'transformer': 't2t_vit_t_14', 'labeled': 't2t_vit_24_token_labeling'}


@pytest.mark.parametrize('kind', KINDS)
def test_every_format_gives_equal_logits(kind, tmp_path):
    architecture, expected_format, expected_entry, save, content_of = KINDS[kind]
    name, images, path = ARCHITECTURES[architecture], torch.randn(2, 3, 64, 64), tmp_path / 'checkpoint'
    source, other, model = (tiny_model(name=name).eval() for _ in range(3))
    with torch.no_grad():
        for tensor in source.state_dict().values():  # biases and norms too: what is not loaded shows
            tensor.add_(torch.randn_like(tensor), alpha=.05)
    save(content_of(source.state_dict(), other.state_dict()), path)
    report = load_weights(model, path)
    assert_loaded(model, source.state_dict())
    assert torch.equal(model(images), source(images))
    assert (report.format, report.entry, report.source) == (expected_format, expected_entry, str(path))
    assert set(report.loaded) == set(source.state_dict())
    assert report.adapted == report.missing == report.unexpected == () and report.head_replaced is None


@pytest.mark.skipif(not FIXTURES.is_dir(), reason=f'no files of PaddlePaddle at {FIXTURES}; set T2T_SHARED')
@pytest.mark.parametrize('fixture, name', [('passl_tiny', 't2t_vit_7'), ('passl_tiny_t', 't2t_vit_t_14')])
def test_files_of_paddlepaddle_give_its_logits(fixture, name):
    model = tiny_model(name=name, num_classes=10, embed_dim=64, mlp_ratio=3.)
    report = load_weights(model, FIXTURES / f'{fixture}.pdparams')
    images = np.random.RandomState(0).standard_normal((2, 3, 64, 64)).astype(np.float32)
    expected = torch.from_numpy(np.load(FIXTURES / f'{fixture}.logits.npy'))
    assert relative_error(model.eval()(torch.from_numpy(images)), expected) < 1e-5
    assert len(report.loaded) == len(report.renamed) == len(model.state_dict())
    assert report.dropped == ('StructuredToParameterName@@',)


def test_reports_name_every_key():
    source = tiny_model(name='t2t_vit_t_14').state_dict()
    report = load_weights(tiny_model(name='t2t_vit_t_14', img_size=96), mmpretrain(source), source='a.pth')
    lines = report.lines()
    assert '\n' not in str(report) and 'a.pth (mmpretrain, state_dict)' in str(report)
    assert f'{len(report.renamed)} renamed; {len(source)} dropped' in str(report)
    for line in ('renamed: backbone.encoder.1.ffn.layers.0.0.weight → blocks.1.mlp.fc1.weight',
                 'renamed: backbone.tokens_to_token.attention1.ln1.bias → tokens_to_token.attention1.norm1.bias',
                 'dropped, not weights: ema_backbone_cls_token',
                 'adapted: pos_embed resized from 4 × 4 to 6 × 6'):
        assert line in lines, line
    assert len(lines) == 1 + len(source) + len(source) + 1  # tokens_to_token.project keeps its name but for backbone.

    report = load_weights(tiny_model(), paddlevit(tiny_model().state_dict()))
    assert 'transposed: head.weight' in report.lines() and 'transposed' in str(report)
    assert not any('.w' == key[-2:] for key in report.transposed)
    assert set(report.transposed) == {key for key, tensor in tiny_model().state_dict().items()
                                      if key.endswith('.weight') and tensor.dim() == 2}

    report = LoadReport('a.pth', 'checkpoint', None, ('a',), missing=('b', 'c', 'd', 'e'), unexpected=('f',),
                        head_replaced='why')
    assert 'b, c, d and 1 more' in str(report) and 'f' in str(report)
    assert report.lines()[1:] == ['classifier not loaded: why', *(f'missing, kept as initialised: {k}' for k in 'bcde'),
                                  'ignored, not in the model: f']


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
    ({'pos_embed': torch.zeros(1, 1, 32).expand(1, 10 ** 12 + 1, 32)}, 'pos_embed has the shape .* fewer numbers'),
    ({'cls_token': torch.zeros(3).to_sparse()}, 'cls_token is a torch.sparse_coo tensor'),
    ({'cls_token': torch.zeros(3, device='meta')}, 'cls_token has a shape, but no numbers'),
    ({'cls_token': torch.zeros(3, dtype=torch.complex64)}, 'cls_token holds complex numbers'),
    ({'cls_token': np.zeros(3, np.complex64)}, 'cls_token holds complex numbers'),
])
def test_checkpoints_without_weights(checkpoint, message):
    assert_refused(tiny_model(), checkpoint, message)


@pytest.mark.parametrize('spoil', [
    lambda tensor: tensor.to(torch.int8), lambda tensor: tensor.bool(), lambda tensor: tensor.to(torch.complex64),
    lambda tensor: torch.empty_like(tensor, device='meta'),
    lambda tensor: torch.quantize_per_tensor(tensor, .1, 0, torch.qint8)])
@pytest.mark.filterwarnings('ignore:torch.quantize_per_tensor')
def test_weights_of_another_kind_of_numbers_leave_the_model_as_it_was(spoil):
    state = tiny_model().state_dict()
    assert_refused(tiny_model(), {**state, 'norm.bias': spoil(state['norm.bias'])}, 'norm.bias')
    model = timm.create_model('resnet18', num_classes=2)
    counts = model.state_dict()
    counts['bn1.num_batches_tracked'] = torch.tensor(1.5)
    assert_refused(model, counts, 'bn1.num_batches_tracked has numbers of torch.float32, the model of torch.int64')


@pytest.mark.parametrize('size, expected', [
    (224, (224, 224)), ('224', (224, 224)), ('192x256', (192, 256)), ([192, 256], (192, 256)), ((64,), (64, 64)),
    (torch.tensor([64, 64]), None), (torch.tensor(64), None), (float('inf'), None), ([float('inf')] * 2, None),
    ([float('nan')], None), (224., None), (True, None), ([True, True], None), (0, None), (-224, None), ('0x5', None),
    (65536, (65536, 65536)), (65537, None), (10 ** 50, None), ('1' * 50, None), ('٣x٣', None), ('x', None),
    ([], None), ([1, 2, 3], None), ({'a': 1}, None), ([[64], [64]], None), (np.zeros(2), None),
])
def test_recorded_sizes(size, expected):
    assert recorded_img_size({'img_size': size}) == expected
    assert recorded_img_size({'args': {'img_size': size}}) == expected
    assert recorded_img_size({'img_size': torch.zeros(2), 'args': {'img_size': size}}) == expected


def test_arrays_in_any_byte_order_and_bfloat16():
    values = torch.tensor([1., -2.5, 2. ** 100])
    bits = (values.view(torch.int32) >> 16).to(torch.int16).numpy().view(np.uint16)
    state = state_dict_of({'big': np.array([1, -2.5], '>f4'), 'b': bits, 'w': np.ones((2, 3), np.float16)})
    assert state['big'].tolist() == [1., -2.5] and state['w'].dtype == torch.float16
    assert state['b'].dtype == torch.bfloat16 and torch.equal(state['b'], values.bfloat16())


# --- Loading ----------------------------------------------------------------------------------------------------------

def test_another_image_size_resamples_the_position_embedding():
    source = tiny_model(img_size=64)
    with torch.no_grad():
        source.pos_embed.normal_()
    model = tiny_model(img_size=(96, 48))
    report = load_weights(model, source.state_dict())
    grid = source.pos_embed[:, 1:].reshape(1, 4, 4, 32).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(6, 3), mode='bicubic', antialias=True).flatten(2).transpose(1, 2)
    assert torch.equal(model.pos_embed, torch.cat((source.pos_embed[:, :1], grid), dim=1))
    assert report.adapted == ('pos_embed resized from 4 × 4 to 6 × 3',) and report.adapted[0] in str(report)

    # Both models see the same picture with the same resampled table, whichever of them does the resampling.
    images = torch.randn(1, 3, 96, 48)
    torch.testing.assert_close(model.eval()(images), source.eval()(images))
    assert_refused(tiny_model(), model.state_dict(), '18 grid positions, no square.*img_size')


@pytest.mark.parametrize('checkpoint, options', [
    ({'img_size': [96, 48]}, {}), ({'args': {'img_size': '96x48'}}, {}), ({}, {'img_size': (96, 48)}),
    ({'args': argparse.Namespace(img_size=(96, 48))}, {}), ({'img_size': 'what?'}, {'img_size': (96, 48)}),
    ({'img_size': 224, 'args': {'img_size': '48x96'}}, {'img_size': (96, 48)}),
])
@pytest.mark.parametrize('size', [64, (48, 96), (32, 144)])
def test_position_embeddings_of_images_that_were_not_square(checkpoint, options, size):
    source = tiny_model(img_size=(96, 48)).eval()
    with torch.no_grad():
        source.pos_embed.normal_()
    model = tiny_model(img_size=size).eval()  # (32, 144) has as many positions, 2 × 9 instead of 6 × 3
    report = load_weights(model, {**checkpoint, 'state_dict': source.state_dict()}, **options)
    assert 'pos_embed resized from 6 × 3 to' in str(report)
    images = torch.randn(1, 3, *(size if isinstance(size, tuple) else (size, size)))
    torch.testing.assert_close(model(images), source(images))


@pytest.mark.parametrize('positions, size, grid', [
    (196, None, (14, 14)), (18, None, None), (0, None, None), (18, (96, 48), (6, 3)), (18, (48, 96), (3, 6)),
    (16, (128, 32), (8, 2)), (16, (64, 64), (4, 4)), (21, (100, 40), (7, 3)), (2, (17, 31), (1, 2)),
    (197, (224, 224), None), (63, (16, 1000), (1, 63)), (140, (224, 160), (14, 10)),
    (192, (224, 224), None), (18, (192, 96), None), (18, (2, 1), None), (1, (15, 15), None),
])
def test_grids(positions, size, grid):
    assert grid_of(positions, size) == grid


def test_grids_of_patches():
    assert grid_of(192, (192, 256), (16, 16)) == (12, 16) and grid_of(192, (190, 256), (16, 16)) is None
    assert grid_of(196, (448, 448), (16, 16)) is None and grid_of(196, (448, 448), (32, 32)) == (14, 14)
    assert patch_size_of(192, (192, 256)) == (16, 16) and patch_size_of(0, (32, 32)) == (0, 0)
    assert grid_of(10 ** 6, (10, 10), patch_size_of(10 ** 6, (10, 10))) is None


@pytest.mark.parametrize('recorded', [224, 192, 256, (256, 160), (15, 15)])
@pytest.mark.parametrize('name, options', [
    ('t2t_vit_7', {'embed_dim': 32, 'depth': 2, 'num_heads': 2}), ('vit_tiny_patch16_224', {'depth': 1})])
def test_a_recorded_size_that_does_not_fit_leaves_equal_grids_alone(recorded, name, options):
    source, model = (timm.create_model(name, img_size=(192, 256), num_classes=2, **options) for _ in range(2))
    with torch.no_grad():
        source.pos_embed.normal_()
    checkpoint = {'state_dict': source.state_dict(), 'args': {'img_size': recorded}}
    assert load_weights(model, checkpoint).adapted == ()
    assert_loaded(model, source.state_dict())
    assert_refused(model, checkpoint, '192 grid positions, but images of 224 × 224', img_size=(224, 224))
    identity = identify(source.state_dict(), (224, 224))
    assert identity.grid is None and (identity.img_size is None or name != 't2t_vit_7')


@pytest.mark.parametrize('name', ['t2t_vit_7', 'vit_s_16'])
def test_what_is_identified_does_not_contradict_itself(name):
    with torch.device('meta'):
        state = timm.create_model(name).state_dict()
        wide = timm.create_model(name, img_size=(112, 448)).state_dict()
    for size in ((192, 256), (448, 448), (8, 8)):
        identity = identify(state, size)
        assert (identity.grid, identity.img_size) == ((14, 14), (224, 224)), size
    identity = identify(wide, (112, 448))
    assert (identity.grid, identity.img_size) == ((7, 28), (112, 448))


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_halves_are_resampled_in_float32(dtype):
    source = tiny_model().state_dict()
    source = {key: torch.randn_like(tensor).to(dtype) for key, tensor in source.items()}
    model, reference = tiny_model(img_size=96, in_chans=1), tiny_model(img_size=96, in_chans=1)
    load_weights(model, source)
    load_weights(reference, {key: tensor.float() for key, tensor in source.items()})
    assert_loaded(model, reference.state_dict())
    assert not torch.equal(model.pos_embed, model.pos_embed.to(torch.bfloat16).float())


@pytest.mark.parametrize('name', ['t2t_vit_7', 't2t_vit_t_14'])
@pytest.mark.parametrize('old, new', [(3, 1), (3, 2), (3, 4), (3, 6), (1, 3), (2, 3)])
def test_another_number_of_channels(name, old, new):
    source, model = tiny_model(name=name, in_chans=old).eval(), tiny_model(name=name, in_chans=new).eval()
    report = load_weights(model, source.state_dict())
    assert report.adapted == (f'first layer adapted from {old} to {new} channel{"s" if new > 1 else ""}',)
    assert set(report.loaded) == set(model.state_dict())
    key = 'tokens_to_token.attention1.' + ('kqv.weight' if name == 't2t_vit_7' else 'attn.qkv.weight')
    # What timm does to the convolution with the same weights.
    convolution = source.state_dict()[key].unflatten(1, (old, 7, 7))
    if old == 3:
        expected = adapt_input_conv(new, convolution.clone())
    else:
        expected = torch.cat([convolution] * 3, 1)[:, :new] * old / new
    torch.testing.assert_close(model.state_dict()[key].unflatten(1, (new, 7, 7)), expected)

    # A grey image looks the same to both, if all channels count the same: fresh norms are alike.
    if new == 1 or new % old == 0:
        grey = torch.randn(1, 1, 64, 64)
        torch.testing.assert_close(model(grey.expand(1, new, 64, 64)), source(grey.expand(1, old, 64, 64)))


def test_norms_of_another_number_of_channels():
    source = tiny_model().state_dict()
    norm = source['tokens_to_token.attention1.norm1.weight'].normal_().unflatten(0, (3, 49)).clone()
    one, four = (fit_to_model(source, tiny_model(in_chans=channels))[0]['tokens_to_token.attention1.norm1.weight']
                 for channels in (1, 4))
    torch.testing.assert_close(one, norm.mean(0))
    assert torch.equal(four.unflatten(0, (4, 49)), norm[[0, 1, 2, 0]])


@pytest.mark.parametrize('old, new', [(3, 1), (3, 4), (1, 3)])
@pytest.mark.parametrize('name, options', [
    ('resnet18', {}), ('t2t_vit_c_14', {'img_size': 64}), ('crossvit_tiny_240', {})])
def test_another_number_of_channels_of_convolutions(name, options, old, new):
    source, model = (timm.create_model(name, num_classes=5, in_chans=channels, **options).eval()
                     for channels in (old, new))
    report = load_weights(model, source.state_dict())
    assert report.adapted == (f'first layer adapted from {old} to {new} channel{"s" if new > 1 else ""}',)
    first = source.pretrained_cfg['first_conv']
    for key in [f'{conv}.weight' for conv in ((first,) if isinstance(first, str) else first)]:
        expected = adapt_input_conv(new, source.state_dict()[key].clone(), base_chans=old)
        torch.testing.assert_close(model.state_dict()[key], expected)
    if 1 in (old, new):
        size = 240 if 'crossvit' in name else 64
        grey = torch.randn(1, 1, size, size)
        torch.testing.assert_close(model(grey.expand(1, new, -1, -1)), source(grey.expand(1, old, -1, -1)),
                                   rtol=1e-4, atol=1e-5)


def test_pixels_folded_into_channels_are_no_channels_of_images():
    state = timm.create_model('tresnet_m', num_classes=5, device='meta').state_dict()
    assert count_channels('tresnet_m', state) is None
    assert count_channels('resnet18', {'conv1.weight': torch.empty(64, 4, 7, 7)}) == 4


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
    assert report.head_replaced and report.adapted
    with pytest.raises(UserError, match='7 classes'):
        load_for_transfer_learning(model, tmp_path / 'a.pth')


def test_strict_refuses_what_does_not_fit():
    state = tiny_model().state_dict()
    del state['norm.weight'], state['norm.bias']
    state.update({f'aux_head.{i}': torch.zeros(1) for i in range(5)})
    message = assert_refused(tiny_model(), state, 'do not fit')
    assert '2 missing (norm.weight, norm.bias)' in message
    assert '5 without a place (aux_head.0, aux_head.1, aux_head.2, aux_head.3, aux_head.4)' in message
    message = assert_refused(tiny_model(), {**state, **{f'x{i}': torch.zeros(1) for i in range(50)}}, 'do not fit')
    assert 'x14 and 35 more' in message

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


# --- What weights are of ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize('name, options', [
    ('t2t_vit_10', {}), ('t2t_vit_t_14', {'num_classes': 10}), ('t2t_vit_14', {'img_size': 384}),
    ('t2t_vit_24_token_labeling', {'num_classes': 3}), ('t2t_vit_14_wide', {'in_chans': 1}),
    ('t2t_vit_dense', {'num_classes': 0})])
def test_weights_of_another_variant_are_named(name, options):
    with torch.device('meta'):
        state = timm.create_model(name, **options).state_dict()
    state = {key: torch.empty_like(tensor, device='cpu') for key, tensor in state.items()}
    message = assert_refused(timm.create_model('t2t_vit_7', img_size=64), state, f'are of {name}.* not fit t2t_vit_7')
    tie = ' or t2t_vit_14_resnext' if name == 't2t_vit_14' else ''
    assert message.endswith(f'use --model {name}{tie}') and ('only you can tell' in message) == bool(tie)


@pytest.mark.parametrize('name, size', [
    ('vit_small_r26_s32_224', None), ('vit_small_r26_s32_224', (224, 224)), ('hiera_tiny_224', None),
    ('resnet18', None)])
def test_nothing_is_claimed_of_models_of_others(name, size):
    with torch.device('meta'):
        state = timm.create_model(name).state_dict()
    identity = identify(state, size)
    assert identity.names == () and identity.img_size == size and identity.in_chans is None


@pytest.mark.parametrize('name', ['t2t_vit_7', 't2t_vit_c_14', 'vit_s_16'])
def test_channels_do_not_depend_on_the_order_of_keys(name):
    with torch.device('meta'):
        state = timm.create_model(name, in_chans=2).state_dict()
    for keys in (sorted(state), sorted(state, reverse=True)):
        assert identify({key: state[key] for key in keys}).in_chans == 2


@pytest.mark.parametrize('shape', [(), (3,)])
def test_a_classifier_that_is_no_matrix(shape):
    state = {**tiny_model().state_dict(), 'head.weight': torch.zeros(shape)}
    assert identify(state).num_classes is None and count_classes('t2t_vit_7', state) is None
    assert_refused(tiny_model(), state, 'do not fit|classes')


def test_a_model_whose_author_describes_no_weights_has_no_known_classifier():
    assert timm.get_pretrained_cfg('somebodys_own') is None
    assert count_classes('somebodys_own', tiny_model().state_dict()) is None


def test_weights_of_no_variant_are_described():
    state = timm.create_model('resnet18', num_classes=5).state_dict()
    message = assert_refused(tiny_model(), state, 'an architecture not known here.*conv1.weight')
    assert message.endswith('check the name of the model')
    for checkpoint in ({'arch': 'resnet18'}, {'args': {'model': 'resnet18'}}):
        message = assert_refused(tiny_model(), {'state_dict': state, **checkpoint}, 'by its own account resnet18')
        assert message.endswith('use --model resnet18')
    assert_refused(tiny_model(embed_dim=48), tiny_model(name='t2t_vit_t_14').state_dict(),
                   'a T2T-ViT with transformer tokens, embed_dim 32 and depth 2')


def test_equal_keys_with_other_shapes_are_another_model():
    with torch.device('meta'):
        assert identify(timm.create_model('t2t_vit_7').state_dict()).names == ('t2t_vit_7',)
        assert identify(timm.create_model('t2t_vit_7', mlp_ratio=3.).state_dict()).names == ()
        assert identify(timm.create_model('t2t_vit_7', token_dim=32).state_dict()).names == ()


@pytest.mark.parametrize('options, expected', [
    ({}, ((14, 14), (224, 224), 1000, 3)),
    ({'img_size': (96, 64), 'num_classes': 7, 'in_chans': 1}, ((6, 4), (96, 64), 7, 1)),
    ({'img_size': 384, 'num_classes': 0}, ((24, 24), (384, 384), None, 3)),
])
def test_every_model_is_identified(options, expected):
    ties = ({'t2t_vit_14', 't2t_vit_14_resnext'}, {'t2t_vit_24', 't2t_vit_24_token_labeling'})
    names = our_models()
    assert {'t2t_vit_7', 't2t_vit_t_24', 't2t_vit_14_wide', 't2t_vit_dense', 'vit_s_16'} <= set(names)
    assert 'resnet18' not in names
    for name in names:
        with torch.device('meta'):
            state = timm.create_model(name, **options).state_dict()
        identity = identify(state, options['img_size'] if isinstance(options.get('img_size'), tuple) else None)
        # The second of them differs in its classifiers alone.
        tied = [tie for tie in ties if name in tie and ('t2t_vit_14' in tie or options.get('num_classes') == 0)]
        assert set(identity.names) == (tied[0] if tied else {name})
        assert (identity.grid, identity.img_size, identity.num_classes, identity.in_chans) == expected
        assert ('only you can tell' in identity.description) == bool(tied)


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
    assert len(report.adapted) == len(options)

    transfer = timm.create_model(name, num_classes=3, **options)
    assert_refused(transfer, state, '7 classes, the model has 3 classes')
    assert load_weights(transfer, state, replace_head=True).head_replaced
    assert transfer.state_dict()[f'{classifier}.weight'].shape[0] == 3


# --- timm's own way to pretrained weights -----------------------------------------------------------------------------

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


def test_pretrained_with_another_number_of_channels(tmp_path):
    state = timm.create_model('t2t_vit_7').state_dict()
    torch.save({'state_dict_ema': state}, tmp_path / 'a.pth')
    model = timm.create_model(
        't2t_vit_7', pretrained=True, pretrained_cfg_overlay={'file': str(tmp_path / 'a.pth')}, in_chans=1)
    assert_loaded(model, fit_to_model(state, model)[0])


# --- The attention scale of mmpretrain --------------------------------------------------------------------------------

@torch.no_grad()
def test_attention_of_mmpretrain_from_version_1(monkeypatch):
    """Its T2T-ViT divides q·k by 64^-0.5, in the backbone and in the token layers; meta says which library trained."""
    settings = {'embed_dim': 128, 'depth': 2, 'num_heads': 2, 'img_size': 64, 'num_classes': 5}
    source, model = (timm.create_model('t2t_vit_t_14', **settings).eval() for _ in range(2))
    for name, parameter in source.named_parameters():
        if 'qkv' in name:
            parameter.add_(torch.randn_like(parameter), alpha=0.05)  # so that the scale matters
    images = torch.randn(2, 3, 64, 64)
    published = source(images)
    with monkeypatch.context() as patched:
        for module in (layers, tokens_to_token):
            patched.setattr(module, 'attention', lambda q, k, v, scale, dropout=0.: (
                q @ k.transpose(2, 3) / 64 ** -0.5).softmax(dim=3) @ v)
        trained = source(images)
    assert relative_error(published, trained) > 0.05

    checkpoint = mmpretrain(source.state_dict())
    assert 'multiplied' not in str(load_weights(model, checkpoint))
    assert relative_error(model(images), published) < 1e-5
    checkpoint['meta']['mmengine_version'] = '0.10.7'
    report = str(load_weights(model, checkpoint))
    assert "queries and keys multiplied, as mmpretrain's attention scores are 8 q·k" in report and '\n' not in report
    assert relative_error(model(images), trained) < 1e-5
