"""Pictures of a model: what they show, that their texts are readable, and that they fit images of any shape."""
import itertools

import numpy as np
import pytest
import timm
import torch
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.text import Text

import models  # noqa: F401, registers the architectures
from figures.attention import attention_figure, check_blocks
from figures.explain import ChannelHealth, LayerFeatures, NotSeen, classifier_attention, layer_features, token_stages
from figures.features import features_figure
from figures.tokens import main_components, tokens_figure
from utils.errors import UserError
from utils.pictures import BLUE, ORANGE, to_array

SMALL = {'embed_dim': 32, 'depth': 2, 'num_heads': 4, 'num_classes': 3}


def make(name='t2t_vit_7', **kwargs):
    torch.manual_seed(0)
    return timm.create_model(name, **{**SMALL, 'img_size': 32, **kwargs}).eval()


def image(height, width):
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    return torch.from_numpy(picture).permute(2, 0, 1)[None] / 128 - 1, picture


def all_texts(figure: Figure) -> list[Text]:
    """Everything that is written in a figure but the numbers of its scales."""
    found = [text for part in (figure, *figure.subfigs) for text in (*part.texts, part._suptitle) if text]
    for axes in figure.axes:
        found += [axes.title, *axes.texts, axes.yaxis.label]
    for legend in figure.legends:
        found += legend.get_texts()
    return [text for text in dict.fromkeys(found) if text.get_text()]


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in all_texts(figure)]


def check_readable(figure: Figure) -> None:
    """No text lies over another or beyond the edge, and there is more in the picture than white."""
    pixels = to_array(figure)
    assert pixels.std() > 10
    boxes = [(text.get_text(), text.get_window_extent(figure.canvas.get_renderer())) for text in all_texts(figure)]
    assert boxes
    for text, box in boxes:
        inside = box.x0 > -2 and box.y0 > -2 and box.x1 < pixels.shape[1] + 2 and box.y1 < pixels.shape[0] + 2
        assert inside, f'{text!r} at {box} in {pixels.shape}'
    for (one, box), (other, its_box) in itertools.combinations(boxes, 2):
        width = min(box.x1, its_box.x1) - max(box.x0, its_box.x0)
        height = min(box.y1, its_box.y1) - max(box.y0, its_box.y0)
        assert width < 2 or height < 2, f'{one!r} and {other!r} overlap'


@pytest.mark.parametrize('size, kwargs', [
    ((32, 32), {}),
    ((64, 112), {'tokens_type': 'transformer', 'depth': 4, 'num_heads': 2}),
    ((112, 48), {'depth': 5}),
], ids=['two by two tokens', 'wide', 'tall'])
def test_attention(size, kwargs):
    model, (x, picture) = make(**kwargs), image(*size)
    figure = attention_figure(model, x, picture, title='cat $1 · dog_$')
    check_readable(figure)
    found = texts(figure)
    depth, heads = len(model.blocks), model.blocks[0].attn.num_heads
    blocks = {2: [2], 4: [4], 5: [4, 5]}[depth]
    assert sum(text.startswith('block ') for text in found) == depth
    assert sum(' · head ' in text for text in found) == len(blocks) * heads
    assert any(f'all {depth} blocks, class token' in text for text in found)
    layers = [text for text in found if text.startswith('stage')]
    assert len(layers) == 2 * (2 if size == (32, 32) else 3)
    assert any(('softmax' if 'tokens_type' in kwargs else 'Performer') in text for text in found)


def test_attention_shows_the_values_it_names():
    model, (x, picture) = make(), image(48, 64)
    figure = attention_figure(model, x, picture, blocks=[1], queries=[(2, 3)])
    shown = {axes.get_title().split('  ')[0]: axes.get_images()[-1] for axes in figure.findobj() if
             hasattr(axes, 'get_images') and axes.get_images()}
    seen = classifier_attention(model, x)
    expected = seen.blocks[0, 2] / seen.blocks[0, 2].max()
    np.testing.assert_allclose(shown['1 · head 3'].get_array(), expected, rtol=1e-5)
    assert shown['1 · head 3'].get_extent() == [-0.5, 63.5, 47.5, -0.5]
    # Token (2, 3) of 3 × 4 has its middle on token (5, 7) of 6 × 8.
    rows = token_stages(model, x)[1].weights.rows([5 * 8 + 7])[0].view(6, 8)
    np.testing.assert_allclose(shown['stage two, A'].get_array(), rows / rows.max(), rtol=1e-5)


def test_tokens_that_attend_to_nothing_are_not_drawn_as_if_they_did():
    model, (x, picture) = make(), image(32, 32)
    with torch.no_grad():
        model.tokens_to_token.attention2.kqv.weight *= 20
    figure = attention_figure(model, x, picture)
    assert sum('nothing (sum 0)' in text for text in texts(figure)) == 2
    check_readable(figure)


def test_attention_of_a_vit_and_of_what_there_is_not():
    figure = attention_figure(make('vit_s_16', img_size=64), *image(64, 64))
    assert not any('stage' in text for text in texts(figure))
    x, picture = image(32, 32)
    for arguments, message in (({'blocks': [3]}, 'block 3 does not exist; the model has blocks 1 to 2'),
                               ({'queries': [(0, 2)]}, 'token 0 2 does not exist; .* columns 0 to 1')):
        with pytest.raises(UserError, match=message):
            attention_figure(make(), x, picture, **arguments)
    with pytest.raises(NotSeen, match='resnet18'):
        attention_figure(timm.create_model('resnet18'), x, picture)
    assert (check_blocks(None, 14), check_blocks(None, 4), check_blocks(None, 3)) == ([4, 5], [4], [3])


@pytest.mark.parametrize('name, size', [('t2t_vit_7', (32, 32)), ('t2t_vit_7', (48, 100)), ('t2t_vit_c_14', (96, 64))])
def test_tokens(name, size):
    model, (x, picture) = make(name), image(*size)
    figure = tokens_figure(model, x, picture, title='cat')
    check_readable(figure)
    found = '\n'.join(texts(figure))
    for stage in token_stages(model, x):
        assert f'{stage.grid[0]} × {stage.grid[1]} tokens of {stage.tokens.shape[1]} channels' in found
    assert f'{size[0] // 4} × {size[1] // 4} patches of 7 × 7 pixels' in found
    assert ('which are global' in found) == (name == 't2t_vit_7')


def test_patches_are_padded_with_the_mean_colour():
    model, (x, picture) = make(), image(32, 32)
    model.pretrained_cfg = {'mean': (0.2, 0.4, 0.6)}
    sheet = tokens_figure(model, x, picture).subfigs[0].axes[1].get_images()[0].get_array()
    assert (sheet[:2, :7] == (51, 102, 153)).all() and (sheet[2:7, :2] == (51, 102, 153)).all()
    np.testing.assert_array_equal(sheet[2:7, 2:7], picture[:5, :5])


def test_a_token_at_the_corner_has_a_clipped_field():
    model, (x, picture) = make(), image(64, 64)
    assert any('17 × 17 pixels' in text for text in texts(tokens_figure(model, x, picture, token=(0, 0))))
    with pytest.raises(UserError, match='token 4 0 does not exist; the last grid has rows 0 to 3'):
        tokens_figure(model, x, picture, token=(4, 0))


def test_main_components_tell_tokens_apart():
    tokens = torch.zeros(8, 4, 6)
    tokens[:, :2] = torch.arange(8.).view(8, 1, 1)  # two kinds of token, in halves
    colours = main_components(tokens)
    assert colours.shape == (4, 6, 3) and (colours >= 0).all() and (colours <= 1).all()
    assert abs(colours[0, 0] - colours[3, 0]).max() == pytest.approx(1)
    np.testing.assert_allclose(colours[:2], np.broadcast_to(colours[0, 0], (2, 6, 3)))
    assert main_components(torch.randn(8, 1, 2)).shape == (1, 2, 3)  # fewer tokens than components
    assert np.isfinite(main_components(torch.ones(2, 3, 3))).all()


def test_features_frame_what_says_nothing():
    maps = torch.randn(2, 12, 4, 4, generator=torch.Generator().manual_seed(0))
    dead, saturated = torch.zeros(12, dtype=torch.bool), torch.zeros(12, dtype=torch.bool)
    dead[[1, 5, 6]] = saturated[7] = True
    layer = LayerFeatures('blocks.0', maps, ChannelHealth(dead, saturated))
    figure = features_figure({'one': [layer, layer], 'other': [layer]}, index=1)
    check_readable(figure)
    first = figure.axes[0]
    frames = [to_hex(patch.get_edgecolor()).upper() for patch in first.patches]
    assert frames.count(ORANGE) == 3 and frames.count(BLUE) == 1
    np.testing.assert_array_equal(first.get_images()[2].get_array(), maps[1, 2])
    assert '25.0 % dead, 8.3 % saturated of 12 channels' in first.get_title()
    assert 'dead: the same everywhere in 2 images' in [text.get_text() for text in figure.legends[0].get_texts()]


def test_features_of_models_side_by_side():
    x, _ = image(64, 48)
    one, other = make(), timm.create_model('resnet18').eval()
    check_readable(features_figure({'t2t_vit_7': layer_features(one, x), 'resnet18 (random weights)':
                                    layer_features(other, x)}, title='a long name ' * 9))
    alone = features_figure({'t2t_vit_7': layer_features(one, x, ['blocks.0'])})
    check_readable(alone)
    assert 't2t_vit_7' in texts(alone)
