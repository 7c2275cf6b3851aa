"""The README is true: its options are those of the parsers, its files and recipes exist, its commands parse."""
import re
import shlex

import pytest

from tests.conftest import ROOT
from tests.test_options import parse
from tools.model_table import table as model_table
from tools.options_table import table

README = (ROOT / 'README.md').read_text()
BLOCKS = '\n'.join(re.findall(r'```sh\n(.*?)```', README, re.DOTALL)).replace('\\\n', ' ')
COMMANDS = [line for line in BLOCKS.splitlines() if re.search(r'\.(py|sh) |\.py$', line)]


def test_options_table_is_current():
    assert table() in README


def test_model_table_is_current():
    assert model_table([]) in README


def test_nothing_is_left_to_fill_in():
    assert not re.search(r'^[A-Z_]{6,}$', README, re.M)


def test_files_that_are_named_exist():
    tree = re.search(r'## Files\n+```\n(.*?)```', README, re.DOTALL)[1]
    folder, named = '', []
    for line in tree.splitlines():
        entry = line.strip().split('  ')[0]
        folder = '' if not line.startswith('  ') else folder
        named += [folder + name for name in entry.split(', ')]
        folder = entry if entry.endswith('/') else folder
    named += re.findall(r'\]\(([^)#:]+)\)', README)
    assert len(named) > 30
    for name in named:
        assert list(ROOT.glob(name.rstrip('/'))), f'README names {name}, which is not there'


@pytest.mark.parametrize('command', COMMANDS)
def test_commands_parse(command):
    words = [word for word in shlex.split(command, comments=True) if not re.match('[A-Z_]+=', word)]  # environment
    script = re.search(r'SCRIPT=(\w+)', command)
    if words[0] == './distributed_train.sh':
        assert words[1].isdecimal()
        parse(*words[2:], script=script[1] if script else 'train')
    elif words[0] == 'python' and words[1].startswith('tools/'):
        assert (ROOT / words[1]).is_file()  # their own tests run them
    elif words[0] == 'python' and words[1] != '-m' and '--help' not in words:
        parse(*words[2:], script=words[1].removesuffix('.py'))
    else:
        assert words[0] in ('make', 'python', '.venv/bin/python'), command
