"""Paths that do not exist are refused before torch is imported."""
import subprocess
import sys
import time

import pytest

from options.parser import Options
from options.paths import check_checkpoint, check_data, check_paths
from tests.conftest import ROOT
from utils.errors import UserError

WRONG = {
    'validate.py': (('--dataset', 'digits', '--checkpoint', '/no/where'), 'checkpoint /no/where does not exist'),
    'predict.py': (('/no/where.jpg', '--pretrained'), "image '/no/where.jpg' does not exist"),
    'export.py': (('--checkpoint', '/no/where'), 'checkpoint /no/where does not exist'),
    'visualize.py': (('a.jpg', '--checkpoint', '/no/where'), 'checkpoint /no/where does not exist'),
    'train.py': (('/no/where/',), "data folder '/no/where' does not exist"),
    'transfer.py': (('/no/where',), "data folder '/no/where' does not exist"),
    'tools/doctor': (('--dataset', 'digits', '--resume', '/no/where'), '--resume /no/where: no such checkpoint'),
    'tools/report': (('/no/where',), '/no/where is no folder'),
    'tools/checkpoint.py': (('inspect', '/no/where'), 'checkpoint /no/where does not exist'),
    'tools/pack.py': (('/no/where', '/no/out'), "data folder '/no/where' does not exist")}


@pytest.mark.parametrize('script', WRONG)
def test_a_wrong_path_is_the_only_line_and_torch_is_not_imported(script):
    options, message = WRONG[script]
    program = ('import runpy, sys; sys.modules["torch"] = None; sys.argv[:] = sys.argv[1:]; '
               'sys.path.insert(0, sys.argv[0].rpartition("/")[0]); runpy.run_path(sys.argv[0], run_name="__main__")')
    started = time.monotonic()
    ended = subprocess.run([sys.executable, '-c', program, ROOT / script, *options], capture_output=True, text=True,
                           cwd=ROOT)
    assert ended.returncode == 2 and message in ended.stderr and ended.stderr.count('\n') == 1, ended.stderr
    assert not ended.stdout and time.monotonic() - started < 5


def test_only_what_is_certain_is_refused(tmp_path):
    (tmp_path / 'file').touch()
    for address in ('wds:https://host/a', 'wds:/no/{000..001}.tar', 'wds:/no/a.tar', 'https://host', str(tmp_path), ''):
        check_data(address)
    for address in ('hf-hub:timm/a', 'hf_hub:timm/a', 'https://host/a.pth', 'local-dir:a', str(tmp_path / 'latest'),
                    str(tmp_path / 'file'), None):
        check_checkpoint(address)
    check_paths(Options(dataset='cifar10', data='/no/where', images=['wds:/no/where', 'a.tar'], resume='auto'))
    check_paths(Options(dataset='digits', resume='/no/where/last.pth.tar'))
    for wrong in ('wds:/no/where', 'file:///no/where', '~/no/where'):
        with pytest.raises(UserError, match=r"data folder '/.*no/where' does not exist"):
            check_data(wrong)


def test_a_restarted_process_may_lack_what_its_first_start_read(monkeypatch):
    options = Options(resume='/no/checkpoint-00000001.pth.tar')
    with pytest.raises(UserError, match='no such checkpoint'):
        check_paths(options)
    monkeypatch.setenv('TORCHELASTIC_RESTART_COUNT', '1')
    check_paths(options)


def test_a_terminal_shows_a_line_at_once(monkeypatch, capsys):
    from utils import console
    console.say_at_once('loading')
    assert capsys.readouterr().err == ''
    monkeypatch.setattr(sys.stderr, 'isatty', lambda: True)
    console.say_at_once('loading')
    assert capsys.readouterr().err == 'loading\n'
    monkeypatch.setenv('TORCHELASTIC_RUN_ID', 'x')
    console.say_at_once('loading')
    assert capsys.readouterr().err == ''
