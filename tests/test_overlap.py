"""DDP: gradients are summed while the backward pass runs, in buckets that stay; they are the average over the ranks.

The numbers that are held to here are written by `python -m benchmarks.scaling.overlap`.
"""
import contextlib
import json
import math
import warnings
from types import SimpleNamespace
from unittest import mock

import pytest
import timm
import torch
from torch import nn
from torch._dynamo.backends.debugging import aot_eager
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.scaling import overlap
from benchmarks.scaling.overlap import EARLY, Link, early_percent, list_hand_overs
from engine.compile import MODES, compile_model
from engine.loop import bucket_sizes, wrap_model
from engine.objective import Distillation
from engine.teacher import Teacher, create_teacher
from tests.conftest import ROOT, assert_same, run_module, succeeded
from tests.group import Group
from utils.distributed import World
from utils.runtime import Precision

SMALL = dict(img_size=32, embed_dim=48, depth=3, num_heads=3, num_classes=5)
RECORD = json.loads((ROOT / 'benchmarks/results/overlap.json').read_text())
COUNTED = RECORD['hand_overs']


@pytest.fixture(scope='module')
def two(tmp_path_factory):
    with contextlib.closing(Group(2, tmp_path_factory.mktemp('two'))) as group:
        yield group


@pytest.fixture(scope='module')
def three(tmp_path_factory):
    with contextlib.closing(Group(3, tmp_path_factory.mktemp('three'))) as group:
        yield group


def make(name: str, **kwargs) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, **kwargs)


def images_of(rank: int) -> torch.Tensor:
    return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(rank))


# --- Buckets ----------------------------------------------------------------------------------------------------------

def hand_overs_of_two_steps(world: World, name: str) -> list[dict]:
    model = wrap_model(make(name, img_size=32), world)
    link = Link(model)
    return [list_hand_overs(model, link, lambda: model(images_of(world.rank)).square().sum()) for _ in range(2)]


@pytest.mark.parametrize('name', ['t2t_vit_7', 't2t_vit_14'])
def test_buckets_are_handed_over_while_the_backward_pass_runs(name, two):
    """After as many gradients as committed, in the first step as in all others, and on both ranks."""
    steps = two(hand_overs_of_two_steps, name)
    assert steps == [[COUNTED[name]] * 2] * 2, 'to count anew: python -m benchmarks.scaling.overlap'


@pytest.mark.parametrize('name', COUNTED)
def test_most_bytes_go_before_the_last_gradient(name):
    gradients = [p.numel() * p.element_size() for p in make(name).parameters() if p.requires_grad]
    found = COUNTED[name]
    assert found['gradients'] == len(gradients) and sum(size for _, size in found['buckets']) == sum(gradients)
    assert early_percent(found) >= EARLY


def test_the_page_is_that_of_the_record():
    text = (ROOT / 'benchmarks/results/overlap.md').read_text()
    assert text == overlap.as_text(RECORD) and overlap.verdict(RECORD) in text
    rows = [{'delay': 5, 'contender': label, 'exposed_milliseconds': times}
            for label, times in (('registration', [40., 20., 30.]), ('ours', [3., 90., 6.]))]
    assert overlap.exposed_ratio(rows, 5) == pytest.approx(0.2)


def test_two_processes_are_measured(tmp_path):
    said = succeeded(run_module('benchmarks.scaling.overlap', '--model', 't2t_vit_7', '--img-size', '32',
                                '--repeats', '2',
                                '--delays', '1', '30', '--output', tmp_path, cwd=tmp_path))
    record = json.loads((tmp_path / 'overlap.json').read_text())
    assert record['hand_overs'] == COUNTED and overlap.verdict(record) in said
    rows = {(row['delay'], row['contender']): row for row in record['rows']}
    assert len(rows) == 8 and all(len(row['step_milliseconds']) == 2 for row in rows.values())
    buckets = COUNTED['t2t_vit_7']['buckets']
    assert rows[30, 'ours']['hand_overs'] == buckets and not rows[30, 'no communication']['hand_overs']
    # In the order of registration the buckets wait for one another behind the last gradient, each for 30 ms.
    gradients = COUNTED['t2t_vit_7']['gradients']
    waiting = [after for after, _ in rows[30, 'registration']['hand_overs']]
    assert set(waiting) == {gradients}
    assert min(rows[30, 'registration']['exposed_milliseconds']) >= 30 * len(waiting)


def test_sizes_of_buckets():
    assert bucket_sizes(1000) == (2**20, 2**20)
    assert bucket_sizes(16 * 2**20) == (2 * 2**20, 2 * 2**20)
    assert bucket_sizes(85 * 2**20) == bucket_sizes(10**10) == (2**20, 25 * 2**20)


# --- Gradients, buffers and collectives -------------------------------------------------------------------------------

def gradients_of_two_steps(world: World) -> list[list[torch.Tensor]]:
    """Both of the first step and the second, whose buckets DDP would make anew."""
    model = wrap_model(make('t2t_vit_7', **SMALL).eval(), world)  # nothing random
    assert not any(parameter.grad is not None for parameter in model.parameters()), 'of the pass that settles buckets'
    found = []
    for _ in range(2):
        model(images_of(world.rank)).square().sum().backward()
        found.append([parameter.grad.clone() for parameter in model.parameters()])
        model.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize('group', ['two', 'three'])
def test_gradients_are_the_average_of_all_ranks(group, request):
    of_ranks = request.getfixturevalue(group)(gradients_of_two_steps)
    model = make('t2t_vit_7', **SMALL).eval()
    for rank in range(len(of_ranks)):
        (model(images_of(rank)).square().sum() / len(of_ranks)).backward()
    for steps in of_ranks:
        for first, second, expected in zip(*steps, model.parameters(), strict=True):
            assert torch.equal(first, second), 'a sum must not depend on whether a step is the first after a resume'
            torch.testing.assert_close(first, expected.grad)


def make_distillation(world: World) -> tuple[Distillation, Teacher]:
    """Of another teacher and another projection on each rank, before they are made equal."""
    student = make('t2t_vit_7', **SMALL).eval()
    torch.manual_seed(world.rank)
    opened = SimpleNamespace(model=timm.create_model('t2t_vit_7', **{**SMALL, 'embed_dim': 96}))
    args = SimpleNamespace(distill='feature', channels_last=False, compile='')
    precision = Precision(world.device, enabled=False)
    teacher = create_teacher(args, student, opened, lambda images: images, precision, world)
    return Distillation(student, nn.CrossEntropyLoss(), teacher, temperature=1., weight=2.), teacher


def gradients_of_a_distillation(world: World) -> tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor]:
    """With the initial projection, and the teacher's answer to the same images on all ranks."""
    objective, teacher = make_distillation(world)
    initial = [parameter.detach().clone() for parameter in objective.projection.parameters()]
    images, wrapped = images_of(world.rank), wrap_model(objective, world)
    wrapped(images, (torch.arange(4), teacher(images))).backward()
    return [parameter.grad for parameter in objective.parameters()], initial, teacher(images_of(0))


def test_ranks_share_a_teacher_and_average_the_gradients_of_its_projection(two):
    (ours, initial, answer), (theirs, same, heard) = two(gradients_of_a_distillation)
    assert_same([ours, initial, answer], [theirs, same, heard])
    objective, teacher = make_distillation(World(0, 0, 1, torch.device('cpu')))  # rank 0's
    assert_same(initial, [parameter.detach() for parameter in objective.projection.parameters()])
    for rank in range(2):
        images = images_of(rank)
        (objective(images, (torch.arange(4), teacher(images))) / 2).backward()
    assert len(ours) == len(list(objective.model.parameters())) + 2
    for parameter, found in zip(objective.parameters(), ours, strict=True):
        torch.testing.assert_close(found, parameter.grad)


def buffers_and_warnings(world: World) -> tuple[list[torch.Tensor], int]:
    """Of a model whose statistics are this rank's own, in another layout than that of a new gradient."""
    model = make('resnet18', num_classes=5).to(memory_format=torch.channels_last)
    for buffer in model.buffers():
        buffer.fill_(world.rank + 1)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        wrapped = wrap_model(model, world)
        wrapped(images_of(world.rank)).square().sum().backward()
    counts = [buffer for name, buffer in model.named_buffers() if name.endswith('num_batches_tracked')]
    return counts, len(said)


def test_statistics_stay_those_of_their_rank_and_nothing_is_warned_of(two):
    """A rank resumes with running statistics of its own."""
    for rank, (counts, said) in enumerate(two(buffers_and_warnings)):
        assert counts == [rank + 2] * len(counts) and counts, 'what it had, and one batch more'
        assert not said


class Collectives(TorchDispatchMode):
    """Names of the collectives that the main thread starts."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator.namespace == 'c10d':
            self.names.append(operator.__name__)
        return operator(*args, **(kwargs or {}))


def collectives_of_three_steps(world: World, name: str) -> list[tuple[list[str], list[str]]]:
    """Of the forward and of the backward pass."""
    model, found = wrap_model(make(name), world), []
    for _ in range(3):
        with Collectives() as forward:
            loss = model(images_of(world.rank)).square().sum()
        with Collectives() as backward:
            loss.backward()
        found.append((forward.names, backward.names))
    return found


@pytest.mark.parametrize('name', ['t2t_vit_7', 'resnet18'])
def test_collectives_of_a_step_are_the_sums_of_its_buckets(name, two):
    """None for constants, nor for running statistics, which are shared at the end of an epoch."""
    buckets = ['allreduce_.default'] * {'t2t_vit_7': len(COUNTED['t2t_vit_7']['buckets']), 'resnet18': 6}[name]
    first = ['broadcast_.default'] * 2, buckets  # the order of the buckets, of rank 0
    assert two(collectives_of_three_steps, name) == [[first, ([], buckets), ([], buckets)]] * 2


# --- --compile --------------------------------------------------------------------------------------------------------

def losses_and_graphs(world: World, how: str) -> tuple[list[float], int]:
    """Of steps of training with dropped paths, compiled by a backend that needs no C++ compiler."""
    torch.compiler.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return aot_eager(graph, inputs)

    in_place = nn.Module.compile
    with (mock.patch('engine.compile.check_compiler'),
          mock.patch.object(nn.Module, 'compile', lambda module, **settings: in_place(
              module, backend=backend, dynamic=settings.get('dynamic')))):
        model = make('t2t_vit_7', **SMALL | {'embed_dim': 192, 'depth': 4}, drop_path_rate=0.1)
        compile_model(model, how)
        wrapped = wrap_model(model, world)
        losses = []
        for step in range(2):
            torch.manual_seed(step)
            loss = wrapped(images_of(world.rank)).square().mean()
            loss.backward()
            losses.append(loss.item())
    return losses, len(graphs)


def test_values_of_compile_differ_only_in_what_the_compiler_is_told():
    """So that one of them stands for all that compile a whole model."""
    told = {}
    for how in MODES:
        with mock.patch('engine.compile.check_compiler'), mock.patch.object(nn.Module, 'compile') as compiled:
            compile_model(make('t2t_vit_7', **SMALL), how)
        told[how] = compiled.call_args_list, torch._dynamo.config.optimize_ddp
    assert told == {how: ([mock.call(dynamic=False, mode=mode)], True) for how, mode in MODES.items()}


@pytest.mark.parametrize('how', ['blocks', 'model'])
def test_compiled_models_run_on_two_processes(how, two):
    found = two(losses_and_graphs, how)
    for losses, graphs in found:
        assert all(map(math.isfinite, losses))
        # Blocks share theirs; a whole model is cut at the borders of its buckets, so that they are summed early.
        assert graphs <= 4 if how == 'blocks' else graphs > 4
