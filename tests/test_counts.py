"""A step starts as many kernels, reads as many values and takes part in as many collectives as the record says.

    python -m pytest tests/test_counts.py
"""
import json
from collections import Counter

import pytest
import timm
import torch

from benchmarks.counts import Counts, count_all, counting, differences, make_batches, make_step
from tests.conftest import ROOT

RENEW = ('if that is meant, python -m benchmarks.counts renews the record, benchmarks/results/counts.json; '
         'counted otherwise:')
# Why the host waits in these steps.
READING = {'step: unfused optimizer': {'item'},  # it cannot be told on the device to change nothing
           'step: average on the CPU': {'to cpu'}}


@pytest.fixture(scope='module')
def counted() -> dict[str, dict]:
    return {name: counts.as_dict() for name, counts in count_all().items()}


@pytest.fixture(scope='module')
def record() -> dict:
    return json.loads((ROOT / 'benchmarks/results/counts.json').read_text())


def test_counts_are_those_of_the_record(counted, record):
    recorded, kinds = record['counts'], ['kernels', 'reads', 'collectives']
    of_same_torch = record['machine']['torch'].split('.')[:2] == torch.__version__.split('.')[:2]
    if not of_same_torch or record['machine']['timm'] != timm.__version__:
        kinds.remove('kernels')  # of which other versions make more or fewer
    found = [{name: {kind: row[kind] for kind in kinds} for name, row in rows.items()} for rows in (recorded, counted)]
    changed = differences(*found)
    assert not changed, '\n'.join([RENEW, *changed])


def test_no_step_and_no_batch_waits_for_the_device(counted):
    for name, row in counted.items():
        if name.startswith(('step: ', 'training batch', 'evaluation batch', 'evaluation, a batch')):
            assert set(row['reads']) <= READING.get(name, set()), name
            assert sum(row['kernels'].values()) > 3, name


def test_ranks_add_up_once_a_step(counted):
    once, twice = (counted[f'step: {name}']['collectives'] for name in ('DDP', 'DDP, of two batches'))
    assert once == twice and 1 <= once['allreduce_'] <= 8
    assert not any(row['collectives'] for name, row in counted.items() if not name.startswith(('step: DDP', 'signals')))
    assert counted['signals between steps']['collectives'] == {'allreduce_': 1}


def count_of(work) -> Counts:
    with counting() as counts:
        work()
    return counts


def test_kernels_are_operators_that_write():
    x, y = torch.zeros(6), torch.ones(6)
    assert count_of(lambda: x.view(2, 3).t()[0]).kernels == {}
    assert count_of(lambda: x + y * 2).kernels == {'add': 1, 'mul': 1}
    assert count_of(lambda: torch._foreach_add_([x, y], 1)).kernels == {'_foreach_add_': 1}
    weight = torch.ones(6, requires_grad=True)
    assert count_of(lambda: (x * weight).sum().backward()).kernels['mul'] == 2  # the gradient's too


@pytest.mark.parametrize(('name', 'read'), [
    ('item', lambda x: x[0].item()), ('tolist', lambda x: x.tolist()), ('__bool__', lambda x: bool(x[0])),
    ('__float__', lambda x: float(x[0])), ('numpy', lambda x: x.numpy()), ('cpu', lambda x: x.cpu()),
    ('to cpu', lambda x: x.to('cpu')), ('to cpu', lambda x: x.to(torch.device('cpu'))),
    ('nonzero', lambda x: x.nonzero()), ('equal', lambda x: torch.equal(x, x)),
    ('masked_select', lambda x: x.masked_select(x > 0)), ('index by a mask', lambda x: x[x > 0])])
def test_whatever_the_host_waits_for_is_one_read(name, read):
    x = torch.ones(3)
    assert count_of(lambda: read(x)).reads == {name: 1}
    assert count_of(lambda: x.double().sort().values[torch.tensor([0])]).reads == {}
    assert count_of(lambda: torch.nn.utils.get_total_norm([x, x])).reads == {}


def test_what_a_change_adds_is_named():
    """A read and a kernel in a step, and nothing else."""
    _, step = make_step('--model t2t_vit_7 --opt momentum --no-model-ema')
    batches = make_batches()
    before = count_of(lambda: step(batches))
    prepare = step._prepare
    step._prepare = lambda images, targets: prepare(images.cos(), targets) if targets[0, 0].item() else None
    after = count_of(lambda: step(batches))
    assert differences({'step': before.as_dict()}, {'step': after.as_dict()}) == [
        'step: kernels cos: 0 → 1', 'step: reads item: 0 → 1']
    assert differences({'step': before.as_dict()}, {}) and not differences({'step': Counts().as_dict()}, {})
    assert isinstance(before.kernels, Counter)
