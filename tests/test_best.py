"""Which weights and which epoch are the best: the warm-up of the average, the choice, and what scripts take."""
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from timm.utils import ModelEmaV3
from torch import nn

from engine.best import AVERAGED, WEIGHTS, best_record, better_result
from engine.ema import PUBLISHED_DECAY, ModelEma, needs_warmup
from engine.log.curves import draw_curves
from models.weights.formats import extract
from tests.conftest import run_script, succeeded
from utils.checkpoint_reader import read_checkpoint

TRAIN = ('--model', 't2t_vit_7', '--img-size', '32', '--device', 'cpu', '-j', '0', '-b', '12', '--lr', '1e-3', '--aa',
         '', '--mixup', '0', '--cutmix', '0', '--reprob', '0', '--color-jitter', '0', '--scale', '0.8', '1',
         '--no-tensorboard')
RUN = Path('output/train/run')


# --- The average ------------------------------------------------------------------------------------------------------

def test_the_published_decay_is_that_of_long_runs_and_of_those_who_ask_for_it():
    assert not needs_warmup(None, 310 * 2502), 'the published recipe'
    assert needs_warmup(None, 115_126) and not needs_warmup(None, 115_127)
    assert not needs_warmup(0.99996, 10) and not needs_warmup(0.5, 10)
    assert PUBLISHED_DECAY ** 115_127 < 0.01 <= PUBLISHED_DECAY ** 115_126


@pytest.mark.parametrize('use_warmup', [True, False])
def test_the_average_warms_up_as_timms_does(use_warmup):
    """The step of a resumed run is the same: the decay is a function of the steps alone."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    ours = ModelEma(model, decay=0.9, use_warmup=use_warmup)
    timms = ModelEmaV3(model, decay=0.9, use_warmup=use_warmup, warmup_power=0.75)
    for step in range(40):
        nn.init.normal_(model.weight)
        ours.update(model, steps=step)
        timms.update(model, step + 1 if use_warmup else None)
        torch.testing.assert_close(ours.module.weight, timms.module.weight, rtol=1e-5, atol=1e-6)
        if use_warmup and step == 0:
            torch.testing.assert_close(ours.module.weight, model.weight)  # nothing is left of the initial weights
    assert ours.decay == 0.9


# --- The choice -------------------------------------------------------------------------------------------------------

def test_the_better_one_is_chosen_and_the_loss_decides_between_equals():
    def better(**results):
        return better_result({'loss': 1.0, 'top1': 50.0, 'top5': 90.0, **results}, metric).of

    metric = 'top1'
    assert better() == WEIGHTS
    assert better(ema_top1=60.0, ema_loss=2.0) == AVERAGED and better(ema_top1=40.0, ema_loss=0.5) == WEIGHTS
    assert better(ema_top1=50.0, ema_loss=0.9) == AVERAGED and better(ema_top1=50.0, ema_loss=1.0) == WEIGHTS
    assert better(ema_top1=math.nan, ema_loss=0.1) == WEIGHTS and better(top1=math.nan, ema_top1=1.0) == AVERAGED
    metric = 'loss'
    assert better(ema_loss=0.9) == AVERAGED and better(ema_loss=1.1) == WEIGHTS
    assert better(ema_loss=math.nan) == WEIGHTS and better(loss=math.nan, ema_loss=9.0) == AVERAGED


def test_the_best_epoch_of_a_record():
    def best(*records, metric='top1'):
        found = best_record(records, metric)
        return found and (found[0]['epoch'], found[1].value, found[1].of)

    a = {'epoch': 0, 'top1': 50.0, 'loss': 2.0, 'ema_top1': 10.0, 'ema_loss': 3.0, 'better': WEIGHTS}
    b = {'epoch': 1, 'top1': 50.0, 'loss': 1.5, 'ema_top1': 50.0, 'ema_loss': 1.4, 'better': AVERAGED}
    c = {**b, 'epoch': 2}
    assert best(a, b, c) == (1, 50.0, AVERAGED), 'of equal ones the lower loss, of equal losses the first'
    assert best(a, b, c, metric='loss') == (1, 1.4, AVERAGED)
    earlier = {name: value for name, value in a.items() if name != 'better'}
    assert best(earlier) == (0, 10.0, AVERAGED), 'earlier versions always took the average'
    others = {'epoch': 0, 'macro_f1': 60.0, 'ema_macro_f1': 61.5, 'loss': 1.0, 'ema_loss': 1.25, 'better': AVERAGED}
    said = {metric: str(best_record([others], metric)[1]) for metric in ('macro_f1', 'loss')}
    assert said == {'macro_f1': '61.50 % macro F1', 'loss': 'loss 1.2500'}
    assert best() is None and best({'epoch': 0, 'top1': math.nan}) is None


def test_what_a_checkpoint_recorded_is_taken_unless_told():
    state = {name: {'head.weight': torch.full((2, 2), value)} for name, value in
             (('state_dict', 1.0), ('state_dict_ema', 2.0))}

    def taken(use_ema=None, **more):
        return extract({**state, **more}, use_ema).entry

    assert taken() == taken(preferred=None) == taken(preferred=['state_dict']) == taken(preferred='optimizer') \
        == 'state_dict_ema'
    assert taken(preferred='state_dict') == 'state_dict' and taken(preferred='state_dict_ema') == 'state_dict_ema'
    assert taken(True, preferred='state_dict') == 'state_dict_ema'
    assert taken(False, preferred='state_dict_ema') == 'state_dict'
    assert taken(preferred='state_dict', state_dict=None) == 'state_dict_ema', 'the preferred one has been removed'


def test_curves_mark_the_best(tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr('matplotlib.figure.Figure.savefig', lambda figure, *args, **kwargs: drawn.update(
        (axes.get_title(), {line.get_label(): line.get_xydata().tolist() for line in axes.lines})
        for axes in figure.axes))
    records = [{'kind': 'epoch', 'epoch': epoch, 'train_loss': 1.0, 'loss': 2.0, 'top1': top1, 'ema_loss': 3.0,
                'ema_top1': 5.0, 'better': WEIGHTS} for epoch, top1 in enumerate((30.0, 40.0, 20.0))]
    draw_curves(records, tmp_path / 'curves.png')
    assert drawn['Top-1 accuracy, %']['model_best: epoch 2, weights'] == [[2.0, 40.0]]
    assert drawn['Loss']['model_best: epoch 2, weights'] == [[2.0, 2.0]]


# --- Runs -------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def runs(image_folder, tmp_path_factory):
    """Two short runs: by default; and with an average that stays at its start."""
    folder = tmp_path_factory.mktemp('best')
    out = {}
    for name, more in (('run', ()), ('stale', ('--model-ema-decay', '0.99996'))):
        out[name] = succeeded(run_script('train.py', image_folder, *TRAIN, '--epochs', '10', *more, '--experiment',
                                         name, cwd=folder))
    return folder, out


def epochs_of(run: Path) -> list[dict]:
    records = [json.loads(line) for line in (run / 'metrics.jsonl').read_text().splitlines()]
    return [record for record in records if record['kind'] == 'epoch']


def validated(images, checkpoint, folder, *options) -> dict:
    words = ('--checkpoint', checkpoint, '--device', 'cpu', '-j', '0', '--results-file', 'result', *options)
    out = succeeded(run_script('validate.py', images, *words, cwd=folder))
    assert 'tensors loaded from' in out and 'random' not in out
    return json.loads((folder / 'result.json').read_text())


def test_the_average_of_a_short_run_is_of_use(runs):
    folder, out = runs
    assert 'the average of the weights has the decay 0.99996, to which it warms up\n' in out['run']
    last = epochs_of(folder / RUN)[-1]
    assert last['ema_top1'] >= 80, 'chance is 33 %'
    assert epochs_of(folder / RUN.with_name('stale'))[-1]['ema_top1'] <= 40, 'as it would be without the warm-up'


@pytest.mark.parametrize('name', ['run', 'stale'])
def test_the_best_weights_are_chosen_recorded_and_taken(runs, image_folder, tmp_path, name):
    folder, out = runs
    run = folder / RUN.with_name(name)
    record, result = best_record(epochs_of(run), 'top1')
    content = read_checkpoint(run / 'model_best.pth.tar')
    assert (content['best_metric'], content['best_loss'], content['best_epoch'], content['best_of']) == (
        result.value, result.loss, record['epoch'], result.of)
    assert content['preferred'] == {WEIGHTS: 'state_dict', AVERAGED: 'state_dict_ema'}[result.of]
    assert f'*** Best metric: {result.value:.4f} (top1, epoch {record["epoch"] + 1}, of the {result.of})' in out[name]
    assert f'Better: {record["better"]}' in out[name]
    found = validated(image_folder, run / 'model_best.pth.tar', tmp_path)
    assert found['top1'] == result.value and found['loss'] == pytest.approx(result.loss, rel=1e-5)
    if name == 'stale':
        assert result.of == WEIGHTS and result.value >= 80
        assert validated(image_folder, run / 'model_best.pth.tar', tmp_path, '--use-ema')['top1'] == record['ema_top1']
        line = 'warning: averaged weights: --model-ema-decay 0.99996 over 33 steps: at the end 100 % of the average'
        assert line in out[name] and 'warning' not in out['run']
        report = succeeded(run_script('tools/report', run, '-o', 'r.html', '-j', 0, '--device', 'cpu', cwd=tmp_path))
        assert 'state_dict)' in report
        page = (tmp_path / 'r.html').read_text()
        assert f'{result.value:.2f} % top-1 after epoch {record["epoch"] + 1} (weights)' in page


def test_a_run_says_its_length_its_leftovers_and_what_comes_next(runs, image_folder):
    folder, out = runs
    lines = out['run'].splitlines()
    # 36 images in steps of 12. Lengths that were not given are those of ten epochs.
    assert '11 epochs of 3 steps: 10 of the schedule, the first 1 to warm up, then 1 to cool down' in lines
    assert 'left out' not in out['run']
    assert lines.index('it starts from random weights') < lines.index('run folder: output/train/run')
    commands = lines[lines.index('next:') + 1:]
    assert [command.split()[1].rpartition('/')[2] for command in commands] == ['validate.py', 'predict.py', 'report']
    for command in commands:
        _, script, *options = command.split()
        succeeded(run_script(script, *options, cwd=folder))


def test_a_finished_run_is_no_mistake_for_a_queue(runs, image_folder, tmp_path):
    folder, _ = runs
    shutil.copytree(folder / 'output', tmp_path / 'output')
    (tmp_path / RUN / 'curves.png').unlink()
    again = (image_folder, *TRAIN, '--epochs', '10', '--experiment', 'run', '--resume')
    out = succeeded(run_script('train.py', *again, 'auto', cwd=tmp_path))
    assert f'nothing is left to train in {RUN}: all 11 epochs are done' in out and 'Train:' not in out
    assert '*** Best metric' in out and out.count('\n  python ') == 3
    assert (tmp_path / RUN / 'curves.png').stat().st_size > 10_000, 'its folder is complete'
    assert epochs_of(tmp_path / RUN) == epochs_of(folder / RUN)
    asked = run_script('train.py', *again, RUN / 'last.pth.tar', cwd=tmp_path)
    assert asked.returncode == 2 and 'all' not in asked.stdout and 'give more --epochs' in asked.stderr


@pytest.mark.parametrize('brought', ['the best itself', 'the best beside it', 'neither'])
def test_a_run_that_goes_on_elsewhere_has_the_best_it_speaks_of(runs, image_folder, tmp_path, brought):
    folder, _ = runs
    run, elsewhere = folder / RUN, tmp_path / 'elsewhere'
    elsewhere.mkdir()
    best = read_checkpoint(run / 'model_best.pth.tar')
    start = elsewhere / 'start.pth.tar'
    source = 'model_best.pth.tar' if brought == 'the best itself' else 'last.pth.tar'
    if brought != 'the best itself':
        assert read_checkpoint(run / source)['epoch'] != best['best_epoch'] + 1
    shutil.copy(run / source, start)
    if brought == 'the best beside it':
        shutil.copy(run / 'model_best.pth.tar', elsewhere)
    out = succeeded(run_script('train.py', image_folder, *TRAIN, '--epochs', '12', '--lr', '1e-9', '--min-lr', '1e-10',
                               '--warmup-lr', '1e-10', '--resume', start, '--experiment', 'on', cwd=tmp_path))
    content = read_checkpoint(tmp_path / RUN.with_name('on') / 'model_best.pth.tar')
    last = read_checkpoint(tmp_path / RUN.with_name('on') / 'last.pth.tar')
    assert content['best_epoch'] == last['best_epoch'] == content['epoch'] - 1
    assert ('is not beside' in out) == (brought == 'neither')
    if brought != 'neither':
        assert last['best_metric'] >= best['best_metric']
