"""How a script ends where its console does not take what it says."""
import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT

SCRIPT = """
from utils.script import run_script

def main():
    print('caf\\u00e9 \\udce9')
    for _ in range(100_000):
        print('line')
    open('done', 'w').close()

run_script(main)
"""


def run(cwd, stdout, **environment):
    return subprocess.run([sys.executable, '-c', SCRIPT], cwd=cwd, stdout=stdout, stderr=subprocess.PIPE, text=True,
                          timeout=60, env={**os.environ, 'PYTHONPATH': str(ROOT), **environment})


@pytest.mark.parametrize('encoding', ['ascii', 'utf-8:strict'])
def test_what_a_console_cannot_show_is_escaped(tmp_path, encoding):
    result = run(tmp_path, subprocess.PIPE, PYTHONIOENCODING=encoding)
    assert result.returncode == 0 and '\\udce9' in result.stdout and (tmp_path / 'done').exists()


def test_standard_output_may_be_a_text_in_memory(tmp_path):
    script = f'import io, sys\nsys.stdout = io.StringIO()\n{SCRIPT}'
    result = subprocess.run([sys.executable, '-c', script], cwd=tmp_path, capture_output=True, text=True, timeout=60,
                            env={**os.environ, 'PYTHONPATH': str(ROOT)})
    assert (result.returncode, result.stderr) == (0, '') and (tmp_path / 'done').exists()


def test_a_reader_that_goes_away_is_no_error(tmp_path):
    reading, writing = os.pipe()
    os.close(reading)
    result = run(tmp_path, writing)
    os.close(writing)
    assert (result.returncode, result.stderr) == (0, '')


def test_other_broken_pipes_are_errors(tmp_path):
    script = SCRIPT.replace("print('line')", 'raise BrokenPipeError')
    result = subprocess.run([sys.executable, '-c', script], cwd=tmp_path, capture_output=True, text=True, timeout=60,
                            env={**os.environ, 'PYTHONPATH': str(ROOT)})
    assert result.returncode == 1 and 'BrokenPipeError' in result.stderr
