"""How a script ends where its console does not take what it says."""
import os
import subprocess
import sys

import pytest
import torch
from PIL import Image

from tests.conftest import ROOT, run_command, run_script
from utils.console import printable
from utils.errors import UserError, explain_limit

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


def test_memory_that_is_too_small_is_one_line_and_nothing_starts_again(tmp_path):
    """Asked for by torch on a CPU, by a GPU and by numpy; whichever rank it is, under the launcher too."""
    for name, call in (('torch', 'torch.empty(1 << 60)'), ('numpy', 'numpy.empty(1 << 50)'),
                       ('a GPU', 'throw(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\\nx"))'),
                       ('cuBLAS', 'throw(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling x"))')):
        # Under the name of a script that the launcher starts again after a crash.
        script = tmp_path / 'train.py'
        script.write_text(f"""import sys
sys.path.insert(0, {str(ROOT)!r})
import numpy, torch
from utils.script import run_script

def throw(error):
    raise error

print('started', flush=True)
run_script(lambda: {call})
""")
        result = run_script(script, cwd=tmp_path)
        assert result.returncode == 2 and len(result.stderr.splitlines()) == 1, f'{name}: {result.stderr}'
        assert result.stderr.startswith('train.py: error: out of memory (') and '--batch-size' in result.stderr, name
    launched = run_command([sys.executable, '-m', 'launch.launcher', 1, script, '--device', 'cpu'], tmp_path,
                           PYTHONPATH=str(ROOT))
    assert (launched.returncode, launched.stdout.count('started')) == (2, 1)
    assert launched.stderr.startswith('train.py: error: out of memory (')
    of_torch = "[enforce fail at a.cpp:1] . can't allocate memory: you tried to allocate 128 bytes."
    assert str(explain_limit(RuntimeError(of_torch))).startswith(
        'out of memory (tried to allocate 128 bytes); a smaller --batch-size needs less')
    assert explain_limit(RuntimeError('mat1 and mat2 shapes cannot be multiplied')) is None
    assert explain_limit(UserError('torch is out of memory')) is None


@pytest.mark.parametrize(('error', 'words'), [
    (OSError(24, 'Too many open files'), 'ulimit -n'),
    (RuntimeError('Too many open files. Communication …'), 'ulimit -n'),
    (BlockingIOError(11, 'Resource temporarily unavailable'), 'ulimit -u'),
    (RuntimeError("can't start new thread"), 'ulimit -u'),
    (RuntimeError('Resource temporarily unavailable'), 'ulimit -u'),
    (RuntimeError('cannot join thread before it is started'), 'ulimit -u'),
    (ImportError('libtorch_cpu.so: failed to map segment from shared object'), 'ulimit -v')])
def test_limits_of_the_system_are_named_with_how_to_raise_them(error, words):
    assert words in str(explain_limit(error))
    assert explain_limit(OSError(2, 'No such file')) is None


def test_a_small_address_space_is_one_line(tmp_path):
    result = run_command(['sh', '-c', f'ulimit -v 600000; exec {sys.executable} {ROOT}/train.py --dataset digits'],
                         cwd=tmp_path)
    assert (result.returncode, result.stderr.count('\n')) == (2, 1) and 'ulimit -v' in result.stderr


TRAINED = ('train.py', '--dataset', 'digits', '--only-classes', '0-1', '--model', 't2t_vit_7', '--img-size', '32',
           '--device', 'cpu', '-b', '64', '-j', '0', '--epochs', '1', '--no-model-ema', '--no-tensorboard')


@pytest.mark.parametrize('closed', ['>/dev/full', '2>&-', '<&- >&- 2>&-'])
def test_a_console_that_takes_nothing_ends_no_run(closed, tmp_path):
    script, *options = TRAINED
    result = run_command(['sh', '-c', f'{sys.executable} {ROOT / script} {" ".join(options)} --experiment a {closed}'],
                         cwd=tmp_path)
    assert result.returncode == 0 and (tmp_path / 'output/train/a/last.pth.tar').exists()
    assert 'Traceback' not in result.stderr and result.stderr.count('standard output cannot be written') == (
        closed == '>/dev/full')


    assert explain_limit(RuntimeError('mat1 and mat2 shapes cannot be multiplied')) is None
    assert explain_limit(UserError('torch is out of memory')) is None


def test_names_do_not_steer_a_terminal(tmp_path):
    """Neither in lines of the log, nor in the line of an error, nor in a table."""
    name = 'cat\x1b]0;owned\x07\x9b2J\r\u202egpj'
    shown = r'cat\x1b]0;owned\x07\x9b2J\r\u202egpj'
    assert printable(f'{name}\n\tcafé 猫') == f'{shown}\n\tcafé 猫' and printable(shown) == shown
    Image.new('RGB', (8, 8)).save(tmp_path / f'{name}.png')
    torch.save({'head.weight': torch.zeros(2, 3), name: torch.zeros(2)}, tmp_path / 'w.pth')
    results = [run_script('predict.py', f'{name}.png', '--model', 'resnet10t', '--checkpoint', name, cwd=tmp_path),
               run_script('tools/checkpoint.py', 'inspect', 'w.pth', '--keys', cwd=tmp_path),
               run_command([sys.executable, '-c', 'import sys; from utils.console import setup_logging\n'
                            'import logging; setup_logging(is_main=True); logging.warning(sys.argv[1])', name],
                           cwd=tmp_path, PYTHONPATH=str(ROOT))]
    for result in results:
        assert shown in result.stdout + result.stderr
        assert not set('\x1b\x07\x9b\r\u202e') & set(result.stdout + result.stderr)
