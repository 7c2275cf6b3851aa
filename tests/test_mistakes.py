"""Mistakes: the numbers are those of scikit-learn, and the figures say them whatever the number of classes."""
import functools
import os
import subprocess
import sys
import warnings

import numpy as np
import pytest
from matplotlib import rcParams
from matplotlib.text import Text
from PIL import Image
from sklearn.calibration import calibration_curve
from sklearn.metrics import confusion_matrix, recall_score

import visualize
from engine.predict import Predictions
from figures import mistakes
from models import create_model
from tests.conftest import ROOT, write_checkpoint
from utils.errors import UserError
from utils.pictures import _add_wide_fonts, _warn_of_letters, image_sheet, to_array

# On a machine with wide fonts, whichever this one has.
IMPORTS = """
from matplotlib import rcParams
from matplotlib.font_manager import FontEntry, fontManager
fontManager.ttflist.append(FontEntry(name='PingFang SC'))
before = dict(rcParams)
import figures.mistakes, engine.log.curves, utils.pictures
assert rcParams == before
utils.pictures.new_figure(1, 1)
assert 'PingFang SC' in rcParams['font.family']
"""


def guess(num_classes, n, seed=0):
    """Predictions that are right in about half of all cases, with indices into a larger data set, and the targets."""
    rng = np.random.default_rng(seed)
    targets = rng.integers(0, num_classes, n)
    classes = rng.integers(0, num_classes, (n, 2))
    classes[:, 0] = np.where(rng.random(n) < 0.5, targets, classes[:, 0])
    probabilities = rng.uniform(0.3, 1, (n, 1)).astype(np.float32) * [1, 0.2]
    return Predictions(3 * np.arange(n) + 1, classes, probabilities), targets


@pytest.mark.parametrize('num_classes', [2, 7])
def test_matrix_and_accuracy_of_classes_are_those_of_scikit_learn(num_classes):
    predictions, targets = guess(num_classes, 200)
    matrix = mistakes.confusion_matrix(targets, predictions.classes[:, 0], num_classes + 1)
    expected = confusion_matrix(targets, predictions.classes[:, 0], labels=range(num_classes + 1))
    np.testing.assert_array_equal(matrix, expected)
    accuracy = mistakes.class_accuracy(matrix)
    assert np.isnan(accuracy[-1]), 'a class without images has no accuracy'
    np.testing.assert_allclose(accuracy[:-1], recall_score(targets, predictions.classes[:, 0], average=None))


def test_calibration_is_that_of_scikit_learn():
    predictions, targets = guess(5, 500)
    confidence, right = predictions.probabilities[:, 0], predictions.classes[:, 0] == targets
    confidence[:3] = [1 / 15, 0.4, 1.0]  # on the edges of bins, and none at 0.1 to 0.3
    found = mistakes.calibrate(confidence, right)
    accuracy, mean = calibration_curve(right, confidence, n_bins=15)
    filled = found.counts > 0
    assert 0 < filled.sum() < 15 and found.counts.sum() == 500
    np.testing.assert_allclose(found.accuracy[filled], accuracy)
    np.testing.assert_allclose(found.confidence[filled], mean, rtol=1e-6)
    assert found.error == pytest.approx((np.abs(accuracy - mean) * found.counts[filled] / 500).sum())
    assert mistakes.calibrate(np.array([0.9, 0.9]), np.array([True, False])).error == pytest.approx(0.4)
    assert mistakes.calibrate(np.zeros(0), np.zeros(0, bool)).error == 0


def test_most_confused_and_most_confident():
    matrix = np.array([[9, 2, 0], [5, 1, 0], [0, 2, 0]])
    assert mistakes.most_confused(matrix, 9) == [(1, 0, 5), (0, 1, 2), (2, 1, 2)]
    assert mistakes.most_confused(matrix, 1) == [(1, 0, 5)] and matrix[0, 0] == 9
    predictions = Predictions(np.arange(4), np.array([[0], [1], [1], [0]]), np.array([[0.9], [0.6], [0.8], [0.7]]))
    targets = np.array([0, 0, 0, 1])
    assert mistakes.most_confident_errors(predictions, targets, 9).tolist() == [2, 3, 1]
    assert mistakes.most_confident_errors(predictions, targets, 2).tolist() == [2, 3]


def texts(figure):
    """All that is written in a drawn figure."""
    figure.canvas.draw()
    return [item.get_text() for item in figure.findobj(lambda item: hasattr(item, 'get_text')) if item.get_visible()]


@pytest.mark.parametrize('num_classes', [2, 30, 1000])
def test_figure_says_all_of_it_for_any_number_of_classes(num_classes):
    predictions, targets = guess(num_classes, 300)
    names = [f'sort $ {k}' for k in range(num_classes)]
    asked = []

    def picture(index):
        asked.append(index)
        return np.full((300, 40 + index % 7, 3), index % 255, np.uint8)

    figure = mistakes.mistakes_figure(predictions, targets, names, picture)
    said = texts(figure)
    right = predictions.classes[:, 0] == targets
    assert f'Confusion matrix: {right.sum()} of 300 images right ({100 * right.mean():.1f} %)' in said
    wrong = np.flatnonzero(~right)
    surest = wrong[np.argsort(-predictions.probabilities[wrong, 0])][:12]
    assert asked == predictions.indices[surest].tolist(), 'pictures are asked for by their numbers in the data set'
    first = surest[0]
    assert any(text.startswith(f'sort $ {targets[first]} →') and f'$ {predictions.classes[first, 0]} ' in text
               for text in said)
    pairs = [text for text in said if text.count('→') > 5]
    assert len(pairs) == (num_classes > 12), 'where cells have no numbers the most confused pairs are listed'
    assert any('classes between' in text for text in said) == (num_classes > 24)
    assert (f'{(~right & (targets == 0)).sum()}' in said) or num_classes > 12


def test_names_that_no_font_has_or_that_are_no_text_are_drawn_and_said_once(caplog):
    predictions, targets = guess(3, 30)
    names = [os.fsdecode(b'caf\xe9'), 'naïve $', '\U00012000 \U00012001']  # Latin-1 bytes; cuneiform
    _warn_of_letters.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        said = texts(mistakes.mistakes_figure(predictions, targets, names, lambda _: np.zeros((9, 9, 3), np.uint8)))
    assert {'caf?', 'naïve $', '? ?'} <= set(said)
    assert [record.message[:19] for record in caplog.records] == ['pictures show ? for']


def test_letters_of_the_machines_fonts_are_drawn_and_imports_leave_fonts_alone(monkeypatch, caplog):
    subprocess.run([sys.executable, '-c', IMPORTS], check=True, cwd=ROOT)
    # Matplotlib comes with STIX, which has a watch where its default font has none.
    monkeypatch.setitem(rcParams, 'font.family', ['DejaVu Sans'])
    monkeypatch.setattr('utils.pictures._WIDE_FONTS', ('no such font', 'STIXGeneral'))
    monkeypatch.setattr('utils.pictures._add_wide_fonts', functools.cache(_add_wide_fonts.__wrapped__))
    with warnings.catch_warnings():
        warnings.simplefilter('error')  # matplotlib's, of a letter that it cannot draw
        for _ in range(2):
            sheet = image_sheet([np.zeros((9, 9, 3), np.uint8)], ['\u231a'], title='a watch')
            assert '\u231a' in texts(sheet) and to_array(sheet, dpi=30).any()
    assert rcParams['font.family'] == ['DejaVu Sans', 'STIXGeneral'] and not caplog.records


def test_large_pictures_are_drawn_small():
    pictures = [np.full(shape, 200, np.uint8) for shape in ((3000, 40, 3), (32, 500, 3), (20, 30, 3))]
    pictures.append(np.full((8, 8, 3), 0.5, np.float32))
    panels = image_sheet(iter(pictures), list('abcd')).axes
    assert [panel.images[0].get_array().shape[:2] for panel in panels] == [(256, 3), (16, 256), (20, 30), (8, 8)]


def test_no_errors_no_images_and_very_many_classes():
    predictions, targets = guess(4, 20)
    predictions.classes[:, 0] = targets
    assert 'No errors among 20 images' in texts(mistakes.errors_figure(predictions, targets, list('abcd'), None))
    nothing = Predictions(np.zeros(0, int), np.zeros((0, 1), int), np.zeros((0, 1)))
    assert to_array(mistakes.mistakes_figure(nothing, np.zeros(0, int), list('ab'), None), dpi=30).shape[2] == 3
    matrix = np.zeros((1000, 1000), int)
    matrix[123, 777] = 1  # one error among a million cells must not fall between two pixels
    axes = mistakes.confusion_figure(matrix, [str(k) for k in range(1000)]).axes[0]
    shown = axes.images[0].get_array()
    assert shown.shape == (200, 200) and shown[123 // 5, 777 // 5] == 1 and np.nansum(shown) == 1


def test_visualize_shows_the_mistakes_on_a_data_set(tmp_path, monkeypatch, capsys):
    model = create_model('t2t_vit_7', num_classes=10, img_size=32)
    write_checkpoint({'arch': 't2t_vit_7', 'state_dict': model.state_dict(), 'args': {'img_size': 32}}, tmp_path / 'm')
    drawn = []
    monkeypatch.setattr('figures.mistakes.confusion_figure', lambda matrix, *_: drawn.append(matrix))
    monkeypatch.setattr('utils.runtime.setup_logging', lambda **_: None)
    monkeypatch.chdir(tmp_path)
    command = ['visualize.py', '--checkpoint', 'm', '--device', 'cpu', '-j', '0', '--figures', 'mistakes']
    monkeypatch.setattr('sys.argv', [*command, '--dataset', 'digits'])
    visualize.main()
    picture = Image.open('output/visualize/digits-t2t_vit_7-m-mistakes.png')
    assert picture.width > 1000 and 'digits-t2t_vit_7-m-mistakes.png' in capsys.readouterr().out
    # All 359 digits, not the three that other figures show.
    assert len(drawn) == 1 and drawn[0].shape == (10, 10) and drawn[0].sum() == 359
    Image.new('RGB', (40, 40)).save('cat.jpg')
    monkeypatch.setattr('sys.argv', ['visualize.py', 'cat.jpg', *command[1:]])
    with pytest.raises(UserError, match='give a data set'):
        visualize.main()


def test_dollars_in_names_are_no_formulas():
    names = ['$1_$5', r'a\frac$\frac{1}$']
    predictions = Predictions(np.arange(3), np.array([[0], [1], [1]]), np.full((3, 1), 0.9))
    picture = np.zeros((8, 8, 3), np.uint8)
    figure = mistakes.mistakes_figure(predictions, np.array([0, 1, 0]), names, lambda index: picture)
    to_array(figure)  # draws: a formula that is none would raise
    said = [text.get_text() for text in figure.findobj(Text)]
    assert '$1_$5' in said and any(text.startswith('$1_$5 →') for text in said)
    to_array(mistakes.confusion_figure(np.eye(20, dtype=int) + 1, names * 10))
