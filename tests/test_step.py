"""The training step: what it makes the host wait for, and what a step that is skipped leaves behind.

    python -m pytest tests/test_step.py
"""
import copy
import time
from argparse import Namespace
from datetime import timedelta
from unittest.mock import create_autospec

import numpy as np
import pytest
import torch
from timm.utils import ModelEmaV3
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from benchmarks.counts import counting
from engine.ema import ModelEma
from engine.objective import Objective
from engine.optimizer import create_optimizer, param_groups
from engine.run import create_state
from engine.state import TrainState
from engine.step import TrainingStep
from models import create_model
from tests.conftest import assert_same
from utils import distributed
from utils.distributed import AsyncMax, World
from utils.errors import NotFiniteError, UserError
from utils.runtime import Precision

CPU = torch.device('cpu')
BATCH = 4
SCALE = 1024.0


class Options(Namespace):
    def as_dict(self) -> dict:
        return vars(self)


class WithStatistics(nn.Module):
    """A batch norm, then a T2T-ViT without dropout: parameters, constant buffers, running statistics and a counter."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.body = create_model('t2t_vit_7', img_size=32, num_classes=3, embed_dim=32, depth=2, num_heads=2,
                                 tokens_type='transformer')

    def forward(self, images):
        return self.body(self.norm(images))

    def get_classifier(self):
        return self.body.get_classifier()


def make(*, device=CPU, scaled=False, **changes) -> tuple[TrainState, TrainingStep]:
    """A new run's state, always the same, and its step; `scaled` as float16 has it."""
    args = Options(**{'opt': 'adamw', 'opt_eps': None, 'opt_betas': None, 'lr': 1e-3, 'weight_decay': 0.05,
                      'momentum': 0.9, 'model': 'tiny', 'sync_bn': False, 'channels_last': False, 'model_ema': True,
                      'model_ema_decay': 0.9, 'model_ema_force_cpu': False, 'accum_steps': 1, 'clip_grad': 1.0,
                      'max_skipped_steps': 2, 'amp': False, **changes})
    torch.manual_seed(0)
    model = WithStatistics()
    model.norm.running_mean.neg_()  # −0, whose bytes differ from those of 0
    precision = Precision(device, enabled=args.amp)
    if scaled:
        precision.scaler = torch.amp.GradScaler(device.type, init_scale=SCALE)
    state = create_state(args, model, create_optimizer(param_groups(model, args.weight_decay), args), precision,
                         ['a', 'b', 'c'], World(rank=0, local_rank=0, size=1, device=device))
    state.model.train()
    step = TrainingStep(state, Objective(state.model, nn.CrossEntropyLoss()), precision=precision, args=args,
                        prepare=lambda *batch: tuple(tensor.to(device, non_blocking=True) for tensor in batch))
    return state, step


def batch(seed: int, value: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(BATCH, 3, 32, 32, generator=generator)
    images[1, 2, 3, 4] += value
    return images, torch.randint(3, (BATCH,), generator=generator)


def contents(state: TrainState) -> dict:
    """All tensors of the state by name, of the optimizer and the sums too; generators and counts aside."""
    found = {f'model.{name}': tensor for name, tensor in state.model.state_dict().items()}
    found |= {f'average.{name}': tensor for name, tensor in state.ema.module.state_dict().items()}
    for index, of_parameter in state.optimizer.state_dict()['state'].items():
        found |= {f'optimizer.{index}.{name}': torch.as_tensor(value) for name, value in of_parameter.items()}
    found |= {name: getattr(state, name) for name in ('loss_sums', 'window_sums', 'bad_images')}
    return {name: tensor.detach().clone() for name, tensor in found.items()}


def assert_same_bytes(before: dict, after: dict) -> None:
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.numpy().tobytes() == after[name].numpy().tobytes(), name


# --- What the host waits for -----------------------------------------------------------------------------------------

def waits_of(call) -> list[str]:
    with counting() as counts:
        call()
    assert counts.kernels or counts.reads
    return list(counts.reads.elements())


@pytest.mark.parametrize('changes', [{'clip_grad': None}, {'accum_steps': 2, 'amp': True}, {'opt': 'sgd'}],
                         ids=['float32', 'bfloat16, clipped, accumulated', 'sgd'])
def test_the_host_waits_for_no_step_before_it_asks(changes):
    state, step = make(**changes)
    batches = [batch(seed) for seed in range(4 * state.options['accum_steps'])]
    step(iter(batches))
    seen = [waits_of(lambda: step(iter(batches))) for _ in range(3)]
    assert seen == [[]] * 3
    assert waits_of(step.sync_skipped_steps)
    assert step._unsettled == [] and state.skipped_steps == 0


def test_the_host_waits_where_the_optimizer_is_not_fused():
    """As the docstring says; and the measure of the test above sees it."""
    _, step = make(opt='lion')
    assert 'item' in waits_of(lambda: step(iter([batch(0)])))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU')
@pytest.mark.parametrize('changes', [{'amp': False}, {'amp': True, 'accum_steps': 2}])
def test_a_gpu_is_not_waited_for(changes):
    state, step = make(device=torch.device('cuda'), **changes)
    batches = [tuple(tensor.pin_memory() for tensor in batch(seed)) for seed in range(2)]
    step._prepare = lambda *tensors: tuple(tensor.to('cuda', non_blocking=True) for tensor in tensors)
    step(iter(batches))
    torch.cuda.set_sync_debug_mode('error')
    try:
        step(iter(batches))
    finally:
        torch.cuda.set_sync_debug_mode('default')
    step.sync_skipped_steps()


# --- A step that is skipped ------------------------------------------------------------------------------------------

def run(step: TrainingStep, batches: list) -> None:
    for start in range(0, len(batches), step._args.accum_steps):
        step(iter(batches[start:start + step._args.accum_steps]))
    step.sync_skipped_steps()


@pytest.mark.parametrize(('value', 'changes'), [
    (torch.nan, {}), (torch.inf, {'amp': True}), (torch.nan, {'accum_steps': 2}), (torch.nan, {'opt': 'sgd'}),
    (torch.nan, {'opt': 'momentum', 'clip_grad': None}), (torch.nan, {'opt': 'adam'}), (torch.nan, {'opt': 'lion'}),
    (torch.nan, {'opt': 'lamb', 'accum_steps': 2}), (torch.nan, {'model_ema_force_cpu': True}),
    (torch.nan, {'scaled': True}), (torch.nan, {'scaled': True, 'opt': 'lion'})], ids=str)
@pytest.mark.parametrize('good_steps', [0, 2])
def test_a_skipped_step_changes_no_byte_and_the_run_goes_on_as_one_without_it(value, changes, good_steps):
    (with_bad, bad_step), (without, good_step) = make(**changes), make(**changes)
    per_step = with_bad.options['accum_steps']
    good = [batch(seed) for seed in range((good_steps + 2) * per_step)]
    bad = [batch(100)] * (per_step - 1) + [batch(101, value)]
    run(bad_step, good[:good_steps * per_step])
    before, count = contents(with_bad), with_bad.global_step
    run(bad_step, bad)
    after = contents(with_bad)
    if not good_steps:  # torch makes the moments in the first step; they are to be those of no step
        made = {name for name in after if name not in before}
        assert all(not after.pop(name).any() for name in made)
    assert_same_bytes(before, after)
    assert (with_bad.skipped_steps, with_bad.skipped_in_a_row, with_bad.global_step) == (1, 1, count + 1)
    if with_bad.scaler.is_enabled():
        assert (without.scaler.get_scale(), with_bad.scaler.get_scale()) == (SCALE, SCALE / 2)
    run(bad_step, good[good_steps * per_step:])
    run(good_step, good)
    assert_same_bytes(contents(without), contents(with_bad))
    assert (with_bad.skipped_steps, with_bad.skipped_in_a_row) == (1, 0)


class WithManyStatistics(nn.Sequential):
    """Batch norms of other sizes and, of one, another dtype, in front of a classifier."""

    def __init__(self, layers: int):
        super().__init__(*(nn.Sequential(nn.Conv2d(3 + k, 4 + k, 1), nn.BatchNorm2d(4 + k)) for k in range(layers)),
                         nn.BatchNorm2d(3 + layers, affine=False, momentum=None), nn.AvgPool2d(32), nn.Flatten(),
                         nn.Linear(3 + layers, 3))
        self[0][1].running_mean.neg_()

    def get_classifier(self):
        return self[-1]


def with_many_statistics(layers: int) -> tuple[TrainState, TrainingStep]:
    args = Options(**make()[0].options | {'clip_grad': None, 'model_ema': False})
    torch.manual_seed(0)
    model, precision = WithManyStatistics(layers).train(), Precision(CPU, enabled=False)
    state = create_state(args, model, create_optimizer(param_groups(model, 0.05), args), precision, ['a', 'b', 'c'],
                         World(rank=0, local_rank=0, size=1, device=CPU))
    return state, TrainingStep(state, Objective(model, nn.CrossEntropyLoss()), prepare=lambda *batch: batch,
                               precision=precision, args=args)


def test_statistics_of_all_layers_are_put_back_or_kept():
    """Against a copy of the model that sees the good batches alone; `affine=False` has no parameters to update."""
    state, step = with_many_statistics(5)
    other, other_step = with_many_statistics(5)
    for seed, value in enumerate((0.0, torch.nan, 0.0, torch.inf, torch.nan, 0.0)):
        before = {name: tensor.clone() for name, tensor in state.model.state_dict().items()}
        step(iter([batch(seed, value)]))
        if value:
            assert_same_bytes(before, state.model.state_dict())
        else:
            other_step(iter([batch(seed)]))
            changed = [name for name, tensor in state.model.named_buffers() if not torch.equal(tensor, before[name])]
            assert len(changed) == 3 * 6  # each mean, variance and count
        assert_same_bytes(other.model.state_dict(), state.model.state_dict())


def test_statistics_take_as_many_operators_however_many_layers_there_are():
    class Copies(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.seen = []

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            name = function._schema.name.removeprefix('aten::')
            self.seen += [name] * (name in ('clone', 'where', '_foreach_copy_'))
            return function(*args, **(kwargs or {}))

    for layers in (1, 12):
        _, step = with_many_statistics(layers)
        with Copies() as copies:
            step(iter([batch(0)]))
        assert copies.seen == 2 * ['_foreach_copy_'] + 2 * ['_foreach_copy_', 'where', '_foreach_copy_']


def test_skipped_steps_are_told_of_when_they_are_settled(caplog):
    caplog.set_level('WARNING', logger='engine.step')
    state, step = make()
    for value in (0.0, torch.nan, torch.nan, 0.0, torch.nan):
        step(iter([batch(1, value)]))
    assert not caplog.messages and state.skipped_steps == 0
    step.sync_skipped_steps()
    assert [message[:16] for message in caplog.messages] == [f'epoch 1, step {n}:' for n in (2, 3, 5)]
    assert caplog.messages[1].endswith('the step is skipped (2 so far, 2 in a row)')
    assert (state.skipped_steps, state.skipped_in_a_row) == (3, 1)
    for value in (torch.nan, torch.nan, torch.nan):
        step(iter([batch(1, value)]))
    with pytest.raises(NotFiniteError, match='not finite in 3 steps in a row, up to epoch 1, step 7; none of them'):
        step.sync_skipped_steps()
    step.sync_skipped_steps()


def test_a_norm_that_overflows_is_a_step_that_is_skipped():
    """Every element of the gradient is finite, and no clipped step could be made of it."""
    state, step = make(opt='sgd')
    step._objective.loss.forward = lambda logits, targets: 1e30 * logits.sum()
    before = contents(state)
    step(iter([batch(0)]))
    assert step.gradient_norm.isinf()
    assert_same_bytes(before, contents(state))


# --- The same as before, to rounding ---------------------------------------------------------------------------------

@pytest.mark.parametrize('opt', ['adamw', 'adam', 'sgd', 'momentum'])
def test_fused_optimizers_and_average_are_the_others_to_rounding(opt):
    states = []
    for is_fused in (True, False):
        state, step = make(opt=opt)
        average = ModelEmaV3(state.model, decay=0.9)
        if not is_fused:
            settings = {'nesterov': opt == 'sgd', 'momentum': 0.9} if opt in ('sgd', 'momentum') else {}
            kind = {'adamw': torch.optim.AdamW, 'adam': torch.optim.Adam}.get(opt, torch.optim.SGD)
            groups = [{k: g[k] for k in ('params', 'lr', 'weight_decay')} for g in state.optimizer.param_groups]
            state.optimizer = kind(groups, **settings)
            step = TrainingStep(state, step._objective, prepare=step._prepare, precision=step._precision,
                                args=step._args)
        assert all(bool(group['fused']) is is_fused for group in state.optimizer.param_groups)
        for seed in range(5):
            step(iter([batch(seed)]))
            average.update(state.model)
        step.sync_skipped_steps()
        torch.testing.assert_close(average.module.state_dict(), state.ema.module.state_dict(), rtol=1e-6, atol=1e-8)
        states.append(state)
    fused, plain = (state.model.state_dict() for state in states)
    torch.testing.assert_close(fused, plain, rtol=1e-5, atol=1e-6)
    moved = max((fused[name] - tensor).abs().max() for name, tensor in make()[0].model.state_dict().items())
    assert moved > 1e-3


def test_the_average_and_its_counters_with_a_flag_and_without():
    model = WithStatistics()
    average = ModelEma(model, decay=0.75)
    start = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor += 2
    average.update(model, torch.tensor(True))
    assert_same(dict(start), dict(average.module.state_dict()))
    average.update(model)
    for name, tensor in average.module.state_dict().items():
        moved = 0.5 if tensor.is_floating_point() else 2
        torch.testing.assert_close(tensor, start[name] + moved)


def test_an_average_elsewhere_is_the_same_to_the_byte():
    model = WithStatistics()
    averages = [ModelEma(model, decay=0.75, device=device) for device in (None, 'cpu')]
    for skip in (None, torch.tensor(False), torch.tensor(True), None):
        with torch.no_grad():
            for tensor in model.state_dict().values():
                tensor += torch.nan if tensor.is_floating_point() and skip is not None and skip else 2
        before = {name: tensor.clone() for name, tensor in averages[0].module.state_dict().items()}
        for average in averages:
            average.update(model, skip)
        here, elsewhere = (average.module.state_dict() for average in averages)
        assert_same_bytes(here, elsewhere)
        if skip is not None and skip:
            assert_same_bytes(before, here)
            model.load_state_dict(before)


def test_an_average_elsewhere_is_one_copy_and_one_wait(monkeypatch):
    """By tensors that have no values, and so can say that they are on a GPU."""
    seen = []

    class Between(TorchDispatchMode):
        """Notes what reads one device and writes another; no operator of a GPU does anything else with both."""

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            tensors = [t for t in tree_flatten((args, kwargs, result))[0] if isinstance(t, torch.Tensor)]
            if len({t.device.type for t in tensors}) > 1 and function._schema.name != 'aten::empty_like':
                seen.append((function._schema.name.removeprefix('aten::'), args[2:], kwargs))
            return result

    stream = create_autospec(torch.cuda.Stream, instance=True)
    stream.synchronize.side_effect = lambda: seen.append('wait')
    monkeypatch.setattr(torch.cuda, 'current_stream', create_autospec(torch.cuda.current_stream, return_value=stream))
    memory = create_autospec(torch.empty_like, side_effect=torch.empty_like)
    monkeypatch.setattr(torch, 'empty_like', memory)
    with FakeTensorMode():
        for layers in (1, 12):
            model, copied = (nn.Sequential(*(nn.BatchNorm1d(4, device=device) for _ in range(layers)))
                             for device in ('cuda', 'cpu'))
            copied.to = lambda **_: None
            monkeypatch.setattr('timm.utils.model_ema.deepcopy', lambda _, copied=copied: copied)  # they cannot be
            average = ModelEma(model, decay=0.75, device='cpu')
            skip = torch.zeros((), dtype=torch.bool, device='cuda')
            for step in range(2):
                seen.clear()
                memory.reset_mock()
                with Between():
                    average.update(model, skip)
                assert seen == [('_foreach_copy_', (True,), {}), 'wait']
                made = [call for call in memory.call_args_list if str(call.kwargs.get('device')) == 'cpu']
                assert len(made) == (5 * layers + 1 if step == 0 else 0)
                assert all(call.kwargs['pin_memory'] for call in made)


class WithScratch(nn.Module):
    """A layer that keeps something for the next forward pass, of another size, as ConViT keeps its distances."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.register_buffer('scratch', torch.zeros(1), persistent=False)

    def forward(self, x):
        self.scratch = torch.zeros(len(x))
        return self.layer(x) + self.scratch[:, None]


def test_the_average_is_of_what_the_model_saves():
    model = WithScratch()
    average = ModelEma(model, decay=0.5)
    model(torch.ones(3, 2))
    before = model.layer.weight.detach().clone()
    with torch.no_grad():
        model.layer.weight += 2
    average.update(model)
    torch.testing.assert_close(average.module.layer.weight.detach(), before + 1)


@pytest.mark.parametrize('opt', ['adamw', 'momentum'])
def test_moments_lie_as_the_weights_do_whatever_they_were_saved_from(opt):
    """A fused optimizer goes through both in the order of memory: --channels-last may come or go with a resume."""
    def start(layout):
        torch.manual_seed(0)
        layer = nn.Conv2d(3, 4, 3).to(memory_format=layout)
        args = Options(opt=opt, opt_eps=None, opt_betas=None, lr=0.1, weight_decay=0.1, momentum=0.9, model='conv',
                       sync_bn=False, channels_last=False, model_ema=False)
        layer.get_classifier = nn.Identity
        optimizer = create_optimizer(param_groups(layer, 0.1), args)
        return create_state(args, layer, optimizer, Precision(CPU, enabled=False), ['a'],
                            World(rank=0, local_rank=0, size=1, device=CPU))

    def go(state, steps):
        for seed in steps:
            torch.manual_seed(seed)
            state.model(torch.randn(2, 3, 8, 8)).square().sum().backward()
            state.optimizer.step()
            state.optimizer.zero_grad()

    whole, other = start(torch.contiguous_format), start(torch.channels_last)
    go(whole, (1, 2))
    content = copy.deepcopy(whole.state_dict())
    go(whole, (3, 4))
    other.load_state_dict(content, source='file')
    assert other.model.weight.is_contiguous(memory_format=torch.channels_last)
    go(other, (3, 4))
    torch.testing.assert_close(other.model.weight, whole.model.weight)


# --- Checkpoints of runs before this one -----------------------------------------------------------------------------

@pytest.mark.parametrize('fused', [None, False])
def test_a_checkpoint_of_an_optimizer_that_was_not_fused_goes_on(fused):
    state, step = make()
    run(step, [batch(0), batch(1)])
    content = copy.deepcopy(state.state_dict())
    for group in content['optimizer']['param_groups']:
        group['fused'], group['weight_decay'] = fused, 7
    for of_parameter in content['optimizer']['state'].values():
        of_parameter['step'] = of_parameter['step'].double()  # put right by what also puts it on a GPU
    other, _ = make(lr=2e-3)
    other.load_state_dict(content, source='file')
    assert all(g['fused'] and g['lr'] == 2e-3 and g['weight_decay'] != 7 for g in other.optimizer.param_groups)
    other, step_of_other = make()
    other.load_state_dict(content, source='file')
    for one in (step, step_of_other):
        run(one, [batch(2), batch(3, torch.nan), batch(4)])
    assert_same_bytes(contents(state), contents(other))
    assert_same({**state.state_dict(), 'ranks': None}, {**other.state_dict(), 'ranks': None})


# --- Ranks agree -----------------------------------------------------------------------------------------------------

def _agree(rank: int, rendezvous: str) -> None:
    """Rank 1 is told something in its third step, and rank 0 nothing; then each hangs in turn."""
    torch.distributed.init_process_group('gloo', init_method=f'file://{rendezvous}', rank=rank, world_size=2)
    agreement = AsyncMax()
    given = [0, 0, 15 * rank, 15 * rank]
    assert [agreement.exchange(number) for number in given] == [0, 0, 0, 15]
    assert agreement.conclude(15 * rank) == 15
    assert agreement.exchange(9 - 9 * rank) == 0 and agreement.conclude(0) == 9  # the end of an epoch
    assert agreement.exchange(0) == 0 and agreement.conclude(3 * rank) == 3  # told during the evaluation
    agreement.exchange(rank)
    agreement.close()
    assert agreement._under_way is None
    # Nobody waits for a rank that has not come before the next call, and then no longer than --timeout.
    distributed._progress.timeout = timedelta(seconds=1)
    agreement = AsyncMax()
    if rank == 0:
        started = time.monotonic()
        agreement.exchange(0)
        assert time.monotonic() - started < 0.5
        with pytest.raises(RuntimeError) as caught:
            agreement.exchange(0)
        assert distributed.explain(caught.value) is not None, caught.value
        agreement.close()
    else:
        time.sleep(3)
    torch.distributed.barrier()


def test_two_ranks_agree_one_step_later_and_leave_nothing_under_way(tmp_path):
    torch.multiprocessing.start_processes(_agree, args=(str(tmp_path / 'rendezvous'),), nprocs=2, start_method='fork')


def test_one_process_knows_at_once():
    agreement = AsyncMax()
    assert [agreement.exchange(n) for n in (0, 15)] == [0, 15] and agreement.conclude(2) == 2
    agreement.close()


def test_bytes_are_what_the_helper_compares():
    zero = {'x': torch.zeros(1)}
    with pytest.raises(AssertionError):
        assert_same_bytes(zero, {'x': -torch.zeros(1)})
    assert np.signbit(make()[0].ema.module.norm.running_mean.numpy()).all()


def test_a_norm_with_a_single_value_says_what_helps():
    """Instance norms have the same rule, of the values of one image. Other mistakes keep their own message."""
    state, step = make()
    for size, norm, batch_size, said in ((1, nn.BatchNorm2d(3), 1, 'a --batch-size of at least 2, or a larger'),
                                         (1, nn.InstanceNorm2d(3), 2, 'give a larger --img-size')):
        step._objective.model = nn.Sequential(nn.AdaptiveAvgPool2d(size), norm)
        images, targets = batch(0)
        with pytest.raises(UserError, match=f'single value for each channel, from a batch of {batch_size} .*{said}'):
            step(iter([(images[:batch_size], targets[:batch_size])]))
    step._objective.model = nn.Linear(2, 2)
    with pytest.raises(RuntimeError, match='shapes'):
        step(iter([batch(0)]))
