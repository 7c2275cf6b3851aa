"""The root scripts and the launcher through their command lines, on real small data."""

import csv
import importlib
import json
import logging
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml

from models import create_model
from tests.conftest import ROOT, launch, launch_cold, run_command, run_script, run_script_cold, succeeded, write_images
from utils.checkpoint_reader import read_checkpoint
from utils.errors import UserError

SMALL = ('--model', 't2t_vit_7', '--img-size', '32', '--device', 'cpu', '-j', '0')
TRAIN = (*SMALL, '-b', '6', '--epochs', '2', '--warmup-epochs', '0', '--cooldown-epochs', '0', '--lr', '1e-3',
         '--experiment', 'run', '--no-tensorboard')
RUN = Path('output/train/run')


@pytest.fixture(scope='module')
def trained(image_folder, tmp_path_factory):
    """A folder in which `train.py` has been run on the image folder, in bfloat16, with all augmentation."""
    folder = tmp_path_factory.mktemp('trained')
    options = (*TRAIN, '--tensorboard', '--amp', '--save-images', '--log-interval', '2')
    out = succeeded(run_script_cold('train.py', image_folder, *options, cwd=folder))
    (folder / 'stdout').write_text(out)
    return folder


def test_a_run_leaves_everything_in_its_folder(trained):
    run = trained / RUN
    names = {p.name for p in run.iterdir()}
    assert {'args.yaml', 'metrics.jsonl', 'summary.csv', 'curves.png', 'last.pth.tar', 'model_best.pth.tar'} <= names
    assert any(name.startswith('events.out.tfevents') for name in names)
    assert any(name.startswith('train_batch') and name.endswith('.png') for name in names)
    args = yaml.safe_load((run / 'args.yaml').read_text())
    assert (args['model'], args['epochs'], args['mixup'], args['img_size']) == ('t2t_vit_7', 2, 0.8, 32)
    rows = list(csv.DictReader(open(run / 'summary.csv')))
    assert [row['epoch'] for row in rows] == ['1', '2'] and all(float(row['train_loss']) > 0 for row in rows)
    assert {row['count'] for row in rows} == {'15'}
    records = [json.loads(line) for line in open(run / 'metrics.jsonl')]
    assert {r['kind'] for r in records} == {'train', 'epoch'}
    out = (trained / 'stdout').read_text()
    assert '1 process(es), cpu, bfloat16' in out and 'Left: 0:00:0' in out and 'Test: [   1/3]' in out


def test_tensorboard_holds_scalars_options_and_a_batch_of_each_epoch(trained):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(trained / RUN)).Reload()
    seen = 'training by images seen'
    assert {f'{seen}/{name}' for name in ('loss', 'gradient_norm', 'images_per_second', 'skipped_steps')} | {
        'learning rate by images seen/decayed', 'evaluation by images seen/top1',
        'evaluation by images seen/ema_top1'} <= set(events.Tags()['scalars'])
    # 36 images in steps of 6.
    assert [point.step for point in events.Scalars(f'{seen}/loss')] == [6, 12, 24, 36, 42, 48, 60, 72]
    assert [image.step for image in events.Images(f'{seen}/first batch of the epoch')] == [6, 42]
    assert 'options/text_summary' in events.Tags()['tensors']
    records = [json.loads(line) for line in open(trained / RUN / 'metrics.jsonl')]
    last = [record for record in records if record['kind'] == 'train'][-1]
    assert last['images_seen'] == 72 and last['gradient_norm'] > 0
    assert last['rates'] == {'decayed': last['lr'], 'not decayed': last['lr']}
    start, = json.loads((trained / RUN / 'environment.json').read_text())
    assert (start['processes'], start['precision'], start['torch']) == (1, 'bfloat16', torch.__version__)


def test_validate_finds_the_accuracy_that_training_reported(trained, image_folder, tmp_path):
    """Without train/; the weights on one process, their average on two, each give the numbers of the last epoch."""
    reported = [json.loads(line) for line in open(trained / RUN / 'metrics.jsonl')][-1]
    shutil.copytree(image_folder / 'val', tmp_path / 'data/val')
    options = (tmp_path / 'data', *SMALL, '-b', '4', '--eval_checkpoint', trained / RUN / 'last.pth.tar', '--amp')
    one = (*options, '--no-use-ema', '--results-file', 'one.json')
    out = succeeded(run_script_cold('validate.py', *one, cwd=tmp_path))
    result = json.loads((tmp_path / 'one.json').read_text())
    assert result['top1'] == reported['top1'] and result['count'] == 15
    assert result['loss'] == pytest.approx(reported['loss'], rel=1e-2)
    assert f'Top-1 accuracy of the model is: {result["top1"]:.1f}%' in out
    assert json.loads(out[out.index('{') : out.rindex('}') + 1]) == result
    row = next(csv.DictReader(open(tmp_path / 'one.csv')))
    assert {'top1', 'top5', 'loss', 'count', 'images_per_second', 'parameters', 'crop_pct', 'interpolation'} <= set(row)
    assert float(row['top1']) == result['top1'] and int(row['parameters']) == result['parameters']

    succeeded(launch_cold(2, *options, '--use-ema', '--results-file', 'two', cwd=tmp_path, SCRIPT='validate.py'))
    on_two = json.loads((tmp_path / 'two.json').read_text())
    assert (on_two['count'], on_two['processes'], on_two['top1']) == (15, 2, reported['ema_top1'])
    assert on_two['loss'] == pytest.approx(reported['ema_loss'], rel=1e-2)


def test_validate_finds_model_and_size_in_the_checkpoint(trained, image_folder, tmp_path):
    """Recorded in a run of ours, of any model; inferred from the weights of a release."""
    runs = {'ours': trained / RUN / 'last.pth.tar', 'release': tmp_path / 'release.pth.tar'}
    state = read_checkpoint(runs['ours'])['state_dict_ema']
    torch.save({'state_dict_ema': state}, runs['release'])
    results = {}
    for name, path in runs.items():
        succeeded(run_script('validate.py', image_folder, *SMALL[4:], '--eval-checkpoint', path, '--use-ema',
                             '--results-file', name, cwd=tmp_path))
        results[name] = json.loads((tmp_path / f'{name}.json').read_text())
        assert (results[name]['model'], results[name]['img_size']) == ('t2t_vit_7', [32, 32])
    assert results['ours']['loss'] == results['release']['loss']


def test_validate_an_official_release_by_its_old_name(image_folder, tmp_path):
    torch.manual_seed(1)
    model = create_model('t2t_vit_7', num_classes=3, img_size=32)
    torch.save({'state_dict_ema': model.state_dict()}, tmp_path / 'release.pth.tar')
    out = succeeded(run_script('validate.py', image_folder / 'val', '--model', 'T2t_vit_7', *SMALL[2:],
                               '--eval_checkpoint', tmp_path / 'release.pth.tar', cwd=tmp_path))
    assert 'Top-1 accuracy of the model is:' in out
    assert len(list((tmp_path / 'output/validate').glob('*-t2t_vit_7-32.json'))) == 1


@pytest.mark.parametrize('name', ['resnet18', 'deit_tiny_patch16_224'])
def test_any_timm_model_trains_and_validates(image_folder, tmp_path, name):
    options = ('--model', name, *SMALL[2:], '-b', '6')
    out = succeeded(run_script('train.py', image_folder, *options, '--epochs', '1', '--cooldown-epochs', '0',
                               '--no-model-ema', '--warmup-epochs', '0', '--experiment', 'run', cwd=tmp_path))
    assert 'Epoch 1: Acc@1' in out
    succeeded(run_script('validate.py', image_folder, *options, '--eval-checkpoint', tmp_path / RUN / 'last.pth.tar',
                         cwd=tmp_path))


def test_transfer_replaces_the_head_and_leaves_nothing_out(trained, tmp_path):
    target = write_images(tmp_path / 'target', {'train': 6, 'val': 2}, classes=('dog', 'eel'), seed=1)
    source = trained / RUN / 'last.pth.tar'
    out = succeeded(run_script_cold('transfer.py', target, *SMALL, '--lr', '0.05', '--b', '4', '--num-classes', '2',
                                    '--epochs', '2', '--transfer-learning', 'True', '--transfer-model', source,
                                    '--experiment', 'run', cwd=tmp_path))
    assert 'classifier not loaded: the weights have 3 classes, the model has 2 classes' in out
    before = read_checkpoint(source)['state_dict_ema']
    content = read_checkpoint(tmp_path / 'output/transfer/run/last.pth.tar')
    after = content['state_dict']
    assert after['head.weight'].shape == (2, 256) and content['classes'] == ['dog', 'eel']
    trainable = {n for n, _ in create_model('t2t_vit_7', num_classes=2, img_size=32).named_parameters()}
    unmoved = [n for n in trainable if not n.startswith('head') and torch.equal(before[n], after[n])]
    assert not unmoved, f'not optimised: {unmoved}'
    assert all((before[n] - after[n]).abs().max() < 0.05 for n in trainable if not n.startswith('head'))

    out = succeeded(run_script('transfer.py', target, *SMALL, '--b', '4', '--epochs', '1', '--transfer-learning',
                               'False', '--experiment', 'scratch', cwd=tmp_path))
    assert 'random weights' in out and 'loaded from' not in out


def test_gradient_accumulation_equals_the_larger_batch(image_folder, tmp_path):
    """Without randomness, one step of 12 and one of 2 × 6 lead to the same weights up to rounding."""
    plain = ('--no-aug', '--mixup', '0', '--cutmix', '0', '--drop-path', '0', '--opt', 'sgd', '--no-model-ema',
             '--epochs', '1', '--warmup-epochs', '0', '--cooldown-epochs', '0', '--lr', '0.01', '--no-tensorboard')
    # The Performer's dropouts are part of the model; Transformer tokens have none.
    kwargs = ('tokens_type=transformer', 'embed_dim=32', 'depth=2', 'num_heads=2')
    model = (*SMALL, '--model-kwargs', *kwargs)
    for name, sizes in (('one', ('-b', '12')), ('two', ('-b', '6', '--accum-steps', '2'))):
        succeeded(run_script('train.py', image_folder, *model, *plain, *sizes, '--experiment', name, cwd=tmp_path))
    one, two = (read_checkpoint(tmp_path / 'output/train' / n / 'last.pth.tar') for n in ('one', 'two'))
    assert one['global_step'] == two['global_step'] == 3
    for key, value in one['state_dict'].items():
        torch.testing.assert_close(value, two['state_dict'][key], rtol=1e-3, atol=1e-5)


def test_weights_that_are_not_finite_are_never_saved(image_folder, tmp_path):
    result = run_script('train.py', image_folder, *TRAIN, '--lr', '1e30', '--checkpoint-steps', '1', cwd=tmp_path)
    assert result.returncode == 3 and 'the gradient was not finite in any step of epoch 2. A lower' in result.stderr
    for checkpoint in (tmp_path / RUN).glob('*.pth.tar'):
        weights = read_checkpoint(checkpoint)['state_dict'].values()
        assert all(w.isfinite().all() for w in weights), checkpoint


def test_augmix_splits_train(image_folder, tmp_path):
    out = succeeded(run_script('train.py', image_folder, *TRAIN, '--epochs', '1', '--aug-splits', '3', '--jsd', '--aa',
                               'augmix-m3', '--resplit', '--mixup', '0', '--cutmix', '0', '--sched', 'step',
                               cwd=tmp_path))
    assert 'Epoch 1: Acc@1' in out


# --- Mistakes ---------------------------------------------------------------------------------------------------------


def mistakes(tmp: Path, images: Path, checkpoint: Path) -> dict:
    """name → (script, options, what the line must say)."""
    (tmp / 'empty').mkdir()
    (tmp / 'text.pth.tar').write_text('not a checkpoint')
    torch.save({'conv.weight': torch.zeros(3)}, tmp / 'unknown.pth')
    write_images(tmp / 'unmatched', {'train': 1, 'val': 1})
    write_images(tmp / 'other', {'train': 2, 'val': 1}, classes=('dog', 'eel', 'fox'))
    shutil.rmtree(tmp / 'unmatched/val/bee')
    good = (images, *TRAIN)
    return {
        'option': ('train.py', (*good, '--lrr', '1'), '--lrr: no such option; did you mean --lr?'),
        'value': ('train.py', (*good, '--lr', 'x'), "--lr: 'x' is not a number"),
        'no data': ('train.py', TRAIN, 'no data: give the folder'),
        'model': ('train.py', (images, '--model', 't2t_vit_15', '--device', 'cpu'),
                  "'t2t_vit_15' does not exist; did you mean t2t_vit_1"),
        'dataset': ('train.py', (*good, '--dataset', 'cifar11'), "invalid choice: 'cifar11'"),
        'device': ('train.py', (*good, '--device', 'gpu'), '--device gpu: no such device'),
        'folder': ('train.py', (tmp / 'nowhere', *TRAIN), 'nowhere'),
        'no images': ('train.py', (tmp / 'empty', *TRAIN), 'empty'),
        'one level down': ('train.py', (images / 'train', *TRAIN), 'train'),
        'missing class': ('train.py', (tmp / 'unmatched', *TRAIN), 'bee'),
        'few classes': ('train.py', (*good, '--num-classes', '2'), '--num-classes 2: the data set has 3 classes'),
        'large batch': ('train.py', (*good, '-b', '64'), '36'),
        'odd batch': ('train.py', (*good, '-b', '5'), 'even'),
        'small image': ('train.py', (*good, '--img-size', '8'), '16'),
        'optimizer': ('train.py', (*good, '--opt', 'adamww'), 'did you mean adamw?'),
        'policy': ('train.py', (*good, '--aa', 'randm9'), 'randm9'),
        'recipe': ('train.py', (*good, '-c', 'no.yaml'), '-c no.yaml'),
        'resume': ('train.py', (*good, '--resume', 'no.pth.tar'), '--resume no.pth.tar: no such checkpoint'),
        'resume text': ('train.py', (*good, '--resume', tmp / 'text.pth.tar'), 'text.pth.tar'),
        'resume other': ('train.py', (images, *TRAIN, '--model', 't2t_vit_10', '--resume', checkpoint),
                         'say --model t2t_vit_7'),
        'resume size': ('train.py', (*good, '--num-classes', '5', '--resume', checkpoint),
                        'head.weight (3, 256) in the file'),
        'resume done': ('train.py', (*good, '--resume', checkpoint), 'nothing is left to train'),
        'overwrite': ('train.py', (*good, '--output', checkpoint.parents[2]), '--experiment run: that run exists'),
        'resume opt': ('train.py', (*good, '--opt', 'sgd', '--resume', checkpoint), 'its optimizer is adamw'),
        'resume data': ('train.py', (tmp / 'other', *TRAIN, '--resume', checkpoint),
                        'trained on 3 classes (ant, bee, cat), this data set has 3 classes (dog, eel, fox)'),
        'output': ('train.py', (*good, '--output', tmp / 'text.pth.tar'), '--output: '),
        'initial': ('train.py', (*good, '--initial-checkpoint', 'no.pth'), 'no.pth does not exist'),
        'initial is not eval': ('validate.py', (images, *SMALL, '--initial-checkpoint', checkpoint),
                                'which weights? give --checkpoint'),
        'what model': (
            'validate.py',
            (images, *SMALL[4:], '--eval-checkpoint', tmp / 'unknown.pth'),
            'does not record its model (an architecture not known here (1 tensors, the first conv.weight)); '
            'give --model',
        ),
        'model kwargs': ('train.py', (*good, '--model-kwargs', 'dept=3'), 'takes no argument dept'),
        'what to validate': ('validate.py', (images, *SMALL), 'which weights?'),
        'other model': ('validate.py', (images, *SMALL[2:], '--model', 't2t_vit_10', '--eval-checkpoint', checkpoint),
                        't2t_vit_7'),
        'other data': ('validate.py', ('--dataset', 'digits', *SMALL, '--eval-checkpoint', checkpoint), 'class'),
        'class map': ('validate.py', (images, *SMALL, '--eval-checkpoint', checkpoint, '--class-map', 'no.txt'),
                      'no.txt'),
        'transfer from what': ('transfer.py', (images, *SMALL, '--transfer-learning', 'True'), 'from what?'),
        'transfer off': ('transfer.py', (images, *SMALL, '--transfer-model', checkpoint, '--transfer-learning', 'no'),
                         'leave one of the two out'),
        'truth': ('transfer.py', (images, *SMALL, '--transfer-learning', 'maybe'), "'maybe' is neither True nor False"),
    }


def files_of(*folders: Path) -> dict:
    return {p: p.stat().st_mtime_ns for folder in folders for p in folder.rglob('*') if p.is_file()}


def test_every_mistake_is_one_line_that_helps_and_nothing_is_written(trained, image_folder, tmp_path, monkeypatch):
    """In this process, since each script takes seconds to start; how a UserError ends a process is tested below."""
    table = mistakes(tmp_path, image_folder, trained / RUN / 'last.pth.tar')
    before, work = files_of(trained, image_folder), tmp_path / 'work'
    work.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.setattr(logging.getLogger(), 'handlers', [])
    wrong = []
    for name, (script, options, said) in table.items():
        monkeypatch.setattr(sys, 'argv', [script, *map(str, options)])
        try:
            importlib.import_module(script.removesuffix('.py')).main()
            wrong.append(f'{name}: no error')
        except UserError as error:
            if said not in str(error) or '\n' in str(error) or error.exit_code != 2:
                wrong.append(f'{name}: expected {said!r}, got {str(error)!r}')
        if list(work.iterdir()):
            wrong.append(f'{name}: wrote {list(work.iterdir())}')
            shutil.rmtree(work)
            work.mkdir()
    assert not wrong, '\n\n'.join(wrong)
    assert before == files_of(trained, image_folder)


@pytest.mark.parametrize('name', ['option', 'missing class', 'resume text', 'what to validate', 'truth'])
def test_a_mistake_ends_a_script_with_exit_code_2(trained, image_folder, tmp_path, name):
    script, options, said = mistakes(tmp_path, image_folder, trained / RUN / 'last.pth.tar')[name]
    result = run_script(script, *options, cwd=tmp_path)
    assert result.returncode == 2
    assert len(result.stderr.strip().splitlines()) == 1 and said in result.stderr
    assert result.stderr.startswith(f'{script}: error: ')


def test_launcher_says_a_mistake_once_with_exit_code_2(tmp_path, image_folder):
    one_line = {'model': launch(2, image_folder, *TRAIN[2:], '--model', 'nothing_like_it', cwd=tmp_path),
                'number': launch('eight', image_folder, cwd=tmp_path),
                'script': launch(1, cwd=tmp_path, SCRIPT='trian.py'),
                'nodes': launch(1, *TRAIN, cwd=tmp_path, NNODES='2')}
    if torch.cuda.device_count() < 64:
        one_line['GPUs'] = launch(64, image_folder, '--model', 't2t_vit_7', cwd=tmp_path)
    for name, result in one_line.items():
        assert result.returncode == 2, f'{name}: {result}'
        assert len(result.stderr.strip().splitlines()) == 1, f'{name}: {result.stderr}'
        assert result.stderr.startswith(('launcher.py: error: ', 'train.py: error: ')), f'{name}: {result.stderr}'
    assert "'nothing_like_it' does not exist" in one_line['model'].stderr
    assert not list(tmp_path.iterdir())


def test_launcher_quotes_options_through_and_passes_exit_codes(tmp_path):
    script = tmp_path / 'echo.py'
    script.write_text(
        'import os, sys\nprint(sys.argv[1:], os.environ["WORLD_SIZE"], flush=True)\n'
        'sys.exit(7 if os.environ["RANK"] == "0" else 0)\n'
    )
    result = run_command(
        [sys.executable, '-m', 'launch.launcher', '1', script, '--device', 'cpu', 'a b', '--x', '$HOME *'],
        cwd=tmp_path,
        PYTHONPATH=str(ROOT),
    )
    assert "['--device', 'cpu', 'a b', '--x', '$HOME *'] 1" in result.stdout
    assert result.returncode == 7, result


@pytest.mark.slow
def test_two_nodes_on_one_machine_make_one_run(tmp_path, image_folder):
    """Two launchers, each a node of one process, meet at an address and train together."""
    import socket
    import subprocess

    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        port = probe.getsockname()[1]
    options = [str(o) for o in (image_folder, *TRAIN, '--epochs', '1', '--no-tensorboard')]
    env = {**os.environ, 'PYTHON': sys.executable, 'NNODES': '2', 'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': str(port)}
    nodes = [
        subprocess.Popen([ROOT / 'distributed_train.sh', '1', *options], cwd=tmp_path, text=True,
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env, start_new_session=True)
        for _ in range(2)
    ]
    try:
        outputs = [node.communicate(timeout=200) for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    assert [node.returncode for node in nodes] == [0, 0], outputs
    assert sorted(('2 process(es), cpu' in out, 'Epoch 1: Acc@1' in out) for out, _ in outputs) == [
        (False, False), (True, True)]  # rank 0 speaks for both, whichever it is


def test_help_answers_at_once_and_names_every_group(tmp_path):
    for script in ('train.py', 'validate.py', 'transfer.py'):
        out = succeeded(run_command([sys.executable, '-X', 'importtime', ROOT / script, '--help'], cwd=tmp_path))
        assert 'Data:' in out and '--model' in out
    result = run_command([sys.executable, '-X', 'importtime', ROOT / 'train.py', '--help'], cwd=tmp_path)
    assert 'torch' not in result.stderr, '--help must not wait for torch'
