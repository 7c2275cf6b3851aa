"""tools/doctor: planted faults are named with a remedy, a sound data set has none, and the data stays as it is."""
import dataclasses
import json
import logging
import math
import os
import re
import shutil
import types
from unittest.mock import create_autospec

import numpy as np
import pytest
import torch
from PIL import Image

from data.base import ImageDataset
from data.pipeline import open_training_data
from engine.optimizer import param_groups
from options.parser import parse_options
from options.scripts import doctor_parser
from tests.conftest import ROOT, run_script, succeeded, warm, write_images
from tools.doctor import (
    __main__ as doctor,
    data as doctor_data,
    disk as doctor_disk,
    findings as doctor_findings,
    images as doctor_images,
    memory as doctor_memory,
    processes as doctor_processes,
    recipe as doctor_recipe,
    schedule as doctor_schedule,
    speed as doctor_speed,
)
from tools.doctor.case import Case, Loading, Rates, Schedule, Splits, Steps
from tools.doctor.findings import FAIL, LOOK, OK, STOP, Finding, Section
from utils.console import ROOMS
from utils.distributed import World
from utils.errors import UserError
from utils.runtime import Precision

SMALL = ('--model', 't2t_vit_7', '--img-size', '32', '--model-kwargs', 'embed_dim=32', 'depth=2', 'num_heads=2',
         'token_dim=16', '-b', '8', '-j', '1', '--device', 'cpu', '--epochs', '3', '--warmup-epochs', '1')


def case_of(*words, processes=1, samples=1000, device='cpu') -> Case:
    parser = doctor_parser()
    args = parse_options(parser, [*map(str, words), *SMALL])
    cpu = torch.device('cpu')
    return Case(args, World(0, 0, 1, torch.device(device)), Precision(cpu, enabled=False), processes, 2, samples, 0.2)


def look_at_data(case: Case) -> list[Finding]:
    return list(doctor_data.look_at_data(case, doctor_data.open_splits(case)))


def look_at_images(case: Case) -> list[Finding]:
    return list(doctor_images.look_at_images(case, doctor_data.open_splits(case)))


def examine(section: Section, *known) -> list[Finding]:
    """The findings of a section that knows of these, where 'Images per second' measures the rest."""
    rates = Section('Images per second', doctor_speed.look_at_rates)
    return doctor_findings.examine(section, {type(value): value for value in known}, [rates, section])


def plant_faults(root) -> None:
    """The five: a cut JPEG; a class that val lacks; an empty class, nearly of another's name; 16 bits, CMYK and a text
    file; and an image of train that is in val as well."""
    cut = root / 'train/ant/ant_3.jpg'
    cut.write_bytes(cut.read_bytes()[:400])
    shutil.rmtree(root / 'val/bee')
    (root / 'train/cat_old').mkdir()
    Image.fromarray(np.linspace(0, 65535, 1600).reshape(40, 40).astype(np.uint16)).save(root / 'train/cat/deep.png')
    Image.new('CMYK', (40, 40), (0, 90, 9, 0)).save(root / 'train/cat/print.jpg')
    (root / 'train/bee/notes.txt').write_text('bees')
    shutil.copy(root / 'train/cat/cat_1.jpg', root / 'val/cat/again.jpg')


def content(root) -> dict:
    return {path.relative_to(root): (path.stat().st_mtime_ns, path.is_file() and path.read_bytes())
            for path in (root, *root.rglob('*'))}


@pytest.fixture(scope='module')
def ill(tmp_path_factory):
    """What the doctor says of a data set with five faults: exit code, page, record, and findings by their titles."""
    folder = tmp_path_factory.mktemp('ill')
    plant_faults(write_images(folder / 'd', {'train': 12, 'val': 5}))
    before = content(folder / 'd')
    ended = run_script('tools/doctor', 'd', *SMALL, '--quick', '--processes', 1, '--price', 3600, '--results-file',
                       'found', cwd=folder)
    assert content(folder / 'd') == before, 'something was written into the data'
    assert sorted(path.name for path in folder.iterdir()) == ['d', 'found.csv', 'found.json'], ended.stderr
    record = json.loads((folder / 'found.json').read_text())
    return types.SimpleNamespace(code=ended.returncode, page=ended.stdout, errors=ended.stderr, record=record,
                                 found={finding['title']: finding for finding in record['findings']})


@pytest.mark.parametrize(('title', 'mark', 'path', 'remedy'), [
    ('Decoding train', STOP, 'd/train/ant/ant_3.jpg: cannot be decoded', '--max-bad-images 1'),
    ('Class map', STOP, 'd/val/bee', 'Put these folders'),
    ('Empty folders', LOOK, 'd/train/cat_old', 'Fill or remove'),
    ('Near-equal names', LOOK, 'd/train/cat and d/train/cat_old', 'one folder'),
    ('16 bits', LOOK, 'd/train/cat/deep.png', 'Convert'),
    ('Other colours', LOOK, 'd/train/cat/print.jpg', 'Convert'),
    ('Stray files', LOOK, 'd/train/bee/notes.txt', 'Remove'),
    ('Duplicates', LOOK, 'd/train/cat/cat_1.jpg = d/val/cat/again.jpg', 'Take them out'),
])
def test_planted_fault_is_named_with_its_path_and_a_remedy(ill, title, mark, path, remedy):
    finding = ill.found[title]
    assert finding['mark'] == mark and remedy in finding['remedy']
    assert any(path in detail for detail in finding['details'])
    words = ' '.join(ill.page.split())
    assert f'{mark} {title}' in words and path in words and remedy in words


def test_page_sums_up_and_fits(ill):
    assert ill.code == 1, ill.errors
    lines = ill.page.rstrip().splitlines()
    assert max(map(len, lines)) <= 100
    assert [int(number) for number in re.findall(r'^(\d)  \w', ill.page, re.M)] == list(range(1, 9))
    summary = ill.record['summary']
    assert list(summary) == ['Will it run?', 'What starves?', 'Mend first']
    assert all(any(line.startswith(name) for line in lines[-8:]) for name in summary)
    assert summary['Will it run?'].startswith('No: class map, decoding train;')
    assert 'images' in summary['What starves?'] and summary['Mend first'].startswith('Class map: Put')


def test_all_that_a_run_needs_is_measured(ill):
    marks = {title: finding['mark'] for title, finding in ill.found.items()}
    for title in ('Loader', 'Step', 'Memory', 'Whole schedule', 'Checkpoints', 'File system', 'Processes'):
        assert marks[title] == OK, ill.found[title]
    images = 8 * 3 * 32 * 32  # those of a batch, in uint8; four for each loader's worker
    assert ill.found['Waiting batches']['numbers']['bytes'] == 2 * 4 * images
    step, schedule = ill.found['Step']['numbers'], ill.found['Whole schedule']['numbers']
    assert step['images_per_second'] == pytest.approx(8 / step['seconds'])
    assert ill.found['Who waits']['numbers']['needed'] == step['images_per_second']
    assert schedule['epochs'] == 3 and schedule['steps_per_epoch'] == 38 // 8
    assert '3 epochs of 4 steps:' in ' '.join(ill.page.split())
    # A GPU for an hour costs as much as there are seconds in it.
    assert schedule['money'] == pytest.approx(schedule['seconds']) and f'{schedule["money"]:,.2f}' in ill.page


def test_sound_data_set_has_neither_stop_nor_look(image_folder):
    case = case_of(image_folder)
    findings = [*look_at_data(case), *look_at_images(case)]
    assert {finding.mark for finding in findings} == {OK}
    found = {finding.title: finding for finding in findings}
    assert found['Images'].numbers == {'train': 36, 'val': 15, 'classes': 3}
    assert found['Decoding train'].numbers == {'looked_at': 36, 'bad': 0, 'bad_at_most': 0, 'tolerated': 0}
    assert found['Duplicates'].numbers == {'train': 36, 'val': 15, 'duplicates': 0}
    assert found['Kinds'].numbers == {'JPEG RGB': 51} and found['Sizes'].numbers['median'] == (36, 40)


def test_shards(image_folder, tmp_path):
    succeeded(run_script('tools/pack.py', image_folder, tmp_path / 'shards', cwd=tmp_path))
    for address in (tmp_path / 'shards', f'wds:{tmp_path}/shards'):
        case = case_of(address)
        findings = [*look_at_data(case), *look_at_images(case)]
        assert {finding.mark for finding in findings} == {OK}
        assert findings[0].numbers == {'train': 36, 'val': 15, 'classes': 3}


def test_other_layouts_of_val(tmp_path):
    root = write_images(tmp_path / 'd', {'train': 2, 'val': 2})
    (root / 'val/bee').rename(root / 'val/be')
    found = [finding for finding in look_at_data(case_of(root)) if finding.mark == STOP]
    assert [finding.details for finding in found] == [[str(root / 'val/bee')], [str(root / 'val/be')]]
    for image in sorted((root / 'val').rglob('*.jpg')):
        image.rename(root / 'val' / image.name)
    for folder in (root / 'val').iterdir():
        if folder.is_dir():
            folder.rmdir()
    case = case_of(root)
    found, = (finding for finding in look_at_data(case) if finding.mark == STOP)
    assert '6 images and no class folders' in found.figure and 'CLASS' in found.remedy
    assert len(doctor_data.open_splits(case).val) == 6  # and they are decoded all the same
    with pytest.raises(UserError, match='does not exist'):
        look_at_data(case_of(tmp_path / 'nowhere'))


@pytest.mark.parametrize(('names', 'pairs'), [
    (['n01440764', 'n01440764_old', 'n01440765'], [('n01440764', 'n01440764_old')]),
    (['cat', 'Cat', 'dog (1)', 'dog'], [('Cat', 'cat'), ('dog', 'dog (1)')]),
    (['new york', 'new_york'], [('new york', 'new_york')]),
    (['tiger', 'tiger shark', 'tiger_cat', 'boeing 737', 'boeing 747', 'crane', 'crane2', 'old'], []),
])
def test_names_that_are_nearly_equal(names, pairs):
    found = list(doctor_data.near_names([], names))
    assert [finding.numbers['pairs'] for finding in found] == ([pairs] if pairs else [])


def test_imagenet_is_counted(monkeypatch):
    from timm.data import ImageNetInfo
    synsets = ImageNetInfo().label_names()

    def look(train, val, classes):
        splits = Splits(range(train), range(val))
        return [(finding.mark, finding.figure) for finding in doctor_data.known_numbers(splits, classes)]

    assert look(1_281_167, 50_000, synsets)[0][0] == OK
    (mark, figure), = look(1_281_160, 50_000, synsets[:-1])
    assert mark == LOOK and '1 of 1,000 classes, 7 of 1,281,167 images in train' in figure and 'val' not in figure
    assert look(5000, 500, synsets[:100]) == []  # a part that somebody has chosen


def test_bound_of_bad_images():
    assert doctor_images.upper_bound(0, 1000) == pytest.approx(1 - 0.05 ** (1 / 1000))
    for bad, seen in ((1, 20), (7, 300)):
        share = doctor_images.upper_bound(bad, seen)
        rare = sum(math.comb(seen, k) * share**k * (1 - share)**(seen - k) for k in range(bad + 1))
        assert rare == pytest.approx(0.05, rel=1e-6)
    assert doctor_images.upper_bound(3, 3) == 1


def test_what_is_tolerated_is_no_stop():
    seen = [doctor_images.Seen(f'{k}.jpg', 1, b'', 'JPEG', 'RGB', (9, 9), (), 'cut' * (k == 3)) for k in range(10)]
    marks = {tolerated: doctor_images.bad_images('train', seen, 10, tolerated).mark for tolerated in (0, 1)}
    assert marks == {0: STOP, 1: LOOK}
    sampled = doctor_images.bad_images('val', seen, 1000, 1)
    assert sampled.mark == LOOK and sampled.details == ['3.jpg: cut']
    assert doctor_images.bad_images('val', seen, 12, 1).numbers['bad_at_most'] == 3  # no more than are left
    # 39 % of 1000: what 10 images, of which one is bad, do not rule out.
    assert sampled.numbers['bad_at_most'] == 395 and '--max-bad-val-images 395' in sampled.remedy


class Fetched(ImageDataset):
    """Ten shards of ten images that lie elsewhere."""

    def __init__(self):
        super().__init__(['a', 'b'], np.arange(100) % 2)

    def shard_offsets(self):
        return np.arange(0, 101, 10)

    def read_bytes_or_image(self, index):
        raise AssertionError('nothing is to be read')

    def path(self, index):
        return str(index)


def test_a_data_set_is_not_sent_to_those_who_read_it(image_folder, monkeypatch):
    """Of ImageNet that took longer than to decode a thousand images."""
    def refuse(self):
        raise AssertionError('this takes seconds')

    splits = doctor_data.open_splits(case_of(image_folder))
    monkeypatch.setattr(ImageDataset, '__reduce__', refuse)
    counted = types.SimpleNamespace(update=lambda: None)
    paths = [{seen.path for seen in doctor_images.read_sample(splits.train, 20, workers, counted)}
             for workers in (0, 2)]
    assert paths[0] == paths[1] and len(paths[0]) == 20


def test_few_shards_are_fetched_for_a_sample():
    sample = doctor_images.sample_of(Fetched(), 20)
    assert len(sample) == 20
    assert len({int(sample.path(k)) // 10 for k in range(20)}) == doctor_images.SHARDS_FETCHED


def test_exif_and_frames_are_noticed(tmp_path):
    exif = Image.Exif()
    exif[doctor_images.ORIENTATION] = 6
    Image.new('RGB', (8, 8)).save(tmp_path / 'a.jpg', exif=exif)
    Image.new('L', (8, 8)).save(tmp_path / 'a.gif', save_all=True, append_images=[Image.new('L', (8, 8), 255)])
    Image.new('RGBA', (8, 8)).save(tmp_path / 'a.png')
    notes = {name: doctor_images.look_closely((tmp_path / name).read_bytes(), name).notes
             for name in ('a.jpg', 'a.gif', 'a.png')}
    assert notes == {'a.jpg': (doctor_images.TURNED,), 'a.gif': (doctor_images.ANIMATED,),
                     'a.png': (doctor_images.TRANSPARENT,)}


@pytest.fixture(scope='module')
def prepared(image_folder):
    """A run with its model and batches, whose optimizer has taken steps."""
    case = case_of(image_folder)
    splits = Splits(*open_training_data(case.args, case.world))
    setup = doctor_speed.prepare(case, splits)
    loading = Loading(next(iter(setup.input.train_loader)), 1.0, 1.0, 1.0)
    steps = doctor_speed.measure_steps(case, setup, loading)
    setup.input.train_loader.close()
    return types.SimpleNamespace(case=case, splits=splits, setup=setup, loading=loading, steps=steps)


def test_a_step_of_all_processes_is_refused_with_a_batch_that_fits(image_folder):
    """36 images make a step of 8 in one process, and in eight of at most 4."""
    case = case_of(image_folder, processes=8)
    with pytest.raises(UserError) as caught:
        doctor_speed.prepare(case, Splits(*open_training_data(case.args, case.world)))
    assert '8 (batch size) × 8 (processes)' in str(caught.value)
    assert str(caught.value).endswith('use a batch size of at most 4')


@pytest.fixture
def gpu(monkeypatch):
    """torch.cuda as it answers where there is one GPU; only names and arguments that it really has are accepted.

    Tensors stay on the CPU: a case is told of the GPU when its model is there.
    """
    answers = {'device_count': 1, 'set_device': None, 'get_device_name': 'NVIDIA H200', 'empty_cache': None,
               'get_device_properties': types.SimpleNamespace(total_memory=80 << 30), 'is_bf16_supported': True,
               'reset_peak_memory_stats': None, 'max_memory_allocated': 4 << 30}
    for name, answer in answers.items():
        real = getattr(torch.cuda, name)
        monkeypatch.setattr(torch.cuda, name, create_autospec(real, return_value=answer))
    return torch.cuda


def on_gpus(case: Case, *, processes: int = 1, **changes) -> Case:
    return dataclasses.replace(case, world=World(0, 0, 1, torch.device('cuda')), processes=processes, **changes)


def test_processes_of_the_run_are_the_gpus(gpu, image_folder, monkeypatch, tmp_path):
    class Opened(Exception):
        pass

    def note(case):
        raise Opened(case.world.device.type, case.processes, case.together)

    levels = {room: logging.getLogger(room).level for room in (*ROOMS, 'py.warnings')}
    gpu.device_count.return_value = 4
    monkeypatch.setattr(doctor_data, 'open_splits', note)
    monkeypatch.setattr('utils.runtime.setup_logging', lambda **_: None)
    monkeypatch.setattr('sys.argv', ['doctor.py', str(image_folder), *SMALL, '--device', 'cuda'])
    monkeypatch.chdir(tmp_path)
    try:
        with pytest.raises(Opened) as caught:
            doctor.main()
    finally:
        for room, level in levels.items():
            logging.getLogger(room).setLevel(level)
    assert caught.value.args == ('cuda', 4, 4)


def test_steps_on_a_gpu_are_halved_until_they_fit(gpu, prepared):
    def fill(model, inputs):
        if len(inputs[0]) > 4:
            raise torch.OutOfMemoryError

    case, setup, loading = on_gpus(prepared.case), prepared.setup, prepared.loading
    gpu.max_memory_allocated.side_effect = [6 << 30, 4 << 30]  # in steps of 4 and 2 images
    handle = setup.state.model.register_forward_pre_hook(fill)
    try:
        steps = doctor_speed.measure_steps(case, setup, loading)
    finally:
        handle.remove()
    peaks = {size: peak for size, (_, peak) in steps.measured.items()}
    assert steps.too_large == 8 and peaks == {4: 6 << 30, 2: 4 << 30}
    finding = doctor_speed.step_finding(case, steps)
    assert finding.mark == OK and 'on NVIDIA H200' in finding.figure and 'from steps of 4' in finding.figure
    assert steps.rate == pytest.approx(8 / steps.seconds) and steps.forward_rate > 0
    gpu.empty_cache.assert_called_once_with()
    assert gpu.reset_peak_memory_stats.call_count == 3  # of 8, 4 and 2 images
    gpu.max_memory_allocated.assert_called_with(torch.device('cuda'))
    memory, _ = doctor_memory.look_at_memory(case, setup, loading, steps)
    assert (memory.mark, memory.title) == (STOP, 'Memory of the GPU') and '10.0 GiB of 80.0 GiB' in memory.figure
    assert memory.numbers['largest_batch'] == 70  # 2 GiB, and 1 GiB for each image, of nine tenths of 80 GiB


def test_no_step_fits_on_a_gpu(gpu, prepared):
    def fill(model, inputs):
        raise torch.OutOfMemoryError

    handle = prepared.setup.state.model.register_forward_pre_hook(fill)
    try:
        with pytest.raises(UserError, match='not even 2 images fit into the memory of cuda'):
            doctor_speed.measure_steps(on_gpus(prepared.case), prepared.setup, prepared.loading)
    finally:
        handle.remove()


def test_schedule_counts_gpu_hours(prepared, tmp_path):
    args = prepared.case.args.replacing(output=str(tmp_path), batch_size=1, price=2.5, model_ema=True)
    measured = (prepared.splits, prepared.setup,
                dataclasses.replace(prepared.loading, rate=1.0, eval_rate=1.0, supply=9.0),
                dataclasses.replace(prepared.steps, forward_rate=1.0), Rates(0.01, ''))

    def look(args):
        found = doctor_schedule.look_at_schedule(on_gpus(prepared.case, processes=4, args=args), *measured)
        return [item for item in found if isinstance(item, Finding)]

    whole, estimated = look(args)
    # 36 images at 0.01 a second; then 15 to evaluate with, twice for the averaged weights, by four GPUs.
    seconds = whole.numbers['epochs'] * (36 / 0.01 + 2 * 15 / 4)
    assert whole.numbers['seconds'] == pytest.approx(seconds)
    assert whole.numbers['money'] == pytest.approx(2.5 * 4 * seconds / 3600)
    assert f'{4 * seconds / 3600:.1f} GPU-hours; at --price 2.5' in whole.figure
    assert 'as many times as fast' in estimated.figure
    assert 'GPU-hours; --price says what they cost' in look(args.replacing(price=None))[0].figure


def test_gpu_memory_is_given_back_before_other_processes_start(gpu, prepared, monkeypatch):
    def started(count, megabytes, kind):
        gpu.empty_cache.assert_called_once_with()
        return {'seconds': 0.01, 'bytes_per_second': 1e9}, ''

    add_up = create_autospec(doctor_processes.add_up, side_effect=started)
    monkeypatch.setattr(doctor_processes, 'add_up', add_up)
    steps = dataclasses.replace(prepared.steps, seconds=0.1)
    finding, = doctor_processes.look_at_processes(on_gpus(prepared.case), prepared.setup, steps)
    assert finding.mark == OK and '10 % of a step, most of it while the gradient is computed' in finding.figure
    assert add_up.call_args.args == (2, prepared.setup.gradient_bytes / 1e6, 'cuda')


def test_too_small_a_disk(prepared, tmp_path, monkeypatch):
    case = dataclasses.replace(prepared.case, args=prepared.case.args.replacing(output=str(tmp_path / 'out')))
    checks = {}
    saved = doctor_disk.save_once(case, prepared.setup)
    size = saved.bytes
    for free in (3 * size, 7 * size, 9 * size):
        monkeypatch.setattr(doctor_disk.shutil, 'disk_usage', lambda path, free=free: types.SimpleNamespace(free=free))
        checks[free] = next(doctor_disk.look_at_disk(case, prepared.setup, saved))
    assert [finding.mark for finding in checks.values()] == [STOP, LOOK, OK]
    stop = checks[3 * size]
    assert str(tmp_path) in stop.figure and '--output' in stop.remedy and 'Make room for' in stop.remedy
    assert stop.numbers['needed'] == 4 * size  # two, the best, and one that is being written
    assert list(tmp_path.iterdir()) == []  # what was written to try it is gone


def test_disk_that_takes_no_checkpoint(prepared, tmp_path, monkeypatch):
    def full(content, folder, **kwargs):
        assert folder.parent == tmp_path  # on the disk that the run is to write to
        raise OSError(28, 'No space left on device')

    case = dataclasses.replace(prepared.case, args=prepared.case.args.replacing(output=str(tmp_path)))
    monkeypatch.setattr(doctor_disk, 'save_checkpoint', full)
    finding, = doctor_disk.look_at_disk(case, prepared.setup, None)
    assert finding.mark == STOP and f'{tmp_path} (No space left on device)' in finding.figure
    assert list(tmp_path.iterdir()) == []


def test_who_starves(monkeypatch):
    monkeypatch.setattr(doctor_speed.os, 'sched_getaffinity', lambda pid: range(16))
    case, splits = case_of(device='cuda', processes=8), Splits(range(1_280_000))
    steps = Steps({}, None, seconds=1.0, rate=1000.0, forward_rate=1.0)
    rates, finding = doctor_speed.find_who_waits(case, splits, Loading(None, 1.0, 200.0, 3200.0), steps)
    assert finding.mark == LOOK and rates.starving.startswith('The model') and rates.total == 3200
    assert finding.numbers['epoch_seconds'] == 400
    assert '44 cores, with -j 6 for each process' in finding.remedy  # 8 × 1000 × 1.1 / 200
    rates, finding = doctor_speed.find_who_waits(case, splits, Loading(None, 1.0, 562.5, 9000.0), steps)
    assert finding.mark == OK
    assert rates.starving.startswith('Nothing') and rates.total == 8000


def test_lines_through_two_batches():
    assert doctor_speed.interpolate(64, {16: 2.0, 32: 3.0}) == 5.0
    assert doctor_speed.interpolate(32, {16: 2.0, 32: 3.0}) == 3.0
    assert doctor_memory.largest_batch({32: 4 << 30, 64: 6 << 30}, 80 << 30) == 1120  # 2 GiB, and 1/16 of one each
    assert doctor_memory.largest_batch({64: 6 << 30}, 80 << 30) is None


def test_memory_that_does_not_suffice(prepared, monkeypatch):
    steps = dataclasses.replace(prepared.steps, measured={4: (0.1, 6 << 30), 2: (0.1, 4 << 30)})
    case, setup, loading = prepared.case, prepared.setup, prepared.loading
    monkeypatch.setattr(doctor_memory, 'total_memory', lambda device: 9 << 30)
    memory, batches = doctor_memory.look_at_memory(case, setup, loading, steps)
    assert memory.mark == STOP and memory.numbers['largest_batch'] == 6  # 8 would take 10 GiB, and 6 take 8
    assert '-b 6 --global-batch-size 8:' in memory.remedy
    # One worker: two batches that wait, one on its way and one in use, of uint8 pixels.
    assert batches.mark == OK and batches.numbers['bytes'] == 4 * loading.batch[0].nbytes == 4 * 8 * 3 * 32 * 32
    monkeypatch.setattr(doctor_memory, 'total_memory', lambda device: 100)
    assert doctor_memory.shared_memory(case, setup, loading).mark == STOP


def test_processes_that_do_not_come_are_ended(monkeypatch, tmp_path):
    sleeper = tmp_path / 'python'
    sleeper.write_text('#!/bin/sh\necho $$ > "$0.pid"\nexec sleep 60\n')
    sleeper.chmod(0o755)
    monkeypatch.setattr(doctor_processes.sys, 'executable', str(sleeper))
    monkeypatch.setattr(doctor_processes, 'ROUND_TRIP_SECONDS', 1)
    finding, = doctor_processes.look_at_processes(case_of(), None, None)
    assert finding.mark == STOP and 'not done after 1 s' in finding.figure and finding.remedy
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / 'python.pid').read_text()), 0)


def test_round_trip(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor_processes.sys, 'executable', str(warm().python))
    found, problem = doctor_processes.add_up(2, 1.0, 'cpu')
    assert not problem and found['processes'] == 2 and found['bytes'] == 1_000_000
    assert found['bytes_per_second'] == pytest.approx(1e6 / found['seconds'])  # each sends half of it, twice


def test_recipe(gpu):
    def look(*words, device='cpu', steps=0, images=1_281_167):
        case = case_of(*words, device=device, processes=8)
        if case.args.amp:
            precision = types.SimpleNamespace(dtype=getattr(torch, case.args.amp_dtype))
            case = dataclasses.replace(case, precision=precision)
        found = doctor_recipe.look_at_recipe(case, Splits(range(images)), Schedule(steps))
        return {finding.title: finding.remedy for finding in found}

    assert list(look('--lr', '6.25e-5')) == ['Recipe']  # 5e-4 for 512 images: 8 × 8 of them
    assert list(look('--lr', '1.25e-4')) == ['Recipe']  # twice that, as the smallest models had it
    assert '6.3e-05' in look('--lr', '5e-4')['Learning rate']
    assert 'Learning rate' in look('--lr', '1e-5') and 'Learning rate' not in look('--lr', '1e-5', '--pretrained')
    assert list(look('--lr', '5e-4', images=5000)) == list(look('--lr', '5e-4', '--opt', 'sgd')) == ['Recipe']
    right = ('--lr', '6.25e-5')
    published = (*right, '--model-ema-decay', '0.99996')
    assert 'Averaged weights' not in look(*published, steps=310 * 2502)
    assert 'Averaged weights' not in look(*right, steps=1000), 'it warms up'
    assert 'Say --model-ema' in look(*published, '--no-model-ema', steps=1000)['Averaged weights']
    remedy = look(*published, steps=1000)['Averaged weights']
    decay = float(re.search(r'--model-ema-decay (\S+),', remedy)[1])
    assert decay ** 200 == pytest.approx(0.01, rel=0.3)
    assert 'Say --amp' in look(*right, device='cuda')['Precision']
    assert 'bfloat16 needs' in look(*right, '--amp', '--amp-dtype', 'float16', device='cuda')['Precision']
    assert 'Precision' not in look(*right, '--amp', '--amp-dtype', 'bfloat16', device='cuda')
    gpu.is_bf16_supported.return_value = False
    assert 'Leave' in look(*right, '--amp', '--amp-dtype', 'bfloat16', device='cuda')['Precision']
    assert 'Transfer' in look(*right, '--amp', '--amp-dtype', 'float16', '--no-pin-mem', device='cuda')
    assert 'Kernels' in look(*right, '--amp', '--amp-dtype', 'float16', '--deterministic', device='cuda')


def test_check_that_fails_is_a_finding():
    def mistaken():
        raise UserError('--what is wrong; say what is right')

    assert examine(Section('Time', mistaken)) == [Finding(STOP, 'Time', '--what is wrong', 'Say what is right.')]
    for look in (doctor_memory.look_at_memory, doctor_schedule.look_at_schedule, doctor_disk.look_at_disk):
        found, = examine(Section('Memory', look), case_of(), Splits(()))
        assert found.mark == LOOK and found.figure.endswith('see "Images per second"')


def test_crash_of_a_check_is_a_mark_of_its_own():
    def crashing():
        yield Finding(OK, 'First', 'is sound')
        json.loads('')  # the exception comes from outside of the project

    line = crashing.__code__.co_firstlineno + 2
    first, crash = examine(Section('Time', crashing))
    assert first.title == 'First' and (crash.mark, crash.title) == (FAIL, 'Time')
    assert f'tests/test_doctor.py:{line} (JSONDecodeError: Expecting value' in crash.figure and 'bug' in crash.remedy
    assert crash.numbers['traceback'].startswith('Traceback') and '/json/' in crash.numbers['traceback']
    look, stop = Finding(LOOK, 'Size', 'large', 'Make it small.'), Finding(STOP, 'Disk', 'full', 'Make room.')
    summary = doctor_findings.summary([first, look, crash], '')
    assert summary['Will it run?'] == 'Not known: time; 1 check crashed; 1 finding to look at.'
    assert summary['Mend first'].startswith('Time: This is a bug')
    summary = doctor_findings.summary([crash, stop], '')
    assert summary['Will it run?'] == 'No: disk; 1 check crashed.' and summary['Mend first'] == 'Disk: Make room.'


def test_crash_of_what_the_run_would_do_is_a_stop():
    def checking():
        yield from param_groups(None, 0.1)

    crash, = examine(Section('Step', checking))
    assert crash.mark == STOP and 'train.py would end there too' in crash.remedy
    assert 'crashes at engine/layers.py:' in crash.figure and 'AttributeError' in crash.figure
    assert crash.numbers['traceback'].startswith('Traceback')


def test_blocks_that_a_model_lacks_cannot_be_compiled(image_folder):
    case = case_of(image_folder)
    splits = doctor_data.open_splits(case)
    case = dataclasses.replace(case, args=case.args.replacing(model='resnet18', model_kwargs=None, compile='blocks'))
    stop, = examine(Section('Images per second', doctor_speed.look_at_rates), case, splits)
    assert (stop.mark, stop.remedy) == (STOP, 'Say --compile model.') and 'ResNet has no blocks' in stop.figure


def test_crash_in_one_part_of_the_recipe_keeps_the_others(gpu):
    gpu.get_device_name.side_effect = RuntimeError('the driver is gone')
    case = case_of('--lr', '5e-4', '--no-amp', device='cuda', processes=8)
    rate, crash = examine(Section('Recipe', doctor_recipe.look_at_recipe), case, Splits(range(1_281_167)))
    assert (rate.mark, rate.title) == (LOOK, 'Learning rate')
    assert crash.mark == STOP and 'engine/recipe.py:' in crash.figure and 'the driver is gone' in crash.figure


def test_page_with_a_crash(image_folder, tmp_path):
    planted = tmp_path / 'planted.py'
    planted.write_text(f"""import sys
sys.path.insert(0, {str(ROOT)!r})
from tools.doctor import speed
from tools.doctor.__main__ import main
from utils.script import run_script

def planted(device):
    raise OSError('planted')

speed.device_name = planted
run_script(main)
""")
    ended = run_script(planted, image_folder, *SMALL, '--quick', '--processes', 1, '--results-file', 'r', cwd=tmp_path)
    assert ended.returncode == 1
    words = ' '.join(ended.stdout.split())
    assert 'fail Images per second The check itself crashed at tools/doctor/speed.py:' in words
    assert 'Not measured: no training step was measured, see "Images per second"' in words
    assert 'Will it run? Not known: images per second; 1 check crashed;' in words
    assert 'Images per second: Traceback' in ended.stderr and ended.stderr.endswith('OSError: planted\n')
    record = json.loads((tmp_path / 'r.json').read_text())
    marks = {finding['title']: finding['mark'] for finding in record['findings']}
    assert marks['Images per second'] == FAIL and marks['Loader'] == OK  # which was measured before
    assert record['summary']['Will it run?'].startswith('Not known')
    assert 'Images per second,fail,' in (tmp_path / 'r.csv').read_text()


def test_without_faults_the_summary_says_so():
    assert doctor_findings.summary([Finding(OK, 'a', 'b')], 'x') == {
        'Will it run?': 'Yes, by all that was looked at.', 'What starves?': 'x', 'Mend first': 'Nothing.'}
    assert doctor_findings.duration(90) == '90 seconds' and doctor_findings.duration(5025) == '1.4 hours'
    assert doctor_findings.duration(310 * 86400) == '310.0 days'


def test_mistake_in_the_options(tmp_path):
    ended = run_script('tools/doctor', tmp_path / 'nowhere', *SMALL, cwd=tmp_path)
    assert ended.returncode == 2 and len(ended.stderr.splitlines()) == 1 and 'does not exist' in ended.stderr
