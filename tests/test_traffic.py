"""Tests of benchmarks/traffic.py: bytes of single operators and of an optimizer's step against those known.

    python -m pytest tests/test_traffic.py
"""
import pytest
import torch

from benchmarks.traffic import count

NUM = 1000
SIZE = 4 * NUM  # bytes of float32


def counted(work) -> list[int]:
    """Operators and bytes."""
    return count(work).tolist()


def test_what_is_read_and_written_counts():
    x, y = torch.zeros(NUM), torch.zeros(NUM)
    assert counted(lambda: x + y) == [1, 3 * SIZE]
    assert counted(lambda: x.add_(y)) == [1, 3 * SIZE]
    assert counted(lambda: x.view(10, -1).t()) == [0, 0]
    one = torch.zeros(1)
    assert counted(lambda: one.expand(NUM) + x) == [1, 4 + 2 * SIZE]


def test_operators_that_return_nothing_count():
    x, y = torch.zeros(NUM), torch.zeros(NUM)
    assert counted(lambda: torch._foreach_add_([x, y], 1.)) == [1, 4 * SIZE]
    assert counted(lambda: torch._foreach_add_([x], [y])) == [1, 3 * SIZE]


@pytest.mark.parametrize('make, tensors', [
    (lambda parameters: torch.optim.AdamW(parameters, fused=True), 4),  # parameter, gradient and two moments
    (lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, fused=True), 3)])
def test_a_step_of_a_fused_optimizer_counts(make, tensors):
    parameter = torch.nn.Parameter(torch.zeros(NUM))
    optimizer = make([parameter])
    parameter.grad = torch.ones(NUM)
    optimizer.step()  # the first one makes the state
    _, traffic = counted(optimizer.step)
    assert traffic == pytest.approx(2 * tensors * SIZE, abs=32)  # each read and written, and a number of steps
