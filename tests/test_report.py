"""tools/report: a run as one page, which opens in a real browser without a network and says what is missing."""
import re
import shutil

import pytest
import torch
import yaml
from markupsafe import Markup

from engine.log.run_log import RunLog
from engine.predict import Predictions
from models import create_model
from options.parser import Options
from tests.conftest import run_script, succeeded, write_checkpoint, write_images
from tests.test_options import parse
from tools.report import __main__ as report, sections as report_sections
from tools.report.page import table

HEADINGS = ['Summary', 'Curves', 'Epochs', 'Options', 'Environment', 'Mistakes', 'Sample predictions', 'Attention']
CLASSES = ('<img src=x onerror=alert(1)>', 'bee & "wasp"', 'cat')


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """The folder of a run, as training writes it, with class names that would be markup, and its data beside it."""
    root = tmp_path_factory.mktemp('report')
    images = write_images(root / 'data', {'train': 1, 'val': 4}, classes=CLASSES)
    args = parse(str(images), '--model', 't2t_vit_7', '--img-size', '32', '--lr', '1e-3', '--experiment', '<b>r</b>',
                 '--epochs', '3', '--no-model-ema')
    folder = root / 'run'
    log = RunLog(folder, options=args.as_dict(), environment={'device': 'an <i>old</i> machine', 'torch': '2.14'})
    for epoch, (top1, loss) in enumerate(((40.0, 1.5), (75.5, 1.25))):
        for step in (1, 2):
            log.train({'epoch': epoch, 'step': step, 'global_step': 2 * epoch + step, 'images_seen': 1234,
                       'epoch_progress': epoch + step / 2, 'loss': loss, 'lr': 1e-3})
        log.epoch({'epoch': epoch, 'images_seen': 1234, 'train_loss': loss, 'loss': loss, 'top1': top1, 'top5': 100.0,
                   'lr': 1e-3, 'epoch_seconds': 30.0})
    log.close()
    torch.manual_seed(0)
    model = create_model('t2t_vit_7', num_classes=3, img_size=32)
    write_checkpoint({'arch': 't2t_vit_7', 'state_dict': model.state_dict(), 'classes': list(CLASSES),
                      'args': args.as_dict()}, folder / 'model_best.pth.tar')
    return folder


@pytest.fixture(scope='module')
def written(run, tmp_path_factory):
    page = tmp_path_factory.mktemp('page') / 'report.html'
    out = succeeded(run_script('tools/report', run, '-o', page, '--device', 'cpu', '-j', 0, cwd=page.parent))
    assert f'report: {page}' in out
    return page


def test_the_choice_of_the_weights_that_a_training_started_from_is_not_passed_on(tmp_path):
    """The run's own checkpoint has neither that name nor, perhaps, an average."""
    run = report_sections.Run(tmp_path, {'weights_key': 'a', 'use_ema': True, 'model': 't2t_vit_7'}, [], [], [])
    options = report_sections.evaluation_options(run, Options(data='d', device='cpu', workers=0, batch_size=4))
    assert options.model == 't2t_vit_7' and options.weights_key is None and options.use_ema is None


def test_page_opens_without_a_network_and_shows_everything(written, visit, tmp_path):
    seen = visit(written.as_uri())
    page = seen.page
    assert page.title() == page.locator('h1').inner_text() == 't2t_vit_7 on data: 75.50 % top-1'
    assert page.locator('h2').all_inner_texts() == HEADINGS
    assert page.get_by_role('link', name='Mistakes').get_attribute('href') == '#mistakes'
    pictures = page.locator('img').evaluate_all('all => all.map(i => [i.complete && i.naturalWidth, i.alt, i.src])')
    assert len(pictures) == 8
    for width, description, source in pictures:
        assert width > 300 and len(description) > 20 and source.startswith('data:image/png;base64,')
    for theme in ('light', 'dark'):
        page.emulate_media(color_scheme=theme)
        page.screenshot(path=tmp_path / f'{theme}.png', full_page=True)
    page.set_viewport_size({'width': 390, 'height': 800})
    assert page.evaluate('document.documentElement.scrollWidth') <= 390, 'wider than a phone'
    assert not seen.errors and not seen.refused
    assert not re.search(r'<script|<img src=x|https?://|<b>r|<i>old', written.read_text())


def test_page_says_what_the_run_recorded(written, visit):
    page = visit(written.as_uri()).page
    summary = dict(zip(page.locator('#summary dt').all_inner_texts(), page.locator('#summary dd').all_inner_texts(),
                       strict=True))
    assert summary['Best'] == '75.50 % top-1 after epoch 2 (weights)' and summary['Epochs'] == '2 of 3'
    assert summary['Images seen'] == '1,234' and summary['Time of the epochs'] == '0:01:00'
    assert summary['Parameters'] == '3,999,465' and summary['Image size'] == '32'
    marked = page.locator('#epochs tr.marked').all_inner_texts()
    assert [text.split() for text in marked] == [
        ['2', 'best:', 'weights', '1.2500', '1.2500', '75.50', '100.00', '1.00e-03', '30.0']]
    changed = {text.split('\t')[0]: text.split('\t')[1:3] for text in
               page.locator('#options tr.marked').all_inner_texts()}
    assert changed['lr'] == ['0.001', '0.0005'] and changed['model_ema'] == ['off', 'on']
    assert set(changed) == {'data', 'epochs', 'experiment', 'img_size', 'lr', 'model', 'model_ema', 'warmup_epochs',
                            'cooldown_epochs'}  # the last two follow from the epochs
    assert 'an <i>old</i> machine' in page.locator('#environment').inner_text()
    assert 'Of 12 evaluation images, with the weights of model_best' in page.locator('#mistakes').inner_text()
    told = page.locator('#sample-predictions img').evaluate_all('all => all.map(i => i.alt).join()')
    assert all(f'is {name}, said ' in told for name in CLASSES)


def report_on(folder, monkeypatch, *options):
    """The page that tools/report writes, in this process."""
    monkeypatch.setattr('utils.runtime.setup_logging', lambda **_: None)
    monkeypatch.setattr('sys.argv', ['report.py', str(folder), '--device', 'cpu', '-j', '0', *options])
    report.main()
    return (folder / 'report.html').read_text()


def test_what_is_missing_is_said_and_the_rest_is_there(run, tmp_path, monkeypatch):
    partial = shutil.copytree(run, tmp_path / 'partial')
    args = (partial / 'args.yaml').read_text()
    (partial / 'args.yaml').write_text(re.sub(r'(?m)^data: .*$', f'data: {tmp_path}/gone', args))
    text = report_on(partial, monkeypatch)
    assert text.count('could not be computed: data folder') == 3 and '3,999,465' in text
    with pytest.raises(report.UserError, match='data folder .*elsewhere'):  # a mistake, before anything is read
        report_on(partial, monkeypatch, '--data', str(tmp_path / 'elsewhere'))
    (partial / 'model_best.pth.tar').unlink()
    (partial / 'environment.json').unlink()
    (partial / 'metrics.jsonl').write_text((run / 'metrics.jsonl').read_text().splitlines()[0] + '\n')
    text = report_on(partial, monkeypatch)
    assert text.count('the run has no checkpoint yet') == 3 and 'No epoch has ended yet' in text
    assert '0 of 3' in text and 'has not recorded what it was computed on' in text and text.count('<img') == 1
    (partial / 'metrics.jsonl').unlink()
    assert 'The run has recorded nothing yet' in report_on(partial, monkeypatch)
    (partial / 'args.yaml').unlink()
    with pytest.raises(report.UserError, match='is not the folder of a run'):
        report_on(partial, monkeypatch)


def test_best_epoch_is_that_of_the_metric_that_decides():
    def best(metric, *epochs):
        found = report_sections.best_of(report_sections.Run(None, {'eval_metric': metric}, list(epochs), [], []))
        return found and found[0]

    a = {'epoch': 0, 'top1': 9.0, 'ema_top1': 1.0, 'loss': 3.0}
    b = {'epoch': 1, 'top1': 2.0, 'ema_top1': 5.0, 'loss': 4.0}
    assert best('top1', a, b) is b and best('loss', a, b) is a and best('top1') is None
    assert best('top5', a) is None
    lost = {'epoch': 0, 'loss': float('nan')}
    assert best('loss', lost, a, b) is a and best('loss', a, lost) is a and best('loss', lost) is None


def test_damaged_images_are_not_taken_for_left_out_ones():
    def said(found, tried, total):
        return report_sections.of_how_many(report_sections.Evaluated(
            None, Options(eval_checkpoint='a/m.tar'), range(tried), [], Predictions([0] * found, None, None),
            total))

    assert said(12, 13, 13) == 'Of 12 evaluation images, with the weights of m.tar; 1 could not be decoded.'
    assert said(12, 12, 1300) == 'Of 12 evaluation images, evenly spread over all 1,300, with the weights of m.tar.'
    assert 'evenly' in (text := said(1, 3, 9)) and '1 evaluation image,' in text and '2 could not be' in text


def test_data_of_a_run_without_a_folder_is_not_downloaded(run, tmp_path, monkeypatch):
    """CIFAR without DIR, as transfer.py has it by default; and attention of six images whatever the batch size."""
    def refuse(*_, **__):
        raise AssertionError('downloads')

    monkeypatch.setattr('torchvision.datasets.CIFAR10.download', refuse)
    monkeypatch.chdir(tmp_path)
    copy = shutil.copytree(run, tmp_path / 'copy')
    args = yaml.safe_load((copy / 'args.yaml').read_text())
    data = args.pop('data')
    (copy / 'args.yaml').write_text(yaml.safe_dump(args | {'dataset': 'cifar10'}))
    text = report_on(copy, monkeypatch)
    assert text.count('data_cifar') == 3 and text.count('name the folder of the data with --data') == 3
    assert 'Attention of 6 images' in report_on(copy, monkeypatch, '--data', data, '-b', '4')


def test_options_are_written_as_they_are():
    values = (0.99996, [0.08, 1.0], None, '', True, 0, '0-4', 1e-6)
    described = [report_sections.describe_value(value) for value in values]
    assert described == ['0.99996', '0.08 1', '–', "''", 'on', '0', '0-4', '1e-06']


def test_tables_hold_text_not_markup():
    html = table(['a', 'b'], [['1,234', '<x>'], ['–', Markup('<i>y</i>')]], marked=[1])
    assert '<td class=number>1,234</td><td>&lt;x&gt;</td>' in html
    assert '<tr class=marked><td class=number>–</td><td><i>y</i></td></tr>' in html
