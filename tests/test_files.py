"""Tests of utils/checkpoint_reader.py and utils/paddle_reader.py: no checkpoints, damaged ones, hostile ones.

    python -m pytest tests/test_files.py
"""
import argparse
import contextlib
import copyreg
import os
import pickle
import struct
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import numpy.testing._private.utils
import pytest
import safetensors.torch
import torch

from utils.checkpoint_reader import METADATA, read_checkpoint
from utils.errors import UserError

MEGABYTE = 2 ** 20


def assert_refused(path: Path, message: str) -> str:
    """Reading must raise a one-line UserError with the path and `message`."""
    with pytest.raises(UserError, match=message) as caught:
        read_checkpoint(path)
    assert '\n' not in str(caught.value) and str(path) in str(caught.value)
    return str(caught.value)


def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(42)
    return {'cls_token': torch.randn(1, 1, 8), 'head.weight': torch.randn(5, 8), 'head.bias': torch.randn(5)}


def arrays() -> dict[str, np.ndarray]:
    return {key: tensor.numpy() for key, tensor in tensors().items()}


# --- Files that are no checkpoints ------------------------------------------------------------------------------------

@pytest.mark.parametrize('content, message', [
    (b'', 'is empty'),
    (b'version https://git-lfs.github.com/spec/v1\noid sha256:0\n', 'Git LFS pointer.*git lfs pull'),
    (b'/annex/objects/SHA256E-s1--0.pth\n', 'git-annex pointer'),
    (b'\n<!DOCTYPE html><html><body>Not found</body></html>', 'a web page'),
    (b'<HTML>', 'a web page'),
    (b'some text that is long enough to be read as something', 'not a PyTorch checkpoint'),
    (bytes(range(256)) * 16, 'not a PyTorch checkpoint'),
    ((1 << 40).to_bytes(8, 'little') + b'{"a": 1}', 'damaged'),
    (pickle.dumps({'a': 1}, protocol=2), 'not a PyTorch checkpoint.*no arrays'),
    (pickle.dumps([np.zeros(3)], protocol=4), 'not a PyTorch checkpoint.*no arrays'),
])
def test_other_files(content, message, tmp_path):
    path = tmp_path / 'checkpoint.pth'
    path.write_bytes(content)
    assert_refused(path, message)


def test_paths_that_are_no_files(tmp_path):
    assert_refused(tmp_path / 'missing.pth', 'missing.pth does not exist')
    assert_refused(tmp_path, 'is a folder')


@pytest.mark.parametrize('content', [[1, 2], torch.zeros(3)])
def test_not_a_dict(content, tmp_path):
    torch.save(content, tmp_path / 'a.pth')
    assert_refused(tmp_path / 'a.pth', f'holds a {type(content).__name__}')


@pytest.mark.parametrize('kind', ['zip', 'legacy', 'safetensors', 'paddle'])
def test_truncated_files(kind, tmp_path):
    path = tmp_path / 'a.pth'
    if kind == 'safetensors':
        safetensors.torch.save_file(tensors(), path)
    elif kind == 'paddle':
        path.write_bytes(pickle.dumps(arrays(), protocol=4))
    else:
        torch.save({'state_dict': tensors()}, path, _use_new_zipfile_serialization=kind == 'zip')
    whole = path.read_bytes()
    for length in (1, 9, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        assert_refused(path, 'damaged|not a PyTorch checkpoint')


def test_metadata_of_a_safetensors_file(tmp_path):
    path = tmp_path / 'a'  # told by its content, not by its name
    safetensors.torch.save_file(tensors(), path, {'format': 'pt', 'arch': 'not ours'})
    assert read_checkpoint(path).keys() == tensors().keys()
    safetensors.torch.save_file(tensors(), path, {METADATA: '{"arch": "t2t_vit_14", "classes": ["a", "b"]}'})
    content = read_checkpoint(path)
    assert content['arch'] == 't2t_vit_14' and content['classes'] == ['a', 'b']
    assert content['state_dict'].keys() == tensors().keys()
    for metadata in ('{', '3', '[1, 2]', '[' * 100_000):
        safetensors.torch.save_file(tensors(), path, {METADATA: metadata})
        assert_refused(path, 'damaged')


# --- PaddlePaddle's files ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize('protocol', [2, 3, 4])
def test_arrays_of_every_kind(protocol, tmp_path):
    rng = np.random.RandomState(0)
    print('seed 0')
    content = {code: (100 * rng.standard_normal((3, 4))).astype(code)
               for code in ('b1', 'i1', 'i2', 'i4', 'i8', 'u1', 'u2', 'f2', 'f4', 'f8', '>f4', '>i8')}
    content |= {'fortran': np.asfortranarray(content['f4']), 'scalar': np.ones(()), 'empty': np.ones((0, 3)),
                'plain': [1, -2.5, 'text', None, True, 10 ** 12, b'bytes', (), (1, 2, 3, 4)], 'table': {'a': 'b'}}
    path = tmp_path / 'a.pdparams'
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    read = read_checkpoint(path)
    assert read.keys() == content.keys()
    for key, value in content.items():
        if isinstance(value, np.ndarray):
            assert read[key].dtype == value.dtype and np.array_equal(read[key], value), key
        else:
            assert read[key] == value


# --- Files that run code: each attack works with Python's own reader, and does nothing here ---------------------------

class Hostile:
    """Pickles as a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


class HostileArray(np.ndarray):
    """Creates the file that the environment names whenever an array of it comes to be."""

    def __array_finalize__(self, parent):
        Path(os.environ['CANARY']).touch()


class HostileNew:
    """Creates the file that the environment names whenever an object of it comes to be."""

    def __new__(cls):
        Path(os.environ['CANARY']).touch()
        return super().__new__(cls)


def text(string: str) -> bytes:
    """The instruction that puts a text of fewer than 65,536 characters on the stack."""
    return b'X' + struct.pack('<I', len(string)) + string.encode()


def name(module: str, attribute: str) -> bytes:
    """The instructions that look up a name, which may have dots since protocol 4."""
    return text(module) + text(attribute) + b'\x93'


def attacks(canary: Path) -> dict[str, bytes]:
    """Name → pickle that creates the file `canary` when Python reads it."""
    command, statement = f'touch {canary}', f'open({str(canary)!r}, "w")'
    calls = {
        'system': Hostile(os.system, command),
        'mkdir': Hostile(os.mkdir, str(canary)),
        'exec': Hostile(exec, statement),
        'eval': Hostile(eval, statement),  # as paddle.save writes tensors outside of a model: eval('data', …)
        'runstring': Hostile(numpy.testing._private.utils.runstring, statement, {}),
        'numpy.load': Hostile(np.load, str(canary.with_name('hostile.npy')), None, True),
        'array of objects': np.array([Hostile(os.mkdir, str(canary))], dtype=object),
        'array of another class': Hostile(np.zeros(1).__reduce__()[0], HostileArray, (0,), b'b'),
        'scalar': Hostile(np.float64(1).__reduce__()[0], np.dtype('f8'), Hostile(os.mkdir, str(canary))),
        # The one class that is allowed in files of torch must not carry anything else in.
        'namespace': argparse.Namespace(lr=Hostile(os.mkdir, str(canary))),
    }
    # In every protocol, behind weights that are sound.
    return {what: pickle.dumps({**arrays(), 'args': call}, protocol=2 + index % 3)
            for index, (what, call) in enumerate(calls.items())} | {
        'dotted name': b'\x80\x04' + name('numpy', 'f2py.os.system') + text(command) + b'\x85R.',
        'method of an allowed class': (b'\x80\x04' + name('numpy', 'ndarray.tofile') + an_array()
                                       + text(str(canary)) + b'\x86R.'),
        'INST': b'\x80\x02(' + f'S{command!r}\nios\nsystem\n.'.encode(),
        'OBJ': b'\x80\x02(cos\nsystem\n' + text(command) + b'o.',
        'NEWOBJ': b'\x80\x04' + name(__name__, 'HostileNew') + b')\x81.',
        'NEWOBJ_EX': b'\x80\x04' + name(__name__, 'HostileNew') + b')}\x92.',
        'EXT1': b'\x80\x02\x82\xf0' + text(command) + b'\x85R.',
        # BUILD calls what it finds under __setstate__, here an attribute that an earlier BUILD has set.
        'BUILD': (b'\x80\x02cargparse\nNamespace\n)\x81}' + text('__setstate__') + b'cos\nsystem\nsb'
                  + text(command) + b'b.'),
    }


def an_array(shape: bytes = b'K\x01\x85', code: str = 'f4', content: bytes = b'C\x04\0\0\0\0',
             initial: bytes = b'K\0\x85') -> bytes:
    """The instructions that build an array; by default of one number, 0."""
    return (name('numpy._core.multiarray', '_reconstruct') + name('numpy', 'ndarray') + initial + b'C\x01b\x87R'
            + b'(K\x01' + shape + name('numpy', 'dtype') + text(code) + b'\x89\x88\x87R'
            + b'(K\x03' + text('<') + b'NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\0tb' + b'\x89' + content + b'tb')


@pytest.fixture
def canary(tmp_path, monkeypatch):
    """The path of a file that must not come to be, with everything in place that an attack needs to create it."""
    path = tmp_path / 'canary'
    monkeypatch.setenv('CANARY', str(path))
    np.save(tmp_path / 'hostile.npy', np.array([Hostile(os.mkdir, str(path))], dtype=object), allow_pickle=True)
    copyreg.add_extension('os', 'system', 240)  # a code that a pickle can use in place of the name
    yield path
    copyreg.remove_extension('os', 'system', 240)
    copyreg.clear_extension_cache()


@pytest.mark.filterwarnings('ignore:Detected pickle protocol')  # torch's, of what it did not write
@pytest.mark.parametrize('container', ['paddle', 'zip', 'legacy'])
@pytest.mark.parametrize('attack', attacks(Path('canary')))
def test_no_code_of_a_file_is_executed(attack, container, canary, tmp_path):
    hostile, path = attacks(canary)[attack], tmp_path / 'checkpoint.pth'
    write_checkpoint(path, hostile, container)
    assert_refused(path, 'which could run code|damaged|not a PyTorch checkpoint')
    assert not canary.exists()

    with contextlib.suppress(TypeError):  # of what it returns, afterwards
        pickle.loads(hostile)  # the attack itself works
    assert canary.exists()


def write_checkpoint(path: Path, data: bytes, container: str) -> None:
    """Write a pickle by itself, or as the content of one of torch's two kinds of file."""
    if container == 'zip':
        with zipfile.ZipFile(path, 'w') as archive:
            for entry, content in (('data.pkl', data), ('byteorder', b'little'), ('version', b'3\n')):
                archive.writestr(f'archive/{entry}', content)
        return
    before = b''
    if container == 'legacy':  # magic number, version and system come before the content
        torch.save({}, path, _use_new_zipfile_serialization=False)
        before = path.read_bytes().removesuffix(pickle.dumps({}, 2) + pickle.dumps([], 2))
    path.write_bytes(before + data)


@pytest.mark.parametrize('container', ['zip', 'legacy'])
def test_containers_of_attacks_are_sound(container, tmp_path):
    """What `write_checkpoint` writes is read, so that attacks are refused for what they do."""
    path = tmp_path / 'a.pth'
    write_checkpoint(path, pickle.dumps({'epoch': 3}, 2), container)
    if container == 'legacy':
        path.write_bytes(path.read_bytes() + pickle.dumps([], 2))
    assert read_checkpoint(path) == {'epoch': 3}


def test_what_is_refused_is_named(tmp_path):
    path = tmp_path / 'a.pdparams'
    for attack, named in (('system', r'(posix|nt)\.system'), ('exec', 'exec'), ('runstring', r'numpy\..*runstring')):
        write_checkpoint(path, attacks(tmp_path / 'canary')[attack], 'paddle')
        assert_refused(path, f'refers to .*{named}, which could run code')
    for is_zip in (True, False):
        torch.save({'a': torch.zeros(1), 'b': Hostile(os.mkdir, 'x')}, path, _use_new_zipfile_serialization=is_zip)
        assert_refused(path, 'refers to .*mkdir, which could run code')


def test_the_allowance_ends_with_the_call(tmp_path):
    torch.save({'state_dict': {'a': torch.zeros(1)}, 'args': argparse.Namespace(lr=1.)}, tmp_path / 'a.pth')
    assert read_checkpoint(tmp_path / 'a.pth')['args'].lr == 1.
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / 'a.pth', weights_only=True)


# --- Pickles that are absurd: no code, but more memory or time than a machine has, or no sense ------------------------

def in_dict(*values: bytes) -> bytes:
    """A whole pickle: a dict of values."""
    return b'\x80\x04}(' + b''.join(text(f'key{i}') + value for i, value in enumerate(values)) + b'u.'


def long(number: int) -> bytes:
    return b'\x8a\x08' + number.to_bytes(8, 'little')


def nested_tuples(levels: int = 60) -> bytes:
    """The instructions for a pair of twice the same pair, and so on: a few bytes that have 2 ** levels parts."""
    return b')' + b'q\x08h\x08\x86' * levels


LARGE = 2 ** 16
LARGE_ARRAY = an_array(shape=b'M' + struct.pack('<H', LARGE // 8) + b'K\x02\x86',
                       content=b'B' + struct.pack('<I', LARGE) + bytes(LARGE))
# What it is: (what the error says, the pickle).
ABSURD = {
    'shape of 10¹²': ('of shape .* with 1 numbers', in_dict(an_array(shape=long(10 ** 12) + b'\x85'))),
    'negative shape': ('of shape .* with 1 numbers', in_dict(an_array(shape=b'J\xff\xff\xff\xff' * 2 + b'\x86'))),
    'shape of text': ('damaged', in_dict(an_array(shape=text('4') + b'\x85'))),
    'shape of a list': ('no tuple of', in_dict(an_array(shape=b']K\x01a'))),
    'shape of text that grows': ('no tuple of', in_dict(an_array(
        shape=b'(' + text('a' * 1000) + 5 * (b'M' + struct.pack('<H', 9999)) + b't'))),
    'shape of truth': ('no tuple of', in_dict(an_array(shape=b'\x88\x85'))),
    'shape of 100,000 numbers': ('no tuple of', in_dict(an_array(
        shape=b'(\x8a\xff' + b'\x7f' * 255 + b'q\x09' + b'h\x09' * 100_000 + b't'))),
    'shape of tuples of tuples': ('no tuple of', in_dict(an_array(shape=nested_tuples()))),
    'key of tuples of tuples': ('a tuple as the key', b'\x80\x04}' + nested_tuples() + an_array() + b's.'),
    'dtype of tuples of tuples': ('a tuple as the code', in_dict(
        name('numpy', 'dtype') + nested_tuples() + b'\x89\x88\x87R')),
    'byte order of tuples of tuples': ('a tuple as the byte order', in_dict(
        name('numpy', 'dtype') + text('f4') + b'\x89\x88\x87R(K\x03' + nested_tuples() + b'NNNK\0K\0K\0tb')),
    'encoding of tuples of tuples': ('a tuple as an encoding', in_dict(
        name('_codecs', 'encode') + text('a') + nested_tuples() + b'\x86R')),
    'name of tuples of tuples': ('a tuple as part of a name', in_dict(nested_tuples() + text('a') + b'\x93')),
    'attribute of tuples of tuples': ('a tuple as part of a name', in_dict(text('a') + nested_tuples() + b'\x93')),
    'call with a dict': ('a call with a dict', in_dict(name('_codecs', 'encode') + b'}R')),
    'dtype of objects': ("dtype 'O8'", in_dict(an_array(code='O8', content=b']'))),
    'dtype of text': ("dtype 'U1'", in_dict(an_array(code='U1'))),
    'dtype of 10¹² bytes': ("dtype 'V10", in_dict(an_array(code='V1000000000000'))),
    'array without content': ('without content', in_dict(
        name('numpy._core.multiarray', '_reconstruct') + name('numpy', 'ndarray') + long(10 ** 12)
        + b'\x85C\x01b\x87R')),
    'array of text': ('another class', in_dict(
        name('numpy._core.multiarray', '_reconstruct') + text('ndarray') + b'K\0\x85C\x01b\x87R')),
    'persistent id': ('not a PyTorch checkpoint', in_dict(an_array(), b'K\x01Q')),
    'text of 10¹² characters': ('damaged', b'\x80\x04\x8d' + struct.pack('<Q', 10 ** 12) + b'abc.'),
    'bytes of 10¹²': ('damaged', b'\x80\x04\x8e' + struct.pack('<Q', 10 ** 12) + b'abc.'),
    'one array in 10,000 places': ('claim more than', in_dict(LARGE_ARRAY + b'q\x01', *[b'h\x01'] * 9_999)),
    'one text encoded 10,000 times': ('claim more than', in_dict(text('a' * LARGE) + b'q\x01', *[
        name('_codecs', 'encode') + b'h\x01' + text('latin1') + b'\x86R'] * 10_000)),
    'lists of lists of lists': ('claim more than', b'\x80\x02]q\0' + b''.join(
        b'](' + 10 * (b'h' + bytes([level])) + b'eq' + bytes([level + 1]) for level in range(99)) + b'}'
        + text('a') + b'h\x63s.'),
    'list in itself': ('claim more than', b'\x80\x02]q\0h\0a}' + text('a') + b'h\0s.'),
    'empty stack': ('stack is empty', b'\x80\x04R.'),
    'stack below a mark': ('stack is empty', b'\x80\x04K\x01K\x02(\x86.'),
    'nothing': ('stack is empty', b'\x80\x04.'),
    'key that has no hash': ('a list as the key', b'\x80\x04}]K\x01s.'),
    'BUILD of a function': ('a function where', b'\x80\x04' + name('_codecs', 'encode') + b'}b.'),
    'BUILD of a class': ('a function where', b'\x80\x04' + name('numpy', 'dtype') + b'}b.'),
    'call of text': ('a call of a str', b'\x80\x04' + text('a') + b')R.'),
}


@pytest.mark.parametrize('what', ABSURD)
def test_absurd_pickles(what, tmp_path):
    message, content = ABSURD[what]
    path = tmp_path / 'a.pdparams'
    path.write_bytes(content)
    tracemalloc.start()
    try:
        assert_refused(path, message)
        assert tracemalloc.get_traced_memory()[1] < 20 * MEGABYTE + 20 * len(content)
    finally:
        tracemalloc.stop()


def test_the_parts_of_absurd_pickles_are_sound(tmp_path):
    path = tmp_path / 'a.pdparams'
    path.write_bytes(in_dict(an_array(), LARGE_ARRAY, an_array(initial=long(10 ** 12) + b'\x85')))
    assert [array.shape for array in read_checkpoint(path).values()] == [(1,), (LARGE // 8, 2), (1,)]


def test_an_archive_that_grows_is_refused_before_it_is_unpacked(tmp_path):
    """torch unpacks compressed parts: a megabyte of file could become a gigabyte of zeros."""
    torch.save({'head.weight': torch.zeros(300, 1000)}, tmp_path / 'stored.pth')
    with zipfile.ZipFile(tmp_path / 'stored.pth') as stored, zipfile.ZipFile(tmp_path / 'packed.pth', 'w',
                                                                             zipfile.ZIP_DEFLATED) as packed:
        for part in stored.infolist():
            packed.writestr(part.filename, stored.read(part))
    assert read_checkpoint(tmp_path / 'stored.pth')['head.weight'].shape == (300, 1000)
    assert torch.load(tmp_path / 'packed.pth')['head.weight'].shape == (300, 1000)
    tracemalloc.start()
    assert_refused(tmp_path / 'packed.pth', r'has \d,\d{3} bytes, and would grow to 1,20\d,\d{3}; .* zip -0')
    assert tracemalloc.get_traced_memory()[1] < MEGABYTE
    tracemalloc.stop()
