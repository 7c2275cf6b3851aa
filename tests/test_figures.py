"""Pictures of a model: what they show, that their texts are readable, and that they fit images of any shape."""
import itertools

import numpy as np
import pytest
import timm
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.text import Text

import models  # noqa: F401, registers the architectures
from figures.attention import attention_figure, check_blocks
from figures.explain import (
    ChannelHealth,
    LayerFeatures,
    class_relevance,
    classifier_attention,
    layer_features,
    token_stages,
)
from figures.features import features_figure
from figures.places import NotSeen
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
    assert any('Attention rollout, class token' in text for text in found)
    assert sum('What speaks for class ' in text for text in found) == 2
    layers = [text for text in found if text.startswith('stage')]
    assert len(layers) == 2 * (2 if size == (32, 32) else 3)
    assert any(('softmax' if 'tokens_type' in kwargs else 'Performer') in text for text in found)


def test_attention_shows_the_values_it_names_where_the_tokens_lie():
    model, (x, picture) = make(), image(48, 64)
    figure = attention_figure(model, x, picture, names=['ant', 'bee', 'cat'], blocks=[1], queries=[(2, 3)])
    panels = {axes.get_title().split('  ')[0]: axes for axes in figure.findobj() if
              hasattr(axes, 'get_images') and axes.get_images()}
    shown = {name: axes.get_images()[-1] for name, axes in panels.items()}
    seen = classifier_attention(model, x)
    drawn = shown['1 · head 3']
    assert drawn.get_array().shape == (48, 64) and drawn.get_extent() == [-0.5, 63.5, 47.5, -0.5]
    expected = seen.blocks[0, 2] / seen.blocks[0, 2].max()
    np.testing.assert_allclose(drawn.get_array()[1::16, 1::16], expected, rtol=1e-5)
    # Token (2, 3) of 3 × 4 has the same centre as token (4, 6) of 6 × 8, and as (8, 12) of 12 × 16: pixel (33, 49).
    for number, token, step in ((0, (8, 12), 4), (1, (4, 6), 8)):
        stage = token_stages(model, x)[number]
        row = stage.weights.rows([token[0] * stage.grid[1] + token[1]])[0].view(stage.grid)
        name = ('stage one, A', 'stage two, A')[number]
        np.testing.assert_allclose(shown[name].get_array()[1::step, 1::step], row / row.max(), rtol=1e-5)
        assert [line.get_xydata().tolist() for line in panels[name].lines] == [[[49, 33]]] * 2
    marked = next(axes for name, axes in panels.items() if name.startswith('The image'))
    assert marked.lines[0].get_xydata().tolist() == [[49, 33]]
    # A class's map is the one that is computed for it, above its name.
    first, second = class_relevance(model, x)
    for reason in (first, second):
        name = f"What speaks for {('ant', 'bee', 'cat')[reason.number]}"
        drawn, = (image for title, image in shown.items() if title.startswith(name))
        np.testing.assert_allclose(drawn.get_array()[1::16, 1::16], reason.tokens / reason.tokens.max(), rtol=1e-4)


def test_the_class_to_explain_can_be_chosen():
    model, (x, picture) = make(), image(48, 64)
    likely = model(x)[0].argsort(descending=True).tolist()
    for target, expected in ((None, likely[:2]), (likely[0], likely[:2]), (likely[2], [likely[2], likely[0]])):
        found = texts(attention_figure(model, x, picture, target=target, names=['ant', 'bee', 'cat']))
        said = [text.split('\n')[0].removeprefix('What speaks for ') for text in found if 'speaks for' in text]
        assert said == [('ant', 'bee', 'cat')[number] for number in expected]


def test_the_photograph_stays_visible_where_little_is_attended_to():
    model, (x, picture) = make(), image(48, 64)
    figure = attention_figure(model, x, picture)
    overlaid = next(axes for axes in figure.findobj(Axes) if len(axes.get_images()) == 2)
    colours = overlaid.get_images()[1]
    assert colours.get_alpha() is None and colours.cmap(0.)[3] == 0 and colours.cmap(1.)[3] <= 0.7


def test_tokens_that_attend_to_nothing_are_named_and_not_drawn():
    model, (x, picture) = make(), image(32, 32)
    with torch.no_grad():
        model.tokens_to_token.attention2.kqv.weight *= 20
    figure = attention_figure(model, x, picture)
    found = texts(figure)
    assert any('attend to nothing' in text and 'stage two, A · stage two, B' in text for text in found)
    assert [text.split('  ')[0] for text in found if text.startswith('stage')] == ['stage one, A', 'stage one, B']
    check_readable(figure)
    with torch.no_grad():
        model.tokens_to_token.attention1.kqv.weight *= 20
    figure = attention_figure(model, x, picture)  # no panel is left
    assert not any(text.startswith('stage') for text in texts(figure))
    check_readable(figure)


def test_attention_of_a_vit_and_of_what_there_is_not():
    figure = attention_figure(make('vit_s_16', img_size=64), *image(64, 64))
    assert not any('stage' in text for text in texts(figure))
    x, picture = image(32, 32)
    for arguments, message in (({'blocks': [3]}, 'block 3 does not exist; the model has blocks 1 to 2'),
                               ({'target': 3}, 'class 3 does not exist; the model has classes 0 to 2'),
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


def test_the_grids_are_drawn_where_the_tokens_lie():
    model, (x, picture) = make(), image(48, 100)
    figure = tokens_figure(model, x, picture, token=(1, 2))
    panels = figure.subfigs[1].axes
    for number, (stage, step, reach) in enumerate(zip(token_stages(model, x), (4, 8, 16), (13, 11, 7.5), strict=True)):
        drawn = panels[number + 3].get_images()[0].get_array()
        assert drawn.shape == (48, 100)
        np.testing.assert_allclose(drawn[1::step, 1::step][:stage.grid[0], :stage.grid[1]], stage.tokens[0].norm(dim=0),
                                   rtol=1e-5)
        # The frame's middle is the token's centre, up to the half pixel of an even number of pixels.
        x0, y0, width, height = panels[number + 3].patches[0].get_bbox().bounds
        assert abs(y0 + height / 2 - 17) <= 0.5 and abs(x0 + width / 2 - 33) <= 0.5, (number, reach)


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
