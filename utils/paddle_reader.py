"""Read files of `paddle.save` without PaddlePaddle and without running code from the file.

    state = load(open('T2T_ViT_14.pdparams', 'rb').read())

Such a file is a bare pickle of numpy arrays, some in (name, array) pairs. A pickle is a program for a stack machine;
Python's machine calls any function that the program names. This one executes only the instructions in `_execute` and
the names in NAMES, which stand for functions of this module. It checks the type of every value before it hashes, prints
or multiplies it, since a hundred bytes can describe nested tuples that take forever to hash.
"""
import math
import pickle
import pickletools
import types
from typing import Any

import numpy as np

# Magic number at the start of torch.save's legacy files, which are bare pickles too.
TORCH_MAGIC = (0x1950a86a20f9469cfc6c).to_bytes(10, 'little')
MAX_DIMS = 64  # numpy's own limit
DTYPES = ('b1', 'i1', 'i2', 'i4', 'i8', 'u1', 'u2', 'f2', 'f4', 'f8')  # paddle stores bfloat16 as u2


def is_bare_pickle(head: bytes) -> bool:
    """Return whether a file with these first bytes is a pickle (protocol 2 or later) not written by torch.save."""
    return head[:1] == b'\x80' and head[1:2] in (b'\x02', b'\x03', b'\x04', b'\x05') and TORCH_MAGIC not in head[:32]


def load(data: bytes) -> Any:
    """Return the content of a pickle of plain containers and numpy arrays; the arrays are read-only.

    Raises:
        pickle.UnpicklingError: it refers to anything else ('GLOBAL module.name') or has an unknown instruction.
        ValueError: its arrays hold objects, or more bytes than the file.
        Exception: it is damaged; errors of nearly any kind.
    """
    content = _Machine(data).run()
    _check_size(content, limit=len(data))
    return content


def _check_size(content: Any, limit: int) -> None:
    """Raise ValueError if repeated arrays and containers are, taken together, larger than the file."""
    claimed, waiting = 0, [content]
    while waiting:
        item = waiting.pop()
        parts = item.values() if isinstance(item, dict) else item if isinstance(item, list | tuple) else ()
        waiting.extend(parts)
        claimed += item.nbytes if isinstance(item, np.ndarray) else len(parts)
        if claimed > limit:
            raise ValueError(f'its arrays claim more than the {limit} bytes of the file')


def _check_text(value: Any, what: str) -> None:
    """Raise ValueError unless a value is text."""
    if type(value) is not str:
        raise ValueError(f'a {type(value).__name__} as {what}')


# --- Meaning of the names in a file -----------------------------------------------------------------------------------

class _DType:
    """A dtype under construction: created with its code, completed with its byte order by BUILD."""

    def __init__(self, code: str):
        _check_text(code, 'the code of a dtype')
        if code not in DTYPES:
            raise ValueError(f'an array of dtype {code[:20]!r}, which is not one of numbers')
        self.code, self.order = code, '='

    def build(self, state: tuple) -> None:
        """Set the byte order; refuse records and sub-arrays."""
        _, self.order, sub_array, names, fields = state[:5]
        _check_text(self.order, 'the byte order of a dtype')
        if self.order not in tuple('<>=|') or any(part is not None for part in (sub_array, names, fields)):
            raise ValueError('an array of records, which is not one of numbers')


class _Array:
    """An array under construction: created empty, completed by BUILD with shape, dtype and bytes."""

    def __init__(self):
        self.value: np.ndarray | None = None

    def build(self, state: tuple) -> None:
        """Set the value, or raise ValueError unless shape and content agree."""
        _, shape, dtype, is_fortran, content = state
        if not isinstance(dtype, _DType) or not isinstance(content, bytes):
            raise ValueError('an array without a dtype or bytes')
        # Checked before multiplying: text times a number is a longer text, and many numbers have a huge product.
        if type(shape) is not tuple or len(shape) > MAX_DIMS or not all(type(length) is int for length in shape):
            raise ValueError(f'an array whose shape is no tuple of at most {MAX_DIMS} whole numbers')
        flat = np.frombuffer(content, dtype.order + dtype.code)
        # Python's integers do not overflow, so a shape of 10¹² is compared, never allocated.
        if math.prod(shape) != flat.size or any(length < 0 for length in shape):
            raise ValueError(f'an array of shape {str(shape)[:60]} with {flat.size} numbers')
        self.value = flat.reshape(shape, order='F' if is_fortran else 'C')


_NDARRAY = object()  # stands for numpy.ndarray, which is only an argument of _reconstruct


def _reconstruct(kind: Any, shape: Any, code: Any) -> _Array:
    if kind is not _NDARRAY:
        raise ValueError('an array of another class than numpy.ndarray')
    return _Array()


def _dtype(code: str, align: Any = False, copy: Any = False) -> _DType:
    return _DType(code)


def _encode(text: str, encoding: str) -> bytes:
    """Return bytes, which protocol 2 stores as text of the same numbers."""
    _check_text(encoding, 'an encoding')
    if encoding != 'latin1':
        raise ValueError(f'bytes in the encoding {encoding[:20]!r}')
    return text.encode('latin1')


def _no_bytes() -> bytes:
    """Return no bytes, which protocol 2 stores as the call bytes()."""
    return b''


def _pair(items: tuple) -> tuple:
    """Return (name, array), paddle.save's form of a tensor, which is stored as a call of tuple."""
    name, array = items
    return name, array


def _ordered_dict() -> dict:
    """Return a dict for an empty OrderedDict, since it keeps the order too."""
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
    """Executes one pickle. The memo is a dict, so a high index takes no memory."""

    def __init__(self, data: bytes):
        self.data = data
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.encoded = 0  # bytes returned by _encode, which a file may call repeatedly

    def run(self) -> Any:
        """Return the object that the pickle describes."""
        for instruction, argument, _ in pickletools.genops(self.data):
            if instruction.name == 'STOP':
                return self._finished(self._pop())
            self._execute(instruction.name, argument)
        raise EOFError('the pickle has no end')

    def _execute(self, name: str, argument: Any) -> None:
        """Execute one of the instructions that a dict of arrays needs."""
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
            raise pickle.UnpicklingError(f'the instruction {name}, which no array needs')

    def _reduce(self) -> None:
        """Call one of the functions of NAMES."""
        arguments, function = self._pop(), self._pop()
        if not isinstance(function, types.FunctionType):  # other values are data
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
        """Return the finished array of an `_Array`; return other values unchanged."""
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
