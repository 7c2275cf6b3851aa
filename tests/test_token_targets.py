"""data/token_targets.py: the targets are those of the published code, or lie where the tokens of a crop look."""
import numpy as np
import pytest
import torch
from timm.loss import SoftTargetCrossEntropy

from data.token_targets import WHOLE, add_truth, certain_map, crop_targets, draw_box, exchange
from tests.golden import SHARED

GOLDEN = SHARED / 'golden' / 'token_labels.npz'
GRID = (14, 14)
SEED = 5
needs_golden = pytest.mark.skipif(not GOLDEN.exists(), reason=f'no golden data at {GOLDEN}')


@pytest.fixture(scope='module')
def golden():
    content = {name: torch.from_numpy(values) for name, values in np.load(GOLDEN).items()}
    content['maps'] = torch.stack((content['scores'], content['classes'].half()), dim=1)
    return content


@needs_golden
@pytest.mark.parametrize(('name', 'transposed'), [('published', True), ('straight', False)])
@pytest.mark.parametrize('images', [slice(None), slice(2, 3)], ids=['batch', 'one image'])
def test_targets_are_those_of_the_published_code(golden, name, transposed, images):
    image, tokens = crop_targets(golden['maps'][images], golden['coords'][images], num_classes=20, grid=GRID,
                                 transposed=transposed)
    expected = golden[name][images]  # ground truth, image, tokens
    torch.testing.assert_close(image, expected[:, :, 1], rtol=0, atol=1e-6)
    torch.testing.assert_close(tokens, expected[:, :, 2:].transpose(1, 2), rtol=0, atol=1e-6)


@needs_golden
@pytest.mark.parametrize('box', ['mixed', 'whole'])
@pytest.mark.parametrize('kind', ['plain', 'half', 'truth'])
def test_losses_are_those_of_the_published_code(golden, kind, box):
    image, tokens = crop_targets(golden['maps'], golden['coords'], num_classes=20, grid=GRID, transposed=True)
    if kind == 'truth':
        image = add_truth(image, golden['truth'].long())
    targets = exchange(image, tokens, golden['box'].tolist() if box == 'mixed' else (0, 0, 0, 0), GRID)
    cross_entropy, dense_weight = SoftTargetCrossEntropy(), 0.5 if kind == 'half' else 1.0
    loss = cross_entropy(golden['logits'], targets.image)
    loss += dense_weight * cross_entropy(golden['aux'].flatten(0, 1), targets.tokens.flatten(0, 1))
    assert loss.item() == pytest.approx(golden[f'loss/{kind}/{box}'].item(), abs=1e-6)


def ramp(rows, columns, slope):
    """A label map whose score of class 1 rises linearly over the image: slope · (y, x) in shares of it, from 0."""
    y = (torch.arange(rows) + 0.5)[:, None] / rows * slope[0]
    x = (torch.arange(columns) + 0.5) / columns * slope[1]
    scores = torch.stack((y + x, torch.zeros(rows, columns)))
    classes = torch.tensor([1., 2.]).view(2, 1, 1).expand_as(scores)
    return torch.stack((scores, classes)).half()


def scores_of(tokens):
    """What softmax made probabilities of, for class 1 beside zeros."""
    return (tokens[..., 1] / tokens[..., 0]).log()


def test_a_crop_of_less_than_a_position_has_labels_from_within():
    maps, box = ramp(4, 4, (2., 1.))[None], (0.4, 0.45, 0.12, 0.15)
    _, tokens = crop_targets(maps, torch.tensor([box]), num_classes=5, grid=(2, 3), smoothing=0.)
    y, x = (start + length * (torch.arange(count) + 0.5) / count
            for start, length, count in zip(box[:2], box[2:], (2, 3), strict=True))
    torch.testing.assert_close(scores_of(tokens).view(2, 3), (2 * y)[:, None] + x, rtol=0, atol=2e-3)


@pytest.mark.parametrize('flipped', [False, True])
@pytest.mark.parametrize('box', [(0., 0., 1., 1.), (0.25, 0.125, 0.5, 0.75), (0.5, 0.25, 0.4, 0.3)], ids=str)
@pytest.mark.parametrize('first', [1., 7.5])
def test_a_token_has_the_label_at_its_own_pixel(box, first, flipped):
    """First: the pixel of the crop, 96 × 128, at the centre of token 0; token k is at first + 16 k."""
    size, grid = (96, 128), (6, 8)
    window = tuple((first + 0.5 - 8 + end) / side for end, side in ((0, 96), (0, 128), (96, 96), (128, 128)))
    maps = ramp(24, 16, (2., 1.))[None]
    maps = maps.flip(4) if flipped else maps
    _, tokens = crop_targets(maps, torch.tensor([box]), num_classes=5, grid=grid, smoothing=0., window=window)
    top, left, height, width = box
    y, x = (start + (first + 0.5 + 16 * torch.arange(count)) / side * length
            for start, length, side, count in zip((top, left), (height, width), size, grid, strict=True))
    expected = (2 * y)[:, None] + (1 - x if flipped else x)
    found = scores_of(tokens).view(grid)
    # Beyond the middles of its outermost cells a map is constant.
    inside = slice(1, -1) if box == WHOLE else slice(None)
    torch.testing.assert_close(found[inside, inside], expected[inside, inside], rtol=0, atol=2e-3)


def test_tokens_at_the_edge_have_the_outermost_labels():
    """The cell of a T2T token at the upper left lies to 40 % outside of the image."""
    maps = torch.stack((torch.full((1, 32, 32), 3.), torch.full((1, 32, 32), 4.))).half()[None]
    window = (-6.5 / 224, -6.5 / 224, 217.5 / 224, 217.5 / 224)
    for beyond in (window, (0, 0, 1.1, 1.3)):
        _, tokens = crop_targets(maps, torch.tensor([[0., 0., 1., 1.]]), num_classes=6, grid=GRID, window=beyond)
        torch.testing.assert_close(tokens, tokens[:, 100:101].expand_as(tokens))
        assert tokens[0, 0].argmax() == 4


def test_the_widened_map_changes_nothing_inside():
    generator = torch.Generator().manual_seed(SEED)
    maps = torch.stack((torch.rand(2, 5, 9, 12, generator=generator),
                        torch.randint(0, 7, (2, 5, 9, 12), generator=generator)), dim=1).half()
    boxes = torch.tensor([[0.3, 0.2, 0.5, 0.6], [0.2, 0.3, 0.6, 0.4]])
    options = dict(num_classes=7, grid=(4, 6))
    _, one = crop_targets(maps, boxes, window=(-0.25, 0., 0.75, 1.), **options)  # hangs out of the crop alone
    shifted = boxes - torch.tensor([0.25, 0., 0., 0.]) * boxes[:, 2:3]
    torch.testing.assert_close(one, crop_targets(maps, shifted, **options)[1])


def test_a_certain_map_is_the_smoothed_class_everywhere():
    image, tokens = crop_targets(certain_map(3, (2, 5, 4, 6))[None], torch.tensor([[0.1, 0.2, 0.5, 0.7]]),
                                 num_classes=1000, grid=(2, 3), smoothing=0.1)
    assert image.shape == (1, 1000) and tokens.shape == (1, 6, 1000)
    expected = torch.full((1000,), 1e-4)
    expected[3] += 0.9001
    torch.testing.assert_close(tokens, expected.expand(1, 6, 1000))
    torch.testing.assert_close(image[0], expected)


def published_box(rows, columns):
    """rand_bbox of the token-labeling repository."""
    cut_rat = np.sqrt(1. - np.random.beta(1., 1.))
    cut_w, cut_h = int(rows * cut_rat), int(columns * cut_rat)
    cx, cy = np.random.randint(rows), np.random.randint(columns)
    return (np.clip(cx - cut_w // 2, 0, rows), np.clip(cy - cut_h // 2, 0, columns),
            np.clip(cx + cut_w // 2, 0, rows), np.clip(cy + cut_h // 2, 0, columns))


def test_boxes_are_drawn_as_published():
    np.random.seed(SEED)
    expected = [published_box(6, 9) for _ in range(100)]
    np.random.seed(SEED)
    assert [draw_box((6, 9)) for _ in range(100)] == expected


def test_exchanged_tokens_mix_the_targets_of_their_images():
    image, tokens = torch.eye(3), torch.rand(3, 12, 3)
    targets = exchange(image, tokens, (0, 1, 2, 3), (3, 4))
    assert targets.exchanged.view(3, 4).tolist() == [[False, True, True, False]] * 2 + [[False] * 4]
    torch.testing.assert_close(targets.image[0], torch.tensor([8 / 12, 0., 4 / 12]))
    assert torch.equal(targets.image[1], image[1]) and torch.equal(targets.tokens, tokens)
