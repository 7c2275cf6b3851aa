"""engine/log: what cannot be written is one warning, and metrics.jsonl loses no line once there is room again."""

import contextlib
import csv
import json
import logging
import os
import resource
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2
from tensorboard.summary.writer.record_writer import RecordWriter

from engine.checkpoint import save_checkpoint
from engine.log.metrics import read_environment, read_metrics
from engine.log.run_log import RunLog
from engine.run_folder import RunLock
from utils import faults
from utils.disk import check_writable, make_folder, require_own, write_whole
from utils.errors import UserError

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
    return {'epoch': 0, 'global_step': step, 'images_seen': 8 * step, 'epoch_progress': step / 10, 'loss': 1 / step,
            'lr': 0.1, 'rates': {'head, decayed': 0.1, 'body, decayed': 0.01}, 'gradient_norm': 2.0, **more}


def results(epoch):
    return {'epoch': epoch, 'images_seen': 48 * (epoch + 1), 'train_loss': 1.0, 'loss': 2.0, 'top1': 3.0, 'top5': 4.0,
            'lr': 0.1}


def run(folder, *, steps=6):
    """A log of `steps` lines and an epoch's results, closed."""
    log = RunLog(folder, options={'lr': 0.1})
    for step in range(1, steps + 1):
        log.train(line(step))
    log.epoch(results(0))
    log.first_batch(torch.zeros(2, 3, 8, 8), 8 * steps)
    log.save_batch(torch.zeros(2, 3, 8, 8), steps)
    log.close()
    return log


def board(folder) -> EventAccumulator:
    return EventAccumulator(str(folder)).Reload()


def points(folder, tag) -> dict:
    """{x: y}; fails where a point is there twice."""
    scalars = board(folder).Scalars(tag)
    found = {scalar.step: scalar.value for scalar in scalars}
    assert len(found) == len(scalars), f'{tag}: {scalars}'
    return found


@pytest.mark.parametrize('point, named', [
    ('log.metrics@1', 'metrics.jsonl'), ('log.metrics@3', 'metrics.jsonl'), ('log.metrics@2+', 'metrics.jsonl'),
    ('log.board', 'TensorBoard'), ('log.board@4', 'TensorBoard'), ('log.board@2+', 'TensorBoard'),
    ('log.environment', 'environment.json'), ('log.summary@1+', 'summary.csv'), ('log.curves@1+', 'curves.png'),
    ('log.images@1+', 'images'),
])
def test_a_full_disk_is_one_warning_and_the_rest_is_written(point, named, tmp_path, fail, warnings_of):
    fail(f'{point}=full')
    run(tmp_path)
    assert len(warnings_of()) == 1, warnings_of()
    assert named in warnings_of()[0] and 'No space left on device' in warnings_of()[0]
    for file in {'metrics.jsonl', 'summary.csv', 'curves.png', 'args.yaml', 'environment.json'} - {named}:
        assert (tmp_path / file).stat().st_size, file
    if point != 'log.metrics@2+':
        assert [r.get('global_step') for r in read_metrics(tmp_path)] == [1, 2, 3, 4, 5, 6, None]
    assert not list(tmp_path.glob('.*'))


def test_no_line_is_lost_where_a_real_disk_is_full_for_a_while(tmp_path, warnings_of, limit):
    """A limit on the size of files stops a line in its midst; each line after the limit is lifted is whole."""
    log = RunLog(tmp_path, options={'tensorboard': False})
    log.train(line(1, **LARGE))
    with limit(4000):
        for step in (2, 3):
            log.train(line(step, **LARGE))
        log.epoch(results(0))
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
    log.sync()
    with limit(1):
        for step in range(1, 40):
            log.first_batch(torch.rand(16, 3, 64, 64), step)
        log.train(line(1))
    log.close()
    assert [text for text in warnings_of() if 'TensorBoard' in text and 'training goes on' in text]
    assert len(warnings_of()) == 2  # metrics.jsonl, for a line
    assert [r['global_step'] for r in read_metrics(tmp_path)] == [1]


def test_a_missing_tensorboard_is_a_warning(tmp_path, warnings_of, monkeypatch):
    monkeypatch.setitem(sys.modules, 'torch.utils.tensorboard', None)
    run(tmp_path)
    assert len(warnings_of()) == 1 and 'TensorBoard' in warnings_of()[0]
    assert warnings_of()[0].endswith('; training goes on without them')


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
        log = RunLog(tmp_path, options={'tensorboard': False}, global_step=3, epoch=0)
    assert (tmp_path / 'metrics.jsonl').read_bytes() == before
    log.train(line(4))
    log.close()
    assert [r['global_step'] for r in read_metrics(tmp_path)] == [1, 2, 3, 4]


def test_links_in_a_folder_lead_nothing_out_of_it(tmp_path):
    """As in a run's folder that somebody else has packed."""
    folder, secret = tmp_path / 'run', tmp_path / 'secret'
    folder.mkdir()
    secret.write_text('{"kind": "epoch", "epoch": 0}\n')
    for name in ('metrics.jsonl', '.lock', '.summary.csv.tmp', '.checkpoint-00000001.pth.tar.tmp', 'last.pth.tar',
                 'checkpoint-00000000.pth.tar'):
        (folder / name).symlink_to(secret)
    with pytest.raises(UserError, match=f'metrics.jsonl is a link that leads out of its folder, to {secret}; remove'):
        read_metrics(folder)
    with pytest.raises(UserError, match='.lock is a link'):
        RunLock(folder)
    write_whole(folder / 'summary.csv', 'a,b\n')
    for step in (1, 2, 3):
        save_checkpoint({'a': torch.zeros(1)}, folder, global_step=step, keep=2, is_best=False)
    assert secret.read_text() == '{"kind": "epoch", "epoch": 0}\n' and not (folder / 'last.pth.tar').is_symlink()
    assert not (folder / 'checkpoint-00000000.pth.tar').is_symlink(), 'a link is pruned, not what it leads to'
    (folder / 'loop').symlink_to(folder / 'loop')
    require_own(folder / 'loop')


def test_damaged_lines_are_left_out_and_counted(tmp_path, warnings_of):
    run(tmp_path)
    whole = (tmp_path / 'metrics.jsonl').read_bytes().splitlines()
    damaged = [b'', b'\xff\xfe', b'3', b'{"kind": "train"}', b'{"kind": "train", "global_step": "4"}']
    (tmp_path / 'metrics.jsonl').write_bytes(b'\n'.join([*whole[:2], *damaged, *whole[2:], whole[0][:9]]))
    assert len(read_metrics(tmp_path)) == 7
    assert len(warnings_of()) == 1 and '5 damaged lines' in warnings_of()[0]


def test_summary_has_a_column_for_each_number_of_any_epoch(tmp_path):
    log = RunLog(tmp_path, options={'tensorboard': False})
    log.epoch({'epoch': 0, 'top1': 1.0})
    log.epoch({'epoch': 1, 'top1': 2.0, 'bad_images': 3})
    rows = list(csv.DictReader(open(tmp_path / 'summary.csv', newline='')))
    assert rows == [{'epoch': '1', 'top1': '1.0', 'bad_images': ''}, {'epoch': '2', 'top1': '2.0', 'bad_images': '3'}]


def test_each_start_of_a_run_is_recorded_with_what_it_ran_on(tmp_path):
    assert read_environment(tmp_path) == []
    for step, device in ((0, 'one'), (7, 'another')):
        RunLog(tmp_path, options={'tensorboard': False}, environment={'device': device}, global_step=step).close()
    first, second = read_environment(tmp_path)
    assert (first['device'], first['global_step']) == ('one', 0)
    assert (second['device'], second['global_step']) == ('another', 7) and first['time'] <= second['time']
    for damaged in ('[{"device": ', '3', '[3]'):
        (tmp_path / 'environment.json').write_text(damaged)
        assert read_environment(tmp_path) == []


# ----------------------------------------------------------------------------------------------------------
# TensorBoard: what it reads, not how it shows it, for which see test_tensorboard.py

LOSS, TOP1 = 'training by images seen/loss', 'evaluation by images seen/top1'


def test_each_number_is_drawn_against_what_its_name_says(tmp_path):
    run(tmp_path)
    assert points(tmp_path, LOSS) == pytest.approx({8: 1, 16: 1 / 2, 24: 1 / 3, 32: 1 / 4, 40: 1 / 5, 48: 1 / 6})
    assert points(tmp_path, 'learning rate by images seen/body, decayed')[48] == pytest.approx(0.01)
    assert points(tmp_path, 'evaluation by images seen/top1') == {48: 3}
    assert points(tmp_path, 'run by images seen/train_loss') == points(tmp_path, 'run by images seen/epoch') == {48: 1}
    assert all(tag.split('/')[0].endswith(' by images seen') for tag in board(tmp_path).Tags()['scalars'])
    assert not [path for path in tmp_path.rglob('*tfevents*') if path.parent != tmp_path], 'TensorBoard lists it once'


def test_a_resumed_run_has_each_point_once(tmp_path):
    """What was written after the checkpoint, by a run that ended without one, is written again."""
    run(tmp_path)
    for start, last in ((3, 5), (0, 2), (2, 6)):
        log = RunLog(tmp_path, options={}, global_step=start, images_seen=8 * start, epoch=0)
        for step in range(start + 1, last + 1):
            log.train(line(step))
        log.close()
        assert list(points(tmp_path, LOSS)) == [8 * step for step in range(1, last + 1)]
        assert points(tmp_path, TOP1) == {}  # the epoch has not ended again


def test_what_came_before_a_checkpoint_is_on_the_disk(tmp_path, monkeypatch):
    """However the process ends then, and however slow the disk: nothing is closed here."""
    write = RecordWriter.write
    monkeypatch.setattr(RecordWriter, 'write', lambda self, data: (time.sleep(0.02), write(self, data)))
    log = RunLog(tmp_path, options={})
    for step in range(1, 5):
        log.train(line(step))
    log.epoch(results(0))
    log.sync()
    assert list(points(tmp_path, LOSS)) == [8, 16, 24, 32]
    assert points(tmp_path, TOP1) == {48: 3}
    log.close()


def test_wrong_predictions_are_drawn_of_the_first_and_the_last_epoch_if_epochs_are_short(tmp_path):
    log = RunLog(tmp_path, options={})
    for epoch in range(4):
        log.wrong_predictions({'weights': (torch.rand(3, 3, 500, 300), ['ant\n→ bee, 90 %'] * 3)}, 48 * (epoch + 1))
    log.wrong_predictions({}, 240)  # no errors
    log.close()
    sheets = board(tmp_path).Images('evaluation by images seen/wrong predictions of the weights')
    assert [sheet.step for sheet in sheets] == [48, 192]
    assert all(sheet.width > 300 and len(sheet.encoded_image_string) < 400_000 for sheet in sheets)


def test_the_batch_is_small_for_tensorboard_and_whole_in_the_file(tmp_path):
    log = RunLog(tmp_path, options={})
    images = torch.rand(20, 3, 240, 120)
    log.first_batch(images, 60)
    log.save_batch(images, 3)
    log.close()
    batch, = board(tmp_path).Images('training by images seen/first batch of the epoch')
    assert (batch.step, batch.width, batch.height) == (60, 4 * 56 + 10, 4 * 112 + 10)
    assert Image.open(tmp_path / 'train_batch-00000003.png').size == (4 * 122 + 2, 4 * 242 + 2)


def test_without_tensorboard_no_image_is_asked_for(tmp_path):
    for log in (RunLog(None, options={}), RunLog(tmp_path, options={'tensorboard': False})):
        assert not log.wants('first batch of the epoch')
        log.first_batch(torch.rand(2, 3, 8, 8), 2)
        log.wrong_predictions({'weights': (torch.rand(1, 3, 8, 8), ['x'])}, 0)
        log.sync()
        log.finish()
        log.close()
    assert not list(tmp_path.rglob('*tfevents*')) and not list(tmp_path.glob('*_batch*'))


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
        for check in (check_writable, make_folder):
            if name == 'a long name' and check is check_writable:
                continue  # known only when it is made
            with pytest.raises(UserError, match='--output: .* cannot be written .*; name another folder') as error:
                check(folder, '--output')
            assert '\n' not in str(error.value), name


def test_checking_a_folder_makes_nothing(tmp_path):
    check_writable(tmp_path / 'a/b/c', '--output')
    check_writable(tmp_path, '--output')
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
                    check_writable(path, '--output')
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


def test_a_resumed_run_is_compared_by_the_options_it_has_now(tmp_path):
    for epoch, lr in enumerate((0.01, 0.03)):
        log = RunLog(tmp_path, options={'lr': lr}, global_step=epoch, images_seen=epoch, epoch=epoch)
        log.epoch({'epoch': epoch, 'images_seen': epoch + 1, 'train_loss': 1.0, 'loss': 1.0, 'top1': 50.0, 'top5': 1.0})
        log.finish()
        log.close()
        # TensorBoard sorts files by the second in their names, then by a counter as a text: 10 before 9.
        ended = int(time.time())
        while int(time.time()) == ended:
            time.sleep(0.02)
    events = EventAccumulator(str(tmp_path)).Reload()
    content = events.SummaryMetadata('_hparams_/session_start_info').plugin_data.content
    start = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info
    assert start.hparams['lr'].number_value == 0.03
    assert len(start.hparams) <= 25 and 'log_interval' not in start.hparams
    assert [point.step for point in events.Scalars('evaluation by images seen/top1')] == [1, 2]


def test_a_picture_that_cannot_be_drawn_costs_nothing_else(tmp_path, warnings_of, monkeypatch):
    def fail(*args, **kwargs):
        raise ValueError('\ncannot\nbe drawn')

    monkeypatch.setattr('utils.pictures.image_sheet', fail)
    log = RunLog(tmp_path, options={})
    log.wrong_predictions({'weights': (torch.rand(1, 3, 8, 8), ['ant\n→ bee, 90.0%'])}, 0)
    assert log.wants('wrong predictions')
    log.close()
    assert warnings_of() == [f'{tmp_path}/wrong predictions cannot be written (ValueError: cannot be drawn); '
                             'training goes on']


def test_the_console_says_that_a_loss_is_missing(tmp_path, caplog):
    caplog.set_level('INFO', 'engine')
    log = RunLog(tmp_path, options={'tensorboard': False})
    log.train({'epoch': 0, 'global_step': 2, 'images_seen': 8, 'loss': None, 'lr': 0.1, 'rates': {}},
              step=2, steps_per_epoch=9)
    assert caplog.messages == ['Train: 1 [   2/9]  Loss: none  LR: 1.000e-01']
