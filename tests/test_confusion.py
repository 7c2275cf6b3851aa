"""Numbers of each class: against their definitions, over several ranks, and through validate.py and train.py."""
import csv
import json

import numpy as np
import pytest
import torch

from engine.confusion import ConfusionCounter, describe
from engine.evaluate import METRICS
from options.scripts import train_parser
from tests.conftest import launch, run_script, succeeded

CLASSES = 5


@pytest.fixture
def counted():
    """Guesses of 200 images: class 3 is never guessed, class 4 has no images but is guessed."""
    rng = np.random.default_rng(3)
    targets = rng.integers(0, 4, 200)
    guesses = np.where(rng.random(200) < 0.6, targets, rng.choice([0, 1, 2, 4], 200))
    guesses[guesses == 3] = 0
    counter = ConfusionCounter()
    for some in np.array_split(np.arange(200), 7):
        counter.add(torch.from_numpy(targets[some]), torch.from_numpy(guesses[some]), num_classes=CLASSES)
    return targets, guesses, counter.gather()


def test_numbers_of_each_class_follow_their_definitions(counted):
    targets, guesses, confusion = counted
    for k in range(4):
        hits = ((targets == k) & (guesses == k)).sum()
        precision, recall = hits / max(1, (guesses == k).sum()), hits / (targets == k).sum()
        f1 = 2 * precision * recall / (precision + recall) if hits else 0
        assert confusion.precision[k] == pytest.approx(precision) and confusion.recall[k] == pytest.approx(recall)
        assert confusion.f1[k] == pytest.approx(f1)
    # Class 4 has no images: it has no recall, but its guesses were wrong ones.
    assert np.isnan(confusion.recall[4]) and (confusion.precision[4], confusion.f1[4]) == (0, 0)
    assert confusion.balanced_accuracy == pytest.approx(100 * confusion.recall[:4].mean())
    assert confusion.macro_f1 == pytest.approx(100 * confusion.f1.mean())
    matrix = np.zeros((CLASSES, CLASSES), int)
    np.add.at(matrix, (targets, guesses), 1)
    assert (confusion.matrix() == matrix).all()


def test_most_confused_pairs_come_first_and_are_errors(counted):
    targets, guesses, confusion = counted
    pairs = confusion.most_confused(3)
    assert all(true != predicted for true, predicted, _ in pairs)
    assert all(images == ((targets == true) & (guesses == predicted)).sum() for true, predicted, images in pairs)
    off_diagonal = np.sort(confusion.matrix()[~np.eye(CLASSES, dtype=bool)])
    assert [images for *_, images in pairs] == off_diagonal[::-1][:3].tolist()


def test_a_class_that_nobody_has_and_nobody_guesses_counts_nowhere():
    counter = ConfusionCounter()
    counter.add(torch.tensor([0, 0, 1]), torch.tensor([0, 1, 1]), num_classes=30)
    confusion = counter.gather()
    assert np.isnan([confusion.precision[7], confusion.recall[7], confusion.f1[7]]).all()
    assert (confusion.balanced_accuracy, confusion.macro_f1) == (75, pytest.approx(200 / 3))
    text = describe(confusion, [f'name {k}' for k in range(30)])
    assert 'name 7' not in text and '28 classes have no images' in text and '1  name 0 → name 1' in text


def test_many_classes_show_the_worst_only():
    counter = ConfusionCounter()
    targets = torch.arange(1000).repeat(2)
    guesses = targets.clone()
    guesses[500:510] = 0  # of each of these classes one of two images is wrong
    counter.add(targets, guesses, num_classes=1000)
    text = describe(counter.gather(), [f'name {k}' for k in range(1000)])
    shown = [line.split()[1] for line in text.splitlines() if line.startswith('  name')]
    assert len(text.splitlines()) < 30 and {'0', '500', '508'} == set(shown) & {'0', '500', '508', '7'}


def test_eval_metric_takes_every_number_of_an_evaluation():
    assert set(train_parser()._option_string_actions['--eval-metric'].choices) == set(METRICS)


def test_validate_writes_the_numbers_of_each_class_on_one_and_two_processes(tmp_path):
    options = ('--dataset', 'digits', '--model', 't2t_vit_7', '--img-size', '28', '-j', '0', '--device', 'cpu',
               '--model-kwargs', 'embed_dim=64', 'depth=1', 'num_heads=2')
    run = ('--epochs', '1', '--warmup-epochs', '0', '--cooldown-epochs', '0', '--no-model-ema', '--experiment', 'a',
           '--output', 'out', '--no-tensorboard', '--mixup', '0', '--cutmix', '0', '--eval-metric', 'macro_f1')
    out = succeeded(run_script('train.py', *options, *run, cwd=tmp_path))
    epoch = [json.loads(line) for line in open(tmp_path / 'out/train/a/metrics.jsonl')][-1]
    assert f'Best metric: {epoch["macro_f1"]:.4f} (macro_f1' in out and epoch['balanced_accuracy'] > 0
    checkpoint = ('--checkpoint', 'out/train/a/last.pth.tar')
    out = succeeded(run_script('validate.py', *options, *checkpoint, '--results-file', 'one', cwd=tmp_path))
    succeeded(launch(2, *options, *checkpoint, '--results-file', 'two', cwd=tmp_path, SCRIPT='validate.py'))
    result = json.loads((tmp_path / 'one.json').read_text())
    assert result['macro_f1'] == pytest.approx(epoch['macro_f1'], abs=1)
    classes = list(csv.DictReader(open(tmp_path / 'one.classes.csv')))
    pairs = list(csv.DictReader(open(tmp_path / 'one.confusion.csv')))
    assert [row['class'] for row in classes] == [str(digit) for digit in range(10)]
    assert sum(int(row['images']) for row in classes) == sum(int(row['images']) for row in pairs) == result['count']
    right = sum(int(row['images']) for row in pairs if row['true'] == row['predicted'])
    assert 100 * right / result['count'] == pytest.approx(result['top1'])
    recalls = [100 * int(row['right']) / int(row['images']) for row in classes]
    assert [float(row['recall']) for row in classes] == pytest.approx(recalls)
    assert sum(recalls) / 10 == pytest.approx(result['balanced_accuracy'])
    assert 'Confusion matrix' in out and f'macro F1: {result["macro_f1"]:.1f}%' in out
    for name in ('classes', 'confusion'):
        assert (tmp_path / f'two.{name}.csv').read_text() == (tmp_path / f'one.{name}.csv').read_text()
