"""The type checker of `make lint` sees all code but the tests, is told to overlook nothing, and finds what it must."""
import io
import os
import re
import subprocess
import sys
import tokenize
import tomllib
from pathlib import Path

import pytest

from tests.conftest import ROOT

SETTINGS = tomllib.loads((ROOT / 'pyproject.toml').read_text())['tool']['mypy']
# Each would hide faults, of some files or of a kind.
BLANKET = {'disable_error_code', 'exclude', 'exclude_gitignore', 'follow_imports', 'follow_imports_for_stubs',
           'ignore_errors', 'ignore_missing_imports', 'overrides', 'strict_optional'}
IGNORE = re.compile(r'type: *ignore|^# *(mypy|pyright|ty|pytype) *:')
# The rule, and behind it the reason.
PROPER_IGNORE = re.compile(r'# type: ignore\[[a-z-]+\]  # \w')

FAULTS = '''
import torch

from tools.doctor.case import Setup, Splits


def unknown_function(device):
    return torch.cuda.getdevice_name(device)


def unknown_attribute(setup: Setup):
    return setup.state.optimiser


def unknown_argument(values: torch.Tensor):
    return torch.softmax(values, dimension=1)


def use_of_none(splits: Splits):
    return splits.problem.label
'''


def checked_files() -> list[Path]:
    """The files that the checker is told of."""
    found = [path for pattern in SETTINGS['files'] for path in ROOT.glob(pattern)]
    return sorted({file for path in found for file in ([path] if path.is_file() else path.rglob('*.py'))})


def test_all_files_but_tests_are_checked():
    folders = [folder for folder in ROOT.iterdir() if folder.is_dir() and not folder.name.startswith('.')
               and folder.name not in ('tests', 'output') and not (folder / 'pyvenv.cfg').exists()]
    assert sorted([*ROOT.glob('*.py'), *(file for folder in folders for file in folder.rglob('*.py'))]) \
        == checked_files()
    assert len(checked_files()) > 100


def test_settings_hide_no_faults():
    assert not SETTINGS.keys() & BLANKET
    assert SETTINGS['check_untyped_defs'] and SETTINGS['warn_unused_ignores']


def test_ignores_name_their_rule_and_their_reason():
    for file in checked_files():
        for token in tokenize.generate_tokens(io.StringIO(file.read_text()).readline):
            if token.type == tokenize.COMMENT and IGNORE.search(token.string):
                assert PROPER_IGNORE.match(token.string), f'{file.relative_to(ROOT)}:{token.start[0]}: {token.string}'
        assert 'no_type_check' not in file.read_text(), file


def test_faults_are_found(tmp_path):
    pytest.importorskip('mypy', reason='mypy is not installed: pip install -r requirements-dev.txt')
    (tmp_path / 'faults.py').write_text(FAULTS)
    checked = subprocess.run(
        [sys.executable, '-m', 'mypy', '--config-file', ROOT / 'pyproject.toml', '--cache-dir', ROOT / '.mypy_cache',
         'faults.py'], cwd=tmp_path, env={**os.environ, 'MYPYPATH': str(ROOT)}, capture_output=True, text=True)
    found = re.findall(r'^faults\.py:(\d+): error: .* \[([a-z-]+)\]$', checked.stdout, re.M)
    lines = FAULTS.splitlines()
    assert [(lines[int(number) - 1].split('return ')[1], rule) for number, rule in found] == [
        ('torch.cuda.getdevice_name(device)', 'attr-defined'), ('setup.state.optimiser', 'attr-defined'),
        ('torch.softmax(values, dimension=1)', 'call-arg'), ('splits.problem.label', 'union-attr')
    ], checked.stdout + checked.stderr
