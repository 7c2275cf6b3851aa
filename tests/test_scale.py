"""Tests of benchmarks/cost.py and targets.py: through the command line, on the smallest images.

    python -m pytest tests/test_scale.py
"""
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from torch.nn.parallel import DistributedDataParallel

from benchmarks.cost import fit_exponents, median_with_interval
from benchmarks.shared.measure import Contender
from benchmarks.shared.ranks import group_of_one, start_ddp
from benchmarks.targets import (
    Records,
    absolute,
    against_peer,
    against_yardstick,
    fidelity,
    float16,
    judge,
    memory,
    scaling,
)
from options.parser import parse_options
from options.scripts import train_parser
from tests.conftest import run_module, succeeded
from utils.distributed import World
from utils.runtime import Precision

CPU = torch.device('cpu')
QUICK = ('--models', 't2t_vit_7', '--img-size', '32', '--img-sizes', '32', '48', '--batch-sizes', '1', '2',
         '--ddp-batch-size', '2', '--token-sizes', '32', '64', '128',
         '--window', '0.001', '--repeats', '1', '--pairs', '3', '--device', 'cpu')


@pytest.fixture(scope='module')
def measured(tmp_path_factory):
    """One run of all parts but that of the ranks."""
    folder = tmp_path_factory.mktemp('scale')
    out = succeeded(run_module('benchmarks.cost', *QUICK, '--parts', 'size', 'batch', 'tokens', 'overhead',
                               '--output', folder / 'results', '--name', 'quick', cwd=folder))
    assert sorted(path.name for path in (folder / 'results').iterdir()) == ['quick.json', 'quick.md', 'quick.png']
    return SimpleNamespace(folder=folder / 'results', out=out, text=(folder / 'results/quick.md').read_text(),
                           record=json.loads((folder / 'results/quick.json').read_text()))


def test_every_point_is_measured(measured):
    record = measured.record
    assert [(point['batch_size'], point['img_size']) for point in record['size']] == [(1, 32), (1, 48)]
    assert [(point['batch_size'], point['img_size']) for point in record['batch']] == [(1, 32), (2, 32)]
    assert record['size'][0]['rows'] == record['batch'][0]['rows']  # one point of both, measured once
    for point in record['size'] + record['batch']:
        assert [row['contender'] for row in point['rows']] == ['published', 'default']
        for row in point['rows']:
            assert row['is_finite'] and row['peak_bytes'] > row['held_bytes']
            assert row['images_per_second'] == pytest.approx(
                1000 * point['batch_size'] / row['milliseconds']['median'])
    assert str(measured.folder) not in json.dumps(record) + measured.text
    assert measured.record['machine']['threads'] >= 1 and measured.out.strip().startswith(measured.text.strip())


def test_memory_of_token_layers_grows_as_it_should(measured):
    """Of the published layers, in bytes, which do not depend on the machine's mood: linear, and quadratic."""
    points = measured.record['tokens']
    assert [point['tokens'] for point in points] == [64, 256, 1024]
    exponents = measured.record['exponents']['train']
    assert exponents['published performer']['memory'] < 1.1
    assert exponents['default performer']['memory'] < 1.1
    assert exponents['published transformer']['memory'] > 1.5
    for point in points:
        assert all(row['is_finite'] for row in point['rows'])


def test_exponents_are_those_of_the_larger_half():
    def row(tokens, power):
        return {'contender': f'N^{power}', 'milliseconds': {'median': 3e-4 * tokens ** power},
                'peak_bytes': 5 * tokens ** (power - 0.5)}

    points = [{'task': 'train', 'tokens': n, 'rows': [row(n, 1), row(n, 2)]} for n in (400, 1600, 100, 6400)]
    points[2]['rows'][0]['milliseconds']['median'] = 1e6  # the smallest, which does not count
    points[3]['rows'][1] = {'contender': 'N^2', 'error': 'out of memory'}
    assert fit_exponents(points) == {'train': {'N^1': pytest.approx({'time': 1, 'memory': 0.5})}}


def test_overhead_is_of_pairs(measured):
    found = measured.record['overhead']
    without, with_ddp = (row['windows_milliseconds'] for row in found['rows'])
    assert len(without) == len(with_ddp) == 3
    assert found['percent'] == pytest.approx(100 * (np.median(np.divide(with_ddp, without)) - 1))
    low, high = found['interval']
    assert low <= found['percent'] <= high
    assert f'Overhead {found["percent"]:+.2f} %' in measured.text
    assert found['rows'][1]['kernels'] > found['rows'][0]['kernels']  # the buckets and their reduction


def test_what_is_called_ddp_is(monkeypatch):
    seen = []
    monkeypatch.setattr('benchmarks.shared.measure.TrainingStep', lambda state, model, **_: seen.append(type(model)))
    training_args = parse_options(train_parser(), ['--device', 'cpu'])
    args = SimpleNamespace(seed=1, batch_size=1, channels_last=False)
    with group_of_one(CPU):
        assert dist.get_world_size() == 1
        for label in ('no DDP', 'DDP'):
            start_ddp(Contender(label, 't2t_vit_7', 32), args, training_args, Precision(CPU, enabled=False),
                      World(0, 0, 1, CPU))
    assert not dist.is_initialized()
    assert [kind is DistributedDataParallel for kind in seen] == [False, True]


def test_an_interval_narrows_with_more_pairs():
    values = 1.02 + 0.05 * np.random.default_rng(0).standard_normal(400)
    (median, low, high), (_, wide_low, wide_high) = (median_with_interval(part, 0) for part in (values, values[:20]))
    assert low < median < high and abs(median - 1.02) < 0.01
    assert high - low < 0.5 * (wide_high - wide_low)


def test_pictures_have_curves(measured):
    picture = np.asarray(Image.open(measured.folder / 'quick.png').convert('RGB'))
    assert picture.shape == (1200, 1200, 3)
    for colour in ((0, 0x72, 0xb2), (0xd5, 0x5e, 0)):
        assert (picture == colour).all(axis=2).sum() > 100


@pytest.mark.slow
def test_two_ranks_against_one(tmp_path):
    succeeded(run_module('benchmarks.cost', *QUICK, '--parts', 'ranks', '--output', tmp_path, cwd=tmp_path,
                         OMP_NUM_THREADS='1'))
    found, = json.loads((tmp_path / 'scale.json').read_text())['ranks']
    assert (found['ranks'], found['threads_per_rank'], found['threads_of_one_rank']) == (2, 1, 2)
    alone, together = (found['windows_milliseconds'][label] for label in ('one rank', 'DDP'))
    assert found['faster'] == pytest.approx(2 * np.median(np.divide(alone, together)))
    assert found['images_per_second'] == pytest.approx(4000 / np.median(together))


@pytest.mark.parametrize('options, message', [
    (('--models', 't2t_vit_15'), "model 't2t_vit_15' does not exist; did you mean t2t_vit_19"),
    (('--ranks', '1'), '--ranks: 1 is too small: at least 2'),  # a process on its own would start itself without an end
    (('--img-sizes', '8'), '--img-sizes: an image of 8 × 8 pixels is too small'),
    (('--precision', 'fp16'), '--precision fp16: a CPU computes in fp32 or bf16')])
def test_a_mistake_is_one_line(tmp_path, options, message):
    result = run_module('benchmarks.cost', *QUICK, '--output', tmp_path / 'results', *options, cwd=tmp_path)
    assert result.returncode == 2 and message in result.stderr and result.stderr.count('\n') == 1
    assert not (tmp_path / 'results').exists()


# --- Targets ----------------------------------------------------------------------------------------------------------

def write_step(folder, name, model, speeds: dict, task='train', device='NVIDIA H200', **table):
    rows = [{'contender': contender, 'images_per_second': speed, 'peak_bytes': 1e6 / speed}
            for contender, speed in speeds.items()]
    table = {'model': model, 'task': task, 'img_size': 224, 'precision': 'bf16', 'batch_size': 256, **table}
    (folder / f'{name}.json').write_text(json.dumps({
        'machine': {'device': device, **({'cuda': '13'} if 'NVIDIA' in device else {})},
        'tables': [{**table, 'rows': rows + [{'contender': 'gone', 'error': 'out of memory'}]}]}))


def test_targets_of_a_gpu(tmp_path):
    peer = 'vit_little_patch16_reg4_gap_256'
    write_step(tmp_path, 'a', 't2t_vit_14', {'published': 4000, 'default': 7000, 'compiled': 9500,
                                             peer: 7500, f'{peer}, compiled': 9400})
    write_step(tmp_path, 'b', 't2t_vit_t_14', {'published': 2000, 'compiled': 5900})
    records = Records(tmp_path)
    lines = {figure.target: figure.line() for figure in judge(records)}
    assert lines['t2t_vit_14, 224 pixels, train, bf16: 9,000 (10,800 as a stretch) img/s on an H200'][1:] == [
        '9,500 img/s', 'met']
    assert against_yardstick(records, 't2t_vit_14', 'train', 2.25).line()[1:] == ['2.38 ×', 'met']
    assert against_yardstick(records, 't2t_vit_t_14', 'train', 3).line()[1:] == ['2.95 ×', 'missed']
    assert against_yardstick(records, 't2t_vit_24', 'train', 3).line()[1:] == ['–', 'not measured']
    assert [figure.is_met for figure in against_peer(records, 'train')] == [False, True]
    assert memory(records).line()[1:] == ['0.42 of it', 'met']
    assert sum(line[2] == 'not measured' for line in lines.values()) > 5


def test_targets_of_scaling(tmp_path, measured):
    shutil.copy(measured.folder / 'quick.json', tmp_path)
    overhead, linear = scaling(Records(tmp_path))
    assert overhead.found.startswith(f'{measured.record["overhead"]["percent"]:+.2f} %')
    assert 'default performer' in linear.found


@pytest.mark.parametrize('lines, precision, is_met', [
    ([(1, 0, 7.), (500, 2, 2.)], 'float16', True), ([(1, 1, None), (500, 2, 2.)], 'float16', True),
    ([(1, 0, 7.), (500, 2, None)], 'float16', False), ([(1, 0, 7.), (500, 10, 2.)], 'float16', False),
    ([(1, 0, 7.)], 'float16', None), ([(1, 0, 7.), (60, 20, None)], 'float16', False),
    ([(1, 0, 7.), (500, 2, 2.)], 'bfloat16', None)])
def test_targets_of_float16(tmp_path, lines, precision, is_met):
    assert float16(Records(tmp_path)).line()[1:] == ['–', 'not measured']
    lines = [{'step': step, 'skipped': skipped, 'loss': loss} for step, skipped, loss in lines]
    (tmp_path / 'float16.json').write_text(json.dumps(
        {'machine': {'device': 'any'}, 'precision': precision, 'lines': lines}))
    figure = float16(Records(tmp_path))
    assert figure.is_met is is_met and f'{lines[-1]["step"]} steps, ' in figure.found


def test_the_performer_is_judged_by_many_tokens(tmp_path):
    def judged(power, tokens, **machine):
        record = {'machine': {'device': 'any', **machine}, 'tokens': [{'tokens': tokens}],
                  'exponents': {'train': {'default performer': {'time': power}}}}
        (tmp_path / 'scale.json').write_text(json.dumps(record))
        return scaling(Records(tmp_path))[1]

    assert judged(1., 12_544).is_met is True and judged(1.2, 12_544).is_met is False
    assert judged(1., 12_544, cuda='13').is_met is None
    assert judged(1., 200_704, cuda='13').is_met is True
    bound = judged(0.3, 200_704, cuda='13')
    assert bound.is_met is None and 'launch-bound' in bound.found


def test_targets_of_another_machine_are_not_judged(tmp_path):
    write_step(tmp_path, 'h100', 't2t_vit_14', {'published': 1000, 'default': 20000}, device='NVIDIA H100')
    write_step(tmp_path, 'cpu', 't2t_vit_14', {'published': 2, 'default': 1}, device='2 CPU cores')
    records = Records(tmp_path)
    assert absolute(records)[0].line()[1:] == ['20,000 img/s on another device', '–']
    assert against_yardstick(records, 't2t_vit_14', 'train', 2.25).found == '20.00 ×'


def test_a_table_without_what_is_compiled_counts_only_alone(tmp_path):
    write_step(tmp_path, 'eager', 't2t_vit_14', {'published': 1000, 'default': 2000})
    assert against_yardstick(Records(tmp_path), 't2t_vit_14', 'train', 2.25).line()[1:] == ['2.00 ×', 'missed']
    write_step(tmp_path, 'compiled', 't2t_vit_14', {'published': 1000, 'default': 2000, 'compiled': 3000})
    records = Records(tmp_path)
    assert against_yardstick(records, 't2t_vit_14', 'train', 2.25).line()[1:] == ['3.00 ×', 'met']
    assert memory(records).found == '0.33 of it'


@pytest.mark.parametrize('ours, published, found', [
    (1., 2., ['0.50 × at most, over 2 cases', 'met']), (3., 2., ['1.50 × at most, over 2 cases', 'missed']),
    (None, 2., ['0.50 × at most, over 1 cases, and 1 not finite', 'missed']),
    (1., None, ['0.50 × at most, over 1 cases', 'met'])])
def test_an_error_that_is_not_finite_is_missed(tmp_path, ours, published, found):
    ratios = {'logits': ours / published} if ours and published else {}
    (tmp_path / 'fidelity.json').write_text(json.dumps({'machine': {'device': 'any'}, 'rows': [
        {'precision': 'bf16', 'errors': {'logits': published, 'gradient': 2.}},
        {'precision': 'bf16', 'errors': {'logits': ours, 'gradient': 1.}, 'ratios': {**ratios, 'gradient': 0.5}}]}))
    figure, = fidelity(Records(tmp_path))
    assert figure.line()[1:] == found


def test_the_records_of_this_repository_can_be_judged(tmp_path):
    succeeded(run_module('benchmarks.targets', '--output', tmp_path, cwd=tmp_path))
    assert '| t2t_vit_14, inference: default at least 1.25 × published |' in (tmp_path / 'targets.md').read_text()
