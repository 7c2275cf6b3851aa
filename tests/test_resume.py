"""A resumed run ends in the same bytes as one that never stopped: two ranks, everything random switched on."""
import json
import re
import shutil
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import engine.state
from engine.run import _report_differences
from engine.state import TrainState
from options.scripts import train_parser
from tests.conftest import assert_same, launch, run_script, succeeded, write_images
from utils.checkpoint_reader import read_checkpoint
from utils.distributed import World
from utils.runtime import get_rng_state

# Every source of randomness: crops, flips, RandAugment, erasing, Mixup, CutMix, dropout, drop path.
RUN = ('--dataset', 'digits', '--only-classes', '0-2', '--model', 't2t_vit_7', '--img-size', '32', '--device', 'cpu',
       '--model-kwargs', 'embed_dim=32', 'depth=2', 'num_heads=2', '-b', '16', '--epochs', '2', '--warmup-epochs', '0',
       '--cooldown-epochs', '0', '--lr', '1e-3', '--model-ema-decay', '0.9', '--drop', '0.1', '--clip-grad', '1',
       '--accum-steps', '2', '--log-interval', '2', '--checkpoint-steps', '2', '--checkpoint-hist', '100',
       '--no-tensorboard', '--output', 'runs')
TIMES = {'epoch_seconds', 'images_per_second'}
# All that the first version's checkpoints recorded. An option that comes later does by default what was done before it.
OPTIONS_OF_THE_FIRST_VERSION = set('''
    aa accum_steps amp amp_dtype aug aug_splits batch_size bn_eps bn_momentum channels_last checkpoint_hist
    checkpoint_steps clip_grad color_jitter config cooldown_epochs crop_pct cutmix cutmix_minmax data dataset
    decay_epochs decay_rate deterministic device dist_bn download drop drop_block drop_path epochs eval_metric
    experiment gp hflip img_size initial_checkpoint interpolation jsd log_interval lr lr_cycle_limit lr_cycle_mul
    lr_noise lr_noise_pct lr_noise_std max_bad_images max_bad_val_images max_skipped_steps mean min_lr mixup
    mixup_mode mixup_off_epoch mixup_prob mixup_switch_prob model model_ema model_ema_decay model_ema_force_cpu
    model_kwargs momentum num_classes only_classes opt opt_betas opt_eps output pin_mem pretrained ratio recount
    remode reprob resplit resume resume_opt save_images scale sched sched_on_updates seed shard_cache
    shard_cache_size shard_timeout smoothing start_epoch std sync_bn tensorboard timeout train_crop_mode
    train_interpolation train_split use_ema val_fraction val_split validation_batch_size_multiplier vflip
    warmup_epochs warmup_lr weight_decay weights_key workers'''.split())


@pytest.fixture(scope='module')
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp('resume')
    out = succeeded(launch(2, *RUN, '-j', '1', '--experiment', 'whole', '--tensorboard', cwd=folder))
    assert '2 process(es), cpu' in out
    return folder


def records(run):
    lines = [json.loads(line) for line in (run / 'metrics.jsonl').read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMES} for line in lines]


def board(run) -> dict:
    """All that TensorBoard reads of a run: {tag: [(x, y), …]}, of images their size in place of a y."""
    events = EventAccumulator(str(run)).Reload()
    tags = events.Tags()
    return {tag: [(point.step, point.value) for point in events.Scalars(tag)]
            for tag in tags['scalars'] if not any(time in tag for time in TIMES)} | {
        tag: [(image.step, image.height) for image in events.Images(tag)] for tag in tags['images']}


def final_state(run) -> dict:
    """All of the last checkpoint but the options, of which --resume and --experiment differ."""
    return {k: v for k, v in read_checkpoint(run / 'last.pth.tar').items() if k != 'args'}


def test_a_state_holds_what_it_must(uninterrupted):
    content = read_checkpoint(uninterrupted / 'runs/train/whole/last.pth.tar')
    assert {'state_dict', 'state_dict_ema', 'optimizer', 'amp_scaler', 'epoch', 'step', 'global_step', 'best_metric',
            'ranks', 'args', 'classes', 'version', 'arch', 'metric'} <= content.keys()
    assert content['classes'] == ['0', '1', '2'] and content['args']['mixup'] == 0.8 and len(content['ranks']) == 2
    first, second = (rank['rng']['torch'] for rank in content['ranks'])
    assert not torch.equal(first, second), 'ranks must draw different numbers'


@pytest.mark.parametrize(('where', 'workers'), [('middle', '0'), ('end of an epoch', '1')])
def test_resumed_run_ends_in_the_same_bytes(uninterrupted, where, workers):
    whole = uninterrupted / 'runs/train/whole'
    steps_per_epoch = read_checkpoint(whole / 'last.pth.tar')['global_step'] // 2
    assert steps_per_epoch % 2 == 0, 'the checkpoints of the middle and the end must not be the same'
    step = steps_per_epoch + 2 if where == 'middle' else steps_per_epoch
    start = whole / f'checkpoint-{step:08d}.pth.tar'
    content = read_checkpoint(start)
    assert (content['epoch'], content['step']) == (1, step - steps_per_epoch)

    name = where.replace(' ', '_')
    out = succeeded(launch(2, *RUN, '-j', workers, '--experiment', name, '--resume', start, cwd=uninterrupted))
    point = f'in epoch 2, after step {step - steps_per_epoch}' if where == 'middle' else 'after epoch 1'
    assert f'resumed from {start}, {point}\n' in out
    assert 'random weights' not in out
    resumed = uninterrupted / 'runs/train' / name
    assert_same(final_state(whole), final_state(resumed))
    assert records(resumed) == [r for r in records(whole) if r['kind'] == 'epoch' and r['epoch'] == 1
                                or r['kind'] == 'train' and r['global_step'] > step]


@pytest.mark.parametrize(('fault', 'exit_code'), [
    ('evaluate.batch@1#1=term', 75), pytest.param('evaluate.batch@7#0=int', 130, marks=pytest.mark.slow)])
def test_a_signal_in_an_evaluation_saves_and_loses_no_byte(uninterrupted, fault, exit_code):
    """The first signal comes in the evaluation of the weights, the second in that of the average."""
    whole = uninterrupted / 'runs/train/whole'
    steps = read_checkpoint(whole / 'last.pth.tar')['global_step'] // 2
    options = (*RUN, '-j', '1', '--experiment', fault.replace('=', '-'), '--resume', 'auto')
    stopped = launch(2, *options, cwd=uninterrupted, T2T_FAULTS=fault)
    assert stopped.returncode == exit_code, stopped.stderr
    [line] = stopped.stderr.splitlines()
    assert f'the state is saved, in epoch 1, after step {steps}. To go on: ' in line
    run = uninterrupted / 'runs/train' / fault.replace('=', '-')
    assert ('Test (EMA)' in stopped.stdout) == (exit_code == 130)
    assert [r for r in records(run) if r['kind'] == 'epoch'] == []
    succeeded(launch(2, *options, cwd=uninterrupted))
    assert_same(final_state(whole), final_state(run))
    assert records(run) == records(whole)


@pytest.mark.slow
def test_batch_norms_are_shared_once_although_an_evaluation_stopped(tmp_path):
    """The mean of three equal numbers is not always that number."""
    options = ('--dataset', 'digits', '--only-classes', '0-1', '--model', 'test_resnet', '--img-size', '32', '-j', '0',
               '--device', 'cpu', '-b', '16', '--epochs', '1', '--warmup-epochs', '0', '--cooldown-epochs', '0',
               '--no-tensorboard', '--output', 'runs', '--experiment')
    succeeded(launch(3, *options, 'whole', cwd=tmp_path))
    stopped = launch(3, *options, 'stopped', cwd=tmp_path, T2T_FAULTS='evaluate.batch#2=term')
    assert stopped.returncode == 75, stopped.stderr
    succeeded(launch(3, *options, 'stopped', '--resume', 'auto', cwd=tmp_path))
    assert_same(final_state(tmp_path / 'runs/train/whole'), final_state(tmp_path / 'runs/train/stopped'))


def test_resume_auto_continues_in_place_with_one_history(uninterrupted):
    """Cut the run's folder back to a middle, as a crash would leave it, and let --resume auto find its way."""
    whole = uninterrupted / 'runs/train/whole'
    expected, history, shown = final_state(whole), records(whole), board(whole)
    assert 'training by images seen/gradient_norm' in shown
    assert 'evaluation by images seen/wrong predictions of the weights' in shown
    steps = sorted(whole.glob('checkpoint-*.pth.tar'))
    middle = steps[1]
    content = read_checkpoint(middle)
    assert content['images_seen'] == content['global_step'] * 2 * 2 * 16  # ranks, batches a step, images a batch
    for later in steps[2:]:
        later.unlink()
    (whole / 'last.pth.tar').unlink()
    (whole / 'last.pth.tar').hardlink_to(middle)
    # The crash came after lines were written that the checkpoint does not know of, the last of them cut short.
    with open(whole / 'metrics.jsonl', 'a') as file:
        file.write('{"kind": "tra')

    out = succeeded(launch(2, *RUN, '-j', '1', '--experiment', 'whole', '--tensorboard', '--resume', 'auto',
                           cwd=uninterrupted))
    assert 'resumed from' in out
    assert_same(expected, final_state(whole))
    assert records(whole) == history
    assert board(whole) == shown
    starts = json.loads((whole / 'environment.json').read_text())
    assert [start['global_step'] for start in starts] == [0, content['global_step']]
    assert (whole / 'summary.csv').read_text().count('\n') == 3 and (whole / 'curves.png').stat().st_size > 10_000


def test_options_that_an_earlier_version_lacked_did_what_it_did(caplog):
    """Of all options of today, only the faster transforms compute something else by default."""
    now = train_parser().parse_args([]).__dict__
    before = {name: value for name, value in now.items() if name in OPTIONS_OF_THE_FIRST_VERSION}
    _report_differences(before, now)
    assert caplog.messages[0].endswith(': fast_transform False → True')
    caplog.clear()
    _report_differences(before, now | {'fast_transform': False})
    assert not caplog.messages
    _report_differences(before, now | {'fast_transform': False, 'aug_repeats': 3, 'freeze': 'backbone'})
    assert caplog.messages[0].endswith(": aug_repeats 1 → 3, freeze None → 'backbone'")


def test_another_number_of_threads_is_said(caplog):
    """Its sums may be rounded otherwise. The line comes with the state of a rank, without a run."""
    world = World(0, 0, 1, torch.device('cpu'))
    state = SimpleNamespace(world=world, _statistics=list)
    rank = {'rng': get_rng_state(world.device), 'statistics': []}
    with patch.object(engine.state, 'SUMS', ()):
        for threads in ({}, {'threads': torch.get_num_threads()}, {'threads': 63}):
            TrainState._load_rank(state, [{**rank, **threads}])
    [line] = caplog.messages
    assert 'processes with 63 thread(s)' in line and 'OMP_NUM_THREADS=63' in line


def test_other_images_are_refused_within_an_epoch_and_said_at_its_end(tmp_path):
    write_images(tmp_path / 'data', {'train': 8, 'val': 2}, size=(16, 16))
    bee = tmp_path / 'data/train/bee'
    run = ('data', '--model', 't2t_vit_7', '--model-kwargs', 'embed_dim=32', 'depth=1', 'num_heads=2',
           '--img-size', '16', '--device', 'cpu', '-b', '8', '-j', '0', '--epochs', '2', '--warmup-epochs', '0',
           '--cooldown-epochs', '0', '--no-tensorboard', '--output', 'runs', '--experiment', 'a', '--resume')
    stopped = run_script('train.py', *run[:-1], cwd=tmp_path, T2T_FAULTS='step@5=term')
    assert stopped.returncode == 75
    (bee / 'bee_3.jpg').rename(bee / 'a.jpg')
    refused = run_script('train.py', *run, 'auto', cwd=tmp_path)
    assert refused.returncode == 2
    assert 'stands in the middle of an epoch of 24 images with the checksum' in refused.stderr
    assert 'in another order' in refused.stderr and refused.stderr.count('\n') == 1
    shutil.copy(bee / 'a.jpg', bee / 'new.jpg')
    val = tmp_path / 'data/val/bee/bee_0.jpg'
    val.rename(val.with_name('other.jpg'))
    out = succeeded(run_script('train.py', *run, 'runs/train/a/checkpoint-00000003.pth.tar', cwd=tmp_path))
    for kind, now, before in (('training', 25, 24), ('evaluation', 6, 6)):
        assert re.search(f'warning: the {kind} images are others than in the checkpoint.*: {now} images with the '
                         f'checksum [0-9a-f]+, before {before} images', out)


def test_a_checkpoint_of_an_earlier_version_knows_no_images(uninterrupted):
    before = read_checkpoint(uninterrupted / 'runs/train/whole/last.pth.tar')
    assert before['images']['training'].startswith('430 images with the checksum ')
    state = SimpleNamespace(images={'training': '24 images'})
    for saved in ({}, {'images': None}, {'images': {}}, {'images': {'training': 7}}):
        assert not list(TrainState._changed_images(state, saved))
    assert list(TrainState._changed_images(state, before)) == [('training', before['images']['training'])]
