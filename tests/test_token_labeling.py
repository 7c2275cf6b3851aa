"""--token-labels: labels follow crops and flips to the tokens that see them; tokens are exchanged; resume is exact."""
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from data.batch import BatchPreparer, TokenLabelPreparer
from data.folders import ImageFiles
from data.loader import create_loader
from data.pipeline import check_training_input
from data.samplers import TrainSampler
from data.token_targets import add_truth, certain_map, crop_targets, draw_box
from data.transforms import create_train_transform
from engine.checks import check_run_options
from engine.objective import TokenLabelObjective
from models import create_model, resolve_model, token_layout
from options.parser import parse_options
from options.scripts import SCRIPTS
from tests.conftest import assert_same, launch, run_script, succeeded, write_images
from utils.checkpoint_reader import read_checkpoint
from utils.distributed import World
from utils.errors import UserError

SEED = 9
SIZE = 64
SMALL = dict(embed_dim=32, depth=2, num_heads=2)
WORDS = ('--model', 't2t_vit_7', '--model-kwargs', *(f'{name}={value}' for name, value in SMALL.items()))


class Labels:
    """Label maps in memory, as data.token_labels reads them; None is missing."""
    shape = (2, 2, 32, 32)

    def __init__(self, maps):
        self._maps = maps

    def read(self, index):
        return self._maps[index]

    def fingerprint(self):
        return str(len(self._maps))


def label_map(scores, label=1):
    """A map [2, 2, H, W] of scores for class `label`, and of zeros for class 0."""
    scores = torch.stack((scores, torch.zeros_like(scores)))
    classes = torch.tensor([label, 0]).view(2, 1, 1).expand_as(scores)
    return torch.stack((scores, classes)).half()


def slope(count, low, high):
    """A value that goes from `low` to `high` over a side of `count` cells, at their middles."""
    return low + (high - low) * (torch.arange(count) + 0.5) / count


@pytest.fixture(scope='module')
def slopes(tmp_path_factory):
    """Images whose red goes from left to right and whose green goes down, and labels that do the same.

    Red is the score of class 1, less a third of green, so that no flip and no exchange of axes gives the same.
    """
    folder = tmp_path_factory.mktemp('slopes')
    maps = []
    for number in range(8):
        height, width = (120, 90) if number % 2 else (80, 110)
        red, green = (slope(width, 20, 220).expand(height, -1), slope(height, 200, 40)[:, None].expand(-1, width))
        pixels = torch.stack((red, green, torch.full_like(red, 128)), dim=2).round().byte()
        Image.fromarray(pixels.numpy()).save(folder / f'{number}.png')
        maps.append(label_map((slope(32, 20, 220) - slope(32, 200, 40)[:, None] / 3) / 50))
    return ImageFiles([str(folder)]), Labels(maps)


def loader_of(dataset, labels, *, workers=0, batch_size=4, max_bad_images=0, aa=None):
    transform = create_train_transform(SIZE, scale=(0.2, 0.9), hflip=0.5, vflip=0.5, auto_augment=aa, color_jitter=0)
    return create_loader(dataset, transform, TrainSampler(len(dataset), batch_size), seed=SEED, workers=workers,
                         max_bad_images=max_bad_images, token_labels=labels)


def epoch_of(loader, epoch=0, start=0):
    loader.set_position(epoch, start)
    parts = [torch.cat(part) for part in zip(*loader, strict=True)]
    loader.close()
    return parts


def test_each_token_gets_the_label_of_what_it_sees(slopes):
    """Its target is that of the pixel at its own centre, 16 k + 1, whatever crop and flips were drawn."""
    model = create_model('t2t_vit_7', img_size=SIZE, aux_head=True, num_classes=3, **SMALL)
    grid, window = token_layout(model, SIZE)
    assert grid == (4, 4)
    flips = set()
    for epoch in range(4):
        images, _, maps, boxes = epoch_of(loader_of(*slopes), epoch)
        flips |= {(bool(m[0, 0, 0, 0] > m[0, 0, -1, 0]), bool(m[0, 0, 0, 0] > m[0, 0, 0, -1])) for m in maps}
        _, tokens = crop_targets(maps, boxes, num_classes=3, grid=grid, window=window, smoothing=0.)
        found = (tokens[..., 1] / tokens[..., 0]).log().view(-1, *grid)
        own = images[:, :, 1::16, 1::16].float()  # [B, 3, 4, 4]
        # The outermost half of a cell of labels is constant. That of a resized image is not sharp either.
        inside = (slice(None), slice(1, None), slice(1, None))
        torch.testing.assert_close(found[inside], ((own[:, 0] - own[:, 1] / 3) / 50)[inside], rtol=0, atol=0.06)
        _, others = crop_targets(maps, boxes, num_classes=3, grid=grid, smoothing=0.)
        assert ((others[..., 1] / others[..., 0]).log().view(-1, *grid) - found)[inside].abs().mean() > 0.1
    assert len(flips) == 4


def test_random_numbers_and_images_are_those_without_labels(slopes):
    dataset, labels = slopes
    aa = 'rand-m9-mstd0.5-inc1'
    with_labels, without = epoch_of(loader_of(dataset, labels, aa=aa)), epoch_of(loader_of(dataset, None, aa=aa))
    assert len(with_labels) == 4 and len(without) == 2
    assert torch.equal(with_labels[0], without[0]) and torch.equal(with_labels[1], without[1])


def test_workers_and_position_do_not_change_a_byte(slopes):
    expected = epoch_of(loader_of(*slopes, batch_size=2), 1)
    found = epoch_of(loader_of(*slopes, batch_size=2, workers=2), 1, 2)
    assert [(part.dtype, part.shape[1:]) for part in found[2:]] == [
        (torch.float16, (2, 2, 32, 32)), (torch.float32, (4,))]
    for part, whole in zip(found, expected, strict=True):
        assert torch.equal(part, whole[4:])


def test_a_bad_image_takes_its_neighbours_labels_and_a_missing_label_is_the_class(tmp_path):
    write_images(tmp_path, {'train': 2})
    bad = tmp_path / 'train/bee/bee_0.jpg'
    bad.write_bytes(bad.read_bytes()[:200])
    dataset = ImageFiles([str(tmp_path / 'train')])
    dataset.targets = np.array([0, 0, 1, 1, 2, 2])
    maps = [label_map(torch.full((32, 32), index + 1.), label=index) for index in range(6)]
    maps[5] = None
    _, targets, maps, _ = epoch_of(loader_of(dataset, Labels(maps), batch_size=6, max_bad_images=1))
    names = sorted(zip(targets.tolist(), maps[:, 1, 0, 0, 0].tolist(), maps[:, 0, 0, 0, 0].tolist(), strict=True))
    certain = certain_map(2, (2, 2, 32, 32))
    assert names == [(0, 0, 1), (0, 1, 2), (1, 3, 4), (1, 3, 4), (2, 2, certain[0, 0, 0, 0]), (2, 4, 5)]


@pytest.mark.parametrize('options', [{}, {'transposed': True}, {'ground_truth': True}], ids=str)
def test_the_preparer_makes_targets_of_exchanged_images(options):
    generator = torch.Generator().manual_seed(SEED)
    images = torch.randint(0, 256, (3, 3, 32, 48), dtype=torch.uint8, generator=generator)
    maps = torch.stack((torch.rand(3, 5, 9, 9, generator=generator),
                        torch.randint(0, 7, (3, 5, 9, 9), generator=generator)), dim=1).half()
    boxes, truth = torch.tensor([[0.1, 0.3, 0.6, 0.5]]).repeat(3, 1), torch.tensor([3, 6, 0])
    window = (-0.1, 0., 0.9, 1.)
    prepare = TokenLabelPreparer('cpu', batch_size=3, num_classes=7, grid=(4, 6), window=window, smoothing=0.2,
                                 erase_prob=1.0, **options)
    np.random.seed(SEED)
    state, shares = np.random.get_state(), set()
    for _ in range(8):
        erased, (image, tokens, exchanged) = prepare(images, truth, maps, boxes)
        assert not torch.equal(erased, BatchPreparer('cpu')(images, truth)[0]), 'images are erased'
        np.random.set_state(state)
        top, left, bottom, right = draw_box((4, 6))
        state = np.random.get_state()
        whole, expected = crop_targets(maps, boxes, num_classes=7, grid=(4, 6), window=window, smoothing=0.2,
                                       transposed='transposed' in options)
        if 'ground_truth' in options:
            whole = add_truth(whole, truth, smoothing=0.2)
        assert torch.equal(tokens, expected)
        assert exchanged.view(4, 6).nonzero().tolist() == [[y, x] for y in range(top, bottom)
                                                           for x in range(left, right)]
        share = exchanged.float().mean().item()
        torch.testing.assert_close(image, whole * (1 - share) + whole.flip(0) * share)
        shares.add(share)
    assert len(shares) > 1


# --- Model and objective ----------------------------------------------------------------------------------------------

def make(name='t2t_vit_7', **kwargs):
    torch.manual_seed(SEED)
    return create_model(name, img_size=SIZE, num_classes=5, **{'aux_head': True, **SMALL, **kwargs})


@pytest.mark.parametrize('kwargs', [{}, {'global_pool': 'avg'}], ids=str)
def test_dense_logits_are_those_of_exchanged_tokens_put_back(kwargs):
    model, images = make(**kwargs).eval(), torch.randn(3, 3, SIZE, 48)
    exchanged = torch.tensor([False, True, True, False] * 3)
    logits, token_logits = model.forward_dense(images, exchanged)
    tokens = model.tokens_to_token(images)
    mixed = tokens.clone()
    for index, partner in enumerate((2, 1, 0)):
        mixed[index, exchanged] = tokens[partner, exchanged]
    x = torch.cat((model.cls_token.expand(3, -1, -1), mixed), dim=1)
    positions = model._embed(images) - torch.cat((model.cls_token.expand(3, -1, -1), tokens), dim=1)
    x = x + positions
    for block in model.blocks:
        x = block(x)
    x = model.norm(x)
    expected = model.aux_head(x[:, 1:])
    back = expected.clone()
    for index, partner in enumerate((2, 1, 0)):
        back[index, exchanged] = expected[partner, exchanged]
    torch.testing.assert_close(token_logits, back)
    torch.testing.assert_close(logits, model.head(x[:, 1:].mean(1) if kwargs else x[:, 0]))
    none = torch.zeros_like(exchanged)
    logits, token_logits = model.forward_dense(images, none)
    torch.testing.assert_close(logits + 0.5 * token_logits.amax(dim=1), model(images))


@pytest.mark.parametrize('name', ['t2t_vit_14_se', 't2t_vit_dense', 't2t_vit_c_14'])
def test_every_t2t_vit_learns_from_token_labels(name):
    kwargs = {'block_config': (1, 1), 'embed_dim': 32, 'depth': None, 'num_heads': 2} if 'dense' in name else {}
    model = make(name, **kwargs)
    grid, _ = token_layout(model, SIZE)
    count = grid[0] * grid[1]
    objective = TokenLabelObjective(model, cls_weight=1., dense_weight=1.)
    loss = objective(torch.randn(2, 3, SIZE, SIZE), (torch.rand(2, 5), torch.rand(2, count, 5),
                                                     torch.rand(count) < 0.5))
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


def test_the_objective_weighs_two_cross_entropies():
    generator = torch.Generator().manual_seed(SEED)
    logits, token_logits, image, tokens = (
        torch.rand(*shape, generator=generator) for shape in ((2, 5), (2, 6, 5), (2, 5), (2, 6, 5)))
    model = nn.Module()
    model.forward_dense = lambda images, exchanged: (logits.bfloat16(), token_logits)
    losses = [-(targets * found.log_softmax(-1)).sum(-1).mean()
              for found, targets in ((logits.bfloat16().float(), image), (token_logits, tokens))]
    objective = TokenLabelObjective(model, cls_weight=0.7, dense_weight=0.5)
    torch.testing.assert_close(objective(None, (image, tokens, None)), 0.7 * losses[0] + 0.5 * losses[1])


@pytest.mark.parametrize(('size', 'grid', 'window'), [
    (224, (14, 14), (-6.5 / 224, -6.5 / 224, 217.5 / 224, 217.5 / 224)),
    ((96, 230), (6, 15), (-6.5 / 96, -6.5 / 230, 89.5 / 96, 233.5 / 230)),
], ids=str)
def test_the_layout_of_tokens_is_that_of_their_centres(size, grid, window):
    found = token_layout(make(), size)
    assert found[0] == grid and found[1] == pytest.approx(window)


# --- Options ----------------------------------------------------------------------------------------------------------

def parse(*argv, script='train'):
    return parse_options(SCRIPTS[script](), ['data', '--token-labels', 'labels', *argv])


def test_mixing_is_off_unless_it_is_asked_for():
    assert (parse().mixup, parse().cutmix) == (0, 0)
    assert (parse('--mixup', '0.8').mixup, parse(script='transfer').cutmix) == (0.8, 0)


@pytest.mark.parametrize(('options', 'message'), [
    ((), 't2t_vit_14 has no classifier of its tokens; add --model-kwargs aux_head=True'),
    (('--model', 'resnet18'), 'resnet18 has no classifier of its tokens; give a T2T-ViT'),
    (('--model', 't2t_vit_24_token_labeling', '--gp', ''), "--gp ''"),
    (('--model', 't2t_vit_24_token_labeling', '--model-kwargs', 'aux_head=False'), 'add --model-kwargs aux_head=True'),
])
def test_a_model_that_cannot_learn_from_token_labels_is_refused(options, message):
    with pytest.raises(UserError, match=message.replace('(', r'\(')):
        resolve_model(parse(*options))


@pytest.mark.parametrize(('options', 'message'), [
    (('--mixup', '0.2'), 'images exchange tokens instead'), (('--cutmix', '1'), 'leave --mixup'),
    (('--cutmix-minmax', '0.2', '0.8'), 'leave --mixup'), (('--no-aug',), '--no-aug.*leave it out'),
    (('--train-crop-mode', 'pad'), 'say --train-crop-mode rrc'), (('--aug-splits', '3'), '--aug-splits'),
    (('--no-fast-transform',), '--no-fast-transform'), (('--mixup-off-epoch', '3'), '--mixup-off-epoch 3'),
])
def test_options_that_lose_the_place_of_labels_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        check_training_input(parse(*options))
    check_training_input(parse())


@pytest.mark.parametrize('options', [('--loss', 'bce'), ('--class-weights', 'balanced')])
def test_another_loss_is_refused(options, tmp_path):
    world = World(0, 0, 1, torch.device('cpu'))
    args = parse(*options).replacing(output=str(tmp_path))
    with pytest.raises(UserError, match='leave --loss, --class-weights and --jsd out'):
        check_run_options(args, world, kind='train')
    check_run_options(parse().replacing(output=str(tmp_path)), world, kind='train')


# --- Runs -------------------------------------------------------------------------------------------------------------

def write_labels(folder, images, seed, shape=(6, 5)):
    """The published form: labels that know the class of each image."""
    generator = torch.Generator().manual_seed(seed)
    for target, name in enumerate(sorted(path.name for path in images.iterdir())):
        (folder / name).mkdir(parents=True)
        for image in (images / name).iterdir():
            classes = torch.stack([torch.full(shape, float(target)), torch.full(shape, (target + 1.) % 3)])
            scores = 3 + 2 * torch.rand(2, *shape, generator=generator)
            torch.save(torch.stack((scores, classes)).half(), folder / name / f'{image.name.split(".")[0]}.pt')
    return folder


@pytest.fixture(scope='module')
def labelled(tmp_path_factory):
    root = tmp_path_factory.mktemp('labelled')
    write_images(root / 'data', {'train': 8, 'val': 2})
    for seed in (1, 2):
        write_labels(root / f'labels{seed}', root / 'data/train', seed)
    return root


RUN = ('data', *WORDS, 'aux_head=True', '--img-size', '64', '--device', 'cpu', '-b', '4', '--epochs', '2',
       '--warmup-epochs', '0', '--cooldown-epochs', '0', '--lr', '1e-3', '--no-tensorboard', '--output', 'runs',
       '--checkpoint-steps', '2', '--checkpoint-hist', '9', '--log-interval', '1', '--token-labels')


def final_state(run):
    return {name: value for name, value in read_checkpoint(run / 'last.pth.tar').items() if name != 'args'}


def test_a_resumed_run_of_two_ranks_ends_in_the_same_bytes(labelled):
    """Three steps an epoch; resumed after the first of the second epoch, with another number of workers."""
    out = succeeded(launch(2, *RUN, 'labels1', '-j', '1', '--experiment', 'whole', cwd=labelled))
    assert out.count('images exchange tokens') == 1
    whole = labelled / 'runs/train/whole'
    middle = whole / 'checkpoint-00000004.pth.tar'
    assert read_checkpoint(middle)['step'] == 1
    out = succeeded(launch(2, *RUN, 'labels1', '-j', '0', '--experiment', 'resumed', '--resume', middle, cwd=labelled))
    assert 'in epoch 2, after step 1' in out and 'differ' not in out
    assert_same(final_state(whole), final_state(labelled / 'runs/train/resumed'))


def test_other_labels_are_refused_within_an_epoch_and_said_at_its_end(labelled):
    run = (*RUN, 'labels1', '-j', '0', '--experiment', 'a', '--dense-weight', '0.5', '--ground-truth')
    stopped = run_script('train.py', *run, cwd=labelled, T2T_FAULTS='step@8=term')
    assert stopped.returncode == 75, stopped.stderr
    shutil.move(labelled / 'labels1', labelled / 'before')
    shutil.copytree(labelled / 'labels2', labelled / 'labels1')
    try:
        refused = run_script('train.py', *run, '--resume', 'auto', cwd=labelled)
        assert refused.returncode == 2 and refused.stderr.count('\n') == 1
        assert 'stands in the middle of an epoch of 24 labels' in refused.stderr
        without = [word for word in run if word not in ('--token-labels', 'labels1', '--dense-weight', '0.5',
                                                        '--ground-truth')]
        refused = run_script('train.py', *without, '--resume', 'auto', cwd=labelled)
        assert refused.returncode == 2 and 'this run has no token labels' in refused.stderr
        at_end = labelled / 'runs/train/a/checkpoint-00000006.pth.tar'
        out = succeeded(run_script('train.py', *run, '--resume', at_end, cwd=labelled))
        assert 'warning: the token labels are others than in the checkpoint: 24 labels' in out
    finally:
        shutil.rmtree(labelled / 'labels1')
        shutil.move(labelled / 'before', labelled / 'labels1')


def test_labels_of_more_classes_end_in_one_line(labelled):
    file = sorted((labelled / 'labels2').rglob('*.pt'))[3]
    labels = torch.load(file)
    labels[1, 0, 2, 2] = 7
    torch.save(labels, file)
    result = run_script('train.py', *RUN, 'labels2', '-j', '0', cwd=labelled)
    assert result.returncode == 2 and result.stderr.count('\n') == 1 and file.name in result.stderr
