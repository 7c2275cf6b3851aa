"""Reading what `paddle.save` writes, without PaddlePaddle and without running anything.

    state = load(open('T2T_ViT_14.pdparams', 'rb').read())

Such a file is a bare pickle of numpy arrays, by themselves or in (name, array) pairs. A pickle is a program for
a small stack machine, and Python's own machine calls what it is told to. This one knows the instructions
of `_execute` and the names in NAMES; a name stands for a function of this module, never for what Python would import
under it. What a file says is checked for its type before it is hashed, printed or multiplied: a tuple of tuples of
one tuple takes a file of a hundred bytes and, for each of these, more time than there is.
"""
import pickle
import pickletools
import types
from typing import Any

import numpy as np

# The magic number with which files of torch.save begin that are no zip archives; they are bare pickles too.
TORCH_MAGIC = (0x1950a86a20f9469cfc6c).to_bytes(10, 'little')
MAX_DIMS = 64  # numpy's own limit
DTYPES = ('b1', 'i1', 'i2', 'i4', 'i8', 'u1', 'u2', 'f2', 'f4', 'f8')  # paddle keeps bfloat16 in u2


def is_bare_pickle(head: bytes) -> bool:
    """Tell from a file's first bytes whether it is a pickle (protocol 2 or later) that torch.save did not write."""
    return head[:1] == b'\x80' and head[1:2] in (b'\x02', b'\x03', b'\x04', b'\x05') and TORCH_MAGIC not in head[:32]


def load(data: bytes) -> Any:
    """Return what a pickle of plain containers and numpy arrays holds; the arrays are read-only.

    Raises:
        pickle.UnpicklingError: it refers to anything else ('GLOBAL module.name') or needs an unknown instruction.
        ValueError: its arrays hold objects, or more bytes than the file.
        Exception: it is damaged; nearly any kind, as with every reader of pickles.
    """
    content = _Machine(data).run()
    _check_size(content, limit=len(data))
    return content


def _check_size(content: Any, limit: int) -> None:
    """Raise ValueError where one array or container stands in so many places that unfolding it would not end."""
    claimed, waiting = 0, [content]
    while waiting:
        item = waiting.pop()
        parts = item.values() if isinstance(item, dict) else item if isinstance(item, list | tuple) else ()
        waiting.extend(parts)
        claimed += item.nbytes if isinstance(item, np.ndarray) else len(parts)
        if claimed > limit:
            raise ValueError(f'its arrays claim more than the {limit} bytes of the file')


def _check_text(value: Any, what: str) -> None:
    """Raise ValueError where something in a file is not the text that it should be."""
    if type(value) is not str:
        raise ValueError(f'a {type(value).__name__} as {what}')


# --- What the names in a file stand for -------------------------------------------------------------------------------

class _DType:
    """A dtype on its way: created with its code, completed with its byte order by BUILD."""

    def __init__(self, code: str):
        _check_text(code, 'the code of a dtype')
        if code not in DTYPES:
            raise ValueError(f'an array of dtype {code[:20]!r}, which is not one of numbers')
        self.code, self.order = code, '='

    def build(self, state: tuple) -> None:
        """Take the byte order; the rest describes records and sub-arrays, which weights are not."""
        _, self.order, sub_array, names, fields = state[:5]
        _check_text(self.order, 'the byte order of a dtype')
        if self.order not in tuple('<>=|') or any(part is not None for part in (sub_array, names, fields)):
            raise ValueError('an array of records, which is not one of numbers')


class _Array:
    """An array on its way: created empty, completed by BUILD with shape, dtype and bytes."""

    def __init__(self):
        self.value: np.ndarray | None = None

    def build(self, state: tuple) -> None:
        """Take shape and content, if they agree."""
        _, shape, dtype, is_fortran, content = state
        if not isinstance(dtype, _DType) or not isinstance(content, bytes):
            raise ValueError('an array without a dtype or bytes')
        # Text times a number is a longer text, and the product of all the numbers of a file has no end either.
        if type(shape) is not tuple or len(shape) > MAX_DIMS or not all(type(length) is int for length in shape):
            raise ValueError(f'an array whose shape is no tuple of at most {MAX_DIMS} whole numbers')
        flat = np.frombuffer(content, dtype.order + dtype.code)
        # Python's integers do not overflow: a shape of 10¹² is compared, never allocated.
        size = 1
        for length in shape:
            size *= length
        if size != flat.size or any(length < 0 for length in shape):
            raise ValueError(f'an array of shape {str(shape)[:60]} with {flat.size} numbers')
        self.value = flat.reshape(shape, order='F' if is_fortran else 'C')


_NDARRAY = object()  # the class numpy.ndarray, which is only ever handed to _reconstruct


def _reconstruct(kind: Any, shape: Any, code: Any) -> _Array:
    if kind is not _NDARRAY:
        raise ValueError('an array of another class than numpy.ndarray')
    return _Array()


def _dtype(code: str, align: Any = False, copy: Any = False) -> _DType:
    return _DType(code)


def _encode(text: str, encoding: str) -> bytes:
    """Protocol 2 has no bytes: it keeps them as text of the same numbers."""
    _check_text(encoding, 'an encoding')
    if encoding != 'latin1':
        raise ValueError(f'bytes in the encoding {encoding[:20]!r}')
    return text.encode('latin1')


def _no_bytes() -> bytes:
    """And the content of an empty array as the call bytes()."""
    return b''


def _pair(items: tuple) -> tuple:
    """A tensor in paddle.save is the call tuple((name, array))."""
    name, array = items
    return name, array


def _ordered_dict() -> dict:
    """An OrderedDict, as state dicts often are, is created empty; a dict keeps the order too."""
    return {}


NAMES = {
    ('numpy.core.multiarray', '_reconstruct'): _reconstruct,
    ('numpy._core.multiarray', '_reconstruct'): _reconstruct,  # as numpy 2 writes it
    ('numpy', 'ndarray'): _NDARRAY,
    ('numpy', 'dtype'): _dtype,
    ('_codecs', 'encode'): _encode,
    ('__builtin__', 'bytes'): _no_bytes,
    ('builtins', 'tuple'): _pair,
    ('__builtin__', 'tuple'): _pair,  # as protocol 2 writes it
    ('collections', 'OrderedDict'): _ordered_dict,
}


# --- The stack machine ------------------------------------------------------------------------------------------------

CONSTANTS = {'NONE': None, 'NEWTRUE': True, 'NEWFALSE': False, 'EMPTY_TUPLE': ()}
LITERALS = {'BININT', 'BININT1', 'BININT2', 'LONG1', 'BINFLOAT', 'SHORT_BINUNICODE', 'BINUNICODE', 'BINUNICODE8',
            'SHORT_BINBYTES', 'BINBYTES', 'BINBYTES8'}
TUPLES = {'TUPLE1': 1, 'TUPLE2': 2, 'TUPLE3': 3}


class _Machine:
    """Executes one pickle. Its memo is a dict, so that a high index costs nothing."""

    def __init__(self, data: bytes):
        self.data = data
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.encoded = 0  # bytes made by _encode, which one text could make again and again

    def run(self) -> Any:
        """Return the object that the pickle describes."""
        for instruction, argument, _ in pickletools.genops(self.data):
            if instruction.name == 'STOP':
                return self._finished(self._pop())
            self._execute(instruction.name, argument)
        raise EOFError('the pickle has no end')

    def _execute(self, name: str, argument: Any) -> None:
        """Carry out one instruction of any that a dict of arrays needs."""
        stack = self.stack
        if name in LITERALS:
            stack.append(argument)
        elif name in CONSTANTS:
            stack.append(CONSTANTS[name])
        elif name in TUPLES:
            stack.append(tuple([self._pop() for _ in range(TUPLES[name])][::-1]))
        elif name == 'EMPTY_DICT':
            stack.append({})
        elif name == 'EMPTY_LIST':
            stack.append([])
        elif name == 'MARK':
            self.marks.append(len(stack))
        elif name == 'TUPLE':
            stack.append(tuple(self._pop_marked()))
        elif name in ('APPEND', 'APPENDS'):
            items = [self._pop()] if name == 'APPEND' else self._pop_marked()
            self._top(list).extend(self._finished(item) for item in items)
        elif name in ('SETITEM', 'SETITEMS'):
            items = [self._pop(), self._pop()][::-1] if name == 'SETITEM' else self._pop_marked()
            target = self._top(dict)
            for key, value in zip(items[::2], items[1::2], strict=True):
                if type(key) not in (str, int):
                    raise ValueError(f'a {type(key).__name__} as the key of a dict')
                target[key] = self._finished(value)
        elif name in ('MEMOIZE', 'BINPUT', 'LONG_BINPUT'):
            self.memo[len(self.memo) if argument is None else argument] = stack[-1]
        elif name in ('BINGET', 'LONG_BINGET'):
            stack.append(self.memo[argument])
        elif name in ('GLOBAL', 'STACK_GLOBAL'):
            found = argument.split(' ', 1) if name == 'GLOBAL' else [self._pop(), self._pop()][::-1]
            for part in found:
                _check_text(part, 'part of a name')
            if tuple(found) not in NAMES:
                raise pickle.UnpicklingError('GLOBAL {}.{}'.format(*found))
            stack.append(NAMES[tuple(found)])
        elif name == 'REDUCE':
            self._reduce()
        elif name == 'BUILD':
            state = self._pop()
            self._top(_Array, _DType).build(state)
        elif name not in ('PROTO', 'FRAME'):
            raise pickle.UnpicklingError(f'the instruction {name}, which arrays have no use for')

    def _reduce(self) -> None:
        """Call one of the functions of NAMES."""
        arguments, function = self._pop(), self._pop()
        if not isinstance(function, types.FunctionType):  # all others on the stack are data
            raise ValueError(f'a call of a {type(function).__name__}')
        if type(arguments) is not tuple:
            raise ValueError(f'a call with a {type(arguments).__name__} of arguments')
        if function is _encode:
            self.encoded += len(arguments[0])
            if self.encoded > len(self.data):
                raise ValueError(f'its arrays claim more than the {len(self.data)} bytes of the file')
        if function is _pair:
            arguments = (tuple(self._finished(item) for item in arguments[0]),)
        self.stack.append(function(*arguments))

    @staticmethod
    def _finished(item: Any) -> Any:
        """Return the array in place of an object that stood for it while it was built."""
        if isinstance(item, _Array):
            if item.value is None:
                raise ValueError('an array without content')
            return item.value
        return item

    def _pop(self) -> Any:
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            raise IndexError('the stack is empty')
        return self.stack.pop()

    def _pop_marked(self) -> list[Any]:
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def _top(self, *kinds: type) -> Any:
        if not isinstance(self.stack[-1], kinds):
            raise ValueError(f'a {type(self.stack[-1]).__name__} where there should be a {kinds[0].__name__}')
        return self.stack[-1]
