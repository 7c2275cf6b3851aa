"""A run in TensorBoard, as a person sees it: the pages of `make tensorboard` in a real browser."""
import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from engine.log.run_log import RunLog
from tests.conftest import ROOT, run_command, run_script, succeeded

SECONDS = 60  # until the server answers
OPTIONS = ('--model', 't2t_vit_7', '--img-size', '32', '--device', 'cpu', '-j', '0', '-b', '6', '--epochs', '2',
           '--warmup-epochs', '0', '--cooldown-epochs', '0', '--lr', '1e-3', '--log-interval', '2')


def make(*words) -> list[str]:
    """make WORDS… in this environment, which it must not install anything into."""
    return ['make', '-s', '-C', str(ROOT), f'VENV={sys.prefix}', '-o', f'{sys.prefix}/.installed', *words]


@pytest.fixture(scope='module')
def runs(image_folder, tmp_path_factory) -> Path:
    """The folder of two runs: `one` has been trained, `two` is a record with another learning rate."""
    folder = tmp_path_factory.mktemp('tensorboard')
    succeeded(run_script('train.py', image_folder, *OPTIONS, '--output', 'runs', '--experiment', 'one', cwd=folder))
    log = RunLog(folder / 'runs/train/two', options={'model': 't2t_vit_7', 'lr': 0.02})
    log.epoch({'epoch': 0, 'images_seen': 36, 'train_loss': 1.5, 'loss': 1.25, 'top1': 50.0, 'top5': 100.0})
    log.wrong_predictions({'weights': (torch.rand(2, 3, 32, 32), ['ant\n→ bee, 90.0%'] * 2)}, 36)
    log.finish()
    log.close()
    return folder / 'runs/train'


@pytest.fixture(scope='module')
def address(runs):
    """Of a server, by the command that people type; it is gone afterwards, with all that it started."""
    server = subprocess.Popen(make('tensorboard', f'DEMO={runs / "one"}', 'PORT=0'), text=True, start_new_session=True,
                              stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        yield _address_in(server)
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait(10)


def _address_in(server) -> str:
    said, end = '', time.monotonic() + SECONDS
    while time.monotonic() < end and select.select([server.stderr], [], [], end - time.monotonic())[0]:
        line = server.stderr.readline()
        said += line
        if found := re.search(r'http://127\.0\.0\.1:\d+/', line):
            return found[0]
        if not line:
            break
    raise AssertionError(f'no TensorBoard after {SECONDS} s: {said}')


@pytest.fixture
def tab(visit, address, tmp_path):
    """name → a Visit of that tab; afterwards nothing is to be wrong with it, and a picture of it is kept."""
    visits = []

    def open_tab(name):
        visits.append(visit(f'{address}#{name}'))
        return visits[-1]

    yield open_tab
    for seen in visits:
        seen.page.screenshot(path=tmp_path / 'page.png')
        assert not seen.errors and not seen.refused, seen
        seen.page.close()


def metrics(runs) -> list[dict]:
    return [json.loads(line) for line in (runs / 'one/metrics.jsonl').read_text().splitlines()]


def test_scalars_are_there_by_name_against_what_the_name_says(tab, runs):
    page = tab('timeseries').page
    for tag, run, x in (('training by images seen/loss', 'one', 72), ('evaluation by images seen/ema_top1', 'one', 72),
                        ('training by images seen/gradient_norm', 'one', 72),
                        ('learning rate by images seen/not decayed', 'one', 72)):
        page.get_by_role('combobox', name='Filter tags (regex)').fill(f'^{tag}$')
        card = page.locator('metrics-filtered-view-component scalar-card', has_text=tag)
        row = card.locator('tb-data-table-content-row', has_text=run)
        row.wait_for()
        assert str(x) in row.inner_text().split(), f'{tag}: {row.inner_text()}'


def test_images_are_there_by_name_and_have_been_loaded(tab):
    page = tab('images').page
    for name, width in (('training by images seen/first batch of the epoch', 4 * 34 + 2),
                        ('evaluation by images seen/wrong predictions of the weights', 368)):
        loader = page.locator('tf-image-loader', has_text=name)
        loader.first.wait_for()
        image = loader.first.locator('img')
        image.wait_for()
        found = image.evaluate("""async image => {
            await image.decode();
            const canvas = new OffscreenCanvas(image.naturalWidth, image.naturalHeight).getContext('2d');
            canvas.drawImage(image, 0, 0);
            const pixels = canvas.getImageData(0, 0, image.naturalWidth, image.naturalHeight).data;
            return [image.naturalWidth, new Set(pixels).size];
        }""")
        assert found[0] >= width and found[1] > 20, f'{name}: {found}'


def test_weights_and_their_average_are_in_one_chart(tab):
    page = tab('custom_scalars').page
    page.get_by_text('top-1 accuracy, %').wait_for()
    page.get_by_text('Matches (3)').nth(2).wait_for()  # in three charts: two of run one, the weights alone of run two
    assert page.get_by_text('Matches (').count() == 3


def test_options_are_there_as_text(tab):
    page = tab('text').page
    page.get_by_text('model: t2t_vit_7').first.wait_for()
    page.get_by_text('lr: 0.02').wait_for()


def test_runs_are_compared_by_some_options_and_their_results(tab, runs):
    page = tab('hparams').page
    page.get_by_text('two').first.wait_for()
    for option in ('lr', 'model', 'weight_decay'):  # in the list beside the table, which draws only what fits
        page.get_by_text(option, exact=True).first.wait_for()
    assert not page.get_by_text('log_interval', exact=True).count(), 'an option by which nobody compares runs'
    cells = [text.strip() for text in page.locator('vaadin-grid-cell-content').all_inner_texts()]
    assert {'one', 'two', 'evaluation by images seen/ema_loss'} <= set(cells)
    numbers = [float(cell) for cell in cells if re.fullmatch(r'[\d.]+', cell)]
    assert any(number == pytest.approx(metrics(runs)[-1]['ema_loss'], rel=1e-4) for number in numbers), cells


def test_without_a_run_the_command_says_what_comes_first(tmp_path):
    result = run_command(make('tensorboard', f'DEMO={tmp_path / "none"}'), cwd=tmp_path)
    assert result.returncode == 2 and 'none: there is no run yet; make demo comes first' in result.stderr
