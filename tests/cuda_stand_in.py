"""A GPU that is not there: torch.cuda answers and takes notes, and tensors on it have a shape but no contents.

    with stand_in() as gpu:
        gpu.answer(memory_allocated=0)      torch.cuda.memory_allocated(...) is noted, and gives 0
        with gpu.tensors():                 torch.zeros(3, device='cuda') and all that computes with it works
            ...
        gpu.notes                           what was asked of torch.cuda and computed, in order

Whatever has no answer is torch's own, which fails without a driver. What torch.cuda does not have cannot be answered,
and arguments that its functions do not take are refused. Reading a value, as `item` does, fails on these tensors.
"""
import contextlib
from unittest.mock import create_autospec, patch

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CUDA = 1  # the number of this kind of device in torch
GPU = torch.device('cuda', 0)


class Stream(torch.Stream):
    """A queue of work that nobody does; number 0 is the one that computes."""

    def __new__(cls, gpu: 'Gpu', number: int):
        return super().__new__(cls, stream_id=number, device_index=0, device_type=CUDA)

    def __init__(self, gpu: 'Gpu', number: int):
        self._gpu, self.name = gpu, f'side {number}' if number else 'computing'

    def wait_stream(self, stream) -> None:
        self._gpu.notes.append((self.name, 'waits for', stream.name))


class Gpu:
    """The record of one stand-in, `notes`: (name, *arguments) of a call of torch.cuda, (stream, what, …) of work."""

    def __init__(self, patches: contextlib.ExitStack):
        self.notes, self._patches = [], patches
        self._streams = [Stream(self, 0)]
        self._current = self._streams[0]

    def answer(self, module=torch.cuda, **answers) -> None:
        """Has functions of torch.cuda, or of another module, give these values, or what these functions give."""
        for name, value in answers.items():
            def call(*args, _name=name, _value=value, **kwargs):
                self.notes.append((_name, *args, *kwargs.items()))
                return _value(*args, **kwargs) if callable(_value) else _value
            spec = create_autospec(getattr(module, name))  # whose attribute this is: AttributeError if there is none
            spec.side_effect = call
            self._patches.enter_context(patch.object(module, name, spec))

    def asked(self) -> list[str]:
        """What was noted, without arguments."""
        return [note[0] for note in self.notes]

    @contextlib.contextmanager
    def tensors(self):
        """Tensors of the GPU can be made, and what is done with them is noted."""
        with FakeTensorMode(allow_non_fake_inputs=True), _Work(self):
            yield

    def make_stream(self, device=None, priority=0):
        self._streams.append(Stream(self, len(self._streams)))
        return self._streams[-1]

    @contextlib.contextmanager
    def on_stream(self, stream):
        before, self._current = self._current, stream
        try:
            yield
        finally:
            self._current = before


@contextlib.contextmanager
def stand_in():
    with contextlib.ExitStack() as patches:
        gpu = Gpu(patches)
        patches.enter_context(patch.object(torch.cuda, 'Stream', gpu.make_stream))
        patches.enter_context(patch.object(torch.cuda, 'stream', gpu.on_stream))
        patches.enter_context(patch.object(torch.cuda, 'current_stream', lambda device=None: gpu._current))
        yield gpu


def pinned(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, which says that it lies in page-locked memory."""
    tensor.is_pinned = lambda: True
    return tensor


def bytes_of(*shape: int) -> torch.Tensor:
    """Images as a loader gives them, all black."""
    return torch.zeros(shape, dtype=torch.uint8)


class _Work(TorchDispatchMode):
    """Notes the operators of the GPU with the stream that they are given to."""

    def __init__(self, gpu: Gpu):
        super().__init__()
        self._gpu = gpu

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name, note = function._schema.name.partition('::')[2], self._gpu.notes.append
        if name == 'record_stream':  # torch's own would want the GPU
            note(('kept until', self._gpu._streams[args[1].stream_id].name))
            return None
        if name.startswith('_fused_'):  # torch cannot do these of all optimizers without contents
            tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)]
            assert len({tensor.device for tensor in tensors}) == 1, f'{name}: tensors of several devices'
            note((self._gpu._current.name, 'computes', name))
            return None
        result = function(*args, **kwargs)
        tensors = [value for value in args if isinstance(value, torch.Tensor)]
        source = None if not tensors else tensors[-1] if name == 'copy_' else tensors[0]
        if not _is_on_gpu(result) and not _is_on_gpu(source) or name == 'device':
            return result
        stream = self._gpu._current.name
        if name in ('_to_copy', 'copy_') and source is not None and _is_on_gpu(result) != _is_on_gpu(source):
            is_free = kwargs.get('non_blocking', name == 'copy_' and args[2:] == (True,))
            note((stream, 'copies to the GPU' if _is_on_gpu(result) else 'copies to the host',
                  'without waiting' if is_free else 'waiting'))
        else:
            note((stream, 'computes', name))
        return result


def _is_on_gpu(value) -> bool:
    return isinstance(value, torch.Tensor) and value.device.type == 'cuda'
