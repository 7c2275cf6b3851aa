"""The mean of the weights of several checkpoints of one model."""
from collections.abc import Mapping

import torch

from models.weights.formats import StateDict


class MeanOfWeights:
    """Sums up state dicts of the same keys and shapes, one after the other, in float64; `mean` rounds once.

    Integers are those of the last state dict. A tensor that is the same in all stays as it is, to the bit, which a sum
    divided by its number is not always.

    Attributes:
        same: keys of the tensors that are the same in all state dicts so far.
    """

    def __init__(self) -> None:
        self._first: Mapping[str, torch.Tensor] = {}
        self._sums: StateDict = {}
        self._count = 0
        self.same: set[str] = set()

    def add(self, state: Mapping[str, torch.Tensor]) -> None:
        self._first = self._first or state
        self.same = {key for key in (self.same if self._count else state) if torch.equal(state[key], self._first[key])}
        self._sums = {key: self._sums.get(key, 0) + tensor.double() if tensor.is_floating_point() else tensor
                      for key, tensor in state.items()}
        self._count += 1

    def mean(self) -> StateDict:
        """Return the mean, in the order and the dtypes of the first state dict."""
        return {key: tensor if key in self.same else
                (self._sums[key] / self._count).to(tensor.dtype) if tensor.is_floating_point() else self._sums[key]
                for key, tensor in self._first.items()}


def difference_of(state: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> str | None:
    """Return the first key, shape or dtype in which two state dicts differ, in words; None if they have the same."""

    def described(state: Mapping[str, torch.Tensor], key: str) -> str:
        return f'{state[key].dtype} {list(state[key].shape)}'.removeprefix('torch.') if key in state else 'no such key'

    return next((f'{key}: {described(state, key)} and {described(other, key)}' for key in [*other, *state]
                 if described(state, key) != described(other, key)), None)
