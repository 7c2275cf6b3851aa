"""The training core by itself: learning rates, parameter groups, checkpoint files, state, evaluation."""

import contextlib
import math
import os
from argparse import Namespace

import numpy as np
import pytest
import torch
from timm.utils import ModelEmaV3
from torch import nn

from data.base import ImageDataset
from data.batch import BatchPreparer
from data.loader import create_loader
from data.samplers import EvalSampler
from engine import checkpoint as checkpoint_files, run_folder
from engine.best import better_result
from engine.checkpoint import BEST, LAST, save_checkpoint
from engine.checks import check_run_options
from engine.evaluate import MostConfidentErrors, evaluate
from engine.loss import create_loss
from engine.optimizer import create_optimizer, create_schedule, param_groups
from engine.run import create_state
from engine.run_folder import resolve_run
from engine.state import TrainState
from models import create_model
from options.scripts import train_parser
from tests.conftest import assert_same, write_checkpoint
from tests.group import Group
from utils import distributed
from utils.checkpoint_reader import read_checkpoint
from utils.distributed import World
from utils.errors import UserError
from utils.runtime import Precision, get_rng_state, seed_everything, set_rng_state

CPU = torch.device('cpu')
ONE = distributed.World(rank=0, local_rank=0, size=1, device=CPU)


def recipe(**changes) -> Namespace:
    """The options of the published recipe, which are train.py's defaults."""
    return Namespace(**vars(train_parser().parse_args([])) | {'warmup_epochs': 10, 'cooldown_epochs': 10} | changes)


# --- Learning rate ---------------------------------------------------------------------------------------------------


def published_rate(epoch: int, lr: float) -> float:
    if epoch < 10:
        return 1e-6 + epoch * (lr - 1e-6) / 10
    if epoch < 300:
        return 1e-5 + 0.5 * (lr - 1e-5) * (1 + math.cos(math.pi * epoch / 300))
    return 1e-5


@pytest.mark.parametrize('lr', [5e-4, 1e-3])
def test_schedule_of_the_310_epochs(lr):
    optimizer = torch.optim.AdamW(nn.Linear(2, 2).parameters(), lr=lr)
    schedule, num_epochs = create_schedule(optimizer, recipe(lr=lr), steps_per_epoch=5)
    assert num_epochs == 310
    for epoch in range(310):
        schedule.step(epoch)
        schedule.step_update(5 * epoch)  # says nothing in a schedule by epochs
        assert optimizer.param_groups[0]['lr'] == pytest.approx(published_rate(epoch, lr), rel=1e-12), epoch


def test_schedule_by_steps_rises_and_falls_within_epochs():
    optimizer = torch.optim.AdamW(nn.Linear(2, 2).parameters(), lr=1e-3)
    args = recipe(lr=1e-3, epochs=5, warmup_epochs=1, cooldown_epochs=0, sched_on_updates=True)
    schedule, num_epochs = create_schedule(optimizer, args, steps_per_epoch=100)
    rates = []
    for step in range(500):
        schedule.step(step // 100)
        schedule.step_update(step)
        rates.append(optimizer.param_groups[0]['lr'])
    assert num_epochs == 5
    assert rates[0] == 1e-6 and rates[50] == pytest.approx((1e-3 + 1e-6) / 2)
    assert rates[250] == pytest.approx(1e-5 + (1e-3 - 1e-5) / 2)
    assert all(later < earlier for earlier, later in zip(rates[100:], rates[101:], strict=False))


# --- Parameter groups ------------------------------------------------------------------------------------------------


def test_every_parameter_is_in_one_group_and_the_right_ones_decay():
    model = create_model('t2t_vit_7', num_classes=10, img_size=32)
    groups = param_groups(model, weight_decay=0.03)
    name_of = {id(p): n for n, p in model.named_parameters()}
    names = [name_of[id(p)] for g in groups for p in g['params']]
    assert sorted(names) == sorted(name_of.values())
    decayed = {name_of[id(p)] for g in groups if g['weight_decay'] for p in g['params']}
    assert decayed == {n for n, p in model.named_parameters() if p.ndim > 1 and n != 'cls_token'}
    assert 'blocks.0.attn.qkv.weight' in decayed and 'norm.weight' not in decayed
    assert {g['name']: g['weight_decay'] for g in groups} == {'decayed': 0.03, 'not decayed': 0}


def test_transfer_lowers_every_rate_and_keeps_their_ratio():
    model = create_model('t2t_vit_7', num_classes=10, img_size=32)
    args = recipe(opt='sgd', lr=0.05, weight_decay=5e-4, epochs=60, warmup_epochs=0, cooldown_epochs=0, min_lr=2e-4)
    optimizer = create_optimizer(param_groups(model, args.weight_decay, body_lr_scale=0.01), args)
    schedule, num_epochs = create_schedule(optimizer, args, steps_per_epoch=5)
    head = {id(p) for p in model.head.parameters()}
    rates = []
    for epoch in range(num_epochs):
        schedule.step(epoch)
        rates.append([g['lr'] for g in optimizer.param_groups])
        for group in optimizer.param_groups:
            scale = 1.0 if id(group['params'][0]) in head else 0.01
            assert group['lr'] == pytest.approx(scale * max(rates[-1])), epoch
    assert rates[0] == pytest.approx([0.05 * (r / max(rates[0])) for r in rates[0]])
    for earlier, later in zip(rates, rates[1:], strict=False):
        assert all(b < a for a, b in zip(earlier, later, strict=True))
    assert {g['name']: g['lr_scale'] for g in optimizer.param_groups} == {
        'head, decayed': 1, 'head, not decayed': 1, 'body, decayed': 0.01, 'body, not decayed': 0.01}
    covered = sum(p.numel() for g in optimizer.param_groups for p in g['params'])
    assert covered == sum(p.numel() for p in model.parameters())


def test_unknown_optimizer_and_settings_it_refuses():
    groups = param_groups(create_model('t2t_vit_7', num_classes=2, img_size=32), 0.05)
    with pytest.raises(UserError, match=r'--opt adamww: no such optimizer; did you mean adamw\?'):
        create_optimizer(groups, recipe(opt='adamww'))
    with pytest.raises(UserError, match='--opt adamw with these settings'):
        create_optimizer(groups, recipe(opt_betas=[0.9, 1.0]))


def test_losses():
    logits, targets = torch.tensor([[2.0, 0.0, -1.0]]), torch.tensor([0])
    plain = create_loss(recipe(smoothing=0.0), soft_targets=False)(logits, targets)
    smooth = create_loss(recipe(), soft_targets=False)(logits, targets)
    mixed = create_loss(recipe(), soft_targets=True)(
        logits, torch.tensor([[0.9 + 0.1 / 3, 0.1 / 3, 0.1 / 3]])
    )
    log_p = logits.log_softmax(1)[0]
    assert plain.item() == pytest.approx(-log_p[0].item())
    assert smooth.item() == pytest.approx((-0.9 * log_p[0] - 0.1 * log_p.mean()).item())
    assert mixed.item() == pytest.approx(smooth.item())
    with pytest.raises(UserError, match='--jsd .* add --aug-splits'):
        create_loss(recipe(jsd=True), soft_targets=False)


# --- Checkpoint files ------------------------------------------------------------------------------------------------


def test_checkpoints_are_kept_advertised_and_pruned(tmp_path):
    for step, best in ((10, True), (20, False), (30, False), (40, False)):
        save_checkpoint({'global_step': step}, tmp_path, global_step=step, keep=2, is_best=best)
        assert read_checkpoint(tmp_path / LAST)['global_step'] == step
    assert sorted(p.name for p in tmp_path.glob('checkpoint-*')) == [
        'checkpoint-00000030.pth.tar',
        'checkpoint-00000040.pth.tar',
    ]
    assert read_checkpoint(tmp_path / BEST)['global_step'] == 10
    assert not list(tmp_path.glob('.*'))


@pytest.mark.parametrize('broken', ['save', 'replace'])
def test_a_failed_save_leaves_the_old_checkpoint(tmp_path, monkeypatch, broken):
    save_checkpoint({'global_step': 1}, tmp_path, global_step=1, keep=2, is_best=False)
    before = sorted(p.name for p in tmp_path.iterdir())

    def fail(*args, **kwargs):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(torch if broken == 'save' else checkpoint_files.os, broken, fail)
    with pytest.raises(OSError, match='No space left'):
        save_checkpoint({'global_step': 2}, tmp_path, global_step=2, keep=2, is_best=True)
    monkeypatch.undo()
    assert sorted(p.name for p in tmp_path.iterdir()) == before
    assert read_checkpoint(tmp_path / LAST)['global_step'] == 1


def test_where_a_run_goes(tmp_path):
    place = dict(output=str(tmp_path), kind='train', name='t2t_vit_7-32')
    new, none = resolve_run(**place, experiment='', resume='')
    assert new.parent == tmp_path / 'train' and new.name.endswith('-t2t_vit_7-32') and none is None
    assert resolve_run(**place, experiment='', resume='auto')[1] is None
    for age, name in enumerate(
        ('20260101-000000-t2t_vit_7-32', '20260102-000000-t2t_vit_7-32', '20260103-000000-t2t_vit_14-32')
    ):
        folder = tmp_path / 'train' / name
        folder.mkdir(parents=True)
        write_checkpoint({'global_step': age}, folder / LAST)
        os.utime(folder / LAST, (age, age))
    newest = tmp_path / 'train' / '20260102-000000-t2t_vit_7-32'
    assert resolve_run(**place, experiment='', resume='auto') == (newest, newest / LAST)
    assert resolve_run(**place, experiment='other', resume='auto') == (tmp_path / 'train' / 'other', None)
    assert resolve_run(**place, experiment='', resume=str(newest)) == (newest, newest / LAST)
    assert resolve_run(**place, experiment='x', resume=str(newest / LAST)) == (tmp_path / 'train' / 'x', newest / LAST)
    with pytest.raises(UserError, match='that run exists'):
        resolve_run(**place, experiment=newest.name, resume='')
    with pytest.raises(UserError, match='--resume .*no such checkpoint'):
        resolve_run(**place, experiment='', resume=str(tmp_path / 'no.pth.tar'))


def test_a_checkpoint_that_goes_while_it_is_looked_for(tmp_path, monkeypatch):
    write_checkpoint({'global_step': 1}, tmp_path / LAST)
    found = run_folder._has_checkpoint

    def then_it_goes(folder) -> bool:
        there = found(folder)
        (folder / LAST).unlink()
        return there

    monkeypatch.setattr(run_folder, '_has_checkpoint', then_it_goes)
    with pytest.raises(UserError, match='has just been removed'):
        resolve_run(output=str(tmp_path), kind='train', name='x', experiment='', resume=str(tmp_path))


# --- State -----------------------------------------------------------------------------------------------------------


def tiny_state(num_classes: int = 3, arch: str = 'tiny') -> TrainState:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.BatchNorm1d(8), nn.Linear(8, num_classes))
    return TrainState(
        arch=arch,
        model=model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=0.1),
        scaler=Precision(CPU, enabled=False).scaler,
        ema=ModelEmaV3(model, decay=0.9),
        options={'lr': 0.1},
        classes=['a', 'b', 'c'],
        world=ONE,
    )


def train_a_little(state: TrainState, steps: int) -> None:
    for _ in range(steps):
        state.model.train()
        loss = state.model(torch.randn(4, 3, 2, 2)).square().sum()
        loss.backward()
        state.optimizer.step()
        state.optimizer.zero_grad()
        state.ema.update(state.model)
        state.global_step += 1
        state.loss_sums += torch.tensor([loss.item(), 4.0])


def test_state_round_trip_through_a_file_continues_to_the_same_bytes(tmp_path):
    print('seed 7')
    seed_everything(7, rank=0)
    state = tiny_state()
    train_a_little(state, 3)
    state.best_metric, state.best_epoch, state.epoch = 12.5, 1, 2
    save_checkpoint(state.state_dict(), tmp_path, global_step=3, keep=1, is_best=False)
    train_a_little(state, 2)

    seed_everything(8, rank=0)
    other = tiny_state()
    other.load_state_dict(read_checkpoint(tmp_path / LAST), source='file')
    assert (other.best_metric, other.best_epoch, other.epoch, other.global_step) == (12.5, 1, 2, 3)
    train_a_little(other, 2)
    assert_same(state.state_dict(), other.state_dict())


def test_a_checkpoint_of_an_earlier_version_goes_on_without_what_it_did_not_record():
    state = tiny_state()
    state.best_metric, state.best_epoch, state.epoch = 12.5, 1, 2
    content = state.state_dict()
    for entry in ('better', 'best_loss', 'best_of', 'preferred', 'images_seen'):
        del content[entry]
    other = tiny_state()
    other.best_loss, other.best_of, other.better = 1.0, 'weights', 'weights'
    other.load_state_dict(content, source='file')
    assert (other.best_metric, other.best_epoch, other.best_loss, other.best_of) == (12.5, 1, None, None)
    assert other.state_dict()['preferred'] is None
    assert not better_result({'top1': 12.5, 'loss': 0.1}, 'top1').is_better_than(other.best_metric, other.best_loss)


@pytest.mark.parametrize(
    ('change', 'said'),
    [
        (lambda c: c.pop('optimizer'), 'it has no optimizer.*--initial-checkpoint'),
        (lambda c: c.update(version=99), 'newer version'),
        (
            lambda c: c.update(arch='t2t_vit_14'),
            'a checkpoint of t2t_vit_14, and this run is of tiny; say --model t2t_vit_14',
        ),
        (
            lambda c: c.update(state_dict=tiny_state(5).model.state_dict()),
            r'3.weight \(5, 8\) in the file, \(3, 8\) here',
        ),
        (lambda c: c['state_dict'].pop('1.bias'), '1.bias only here'),
        (lambda c: c['optimizer']['param_groups'].append({'params': []}), 'optimizer state is of another kind'),
    ],
)
def test_a_checkpoint_that_does_not_fit_changes_nothing(change, said):
    content = tiny_state().state_dict()
    change(content)
    state = tiny_state()
    before = {k: v.clone() for k, v in state.model.state_dict().items()}
    with pytest.raises(UserError, match=said):
        state.load_state_dict(content, source='file.pth.tar')
    assert_same(before, dict(state.model.state_dict()))


@pytest.mark.parametrize('name', ['mobilenetv2_100', 'efficientnet_b0', 'resnet18', 't2t_vit_7'])
def test_sync_bn_leaves_what_a_model_computes(name):
    """timm's norms may hold an activation, which torch's own conversion drops."""
    torch.manual_seed(0)
    model, images = create_model(name, num_classes=3, img_size=32), torch.randn(2, 3, 32, 32)
    norms = sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    expected, keys = model.eval()(images), list(model.state_dict())
    args = recipe(sync_bn=True, channels_last=False, model_ema=False, model=name, as_dict=dict)
    world = World(rank=0, local_rank=0, size=2, device=CPU)
    state = create_state(args, model, create_optimizer(param_groups(model, 0.05), recipe()),
                         Precision(CPU, enabled=False), ['a', 'b', 'c'], world)
    assert sum(isinstance(module, nn.SyncBatchNorm) for module in state.model.modules()) == norms
    assert torch.equal(state.model(images), expected) and list(state.model.state_dict()) == keys
    optimized = {id(p) for group in state.optimizer.param_groups for p in group['params']}
    assert optimized == {id(p) for p in state.model.parameters() if p.requires_grad}


def test_sync_bn_without_gpus_is_refused_before_the_data():
    with pytest.raises(UserError, match='--sync-bn: batch norm over several processes needs GPUs'):
        check_run_options(recipe(sync_bn=True, compile='', accum_steps=1),
                          World(rank=0, local_rank=0, size=2, device=CPU), kind='train')


def test_each_of_several_runs_has_a_loss_scaler_of_its_own():
    precision = Precision(CPU, enabled=True, dtype_name='bfloat16')
    precision.dtype = torch.float16  # as on a GPU
    scaler = precision.anew().scaler
    assert scaler.is_enabled() and scaler is not precision.anew().scaler
    assert not Precision(CPU, enabled=False).anew().scaler.is_enabled()


def test_generators_round_trip():
    seed_everything(3, rank=1)
    saved = get_rng_state(CPU)
    first = draw()
    set_rng_state(saved, CPU)
    assert draw() == first
    seed_everything(3, rank=0)
    assert draw() != first


def draw():
    import random

    import numpy as np

    return random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(3).tolist()


def test_precision():
    amp = Precision(CPU, enabled=True)
    with amp.autocast():
        assert nn.Linear(2, 2)(torch.ones(1, 2)).dtype is torch.bfloat16
    assert str(amp) == 'bfloat16' and not amp.scaler.is_enabled()
    assert str(Precision(CPU, enabled=False)) == 'float32'
    with pytest.raises(UserError, match='--amp-dtype float16'):
        Precision(CPU, enabled=True, dtype_name='float16')


# --- Evaluation ------------------------------------------------------------------------------------------------------


class Vectors(ImageDataset):
    """Images whose pixels are their number: what a fixed linear model makes of them can be computed apart."""

    def __init__(self, count: int):
        self.images = torch.randint(
            0, 256, (count, 3, 2, 2), dtype=torch.uint8, generator=torch.Generator().manual_seed(count)
        )
        super().__init__('abcdefg', np.arange(count) % 7)

    def read_bytes_or_image(self, index):
        return self.images[index]

    def path(self, index):
        return f'vectors[{index}]'


def evaluate_share(count: int, rank: int, size: int, errors=None):
    torch.manual_seed(5)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 7))
    loader = create_loader(
        Vectors(count), lambda image: image, EvalSampler(count, 4, rank=rank, world_size=size), workers=0
    )
    precision = Precision(CPU, enabled=False)
    return evaluate(model, loader, BatchPreparer(CPU), precision=precision, errors=errors), model


def expected(count: int, model) -> tuple[float, float, float]:
    vectors = Vectors(count)
    images, targets = BatchPreparer(CPU)(vectors.images, torch.from_numpy(vectors.targets))
    logits = model(images).detach()
    top5 = logits.topk(5).indices
    return (
        nn.functional.cross_entropy(logits, targets).item(),
        100 * (top5[:, 0] == targets).float().mean().item(),
        100 * (top5 == targets[:, None]).any(1).float().mean().item(),
    )


@pytest.mark.parametrize('count', [1, 3, 4, 5, 33])
def test_evaluation_against_a_direct_computation(count):
    result, model = evaluate_share(count, 0, 1)
    assert result.count == count
    assert (result.loss, result.top1, result.top5) == pytest.approx(expected(count, model), rel=1e-5)


def _evaluate_in_group(world: World) -> None:
    for count in range(1, 34):
        result, model = evaluate_share(count, world.rank, world.size)
        assert result.count == count, f'{count} images on {world.size} ranks counted as {result.count}'
        assert (result.loss, result.top1, result.top5) == pytest.approx(expected(count, model), rel=1e-5), count


def test_evaluation_is_exact_for_1_to_33_images_on_two_ranks(tmp_path):
    with contextlib.closing(Group(2, tmp_path)) as two:
        two(_evaluate_in_group)


@pytest.mark.parametrize('count', [1, 5, 33])
def test_the_most_confident_errors_against_a_direct_computation(count):
    """In batches of 4; the result is the same as without them."""
    errors = MostConfidentErrors(limit=6)
    result, model = evaluate_share(count, 0, 1, errors)
    without, _ = evaluate_share(count, 0, 1)
    assert (result.loss, result.top1, result.top5) == (without.loss, without.top1, without.top5)
    vectors = Vectors(count)
    images, targets = BatchPreparer(CPU)(vectors.images, torch.from_numpy(vectors.targets))
    probabilities, guesses = model(images).detach().softmax(1).max(1)
    wrong = [int(i) for i in probabilities.argsort(descending=True) if guesses[i] != targets[i]][:6]
    assert wrong, 'the model must make errors'
    found = errors.fetch()
    for tensor, every in zip(found, (images, targets, guesses, probabilities), strict=True):
        torch.testing.assert_close(tensor, every[wrong])


def test_errors_of_a_model_that_makes_none_or_that_is_broken():
    images, targets = torch.zeros(3, 3, 2, 2), torch.tensor([0, 1, 1])
    errors = MostConfidentErrors()
    assert errors.fetch() is None
    errors.add(images, targets, nn.functional.one_hot(targets, 2) * 9.0)
    assert errors.fetch() is None
    errors.add(images, targets, torch.full((3, 2), torch.nan))
    assert errors.fetch() is None
    errors.add(images, targets, torch.tensor([[0.0, 9.0], [0.0, 9.0], [0.0, 9.0]]))
    assert errors.fetch()[1].tolist() == [0]


def test_evaluation_leaves_training_as_it_was():
    result, model = evaluate_share(5, 0, 1)
    model.train()
    before = get_rng_state(CPU)
    loader = create_loader(Vectors(5), lambda image: image, EvalSampler(5, 4), workers=0)
    evaluate(model, loader, BatchPreparer(CPU), precision=Precision(CPU, enabled=False))
    assert model.training
    assert_same(before, get_rng_state(CPU))


def test_evaluation_lines_read_as_users_know_them(caplog):
    caplog.set_level('INFO', logger='engine.evaluate')
    evaluate_share(10, 0, 1)
    number = r'\s*\d+\.\d{4}'
    line = (
        rf'Test: \[   1/3\]  Time: \d\.\d{{3}} \(\d\.\d{{3}}\)  Loss: {number} \({number}\)  '
        rf'Acc@1: {number} \({number}\)  Acc@5: {number} \({number}\)'
    )
    import re

    assert re.fullmatch(line, caplog.messages[0]), caplog.messages[0]
