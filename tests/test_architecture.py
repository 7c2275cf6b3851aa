"""Which way imports go: root scripts → {models, data, engine} → utils, figures → {models, utils}; nothing else."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ('models', 'data', 'engine', 'figures', 'utils')
MAY_IMPORT = {
    'models': {'models', 'utils'},
    'data': {'data', 'utils'},
    'engine': {'engine', 'utils'},
    'figures': {'figures', 'models', 'utils'},
    'utils': {'utils'},
}
SCRIPTS = sorted(ROOT.glob('*.py'))


def imported_modules(path: Path, package: str = '') -> set[str]:
    """Top-level names of what `path` imports, at its head or inside its functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split('.')[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(package if node.level == 1 else node.module.split('.')[0])
    return names


@pytest.mark.parametrize('room', ROOMS)
def test_rooms_import_only_what_lies_below(room):
    files = sorted((ROOT / room).rglob('*.py'))
    assert files
    for file in files:
        forbidden = imported_modules(file, room) & set(ROOMS) - MAY_IMPORT[room]
        assert not forbidden, f'{file.relative_to(ROOT)} imports {forbidden}'


def test_nothing_imports_a_script():
    scripts = {path.stem for path in SCRIPTS}
    assert {'train', 'validate', 'transfer'} <= scripts
    for file in [*SCRIPTS, *(f for room in ROOMS for f in (ROOT / room).rglob('*.py'))]:
        assert not imported_modules(file) & scripts, f'{file.relative_to(ROOT)} imports a script'


def test_options_import_no_torch():
    reached, queue = set(), [ROOT / 'utils' / 'options.py']
    while queue:
        file = queue.pop()
        for node in ast.walk(ast.parse(file.read_text())):
            modules = (
                [a.name for a in node.names]
                if isinstance(node, ast.Import)
                else [node.module]
                if isinstance(node, ast.ImportFrom)
                else []
            )
            for module in modules:
                reached.add(module.split('.')[0])
                if module.startswith('utils.'):
                    queue.append(ROOT / (module.replace('.', '/') + '.py'))
    assert 'torch' not in reached and 'argparse' in reached


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
