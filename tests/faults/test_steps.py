"""Steps that are not finite, and a change of the number of processes.

    python -m pytest tests/faults/test_steps.py
"""
import json
import sys

import pytest
import torch

from tests.conftest import assert_same, launch, run_script, succeeded
from utils.checkpoint_reader import read_checkpoint
from utils.job import resume_command

RUN = ('--dataset', 'digits', '--only-classes', '0-2', '--model', 't2t_vit_7', '--img-size', '32', '--device', 'cpu',
       '--model-kwargs', 'embed_dim=32', 'depth=2', 'num_heads=2', '-b', '16', '-j', '0', '--epochs', '1',
       '--cooldown-epochs', '0', '--warmup-epochs', '0', '--lr', '1e-3', '--log-interval', '1', '--no-tensorboard',
       '--output', 'runs')


def records(run) -> list[dict]:
    return [json.loads(line) for line in (run / 'metrics.jsonl').read_text().splitlines()]


def state_of(run, name='last.pth.tar') -> dict:
    return read_checkpoint(run / name)


def assert_finite(content: dict) -> None:
    for entry in ('state_dict', 'state_dict_ema'):
        for key, tensor in content[entry].items():
            assert tensor.isfinite().all(), (entry, key)


@pytest.mark.faults
def test_one_bad_step_of_one_rank_is_skipped_by_all(tmp_path):
    """Whichever rank it is, the same step changes nothing, so that both runs end in the same bytes."""
    for rank in (0, 1):
        out = succeeded(launch(2, *RUN, '--experiment', f'rank{rank}', cwd=tmp_path, T2T_FAULTS=f'loss@3#{rank}=nan'))
        assert 'epoch 1, step 3: the gradient is not finite, the step is skipped (1 so far, 1 in a row)' in out
    zero, one = (state_of(tmp_path / f'runs/train/rank{rank}') for rank in (0, 1))
    assert_finite(zero)
    assert zero['skipped_steps'] == one['skipped_steps'] == 1 and zero['skipped_in_a_row'] == 0
    assert_same({**zero, 'args': None}, {**one, 'args': None})
    steps = [record for record in records(tmp_path / 'runs/train/rank1') if record['kind'] == 'train']
    assert [record['skipped_steps'] for record in steps[:4]] == [0, 0, 1, 1]
    assert steps[2]['loss'] is None and all(record['loss'] > 0 for record in steps[:2] + steps[3:])


def test_a_bad_step_leaves_no_trace_in_running_statistics(image_folder, tmp_path):
    out = succeeded(run_script('train.py', image_folder, '--model', 'resnet18', '--img-size', '32', '--device', 'cpu',
                               '-b', '6', '-j', '0', '--epochs', '1', '--warmup-epochs', '0', '--cooldown-epochs', '0',
                               '--lr', '1e30', '--clip-grad', '1', '--experiment', 'bn', cwd=tmp_path))
    assert 'the step is skipped' in out  # after the first step, weights of 1e30 make every activation infinite
    for key, tensor in state_of(tmp_path / 'output/train/bn')['state_dict'].items():
        assert tensor.isfinite().all(), key


@pytest.mark.faults
def test_nan_that_stays_ends_the_run_and_is_never_saved(tmp_path):
    result = launch(2, *RUN, '--checkpoint-steps', '1', '--keep', '100', '--max-skipped-steps', '3',
                    '--experiment', 'run', cwd=tmp_path, T2T_FAULTS='loss@4+#1=nan')
    assert result.returncode == 3, result.stdout + result.stderr
    assert 'the gradient was not finite in 4 steps in a row, up to epoch 1, step 7' in result.stderr
    assert '--amp-dtype bfloat16 helps; --resume auto' in result.stderr and 'Traceback' not in result.stderr
    run = tmp_path / 'runs/train/run'
    checkpoints = sorted(run.glob('checkpoint-*.pth.tar'))
    assert [state_of(run, path.name)['skipped_in_a_row'] for path in checkpoints] == [0, 0, 0, 1, 2, 3]
    for path in checkpoints:
        assert_finite(state_of(run, path.name))
    # What was wrong has gone: the same command goes on, from weights that no bad step has touched.
    out = succeeded(launch(2, *RUN, '--experiment', 'run', '--resume', 'auto', cwd=tmp_path))
    assert 'in epoch 1, after step 6' in out
    assert state_of(run)['skipped_in_a_row'] == 0


# ------------------------------------------------------------------------------------------------------------
# Another number of processes

# Nothing random but the samples and their augmentation, which belong to the sample and not to the rank.
PLAIN = (*RUN[:RUN.index('--model-kwargs')], '--model-kwargs', 'embed_dim=32', 'depth=2', 'num_heads=2',
         'tokens_type=transformer', '-j', '0', '--cooldown-epochs', '0', '--warmup-epochs', '0', '--lr', '1e-3',
         '--opt', 'momentum', '--log-interval', '1', '--no-tensorboard', '--output', 'runs', '--drop-path', '0',
         '--mixup', '0', '--cutmix', '0', '--reprob', '0', '--no-model-ema')


def losses(run) -> torch.Tensor:
    return torch.tensor([record['loss'] for record in records(run) if record['kind'] == 'train'], dtype=torch.float64)


@pytest.mark.faults
def test_one_and_two_processes_compute_the_same(tmp_path, record_property):
    """The gap of the loss over 100 steps of the same global batch; what is left is the order of summation."""
    succeeded(launch(1, *PLAIN, '-b', '32', '--epochs', '8', '--experiment', 'one', cwd=tmp_path))
    succeeded(launch(2, *PLAIN, '-b', '16', '--epochs', '8', '--experiment', 'two', cwd=tmp_path))
    one, two = losses(tmp_path / 'runs/train/one')[:100], losses(tmp_path / 'runs/train/two')[:100]
    assert len(one) == 100
    gap = ((one - two).abs() / one).max().item()
    record_property('loss gap from 1 to 2 processes', f'{gap:.1e}')
    print(f'largest relative gap of the loss over 100 steps: {gap:.1e}')
    assert gap <= 1e-5


@pytest.mark.faults
def test_a_run_goes_on_with_another_number_of_processes(tmp_path):
    """In the middle of an epoch, with the same samples for the same steps; or it is refused with numbers that fit."""
    succeeded(launch(2, *PLAIN, '-b', '16', '--epochs', '1', '--checkpoint-steps', '5', '--keep', '9', '--experiment',
                     'two', cwd=tmp_path))
    start = tmp_path / 'runs/train/two/checkpoint-00000005.pth.tar'
    options = (*PLAIN, '--epochs', '1', '--experiment', 'one', '--resume', start)
    refused = launch(1, *options, '-b', '16', cwd=tmp_path)
    assert refused.returncode == 2 and 'an epoch of 32 images a step, this run has 16' in refused.stderr
    assert 'on 1 process(es) give -b 32 --accum-steps 1' in refused.stderr
    refused = launch(3, *options, '-b', '16', cwd=tmp_path)
    assert '3 processes cannot share 32; start 1, 2, 4, 8, 16, 32 of them' in refused.stderr
    for name, more in (('one', ('-b', '32')), ('accumulated', ('-b', '16', '--accum-steps', '2')),
                       ('shared', ('-b', '16', '--global-batch-size', '32'))):
        succeeded(launch(1, *options, *more, '--experiment', name, cwd=tmp_path))
        torch.testing.assert_close(losses(tmp_path / 'runs/train' / name), losses(tmp_path / 'runs/train/two')[5:],
                                   rtol=1e-4, atol=0)


@pytest.mark.faults
def test_three_processes_end_in_the_same_bytes(tmp_path):
    """From three on, the sum of a gradient depends on where in DDP's buckets it is taken."""
    options = (*RUN, '-b', '8', '--checkpoint-steps', '3', '--keep', '99')
    succeeded(launch(3, *options, '--experiment', 'whole', cwd=tmp_path))
    start = tmp_path / 'runs/train/whole/checkpoint-00000006.pth.tar'
    succeeded(launch(3, *options, '--experiment', 'resumed', '--resume', start, cwd=tmp_path))
    whole, resumed = (state_of(tmp_path / 'runs/train' / name) for name in ('whole', 'resumed'))
    assert_same({**whole, 'args': None}, {**resumed, 'args': None})


@pytest.mark.faults
def test_averaged_running_statistics_survive_a_resume(image_folder, tmp_path):
    """Each rank has its own until the end of an epoch."""
    options = (image_folder, '--model', 'resnet18', '--img-size', '32', '--device', 'cpu', '-b', '4', '-j', '0',
               '--epochs', '1', '--warmup-epochs', '0', '--cooldown-epochs', '0', '--model-ema-decay', '0.9',
               '--dist-bn', 'reduce', '--checkpoint-steps', '2', '--keep', '99', '--output', 'runs')
    succeeded(launch(2, *options, '--experiment', 'whole', cwd=tmp_path))
    start = tmp_path / 'runs/train/whole/checkpoint-00000002.pth.tar'
    succeeded(launch(2, *options, '--experiment', 'resumed', '--resume', start, cwd=tmp_path))
    whole, resumed = (state_of(tmp_path / 'runs/train' / name) for name in ('whole', 'resumed'))
    assert_same({**whole, 'args': None}, {**resumed, 'args': None})


def test_a_stop_that_could_not_save_does_not_say_that_it_has(tmp_path):
    result = launch(2, *RUN, '--experiment', 'run', cwd=tmp_path, T2T_FAULTS='step@3#1=term,save.started@1+#0=full')
    assert result.returncode == 2, result.stdout + result.stderr
    assert 'could not be saved (No space left on device); make room' in result.stderr
    assert 'the state is saved' not in result.stderr


def test_the_command_that_goes_on_does_nothing_twice(monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['train.py', '/data', '--start_epoch', '5', '--no-resume-opt', '--resume=a',
                                      '--start-epoch=6', '--lr', '1', '--resume', 'b'])
    monkeypatch.delenv('TORCHELASTIC_RUN_ID', raising=False)
    assert resume_command('runs/x') == 'python train.py /data --lr 1 --resume runs/x'


def test_plans_of_faults_are_read(monkeypatch):
    from utils import faults
    monkeypatch.setattr(faults, '_passed', {})
    monkeypatch.setenv('T2T_FAULTS', 'a@2=nan,b@2+#0=nan,c#1=nan,d@2!=flip')
    told = {name: [faults.fault_point(name) for _ in range(3)] for name in 'abcd'}
    assert told == {'a': [None, 'nan', None], 'b': [None, 'nan', 'nan'], 'c': [None] * 3, 'd': [None, 'flip', None]}
    monkeypatch.setenv('TORCHELASTIC_RESTART_COUNT', '1')
    monkeypatch.setattr(faults, '_passed', {})
    told = {name: [faults.fault_point(name) for _ in range(3)] for name in 'ad'}
    assert told == {'a': [None] * 3, 'd': [None, 'flip', None]}
