"""What the tests of architectures share: the authors' numbers, and how ours are held against them.

The golden data lie in ../shared, or in the folder that T2T_SHARED names. They are outputs and gradients of the
authors' code, with weights drawn from each key's own random stream, so that no weights need to be stored.
"""
import os
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.shared.published import golden_state

SHARED = Path(os.environ.get('T2T_SHARED', Path(__file__).resolve().parents[2] / 'shared'))
GOLDEN = SHARED / 'golden' / 'official_224.npz'


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    actual, expected = actual.detach().double(), expected.detach().double()
    return ((actual - expected).norm() / expected.norm()).item()


def assert_golden(name: str, model: torch.nn.Module | None = None) -> None:
    """Asserts that keys, shapes, their order, logits and gradients of a model are the authors' of that name.

    Without a `model` it is the registered one.
    """
    golden = np.load(GOLDEN)
    model = (timm.create_model(name) if model is None else model).eval()
    shapes = [f'{key} {"x".join(map(str, tensor.shape))}' for key, tensor in model.state_dict().items()]
    assert shapes == list(golden[f'{name}/keys'])

    model.load_state_dict(golden_state(model))
    images = np.random.RandomState(0).standard_normal((2, 3, 224, 224)).astype(np.float32)
    logits = model(torch.from_numpy(images))
    assert relative_error(logits, torch.from_numpy(golden[f'{name}/logits'])) <= 1e-5

    F.cross_entropy(logits, torch.tensor([3, 7])).backward()
    parameters = dict(model.named_parameters())
    assert {f'{name}/grad/{key}' for key in parameters} == {
        entry for entry in golden.files if entry.startswith(f'{name}/grad/')}
    expected_norms, expected_sums = np.array([golden[f'{name}/grad/{key}'] for key in parameters]).T
    norms = np.array([parameter.grad.double().norm() for parameter in parameters.values()])
    sums = np.array([parameter.grad.double().sum() for parameter in parameters.values()])
    sizes = np.array([parameter.numel() for parameter in parameters.values()])
    np.testing.assert_allclose(norms, expected_norms, rtol=1e-5)
    # A sum may cancel to nearly zero, so it is held against what n values of this norm can add up to.
    assert np.max(np.abs(sums - expected_sums) / (expected_norms * np.sqrt(sizes))) <= 1e-5


def gmacs(name: str, img_size: int) -> float:
    """Multiply-accumulates per image / 1e9.

    On the meta device: torch's counter does not know the CPU's fused attention and counts nothing for it.
    """
    with torch.device('meta'):
        model = timm.create_model(name, img_size=img_size).eval()
        with FlopCounterMode(display=False) as counter:
            model(torch.empty(1, 3, img_size, img_size))
    return counter.get_total_flops() / 2e9
