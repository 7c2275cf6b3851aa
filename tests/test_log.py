"""utils/log.py: what cannot be written is one warning, and metrics.jsonl loses no line once there is room again."""

import contextlib
import csv
import json
import logging
import os
import resource
import signal
import sys
from pathlib import Path

import pytest
import torch

from utils import faults
from utils.errors import UserError
from utils.log import RunLog, check_folder, make_folder, read_metrics

LARGE = {'note': 'x' * 3000}


@pytest.fixture
def warnings_of(caplog):
    caplog.set_level(logging.INFO)
    return lambda: [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


@pytest.fixture
def fail(monkeypatch):
    """Switches faults on; counting begins anew."""

    def switch(plan):
        monkeypatch.setenv('T2T_FAULTS', plan)
        faults._passed.clear()

    return switch


@pytest.fixture
def limit():
    """Within it no file grows beyond so many bytes, in this whole process."""

    @contextlib.contextmanager
    def limited_to(size):
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return limited_to


def line(step, **more):
    return {'epoch': 0, 'global_step': step, 'epoch_progress': step / 10, 'loss': 1.0, 'lr': 0.1, **more}


def results(epoch):
    return {'epoch': epoch, 'train_loss': 1.0, 'loss': 2.0, 'top1': 3.0, 'top5': 4.0, 'lr': 0.1}


def run(folder, *, steps=6):
    """A log of `steps` lines and an epoch's results, closed."""
    log = RunLog(folder, options={'lr': 0.1})
    for step in range(1, steps + 1):
        log.train(line(step))
    log.epoch(results(0), steps)
    log.images('batch', torch.zeros(2, 3, 8, 8), steps, as_file=True)
    log.close()
    return log


@pytest.mark.parametrize('point, named', [
    ('log.metrics@1', 'metrics.jsonl'), ('log.metrics@3', 'metrics.jsonl'), ('log.metrics@2+', 'metrics.jsonl'),
    ('log.board', 'TensorBoard'), ('log.board@4', 'TensorBoard'), ('log.board@2+', 'TensorBoard'),
    ('log.summary@1+', 'summary.csv'), ('log.curves@1+', 'curves.png'), ('log.images@1+', 'images'),
])
def test_a_full_disk_is_one_warning_and_the_rest_is_written(point, named, tmp_path, fail, warnings_of):
    fail(f'{point}=full')
    run(tmp_path)
    assert len(warnings_of()) == 1, warnings_of()
    assert named in warnings_of()[0] and 'No space left on device' in warnings_of()[0]
    for file in {'metrics.jsonl', 'summary.csv', 'curves.png', 'args.yaml'} - {named}:
        assert (tmp_path / file).stat().st_size, file
    if point != 'log.metrics@2+':
        assert [r.get('global_step') for r in read_metrics(tmp_path)] == [1, 2, 3, 4, 5, 6, None]
    assert not list(tmp_path.glob('.*'))


def test_no_line_is_lost_where_a_real_disk_is_full_for_a_while(tmp_path, warnings_of, limit):
    """A limit on the size of files stops a line in its midst; each line after the limit is lifted is whole."""
    log = RunLog(tmp_path, options={}, tensorboard=False)
    log.train(line(1, **LARGE))
    with limit(4000):
        for step in (2, 3):
            log.train(line(step, **LARGE))
        log.epoch(results(0), 3)
    assert (tmp_path / 'metrics.jsonl').stat().st_size == 4000  # a part of a line
    assert [r['global_step'] for r in read_metrics(tmp_path)] == [1]
    assert len(warnings_of()) == 1 and 'File too large' in warnings_of()[0]
    log.train(line(4, **LARGE))
    log.close()
    content = (tmp_path / 'metrics.jsonl').read_text()
    assert [json.loads(text).get('global_step') for text in content.splitlines()] == [1, 2, 3, None, 4]
    assert len(warnings_of()) == 1


@pytest.mark.filterwarnings('error::pytest.PytestUnhandledThreadExceptionWarning')
def test_tensorboard_on_a_full_disk_is_one_warning_without_a_traceback(tmp_path, warnings_of, limit):
    """Its writer is a thread that fails later, and elsewhere, than the call."""
    log = RunLog(tmp_path, options={})
    log._board.flush()
    with limit(1):
        for step in range(1, 40):
            log.images('batch', torch.rand(16, 3, 64, 64), step)
        log.train(line(1))
    log.close()
    assert [text for text in warnings_of() if 'TensorBoard' in text and 'training goes on' in text]
    assert len(warnings_of()) == 2  # metrics.jsonl, for a line
    assert [r['global_step'] for r in read_metrics(tmp_path)] == [1]


def test_a_missing_tensorboard_is_a_warning(tmp_path, warnings_of, monkeypatch):
    monkeypatch.setitem(sys.modules, 'torch.utils.tensorboard', None)
    run(tmp_path)
    assert len(warnings_of()) == 1 and 'TensorBoard' in warnings_of()[0]


def test_what_stands_in_the_way_of_a_file_is_a_warning(tmp_path, warnings_of):
    for name in ('summary.csv', 'curves.png', 'args.yaml', 'metrics.jsonl'):
        (tmp_path / name).mkdir()
    with pytest.raises(UserError, match='metrics.jsonl'):
        run(tmp_path)
    (tmp_path / 'metrics.jsonl').rmdir()
    run(tmp_path)
    assert len(read_metrics(tmp_path)) == 7
    assert {Path(text.split()[0]).name for text in warnings_of()} == {'args.yaml', 'curves.png', 'summary.csv'}


def test_a_resumed_run_keeps_its_history_where_it_cannot_be_rewritten(tmp_path, limit):
    """Later lines are dropped only when the whole of the rest has been written."""
    run(tmp_path)
    before = (tmp_path / 'metrics.jsonl').read_bytes()
    with limit(100):
        log = RunLog(tmp_path, options={}, global_step=3, epoch=0, tensorboard=False)
    assert (tmp_path / 'metrics.jsonl').read_bytes() == before
    log.train(line(4))
    log.close()
    assert [r['global_step'] for r in read_metrics(tmp_path)] == [1, 2, 3, 4]


def test_damaged_lines_are_left_out_and_counted(tmp_path, warnings_of):
    run(tmp_path)
    whole = (tmp_path / 'metrics.jsonl').read_bytes().splitlines()
    damaged = [b'', b'\xff\xfe', b'3', b'{"kind": "train"}', b'{"kind": "train", "global_step": "4"}']
    (tmp_path / 'metrics.jsonl').write_bytes(b'\n'.join([*whole[:2], *damaged, *whole[2:], whole[0][:9]]))
    assert len(read_metrics(tmp_path)) == 7
    assert len(warnings_of()) == 1 and '5 damaged lines' in warnings_of()[0]


def test_summary_has_a_column_for_each_number_of_any_epoch(tmp_path):
    log = RunLog(tmp_path, options={}, tensorboard=False)
    log.epoch({'epoch': 0, 'top1': 1.0}, 1)
    log.epoch({'epoch': 1, 'top1': 2.0, 'bad_images': 3}, 2)
    rows = list(csv.DictReader(open(tmp_path / 'summary.csv', newline='')))
    assert rows == [{'epoch': '0', 'top1': '1.0', 'bad_images': ''}, {'epoch': '1', 'top1': '2.0', 'bad_images': '3'}]


# ----------------------------------------------------------------------------------------------------------
# Folders that cannot be written


def places(tmp_path) -> dict:
    """Folders that cannot be made or written, for anybody."""
    (tmp_path / 'file').write_text('')
    (tmp_path / 'nowhere').symlink_to(tmp_path / 'missing')
    return {
        'below a file': tmp_path / 'file/run', 'a file': tmp_path / 'file', 'a link to nothing': tmp_path / 'nowhere',
        'a long name': tmp_path / ('x' * 300), 'not a file system for files': Path('/proc/run/here')}


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    for name, folder in places(tmp_path).items():
        for check in (check_folder, make_folder):
            if name == 'a long name' and check is check_folder:
                continue  # known only when it is made
            with pytest.raises(UserError, match='--output: .* cannot be written .*; name another folder') as error:
                check(folder, '--output')
            assert '\n' not in str(error.value), name


def test_checking_a_folder_makes_nothing(tmp_path):
    check_folder(tmp_path / 'a/b/c', '--output')
    check_folder(tmp_path, '--output')
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('mode', [0o555, 0o000])
def test_a_folder_without_the_right_to_write(mode, tmp_path):
    """As a user without privileges, if this is root, whom no mode keeps from writing."""
    folder = tmp_path / 'shut'
    folder.mkdir()
    folder.chmod(mode)
    receiver, sender = os.pipe()
    if not (child := os.fork()):
        try:
            os.chdir('/')
            if os.getuid() == 0:
                os.chown(tmp_path, 65534, 65534)
                _open_parents(tmp_path)
                os.setgroups([])
                os.setuid(65534)
            for path in (folder, folder / 'run/deep'):
                try:
                    check_folder(path, '--output')
                except UserError as error:
                    os.write(sender, f'{error}\n'.encode())
        finally:
            os._exit(0)
    os.close(sender)
    os.waitpid(child, 0)
    with open(receiver) as file:
        said = file.read().splitlines()
    assert len(said) == 2 and all(text.startswith('--output: ') and 'Permission denied' in text for text in said), said


def _open_parents(folder):
    """Lets others pass to where pytest's folders are, which are its user's alone."""
    for parent in folder.parents:
        if parent.name.startswith('pytest-'):
            parent.chmod(0o755)


def test_signals_of_a_full_file_are_ignored():
    """Otherwise the limits above would end the process."""
    assert signal.getsignal(signal.SIGXFSZ) is signal.SIG_IGN
