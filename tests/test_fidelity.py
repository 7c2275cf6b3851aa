"""Tests of fidelity and convergence: our path is as near to float64 as the published one, and trains as it does.

    python -m pytest tests/test_fidelity.py
"""
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks.convergence import compare
from benchmarks.fidelity import MEASURES, add_ratios, as_summary, as_table, errors, make_images, make_models, measure
from tests.conftest import ROOT, run_command, run_module, succeeded, warm
from utils.runtime import Precision

CPU = torch.device('cpu')
PRECISIONS = {'fp32': Precision(CPU, enabled=False), 'bf16': Precision(CPU, enabled=True)}
KINDS = ('random', 'smooth', 'white margin', 'single-value margin', 'single value')
ROUNDING = {'fp32': 2e-6, 'bf16': 1e-4}


# --- Fidelity ---------------------------------------------------------------------------------------------------------

@pytest.fixture(scope='module', params=['t2t_vit_7', 't2t_vit_t_14'])
def rows(request):
    """The errors with all kinds of images, of a model with few of its blocks."""
    args = SimpleNamespace(images=4, img_size=64, data=None, seed=0, compile='')
    models = make_models(request.param, 'initial', args, CPU, depth=2, embed_dim=128, num_heads=2, num_classes=20)
    images = make_images(args)
    assert tuple(images) == KINDS
    return [{'model': request.param, 'weights': 'initial', 'images': kind, **row}
            for kind in KINDS for row in measure(models, images[kind], PRECISIONS)]


@pytest.mark.parametrize('precision', PRECISIONS)
@pytest.mark.parametrize('kind', KINDS)
def test_errors_are_those_of_the_published_path(rows, kind, precision):
    published, ours = (row['errors'] for row in rows if (row['images'], row['precision']) == (kind, precision))
    assert tuple(ours) == tuple(published) == MEASURES
    large = {name: (error, published[name]) for name, error in ours.items()
             if not error <= 1.5 * published[name] + ROUNDING[precision]}
    assert not large


def test_errors_are_relative_distances():
    expected = {'logits': torch.tensor([[3., 4.], [0., 2.]]), 'gradient': torch.tensor([2., 0.])}
    actual = {'logits': torch.tensor([[3., 4.], [1., 2.]]), 'gradient': torch.tensor([math.nan, 0.])}
    found = errors(actual, expected)
    assert list(found) == ['logits', 'worst image', 'gradient']
    assert found['logits'] == pytest.approx(29 ** -0.5) and found['worst image'] == pytest.approx(0.5)
    assert math.isnan(found['gradient'])


def test_rows_are_written_case_by_case(tmp_path):
    code = f'''
import sys
sys.path.insert(0, {str(ROOT)!r})
import benchmarks.fidelity as fidelity
make_models = fidelity.make_models
def make_golden_ones(name, weights, *arguments):
    if weights != 'golden':
        raise SystemExit(7)
    return make_models(name, weights, *arguments)
fidelity.make_models = make_golden_ones
fidelity.main()
'''
    result = run_command([warm().python, '-c', code, '--models', 't2t_vit_7', '--weights', 'golden', 'initial',
                          '--precision', 'fp32', '--images', 2, '--img-size', 32, '--device', 'cpu', '--output', '.'],
                         tmp_path)
    assert result.returncode == 7, result.stderr
    rows = json.loads((tmp_path / 'fidelity.json').read_text())['rows']
    assert {row['weights'] for row in rows} == {'golden'} and len(rows) == 2 * len(KINDS)
    assert all(row['ratios'] for row in rows if row['path'] == 'default')
    assert '## t2t_vit_7, fp32' in (tmp_path / 'fidelity.md').read_text()


def test_tables_say_where_the_largest_ratio_is():
    def row(path: str, images: str, logits: float, gradient: float) -> dict:
        return {'model': 'm', 'precision': 'bf16', 'weights': 'golden', 'images': images, 'path': path,
                'errors': {'logits': logits, 'gradient': gradient}}

    rows = [row('published', 'random', 0.1, 0.2), row('default', 'random', 0.05, 0.5),
            row('published', 'smooth', 0.1, math.nan), row('default', 'smooth', math.inf, 0.1)]
    add_ratios(rows)
    assert rows[1]['ratios'] == {'logits': 0.5, 'gradient': 2.5} and rows[3]['ratios'] == {}
    line = as_summary(rows).splitlines()[-1]
    assert line == '| m | bf16 | default | 0.50 | – | 2.50 | gradient, golden weights, random | 1 |'
    table = [[cell.strip() for cell in line.split('|')[1:-1]] for line in as_table(rows).splitlines()[4:]]
    assert [(cells[2], cells[7]) for cells in table] == [
        ('1.0e-01', '2.0e-01'), ('× 0.50', '× 2.50'), ('1.0e-01', 'not finite'), ('not finite', '1.0e-01')]


def test_fidelity_reads_photographs_and_writes_its_record(image_folder, tmp_path):
    out = succeeded(run_module(
        'benchmarks.fidelity', '--models', 't2t_vit_7', '--img-size', '32', '--images', '2', '--precision', 'fp32',
        '--weights', 'golden', '--data', image_folder, '--device', 'cpu', '--output', tmp_path, cwd=tmp_path))
    record, text = json.loads((tmp_path / 'fidelity.json').read_text()), (tmp_path / 'fidelity.md').read_text()
    assert [(row['images'], row['path']) for row in record['rows']] == [
        (kind, path) for kind in ('random', 'smooth', 'photographs', *KINDS[2:]) for path in ('published', 'default')]
    assert record['options']['data'] == 'DIR' and str(image_folder) not in json.dumps(record) + text
    assert record['command'].startswith('python -m benchmarks.fidelity --models t2t_vit_7')
    summary = as_summary(record['rows'])
    assert summary in out and summary in text and as_table(record['rows']) in text


# --- Convergence ------------------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def trained(image_folder, tmp_path_factory):
    """The record of a run of few steps, its text and the folder that has its picture."""
    folder = tmp_path_factory.mktemp('convergence')
    out = succeeded(run_module(
        'benchmarks.convergence', '--data', image_folder / 'train', '--img-size', '32', '-b', '8', '--steps', '6',
        '--seeds', '2', '--lr', '1e-3', '--device', 'cpu', '--output', folder, cwd=folder))
    return SimpleNamespace(out=out, folder=folder, record=json.loads((folder / 'convergence.json').read_text()),
                           text=(folder / 'convergence.md').read_text())


def test_paths_take_the_same_steps(trained):
    losses = {path: np.array(runs) for path, runs in trained.record['losses'].items()}
    assert list(losses) == ['published', 'default']
    # 36 images make four batches: the last two steps are of a second epoch.
    assert losses['published'].shape == losses['default'].shape == (2, 6)
    np.testing.assert_allclose(losses['default'], losses['published'], rtol=1e-3)
    first, last = losses['published'][0, 0], losses['published'][0, -1]
    assert first == pytest.approx(math.log(3), abs=0.3) and last < first
    # Another seed, other images.
    assert (np.abs(losses['published'][0] - losses['published'][1]) > 1e-3).all()


def test_convergence_writes_its_record(trained, image_folder):
    record = trained.record
    assert record['comparison'] == compare(record['losses'])
    assert record['comparison']['paths']['default']['is_within'] is True
    assert record['options']['data'] == 'DIR' and str(image_folder) not in json.dumps(record) + trained.text
    assert record['command'] in trained.text
    table = [line for line in trained.text.splitlines() if line.startswith('|')]
    assert len(table) == 4 and '\n'.join(table) in trained.out
    assert (trained.folder / 'convergence.png').read_bytes().startswith(b'\x89PNG')


def curves(offset: float = 0., seeds=(-1., 0., 1.)) -> list[list[float]]:
    """Straight ones, at 2 and above or below by a tenth of each number."""
    return [[2 + seed / 10 + offset] * 100 for seed in seeds]


@pytest.mark.parametrize('offset, is_within', [(0.01, True), (0.1, True), (0.14, False)])
def test_within_the_spread_is_what_seeds_account_for(offset, is_within):
    found = compare({'published': curves(), 'default': curves(offset)})
    assert found['spread_of_seeds'] == pytest.approx(0.4 / 3)
    assert found['spread_of_means'] == pytest.approx(0.4 / 3 / 3 ** 0.5)
    ours = found['paths']['default']
    assert ours['at_equal_seed'] == pytest.approx(offset) and ours['of_means'] == pytest.approx(offset)
    assert ours['last_difference'] == pytest.approx(offset)
    assert ours['last_difference_standard_error'] == pytest.approx(0, abs=1e-9)
    assert ours['last_standard_error'] == pytest.approx(0.1 / 3 ** 0.5)
    assert ours['is_within'] is is_within


@pytest.mark.parametrize('offset, is_within', [(0.02, True), (0.05, False)])
def test_of_many_seeds_the_means_have_to_be_near(offset, is_within):
    seeds = (-1., 0., 1.) * 12
    found = compare({'published': curves(seeds=seeds), 'default': curves(offset, seeds)})
    ours = found['paths']['default']
    assert ours['at_equal_seed'] < found['spread_of_seeds']
    assert (ours['of_means'] < 2 * found['spread_of_means']) is is_within is ours['is_within']


def test_within_the_spread_needs_equal_seeds_to_be_near():
    found = compare({'published': curves(), 'default': curves(seeds=(1., -1., 0.))})['paths']['default']
    assert found['of_means'] == pytest.approx(0, abs=1e-9) and found['at_equal_seed'] == pytest.approx(0.4 / 3)
    found = compare({'published': curves(), 'default': curves(seeds=(3., -3., 0.))})['paths']['default']
    assert found['is_within'] is False


def test_a_loss_that_is_not_a_number_is_not_within():
    losses = curves()
    losses[0][50] = math.nan
    assert compare({'published': curves(), 'default': losses})['paths']['default']['is_within'] is False


@pytest.mark.parametrize('script, options, message', [
    ('fidelity', ('--models', 't2t_vit_c_14'), "argument --models: invalid choice: 't2t_vit_c_14'"),
    ('fidelity', ('--precision', 'fp16'), '--precision fp16: a CPU computes in fp32 or bf16'),
    ('convergence', ('--precision', 'fp16'), '--precision fp16: a CPU computes in fp32 or bf16'),
    ('convergence', ('--seeds', '1'), 'argument --seeds: 1 is too small: at least 2'),
    ('convergence', ('--name', 'a/b'), '--name a/b: give a name without a folder; the folder is --output')])
def test_a_mistake_is_one_line(tmp_path, script, options, message):
    result = run_module(f'benchmarks.{script}', '--data', tmp_path / 'none', '--output', tmp_path / 'results',
                        '--device', 'cpu', *options, cwd=tmp_path)
    assert result.returncode == 2 and message in result.stderr and result.stderr.count('\n') == 1
    assert not (tmp_path / 'results').exists()
