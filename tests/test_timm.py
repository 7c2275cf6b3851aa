"""What timm asks of a model, asked of every model registered here (after its own tests/test_models.py).

    python -m pytest tests/test_timm.py

Every model has its published depth and width; images are small, so that all of this takes about a minute.
"""
import ast
import copy
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from timm.models import GraphExtractNet, group_parameters
from timm.optim import param_groups_layer_decay
from torch import nn

from models import T2TViT, timm_versions
from tests.conftest import ROOT, run_command, succeeded
from tests.test_architecture import ROOMS
from utils import versions
from utils.errors import UserError

MODELS = [*timm.list_models(module='t2t_vit'), *timm.list_models(module='ablations')]
# Others with other numbers, and as long to test as all of these; make test-slow.
LARGER = ('t2t_vit_10', 't2t_vit_12', 't2t_vit_19', 't2t_vit_24', 't2t_vit_t_19', 't2t_vit_t_24', 't2t_vit_14_resnext')
SIZE = (32, 48)  # not square
GRID = (2, 3)


@pytest.fixture(scope='module', params=[
    pytest.param(name, marks=pytest.mark.slow) if name in LARGER else name for name in MODELS])
def name(request) -> str:
    return request.param


@pytest.fixture(scope='module')
def shared(name) -> nn.Module:
    """One instance for all tests of a model, which leave it as it is."""
    torch.manual_seed(42)
    model = timm.create_model(name, img_size=SIZE, num_classes=42).eval()
    assert model.num_classes == 42
    return model


@pytest.fixture
def model(shared) -> nn.Module:
    """A copy for a test that changes it."""
    return copy.deepcopy(shared)


@pytest.fixture
def images() -> torch.Tensor:
    print('seed 42')  # shown by pytest when a test fails
    torch.manual_seed(42)
    return torch.randn(2, 3, *SIZE)


def is_up_to_date(model: nn.Module) -> bool:
    """Whether a model is ours: in an older timm its ViT has no in_chans, and its fresh classifier is on the CPU."""
    return timm_versions.SAVES_ARGUMENTS or isinstance(model, T2TViT)


def head_names(model: nn.Module) -> tuple[str, ...]:
    names = model.pretrained_cfg['classifier']
    return (names,) if isinstance(names, str) else tuple(names)


@torch.inference_mode()
def test_forward(shared, images):
    logits = shared(images)
    assert logits.shape == (2, 42) and logits.isfinite().all()
    assert torch.equal(shared(images), logits)
    assert not torch.equal(logits[0], logits[1])


def test_backward(shared, images):
    shared.zero_grad()
    shared.train()(images).square().mean().backward()
    shared.eval()
    gradients = {key: parameter.grad for key, parameter in shared.named_parameters()}
    shared.zero_grad()
    for key, gradient in gradients.items():
        assert gradient is not None and gradient.isfinite().all() and gradient.any(), key


def test_default_configuration(name, shared):
    cfg = timm.get_pretrained_cfg(name).to_dict()
    assert shared.default_cfg == shared.pretrained_cfg
    assert cfg['architecture'] == name and cfg['tag'] == 'in1k'
    assert cfg['num_classes'] == 1000 and cfg['input_size'] == (3, 224, 224)
    assert len(cfg['mean']) == len(cfg['std']) == 3 and cfg['interpolation'] in ('bicubic', 'bilinear')
    assert 0 < cfg['crop_pct'] <= 1 and cfg['license'] and cfg['origin_url'] and cfg['paper_ids']
    keys = shared.state_dict().keys()
    assert head_names(shared)
    for head in head_names(shared):
        assert f'{head}.weight' in keys and f'{head}.bias' in keys
    first = cfg['first_conv']
    assert isinstance(first, str | tuple)
    assert all(f'{conv}.weight' in keys for conv in ((first,) if isinstance(first, str) else first))
    assert timm.is_model(name) and timm.model_entrypoint(name).__doc__


@torch.inference_mode()
def test_features_and_head(model, images):
    logits, tokens = model(images), model.forward_features(images)
    assert tokens.shape == (2, 1 + 2 * 3, model.num_features)
    assert torch.equal(model.forward_head(tokens), logits)
    pooled = model.forward_head(tokens, pre_logits=True)
    assert pooled.shape == (2, model.head_hidden_size)

    model.reset_classifier(0)
    assert model.num_classes == 0
    assert torch.equal(model(images), pooled)
    model.reset_classifier(0, '')
    assert torch.equal(model(images), tokens)
    model.reset_classifier(7, 'avg')
    assert model(images).shape == (2, 7) and model.num_classes == 7
    classifier = model.get_classifier()
    assert all(head.out_features == 7 for head in (classifier if isinstance(classifier, tuple) else (classifier,)))


@torch.inference_mode()
def test_intermediates(name, shared, images):
    channels = [info['num_chs'] for info in shared.feature_info]
    final, maps = shared.forward_intermediates(images)
    assert torch.equal(final, shared.forward_features(images))
    assert [tuple(each.shape) for each in maps] == [(2, width, *GRID) for width in channels]

    last = len(maps) - 1
    chosen = [0, last // 2, last]
    for stop_early in (False, True):
        some = shared.forward_intermediates(images, indices=chosen, stop_early=stop_early, intermediates_only=True)
        assert all(torch.equal(each, maps[index]) for each, index in zip(some, chosen, strict=True))
    two = shared.forward_intermediates(images, indices=2, intermediates_only=True)
    assert all(map(torch.equal, two, maps[-2:]))
    first = shared.forward_intermediates(images, indices=[0], stop_early=True, intermediates_only=True)
    assert torch.equal(first[0], maps[0]) and len(first) == 1

    final, [(tokens, prefix)] = shared.forward_intermediates(
        images, indices=1, norm=True, output_fmt='NLC', return_prefix_tokens=True)
    assert torch.equal(torch.cat((prefix, tokens), dim=1), final)
    named = shared.forward_intermediates(images, indices=1, output_dict=True, return_prefix_tokens=True)
    assert torch.equal(named['image_intermediates'][0], maps[-1]) and torch.equal(named['image_features'], final)
    assert len(named['image_intermediates_prefix']) == 1
    with pytest.raises((ValueError, AssertionError)):
        shared.forward_intermediates(images, output_fmt='NHWC')


@torch.inference_mode()
def test_pruning(model, images):
    expected = model.forward_intermediates(images, indices=[1], intermediates_only=True)[0]
    assert model.prune_intermediate_layers([1], prune_norm=True) == [1]
    assert len(model.blocks) == 2
    tokens = model(images)[:, 1:]
    torch.testing.assert_close(tokens.transpose(1, 2).reshape(expected.shape), expected)


def test_features_only(name, shared):
    extractor = timm.create_model(name, img_size=SIZE, features_only=True, device='meta')
    info = extractor.feature_info
    assert len(info.channels()) >= 3 and set(info.reduction()) == {16}
    maps = extractor(torch.empty(2, 3, *SIZE, device='meta'))
    assert [tuple(each.shape) for each in maps] == [(2, width, *GRID) for width in info.channels()]
    assert set(extractor.state_dict()) == {
        f'model.{key}' for key in shared.state_dict() if not key.startswith((*head_names(shared), 'norm.'))}


def test_feature_info_names_modules(shared):
    for info in shared.feature_info:
        assert isinstance(shared.get_submodule(info['module']), nn.Module)
        assert info['reduction'] == 16


@pytest.mark.filterwarnings('ignore:.*torch.jit.*:DeprecationWarning')
@torch.inference_mode()
def test_torchscript(shared, images, tmp_path):
    torch.jit.script(shared).save(tmp_path / 'model.pt')
    scripted = torch.jit.load(tmp_path / 'model.pt')
    torch.testing.assert_close(scripted(images), shared(images), rtol=1e-4, atol=1e-5)
    with torch.autocast('cpu', torch.bfloat16):
        assert all(scripted(images).isfinite().all() for _ in range(3))  # profiled, optimised, in use


def test_torch_fx(shared, images):
    expected = shared(images)
    graphs = []
    if len(head_names(shared)) == 1:  # of two heads, what comes out is not the output of one
        graphs.append(GraphExtractNet(shared, ['head']))
    if not hasattr(shared, 'patch_embed'):  # timm's patch embedding compares sizes, which plain torch.fx refuses
        graphs.append(torch.fx.symbolic_trace(shared))
    assert graphs
    for graph in graphs:
        logits = graph(images)
        assert torch.equal(logits, expected)
        logits.square().mean().backward()
        assert all(parameter.grad is not None for parameter in graph.parameters())
        shared.zero_grad()


@pytest.mark.slow
def test_compiles_without_graph_breaks(shared, images):
    torch._dynamo.reset()
    compiled = torch.compile(shared, backend='eager', fullgraph=True)
    torch.testing.assert_close(compiled(images), shared(images))


@torch.inference_mode()
def test_image_sizes(model, images):
    expected = model(images)
    model.set_input_size((48, 32))
    other = torch.randn(1, 3, 48, 32)
    assert model(other).shape == (1, 42)
    model.set_input_size(SIZE)
    assert model(images).shape == expected.shape

    if timm_versions.SAVES_ARGUMENTS:
        recorded = timm.models.get_model_args(model)
        assert tuple(recorded['img_size']) == SIZE


def test_dynamic_image_size(name, shared):
    options = {'dynamic_img_size': True} if hasattr(shared, 'patch_embed') else {}
    model = timm.create_model(name, img_size=SIZE, num_classes=42, device='meta', **options)
    assert model(torch.empty(1, 3, 48, 96, device='meta')).shape == (1, 42)


@pytest.mark.parametrize('in_chans', [1, 4])
def test_other_channels(name, in_chans):
    model = timm.create_model(name, img_size=64, in_chans=in_chans, num_classes=3, device='meta')
    if is_up_to_date(model):
        assert model.in_chans == in_chans
    assert model(torch.empty(1, in_chans, 64, 64, device='meta')).shape == (1, 3)


def test_device_and_dtype(name):
    model = timm.create_model(name, img_size=SIZE, device='meta', dtype=torch.bfloat16)
    for key, tensor in model.state_dict().items():
        assert tensor.is_meta and tensor.dtype == torch.bfloat16, key
    if not is_up_to_date(model):
        return
    model.reset_classifier(5)
    assert model.head.weight.is_meta and model.head.weight.dtype == torch.bfloat16
    assert model(torch.empty(1, 3, *SIZE, device='meta', dtype=torch.bfloat16)).shape == (1, 5)


@torch.inference_mode()
def test_bfloat16_weights(model, images):
    logits = model.bfloat16()(images.bfloat16())
    assert logits.dtype == torch.bfloat16 and logits.isfinite().all()


def test_parameter_groups(shared):
    parameters = dict(shared.named_parameters())
    assert shared.no_weight_decay() & parameters.keys()
    groups = group_parameters(shared, shared.group_matcher(), return_values=False)
    assert sorted(key for group in groups.values() for key in group) == sorted(parameters)
    layer_of = {key: layer for layer, keys in groups.items() for key in keys}
    assert layer_of['cls_token'] == 0 and len(groups) == len(shared.blocks) + 2
    depths = [layer_of[key] for key in parameters if key.startswith('blocks.')]
    assert depths == sorted(depths)
    decayed = param_groups_layer_decay(shared, layer_decay=0.5)
    assert sum(len(group['params']) for group in decayed) == len(parameters)


def test_gradient_checkpointing(model, images):
    gradients = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(images).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    for expected, ours in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, expected)


def test_random_layers_are_taken(name, shared):
    layers = timm.create_model(name, img_size=SIZE, device='meta', drop_path_rate=0.3, attn_drop_rate=0.1)
    rates = [module.drop_prob for module in layers.modules() if type(module).__name__ == 'DropPath']
    assert max(rates) == pytest.approx(0.3) and rates == sorted(rates)


# --- Older versions of timm -------------------------------------------------------------------------------------------

# Private modules that timm 1.0.22 has as well, in which there is what has no public name.
PRIVATE = {'timm.models._features', 'timm.models._hub'}


def in_a_fresh_process(code: str, cwd: Path) -> subprocess.CompletedProcess:
    return run_command([sys.executable, '-c', f'import sys, timm\nsys.path.insert(0, {str(ROOT)!r})\n{code}'], cwd)


def test_only_private_modules_that_older_versions_have_are_needed():
    files = [file for folder in (*ROOMS, 'tools', 'benchmarks') for file in (ROOT / folder).rglob('*.py')]
    used = {node.module: file.name for file in [*files, *ROOT.glob('*.py')]
            for node in ast.walk(ast.parse(file.read_text()))
            if isinstance(node, ast.ImportFrom) and re.match(r'timm\b.*\._', node.module or '')}
    # timm_versions does without _input where there is none; see below.
    assert used.keys() - PRIVATE == {'timm.models._input'} and used['timm.models._input'] == 'timm_versions.py'


def test_without_what_only_the_newest_timm_has(tmp_path):
    result = in_a_fresh_process('''
sys.modules['timm.models._input'] = None
vars(timm.models).pop('get_model_args', None)
import models
from models.runtimes import describe
from utils.errors import UserError
model = timm.create_model('t2t_vit_7', img_size=64, num_classes=3)
model.set_input_size((48, 32))
print(model.grid_size)
try:
    describe(model)
except UserError as error:
    print(error)
''', tmp_path)
    size, error = succeeded(result).splitlines()
    assert size == '(3, 2)'
    assert error == f"timm {timm.__version__} does not save a model's arguments; pip install 'timm>=1.0.31'"


@pytest.mark.parametrize('script', [
    'train.py', 'validate.py', 'transfer.py', 'predict.py', 'visualize.py', 'export.py', 'tools/doctor'])
def test_a_timm_that_is_too_old_is_named(script, tmp_path):
    """Before anything of it is imported: a timm of 2019 has hardly a name of today's."""
    (tmp_path / 'timm').mkdir()
    (tmp_path / 'timm/__init__.py').write_text('raise ImportError("a name is missing")')
    (tmp_path / 'timm-0.6.13.dist-info').mkdir()
    (tmp_path / 'timm-0.6.13.dist-info/METADATA').write_text('Metadata-Version: 2.1\nName: timm\nVersion: 0.6.13\n')
    command = [sys.executable, ROOT / script, '--img-size', '64']
    result = run_command(command, tmp_path, PYTHONPATH=str(tmp_path))
    assert result.returncode == 2 and result.stderr.count('\n') == 1
    assert result.stderr.endswith("timm 0.6.13 is too old for these models; pip install 'timm>=1.0.22'\n")


def test_programs_of_others_are_told_as_well(monkeypatch):
    monkeypatch.setattr(versions, 'version', lambda name: '1.0.20')
    with pytest.raises(UserError, match="timm 1.0.20 is too old for these models; pip install 'timm>=1.0.22'"):
        importlib.reload(timm_versions)


def test_versions_compare_as_numbers():
    numbers = [versions.numbers(text) for text in ('0.9.16', '1.0.9', '1.0.22', '1.0.100', '1.1.0.dev0')]
    assert numbers == sorted(numbers) and numbers[-1] == [1, 1, 0]
