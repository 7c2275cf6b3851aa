"""benchmarks/shared/published.py: the yardstick computes what the authors' code computes, and trains as it does.

    python -m pytest tests/test_published.py

Parity needs the golden data; see tests/golden.py. The models that only repeat others' parts are marked slow.
"""
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from benchmarks.shared.published import PUBLISHED, PublishedStep, published_model, published_optimizer
from engine.optimizer import param_groups
from engine.state import TrainState
from models import create_model
from tests.golden import GOLDEN, assert_golden, relative_error
from utils.distributed import World
from utils.errors import UserError
from utils.runtime import Precision

QUICK = ('t2t_vit_7', 't2t_vit_t_14', 't2t_vit_14_se', 't2t_vit_dense', 't2t_vit_16_ghost')


def test_all_models_of_the_authors_code():
    if GOLDEN.exists():
        assert set(PUBLISHED) == {entry.split('/')[0] for entry in np.load(GOLDEN).files}
    with pytest.raises(UserError, match="'t2t_vit_c_14' has no published formulation"):
        published_model('t2t_vit_c_14')


@pytest.mark.skipif(not GOLDEN.exists(), reason=f'no golden data at {GOLDEN}; set T2T_SHARED to its folder')
@pytest.mark.parametrize('name', [
    name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in PUBLISHED])
def test_outputs_and_gradients_are_those_of_the_authors_code(name):
    assert_golden(name, published_model(name))


@pytest.mark.parametrize('name', ['t2t_vit_7', 't2t_vit_t_14'])
def test_initial_weights_and_outputs_are_ours_for_any_image(name):
    settings = {'img_size': (48, 64), 'num_classes': 5, 'in_chans': 1}
    torch.manual_seed(0)
    ours = create_model(name, **settings).eval()
    torch.manual_seed(0)
    published = published_model(name, **settings).eval()
    assert list(published.state_dict()) == list(ours.state_dict())
    assert all(torch.equal(tensor, ours.state_dict()[key]) for key, tensor in published.state_dict().items())
    for size in ((48, 64), (80, 32)):
        images = torch.randn(2, 1, *size, generator=torch.Generator().manual_seed(1))
        assert relative_error(published(images), ours(images)) < 1e-5


def test_operations_are_the_published_ones():
    torch.manual_seed(0)
    model = published_model('t2t_vit_t_14', img_size=32, embed_dim=64, depth=1, num_heads=2)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        model(torch.randn(2, 3, 32, 32))
    counts = {event.key: event.count for event in profile.key_averages()}
    assert counts['aten::im2col'] == 3 and counts['aten::softmax'] == 3
    assert not [name for name in counts if 'scaled_dot_product' in name or 'convolution' in name]


def test_dropout_and_stochastic_depth_are_active_in_training_alone():
    torch.manual_seed(0)
    model = published_model('t2t_vit_7', img_size=32, depth=2, drop_path_rate=0.5)
    images = torch.randn(2, 3, 32, 32)
    tokens, block = model.tokens_to_token, model.blocks[1]
    assert not torch.equal(tokens(images), tokens(images))
    x = torch.randn(1000, 3, 256)
    y = block.drop_path(x)
    dropped = (y == 0).flatten(1).all(1)
    assert 400 < dropped.sum() < 600 and torch.equal(y[~dropped], 2 * x[~dropped])
    model.eval()
    assert torch.equal(tokens(images), tokens(images)) and torch.equal(block.drop_path(x), x)


# --- Training step ----------------------------------------------------------------------------------------------------

DECAY = 0.9


def make_step(precision: Precision, clip_grad: float | None = None) -> PublishedStep:
    torch.manual_seed(0)
    args = types.SimpleNamespace(lr=1e-3, weight_decay=0.05, clip_grad=clip_grad)
    model = published_model('t2t_vit_7', img_size=32, num_classes=5, depth=2)
    model.eval()  # without dropout, so that steps can be compared
    ema = types.SimpleNamespace(decay=DECAY, module=published_model('t2t_vit_7', img_size=32, num_classes=5, depth=2))
    ema.module.load_state_dict(model.state_dict())
    state = TrainState(arch='t2t_vit_7', model=model, optimizer=published_optimizer(model, args),
                       scaler=precision.scaler, ema=ema, options={'batch_size': 4}, classes=[],
                       world=World(rank=0, local_rank=0, size=1, device=torch.device('cpu')))
    return PublishedStep(state, model, prepare=lambda *batch: batch, loss=F.cross_entropy, precision=precision,
                         args=args)


@pytest.mark.parametrize('clip_grad', [None, 0.1])
def test_step_is_that_of_fused_updates(clip_grad):
    generator = torch.Generator().manual_seed(1)
    batches = [(torch.randn(4, 3, 32, 32, generator=generator), torch.tensor([0, 1, 2, 3])) for _ in range(3)]
    step = make_step(Precision(torch.device('cpu'), enabled=False), clip_grad)
    iterator, losses = iter(batches), []
    for images, _ in batches:
        assert step(iterator) is images
        losses.append(step.last_loss)

    reference = make_step(Precision(torch.device('cpu'), enabled=False)).state
    model, average = reference.model, {k: v.clone() for k, v in reference.model.state_dict().items()}
    optimizer = torch.optim.AdamW(param_groups(model, 0.05), lr=1e-3, foreach=True)
    for (images, targets), expected in zip(batches, losses, strict=True):
        loss = F.cross_entropy(model(images), targets)
        assert loss.item() == pytest.approx(expected, rel=1e-4)
        loss.backward()
        if clip_grad:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip_grad)
        optimizer.step()
        optimizer.zero_grad()
        for key, tensor in model.state_dict().items():
            average[key].lerp_(tensor, 1 - DECAY)
    for key, tensor in step.state.ema.module.state_dict().items():
        assert relative_error(tensor, average[key]) < 1e-4, key
    assert step.state.global_step == 3 and step.state.images_seen == 12


def test_step_in_mixed_precision_changes_the_weights():
    step = make_step(Precision(torch.device('cpu'), enabled=True))
    before = {key: tensor.clone() for key, tensor in step.state.model.state_dict().items()}
    step(iter([(torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 3]))]))
    assert np.isfinite(step.last_loss)
    changed = {key for key, tensor in step.state.model.state_dict().items() if not torch.equal(tensor, before[key])}
    assert changed == {name for name, _ in step.state.model.named_parameters()}
