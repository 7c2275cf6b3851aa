"""Which way imports go, between rooms and between modules: docs/architecture.md has the rules."""
import ast
import pkgutil
import re
import sys
from pathlib import Path

import pytest

from options.datasets import DATASETS

ROOT = Path(__file__).resolve().parents[1]
# What each room may import, beside itself. Tools and benchmarks may import every room, but not one another.
MAY_IMPORT = {
    'utils': set(),
    'options': {'utils'},
    'launch': {'options', 'utils'},
    'models': {'options', 'utils'},
    'data': {'options', 'utils'},
    'engine': {'utils'},
    'figures': {'models', 'utils'},
    'tools': {'options', 'models', 'data', 'engine', 'figures', 'utils'},
    'benchmarks': {'options', 'models', 'data', 'engine', 'figures', 'utils'},
}
ROOMS = ('models', 'data', 'engine', 'figures', 'launch', 'options', 'utils')
SCRIPTS = sorted(ROOT.glob('*.py'))


def module_name(file: Path) -> str:
    return '.'.join(file.relative_to(ROOT).with_suffix('').parts).removesuffix('.__init__')


MODULES = {module_name(file): file for room in MAY_IMPORT for file in (ROOT / room).rglob('*.py')}


def imported_modules(file: Path, *, for_types: bool = True) -> set[str]:
    """Names of the modules that `file` imports, at its head or in its functions; `for_types`: also for annotations."""
    names, skipped = set(), set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.If) and ast.unparse(node.test) == 'TYPE_CHECKING' and not for_types:
            skipped |= set(node.body)
        elif node in skipped:
            continue
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f'{file.relative_to(ROOT)}:{node.lineno}: imports are absolute'
            inner = {f'{node.module}.{alias.name}' for alias in node.names}
            names |= (inner & MODULES.keys()) | ({node.module} if inner - MODULES.keys() else set())
    return names


def rooms_of(names: set[str]) -> set[str]:
    return {name.partition('.')[0] for name in names}


@pytest.mark.parametrize('room', MAY_IMPORT)
def test_rooms_import_only_what_lies_below(room):
    files = sorted((ROOT / room).rglob('*.py'))
    assert files
    for file in files:
        forbidden = rooms_of(imported_modules(file)) & set(MAY_IMPORT) - MAY_IMPORT[room] - {room}
        assert not forbidden, f'{file.relative_to(ROOT)} imports {forbidden}'


def test_nothing_imports_a_script():
    scripts = {path.stem for path in SCRIPTS}
    assert {'train', 'validate', 'transfer'} <= scripts
    for file in [*SCRIPTS, *MODULES.values()]:
        assert not rooms_of(imported_modules(file)) & scripts, f'{file.relative_to(ROOT)} imports a script'


def test_scripts_import_no_tools():
    for file in SCRIPTS:
        assert not rooms_of(imported_modules(file)) & {'tools', 'benchmarks', 'launch'}, file.name


def test_no_modules_import_one_another_in_a_circle():
    imports = {name: imported_modules(file, for_types=False) & MODULES.keys() for name, file in MODULES.items()}
    assert sum(map(len, imports.values())) > 300
    while ends := [name for name, names in imports.items() if not names]:
        for name in ends:
            del imports[name]
        for names in imports.values():
            names -= set(ends)
    assert not imports, f'a circle among these: {", ".join(imports)}'


def test_the_end_of_a_process_is_a_chain():
    chain = ('utils.job', 'utils.errors', 'utils.exits', 'utils.signals', 'utils.script')
    for below, module in enumerate(chain):
        assert imported_modules(MODULES[module]) & set(chain) <= set(chain[:below]), module


def test_options_import_no_torch():
    reached, queue = set(), [name for name in MODULES if name.startswith('options')]
    while queue:
        name = queue.pop()
        reached.add(name)
        queue += (imported_modules(MODULES[name]) if name in MODULES else set()) - reached
    assert 'torch' not in rooms_of(reached) and {'argparse', 'utils.errors'} <= reached


def test_tools_hide_no_module_of_python():
    """`python tools/doctor` makes its files importable by their bare names."""
    for file in (ROOT / 'tools').rglob('*.py'):
        assert file.stem == '__main__' or file.stem not in sys.stdlib_module_names, file.name


def test_one_module_reads_what_the_launcher_sets():
    names = ('TORCHELASTIC_', "'RANK'", "'LOCAL_RANK'", "'WORLD_SIZE'", "'LOCAL_WORLD_SIZE'", 'T2T_STARTED',
             'T2T_LAUNCHER', 'T2T_COMMAND')
    readers = {name for name, file in MODULES.items() if any(text in file.read_text() for text in names)}
    assert readers == {'utils.job', 'launch.launcher'}  # which takes the scheduler's RANK away


@pytest.mark.parametrize(('name', 'home'), [('DataLoader', 'data/loader.py'), ('Figure', 'utils/pictures.py')])
def test_what_is_built_in_one_place(name, home):
    builders = [
        f.relative_to(ROOT).as_posix()
        for room in ROOMS
        for f in (ROOT / room).rglob('*.py')
        for node in ast.walk(ast.parse(f.read_text()))
        if isinstance(node, ast.Call) and getattr(node.func, 'id', getattr(node.func, 'attr', '')) == name
    ]
    assert builders == [home]


def test_one_module_asks_what_an_address_is():
    """All others carry the Place that data/places.py has parsed."""
    asks = re.compile(r"\b(PREFIX|SCHEMES|urlparse|urlsplit|split_protocol|url_to_fs)\b|'(://|wds:|file:/*|pipe:)'"
                      r"|(ends|starts)with\('(\.tar|wds|http|s3)|'\{' in ")
    askers = {name for name, file in MODULES.items() if name.startswith(('data', 'tools'))
              and asks.search(ast.unparse(without_docstrings(ast.parse(file.read_text()))))}
    assert askers == {'data.places'}


def without_docstrings(tree: ast.Module) -> ast.Module:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return tree


def test_a_data_set_is_one_line_and_one_file():
    for name, entry in DATASETS.items():
        assert not entry.opener or callable(pkgutil.resolve_name(entry.opener)), name
        known = {'options.datasets', entry.opener.partition(':')[0], 'options.scripts'}  # a default of transfer.py
        for module, file in MODULES.items():
            if entry.opener and module.startswith(('data', 'options', 'tools')):
                assert f"'{name}'" not in file.read_text() or module in known, f'{module} knows {name}'
