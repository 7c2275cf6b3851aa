"""--compile: what is compiled computes the same, once for all blocks, under DDP in pieces, and resumes exactly."""
import copy
import json

import pytest
import timm
import torch
import torch.distributed as dist
from torch import nn
from torch._dynamo.backends.debugging import aot_eager
from torch.nn.parallel import DistributedDataParallel

import models  # noqa: F401, registers the architectures
from engine.compile import compile_model
from engine.evaluate import evaluate
from engine.objective import LogitsOfTokens
from models.layers import DropPath
from tests.conftest import assert_same, launch, run_script, succeeded
from utils.checkpoint_reader import read_checkpoint
from utils.errors import UserError
from utils.runtime import Precision

SMALL = dict(img_size=32, embed_dim=32, depth=6, num_heads=2, num_classes=3, drop_path_rate=0.2)


@pytest.fixture
def graphs(monkeypatch):
    """The graphs that are compiled; by a backend that needs no C++ compiler."""
    torch.compiler.reset()
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return aot_eager(graph, inputs)

    compile_now = torch.compile
    monkeypatch.setattr('engine.compile.check_compiler', lambda: None)
    monkeypatch.setattr(torch, 'compile', lambda called, **settings: compile_now(
        called, backend=backend, dynamic=settings.get('dynamic')))
    yield compiled
    torch.compiler.reset()


def make(name, **kwargs):
    torch.manual_seed(0)
    return timm.create_model(name, **{**SMALL, **kwargs})


@pytest.mark.parametrize(('name', 'how'), [('t2t_vit_7', 'blocks'), ('t2t_vit_t_14', 'model')])
def test_logits_gradients_and_keys_are_those_of_the_model(name, how, graphs):
    eager, images = make(name, drop_path_rate=0.), torch.randn(2, 3, 32, 32)
    for layer in eager.modules():
        layer.p = 0. if isinstance(layer, nn.Dropout) else getattr(layer, 'p', None)
    model = copy.deepcopy(eager)
    compile_model(model, how)
    for called in (model, eager):
        called(images).square().sum().backward()
    for ours, expected in zip(model.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, expected.grad)
    assert list(model.state_dict()) == list(eager.state_dict()) and type(model) is type(eager)
    assert len(graphs) == (2 if how == 'blocks' else 1), 'blocks share one graph; the tokens have their own'
    assert not torch._dynamo.utils.counters['graph_break']


def test_dense_logits_are_compiled_once_for_all_tokens_that_are_exchanged(graphs):
    model, images = make('t2t_vit_7', aux_head=True, depth=1).eval(), torch.randn(2, 3, 32, 32)
    eager = copy.deepcopy(model)
    called = LogitsOfTokens(model)
    compile_model(model, 'model', called)
    for exchanged in ([False] * 4, [True, False, True, False], [True] * 4):
        expected = eager.forward_dense(images, torch.tensor(exchanged))
        torch.testing.assert_close(called(images, torch.tensor(exchanged)), expected)
    assert len(graphs) == 1 and list(model.state_dict()) == list(eager.state_dict())


def test_blocks_of_all_rates_share_their_graphs(graphs):
    model = make('t2t_vit_7', depth=12)
    compile_model(model, 'blocks')
    for _ in range(2):
        model(torch.randn(2, 3, 32, 32)).sum().backward()
    # Of the tokens; of the first block, which drops nothing; of the second's rate; of any rate.
    assert len(graphs) <= 4


def test_no_block_of_timm_stays_eager(graphs):
    """Each has a rate of its own, and torch.compile makes a graph of each."""
    model = make('deit_tiny_patch16_224', depth=11, embed_dim=48)
    with torch._dynamo.config.patch(recompile_limit=8):  # torch's own
        compile_model(model, 'blocks')
        for _ in range(2):
            model(torch.randn(2, 3, 32, 32)).sum().backward()
    assert len(graphs) >= 11


def test_drop_path_drops_whole_images_at_its_rate():
    layer, x = DropPath(0.3), torch.ones(4000, 2, 3)
    out = layer(x)
    assert torch.equal(out, out[:, :1, :1].expand_as(out))
    kept = out[:, 0, 0] > 0
    assert kept.float().mean().item() == pytest.approx(0.7, abs=0.03)
    torch.testing.assert_close(out[kept], torch.full_like(out[kept], 1 / 0.7))
    assert torch.equal(layer.eval()(x), x)


def test_ddp_has_a_graph_for_each_bucket(graphs, tmp_path):
    model = make('t2t_vit_7', embed_dim=128)
    compile_model(model, 'model')
    dist.init_process_group('gloo', init_method=f'file://{tmp_path}/group', rank=0, world_size=1)
    try:
        wrapped = DistributedDataParallel(model, bucket_cap_mb=1)
        wrapped(torch.randn(2, 3, 32, 32)).sum().backward()
    finally:
        dist.destroy_process_group()
    assert len(graphs) > 2, 'gradients of late blocks must not wait for those of the early ones'


class Batches(list):
    def take_bad_count(self):
        return 0


def test_a_smaller_last_batch_is_not_compiled(graphs):
    model = make('t2t_vit_7').eval()
    batches = Batches((torch.randn(count, 3, 32, 32), torch.arange(count) % 3) for count in (4, 4, 3))

    def prepare(*batch):
        return batch

    prepare.device = torch.device('cpu')
    precision = Precision(prepare.device, enabled=False)
    expected = evaluate(model, batches, prepare, precision=precision)
    compile_model(model, 'model')
    result = evaluate(model, batches, prepare, precision=precision)
    assert len(graphs) == 1 and result.count == 11
    assert result.loss == pytest.approx(expected.loss, rel=1e-5) and result.top1 == expected.top1


def test_what_cannot_be_compiled_is_said_in_one_line(graphs, tmp_path, image_folder):
    with pytest.raises(UserError, match='ResNet has no blocks; say --compile model'):
        compile_model(timm.create_model('resnet18'), 'blocks')
    result = run_script('train.py', image_folder, '--compile', 'graphs', '--accum-steps', '2', cwd=tmp_path)
    assert result.returncode == 2 and '--compile graphs with --accum-steps 2' in result.stderr.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.parametrize('processes', [1, 2])
@pytest.mark.parametrize('how', ['blocks', 'model'])
def test_a_compiled_run_resumes_exactly(how, processes, tmp_path):
    """At the default rate of dropped paths."""
    run = ('--dataset', 'digits', '--only-classes', '0-2', '--model', 't2t_vit_7', '--img-size', '32', '-j', '0',
           '--model-kwargs', 'embed_dim=32', 'depth=3', 'num_heads=2', '-b', '16', '--epochs', '2', '--cooldown-epochs',
           '0', '--checkpoint-steps', '5', '--checkpoint-hist', '9', '--no-tensorboard', '--device', 'cpu',
           '--model-ema-decay', '0.9', '--output', 'runs', '--compile', how)
    succeeded(launch(processes, *run, '--experiment', 'whole', cwd=tmp_path))
    whole = tmp_path / 'runs/train/whole'
    middle = sorted(path for path in whole.glob('checkpoint*.pth.tar'))[0]
    succeeded(launch(processes, *run, '--experiment', 'again', '--resume', middle, cwd=tmp_path))
    ends = (read_checkpoint(folder / 'last.pth.tar') for folder in (whole, tmp_path / 'runs/train/again'))
    assert_same(*({k: v for k, v in end.items() if k != 'args'} for end in ends))

    results = []
    for index, options in enumerate(((), ('--compile', 'model'))):
        succeeded(run_script('validate.py', '--dataset', 'digits', '--only-classes', '0-2', '--checkpoint',
                             whole / 'last.pth.tar', '-j', '0', '-b', '7', '--device', 'cpu',
                             '--results-file', f'r{index}', *options, cwd=tmp_path))
        results.append(json.loads((tmp_path / f'r{index}.json').read_text()))
    eager, compiled = results
    assert compiled['loss'] == pytest.approx(eager['loss'], rel=1e-4) and compiled['count'] == eager['count']
