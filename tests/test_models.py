"""Tests of models/: parity with the authors' code, sizes, mixed precision, timm's interface, the factory.

    python -m pytest tests/test_models.py

The parity test needs the golden data; see tests/golden.py.
"""
import logging
import math

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch.utils._python_dispatch import TorchDispatchMode

from models import T2TViT, create_model
from models.layers import attention, sinusoid_table
from models.t2t_vit import VARIANTS
from models.tokens_to_token import (
    SOFT_SPLITS,
    SoftSplit,
    SplitLinear,
    TokenPerformer,
    performer_attention,
    token_grid,
)
from tests.golden import GOLDEN, assert_golden, gmacs, relative_error
from utils.errors import UserError

TOKENS = ('performer', 'transformer')

# Published: parameters with and without the fixed tensors, multiply-accumulates of one image / 1e9. The aux_head of
# token labeling has 512 · 1000 + 1000 parameters and sees 196 tokens.
PUBLISHED = {
    't2t_vit_7': (4_310_222, 4_255_694, 1.15),
    't2t_vit_10': (5_889_230, 5_834_702, 1.52),
    't2t_vit_12': (6_941_902, 6_887_374, 1.76),
    't2t_vit_14': (21_545_550, 21_465_806, 4.78),
    't2t_vit_19': (39_177_422, 39_085_070, 8.48),
    't2t_vit_24': (64_105_934, 64_000_974, 13.66),
    't2t_vit_t_14': (21_541_070, 21_465_422, 6.09),
    't2t_vit_t_19': (39_172_942, 39_084_686, 9.78),
    't2t_vit_t_24': (64_101_454, 64_000_590, 14.97),
    't2t_vit_14_resnext': (21_545_550, 21_465_806, 4.78),
    't2t_vit_14_wide': (25_156_302, 25_156_302 - 197 * 768 - 2 * 32 * 64, 5.23),
    't2t_vit_24_token_labeling': (64_105_934 + 513_000, 64_000_974 + 513_000, 13.76),
}
# The authors' code has the others; the release with token labeling comes from another repository of theirs.
GOLDEN_MODELS = [name for name in VARIANTS if name != 't2t_vit_24_token_labeling']


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(42)
    print('seed 42')  # shown by pytest when a test fails


def tiny_model(tokens_type: str = 'performer', **kwargs) -> T2TViT:
    """A T2T-ViT that runs in milliseconds, with weights large enough for every part to matter."""
    defaults = {'img_size': 64, 'num_classes': 5, 'embed_dim': 32, 'depth': 2, 'num_heads': 2}
    model = T2TViT(tokens_type=tokens_type, **{**defaults, **kwargs}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


# --- The published architecture ---------------------------------------------------------------------------------------

@pytest.mark.skipif(not GOLDEN.exists(), reason=f'no golden data at {GOLDEN}; set T2T_SHARED to its folder')
@pytest.mark.parametrize('name', GOLDEN_MODELS)
def test_outputs_and_gradients_are_those_of_the_authors_code(name):
    assert_golden(name)


@pytest.mark.parametrize('name', VARIANTS)
def test_parameters_and_macs_are_the_published_ones(name):
    total, trainable, published_gmacs = PUBLISHED[name]
    with torch.device('meta'):
        model = timm.create_model(name)
    assert sum(tensor.numel() for tensor in model.state_dict().values()) == total
    assert sum(parameter.numel() for parameter in model.parameters()) == trainable
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert round(gmacs(name, 224), 2) == published_gmacs


def test_counts_at_384():
    with torch.device('meta'):
        model = timm.create_model('t2t_vit_14', img_size=384)
    assert sum(tensor.numel() for tensor in model.state_dict().values()) == 21_691_470
    assert round(gmacs('t2t_vit_14', 384), 2) == 16.37


def test_sinusoid_table():
    table = sinusoid_table(50, 6)
    assert table.shape == (1, 50, 6) and table.dtype == torch.float32
    for position, channel in ((0, 0), (0, 1), (7, 2), (49, 3), (49, 4), (13, 5)):
        angle = position / 10000 ** (2 * (channel // 2) / 6)
        expected = math.cos(angle) if channel % 2 else math.sin(angle)
        assert table[0, position, channel].item() == pytest.approx(expected, abs=1e-7)


def test_initialisation():
    model = T2TViT(num_classes=100, depth=2)
    linears = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    for name, linear in linears.items():
        assert linear.weight.std().item() == pytest.approx(0.02, rel=0.1), name
        assert linear.bias is None or not linear.bias.any(), name
    assert model.cls_token.std().item() == pytest.approx(0.02, rel=0.2)
    for module in model.modules():
        if isinstance(module, torch.nn.LayerNorm):
            assert (module.weight == 1).all() and not module.bias.any() and module.eps == 1e-5
    w = model.tokens_to_token.attention1.w
    assert w.shape == (32, 64)
    torch.testing.assert_close(w @ w.T, 32 * torch.eye(32), rtol=0, atol=1e-4)


def test_random_layers():
    model = tiny_model(drop_path_rate=0.3, depth=4)
    rates = [getattr(block.drop_path, 'drop_prob', 0.) for block in model.blocks]
    assert rates == pytest.approx([0., 0.1, 0.2, 0.3])
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(model(images), model(images))

    token_layer = TokenPerformer((3, 2, 1), 8, 64)
    x = torch.randn(1, 8, 6, 6)
    assert [layer.p for layer in token_layer.modules() if isinstance(layer, torch.nn.Dropout)] == [0.1, 0.1]
    assert not torch.equal(token_layer(x), token_layer(x))


def split_layer(split, of_pixels=False):
    """A soft split, the norm and the layer behind it, with weights like trained ones."""
    layer = SplitLinear(split, 3, 16, of_pixels=of_pixels)
    norm = torch.nn.LayerNorm(layer.in_features)
    with torch.no_grad():
        for tensor, mean, std in ((norm.weight, 1, .1), (norm.bias, 0, .1), (layer.weight, 0, .1), (layer.bias, 0, .1)):
            tensor.normal_(mean, std)
    return SoftSplit(*split), norm, layer


@pytest.mark.parametrize('size', [(32, 32), (17, 40)])
@pytest.mark.parametrize('split', SOFT_SPLITS[:2])
def test_a_split_layer_is_what_it_is_made_of(split, size):
    soft_split, norm, layer = split_layer(split)
    norm, layer, x = norm.double(), layer.double(), torch.randn(2, 3, *size, dtype=torch.float64, requires_grad=True)
    assert torch.equal(soft_split(x), F.unfold(x, split[0], stride=split[1], padding=split[2]).transpose(1, 2))
    given = [x, *norm.parameters(), *layer.parameters()]
    for ours, definition in (
            (layer(x), F.linear(soft_split(x), layer.weight, layer.bias)),
            (layer(x, norm.weight, norm.bias, norm.eps), F.linear(norm(soft_split(x)), layer.weight, layer.bias))):
        assert ours.shape == definition.shape and relative_error(ours, definition) <= 1e-12
        weights = torch.randn_like(ours)
        gradients = (torch.autograd.grad(out, given, weights, allow_unused=True) for out in (ours, definition))
        for gradient, expected in zip(*gradients, strict=True):
            assert expected is None or relative_error(gradient, expected) <= 1e-11


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
def test_flat_patches_keep_their_deviation(dtype):
    """A white margin with a little noise: what is left of it after its mean is taken away must be right."""
    soft_split, norm, layer = split_layer(SOFT_SPLITS[0], of_pixels=True)
    x = 2.5 + 0.004 * torch.randn(2, 3, 64, 64)
    exact = F.linear(F.layer_norm(soft_split(x.double()), norm.weight.shape, norm.weight.double(), norm.bias.double()),
                     layer.weight.double(), layer.bias.double())
    with torch.autocast('cpu', dtype, enabled=dtype is not torch.float32):
        ours = layer(x, norm.weight, norm.bias, norm.eps)
        published = F.linear(norm(soft_split(x)), layer.weight, layer.bias)
    assert ours.dtype == published.dtype == dtype
    assert relative_error(ours, exact) <= max(relative_error(published, exact), 2e-4)


@pytest.mark.parametrize('gain', [0.01, 1e5])
def test_a_split_layer_in_float16_takes_maps_of_any_contrast(gain):
    soft_split, norm, layer = split_layer(SOFT_SPLITS[1])
    x = gain * torch.randn(2, 3, 32, 32)
    with torch.autocast('cpu', torch.float16):
        ours = layer(x, norm.weight, norm.bias, norm.eps)
    assert relative_error(ours, F.linear(norm(soft_split(x)), layer.weight, layer.bias)) <= 3e-3


def test_attention_written_out_is_the_fused_one():
    q, k, v = (torch.randn(2, 3, 50, 16, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), scale=0.3)
    ours = attention(q, k, v, scale=0.3)
    assert relative_error(ours, exact) <= 5e-3
    weights = torch.randn_like(exact)
    for gradient, expected in zip(torch.autograd.grad(ours, (q, k, v), weights.bfloat16()),
                                  torch.autograd.grad(exact, (q, k, v), weights), strict=True):
        assert relative_error(gradient, expected) <= 1e-2


@pytest.mark.parametrize('global_pool', ['token', 'avg'])
@pytest.mark.parametrize('tokens_type', TOKENS)
def test_every_parameter_gets_a_gradient_and_buffers_none(tokens_type, global_pool):
    model = tiny_model(tokens_type, global_pool=global_pool).train()
    model(torch.randn(2, 3, 64, 64)).square().sum().backward()
    without = [name for name, parameter in model.named_parameters() if not parameter.grad.any()]
    assert without == []
    buffers = {'pos_embed'} | ({'tokens_to_token.attention1.w', 'tokens_to_token.attention2.w'}
                               if tokens_type == 'performer' else set())
    assert {name for name, _ in model.named_buffers()} == buffers < set(model.state_dict())
    assert not any(buffer.requires_grad for buffer in model.buffers())


class Reads(TorchDispatchMode):
    """Names the operators that read a tensor of a map's size, views and changes of layout aside."""

    def __init__(self, size: int):
        super().__init__()
        self.size, self.seen = size, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        is_whole = any(isinstance(arg, torch.Tensor) and arg.numel() == self.size for arg in args)
        if is_whole and not function.is_view and 'clone' not in function._schema.name:
            self.seen.append(function._schema.name.removeprefix('aten::'))
        return function(*args, **(kwargs or {}))


def test_a_normalised_split_squares_its_map_once():
    norm, linear = torch.nn.LayerNorm(9 * 8), SplitLinear((3, 2, 1), 8, 6)
    x = torch.randn(2, 8, 10, 10)
    with Reads(x.numel()) as reads, torch.no_grad():
        linear(x, norm.weight, norm.bias, norm.eps)
    # Mean, square and its mean, division by the contrast, convolution.
    assert reads.seen == ['mean', 'pow', 'mean', 'div', 'convolution']


# --- Image sizes ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('size, grid', [
    ((224, 224), (14, 14)), ((192, 256), (12, 16)), ((16, 16), (1, 1)), ((17, 31), (1, 2)),
    ((223, 227), (14, 15)), ((33, 100), (2, 7)),
])
@pytest.mark.parametrize('tokens_type', TOKENS)
def test_any_image_size(tokens_type, size, grid):
    assert token_grid(*size) == grid
    images = torch.randn(2, 3, *size)
    built_for_it = tiny_model(tokens_type, img_size=size)
    assert built_for_it.pos_embed.shape == (1, 1 + grid[0] * grid[1], 32)
    assert built_for_it.tokens_to_token(images).shape == (2, grid[0] * grid[1], 32)
    assert built_for_it(images).shape == tiny_model(tokens_type, img_size=64)(images).shape == (2, 5)


@pytest.mark.parametrize('size, grid', [((96, 48), (6, 3)), ((128, 32), (8, 2))])  # 8 × 2 is as many as 4 × 4
def test_position_embedding_follows_the_grid(size, grid):
    model = tiny_model(img_size=64)
    expected = tiny_model(img_size=size)
    expected.load_state_dict({**model.state_dict(), 'pos_embed': expected.pos_embed})
    class_token, table = model.pos_embed[:, :1], model.pos_embed[:, 1:]
    table = table.reshape(1, 4, 4, 32).permute(0, 3, 1, 2)
    table = F.interpolate(table, size=grid, mode='bicubic', antialias=True)
    expected.pos_embed = torch.cat((class_token, table.flatten(2).transpose(1, 2)), dim=1)
    images = torch.randn(2, 3, *size)
    torch.testing.assert_close(model(images), expected(images))


@pytest.mark.parametrize('size', [(15, 64), (64, 15), (1, 1)])
def test_small_images_are_refused(size):
    message = f'{size[0]} × {size[1]} pixels is too small.*at least 16'
    with pytest.raises(ValueError, match=message):
        T2TViT(img_size=size)
    with pytest.raises(ValueError, match=message):
        tiny_model()(torch.randn(1, 3, *size))


# --- The Performer's arithmetic ---------------------------------------------------------------------------------------

def published_attention(k, q, v, w, eps=1e-8):
    """The formula as published, without any care for overflow."""
    def features(x):
        return torch.exp(x @ w.T - x.square().sum(-1, keepdim=True) / 2) / math.sqrt(len(w))

    k, q = features(k), features(q)
    return (q @ (k.transpose(1, 2) @ v)) / (q @ k.sum(1).unsqueeze(2) + eps)


def attention_inputs(scale: float, dtype: torch.dtype = torch.float32, dim: int = 64) -> list[torch.Tensor]:
    k, q, v = (scale * torch.randn(2, 50, dim) for _ in range(3))
    w = torch.nn.init.orthogonal_(torch.empty(dim // 2, dim)) * math.sqrt(dim // 2)
    return [*(tensor.to(dtype).requires_grad_() for tensor in (k, q, v)), w.to(dtype)]


def gradients_of(attention, inputs: list[torch.Tensor], weights: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad((attention(*inputs) * weights.to(inputs[0].dtype)).sum(), inputs[:3])


@pytest.mark.parametrize('scale', [0.1, 0.5, 0.7, 0.9])  # from 0.7 on the epsilon decides
def test_performer_attention_is_the_published_function(scale):
    inputs = attention_inputs(scale)
    exact = [tensor.detach().double().requires_grad_(tensor.requires_grad) for tensor in inputs]
    weights = torch.randn(2, 50, 64)
    assert relative_error(performer_attention(*exact), published_attention(*exact)) <= 1e-12
    assert relative_error(performer_attention(*inputs), published_attention(*exact)) <= 1e-5
    published_gradients = gradients_of(published_attention, exact, weights)
    for given, tolerance in ((exact, 1e-10), (inputs, 1e-5)):
        gradients = gradients_of(performer_attention, given, weights)
        for ours, published in zip(gradients, published_gradients, strict=True):
            assert relative_error(ours, published) <= tolerance
    without_epsilon = relative_error(published_attention(*exact, eps=0.), published_attention(*exact))
    assert (without_epsilon > 0.01) == (scale >= 0.7)


@pytest.mark.parametrize('dim', [64, 256])  # features up to e^16, and up to e^64, whose products overflow
@pytest.mark.parametrize('scale', [1., 10., 100.])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16])
def test_performer_attention_stays_finite(dtype, scale, dim):
    inputs = attention_inputs(scale, dtype, dim)
    k, q, v, w = inputs
    with torch.no_grad():
        k[0, 0] = q[0, 0] = w[0]  # the largest feature there is
        k[1], q[1] = w[0], w[1]  # a query that sees next to nothing
    out = performer_attention(*inputs)
    assert out.dtype == dtype and out.isfinite().all()
    assert out.abs().max() <= v.abs().max() * (1 + 1e-5)
    for gradient in gradients_of(performer_attention, inputs, torch.randn(2, 50, dim)):
        assert gradient.isfinite().all()


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_performer_attention_ignores_autocast(dtype):
    inputs, weights = attention_inputs(0.5), torch.randn(2, 50, 64)
    plain = performer_attention(*inputs)
    with torch.autocast('cpu', dtype):
        autocast = performer_attention(*inputs)
    assert autocast.dtype == torch.float32 and torch.equal(autocast, plain)
    for ours, reference in zip(torch.autograd.grad(autocast, inputs[:3], weights),
                               torch.autograd.grad(plain, inputs[:3], weights), strict=True):
        assert torch.equal(ours, reference)


@pytest.mark.parametrize('gain', [1., 100.])
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('tokens_type', TOKENS)
def test_mixed_precision_stays_finite(tokens_type, dtype, gain):
    model = tiny_model(tokens_type).train()
    with torch.no_grad():
        for layer in (model.tokens_to_token.attention1, model.tokens_to_token.attention2):
            (layer.kqv if tokens_type == 'performer' else layer.attn.qkv).weight.mul_(gain)
    with torch.autocast('cpu', dtype):
        logits = model(torch.randn(2, 3, 64, 64))
        loss = F.cross_entropy(logits, torch.tensor([0, 1]))
    loss.backward()
    assert loss.isfinite()
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all(), name
    assert model.head.weight.grad.any()


def test_published_arithmetic_overflows_float16():
    """Why the tests above are there: the NaN of the published code."""
    k, q, v, w = (tensor.half() for tensor in attention_inputs(0.5))
    k[0, 0] = q[0, 0] = w[0]
    assert not published_attention(k, q, v, w).isfinite().all()
    assert performer_attention(k, q, v, w).isfinite().all()


# --- timm's interface -------------------------------------------------------------------------------------------------

def test_registration():
    assert set(timm.list_models(module='t2t_vit')) == set(VARIANTS) == set(PUBLISHED)
    for name, variant in VARIANTS.items():
        cfg = timm.get_pretrained_cfg(name).to_dict()
        assert (cfg['url'] or '').endswith(variant.release)
        assert (cfg['crop_pct'], cfg['interpolation']) == (0.9, 'bicubic')
        assert timm.is_model_pretrained(f'{name}.in1k') == bool(variant.release)


def test_weights_trained_at_384_bring_their_size():
    with torch.device('meta'):
        other = timm.create_model('t2t_vit_14_se', pretrained_cfg_overlay={'input_size': (3, 384, 384)})
        assert other.grid_size == (24, 24)
        model = timm.create_model('t2t_vit_14.in1k_384')
        smaller = timm.create_model('t2t_vit_14.in1k_384', img_size=224)
    assert (model.grid_size, smaller.grid_size) == ((24, 24), (14, 14))
    assert model.pretrained_cfg['url'].endswith('/83.3_T2T_ViT_14.pth.tar')
    assert (model.pretrained_cfg['crop_pct'], model.pretrained_cfg['input_size']) == (1.0, (3, 384, 384))


def test_aux_head_adds_half_of_the_maximum_over_tokens():
    images = torch.randn(2, 3, 64, 64)
    for weight in (0.5, 0.25, 0.):
        model = tiny_model(aux_head=True, aux_weight=weight)
        tokens = model.forward_features(images)
        per_token = torch.stack([model.aux_head(tokens[:, i]) for i in range(1, 17)])
        torch.testing.assert_close(model(images), model.head(tokens[:, 0]) + weight * per_token.max(0).values)
        assert torch.equal(model.forward_head(tokens, pre_logits=True), tokens[:, 0])
    assert model.get_classifier() == (model.head, model.aux_head)
    model.reset_classifier(7)
    assert model(images).shape == (2, 7) and model.aux_head.weight.shape == (7, 32)
    model.reset_classifier(0)
    assert model.aux_head is None and torch.equal(model(images), tokens[:, 0])
    model.reset_classifier(3)
    assert model.get_classifier()[1].weight.shape == (3, 32)


def test_the_grid_is_that_of_the_soft_splits():
    for size in ((224, 224), (17, 100), (33, 16)):
        grid = size
        for split in SOFT_SPLITS:
            grid = SoftSplit(*split).grid_size(*grid)
        assert token_grid(*size) == grid


def test_set_input_size():
    model, images = tiny_model(img_size=64), torch.randn(2, 3, 96, 48)
    expected = model(images)
    model.set_input_size((96, 48))
    assert model.grid_size == (6, 3) and model.pos_embed.shape == (1, 19, 32)
    assert torch.equal(model(images), expected)
    assert 'pos_embed' in dict(model.named_buffers())
    with pytest.raises(ValueError, match='too small'):
        model.set_input_size(15)


def test_timm_creates_the_model():
    model = timm.create_model(
        't2t_vit_7', num_classes=10, img_size=(192, 256), in_chans=1, drop_path_rate=0.1)
    assert model.grid_size == (12, 16) and model.num_classes == 10
    assert model.blocks[-1].drop_path.drop_prob == pytest.approx(0.1)
    assert model(torch.randn(1, 1, 192, 256)).shape == (1, 10)
    assert model.num_features == model.head_hidden_size == model.embed_dim == 256


@pytest.mark.parametrize('argument', [{'tokens_type': 'pooling'}, {'global_pool': 'max'}, {'num_heads': 3}])
def test_wrong_arguments_are_refused(argument):
    with pytest.raises(ValueError, match=str(*argument.values())):
        tiny_model(**argument)


def test_features_and_head():
    model, images = tiny_model(), torch.randn(2, 3, 64, 80)
    tokens = model.forward_features(images)
    assert tokens.shape == (2, 1 + 4 * 5, 32)
    assert torch.equal(model.forward_head(tokens), model(images))
    assert torch.equal(model.forward_head(tokens, pre_logits=True), tokens[:, 0])
    assert torch.equal(model.get_classifier()(tokens[:, 0]), model(images))

    model.reset_classifier(7, global_pool='avg')
    assert model(images).shape == (2, 7) and model.num_classes == 7
    torch.testing.assert_close(model.forward_head(tokens, pre_logits=True), tokens[:, 1:].mean(1))
    model.reset_classifier(0, global_pool='')
    assert torch.equal(model(images), tokens)
    with pytest.raises(ValueError, match='max'):
        model.reset_classifier(7, global_pool='max')


@pytest.mark.parametrize('stop_early', [False, True])
def test_intermediates(stop_early):
    model, images = tiny_model(depth=3), torch.randn(2, 3, 64, 80)
    maps = model.forward_intermediates(images, indices=[0, 1], stop_early=stop_early, intermediates_only=True)
    assert [tuple(feature_map.shape) for feature_map in maps] == [(2, 32, 4, 5)] * 2

    final, [(tokens, class_token)] = model.forward_intermediates(
        images, indices=1, norm=True, output_fmt='NLC', return_prefix_tokens=True)
    assert torch.equal(final, model.forward_features(images))
    assert torch.equal(torch.cat((class_token, tokens), dim=1), final)
    with pytest.raises(ValueError, match='NHWC'):
        model.forward_intermediates(images, output_fmt='NHWC')

    assert model.prune_intermediate_layers([1], prune_norm=True) == [1]
    assert len(model.blocks) == 2
    torch.testing.assert_close(model(images)[:, 1:].transpose(1, 2).reshape(2, 32, 4, 5), maps[1])


def test_features_only():
    model = timm.create_model('t2t_vit_7', features_only=True, out_indices=(2, 6))
    assert model.feature_info.channels() == [256, 256] and model.feature_info.reduction() == [16, 16]
    maps = model(torch.randn(1, 3, 64, 96))
    assert [tuple(feature_map.shape) for feature_map in maps] == [(1, 256, 4, 6)] * 2


def test_parameter_groups():
    model = tiny_model(depth=3)
    plain, decayed = param_groups_weight_decay(
        model, weight_decay=0.05, no_weight_decay_list=model.no_weight_decay())
    assert plain['weight_decay'] == 0. and decayed['weight_decay'] == 0.05
    one_dimensional = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    assert {id(parameter) for parameter in plain['params']} == {
        id(parameter) for parameter in [*one_dimensional, model.cls_token]}

    scales = {}
    for group in param_groups_layer_decay(model, layer_decay=0.5):
        scales.update({id(parameter): group['lr_scale'] for parameter in group['params']})
    assert len(scales) == len(list(model.parameters()))
    depths = [model.cls_token, model.tokens_to_token.project.weight, model.blocks[0].mlp.fc1.weight,
              model.blocks[2].mlp.fc1.weight, model.head.weight]
    assert [scales[id(parameter)] for parameter in depths] == [0.5 ** 4, 0.5 ** 4, 0.5 ** 3, 0.5, 1.]


@pytest.mark.parametrize('tokens_type', TOKENS)
def test_compiles_without_graph_breaks(tokens_type):
    model, images = tiny_model(tokens_type), torch.randn(1, 3, 64, 64)
    compiled = torch.compile(model, backend='eager', fullgraph=True)
    torch.testing.assert_close(compiled(images), model(images))
    with torch.autocast('cpu', torch.bfloat16):
        torch.testing.assert_close(compiled(images), model(images))


# --- The factory ------------------------------------------------------------------------------------------------------

def test_factory_passes_arguments_and_logs_them(caplog):
    with caplog.at_level(logging.INFO, logger='models.factory'):
        model = create_model(
            'T2t_vit_7', num_classes=10, img_size=64, drop_path_rate=0.2, global_pool='avg')
    assert model.pretrained_cfg['architecture'] == 't2t_vit_7' and model.pretrained_cfg['tag'] == 'in1k'
    assert (model.num_classes, model.grid_size, model.global_pool) == (10, (4, 4), 'avg')
    assert model.blocks[-1].drop_path.drop_prob == pytest.approx(0.2)
    for part in ('t2t_vit_7', "'avg'", '(64, 64)', 'drop_path_rate 0.2', '4.00 M'):
        assert part in caplog.text


@pytest.mark.parametrize('name', ['resnet18', 'mobilenetv2_050'])
def test_factory_leaves_out_what_a_model_does_not_take(name, caplog):
    with caplog.at_level(logging.INFO, logger='models.factory'):
        model = create_model(name, num_classes=3, img_size=(64, 96), drop_path_rate=0., attn_drop_rate=0.1)
    assert model.eval()(torch.randn(1, 3, 64, 96)).shape == (1, 3)
    levels = {record.args[1]: record.levelname for record in caplog.records if 'takes no' in record.msg}
    assert levels == {'img_size': 'INFO', 'attn_drop_rate': 'WARNING'}  # a dropout was asked for


@pytest.mark.parametrize('name', ['vit_tiny_patch16_224', 'deit_tiny_distilled_patch16_224'])
def test_factory_sizes_vision_transformers(name):
    model = create_model(name, num_classes=3, img_size=(64, 96), drop_path_rate=0.1)
    assert model.patch_embed.grid_size == (4, 6)
    assert model.blocks[-1].drop_path1.drop_prob == pytest.approx(0.1)


@pytest.mark.parametrize('arguments, message', [
    ({'name': 't2t_vit14'}, "'t2t_vit14' does not exist; did you mean t2t_vit_14"),
    ({'name': 'T2T_ViT_t14'}, 't2t_vit_t_14'),
    ({'name': 'qwertz'}, 'list_models'),
    ({'name': 't2t_vit_7.laion'}, "no weights 'laion'; use t2t_vit_7 or t2t_vit_7.in1k"),
    ({'img_size': 15}, 'at least 16'),
    ({'img_size': (224, 0)}, r'img_size is \(224, 0\)'),
    ({'img_size': (224, 224, 3)}, 'height and width'),
    ({'img_size': 22.4}, 'img_size is 22.4'),
    ({'num_classes': -1}, 'num_classes is -1; give a whole number from 0'),
    ({'in_chans': 0}, 'in_chans is 0'),
    ({'drop_path_rate': 1.}, 'drop_path_rate is 1.0'),
    ({'drop_rate': 'high'}, "drop_rate is 'high'"),
    ({'global_pool': 'max'}, "global_pool is 'max'; choose from 'token'"),
    ({'patch_sise': 16}, 'takes no argument patch_sise'),
])
def test_factory_explains_mistakes(arguments, message):
    with pytest.raises(UserError, match=message) as caught:
        create_model(**{'name': 't2t_vit_7', **arguments})
    assert '\n' not in str(caught.value)


def test_weights_that_nobody_published():
    with pytest.raises(UserError, match='no weights of t2t_vit_14_wide were published; leave --pretrained out'):
        create_model('t2t_vit_14_wide', pretrained=True)


def test_pretrained_weights_out_of_reach(tmp_path):
    overlay = {'url': (tmp_path / 'missing.pth.tar').as_uri()}
    with pytest.raises(UserError, match='weights of t2t_vit_7 could not be fetched.*load the file') as caught:
        create_model('t2t_vit_7', pretrained=True, pretrained_cfg_overlay=overlay, cache_dir=tmp_path)
    assert '\n' not in str(caught.value)
