"""Tests of models/ablations.py: parity with the authors' code, published sizes, and each design's own arithmetic.

    python -m pytest tests/test_ablations.py

The parity test needs the golden data; see tests/golden.py. What every model shares is in tests/test_timm.py.
"""
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from models import T2TViT, T2TViTDense, create_model, load_weights
from models.ablations import (
    CheapOperation,
    ConvolutionTokens,
    DenseBlock,
    GhostAttention,
    GhostBlock,
    GhostMlp,
    SEAttention,
    SEBlock,
    SEViTBlock,
    SqueezeExcitation,
    Transition,
)
from models.layers import Attention, Block
from models.tokens_to_token import token_grid
from tests.golden import GOLDEN, assert_golden, gmacs
from utils.errors import UserError

# Parameters of everything and MACs / 1e9 by our count; then Tables 6 and 7 of the paper, in millions and / 1e9.
SIZES = {
    't2t_vit_14_se': (21_803_598, 4.78, 21.9, 4.9),
    't2t_vit_dense': (23_647_062, 5.28, 23.7, 5.5),
    't2t_vit_16_ghost': (16_253_262, 3.80, 16.3, 3.7),
    't2t_vit_c_14': (21_421_992, 4.59, 21.3, 4.6),
    'vit_s_16': (48_754_408, 9.89, 48.6, 10.1),
    'vit_se': (49_344_232, 9.89, 49.2, 10.2),
    'vit_dn': (24_405_352, 5.18, 24.5, 5.5),
}
# Where the published parameters are those of the layers alone, without class token and position embedding.
LAYERS_ALONE = ('t2t_vit_c_14', 'vit_s_16', 'vit_se')


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(42)
    print('seed 42')  # shown by pytest when a test fails


def tiny_dense(**kwargs) -> T2TViTDense:
    """Two stages of 16 → 24 → 32, 16 → 24 channels with a transition between them."""
    defaults = {'img_size': 64, 'num_classes': 5, 'embed_dim': 16, 'num_heads': 2, 'growth_rate': 8,
                'block_config': (2, 1)}
    return timm.create_model('t2t_vit_dense', **{**defaults, **kwargs}).eval()


# --- The published architectures --------------------------------------------------------------------------------------

def test_registration():
    assert set(timm.list_models(module='ablations')) == set(SIZES)
    assert not set(timm.list_models(module='ablations')) & set(timm.list_models(module='vision_transformer'))
    with pytest.raises(UserError, match='no weights of t2t_vit_dense were published'):
        create_model('t2t_vit_dense', pretrained=True)  # none were released


@pytest.mark.skipif(not GOLDEN.exists(), reason=f'no golden data at {GOLDEN}; set T2T_SHARED to its folder')
@pytest.mark.parametrize('name', ['t2t_vit_14_se', 't2t_vit_dense', 't2t_vit_16_ghost'])
def test_outputs_and_gradients_are_those_of_the_authors_code(name):
    assert_golden(name)


@pytest.mark.parametrize('name', SIZES)
def test_sizes(name):
    total, our_gmacs, published_millions, published_gmacs = SIZES[name]
    with torch.device('meta'):
        model = timm.create_model(name)
    assert sum(tensor.numel() for tensor in model.state_dict().values()) == total
    assert round(gmacs(name, 224), 2) == our_gmacs
    # The paper's own parameters and MACs of the other rows agree with no way of counting for all of them.
    assert total / 1e6 == pytest.approx(published_millions, rel=0.006)
    assert our_gmacs == pytest.approx(published_gmacs, rel=0.06)
    if name in LAYERS_ALONE:
        layers = total - model.cls_token.numel() - model.pos_embed.numel()
        assert round(layers / 1e6, 1) == published_millions


@pytest.mark.parametrize('name, dim, depth, heads', [('vit_s_16', 768, 8, 8), ('vit_se', 768, 8, 8),
                                                     ('vit_dn', 384, 16, 6)])
def test_vision_transformers(name, dim, depth, heads):
    model = timm.create_model(name, img_size=(64, 96))
    assert model.patch_embed.patch_size == (16, 16) and model.patch_embed.grid_size == (4, 6)
    assert (model.embed_dim, len(model.blocks), model.global_pool) == (dim, depth, 'token')
    for block in model.blocks:
        assert block.attn.num_heads == heads and block.attn.qkv.bias is None
        assert block.mlp.fc1.out_features == 3 * dim and block.norm1.eps == block.norm2.eps == 1e-6
        assert isinstance(block.ls1, SqueezeExcitation if name == 'vit_se' else nn.Identity)


@pytest.mark.parametrize('name', SIZES)
def test_initialisation(name):
    """Truncated normal 0.02 for the linear layers of the new parts too; convolutions as torch makes them."""
    model = timm.create_model(name, img_size=64)
    for key, module in model.named_modules():
        if isinstance(module, nn.Linear):
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.1), key
            assert module.bias is None or not module.bias.any(), key
        elif isinstance(module, CheapOperation):
            assert -1 <= module.weight.min() < -0.9 and 0.9 < module.weight.max() <= 1, key


# --- Squeeze-excitation -----------------------------------------------------------------------------------------------

def squeeze_excitation(x: torch.Tensor, layer: SqueezeExcitation) -> torch.Tensor:
    """The formula, image by image."""
    first, second = layer.fc[0].weight, layer.fc[2].weight
    return torch.stack([image * torch.sigmoid(second @ torch.relu(first @ image.mean(0))) for image in x])


def test_squeeze_excitation():
    layer, tokens = SqueezeExcitation(64), torch.randn(3, 7, 64)
    assert layer.fc[0].weight.shape == (4, 64) and layer.fc[0].bias is layer.fc[2].bias is None
    torch.testing.assert_close(layer(tokens), squeeze_excitation(tokens, layer))


def test_squeeze_excitation_follows_the_projection():
    tokens = torch.randn(3, 7, 64)
    attention, plain = SEAttention(64, 4), Attention(64, 4)
    plain.load_state_dict(attention.state_dict(), strict=False)
    torch.testing.assert_close(attention(tokens), squeeze_excitation(plain(tokens), attention.se_layer))

    block = SEViTBlock(64, 4, qkv_bias=False)
    plain = timm.models.vision_transformer.Block(64, 4, qkv_bias=False)
    plain.load_state_dict(block.state_dict(), strict=False)
    x = tokens + squeeze_excitation(plain.attn(plain.norm1(tokens)), block.ls1)
    torch.testing.assert_close(block(tokens), x + plain.mlp(plain.norm2(x)))


# --- Ghost operations -------------------------------------------------------------------------------------------------

def depthwise(tokens: torch.Tensor, operation: CheapOperation) -> torch.Tensor:
    """The published form: a depth-wise convolution over single tokens, its weights taken as they are."""
    dim = tokens.shape[2]
    convolution = nn.Conv1d(dim, dim, kernel_size=1, groups=dim, bias=False)
    convolution.load_state_dict(operation.state_dict())
    return convolution(tokens.transpose(1, 2)).transpose(1, 2)


@pytest.mark.parametrize('heads', [2, 3])  # of 3 heads the second is half computed, half copied
def test_ghost_attention(heads):
    attention, tokens = GhostAttention(12, heads), torch.randn(2, 5, 12)
    parts = []
    for name in 'qkv':
        half = getattr(attention, name)(tokens)
        whole = torch.cat((half, depthwise(half, getattr(attention, f'cheap_operation_{name}'))), dim=2)
        parts.append(whole.split(12 // heads, dim=2))
    outputs = [torch.softmax(q @ k.transpose(1, 2) / (12 // heads) ** 0.5, dim=2) @ v
               for q, k, v in zip(*parts, strict=True)]
    torch.testing.assert_close(attention(tokens), attention.proj(torch.cat(outputs, dim=2)))


def test_ghost_mlp():
    mlp, tokens = GhostMlp(6), torch.randn(2, 5, 6)
    hidden = F.gelu(mlp.fc1(tokens))
    copies = [F.gelu(depthwise(hidden, mlp.cheap_operation2)), F.gelu(depthwise(hidden, mlp.cheap_operation3))]
    torch.testing.assert_close(mlp(tokens), mlp.fc2(torch.cat((hidden, *copies), dim=2)))


def test_ghost_mlp_drops_hidden_channels_and_outputs():
    mlp, tokens = GhostMlp(64, drop=0.5), torch.randn(2, 5, 64)
    seen = []
    mlp.fc2.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    for values in (mlp(tokens), seen[0]):
        assert (values == 0).float().mean().item() == pytest.approx(0.5, abs=0.1)
    assert mlp.eval()(tokens).all() and seen[1].all()


def test_cheap_operations_keep_the_precision_of_autocast():
    operation = CheapOperation(6)
    with torch.autocast('cpu', torch.bfloat16):
        assert operation(torch.randn(2, 5, 6, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize('arguments, message', [((12, 2, 4.), 'mlp_ratio is 4.0; .* give 3'),
                                                ((15, 3, 3.), '15 is not divisible .* by 2'),
                                                ((12, 5, 3.), '12 is not divisible by num_heads 5')])
def test_ghost_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        GhostBlock(*arguments)
    if 'mlp_ratio' not in message:
        with pytest.raises(ValueError, match=message):
            GhostAttention(*arguments[:2])


# --- Dense connections ------------------------------------------------------------------------------------------------

def test_dense_block():
    block, tokens = DenseBlock(8, 16, 2, 2.), torch.randn(2, 5, 16)
    plain = Block(16, 2, 2.)
    plain.load_state_dict(block.state_dict(), strict=False)
    out = block(tokens)
    assert torch.equal(out[..., :16], tokens)
    torch.testing.assert_close(out[..., 16:], block.dense_linear(plain(tokens)))

    transition = Transition(16)
    torch.testing.assert_close(transition(tokens), F.gelu(transition.linear(tokens)))
    assert transition(tokens).shape == (2, 5, 8)


def test_dense_widths():
    model, images = tiny_dense(), torch.randn(2, 3, 64, 80)
    assert [info['num_chs'] for info in model.feature_info] == [24, 32, 16, 24]
    assert isinstance(model.blocks[2], Transition)
    assert (model.embed_dim, model.num_features, model.head_hidden_size) == (16, 24, 24)
    assert model.forward_features(images).shape == (2, 21, 24)

    with torch.device('meta'):
        published = timm.create_model('t2t_vit_dense')
    assert (published.embed_dim, published.num_features) == (128, 584)
    published.reset_classifier(10)
    assert published.head.weight.shape == (10, 584)


@pytest.mark.parametrize('aux_head', [False, True])
def test_dense_classifiers_have_the_final_width(aux_head):
    model, images = tiny_dense(aux_head=aux_head), torch.randn(2, 3, 64, 64)
    assert model(images).shape == (2, 5)
    model.reset_classifier(7, 'avg')
    assert model(images).shape == (2, 7)
    assert model.head.weight.std().item() == pytest.approx(0.02, rel=0.2)
    assert tiny_dense(num_classes=0)(images).shape == (2, 24)


def test_dense_stages_share_a_drop_path_rate():
    model = timm.create_model('t2t_vit_dense', drop_path_rate=0.3, device='meta')
    rates = [getattr(block.drop_path, 'drop_prob', 0.) for block in model.blocks if isinstance(block, DenseBlock)]
    assert rates == pytest.approx([0.] * 3 + [0.1] * 6 + [0.2] * 6 + [0.3] * 4)


def test_dense_intermediates_are_normalised_where_they_fit():
    model, images = tiny_dense(), torch.randn(2, 3, 64, 64)
    nn.init.constant_(model.norm.bias, 3.)
    final, outputs = model.forward_intermediates(images, norm=True, output_fmt='NLC')
    plain = model.forward_intermediates(images, output_fmt='NLC', intermediates_only=True)
    assert torch.equal(outputs[-1], final[:, 1:]) and not torch.equal(outputs[-1], plain[-1])
    assert all(map(torch.equal, outputs[1:-1], plain[1:-1]))  # 32 and 16 channels; the norm has 24
    final, outputs = model.forward_intermediates(images, [1], norm=True, stop_early=True)
    assert final.shape == (2, 17, 32) and outputs[0].shape == (2, 32, 4, 4)


@pytest.mark.parametrize('last, width', [(0, 24), (1, 32), (2, 16)])
def test_pruned_dense_model(last, width):
    model, images = tiny_dense(), torch.randn(2, 3, 64, 64)
    expected = model.forward_intermediates(images, [last], output_fmt='NLC', intermediates_only=True)[0]
    assert model.prune_intermediate_layers([last]) == [last]
    assert model.num_features == model.head_hidden_size == width and len(model.blocks) == last + 1
    torch.testing.assert_close(model(images)[:, 1:], expected)
    model.reset_classifier(3, 'avg')
    assert model(images).shape == (2, 3)


def test_whole_dense_model_keeps_norm_and_head():
    model = tiny_dense()
    assert model.prune_intermediate_layers([3], prune_head=False) == [3]
    assert isinstance(model.norm, nn.LayerNorm) and model(torch.randn(2, 3, 64, 64)).shape == (2, 5)


def test_dense_weights_move_to_another_size_and_data_set(tmp_path):
    model = tiny_dense()
    torch.save(model.state_dict(), tmp_path / 'dense.pth')
    other = tiny_dense(img_size=96, num_classes=7)
    load_weights(other, tmp_path / 'dense.pth', replace_head=True)
    assert other.pos_embed.shape == (1, 37, 16) and other(torch.randn(2, 3, 96, 96)).shape == (2, 7)
    assert torch.equal(other.blocks[3].dense_linear.weight, model.blocks[3].dense_linear.weight)


# --- Convolution tokens -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize('size', [(64, 64), (65, 47), (16, 33)])
def test_convolution_tokens(size):
    module, images = ConvolutionTokens('convolution', 2, 6, 4), torch.randn(3, 2, *size)
    tokens = module(images)
    rows, columns = token_grid(*size)
    assert tokens.shape == (3, rows * columns, 6)
    x = images
    splits = ((module.soft_split0, 4, 2), (module.soft_split1, 2, 1), (module.project, 2, 1))
    for convolution, stride, padding in splits:
        x = F.conv2d(x, convolution.weight, convolution.bias, stride, padding)
    assert [tuple(convolution.weight.shape) for convolution in module.children()] == [
        (4, 2, 7, 7), (4, 4, 3, 3), (6, 4, 3, 3)]
    torch.testing.assert_close(tokens[:, columns * (rows - 1)], x[:, :, -1, 0])  # row by row
    torch.testing.assert_close(tokens[:, columns - 1], x[:, :, 0, -1])


def test_convolution_tokens_have_no_token_layers():
    with pytest.raises(ValueError, match="tokens_type is 'performer'; .* give 'convolution'"):
        T2TViT(img_size=64, tokens_fn=ConvolutionTokens)


# --- Randomness in training -------------------------------------------------------------------------------------------

@pytest.mark.parametrize('block_fn, mlp_ratio', [(SEBlock, 3.), (GhostBlock, 3.)])
@pytest.mark.parametrize('argument', ['drop', 'attn_drop', 'drop_path'])
def test_random_layers(block_fn, mlp_ratio, argument):
    block, tokens = block_fn(32, 2, mlp_ratio, **{argument: 0.5}), torch.randn(64, 5, 32)
    assert not torch.equal(block(tokens), block(tokens))
    assert torch.equal(block.eval()(tokens), block(tokens))
    assert (block.attn.attn_drop_rate, block.attn.proj_drop.p) == (
        0.5 if argument == 'attn_drop' else 0., 0.5 if argument == 'drop' else 0.)


def test_norms_and_activations_are_those_asked_for():
    def norm_layer(dim: int, **kwargs) -> nn.Module:
        return nn.LayerNorm(dim, eps=1e-3, **kwargs)

    arguments = {'img_size': 64, 'norm_layer': norm_layer, 'act_layer': nn.ReLU}
    for model in (tiny_dense(**arguments), timm.create_model('t2t_vit_16_ghost', depth=1, **arguments),
                  timm.create_model('t2t_vit_14_se', depth=1, **arguments)):
        norms = [module for module in [model.norm, *model.blocks.modules()] if isinstance(module, nn.LayerNorm)]
        assert {norm.eps for norm in norms} == {1e-3}
        activations = [module.act for module in model.blocks.modules() if hasattr(module, 'act')]
        assert activations and all(isinstance(activation, nn.ReLU) for activation in activations)
