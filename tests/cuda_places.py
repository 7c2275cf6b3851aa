"""Where the code is about GPUs, and which of these places have run: by the syntax tree, and by a trace.

    places = find_places(ROOT)                  {'data/batch.py::BatchPreparer._move': Place(…), …}
    with Trace(ROOT, places) as trace: …
    missing(places[name], trace.seen)           what of a GPU's side of it has not run
"""
import ast
import json
import os
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

DEVICES = ('cuda', 'cpu')
ARGUMENTS = ('pin_memory', 'non_blocking')
METHODS = ('is_pinned', 'pin_memory', 'record_stream', 'cuda')
Span = tuple[int, int, int, int]  # first line, last line, first column, last column


@dataclass
class Place:
    """A function that is about GPUs. `parts` run on a GPU: comparisons and calls, and what these decide on."""
    file: str
    first_line: int
    last_line: int
    parts: list[ast.AST] = field(default_factory=list)


def find_places(root: Path) -> dict[str, Place]:
    """By FILE::FUNCTION, all outside of tests/: whatever names a device or torch.cuda, or asks for pinned memory."""
    places = {}
    for path in sorted(root.rglob('*.py')):
        file = path.relative_to(root).as_posix()
        if file.startswith('tests/') or any(part.startswith('.') for part in path.relative_to(root).parts):
            continue
        for name, function in _functions(ast.parse(path.read_text(encoding='utf-8'))):
            if marks := [node for node in _own_nodes(function) if _is_mark(node)]:
                lines = [node.lineno for node in [*getattr(function, 'decorator_list', ()), *function.body]]
                first, last = min(lines, default=0), max(node.end_lineno for node in function.body)
                first = min(first, getattr(function, 'lineno', first))
                places[f'{file}::{name}'] = Place(file, first, last, _without_inner(marks) + _sides(function))
    return places


def _functions(tree: ast.Module):
    """(qualified name, node) of the module and of each function in it."""
    def walk(node, prefix):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                yield prefix + child.name, child
                yield from walk(child, f'{prefix}{child.name}.<locals>.')
            elif isinstance(child, ast.ClassDef):
                yield from walk(child, f'{prefix}{child.name}.')
            else:
                yield from walk(child, prefix)
    yield '<module>', tree
    yield from walk(tree, '')


def _own_nodes(function: ast.AST):
    """The nodes of a function, without those of functions in it; keys of a dict, which never run by themselves."""
    for child in ast.iter_child_nodes(function):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        yield child
        if isinstance(child, ast.Dict):
            child = ast.Tuple(child.values, ast.Load())
        yield from _own_nodes(child)


def _is_mark(node: ast.AST) -> bool:
    match node:
        case ast.Compare():
            values = [value.value for value in ast.walk(node) if isinstance(value, ast.Constant)]
            of_type = any(isinstance(value, ast.Attribute) and value.attr == 'type' for value in ast.walk(node))
            return any(map(_names_gpu, values)) or ('cpu' in values and of_type)
        case ast.Constant():
            return node.value == 'nccl' or _names_gpu(node.value)
        case ast.Attribute():
            return ast.unparse(node.value) in ('torch.cuda', 'torch.accelerator') or (
                ast.unparse(node) == 'torch.version.cuda') or node.attr in ('CUDA', 'is_cuda')
        case ast.ImportFrom():
            return str(node.module).startswith('torch.cuda')
        case ast.keyword():
            return node.arg in ARGUMENTS
        case ast.Call():
            return isinstance(node.func, ast.Attribute) and node.func.attr in METHODS
    return False


def _names_gpu(value) -> bool:
    """'cuda' or 'cuda:0'."""
    return isinstance(value, str) and re.fullmatch(r'cuda(:\d*)?', value) is not None


def _without_inner(marks: list[ast.AST]) -> list[ast.AST]:
    """Without those within another, which may be folded into it."""
    inner = {id(node) for mark in marks for node in ast.walk(mark) if node is not mark}
    return [mark for mark in marks if id(mark) not in inner]


def _sides(function: ast.AST) -> list[ast.AST]:
    """What runs on a GPU and not on a CPU: an arm of an expression, statements of a branch or behind it."""
    names = {target.id for node in _own_nodes(function) if isinstance(node, ast.Assign)
             and _on_gpu(node.value, set()) for target in node.targets if isinstance(target, ast.Name)}
    sides = []
    for node in [function, *_own_nodes(function)]:
        if isinstance(node, ast.IfExp) and (is_true := _on_gpu(node.test, names)) is not None:
            sides.append(node.body if is_true else node.orelse)
        for block in (getattr(node, name, None) for name in ('body', 'orelse', 'finalbody')):
            for index, statement in enumerate(block if isinstance(block, list) else ()):
                if not isinstance(statement, ast.If) or (is_true := _on_gpu(statement.test, names)) is None:
                    continue
                leaves = isinstance(statement.body[-1], ast.Return | ast.Raise | ast.Continue | ast.Break)
                sides += statement.body if is_true else statement.orelse or (block[index + 1:] if leaves else [])
    return sides


def _on_gpu(test: ast.AST, names: set[str]) -> bool | None:
    """What `test` is on a GPU; None where that does not follow. `names`: of variables that are true there."""
    match test:
        case ast.Compare(left=ast.Constant(value=value), ops=[op]) | ast.Compare(
                ops=[op], comparators=[ast.Constant(value=value)]) if value in DEVICES and _is_mark(test):
            return isinstance(op, ast.Eq | ast.In) == (value == 'cuda')
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            inner = _on_gpu(operand, names)
            return None if inner is None else not inner
        case ast.BoolOp(values=values):
            return next((found for value in values if (found := _on_gpu(value, names)) is not None), None)
        case ast.Name(id=name):
            return True if name in names else None
        case ast.Call(func=ast.Attribute(attr='is_pinned')):
            return True
        case ast.Call(func=ast.Attribute(attr='is_available', value=value)) if ast.unparse(value) == 'torch.cuda':
            return True
    return None


class Trace:
    """Notes which expressions of `places` run while this lasts, in this thread."""

    def __init__(self, root: Path, places: dict[str, Place]):
        self._files = {str(root / place.file): place.file for place in places.values()}
        self._places = list(places.values())
        self.seen: set[tuple[str, Span]] = set()

    def __enter__(self):
        self._before = sys.gettrace()
        sys.settrace(self._enter)
        return self

    def __exit__(self, *_):
        sys.settrace(self._before)

    def _enter(self, frame, event, _):
        code = frame.f_code
        file = self._files.get(code.co_filename)
        if not any(place.file == file and place.first_line <= code.co_firstlineno <= place.last_line
                   for place in self._places):
            return None
        spans = list(code.co_positions())
        frame.f_trace_opcodes, frame.f_trace_lines = True, False

        def note(frame, event, _):
            if event == 'opcode' and None not in (span := spans[frame.f_lasti // 2]):
                self.seen.add((file, span))
            return note
        return note


def missing(place: Place, seen: set[tuple[str, Span]]) -> list[str]:
    """LINE: CODE of the parts that are not among what was seen."""
    spans = [span for file, span in seen if file == place.file]
    return [f'{part.lineno}: {ast.unparse(part).splitlines()[0]}' for part in place.parts
            if not _is_docstring(part) and not any(_within(span, part) for span in spans)]


def _within(span: Span, part: ast.AST) -> bool:
    first, last, start, end = span
    return (part.lineno, part.col_offset) <= (first, start) and (last, end) <= (part.end_lineno, part.end_col_offset)


def _is_docstring(part: ast.AST) -> bool:
    return isinstance(part, ast.Expr) and isinstance(part.value, ast.Constant)


# --- As a plugin of pytest, -p tests.cuda_places, which writes to the file CUDA_TRACE what the tests have run ---------

def pytest_sessionstart(session):
    root = Path(__file__).resolve().parents[1]
    session.cuda_trace = Trace(root, find_places(root))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    with item.session.cuda_trace:
        return (yield)


def pytest_sessionfinish(session):
    Path(os.environ['CUDA_TRACE']).write_text(json.dumps(sorted(session.cuda_trace.seen)))
