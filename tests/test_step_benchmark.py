"""Tests of benchmarks/step.py: through the command line, figures that agree with one another, failures that are rows.

    python -m pytest tests/test_step_benchmark.py
"""
import copy
import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.shared.measure import (
    LEAST_ROUNDS,
    Contender,
    Running,
    _by_name,
    _events,
    _operators,
    _profile_on_cpu,
    make_batch,
    measure,
    note_finiteness,
)
from tests.conftest import run_module, succeeded

ROUNDS, BATCH, PROFILED = 2, 2, 4
QUICK = ('--models', 't2t_vit_7', '--img-size', '32', '-b', BATCH, '--repeats', ROUNDS, '--window', '0.01',
         '--warmup', '1', '--device', 'cpu', '--precision', 'fp32')


@pytest.fixture(scope='module')
def measured(tmp_path_factory):
    """One run with the yardstick, the default and a peer that cannot take images of 8 pixels."""
    folder = tmp_path_factory.mktemp('step')
    out = succeeded(run_module(
        'benchmarks.step', *QUICK, '--contenders', 'published', 'default', '--peers', 'vit_tiny_patch16_224@8',
        '--profile', PROFILED, '--output', folder / 'results', '--name', 'quick', cwd=folder))
    assert sorted(path.name for path in (folder / 'results').iterdir()) == ['quick.json', 'quick.md']
    record = json.loads((folder / 'results/quick.json').read_text())
    return SimpleNamespace(out=out, record=record, text=(folder / 'results/quick.md').read_text())


def test_record_is_complete(measured):
    record = measured.record
    assert record['command'].startswith('python -m benchmarks.step --models t2t_vit_7 --img-size 32')
    assert record['machine'].keys() >= {'time', 'device', 'processor', 'threads', 'python', 'torch', 'timm', 'commit'}
    assert record['machine']['threads'] >= 1
    assert record['options']['repeats'] == ROUNDS and record['options']['output'] == 'DIR'
    assert '--output DIR' in record['command'] and 'tmp' not in record['command']
    assert [(table['model'], table['precision'], table['task']) for table in record['tables']] == [
        ('t2t_vit_7', 'fp32', 'train'), ('t2t_vit_7', 'fp32', 'inference')]
    for table in record['tables']:
        assert [row['contender'] for row in table['rows']] == ['published', 'default', 'vit_tiny_patch16_224 at 8']


def test_figures_agree(measured):
    rows = {(table['task'], row['contender']): row for table in measured.record['tables'] for row in table['rows'][:2]}
    for row in rows.values():
        times = row['windows_milliseconds']
        assert len(times) == ROUNDS and min(times) > 0 and row['steps_per_window'] >= 1
        assert row['milliseconds']['median'] == pytest.approx(np.median(times))
        low, high = row['milliseconds']['quartiles']
        assert min(times) <= low <= row['milliseconds']['median'] <= high <= max(times)
        assert row['images_per_second'] == pytest.approx(1000 * BATCH / np.median(times))
        times = [milliseconds for _, _, milliseconds in row['longest']]
        assert times == sorted(times, reverse=True) and len(times) == PROFILED
        assert 0.2 * row['milliseconds']['median'] < sum(times) < 5 * row['milliseconds']['median']
        assert row['is_finite'] and row['kernels'] > 100 and row['launches'] is None
        assert row['peak_bytes'] > row['held_bytes']
    weights = 4 * rows['inference', 'default']['parameters']
    for name in ('published', 'default'):
        # The weights and two buffers; in training their average and two moments, and the gradient at its peak.
        assert rows['inference', name]['held_bytes'] == pytest.approx(weights, rel=0.01)
        assert rows['train', name]['held_bytes'] == pytest.approx(4 * weights, rel=0.01)
        assert rows['train', name]['peak_bytes'] > 5 * weights
        assert rows['train', name]['kernels'] > 2 * rows['inference', name]['kernels']
    assert rows['train', 'default']['kernels'] < 0.8 * rows['train', 'published']['kernels']


def test_tables_say_what_the_record_says(measured):
    sections = re.split(r'^## ', measured.text, flags=re.M)
    assert measured.record['command'] in sections[0]
    headings = ['t2t_vit_7: training, fp32, batch 2, 32 pixels', 't2t_vit_7: inference, fp32, batch 2, 32 pixels']
    for section, heading, table in zip(sections[1:], headings, measured.record['tables'], strict=True):
        assert section.splitlines()[0] == heading
        assert section.strip() in measured.out
        section, *profiles = section.split('### ')
        assert [profile.splitlines()[0] for profile in profiles] == ['published', 'default']
        assert all(profile.count('\n| `') == PROFILED for profile in profiles)
        lines = [[cell.strip() for cell in line.strip('| ').split(' | ')] for line in section.splitlines()
                 if line.startswith('|')][2:]
        published = table['rows'][0]
        for row, cells in zip(table['rows'][:2], lines, strict=False):
            assert cells == [
                row['contender'], f'{row["images_per_second"]:.1f}',
                f'{published["milliseconds"]["median"] / row["milliseconds"]["median"]:.2f}',
                f'{row["milliseconds"]["median"]:.2f}', '{:.2f} … {:.2f}'.format(*row['milliseconds']['quartiles']),
                f'{row["peak_bytes"] / 2**20:.1f}', f'{row["peak_bytes"] / published["peak_bytes"]:.2f}',
                str(row['kernels'])]


def test_a_contender_that_fails_is_a_row_that_says_so(measured):
    for table in measured.record['tables']:
        row = table['rows'][2]
        assert row.keys() == {'contender', 'model', 'img_size', 'compiled', 'error'}
        assert "Kernel size can't be greater than actual input size" in row['error'] and '\n' not in row['error']
    assert measured.text.count('`vit_tiny_patch16_224 at 8` was not measured: RuntimeError: ') == 2
    assert measured.text.count('| vit_tiny_patch16_224 at 8 | – | – |') == 2


@pytest.mark.parametrize('options, message', [
    (('--models', 't2t_vit_15'), "model 't2t_vit_15' does not exist; did you mean t2t_vit_19"),
    (('--precision', 'fp16'), '--precision fp16: a CPU computes in fp32 or bf16; leave it out'),
    (('--peers', 'resnet50@big'), "--peers: 'big' is not an image size"),
    (('--name', 'a/b'), '--name a/b: give a name without a folder; the folder is --output')])
def test_a_mistake_is_one_line(tmp_path, options, message):
    result = run_module('benchmarks.step', *QUICK, '--output', tmp_path / 'results', *options, cwd=tmp_path)
    assert result.returncode == 2 and message in result.stderr and result.stderr.count('\n') == 1
    assert not (tmp_path / 'results').exists()


@pytest.mark.slow
def test_the_compiled_model_is_measured(tmp_path):
    succeeded(run_module(
        'benchmarks.step', *QUICK, '--contenders', 'default', 'compiled', '--peers', 'none',
                         '--task', 'inference', '--output', tmp_path, cwd=tmp_path))
    table, = json.loads((tmp_path / 'step.json').read_text())['tables']
    default, compiled = table['rows']
    assert compiled['is_finite'] and 0 < compiled['kernels'] < default['kernels']
    assert compiled['warm_up_seconds'] > default['warm_up_seconds']


# --- What is measured -------------------------------------------------------------------------------------------------

def test_memory_is_the_most_that_is_allocated_at_a_time():
    def step():
        first = torch.empty(2**20, dtype=torch.uint8).add_(1)
        second = torch.empty(2**21, dtype=torch.uint8)
        del first
        return torch.empty(2**19, dtype=torch.uint8).sum(dtype=torch.uint8) + len(second)

    _, _, allocated, _ = _profile_on_cpu(step, torch.device('cpu'))
    assert 3 * 2**20 <= allocated < 3 * 2**20 + 2**19


def test_operators_that_compute_are_counted_once():
    x, weight = torch.randn(4, 6), torch.randn(8, 6)

    def counted(compute):
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            compute()
        return sum(is_innermost for *_, is_innermost in _operators(_events(profiler)))

    assert counted(lambda: x.t().unsqueeze(0).expand(3, -1, -1).detach()[0]) == 0
    assert counted(lambda: torch.nn.functional.linear(x, weight)) == 1
    assert counted(lambda: torch.nn.functional.layer_norm(x, (6,)).softmax(-1) + 1) == 3
    assert counted(lambda: torch._foreach_add([x, x, x], 1.)) == 3


@pytest.mark.parametrize('steps, is_finite', [
    ([True], True), ([False, False, True], True), ([True, False], True), ([False] * 9, False)])
def test_one_step_that_overflows_is_not_all_that_counts(steps, is_finite):
    left = list(steps)
    running = SimpleNamespace(step=lambda: left.pop(0), is_finite=lambda: left[0])
    contender = SimpleNamespace(running=running, measured={})
    note_finiteness(contender)
    assert contender.measured == {'is_finite': is_finite} and len(steps) - len(left) <= 4


def test_time_is_that_of_an_operator_itself():
    x, y = torch.randn(400, 400), torch.tensor(2)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(4):
            x @ x @ (x + y)  # which copies y to float first
    rows = _by_name([row[:2] for row in _operators(_events(profiler))], steps=2)
    assert {name: calls for name, calls, _ in rows}.items() >= {'aten::mm': 4, 'aten::add': 2, 'aten::copy_': 2}.items()
    times = {event.name(): 0 for event in _events(profiler)}
    for event in _events(profiler):
        times[event.name()] += (event.end_ns() - event.start_ns()) / 2e6
    own = {name: time for name, _, time in rows}
    assert own['aten::mm'] == pytest.approx(times['aten::mm'])
    assert own['aten::add'] == pytest.approx(times['aten::add'] - times['aten::_to_copy'])


def test_images_have_the_scale_of_normalised_pixels():
    args = SimpleNamespace(seed=1, batch_size=8, channels_last=True)
    images, targets = make_batch(SimpleNamespace(img_size=(32, 48)), args, torch.device('cpu'))
    assert images.shape == (8, 3, 32, 48) and images.is_contiguous(memory_format=torch.channels_last)
    assert images.mean().abs() < 0.5 and 1 < images.std() < 1.5
    assert targets.shape == (8, 1000) and torch.allclose(targets.sum(1), torch.ones(8))
    assert ((targets > 0.2).sum(1) == 2).sum() >= 6


def test_a_table_is_saved_as_its_rows_come():
    def start(contender, *_):
        model = torch.nn.Linear(2, 2)
        return Running(lambda: model(torch.ones(1, 2)), lambda: [*model.parameters()], lambda: True, model)

    contenders = [Contender(name, name, 8) for name in ('one', 'two')]
    saved = []
    args = SimpleNamespace(seed=1, repeats=LEAST_ROUNDS + 1, seconds=None, warmup=1, window=0.001, profile=0)
    measure(contenders, start, args, None, 'fp32', SimpleNamespace(device=torch.device('cpu')), 'two',
            lambda: saved.append([copy.deepcopy(contender.row(1)) for contender in contenders]))
    assert [['peak_bytes' in row for row in rows] for rows in saved[:2]] == [[True, False], [True, True]]
    assert all(row['error'] == 'the run ended before its turn' for rows in saved[:2] for row in rows)
    assert [len(row['windows_milliseconds']) for row in saved[2]] == [LEAST_ROUNDS, LEAST_ROUNDS]
