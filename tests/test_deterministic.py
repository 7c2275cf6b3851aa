"""--deterministic: no operation is one that torch then refuses on a GPU, and new memory is not filled for nothing."""
import os
from pathlib import Path

import pytest
import torch
from torch import nn

from models import create_model
from tests.as_on_gpu import SAID, AsOnGpu
from tests.conftest import run_script, write_checkpoint
from utils.runtime import set_determinism

KWARGS = {'embed_dim': 32, 'depth': 2, 'num_heads': 2}
MODEL = ('--model', 't2t_vit_7', '--model-kwargs', 'embed_dim=32', 'depth=2', 'num_heads=2')
TRAIN = ('-b', '12', '--epochs', '1', '--warmup-epochs', '0', '--cooldown-epochs', '0', '--lr', '1e-3', '-j', '0',
         '--device', 'cpu', '--no-tensorboard', '--save-images', '--log-interval', '2')
TRAINED = ('-j', '0', '--device', 'cpu')


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory) -> Path:
    """Small weights for 32 pixels."""
    path = tmp_path_factory.mktemp('weights') / 'small.pth.tar'
    torch.manual_seed(0)
    model = create_model('t2t_vit_7', num_classes=3, img_size=32, **KWARGS)
    write_checkpoint({'arch': 't2t_vit_7', 'state_dict': model.state_dict(), 'classes': ['ant', 'bee', 'cat'],
                      'args': {'model_kwargs': [f'{name}={value}' for name, value in KWARGS.items()], 'img_size': 32}},
                     path)
    return path


# At another image size than the weights', so that the position embedding is resampled.
@pytest.mark.parametrize(('script', 'options'), [
    ('train.py', ('DATA', *MODEL, *TRAIN, '--img-size', '48', '--initial-checkpoint', 'CHECKPOINT')),
    ('train.py', ('DATA', '--model', 'resnet10t', *TRAIN, '--img-size', '48', '--smoothing', '0', '--mixup', '0',
                  '--cutmix', '0')),
    ('transfer.py', ('DATA', *MODEL, *TRAIN, '--img-size', '48', '--transfer-learning', '--transfer-model',
                     'CHECKPOINT')),
    ('validate.py', ('DATA', *TRAINED, '--img-size', '48', '--eval-checkpoint', 'CHECKPOINT')),
    ('predict.py', ('DATA/val/ant', *TRAINED, '--img-size', '48', '--checkpoint', 'CHECKPOINT')),
    ('visualize.py', ('DATA/val/ant/ant_0.jpg', *TRAINED, '--img-size', '48', '--checkpoint', 'CHECKPOINT',
                      '--beside', 't2t_vit_7=CHECKPOINT')),
    ('visualize.py', ('--data', 'DATA', *TRAINED, '--checkpoint', 'CHECKPOINT', '--figures', 'mistakes')),
], ids=['train', 'train a network of convolutions', 'transfer', 'validate', 'predict', 'visualize', 'mistakes'])
def test_scripts_use_nothing_that_a_gpu_refuses(script, options, checkpoint, image_folder, tmp_path):
    options = [word.replace('DATA', str(image_folder)).replace('CHECKPOINT', str(checkpoint)) for word in options]
    ended = run_script('tests/as_on_gpu.py', script, *options, cwd=tmp_path)
    said = ended.stdout + ended.stderr
    assert SAID not in said and ended.returncode == 0, said[-3000:]


@pytest.mark.parametrize(('name', 'kwargs'), [
    *((name, {'depth': 1}) for name in ('t2t_vit_t_14', 't2t_vit_14_se', 't2t_vit_16_ghost', 't2t_vit_c_14', 'vit_se',
                                        'vit_dn')), ('t2t_vit_dense', {'block_config': (2, 1), 'growth_rate': 8})])
def test_models_train_with_nothing_that_a_gpu_refuses(name, kwargs):
    model = create_model(name, num_classes=3, img_size=32, embed_dim=32, num_heads=2, **kwargs)
    with AsOnGpu():
        model(torch.rand(2, 3, 32, 32)).sum().backward()


@pytest.mark.parametrize('refused', [
    lambda x: x.median(1).values, lambda x: x.kthvalue(1).values, lambda x: x.flatten().histc(),
    lambda x: torch.bincount(torch.tensor([0, 1]), torch.ones(2)),
    lambda x: nn.functional.interpolate(x[None, None], size=(3, 9), mode='bicubic', antialias=True).sum().backward(),
    lambda x: nn.functional.adaptive_avg_pool2d(x[None], 2).sum().backward(),
    lambda x: nn.functional.cross_entropy(x[None, :, :, None], torch.zeros(1, 4, 1, dtype=torch.long)),
])
def test_what_a_gpu_refuses_is_noticed(refused):
    with AsOnGpu(), pytest.raises(RuntimeError, match=SAID):
        refused(torch.rand(4, 4, requires_grad=True))


@pytest.mark.parametrize('allowed', [
    lambda x: x.median(), lambda x: torch.bincount(torch.tensor([0, 1])), lambda x: x.sort(), lambda x: x.quantile(0.5),
    lambda x: nn.functional.adaptive_avg_pool2d(x[None], 1).sum().backward(),
])
def test_what_a_gpu_does_is_let_through(allowed):
    with AsOnGpu():
        allowed(torch.rand(4, 4, requires_grad=True))


@pytest.fixture
def deterministic(monkeypatch):
    """This process as --deterministic makes it, and afterwards as it was."""
    cudnn, utils = torch.backends.cudnn, torch.utils.deterministic
    before = cudnn.benchmark, cudnn.deterministic, utils.fill_uninitialized_memory
    monkeypatch.setattr(os, 'environ', dict(os.environ))
    set_determinism(True)
    yield
    torch.use_deterministic_algorithms(False)
    cudnn.benchmark, cudnn.deterministic, utils.fill_uninitialized_memory = before


def test_new_memory_is_not_filled(deterministic):
    assert torch.are_deterministic_algorithms_enabled()
    with torch.profiler.profile() as profile:
        torch.empty(3)
        torch.rand(4).new_empty(2)
    called = {event.key for event in profile.key_averages()}
    assert 'aten::empty' in called and 'aten::fill_' not in called
