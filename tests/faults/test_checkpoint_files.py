"""Checkpoint files under attack: kills at every point of a save, damaged files, a full disk, two runs in one folder.

    python -m pytest tests/faults/test_checkpoint_files.py                # a sample of the kills
    python -m pytest tests/faults/test_checkpoint_files.py -m faults      # 200 of them
"""
import hashlib
import logging
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import zipfile
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from timm.utils import ModelEmaV3

from engine import checkpoint as checkpoint_files, run_folder
from engine.checkpoint import BEST, LAST, SAVE_POINTS, find_checkpoint, save_checkpoint
from engine.run_folder import RunLock, check_resume, resolve_run
from engine.state import TrainState
from engine.writer import CheckpointWriter, _Snapshot
from models import create_model
from tests.conftest import ROOT, assert_same, write_checkpoint
from utils import faults
from utils.checkpoint_reader import SEAL, SEAL_LENGTH, read_checkpoint, verify_checksum
from utils.distributed import World
from utils.errors import UserError
from utils.runtime import Precision

# One process that has torch ready, and for every line it reads a fork that saves until a fault ends it.
NURSERY = f"""
import logging, os, resource, sys
sys.path.insert(0, {str(ROOT)!r})
import torch
from pathlib import Path
from tests.faults.test_checkpoint_files import run_until_killed
torch.set_num_threads(1)
logging.basicConfig(level=logging.WARNING)
print('ready', flush=True)
for line in sys.stdin:
    plan, folder, saves, limit = line.rstrip().split('|')
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.environ['T2T_FAULTS'] = plan
            if limit:
                resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), resource.RLIM_INFINITY))
            run_until_killed(Path(folder), int(saves))
            code = 0
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
        finally:
            os._exit(code)
    print('exit', os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


def state_at(step: int) -> dict:
    """All of a run's state at one step; every part tells the step, so that a mix of two would be seen."""
    generator = torch.Generator().manual_seed(step)
    weights = {f'blocks.{i}.weight': torch.randn(64, 64, generator=generator) for i in range(6)}
    return {'global_step': step, 'state_dict': weights, 'state_dict_ema': {k: v + step for k, v in weights.items()},
            'optimizer': {'state': {0: {'exp_avg': torch.full((5000,), float(step))}}, 'param_groups': [{'lr': step}]},
            'args': {'seed': step}, 'ranks': [{'rng': torch.full((2500,), step % 256, dtype=torch.uint8)}]}


def is_best(step: int) -> bool:
    return step % 3 == 0


def run_until_killed(folder: Path, saves: int) -> None:
    """A run as a script makes it: goes on from the newest checkpoint, and saves one state after another."""
    lock = RunLock(folder)
    found = find_checkpoint(folder)
    start = read_checkpoint(found, verified=True)['global_step'] if found else 0
    writer = CheckpointWriter(folder, keep=2, resumed=found)
    for step in range(start + 1, start + 1 + saves):
        writer.save(state_at(step), step, is_best=is_best(step))
    writer.close()
    lock.release()


class Nursery:
    def __init__(self):
        self._process = subprocess.Popen([sys.executable, '-c', NURSERY], stdin=subprocess.PIPE, text=True, cwd=ROOT,
                                         stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                         env={**os.environ, 'OMP_NUM_THREADS': '1'})
        self.said = ''  # by the last run; through a pipe, to which the limit of a file's size does not apply
        assert self._process.stdout.readline() == 'ready\n'

    def run(self, plan: str, folder: Path, saves: int = 12, limit: int | None = None) -> int:
        """The exit code, negative for a signal, of a run with these faults."""
        self._process.stdin.write(f'{plan}|{folder}|{saves}|{limit or ""}\n')
        self._process.stdin.flush()
        self.said = ''
        while not (line := self._process.stdout.readline()).startswith('exit '):
            assert line, f'the nursery has ended: {self.said}'
            self.said += line
        return int(line.split()[1])

    def close(self) -> None:
        self._process.stdin.close()
        assert self._process.wait(30) == 0


@pytest.fixture(scope='module')
def nursery():
    children = Nursery()
    yield children
    children.close()


@pytest.fixture
def fault(monkeypatch):
    """fault(PLAN) sets the faults of this process; '' ends them."""
    def plan(text: str) -> None:
        faults._passed.clear()
        monkeypatch.setenv('T2T_FAULTS', text)
    yield plan
    faults._passed.clear()


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {'.lock'}


def numbered(folder: Path) -> list[Path]:
    return sorted(folder.glob('checkpoint-*.pth.tar'))


# --- Kills -----------------------------------------------------------------------------------------------------------

def assert_survived(folder: Path, before: int) -> int:
    """Everything under a name is one whole state, two at least once there were two; returns the newest one's step."""
    newest = find_checkpoint(folder)
    if newest is None:
        assert before == 0
        assert not numbered(folder) and not (folder / LAST).exists()
        return 0
    step = read_checkpoint(newest, verified=True)['global_step']
    assert step >= before, 'a checkpoint that was there is gone'
    assert newest.name == f'checkpoint-{step:08d}.pth.tar'
    for path in [*numbered(folder), *(folder / name for name in (LAST, BEST) if (folder / name).exists())]:
        content = read_checkpoint(path, verified=True)
        assert_same(content, state_at(content['global_step']))
        if path.name == BEST:
            assert is_best(content['global_step'])
    assert (folder / LAST).exists() or before == 0
    assert len(numbered(folder)) >= min(step, 2)
    if step >= 3:
        best = read_checkpoint(folder / BEST)['global_step']
        assert best >= step - step % 3, 'the best state is in no file'
    return step


def kill_many(nursery: Nursery, folder: Path, plans: list[str]) -> None:
    """One run, killed and started again for every plan; a new one every ten, so that the first saves are hit too."""
    for number, plan in enumerate(plans):
        if number % 10 == 0:
            run, step = folder / f'run{number}', 0
            run.mkdir()
        assert nursery.run(plan, run) == -signal.SIGKILL, f'{plan}: not killed: {nursery.said}'
        step = assert_survived(run, step)
    assert nursery.run('', run, saves=4) == 0
    assert assert_survived(run, step) == step + 4
    assert names(run) == {f'checkpoint-{step + 3:08d}.pth.tar', f'checkpoint-{step + 4:08d}.pth.tar', LAST, BEST}


def draw_kills(seed: int, count: int) -> list[str]:
    """Every point in turn, at its first to fourth passing; the best and a removal are passed in every third save."""
    rng = random.Random(seed)
    points = [SAVE_POINTS[i % len(SAVE_POINTS)] for i in range(count)]
    rng.shuffle(points)
    return [f'{point}@{rng.randint(1, 3 if point == "save.linked_best" else 4)}=kill' for point in points]


def test_a_kill_at_every_point_of_a_save(nursery, tmp_path):
    print('seed 1')
    kill_many(nursery, tmp_path, draw_kills(1, len(SAVE_POINTS) + 1))


def test_a_kill_at_every_point_of_the_save_of_the_best(nursery, tmp_path):
    """The third save, the first that removes one: all its points, each in a run of its own, which then goes on."""
    once = ('save.linked_best', 'save.removing')
    for point in SAVE_POINTS:
        run = tmp_path / point
        run.mkdir()
        assert nursery.run(f'{point}@{1 if point in once else 3}=kill', run) == -signal.SIGKILL, nursery.said
        step = assert_survived(run, 2)
        assert step == (2 if SAVE_POINTS.index(point) < SAVE_POINTS.index('save.renamed') else 3)
        assert nursery.run('', run, saves=1) == 0
        assert assert_survived(run, step) == step + 1


@pytest.mark.faults
def test_two_hundred_kills(nursery, tmp_path, record_property):
    print('seed 2')
    plans = draw_kills(2, 200)
    kill_many(nursery, tmp_path, plans)
    record_property('kills', len(plans))


def test_what_a_killed_save_leaves_is_removed_at_the_next_start(nursery, tmp_path):
    assert nursery.run('save.half@3=kill', tmp_path) == -signal.SIGKILL
    assert '.checkpoint-00000003.pth.tar.tmp' in names(tmp_path)
    CheckpointWriter(tmp_path, keep=2)
    assert not [name for name in names(tmp_path) if name.endswith('.tmp')]


def test_points_are_passed_in_their_order(fault, monkeypatch, tmp_path):
    passed = []
    monkeypatch.setattr(checkpoint_files, 'fault_point', passed.append)
    for step in (1, 2, 3):
        passed.clear()
        save_checkpoint(state_at(step), tmp_path, global_step=step, keep=2, is_best=is_best(step))
    assert passed == list(SAVE_POINTS)


# --- Damage ----------------------------------------------------------------------------------------------------------

def tiny_state(*, classes=('a', 'b', 'c'), img_size=32, processes=1, options=None, arch='t2t_vit_7',
               **kwargs) -> TrainState:
    """A run's state with a T2T-ViT, its average and AdamW."""
    model = create_model(arch, img_size=img_size, num_classes=len(classes),
                         **{'embed_dim': 32, 'depth': 2, 'num_heads': 2, **kwargs})
    cpu = torch.device('cpu')
    return TrainState(arch=arch, model=model, optimizer=torch.optim.AdamW(model.parameters()),
                      ema=ModelEmaV3(model, decay=0.9), scaler=Precision(cpu, enabled=False).scaler,
                      options={'opt': 'adamw', 'batch_size': 16, 'accum_steps': 1, **(options or {})},
                      classes=list(classes), world=World(rank=0, local_rank=0, size=processes, device=cpu))


@pytest.fixture(scope='module')
def real(tmp_path_factory) -> Path:
    """A folder with two checkpoints of a real run's state, of steps 1 and 2 of its first epoch."""
    folder = tmp_path_factory.mktemp('real')
    state = tiny_state()
    for step in (1, 2):
        state.model(torch.randn(2, 3, 32, 32)).square().sum().backward()
        state.optimizer.step()
        state.step = state.global_step = step
        save_checkpoint(state.state_dict(), folder, global_step=step, keep=2, is_best=False)
    return folder


def test_torch_and_zip_read_a_file_with_a_checksum_as_one_without(real, tmp_path):
    path = real / LAST
    content = path.read_bytes()
    assert content[-SEAL_LENGTH - 2:] == (SEAL_LENGTH.to_bytes(2, 'little') + SEAL
                                          + hashlib.sha256(content[:-SEAL_LENGTH - 2]).hexdigest().encode())
    (tmp_path / 'without').write_bytes(content[:-SEAL_LENGTH - 2] + b'\0\0')
    without = torch.load(tmp_path / 'without')
    for options in ({}, {'mmap': True}, {'weights_only': False}):
        assert_same(torch.load(path, **options), without)
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None and archive.comment == content[-SEAL_LENGTH:]
    for copy_of in ('copy', 'link'):
        (shutil.copyfile if copy_of == 'copy' else os.link)(path, tmp_path / copy_of)
        verify_checksum(tmp_path / copy_of)
        assert_same(read_checkpoint(tmp_path / copy_of, verified=True), without)


def test_torch_does_not_notice_a_changed_bit_and_we_do(real, tmp_path):
    content = bytearray((real / LAST).read_bytes())
    weight = torch.load(real / LAST)['state_dict']['head.weight']
    content[content.index(weight.numpy().tobytes()) + 2] ^= 64
    path = tmp_path / LAST
    path.write_bytes(content)
    assert not torch.equal(torch.load(path)['state_dict']['head.weight'], weight)
    with pytest.raises(UserError, match='last.pth.tar is damaged: its content does not fit its checksum; copy it'):
        read_checkpoint(path)


def damages(size: int, seed: int) -> list:
    """200 ways to damage a file, (what, offset, bit): half flips, half cuts, a quarter of each near an end."""
    rng = random.Random(seed)
    anywhere = [rng.randrange(size) for _ in range(150)]
    ends = [rng.choice((rng.randrange(200), size - 1 - rng.randrange(200))) for _ in range(50)]
    return [('flip' if i % 2 else 'cut', offset, rng.randrange(8)) for i, offset in enumerate(anywhere + ends)]


def test_two_hundred_damaged_files_are_detected_on_resume(real, tmp_path, caplog, record_property):
    older, newest = (tmp_path / f'checkpoint-0000000{step}.pth.tar' for step in (1, 2))
    shutil.copyfile(real / older.name, older)
    whole = (real / newest.name).read_bytes()
    content = read_checkpoint(real / newest.name)
    print('seed 3')
    ways = damages(len(whole), seed=3)
    for what, offset, bit in ways:
        data = bytearray(whole[:offset] if what == 'cut' else whole)
        if what == 'flip':
            data[offset] ^= 1 << bit
        newest.unlink(missing_ok=True)
        newest.write_bytes(data)
        (tmp_path / LAST).unlink(missing_ok=True)
        os.link(newest, tmp_path / LAST)
        caplog.clear()
        assert find_checkpoint(tmp_path) == older, (what, offset, bit)
        assert f'going back from {newest.name} to {older}' in caplog.text, (what, offset, bit)
        with pytest.raises(UserError):
            read_checkpoint(newest, verified=True)
        # A command that takes files from elsewhere reads one without a checksum, but never other weights.
        try:
            assert_same(read_checkpoint(newest), content)
        except UserError:
            pass
    record_property('damaged files', len(ways))


def test_every_flip_of_the_last_bytes_is_detected(tmp_path):
    path = tmp_path / LAST
    write_checkpoint({'global_step': 1}, path)
    whole = path.read_bytes()
    for offset in range(len(whole) - SEAL_LENGTH - 30, len(whole)):
        for bit in range(8):
            data = bytearray(whole)
            data[offset] ^= 1 << bit
            path.write_bytes(data)
            with pytest.raises(UserError, match='does not fit its checksum'):
                verify_checksum(path)


def damage(path: Path) -> None:
    """Changes a byte in the middle of a file, under all its names."""
    with open(path, 'r+b') as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))


@pytest.fixture
def runs(tmp_path) -> Path:
    """output/train/run with the checkpoints of steps 10 to 40, 20 the best."""
    folder = tmp_path / 'output/train/run'
    folder.mkdir(parents=True)
    for step in (10, 20, 30, 40):
        save_checkpoint(state_at(step), folder, global_step=step, keep=9, is_best=step == 20)
    return folder


def resolve(folder: Path, resume='auto', experiment='run', **changes):
    place = {'output': str(folder.parents[1]), 'kind': 'train', 'name': 't2t_vit_7-32'}
    return resolve_run(**{**place, 'experiment': experiment, 'resume': str(resume), **changes})


def at(folder: Path, step: int) -> Path:
    return folder / f'checkpoint-{step:08d}.pth.tar'


@pytest.mark.parametrize('resume', ['auto', 'folder', 'last'])
def test_resume_goes_back_to_the_newest_whole_one_and_says_so(runs, resume, caplog):
    asked = {'auto': 'auto', 'folder': runs, 'last': runs / LAST}[resume]
    assert resolve(runs, asked) == (runs, at(runs, 40))
    damage(at(runs, 40))
    at(runs, 30).write_bytes(b'')
    assert resolve(runs, asked) == (runs, at(runs, 20))
    assert f'{at(runs, 40)} is damaged' in caplog.text and f'{at(runs, 30)} is empty' in caplog.text
    assert caplog.text.count(f'to {at(runs, 20)}') == 2
    damage(at(runs, 20))
    assert resolve(runs, asked) == (runs, at(runs, 10))
    damage(at(runs, 10))
    with pytest.raises(UserError, match='none of its checkpoints is whole.*start a new run'):
        resolve(runs, asked)


def test_a_file_asked_for_is_that_file_or_an_error_that_names_another(runs):
    assert resolve(runs, at(runs, 20)) == (runs, at(runs, 20))
    assert resolve(runs, runs / BEST) == (runs, runs / BEST)
    damage(at(runs, 20))
    with pytest.raises(UserError, match=f'00020.pth.tar is damaged.*whole one beside it is {at(runs, 40)}'):
        resolve(runs, at(runs, 20))
    torch.save(state_at(30), at(runs, 30))
    with pytest.raises(UserError, match='has no checksum.*--initial-checkpoint'):
        resolve(runs, at(runs, 30))
    with pytest.raises(UserError, match='no such checkpoint'):
        resolve(runs, at(runs, 50))


def test_the_newest_is_found_when_the_link_to_it_is_missing_old_or_alone(runs, tmp_path):
    (runs / LAST).unlink()
    assert check_resume(runs) == check_resume(runs / LAST) == runs
    with pytest.raises(UserError, match='no such checkpoint'):
        check_resume(tmp_path)
    assert resolve(runs) == resolve(runs, runs / LAST) == resolve(runs, runs) == (runs, at(runs, 40))
    with pytest.raises(UserError, match='that run exists'):
        resolve(runs, '')
    os.link(at(runs, 20), runs / LAST)
    assert find_checkpoint(runs) == at(runs, 40)
    write_checkpoint(state_at(50), runs / LAST)  # newer than those with a number
    assert find_checkpoint(runs) == runs / LAST
    write_checkpoint(state_at(35), runs / LAST)
    assert find_checkpoint(runs) == at(runs, 40)
    damage(at(runs, 40))
    assert find_checkpoint(runs) == runs / LAST
    for path in numbered(runs):
        path.unlink()
    assert find_checkpoint(runs) == runs / LAST
    damage(runs / LAST)
    assert find_checkpoint(runs) == runs / BEST
    assert find_checkpoint(tmp_path) is None


def test_processes_started_again_go_on_in_their_own_folder(runs, monkeypatch, tmp_path):
    monkeypatch.setenv('T2T_STARTED', '20260101-120000')
    new = runs.parent / '20260101-120000-t2t_vit_7-32'
    assert resolve(runs, '', '') == (new, None)
    assert resolve(runs, '', '', restarted=True) == (new, None)  # nothing was saved before the crash
    assert resolve(runs, at(runs, 20), 'other', restarted=True) == (runs.parent / 'other', at(runs, 20))
    for folder in (new, runs.parent / 'other'):
        folder.mkdir()
        save_checkpoint(state_at(60), folder, global_step=60, keep=2, is_best=False)
    assert resolve(runs, '', '', restarted=True) == (new, at(new, 60))
    assert resolve(runs, '', restarted=True) == (runs, at(runs, 40))
    other = runs.parent / 'other'
    assert resolve(runs, at(runs, 20), 'other', restarted=True) == (other, at(other, 60))
    at(runs, 10).unlink()
    assert resolve(runs, at(runs, 10), '', restarted=True) == (runs, at(runs, 40)), 'the run removed its start'


def test_a_run_that_went_back_never_goes_on_from_what_it_left(runs, caplog):
    writer = CheckpointWriter(runs, keep=2, resumed=at(runs, 20))
    assert find_checkpoint(runs) == at(runs, 20)
    assert names(runs) == {at(runs, 10).name, at(runs, 20).name, f'{at(runs, 30).name}.aside',
                           f'{at(runs, 40).name}.aside', LAST, BEST}
    assert f'{at(runs, 40)} is of a later step than 20' in caplog.text
    assert read_checkpoint(runs / LAST)['global_step'] == 20
    for step in (25, 28):
        writer.save(state_at(step), step)
        writer.wait()
        assert find_checkpoint(runs) == at(runs, step)
    assert names(runs) == {at(runs, 25).name, at(runs, 28).name, LAST, BEST}, 'two new ones take the place of the old'


def test_the_best_is_kept_apart(tmp_path):
    for step in range(1, 8):
        save_checkpoint(state_at(step), tmp_path, global_step=step, keep=1, is_best=step == 2)
    assert names(tmp_path) == {at(tmp_path, 6).name, at(tmp_path, 7).name, LAST, BEST}, 'two are kept, asked for or not'
    assert_same(read_checkpoint(tmp_path / BEST, verified=True), state_at(2))


@pytest.mark.parametrize('links', [True, False])
def test_a_file_system_without_hard_links(tmp_path, monkeypatch, links):
    if not links:
        monkeypatch.setattr(os, 'link', lambda *_: (_ for _ in ()).throw(OSError(1, 'Operation not permitted')))
    save_checkpoint(state_at(3), tmp_path, global_step=3, keep=2, is_best=True)
    for name in (LAST, BEST):
        assert (tmp_path / name).samefile(at(tmp_path, 3)) == links
        assert_same(read_checkpoint(tmp_path / name, verified=True), state_at(3))
    assert find_checkpoint(tmp_path).name in (at(tmp_path, 3).name, LAST)


# --- A checkpoint of another run --------------------------------------------------------------------------------------

@pytest.mark.parametrize(('other', 'said'), [
    ({'arch': 't2t_vit_10'}, 'a checkpoint of t2t_vit_7, and this run is of t2t_vit_10; say --model t2t_vit_7'),
    ({'classes': 'ab'}, r'trained on 3 classes \(a, b, c\), this data set has 2 classes \(a, b\)'),
    ({'classes': 'abd'}, r'trained on 3 classes \(a, b, c\), this data set has 3 classes \(a, b, d\)'),
    ({'img_size': 64}, r'pos_embed \(1, 5, 32\) in the file, \(1, 17, 32\) here; .*--img-size'),
    ({'embed_dim': 64}, r'cls_token \(1, 1, 32\) in the file, \(1, 1, 64\) here'),
    ({'depth': 3}, 'blocks.2.norm1.weight only here'),
    ({'in_chans': 1}, r'\(192, 147\) in the file, \(192, 49\) here'),
    ({'processes': 2}, 'middle of an epoch of 16 images a step, this run has 32 .*on 2 process.*-b 8'),
    ({'processes': 3}, '3 processes cannot share 16; start 1, 2, 4, 8, 16 of them'),
    ({'options': {'batch_size': 8}}, 'middle of an epoch of 16 images a step, this run has 8'),
    ({'options': {'opt': 'sgd'}}, "optimizer is adamw, this run's is sgd; say --opt adamw, or --no-resume-opt"),
])
def test_a_checkpoint_of_another_run_is_refused_by_name_and_changes_nothing(real, other, said):
    state = tiny_state(**other)
    before = {key: tensor.clone() for key, tensor in state.model.state_dict().items()}
    with pytest.raises(UserError, match=f'^{real / LAST}: .*{said}') as caught:
        state.load_state_dict(read_checkpoint(real / LAST, verified=True), source=real / LAST)
    assert '\n' not in str(caught.value)
    assert_same(dict(state.model.state_dict()), before)
    assert state.global_step == 0


# --- In the background -----------------------------------------------------------------------------------------------

def overwrite(content, value: float) -> None:
    if isinstance(content, torch.Tensor):
        content.fill_(value)
    for part in content.values() if isinstance(content, dict) else content if isinstance(content, list) else ():
        overwrite(part, value)


def test_a_save_never_mixes_two_steps(tmp_path, monkeypatch):
    """What training changes while the thread is held up is not in the file; nor in the next, from the same memory."""
    may_write, save = threading.Event(), torch.save

    def slow_save(*args, **kwargs):
        assert may_write.wait(30)
        save(*args, **kwargs)

    monkeypatch.setattr(torch, 'save', slow_save)
    writer, live = CheckpointWriter(tmp_path, keep=9), state_at(1)
    for step in (1, 2, 3):
        for part in ('state_dict', 'state_dict_ema'):
            for key, tensor in state_at(step)[part].items():
                live[part][key].copy_(tensor)
        live['optimizer'], live['ranks'], live['args'] = (state_at(step)[k] for k in ('optimizer', 'ranks', 'args'))
        live['global_step'] = step
        may_write.clear()
        writer.save(live, step)
        assert not at(tmp_path, step).exists()
        overwrite(live, -7)
        live['args']['seed'] = live['optimizer']['param_groups'][0]['lr'] = -7
        may_write.set()
        writer.wait()
    for step in (1, 2, 3):
        assert_same(read_checkpoint(at(tmp_path, step), verified=True), state_at(step))


def test_the_copy_in_memory_is_the_same_memory_and_the_same_content(tmp_path):
    snapshot = _Snapshot()
    tensor = torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last)
    model = torch.nn.BatchNorm2d(3)
    content = {'a': tensor, 'tied': tensor, 'part': tensor[:2], 'empty': torch.ones(0, 3), 'model': model.state_dict(),
               'options': Namespace(lr=1.)}
    one = snapshot.take(content)
    assert_same(one, content)
    assert one['a'] is one['tied'] and one['a'].is_contiguous(memory_format=torch.channels_last)
    assert one['model']._metadata == content['model']._metadata
    content['options'].lr = 2.
    assert one['options'].lr == 1.
    before = one['a'].data_ptr()
    tensor.zero_()
    two = snapshot.take({**content, 'a': tensor, 'part': torch.ones(7)})
    assert two['a'].data_ptr() == before and not two['a'].any() and two['part'].shape == (7,)


def test_an_error_of_the_program_is_not_a_full_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, 'save', lambda *_: 1 / 0)
    writer = CheckpointWriter(tmp_path, keep=2)
    writer.save(state_at(1), 1)
    with pytest.raises(ZeroDivisionError):
        writer.save(state_at(2), 2)
    writer.close()


# --- Full disk -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('point', SAVE_POINTS)
def test_a_full_disk_at_every_point(point, fault, tmp_path, caplog):
    writer = CheckpointWriter(tmp_path, keep=2)
    for step in (1, 2):
        writer.save(state_at(step), step)
    writer.wait()
    fault(f'{point}=full')
    writer.save(state_at(3), 3, is_best=True)
    writer.wait()
    warning = f'{at(tmp_path, 3)} could not be saved (No space left on device); training goes on'
    assert warning in caplog.text and caplog.records[-1].levelno == logging.WARNING
    assert not [name for name in names(tmp_path) if name.endswith('.tmp')]
    assert_survived(tmp_path, 2) if (tmp_path / BEST).exists() else verify_checksum(at(tmp_path, 2))
    writer.save(state_at(4), 4)
    writer.close()
    assert_survived(tmp_path, 4)  # the best, which was not saved before, among them
    assert names(tmp_path) == {at(tmp_path, 3).name, at(tmp_path, 4).name, LAST, BEST}


def test_a_full_disk_at_the_end_is_an_error_after_a_second_attempt(fault, tmp_path):
    writer = CheckpointWriter(tmp_path, keep=2)
    writer.save(state_at(1), 1, must_succeed=True)
    fault('save.half=full')
    writer.save(state_at(2), 2)
    writer.close()  # there is room again
    assert_survived(tmp_path, 2)
    fault('save.half@1=full,save.half@2=full')
    with pytest.raises(UserError, match=r'00003.pth.tar could not be saved \(No space left on device\); make room'):
        writer.save(state_at(3), 3, must_succeed=True)
    assert find_checkpoint(tmp_path) == at(tmp_path, 2)


def test_a_limit_of_the_file_size_as_torch_meets_it(nursery, tmp_path):
    """The same as a full disk, but from the system: torch reports a RuntimeError that names no file."""
    run_until_killed(tmp_path, 2)
    before = names(tmp_path)
    size = at(tmp_path, 2).stat().st_size
    for limit in (1, 1000, size // 2, size - 80, size - 10):
        assert nursery.run('', tmp_path, saves=1, limit=limit) == 1
        assert names(tmp_path) == before
        verify_checksum(at(tmp_path, 2))
        reason = f'{at(tmp_path, 3)} could not be saved (File too large); '
        assert f'{reason}training goes on' in nursery.said and f'{reason}make room' in nursery.said
    assert nursery.run('', tmp_path, saves=1, limit=size + 500) == 0
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY


# --- One run, one folder ---------------------------------------------------------------------------------------------

HOLDER = f"""
import os, sys, time
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from engine.run_folder import RunLock
RunLock(Path(sys.argv[1]))
if os.fork() == 0:  # a loader process, which outlives the run for a while
    time.sleep(20)
print('held', flush=True)
time.sleep(20)
"""


def test_a_second_run_in_one_folder_is_refused_until_the_first_is_dead(tmp_path):
    process = subprocess.Popen([sys.executable, '-c', HOLDER, tmp_path / 'run'], stdout=subprocess.PIPE, text=True,
                               start_new_session=True)
    try:
        assert process.stdout.readline() == 'held\n'
        with pytest.raises(UserError, match=f'another run writes here .*host .*, process {process.pid}.*--experiment'):
            RunLock(tmp_path / 'run')
        process.kill()
        process.wait()
        RunLock(tmp_path / 'run').release()
        assert f'process {os.getpid()}\n' in (tmp_path / 'run/.lock').read_text()
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # the group is still there: its loader process is


def test_a_file_system_without_locks_is_a_warning(tmp_path, monkeypatch, caplog):
    def refuse(*_):
        raise OSError(95, 'Operation not supported')

    monkeypatch.setattr(run_folder.fcntl, 'flock', refuse)
    RunLock(tmp_path).release()
    assert 'cannot be locked (Operation not supported)' in caplog.text
