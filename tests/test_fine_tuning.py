"""Fine-tuning: frozen parts, a rate for each layer, settings of the optimizer, losses, recomputed activations.

    python -m pytest tests/test_fine_tuning.py
"""
import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from timm.loss import BinaryCrossEntropy
from timm.optim import param_groups_layer_decay

from data.batch import TrainBatchPreparer
from engine.layers import freeze, prepare_layers, set_training_mode
from engine.loss import balanced_weights, create_loss
from engine.objective import create_objective
from engine.optimizer import create_optimizer, create_schedule, param_groups
from engine.run import create_state
from engine.state import TrainState
from engine.step import TrainingStep
from models import create_model
from options.parser import Options, parse_options
from options.scripts import train_parser, transfer_parser
from tests.conftest import assert_same, launch, run_script, succeeded
from utils.checkpoint_reader import read_checkpoint
from utils.distributed import World
from utils.errors import UserError
from utils.runtime import Precision

CPU = torch.device('cpu')
ONE = World(rank=0, local_rank=0, size=1, device=CPU)
TINY = {'img_size': 32, 'embed_dim': 32, 'depth': 3, 'num_heads': 2}
# By name: a vision transformer of ours, one of timm, and models with batch norms.
MODELS = {'t2t_vit_7': TINY, 'test_vit': {'img_size': 32}, 'test_resnet': {}, 'test_efficientnet': {}}


def options(*argv: str) -> Options:
    return parse_options(train_parser(), ['--opt', 'momentum', '--lr', '0.1', '--warmup-epochs', '0', *argv])


def tiny(name: str, **changes) -> torch.nn.Module:
    torch.manual_seed(0)
    return create_model(name, num_classes=3, **{**MODELS[name], **changes})


def train(model, args: Options, steps: int = 2) -> TrainState:
    """Train on noise, always the same."""
    prepare_layers(model, args)
    optimizer = create_optimizer(param_groups(model, args.weight_decay, layer_decay=args.layer_decay), args)
    create_schedule(optimizer, args, steps_per_epoch=steps)[0].step(0)
    state = create_state(args, model, optimizer, Precision(CPU, enabled=False), ['a', 'b', 'c'], ONE)
    objective = create_objective(args, model, soft_targets=False)
    step = TrainingStep(state, objective, prepare=lambda *batch: batch, precision=Precision(CPU, enabled=False),
                        args=args)
    set_training_mode(objective)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        step(iter([(torch.randn(4, 3, 32, 32, generator=generator), torch.tensor([0, 1, 2, 0]))
                   for _ in range(args.accum_steps)]))
    return state


def changed(before: dict, after: dict) -> set[str]:
    return {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}


# --- Frozen parts -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(('name', 'part', 'learns'), [
    ('t2t_vit_7', 'backbone', ('head.',)), ('t2t_vit_7', '0', ('blocks.', 'norm.', 'head.')),
    ('t2t_vit_7', '2', ('blocks.2.', 'norm.', 'head.')), ('t2t_vit_7', '3', ('head.',)),
    ('test_vit', '1', tuple(f'blocks.{n}.' for n in range(1, 6)) + ('norm.', 'head.')),
    ('test_resnet', '2', ('layer3.', 'layer4.', 'fc.')), ('test_resnet', 'backbone', ('fc.',)),
    ('test_efficientnet', 'backbone', ('classifier.',))])
def test_frozen_weights_and_statistics_keep_every_byte_and_all_others_change(name, part, learns):
    model = tiny(name)
    before = copy.deepcopy(model.state_dict())
    state = train(model, options('--freeze', part, '--opt', 'adamw', '--lr', '1e-3'), steps=4)
    expected = {key for key in before if key.startswith(learns)}
    assert changed(before, model.state_dict()) == expected > set()
    assert changed(before, state.ema.module.state_dict()) == expected
    learning = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    assert learning == expected & dict(model.named_parameters()).keys()


def test_a_frozen_part_drops_nothing_and_gets_no_gradient():
    model = tiny('t2t_vit_7', drop_rate=0.5, drop_path_rate=0.5)
    freeze(model, 2)
    set_training_mode(model)
    outputs: dict[str, list[torch.Tensor]] = {name: [] for name in ('blocks.1', 'blocks.2')}
    for name, seen in outputs.items():
        model.get_submodule(name).register_forward_hook(lambda *call, seen=seen: seen.append(call[-1]))
    images = torch.randn(2, 3, 32, 32)
    for _ in range(2):
        model(images)
    first, second = outputs['blocks.1']
    assert torch.equal(first, second) and not first.requires_grad
    assert not torch.equal(*outputs['blocks.2'])
    assert not model.pos_drop.training and model.blocks[2].training
    model = tiny('test_vit', drop_rate=0.5)
    freeze(model, 'backbone')
    set_training_mode(model)
    assert model.head_drop.training and not model.norm.training, 'the dropout of the classifier is a part of it'


def test_tokens_that_timm_leaves_out_of_the_stem_are_frozen_with_it():
    model = tiny('test_vit', reg_tokens=2)
    freeze(model, 0)
    assert not model.reg_token.requires_grad and model.norm.weight.requires_grad


@pytest.mark.parametrize(('name', 'argv', 'message'), [
    ('t2t_vit_7', ('--freeze', '4'),
     r'--freeze 4: the model has 3 blocks; give 0 \(its stem alone\) to 3, or backbone'),
    ('pit_ti_224', ('--freeze', '1'), '--freeze 1: PoolingVisionTransformer does not number its blocks; say --freeze '
                                      'backbone'),
    ('vit_se', ('--grad-checkpointing',), None), ('test_efficientnet', ('--grad-checkpointing',), None),
    ('hrnet_w18_small', ('--grad-checkpointing',), '--grad-checkpointing: HighResolutionNet cannot recompute')])
def test_what_a_model_cannot_do_is_one_line(name, argv, message):
    model = create_model(name, num_classes=3, **MODELS.get(name, {}))
    if message is None:
        return prepare_layers(model, options(*argv))
    with pytest.raises(UserError, match=message):
        prepare_layers(model, options(*argv))


# --- A rate for each layer; settings of the optimizer -----------------------------------------------------------------

@pytest.mark.parametrize('name', [*MODELS, 'pit_ti_224'])
def test_rates_of_the_layers_are_those_of_timm(name):
    model = create_model(name, num_classes=3, **MODELS.get(name, {}))
    args = options('--layer-decay', '0.7')
    groups = param_groups(model, 0.05, layer_decay=args.layer_decay)
    optimizer = create_optimizer(groups, args)
    create_schedule(optimizer, args, steps_per_epoch=1)[0].step(0)
    ours = {id(p): (group['lr'], group['lr_scale']) for group in optimizer.param_groups for p in group['params']}
    theirs = {id(p): group['lr_scale'] for group in param_groups_layer_decay(model, layer_decay=0.7)
              for p in group['params']}
    assert len(set(theirs.values())) > 3
    assert ours == {key: (pytest.approx(0.1 * scale), pytest.approx(scale)) for key, scale in theirs.items()}
    assert len({group['name'] for group in groups}) == len(groups)
    assert all(group['weight_decay'] == (0 if 'not decayed' in group['name'] else 0.05) for group in groups)


def test_the_decay_of_layers_takes_the_place_of_the_transfer_ratio_or_multiplies_it():
    def ratio(*argv):
        return parse_options(transfer_parser(), ['--transfer-model', 'x', *argv]).transfer_ratio

    assert (ratio(), ratio('--layer-decay', '0.7'), ratio('--layer-decay', '0.7', '--transfer-ratio', '0.5')) == (
        0.01, 1.0, 0.5)
    model = tiny('t2t_vit_7')
    groups = param_groups(model, 0.05, 0.5, 0.7)
    scales = {group['name']: group['lr_scale'] for group in groups}
    assert scales['head, layer 4, decayed'] == 1 and scales['body, layer 3, decayed'] == pytest.approx(0.35)
    assert sum(p.numel() for group in groups for p in group['params']) == sum(p.numel() for p in model.parameters())


def test_settings_of_the_optimizer_reach_it_or_are_refused():
    groups = [{'params': [torch.nn.Parameter(torch.zeros(2, 2))], 'lr_scale': 1.0}]

    def settings(*argv):
        return create_optimizer(copy.deepcopy(groups), options(*argv)).param_groups[0]

    assert settings('--opt', 'adamw', '--opt-kwargs', 'amsgrad=True', 'maximize=True').items() >= {
        'amsgrad': True, 'maximize': True, 'fused': True, 'lr': 0.1}.items()
    assert settings('--opt', 'lamb', '--opt-kwargs', 'max_grad_norm=3')['max_grad_norm'] == 3
    for argv, message in (
            (('--opt', 'adamw', '--opt-kwargs', 'amsgard=True'),
             '--opt-kwargs amsgard=True: .*unexpected keyword.*amsgard'),
            (('--opt-kwargs', 'lr=1'), '--opt-kwargs lr: use --lr'),
            (('--opt-kwargs', 'betas=(0, 1)'), '--opt-kwargs betas: use --opt-betas'),
            (('--opt-kwargs', 'fused=False'), '--opt-kwargs fused: no setting of an optimizer'),
            (('--opt-kwargs', 'param_group_fn=1'), '--opt-kwargs param_group_fn: no setting')):
        with pytest.raises(UserError, match=message):
            settings(*argv)


# --- Losses -----------------------------------------------------------------------------------------------------------

def random_batch(count: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return 3 * torch.randn(count, 3, generator=generator), torch.tensor([0] * 6 + [1] * 3 + [2] * 3)[:count]


@pytest.mark.parametrize('smoothing', ['0', '0.1'])
@pytest.mark.parametrize('name', ['ce', 'bce', 'focal'])
def test_balanced_weights_are_equal_to_oversampling(name, smoothing):
    logits, targets = random_batch()
    args = options('--loss', name, '--smoothing', smoothing)
    weighted = create_loss(args.replacing(class_weights='balanced'), soft_targets=False, class_counts=[6, 3, 3])
    repeated = torch.cat([torch.arange(6), torch.arange(6, 12).repeat(2)])
    oversampled = create_loss(args, soft_targets=False)(logits[repeated], targets[repeated])
    assert weighted(logits, targets).item() == pytest.approx(oversampled.item(), rel=1e-5)
    # It does not depend on how the images are divided into batches.
    halves = [weighted(logits[half], targets[half]) for half in (slice(0, 12, 2), slice(1, 12, 2))]
    assert sum(halves).item() / 2 == pytest.approx(oversampled.item(), rel=1e-5)


@pytest.mark.parametrize('name', ['ce', 'bce', 'focal'])
def test_targets_of_mixup_that_mix_nothing_give_the_loss_of_class_numbers(name):
    logits, targets = random_batch()
    args = options('--loss', name, '--smoothing', '0', '--class-weights', 'balanced')
    hard, soft = (create_loss(args, soft_targets=mixed, class_counts=[6, 3, 3]) for mixed in (False, True))
    one_hot = F.one_hot(targets, 3).float()
    assert soft(logits, one_hot).item() == pytest.approx(hard(logits, targets).item(), rel=1e-6)
    # An image counts with the mean weight of its classes.
    mixed = 0.75 * one_hot + 0.25 * one_hot.flip(0)
    plain = create_loss(args.replacing(class_weights=None), soft_targets=True)
    weights = torch.tensor([4 / 6, 4 / 3, 4 / 3])
    expected = sum(plain(logits[i:i + 1], mixed[i:i + 1]) * (mixed[i] @ weights) for i in range(12)) / 12
    assert soft(logits, mixed).item() == pytest.approx(expected.item(), rel=1e-5)


def test_smoothed_targets_of_mixup_that_mix_nothing_weigh_like_class_numbers():
    logits, targets = random_batch()
    args = options('--smoothing', '0.1', '--class-weights', 'balanced')
    hard, soft = (create_loss(args, soft_targets=mixed, class_counts=[6, 3, 3]) for mixed in (False, True))
    smoothed = F.one_hot(targets, 3) * 0.9 + 0.1 / 3
    assert soft(logits, smoothed).item() == pytest.approx(hard(logits, targets).item(), rel=1e-6)


def test_weights_of_classes_are_those_of_scikit_learn_and_without_images_0(caplog):
    from sklearn.utils.class_weight import compute_class_weight
    targets = [0] * 7 + [1] * 2 + [3]
    with caplog.at_level('INFO'):
        weights = balanced_weights([7, 2, 0, 1])
    assert weights[[0, 1, 3]].tolist() == pytest.approx(
        compute_class_weight('balanced', classes=np.array([0, 1, 3]), y=targets).tolist())
    assert weights[2] == 0 and '1 class without a training image count' in caplog.text


def test_focal_loss_is_cross_entropy_at_0_and_finite_at_certainty():
    logits, targets = random_batch()
    for smoothing in ('0', '0.1'):
        args = options('--loss', 'focal', '--smoothing', smoothing)
        at_0 = create_loss(args.replacing(focal_gamma=0.0), soft_targets=False)(logits, targets)
        assert at_0.item() == pytest.approx(
            F.cross_entropy(logits, targets, label_smoothing=float(smoothing)).item(), rel=1e-6)
    p = logits.softmax(1)[range(12), targets]
    loss = create_loss(options('--loss', 'focal', '--smoothing', '0'), soft_targets=False)(logits, targets)
    assert loss.item() == pytest.approx((-(1 - p) ** 2 * p.log()).mean().item(), rel=1e-5)
    sure = torch.tensor([[200.0, 0, 0]], requires_grad=True)
    args = options('--loss', 'focal', '--focal-gamma', '0.5')
    create_loss(args, soft_targets=False)(sure, torch.tensor([0])).backward()
    assert sure.grad.isfinite().all()


def test_binary_cross_entropy_takes_what_mixup_makes():
    args = options('--loss', 'bce', '--bce-target-thresh', '0.2')
    prepare = TrainBatchPreparer(CPU, batch_size=4, num_classes=3, mean=(0.5,) * 3, std=(0.5,) * 3, mixup_alpha=1.0,
                                 smoothing=0.1)
    _, mixed = prepare(torch.zeros(4, 3, 8, 8, dtype=torch.uint8), torch.tensor([0, 1, 2, 0]))
    logits = random_batch()[0][:4]
    loss = create_loss(args, soft_targets=prepare.mixing)(logits, mixed)
    expected = F.binary_cross_entropy_with_logits(logits, (mixed > 0.2).float())
    assert loss.item() == pytest.approx(expected.item()) and math.isfinite(loss.item())
    hard = create_loss(options('--loss', 'bce'), soft_targets=False)(*random_batch())
    assert hard.item() == BinaryCrossEntropy(smoothing=0.1)(*random_batch()).item()


@pytest.mark.parametrize(('argv', 'message'), [
    (('--focal-gamma', '1'), '--focal-gamma 1 beside --loss ce; say --loss focal'),
    (('--bce-target-thresh', '0.2', '--loss', 'focal'), '--bce-target-thresh 0.2 beside --loss focal; say --loss bce'),
    (('--jsd', '--aug-splits', '3', '--loss', 'bce'), '--jsd is a loss of its own'),
    (('--jsd', '--aug-splits', '3', '--class-weights', 'balanced'), '--jsd is a loss of its own')])
def test_losses_that_do_not_go_together(argv, message):
    with pytest.raises(UserError, match=message):
        create_loss(options(*argv), soft_targets=False)


# --- Recomputed activations -------------------------------------------------------------------------------------------

@pytest.mark.parametrize(('name', 'changes'), [
    ('t2t_vit_7', {'drop_rate': 0.2, 'drop_path_rate': 0.3}), ('test_vit', {'drop_path_rate': 0.3}),
    ('test_resnet', {'drop_rate': 0.2})])
def test_recomputing_activations_changes_no_byte_of_a_run(name, changes):
    """Neither of weights, nor of running statistics, which a second forward pass would move again."""
    states = []
    for argv in ((), ('--grad-checkpointing',)):
        model, calls = tiny(name, **changes), []
        block = [module for module in model.modules() if isinstance(module, torch.nn.Conv2d | torch.nn.LayerNorm)][-2]
        block.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        state = train(model, options('--accum-steps', '2', *argv), steps=3)
        assert len(calls) == (12 if argv else 6), 'each block is computed twice'
        states.append({'model': dict(model.state_dict()), 'average': dict(state.ema.module.state_dict()),
                       'optimizer': state.optimizer.state_dict()['state'], 'sums': state.loss_sums})
    assert_same(*states)


# --- Whole runs -------------------------------------------------------------------------------------------------------

RUN = ('--dataset', 'digits', '--only-classes', '0-2', '--model', 't2t_vit_7', '--img-size', '32', '--device', 'cpu',
       '--model-kwargs', 'embed_dim=32', 'depth=2', 'num_heads=2', '-b', '32', '-j', '0', '--epochs', '2',
       '--warmup-epochs', '0', '--cooldown-epochs', '0', '--lr', '1e-2', '--drop', '0.1', '--no-tensorboard',
       '--initial-checkpoint', 'start.pth', '--mixup', '0', '--cutmix', '0')
TUNED = ('--freeze', '1', '--layer-decay', '0.7', '--loss', 'focal', '--class-weights', 'balanced',
         '--grad-checkpointing', '--opt-kwargs', 'amsgrad=True')


@pytest.fixture(scope='module')
def tuned(tmp_path_factory):
    """Two epochs on two processes, and their checkpoints."""
    folder = tmp_path_factory.mktemp('tuned')
    torch.save(create_model('t2t_vit_7', num_classes=3, img_size=32, embed_dim=32, depth=2, num_heads=2).state_dict(),
               folder / 'start.pth')
    printed = succeeded(launch(2, *RUN, *TUNED, '--experiment', 'whole', cwd=folder))
    assert 'M parameters are frozen (--freeze 1)' in printed and '--class-weights balanced: from ' in printed
    return folder


def checkpoints(run):
    return [{k: v for k, v in read_checkpoint(path).items() if k != 'args'}
            for path in sorted(run.glob('checkpoint-*.pth.tar'))]


def test_a_tuned_run_on_two_processes_resumes_to_the_byte(tuned):
    whole = tuned / 'output/train/whole'
    start = min(whole.glob('checkpoint-*.pth.tar'))
    printed = succeeded(launch(2, *RUN, *TUNED, '--experiment', 'resumed', '--resume', start, cwd=tuned))
    assert 'differ from those' not in printed
    first, last = checkpoints(whole)
    assert_same(last, checkpoints(tuned / 'output/train/resumed')[-1])
    before = read_checkpoint(tuned / 'start.pth')
    moved = {name for name in changed(before, last['state_dict'])}
    assert moved == {name for name in before if name.startswith(('blocks.1.', 'norm.', 'head.'))}
    assert changed(before, last['state_dict_ema']) == moved
    assert {group['name']: group['lr_scale'] for group in last['optimizer']['param_groups']} == {
        'layer 2, decayed': 0.7, 'layer 2, not decayed': 0.7, 'layer 3, decayed': 1, 'layer 3, not decayed': 1}


@pytest.mark.parametrize(('argv', 'message'), [
    (('--layer-decay', '0.7', '--opt-kwargs', 'amsgrad=True'),
     'its optimizer was made with --freeze 1, this run is without --freeze; give the same, or --no-resume-opt'),
    (('--freeze', '1', '--opt-kwargs', 'amsgrad=True'), 'made with --layer-decay 0.7, this run is without'),
    (('--freeze', '1', '--layer-decay', '0.7'), 'made with --opt-kwargs amsgrad=True, this run is without')])
def test_a_resume_with_other_groups_says_what_differs(tuned, argv, message):
    start = min((tuned / 'output/train/whole').glob('checkpoint-*.pth.tar'))
    refused = run_script('train.py', *RUN, *argv, '--resume', start, '--experiment', 'other', cwd=tuned)
    assert refused.returncode == 2 and message in refused.stderr and refused.stderr.count('\n') == 1, refused.stderr
