"""Choosing the model: evaluations every N epochs, an early end, other images for the choice, several runs."""
import csv
import json
import re
import statistics

import numpy as np
import pytest
import torch

from data.arrays import ArrayImages
from data.pipeline import _create_train_loader, resolve_input
from engine.recipe import advise
from engine.several import summarize
from options.checks import check_runs
from tests.conftest import assert_same, launch, run_script, succeeded, write_checkpoint
from tests.test_options import parse
from tests.test_pipeline import ONE
from tests.test_resume import final_state, records
from tools.report import sections
from utils.checkpoint_reader import read_checkpoint
from utils.errors import UserError

SMALL = ('--model', 't2t_vit_7', '--img-size', '16', '--model-kwargs', 'embed_dim=32', 'depth=1', 'num_heads=2',
         '--device', 'cpu', '-j', '0', '--warmup-epochs', '0', '--cooldown-epochs', '0', '--no-tensorboard')
# Nothing is learned, so the first evaluation is the best, and the run ends after two more.
STALLING = (*SMALL, '-b', '6', '--lr', '0', '--min-lr', '0', '--epochs', '20', '--val-interval', '2',
            '--early-stop', '2', '--select-fraction', '0.25', '--experiment')
STOPPED = 'stopped early after epoch 6: top1 has not improved in 2 evaluations (--early-stop)'


@pytest.fixture(scope='module')
def stalled(image_folder, tmp_path_factory):
    """The folder of a run that stopped early, with what it printed."""
    folder = tmp_path_factory.mktemp('stalled')
    (folder / 'stdout').write_text(succeeded(run_script('train.py', image_folder, *STALLING, 'a', cwd=folder)))
    return folder


def result_of(run):
    return json.loads((run / 'result.json').read_text())


def test_a_run_that_no_longer_improves_ends_and_says_so(stalled):
    run, out = stalled / 'output/train/a', (stalled / 'stdout').read_text()
    assert STOPPED in out and 'Epoch 1: training loss' in out and out.count('not evaluated') == 3
    epochs = [record for record in records(run) if record['kind'] == 'epoch']
    assert [record['epoch'] for record in epochs if 'top1' in record] == [1, 3, 5] and len(epochs) == 6
    rows = list(csv.DictReader((run / 'summary.csv').read_text().splitlines()))
    assert [row['count'] for row in rows] == ['', '12', '', '12', '', '12'] and all(row['train_loss'] for row in rows)
    state = final_state(run)
    assert (state['epoch'], state['step'], state['best_epoch'], state['evaluations_since_best']) == (6, 0, 1, 2)
    assert read_checkpoint(run / 'model_best.pth.tar')['epoch'] == 2 and (run / 'curves.png').exists()


def test_the_choice_is_made_on_other_images_than_the_result(stalled, image_folder):
    run, out = stalled / 'output/train/a', (stalled / 'stdout').read_text()
    result = result_of(run)
    assert 'chosen on 12 held-out training images (--select-fraction 0.25); evaluated on 15 evaluation images' in out
    assert (result['chosen_on'], result['evaluated_on'], result['best_epoch'], result['epochs'],
            result['stopped_early']) == ('12 held-out training images (--select-fraction 0.25)',
                                         '15 evaluation images', 2, 6, True)
    succeeded(run_script('validate.py', image_folder, '--checkpoint', run / 'model_best.pth.tar', '--device', 'cpu',
                         '-j', '0', '-b', '9', '--results-file', 'v', cwd=stalled))
    validated = json.loads((stalled / 'v.json').read_text())
    for name in ('top1', 'loss', 'macro_f1'):
        assert result[name] == pytest.approx(validated[name], rel=1e-6)
    shown = str(sections.summary(sections.open_run(run), None))
    assert '12 held-out training images' in shown and '6 of 20, stopped early' in shown
    assert '–' in str(sections.epochs(sections.open_run(run)))


def test_a_stopped_run_is_done_unless_the_option_changes(stalled, image_folder):
    run = stalled / 'output/train/a'
    before, result = final_state(run), result_of(run)
    out = succeeded(run_script('train.py', image_folder, *STALLING, 'a', '--resume', 'auto', cwd=stalled))
    done = 'the run stopped early after epoch 6, the best is epoch 2 (--early-stop 2)'
    assert f'nothing is left to train in output/train/a: {done}' in out
    assert_same(final_state(run), before)
    assert result_of(run) == result
    # An earlier version did not count: that run has evaluated every epoch.
    old = {name: value for name, value in read_checkpoint(run / 'last.pth.tar').items()
           if name not in ('evaluations_since_best', 'best_results')}
    (stalled / 'output/train/old').mkdir()
    write_checkpoint(old, stalled / 'output/train/old/last.pth.tar')
    (stalled / 'output/train/old/model_best.pth.tar').write_bytes((run / 'model_best.pth.tar').read_bytes())
    (stalled / 'output/train/old/result.json').write_text('{}')
    old_run = run_script('train.py', image_folder, *STALLING, 'old', '--resume', 'output/train/old/last.pth.tar',
                         cwd=stalled)
    assert old_run.returncode == 2 and f'{done}; give a larger --early-stop, or leave it out' in old_run.stderr
    other = run_script('train.py', image_folder, *STALLING, 'a', '--resume', 'auto', '--select-fraction', '0.5',
                       cwd=stalled)
    assert other.returncode == 2 and 'would change sides; give --select-fraction 0.25' in other.stderr
    longer = (*STALLING, 'old', '--resume', 'auto', '--early-stop', '5', '--epochs', '7')
    out = succeeded(run_script('train.py', image_folder, *longer, cwd=stalled))
    assert 'Epoch 7: Acc@1' in out and 'stopped early' not in out
    assert final_state(stalled / 'output/train/old')['evaluations_since_best'] == 5


@pytest.mark.parametrize('fault', ['step@14=term', 'evaluate.final=term'])
def test_an_interruption_changes_neither_the_end_nor_the_result(stalled, image_folder, fault):
    """In epoch 4, whose evaluation is the first without an improvement, and in the last evaluation of all."""
    name, run = fault.partition('=')[0], stalled / 'output/train' / fault.partition('=')[0]
    stopped = run_script('train.py', image_folder, *STALLING, name, cwd=stalled, T2T_FAULTS=fault)
    assert stopped.returncode == 75 and not (run / 'result.json').exists(), stopped.stderr
    out = succeeded(run_script('train.py', image_folder, *STALLING, name, '--resume', run, cwd=stalled))
    assert STOPPED in out
    whole = stalled / 'output/train/a'
    assert_same(final_state(run), final_state(whole))
    assert records(run) == records(whole) and result_of(run) == result_of(whole)


def test_a_usual_run_says_that_its_result_is_optimistic(image_folder, tmp_path):
    out = succeeded(run_script('transfer.py', image_folder, *SMALL, '-b', '9', '--epochs', '1', '--sampler', 'balanced',
                               '--aug-repeats', '3', '--experiment', 'a', cwd=tmp_path))
    assert 'the best epoch was chosen on the images that evaluate it, 15 evaluation images: its result is opti' in out
    assert 'an epoch has 12 images, each 3 times in a row' in out
    result = result_of(tmp_path / 'output/transfer/a')
    assert result['chosen_on'] == result['evaluated_on'] and result['top1'] == records(
        tmp_path / 'output/transfer/a')[-1]['top1']


# --- Several runs -----------------------------------------------------------------------------------------------------

FOLDS = (*SMALL, '-b', '4', '--epochs', '2', '--lr', '1e-3', '--sampler', 'balanced', '--aug-repeats', '2',
         '--k-fold', '3', '--experiment')


@pytest.fixture(scope='module')
def folds(image_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp('folds')
    succeeded(launch(2, image_folder, *FOLDS, 'whole', cwd=folder))
    return folder


def test_folds_that_were_interrupted_go_on_and_end_in_the_same_bytes(folds, image_folder):
    stopped = launch(2, image_folder, *FOLDS, 'stopped', cwd=folds, T2T_FAULTS='step@8#1=term')  # in the second fold
    assert stopped.returncode == 75, stopped.stderr
    assert 'of fold-2. To go on: ' in stopped.stderr and stopped.stderr.rstrip().endswith('--resume auto')
    runs = folds / 'output/train'
    assert (runs / 'stopped/fold-1/result.json').exists() and not (runs / 'stopped/fold-2/result.json').exists()
    assert not (runs / 'stopped/fold-3').exists() and not (runs / 'stopped/folds.json').exists()
    # Meanwhile a queue makes the third one by itself.
    alone = succeeded(launch(2, image_folder, *FOLDS, 'stopped', '--fold', '3', cwd=folds))
    assert 'fold 3 of 3' in alone and 'fold-2' not in alone and not (runs / 'stopped/folds.json').exists()
    out = succeeded(launch(2, image_folder, *FOLDS, 'stopped', '--resume', 'auto', cwd=folds))
    assert out.count('nothing is left to train') == 2 and '--- fold-3, run 3 of 3 ---' in out
    for fold in ('fold-1', 'fold-2', 'fold-3'):
        assert_same(final_state(runs / 'stopped' / fold), final_state(runs / 'whole' / fold))
        assert records(runs / 'stopped' / fold) == records(runs / 'whole' / fold)
    assert (runs / 'stopped/folds.csv').read_bytes() == (runs / 'whole/folds.csv').read_bytes()


def test_the_table_has_each_fold_their_mean_and_deviation(folds, image_folder):
    runs = folds / 'output/train/whole'
    results = [result_of(runs / f'fold-{number}') for number in (1, 2, 3)]
    assert [result['evaluated_on'] for result in results] == [
        f'12 evaluation images (fold {number} of 3)' for number in (1, 2, 3)]
    table = list(csv.DictReader((runs / 'folds.csv').read_text().splitlines()))
    assert [row['run'] for row in table] == ['fold-1', 'fold-2', 'fold-3', 'mean', 'deviation']
    losses = [result['loss'] for result in results]
    assert [float(row['loss']) for row in table] == pytest.approx([*losses, np.mean(losses), np.std(losses, ddof=1)])
    assert json.loads((runs / 'folds.json').read_text())['mean']['loss'] == pytest.approx(np.mean(losses))
    succeeded(run_script('validate.py', image_folder, '--checkpoint', runs / 'fold-3/model_best.pth.tar', '--device',
                         'cpu', '-j', '0', '--results-file', 'v', cwd=folds))
    validated = json.loads((folds / 'v.json').read_text())
    assert validated['count'] == 12 and validated['loss'] == pytest.approx(losses[2], rel=1e-6)


def test_seeds_are_runs_of_their_own(image_folder, tmp_path):
    options = (*SMALL, '-b', '6', '--epochs', '1', '--experiment')
    succeeded(run_script('train.py', image_folder, *options, 'a', '--seeds', '7', '8', cwd=tmp_path))
    succeeded(run_script('train.py', image_folder, *options, 'b', '--seed', '8', cwd=tmp_path))
    runs = tmp_path / 'output/train'
    assert_same(final_state(runs / 'a/seed-8'), final_state(runs / 'b'))
    table = json.loads((runs / 'a/seeds.json').read_text())
    values = [table['runs'][name]['loss'] for name in ('seed-7', 'seed-8')]
    assert values[0] != values[1] and table['deviation']['loss'] == pytest.approx(statistics.stdev(values))


def test_a_single_run_has_no_deviation_and_a_missing_number_no_mean():
    assert summarize({'seed-1': {'top1': 80.0, 'loss': 1.0}}) == {
        'mean': {'top1': 80.0, 'loss': 1.0}, 'deviation': {'top1': None, 'loss': None}}
    assert summarize({'seed-1': {'top1': 80.0}, 'seed-2': {'top1': 82.0, 'loss': 1.0}}) == {
        'mean': {'top1': 81.0}, 'deviation': {'top1': pytest.approx(2 ** 0.5)}}


MISTAKES = {
    '--fold 2': '--fold 2: of how many? add --k-fold',
    '--k-fold 3 --fold 4': '--fold 4: --k-fold 3 has folds 1 to 3',
    '--k-fold 3 --val-fraction 0.1': '--k-fold 3 beside --val-fraction 0.1',
    '--k-fold 3 --val-split val': '--k-fold 3 beside --val-split val',
    '--k-fold 1': 'at least 2',
    '--k-fold 3': 'name the folder that holds them: --experiment',
    '--seeds 1 2 1 --experiment a': 'a seed twice',
    '--seeds 1 2 --k-fold 2 --experiment a': '--seeds 1 2 beside --k-fold 2',
    '--seeds 1 2 --experiment a --resume x': 'say --resume auto',
}


@pytest.mark.parametrize('options', MISTAKES)
def test_runs_that_cannot_be(options):
    with pytest.raises(UserError, match=re.escape(MISTAKES[options])):
        check_runs(parse('--dataset', 'digits', *options.split()))


def test_a_mistake_in_the_runs_is_said_before_anything_begins(tmp_path):
    wrong = run_script('transfer.py', '--k-fold', '3', cwd=tmp_path)
    assert wrong.returncode == 2 and '--experiment NAME' in wrong.stderr and wrong.stderr.count('\n') == 1
    assert not list(tmp_path.iterdir())


# --- Options that do not go together ----------------------------------------------------------------------------------

@pytest.mark.parametrize(('options', 'said'), [
    ('--epochs 20 --early-stop 5 --val-interval 4', '--early-stop 5 waits 20 epochs, of 20'),
    ('--epochs 20 --val-interval 20', 'only the last one is evaluated'),
    ('--aug-repeats 3 --no-aug', 'all repeats of an image are the same'),
    ('--aug-repeats 9 -b 8', '--aug-repeats 9 with 8 images a step'),
    ('--epochs 20 --early-stop 4 --val-interval 4 --aug-repeats 8 -b 8', None),
])
def test_what_makes_no_sense_is_said(options, said):
    args = parse('/data', *options.split())
    found = [str(advice) for advice in advise(args, images=100, processes=1, steps=0, device=torch.device('cpu'),
                                              dtype=None)]
    assert len(found) == (said is not None) and (said or '') in ''.join(found)


def test_classes_without_images_are_left_out_and_said(caplog):
    dataset = ArrayImages('x', np.zeros((30, 8, 8), np.uint8), ['ant', 'bee', 'cat'], [0] * 25 + [2] * 5)
    args = parse('--dataset', 'digits', '--img-size', '16', '-b', '10', '-j', '0', '--sampler', 'balanced')
    loader, _ = _create_train_loader(args, dataset, resolve_input(args, {}), 3, ONE)
    assert "--sampler balanced: 1 class ('bee') left out, without training images" in caplog.text
    loader.set_position(0)
    assert torch.bincount(torch.cat([targets for _, targets in loader])).tolist() == [15, 0, 15]


def test_what_is_held_out_needs_a_class_of_two_images(tmp_path):
    from data.pipeline import create_training_input

    dataset = ArrayImages('x', np.zeros((2, 8, 8), np.uint8), ['ant', 'bee'], [0, 1])
    args = parse('--dataset', 'digits', '--img-size', '16', '-b', '1', '-j', '0', '--select-fraction', '0.5')
    with pytest.raises(UserError, match='--select-fraction 0.5: no class has two training images'):
        create_training_input(args, dataset, dataset, {}, 2, ONE)
