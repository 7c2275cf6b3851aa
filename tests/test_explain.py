"""What a model attends to agrees with what it computes, receptive fields with gradients, channels with definitions."""
import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

import models  # noqa: F401, registers the architectures
from figures.explain import (
    NotSeen,
    PerformerWeights,
    SoftmaxWeights,
    attention_rollout,
    attention_weights,
    channel_health,
    class_relevance,
    classifier_attention,
    default_layers,
    layer_features,
    layer_maps,
    pixel_relevance,
    receptive_field,
    token_stages,
)
from models.tokens_to_token import SOFT_SPLITS, SoftSplit, TokenPerformer, performer_attention, token_grid
from utils.errors import UserError

SMALL = {'embed_dim': 32, 'depth': 2, 'num_heads': 4}


def make(name, img_size=32, gain=8, **kwargs):
    """A model whose attention is far from even, which that of a new one is not; of a Performer, gain 8 leaves none."""
    torch.manual_seed(0)
    model = timm.create_model(name, img_size=img_size, num_classes=5, **kwargs)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter *= gain
    return model.eval()


def images(*size, count=1):
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(1))


# --- Attention of the backbone ----------------------------------------------------------------------------------------

@pytest.mark.parametrize('name, kwargs', [
    ('t2t_vit_7', SMALL), ('t2t_vit_16_ghost', SMALL), ('t2t_vit_14_se', SMALL), ('t2t_vit_dense', {}),
    ('vit_s_16', SMALL), ('vit_small_patch16_224', {**SMALL, 'qk_norm': True, 'reg_tokens': 2}),
    ('deit_tiny_distilled_patch16_224', {**SMALL, 'patch_size': 8}),
], ids=lambda value: value if isinstance(value, str) else '')
def test_weights_times_values_are_what_the_block_computes(name, kwargs):
    model, x = make(name, (32, 48), **kwargs), images(32, 48, count=2)
    blocks = [block for block in model.blocks if hasattr(block, 'attn')]
    inputs, values = [], []
    for block in blocks:
        block.attn.proj.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
        if name == 't2t_vit_16_ghost':
            block.attn.v.register_forward_hook(lambda _, __, out: values.append(out))
        else:
            block.attn.qkv.register_forward_hook(lambda _, __, out: values.append(out.chunk(3, dim=2)[2]))
    weights = attention_weights(model, x)
    assert len(weights) == len(blocks) == len(inputs)
    for block, weight, value, computed in zip(blocks, weights, values, inputs, strict=True):
        if name == 't2t_vit_16_ghost':
            value = torch.cat((value, block.attn.cheap_operation_v(value)), dim=2)
        value = value.unflatten(2, (weight.shape[1], -1)).transpose(1, 2)  # [B, h, N, d]
        torch.testing.assert_close((weight @ value).transpose(1, 2).flatten(2), computed, rtol=1e-4, atol=1e-5)
        assert weight.amax(-1).mean() > 1.5 / weight.shape[-1]  # not so even that any weights would do


def test_listening_changes_nothing():
    model, x = make('t2t_vit_7', **SMALL), images(32, 32)
    before = model(x)
    model.train()
    attention_weights(model, x), token_stages(model, x), layer_features(model, x)
    assert model.training and not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch.equal(model.eval()(x), before)


def test_rollout_is_the_product_of_all_blocks():
    weights = torch.rand(3, 2, 4, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).softmax(-1)
    averages = list(weights.mean(2))
    expected = []
    for image in range(2):
        product = np.eye(6)
        for average in averages:  # Abnar and Zuidema 2020, section 3
            mixed = 0.5 * average[image].numpy() + 0.5 * np.eye(6)
            product = mixed / mixed.sum(1, keepdims=True) @ product
        expected.append(product)
    rollout = attention_rollout(averages)
    np.testing.assert_allclose(rollout.numpy(), expected, rtol=1e-12)
    torch.testing.assert_close(rollout.sum(-1), torch.ones(2, 6, dtype=torch.float64))
    torch.testing.assert_close(attention_rollout(averages, [4, 0]), rollout[:, [4, 0]])


def test_the_classifiers_attention_is_laid_on_the_grid_row_by_row():
    model, x = make('t2t_vit_7', **SMALL), images(64, 36)
    weights = attention_weights(model, x)
    seen = classifier_attention(model, x)
    assert seen.rollout.shape == (4, 3) and seen.source == 'class token'
    torch.testing.assert_close(seen.blocks.flatten(2), torch.stack([w[0, :, 0, 1:] for w in weights]))
    rollout = attention_rollout([w.mean(1) for w in weights])[0]
    torch.testing.assert_close(seen.rollout.flatten(), rollout[0, 1:])
    model.global_pool = 'avg'  # the classifier now sees the mean of the others
    seen = classifier_attention(model, x)
    assert seen.source == 'mean of all tokens'
    torch.testing.assert_close(seen.rollout.flatten(), rollout[1:, 1:].mean(0))
    model.global_pool = 'map'  # by attention of its own, which is not shown
    assert classifier_attention(model, x).source == 'all tokens, on average'


def test_the_grid_of_a_hybrid_has_the_strides_of_its_convolutions():
    model = make('vit_tiny_r_s16_p8_224', (64, 96), depth=1)
    assert classifier_attention(model, images(64, 96)).rollout.shape == (2, 3)


@pytest.mark.parametrize('name', ['resnet18', 'mixer_s32_224', 'swin_tiny_patch4_window7_224', 'xcit_nano_12_p16_224'])
def test_a_model_without_such_attention_says_so(name):
    model = timm.create_model(name, num_classes=2)
    with pytest.raises(NotSeen, match=f'model {name}.*attention'):
        attention_weights(model, images(224, 224))
    with pytest.raises(NotSeen, match=f'model {name} has no tokens-to-token module'):
        token_stages(model, images(64, 64))


# --- Token layers -----------------------------------------------------------------------------------------------------

def test_implied_weights_times_values_are_performer_attention():
    torch.manual_seed(0)
    k, q, v = torch.randn(3, 2, 50, 64) / 2
    w = TokenPerformer((1, 1, 0), 8, 64).w
    weights = PerformerWeights(k, q, w)
    rows = weights.rows(range(50))
    torch.testing.assert_close((rows @ v.double()).float(), performer_attention(k, q, v, w), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(weights.rows([7, 3]), rows[:, [7, 3]])
    torch.testing.assert_close(rows.sum(-1), weights.sums)
    assert weights.sums.min() > 0.9
    longer = PerformerWeights(2 * k, 2 * q, w)  # too long: eps is more than the features, and attention is nothing
    assert longer.sums.mean() < 0.1
    torch.testing.assert_close((longer.rows(range(50)) @ v.double()).float(), performer_attention(2 * k, 2 * q, v, w),
                               rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize('kind', [
    lambda k, q: PerformerWeights(k, q, TokenPerformer((1, 1, 0), 8, 64).w), lambda k, q: SoftmaxWeights(k, q, 0.3),
], ids=['performer', 'transformer'])
def test_spread_is_relevance_times_weights(kind):
    generator = torch.Generator().manual_seed(0)
    k, q = torch.randn(2, 2, 600, 64, generator=generator)  # more tokens than are worked on at a time
    weights = kind(k, q)
    relevance = torch.rand(2, 600, generator=generator, dtype=torch.float64)
    expected = torch.einsum('bi,bij->bj', relevance, weights.rows(range(600)))
    torch.testing.assert_close(weights.spread(relevance), expected)


@pytest.mark.parametrize('tokens_type', ['performer', 'transformer'])
def test_token_layers_compute_by_the_weights_that_are_shown(tokens_type):
    gain, x = 1 if tokens_type == 'performer' else 4, images(32, 52, count=2)
    model = make('t2t_vit_7', gain=gain, tokens_type=tokens_type, **SMALL)
    module = model.tokens_to_token
    stages = token_stages(model, x)
    assert [stage.grid for stage in stages] == [(8, 13), (4, 7), token_grid(32, 52)]
    torch.testing.assert_close(stages[-1].tokens.flatten(2).transpose(1, 2), module(x))
    inputs = module.soft_split0(x), module.soft_split1(stages[0].tokens)
    for layer, stage, given in zip((module.attention1, module.attention2), stages, inputs, strict=False):
        rows = stage.weights.rows(range(given.shape[1])).float()
        assert (rows.sum(-1) - 1).abs().max() < 1e-3 and rows.amax(-1).mean() > 1.2 / rows.shape[-1]
        if tokens_type == 'performer':
            v = F.linear(layer.norm1(given), layer.kqv.weight, layer.kqv.bias).chunk(3, dim=2)[2]
            mixed = v + layer.proj(rows @ v)
        else:
            v = F.linear(layer.norm1(given), layer.attn.qkv.weight).chunk(3, dim=2)[2]
            mixed = v + layer.attn.proj(rows @ v)
        expected = mixed + layer.mlp(layer.norm2(mixed))
        torch.testing.assert_close(stage.tokens.flatten(2).transpose(1, 2), expected, rtol=1e-3, atol=1e-4)


# --- Receptive fields -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('size', [(32, 32), (36, 53), (17, 40)])
def test_receptive_field_is_the_gradient_of_the_soft_splits(size):
    x = torch.ones(1, 1, *size, dtype=torch.float64, requires_grad=True)
    tokens, grid = x, size
    for split in map(SoftSplit, *zip(*SOFT_SPLITS, strict=True)):  # nothing between them but the laying back
        grid, tokens = split.grid_size(*grid), split(tokens)
        tokens = tokens.transpose(1, 2).unflatten(2, grid)
    for row, column in {(0, 0), (grid[0] - 1, grid[1] - 1), (grid[0] // 2, grid[1] // 2), (0, grid[1] - 1)}:
        paths, = torch.autograd.grad(tokens[0, :, row, column].sum(), x, retain_graph=True)
        assert torch.equal(receptive_field((row, column), size), paths[0, 0].long()), (row, column)


def test_receptive_field_at_224():
    seen = receptive_field((7, 3), (224, 224)) > 0
    expected = torch.zeros(224, 224, dtype=torch.bool)
    # 7 + 2 · 4 + 2 · 8 pixels, from 16 · row less the paddings 1 · 8 + 1 · 4 + 2.
    expected[98:98 + 31, 34:34 + 31] = True
    assert torch.equal(seen, expected)
    assert receptive_field((7, 3), (224, 224), splits=2).shape == (56, 56)
    assert receptive_field((0, 0), (224, 224), splits=1).count_nonzero() == 4  # of 3 × 3, at a corner
    with pytest.raises(IndexError):
        receptive_field((14, 0), (224, 224))


@pytest.mark.parametrize('tokens_type', ['performer', 'transformer'])
def test_relevance_goes_back_through_every_layer(tokens_type):
    size = (32, 44)
    model = make('t2t_vit_7', gain=2, tokens_type=tokens_type, **SMALL)
    stages = token_stages(model, images(*size))
    sizes = [size, *(stage.grid for stage in stages)]
    lost = 1 - stages[1].weights.sums.min()  # at this gain, Performer's weights do not sum to 1
    assert lost > 0.5 if tokens_type == 'performer' else lost < 1e-9
    mixing = torch.eye(size[0] * size[1], dtype=torch.float64)  # of pixels in tokens, worked out forwards and in full
    for stage, split, grid, before in zip(stages, SOFT_SPLITS, sizes[1:], sizes, strict=False):
        windows = torch.zeros(grid[0] * grid[1], before[0] * before[1], dtype=torch.float64)
        kernel, stride, padding = split
        for token in range(len(windows)):
            top, left = ((place * stride - padding) for place in divmod(token, grid[1]))
            inside = [y * before[1] + x for y in range(max(top, 0), min(top + kernel, before[0]))
                      for x in range(max(left, 0), min(left + kernel, before[1]))]
            windows[token, inside] = 1 / len(inside)
        mixing = windows @ mixing
        if stage.weights is not None:
            attended = torch.eye(len(windows)) + stage.weights.rows(range(len(windows)))[0]
            mixing = attended / attended.sum(1, keepdim=True) @ mixing
    found = pixel_relevance(stages, (1, 2), size)
    torch.testing.assert_close(found[0].flatten().double(), mixing[1 * stages[-1].grid[1] + 2], rtol=1e-4, atol=1e-9)
    assert found.sum().item() == pytest.approx(1, rel=1e-5)


def test_convolution_tokens_have_seen_their_receptive_field_alone():
    model, x = make('t2t_vit_c_14', (64, 64), **SMALL), images(64, 64)
    stages = token_stages(model, x)
    assert all(stage.weights is None for stage in stages)
    torch.testing.assert_close(stages[-1].tokens.flatten(2).transpose(1, 2), model.tokens_to_token(x))
    assert torch.equal(pixel_relevance(stages, (0, 3), (64, 64))[0] > 0, receptive_field((0, 3), (64, 64)) > 0)


# --- Channels ---------------------------------------------------------------------------------------------------------

def test_layers_come_as_maps():
    model, x = make('t2t_vit_7', **SMALL), images(64, 36, count=2)
    maps = layer_maps(model, x, ['tokens_to_token.attention1', 'tokens_to_token', 'blocks.1'])
    assert [tuple(m.shape[1:]) for m in maps.values()] == [(64, 16, 9), (32, 4, 3), (32, 4, 3)]
    torch.testing.assert_close(maps['blocks.1'], model.forward_intermediates(x, [1], intermediates_only=True)[0])
    torch.testing.assert_close(maps['tokens_to_token.attention1'], token_stages(model, x)[0].tokens)
    assert default_layers(model) == ['tokens_to_token.attention1', 'blocks.1']
    vit = make('vit_s_16', (32, 80), **SMALL)
    maps = layer_maps(vit, images(32, 80), default_layers(vit))
    assert [tuple(m.shape) for m in maps.values()] == [(1, 32, 2, 5)] * 2
    resnet = timm.create_model('resnet18')
    assert list(layer_maps(resnet, images(64, 64), ['layer2']).values())[0].shape == (1, 128, 8, 8)


@pytest.mark.parametrize('size', [(20, 20), (20, 30), (48, 20)])
@pytest.mark.parametrize('channels', [3, 10, 20])
def test_maps_are_told_by_their_grid_whatever_comes_last(size, channels):
    class Layers(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = torch.nn.AvgPool2d(2), torch.nn.Identity()

        def forward(self, x):
            return self.last(self.first(x).permute(0, 2, 3, 1))

    model, x = Layers(), torch.rand(2, channels, *size)
    model.output_fmt = 'NHWC'  # says so of its features, and not of every layer
    maps = layer_maps(model, x, ['first', 'last'])
    if (channels, *size) == (10, 20, 20):  # 10 × 10 × 10: nobody could tell
        del maps['first']
    for found in maps.values():
        torch.testing.assert_close(found, model.first(x))


def test_windows_are_not_taken_for_images():
    model = timm.create_model('swin_tiny_patch4_window7_224', depths=(1, 1, 1, 1)).eval()
    with pytest.raises(UserError, match=r"layer 'layers.0.blocks.0.attn' .* gives 64 windows of 1 images, and no map"):
        layer_maps(model, images(224, 224), ['layers.0.blocks.0.attn'])


def test_default_layers_without_maps_are_no_mistake_of_the_user():
    model = make('t2t_vit_7', **SMALL)
    model.feature_info = [{'module': 'head'}]
    with pytest.raises(NotSeen, match=r"layer 'head' .* gives no map of the image but \[1, 5\]; name other layers"):
        layer_features(model, images(32, 32))
    del model.feature_info
    with pytest.raises(NotSeen, match='model t2t_vit_7 does not list its layers'):
        layer_features(model, images(32, 32))


def test_a_layer_that_cannot_be_shown_is_a_users_mistake():
    model, x = make('t2t_vit_7', **SMALL), images(32, 32)
    with pytest.raises(UserError, match=r"'blocks.7' does not exist in model t2t_vit_7; did you mean blocks\.[01]\?"):
        layer_maps(model, x, ['blocks.7'])
    with pytest.raises(UserError, match=r"layer 'head' .* gives no map of the image but \[1, 5\]"):
        layer_maps(model, x, ['head'])


def test_dead_and_saturated_channels():
    values = torch.randn(2, 40, 5, 5, generator=torch.Generator().manual_seed(0))
    values[:, 0] = 0
    values[:, 1] = 3.5  # constant, but not large
    values[:, 2] *= 1e-4
    values[:, 3] += 40
    values[:, 4] = -60  # constant and large
    values[0, 5, 2, 2] = 300  # large at one place
    values[0, 6] = 0  # says nothing of the first image alone
    health = channel_health(values)
    assert health.dead.nonzero().flatten().tolist() == [0, 1, 2]
    assert health.saturated.nonzero().flatten().tolist() == [3, 4]


@pytest.mark.parametrize('share', [0.5, 0.7])
def test_many_dead_channels_do_not_make_the_others_look_right_or_wrong(share):
    values = torch.randn(1, 40, 6, 6, generator=torch.Generator().manual_seed(0))
    values[:, :int(40 * share)] *= 1e-6
    health = channel_health(values)
    assert health.dead.sum() == int(40 * share) and not health.saturated.any()


def test_nothing_is_said_of_channels_with_one_value():
    assert not channel_health(torch.randn(1, 8, 1, 1)).dead.any()
    assert channel_health(torch.zeros(1, 8, 2, 2)).dead.all()


# --- What speaks for a class ------------------------------------------------------------------------------------------

def relevance_by_the_paper(model, x, number, rows):
    """Chefer et al. 2021, equations 5 and 6, with the gradients of attention weights that are kept in the graph."""
    kept = []

    class Explicit(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func is not F.scaled_dot_product_attention:
                return func(*args, **(kwargs or {}))
            q, k, v = args[:3]
            scale = (kwargs or {}).get('scale') or q.shape[-1] ** -0.5
            kept.append((q * scale @ k.mT).softmax(-1))
            kept[-1].retain_grad()
            return kept[-1] @ v

    with Explicit():
        model(x)[0, number].backward()
    blocks = kept[-len(model.blocks):]  # token layers of a Transformer attend too, before the blocks
    relevance = torch.eye(blocks[0].shape[-1])
    for weights in blocks:
        relevance = relevance + (weights.grad * weights).clamp(min=0).mean(1)[0] @ relevance
    return (relevance - torch.eye(len(relevance)))[rows].mean(0)


@pytest.mark.parametrize('name, kwargs', [
    ('t2t_vit_7', {}), ('t2t_vit_t_14', {}), ('t2t_vit_7', {'global_pool': 'avg'}), ('vit_tiny_patch16_224', {}),
])
def test_what_speaks_for_a_class_is_the_published_rollout(name, kwargs):
    model, x = make(name, (48, 64), gain=3, **{**SMALL, 'depth': 3}), images(48, 64)
    if kwargs:  # the classifier sees the mean of the tokens
        model.global_pool = kwargs['global_pool']
    prefix = model.num_prefix_tokens
    rows = slice(prefix, None) if kwargs else slice(0, 1)
    number = model(x)[0].argmax().item()
    expected = {n: relevance_by_the_paper(model, x, n, rows)[prefix:] for n in range(2)}
    model.requires_grad_(False)  # as in scripts; gradients are found all the same
    with torch.no_grad():
        for reason in class_relevance(model, x, [0, 1]):
            torch.testing.assert_close(reason.tokens.flatten(), expected[reason.number], rtol=1e-4, atol=1e-7)
            assert reason.tokens.shape == (3, 4)
        likely = class_relevance(model, x)
    assert likely[0].number == number and likely[0].probability >= likely[1].probability
    assert likely[0].probability == pytest.approx(model(x).softmax(1)[0, number].item(), rel=1e-5)


def test_what_speaks_for_a_class_depends_on_the_class():
    model, x = make('vit_tiny_patch16_224', (32, 48), **SMALL), images(32, 48)
    one, other = class_relevance(model, x, [0, 1])
    assert not torch.equal(one.tokens, other.tokens)
    with torch.no_grad():
        model.head.weight[1] = 0  # nothing that the image holds raises it
    one, other = class_relevance(model, x, [0, 1])
    assert one.tokens.any() and not other.tokens.any()
