"""Where tokens lie in an image: the fields and centres that the gradient of a token with respect to the pixels has."""
import numpy as np
import pytest
import timm
import torch
from torch import nn

import models  # noqa: F401, registers the architectures
from figures.places import Line, NotSeen, Places, split_places, token_places
from models.tokens_to_token import SOFT_SPLITS


def make(name, size, **kwargs):
    torch.manual_seed(0)
    return timm.create_model(name, img_size=size, **kwargs).eval().double()


def without_norms(module: nn.Module) -> None:
    """Remove what makes each token depend on the whole image, or sets gradients to 0: norms and what follows them."""
    for name, child in module.named_children():
        if isinstance(child, nn.GroupNorm | nn.BatchNorm2d | nn.LayerNorm):
            setattr(module, name, nn.Identity())
        else:
            without_norms(child)


def check_fields(tokens: torch.Tensor, image: torch.Tensor, places: Places) -> None:
    """Every token of [1, N, C] depends on exactly the pixels of its field, cut at the edges of the image."""
    rows, columns = places.grid
    assert tokens.shape[1] == rows * columns
    for row in range(rows):
        for column in range(columns):
            gradient, = torch.autograd.grad(tokens[0, row * columns + column].sum(), image, retain_graph=True)
            seen = gradient[0].abs().sum(0) > 0
            for axis, (line, k) in enumerate(((places.rows, row), (places.columns, column))):
                where = seen.any(1 - axis).nonzero().flatten()
                reach = (line.field - 1) / 2
                edges = max(line.centre(k) - reach, 0), min(line.centre(k) + reach, image.shape[2 + axis] - 1)
                assert (where[0], where[-1]) == edges, (row, column, axis)


@pytest.mark.parametrize('name, size, kwargs, first, step, field', [
    ('vit_s_16', (48, 80), {'depth': 1}, 7.5, 16, 16),
    ('vit_tiny_patch16_224', (64, 32), {'depth': 1}, 7.5, 16, 16),
    ('vit_small_patch14_dinov2', (42, 70), {'depth': 1}, 6.5, 14, 14),
    ('vit_small_resnet26d_224', (224, 32), {'depth': 1}, 0, 32, 199),
    ('vit_tiny_r_s16_p8_224', (96, 128), {'depth': 1}, 17, 32, 39),  # its padding is TensorFlow's
    ('vitamin_small_224', (96, 32), {}, 0, 16, 91),
])
def test_patches_lie_where_their_gradients_do(name, size, kwargs, first, step, field):
    model = make(name, size, **kwargs)
    image = torch.randn(1, 3, *size, dtype=torch.float64).requires_grad_()
    places = token_places(model, image)
    assert places.rows == Line(size[0] // step, first, step, field)
    assert places.columns == Line(size[1] // step, first, step, field)
    without_norms(model.patch_embed)
    tokens = model.patch_embed(image)
    check_fields(tokens.flatten(1, -2) if tokens.shape[-1] == model.embed_dim else tokens.flatten(2).mT, image, places)


@pytest.mark.parametrize('size', [(48, 80), (50, 33)])
@pytest.mark.parametrize('name, kwargs', [
    ('t2t_vit_7', {}), ('t2t_vit_t_14', {}), ('t2t_vit_c_14', {}), ('t2t_vit_14_se', {}),
])
def test_tokens_lie_where_their_gradients_do(name, kwargs, size):
    model = make(name, size, depth=1, **kwargs)
    module = model.tokens_to_token
    for layer in ('attention1', 'attention2'):  # lets every token see the whole image by its attention; without:
        if hasattr(module, layer):
            part = getattr(module, layer)
            nn.init.zeros_(getattr(part, 'attn', part).proj.weight)
    image = torch.randn(1, 3, *size, dtype=torch.float64).requires_grad_()
    places = token_places(model, image)
    assert (places.rows.first, places.rows.step, places.rows.field) == (1, 16, 31)
    check_fields(module(image), image, places)


def test_the_stages_of_soft_splits_lie_where_their_gradients_do():
    size = (40, 64)
    image = torch.randn(1, 3, *size, dtype=torch.float64).requires_grad_()
    tokens = image
    for split, places, (step, field) in zip(SOFT_SPLITS, split_places(size), ((4, 7), (8, 15), (16, 31)), strict=True):
        assert (places.rows.first, places.rows.step, places.rows.field) == (1, step, field)
        patches = nn.Unfold(*split[:1], stride=split[1], padding=split[2])(tokens)
        check_fields(patches.mT, image, places)
        tokens = patches.unflatten(2, places.grid)


def test_tokens_of_coarse_grids_are_those_of_finer_ones():
    first, second, last = split_places((80, 112))
    for row in range(last.rows.count):
        for column in range(last.columns.count):
            centre = last.centre((row, column))
            assert centre == (16 * row + 1, 16 * column + 1)
            assert second.nearest(centre) == (2 * row, 2 * column) and first.nearest(centre) == (4 * row, 4 * column)
    assert last.nearest((79, 0)) == (4, 0) and last.nearest((-9, 500)) == (0, 6)


def test_values_are_spread_over_the_pixels_around_the_centres():
    places = Places(Line(2, 1, 16, 31), Line(3, 7.5, 16, 16))
    values = np.arange(6.).reshape(2, 3)
    smooth = places.spread(values, (32, 48))
    assert smooth.shape == (32, 48)
    np.testing.assert_allclose(smooth[:2, :8], 0)
    np.testing.assert_allclose(smooth[9, 7], 1.5)  # in the middle between the centres of 0 and 3
    np.testing.assert_allclose(smooth[17:, 40:], 5)  # beyond the outermost centres
    np.testing.assert_allclose(smooth[1, 8:40], np.linspace(0.03125, 1.96875, 32))
    near = places.spread(values, (32, 48), smooth=False)
    assert (near[:9, :16] == 0).all() and (near[9:, :16] == 3).all() and (near[9:, 16:32] == 4).all()
    colours = places.spread(np.stack([values, values + 1], 2), (32, 48))
    np.testing.assert_allclose(colours[..., 1] - colours[..., 0], 1)
    np.testing.assert_allclose(colours[..., 0], smooth)


def test_a_model_without_a_grid_says_so():
    with pytest.raises(NotSeen, match='resnet18 has no attention that can be shown'):
        token_places(timm.create_model('resnet18'), torch.zeros(1, 3, 64, 64))
