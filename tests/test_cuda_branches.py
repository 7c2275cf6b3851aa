"""Every place that is about GPUs is run by a scenario with a stand-in or by a test elsewhere, or it says why not.

    python -m pytest tests/test_cuda_branches.py

Such places are found in the syntax tree of all code but tests (see tests/cuda_places.py). A scenario is a function of
this file that is given the stand-in; it is run under a trace, and all that a GPU has of the function must have run. A
new place fails until it is in RUN_BY or ONLY_A_GPU; one that is gone fails until it is out of them.
"""
import contextlib
import functools
import json
import logging
import os
import sys
import tempfile
from argparse import Namespace
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import create_autospec, patch

import pytest
import torch
import torch.distributed as dist
from timm.data import Mixup
from torch import nn
from torch.autograd import DeviceType
from torch.utils.data._utils import pin_memory as pinning

from benchmarks import convergence, step as step_benchmark, targets
from benchmarks.scaling import plans as scaling
from benchmarks.shared import measure, published, ranks, records
from data import pipeline
from data.batch import BatchPreparer, TrainBatchPreparer
from data.folders import ImageFolder
from data.loader import create_loader
from data.samplers import EvalSampler
from data.transforms import create_eval_transform
from engine import loop
from engine.checks import check_run_options
from engine.log.run_log import RunLog
from engine.objective import Objective
from engine.run import create_state
from launch import launcher as launch
from models import layers
from tests.conftest import ROOT, run_command, succeeded, warm, write_images
from tests.cuda_places import Trace, find_places, missing
from tests.cuda_stand_in import GPU, Gpu, Stream, bytes_of, pinned, stand_in
from tests.test_options import parse
from tests.test_step import Options, WithStatistics, batch, make
from utils import distributed, runtime
from utils.distributed import World
from utils.errors import UserError
from utils.watch import DeviceMarks

CPU = torch.device('cpu')
ONE = World(rank=0, local_rank=0, size=1, device=GPU)
BATCH = 4


# --- Batches ---------------------------------------------------------------------------------------------------------

def a_pinned_batch_is_copied_while_the_gpu_computes(gpu: Gpu):
    with gpu.tensors():
        prepare = BatchPreparer('cuda:0', channels_last=True)
        gpu.notes.clear()
        images, targets = prepare(pinned(bytes_of(BATCH, 3, 8, 8)), pinned(torch.arange(BATCH)))
    # Behind the copy the stream that computes waits for it, and the memory stays until that stream has read it.
    moved = [('side 1', 'copies to the GPU', 'without waiting'), ('computing', 'waits for', 'side 1'),
             ('kept until', 'computing')]
    assert gpu.notes[:6] == 2 * moved
    assert {(stream, what) for stream, what, *_ in gpu.notes[6:]} == {('computing', 'computes')}
    assert images.device == targets.device == GPU and images.dtype == torch.float32
    assert images.is_contiguous(memory_format=torch.channels_last)


def a_batch_that_is_not_pinned_is_waited_for(gpu: Gpu):
    """A worker process fills its memory again as soon as it is given back: the copy must have ended by then."""
    with gpu.tensors():
        prepare = BatchPreparer('cuda:0')
        gpu.notes.clear()
        prepare(bytes_of(BATCH, 3, 8, 8), torch.arange(BATCH))
    assert gpu.notes[:2] == 2 * [('computing', 'copies to the GPU', 'waiting')]
    assert {(stream, what) for stream, what, *_ in gpu.notes[2:]} == {('computing', 'computes')}


def training_batches_are_mixed_and_erased_on_the_gpu(gpu: Gpu):
    with gpu.tensors():
        prepare = TrainBatchPreparer('cuda:0', batch_size=BATCH, num_classes=3, mixup_alpha=0.8, cutmix_alpha=1.0,
                                     erase_prob=1.0)
        gpu.notes.clear()
        images, targets = prepare(bytes_of(BATCH, 3, 8, 8), torch.arange(BATCH) % 3)
        split, labels = TrainBatchPreparer('cuda:0', batch_size=2, num_classes=3, aug_splits=3)(
            pinned(bytes_of(2, 3, 3, 8, 8)), pinned(torch.arange(2)))
    assert type(prepare._mixup) is Mixup  # pair by pair would be a launch for each image
    assert images.device == targets.device == split.device == labels.device == GPU
    assert targets.shape == (BATCH, 3) and split.shape == (6, 3, 8, 8) and labels.shape == (6,)
    assert not [note for note in gpu.notes if note[1] == 'copies to the host']


def loaders_pin_what_goes_to_a_gpu(gpu: Gpu):
    with patch.object(pipeline, 'create_loader', autospec=True) as create, gpu.tensors():
        for words, device, pins in (((), GPU, True), (('--no-pin-mem',), GPU, False),
                                    ((), torch.device('cpu'), False)):
            args, world = parse('/data', '-b', str(BATCH), *words), replace(ONE, device=device)
            dataset = create_autospec(ImageFolder, instance=True)
            dataset.__len__.return_value, dataset.shard_offsets.return_value = 8, None
            image = pipeline.resolve_input(args, {})
            pipeline._create_train_loader(args, dataset, image, 3, world)
            pipeline.create_eval_loader(args, dataset, image, world)
            assert [call.kwargs['pin_memory'] for call in create.call_args_list[-2:]] == [pins, pins]


def shared_memory_is_given_back_once_it_is_copied_to_pinned_memory(gpu: Gpu):
    """A worker process may fill a block anew when it is free; the copies to the GPU start at pinned memory alone."""
    count, taken = 40, []

    def pin(content, device=None):
        images, block, targets, *others = content
        before, copied = loader._memory._taken[block].item(), images.clone()
        taken.append((block, before, loader._memory._taken[block].item()))
        assert images.is_shared()
        return pinned(copied), block, pinned(targets.clone()), *others

    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as patches:
        dataset = ImageFolder(write_images(Path(folder), {'val': count // 2}, classes=('ant', 'bee')) / 'val')
        transform = create_eval_transform(8)
        expected = torch.stack([transform(dataset.image(index)) for index in range(count)])
        gpu.answer(torch.accelerator, is_available=True, current_accelerator=torch.device('cuda'),
                   current_device_index=0, set_device_index=None)
        patches.enter_context(patch.object(pinning, 'pin_memory', pin))
        loader = create_loader(dataset, transform, EvalSampler(count, BATCH), workers=1, pin_memory=True)
        for number, (images, targets) in enumerate(loader):
            assert images.is_pinned() and targets.is_pinned() and not images.is_shared()
            assert torch.equal(images, expected[number * BATCH:(number + 1) * BATCH])
            assert not loader._memory._taken[taken[number][0]] or len(taken) > number + 1
        loader.close()
    assert [states for _, *states in taken] == [[1, 1]] * (count // BATCH)
    assert len({block for block, *_ in taken}) <= loader.blocks < count // BATCH  # they were used again


# --- Training --------------------------------------------------------------------------------------------------------

def ddp_is_told_its_gpu(gpu: Gpu):
    world = World(rank=1, local_rank=1, size=2, device=torch.device('cuda', 1))
    with patch.object(loop, 'DistributedDataParallel') as wrap:
        loop.wrap_model(nn.Linear(2, 2), world)
    assert wrap.call_args.kwargs['device_ids'] == [torch.device('cuda', 1)]


def sync_bn_is_for_gpus(gpu: Gpu):
    state, _ = make()
    args, world = Options(**state.options | {'sync_bn': True, 'model_ema': False}), replace(ONE, size=2)
    model = WithStatistics()
    with gpu.tensors():
        made = create_state(args, model, state.optimizer, state, ['a'], world)
    assert isinstance(made.model.norm, nn.SyncBatchNorm) and made.model.norm.weight.device == GPU
    assert made.loss_sums.device == GPU
    options = parse('/data', '--sync-bn', '--opt', 'adamw')
    with tempfile.TemporaryDirectory() as folder:
        check_run_options(options.replacing(output=folder), world, kind='train')
        with pytest.raises(UserError, match='--sync-bn'):
            check_run_options(options.replacing(output=folder), replace(world, device=CPU), kind='train')


def a_log_line_says_how_full_the_gpu_was(gpu: Gpu):
    state, _ = make()
    batches = SimpleNamespace(train_loader=[0] * 4, prepare_train=lambda *batch: batch, val_loader=None,
                              prepare_val=None, class_names=['a', 'b', 'c'])
    trainer = loop.Trainer(state, Objective(state.model, nn.CrossEntropyLoss()), batches, schedule=None, num_epochs=1,
                           precision=runtime.Precision(torch.device('cpu'), enabled=False),
                           args=Options(**state.options), folder=Path(),
                           log=create_autospec(RunLog, instance=True), writer=None)
    trainer._steps_since_start = 1
    trainer._step(iter([batch(0)]))
    gpu.answer(max_memory_allocated=3 << 30)
    for device, expected in ((torch.device('cpu'), None), (GPU, 3.0)):
        state.world = replace(state.world, device=device)
        trainer._log_line(create_autospec(loop.progress_bar(total=1)), 0., state.window_sums, 0)
        assert trainer.log.train.call_args.args[0].get('gpu_memory_gib') == expected


def attention_on_a_gpu_is_one_kernel(gpu: Gpu):
    with gpu.tensors():
        q = torch.zeros(1, 2, 5, 8, device='cuda', dtype=torch.bfloat16)
        gpu.notes.clear()
        with patch.object(layers, 'HAS_MATRIX_UNITS', False), \
                patch.object(layers.F, 'scaled_dot_product_attention') as kernel_called:
            layers.attention(q, q, q, scale=1.)
    assert kernel_called.call_count == 1 and not gpu.notes


# --- The process -----------------------------------------------------------------------------------------------------

def generators_of_the_gpu_are_saved_and_put_back(gpu: Gpu):
    saved = torch.tensor([1, 2], dtype=torch.uint8)
    gpu.answer(get_rng_state=saved, set_rng_state=None)
    state = runtime.get_rng_state(GPU)
    assert state['cuda'] is saved and gpu.notes == [('get_rng_state', GPU)]
    runtime.set_rng_state(state, GPU)
    assert gpu.asked() == ['get_rng_state', 'set_rng_state'] and gpu.notes[1][1] is saved and gpu.notes[1][2] == GPU
    runtime.set_rng_state({**state, 'cuda': None}, GPU)  # of a checkpoint that a CPU has written
    assert runtime.get_rng_state(torch.device('cpu'))['cuda'] is None and len(gpu.notes) == 2


def precision_is_what_the_gpu_has(gpu: Gpu):
    has = {'bfloat16': True}
    gpu.answer(is_bf16_supported=lambda including_emulation: has['bfloat16'])
    assert runtime.Precision(GPU, enabled=True).dtype is torch.bfloat16
    has['bfloat16'] = False
    with patch.object(torch.amp, 'GradScaler') as scaler:
        assert runtime.Precision(GPU, enabled=True).dtype is torch.float16
    scaler.assert_called_once_with('cuda', enabled=True)
    assert runtime.Precision(GPU, enabled=False).dtype is None
    records.check_precisions(['fp16'], GPU)
    with pytest.raises(UserError, match='fp16'):
        records.check_precisions(['fp16'], torch.device('cpu'))


def a_process_starts_on_its_gpu(gpu: Gpu):
    gpu.answer(device_count=8, set_device=None, is_bf16_supported=True)
    with patch.object(runtime, 'setup_logging'), patch.object(runtime, 'keep_freed_memory') as keep, alone():
        world, precision = runtime.start(parse('/data', '--amp'))
    assert world.device == GPU and str(precision) == 'bfloat16' and not keep.called
    assert gpu.asked().index('device_count') < gpu.asked().index('set_device') and ('set_device', GPU) in gpu.notes


@contextlib.contextmanager
def alone(**environment: str):
    """As a process that `environment` describes, by torchrun's names; flags that it sets are as before in the end."""
    names = ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'LOCAL_WORLD_SIZE')
    cudnn = torch.backends.cudnn
    before = cudnn.benchmark, cudnn.allow_tf32, logging.root.manager.disable
    with patch.dict(os.environ, environment):
        for name in set(names) - environment.keys():
            os.environ.pop(name, None)
        try:
            yield
        finally:
            cudnn.benchmark, cudnn.allow_tf32 = before[:2]
            logging.disable(before[2])


def ranks_meet_over_nccl_each_on_its_gpu(gpu: Gpu):
    mine = torch.device('cuda', 1)
    gpu.answer(device_count=2, set_device=None)
    gpu.answer(dist, init_process_group=None, new_group=create_autospec(dist.ProcessGroup, instance=True))
    with alone(RANK='3', WORLD_SIZE='4', LOCAL_RANK='1', LOCAL_WORLD_SIZE='2', MASTER_ADDR='node', MASTER_PORT='1'), \
            gpu.tensors(), \
            patch.object(distributed, '_meet', lambda *_: dist.HashStore()), \
            patch.object(distributed, '_progress') as progress:
        world = distributed.init_process_group('auto', timedelta(seconds=5))
    assert world == World(rank=3, local_rank=1, size=4, device=mine, local_size=2)
    assert progress.start.call_count == 1
    asked = gpu.asked()
    assert ('set_device', mine) in gpu.notes and asked.index('set_device') < asked.index('init_process_group')
    how = gpu.notes[asked.index('init_process_group')]
    assert how[1] == 'nccl' and ('device_id', mine) in how and {('rank', 3), ('world_size', 4)} <= set(how[2:])


def a_mark_is_a_copy_that_nobody_waits_for(gpu: Gpu):
    with gpu.tensors():
        mark = DeviceMarks(GPU)
        gpu.notes.clear()
        mark()
    assert [what for what in gpu.notes if what[1] == 'copies to the host'] == [
        ('computing', 'copies to the host', 'without waiting')]


def devices_by_name(gpu: Gpu):
    gpu.answer(device_count=2)
    found = [distributed._device(name, rank, size) for name, rank, size in (
        ('auto', 1, 2), ('cuda', 0, 1), ('cuda:1', 0, 1), ('cpu', 0, 9))]
    assert list(map(str, found)) == ['cuda:1', 'cuda:0', 'cuda:1', 'cpu']
    for name, size in (('cuda:2', 1), ('cuda', 3), ('cuda:0', 2), ('meta', 1), ('gpu', 1)):
        with pytest.raises(UserError, match=f'--device {name}'):
            distributed._device(name, 0, size)


def more_processes_than_gpus(gpu: Gpu):
    gpu.answer(device_count=8)
    with pytest.raises(UserError, match='NUM_PROC 9: this machine has 8'):
        launch.launch(9, 'train.py', ['/data'])


# --- Benchmarks ------------------------------------------------------------------------------------------------------

def the_gpu_is_seeded(gpu: Gpu):
    gpu.answer(manual_seed=None)
    convergence._seed_generators(GPU, 1, 2)
    convergence._seed_generators(torch.device('cpu'), 1, 2)
    (name, seed), = gpu.notes
    assert name == 'manual_seed' and seed == convergence.derive_seed(1, 2) >> 1 < 2 ** 63


def kernel(name: str, begin: int, end: int, device: DeviceType, is_note: bool = False):
    event = create_autospec(torch._C._autograd._KinetoEvent, instance=True)
    event.name.return_value, event.device_type.return_value = name, device
    event.start_ns.return_value, event.end_ns.return_value = begin, end
    event.is_user_annotation.return_value = is_note
    return event


def a_contender_is_measured_on_a_gpu(gpu: Gpu):
    pools = [{'total_size': 10, 'segment_pool_id': (0, 0)}, {'total_size': 7, 'segment_pool_id': (0, 1)}]
    gpu.answer(is_bf16_supported=True, synchronize=None, memory_snapshot=lambda: pools[:len(gpu.notes) // 4 + 1],
               reset_peak_memory_stats=None, memory_allocated=100, max_memory_allocated=300, is_available=True,
               empty_cache=None)
    events = [kernel('gemm', 0, 3_000_000, DeviceType.CUDA), kernel('gemm', 3, 1_000_003, DeviceType.CUDA),
              kernel('a remark', 0, 9, DeviceType.CUDA, is_note=True), kernel('cudaLaunchKernel', 0, 1, DeviceType.CPU),
              kernel('aten::mm', 0, 1, DeviceType.CPU)]
    model = nn.Linear(2, 2)
    running = measure.Running(lambda: gpu.notes.append(('step',)), lambda: list(model.parameters()), lambda: True,
                              model)
    contender = measure.Contender('default', 't2t_vit_7', 32)
    with patch.object(measure, 'profile') as profile, patch.object(measure, '_events', lambda profiler: events):
        measure.warm_up(contender, lambda *_: running, Namespace(seed=0, warmup=1, window=0., profile=1), None, 'fp32',
                        ONE)
    assert torch.profiler.ProfilerActivity.CUDA in profile.call_args.kwargs['activities']
    measured = contender.measured
    assert (measured['kernels'], measured['launches']) == (2, 1)
    assert measured['peak_bytes'] == 24 + 200 + 7 and measured['held_bytes'] == 24  # six numbers, a step, a pool
    assert measured['longest'] == [('gemm', 2, 4.0)]
    order = gpu.asked()
    # The time of a window ends when the device has done it; the peak is one of the steps behind its reset.
    first = order.index('synchronize', order.index('synchronize') + 1)
    assert order[first:first + 3] == ['synchronize', 'step', 'synchronize']
    peak = order[order.index('reset_peak_memory_stats'):order.index('max_memory_allocated')]
    assert peak == ['reset_peak_memory_stats', 'memory_allocated', 'step', 'step', 'synchronize']
    measure._release()
    assert gpu.asked()[-1] == 'empty_cache'


def the_published_step_waits_before_it_averages(gpu: Gpu):
    state, _ = make(clip_grad=None)
    images, targets = batch(0)
    step = published.PublishedStep(
        state, lambda _: state.model(images), prepare=lambda *_: (SimpleNamespace(device=GPU), targets),
        loss=nn.CrossEntropyLoss(), precision=runtime.Precision(torch.device('cpu'), enabled=False),
        args=Options(**state.options))
    gpu.answer(synchronize=None)
    with patch.object(step, '_average', lambda *_: gpu.notes.append(('average',))):
        step(iter([(None, None)]))
    assert gpu.asked() == ['synchronize', 'average']


def a_group_of_one_is_of_nccl(gpu: Gpu):
    gpu.answer(dist, init_process_group=None, destroy_process_group=None)
    with ranks.group_of_one(GPU):
        assert gpu.notes[0][:2] == ('init_process_group', 'nccl') and ('device_id', GPU) in gpu.notes[0]
    assert gpu.asked() == ['init_process_group', 'destroy_process_group']


def records_of_a_gpu_say_so(gpu: Gpu):
    """What a GPU's records hold, from the command line of benchmarks/step.py to the verdict on the targets."""
    gpu.answer(device_count=1, set_device=None, is_bf16_supported=True, get_device_name='A GPU')
    row = {'peak_bytes': 1, 'held_bytes': 1, 'kernels': 900, 'launches': 800, 'is_finite': True, 'warm_up_seconds': 1.,
           'parameters': 1}

    def measured(contenders, *_):
        for contender in contenders:
            contender.milliseconds, contender.measured = [32.], row
    with tempfile.TemporaryDirectory() as folder, alone(), patch.object(step_benchmark, 'measure', measured), \
            patch.object(sys, 'argv', ['step.py', '--peers', 'none', '--task', 'train', '--output', folder]), \
            patch.object(torch.version, 'cuda', '13.0'), patch.object(runtime, 'setup_logging'):
        step_benchmark.main()
        text = Path(folder, 'step.md').read_text()
        found = targets.Records(Path(folder))
    assert 'kernels (launches)' in text and '900 (800)' in text and 'ran on the device' in text
    record = found.by_name['step']
    assert (record['machine']['device'], record['machine']['cuda']) == ('A GPU', '13.0') and found.is_gpu
    rates = []
    for machine in (record['machine'], {'device': '2 CPU cores'}):
        scaling.measured_steps(Namespace(model='t2t_vit_14', local_batch=64), {'step': {**record, 'machine': machine}},
                               lambda name, value, *_: rates.append((name, value)))
    assert ('gpu_rate', 2000.) in rates and len([name for name, _ in rates if name == 'gpu_rate']) == 1


# --- Which scenario, or which test elsewhere, runs what ---------------------------------------------------------------

DOCTOR = 'tests/test_doctor.py::'
RUN_BY = {
    'benchmarks/convergence.py::_seed_generators': [the_gpu_is_seeded],
    'benchmarks/shared/measure.py::_graph_pools': [a_contender_is_measured_on_a_gpu],
    'benchmarks/shared/measure.py::_profile_on_gpu': [a_contender_is_measured_on_a_gpu],
    'benchmarks/shared/measure.py::_release': [a_contender_is_measured_on_a_gpu],
    'benchmarks/shared/measure.py::synchronize': [a_contender_is_measured_on_a_gpu],
    'benchmarks/shared/measure.py::warm_up': [a_contender_is_measured_on_a_gpu],
    'benchmarks/shared/published.py::PublishedStep.__call__': [the_published_step_waits_before_it_averages],
    'benchmarks/shared/records.py::check_precisions': [precision_is_what_the_gpu_has],
    'benchmarks/shared/records.py::describe_machine': [records_of_a_gpu_say_so],
    'benchmarks/shared/ranks.py::group_of_one': [a_group_of_one_is_of_nccl],
    'benchmarks/scaling/plans.py::measured_steps': [records_of_a_gpu_say_so],
    'benchmarks/step.py::as_table': [records_of_a_gpu_say_so],
    'benchmarks/step.py::as_text': [records_of_a_gpu_say_so],
    'benchmarks/step.py::main': [records_of_a_gpu_say_so],
    'benchmarks/targets.py::Records.__init__': [records_of_a_gpu_say_so],
    'data/batch.py::BatchPreparer.__call__': [a_pinned_batch_is_copied_while_the_gpu_computes],
    'data/batch.py::BatchPreparer.__init__': [a_pinned_batch_is_copied_while_the_gpu_computes],
    'data/batch.py::BatchPreparer._move': [a_pinned_batch_is_copied_while_the_gpu_computes,
                                           a_batch_that_is_not_pinned_is_waited_for],
    'data/batch.py::TrainBatchPreparer.__init__': [training_batches_are_mixed_and_erased_on_the_gpu],
    'data/loader.py::create_loader': [shared_memory_is_given_back_once_it_is_copied_to_pinned_memory],
    'data/pipeline.py::_create_train_loader': [loaders_pin_what_goes_to_a_gpu],
    'data/pipeline.py::create_eval_loader': [loaders_pin_what_goes_to_a_gpu],
    'engine/checks.py::check_run_options': [sync_bn_is_for_gpus],
    'engine/ema.py::ModelEma._fetch': ['tests/test_step.py::test_an_average_elsewhere_is_one_copy_and_one_wait'],
    'engine/loop.py::Trainer._log_line': [a_log_line_says_how_full_the_gpu_was],
    'engine/loop.py::wrap_model': [ddp_is_told_its_gpu],
    'models/layers.py::attention': [attention_on_a_gpu_is_one_kernel],
    'tools/doctor/__main__.py::main': [DOCTOR + 'test_processes_of_the_run_are_the_gpus'],
    'engine/recipe.py::_gpu': [DOCTOR + 'test_recipe'],
    'engine/recipe.py::advise': [DOCTOR + 'test_recipe'],
    'engine/state.py::TrainState._load_rank': ['tests/test_resume.py::test_another_number_of_threads_is_said'],
    'tools/doctor/processes.py::look_at_processes': [
        DOCTOR + 'test_gpu_memory_is_given_back_before_other_processes_start'],
    'tools/doctor/schedule.py::look_at_schedule': [DOCTOR + 'test_schedule_counts_gpu_hours'],
    'tools/doctor/memory.py::device_memory': [DOCTOR + 'test_steps_on_a_gpu_are_halved_until_they_fit'],
    'tools/doctor/speed.py::_measure_on_gpu': [DOCTOR + 'test_steps_on_a_gpu_are_halved_until_they_fit'],
    'tools/doctor/speed.py::measure_steps': [DOCTOR + 'test_steps_on_a_gpu_are_halved_until_they_fit'],
    'tools/doctor/speed.py::_peak': [DOCTOR + 'test_steps_on_a_gpu_are_halved_until_they_fit'],
    'tools/doctor/speed.py::_reset_peak': [DOCTOR + 'test_steps_on_a_gpu_are_halved_until_they_fit'],
    'tools/doctor/speed.py::_time_steps': [DOCTOR + 'test_steps_on_a_gpu_are_halved_until_they_fit'],
    'tools/doctor/speed.py::find_who_waits': [DOCTOR + 'test_who_starves'],
    'tools/doctor/speed.py::device_name': [DOCTOR + 'test_steps_on_a_gpu_are_halved_until_they_fit'],
    'tools/doctor/memory.py::total_memory': [DOCTOR + 'test_steps_on_a_gpu_are_halved_until_they_fit'],
    'tools/doctor/speed.py::step_finding': [DOCTOR + 'test_steps_on_a_gpu_are_halved_until_they_fit'],
    'utils/distributed.py::_connect': [ranks_meet_over_nccl_each_on_its_gpu],
    'utils/distributed.py::_device': [devices_by_name],
    'utils/distributed.py::init_process_group': [ranks_meet_over_nccl_each_on_its_gpu],
    'launch/launcher.py::launch': [more_processes_than_gpus],
    'utils/runtime.py::Precision.__init__': [precision_is_what_the_gpu_has],
    'utils/runtime.py::describe_environment': [records_of_a_gpu_say_so],
    'utils/runtime.py::get_rng_state': [generators_of_the_gpu_are_saved_and_put_back],
    'utils/runtime.py::set_rng_state': [generators_of_the_gpu_are_saved_and_put_back],
    'utils/runtime.py::start': [a_process_starts_on_its_gpu],
    'utils/watch.py::DeviceMarks.__call__': [a_mark_is_a_copy_that_nobody_waits_for],
    'utils/watch.py::DeviceMarks.__init__': [a_mark_is_a_copy_that_nobody_waits_for],
}
ONLY_A_GPU = {}  # FILE::FUNCTION: why nothing but a GPU can run it

PLACES = find_places(ROOT)


def test_every_place_is_in_one_table():
    assert len(PLACES) > 30
    listed = [*RUN_BY, *ONLY_A_GPU]
    unlisted, gone = sorted(PLACES.keys() - set(listed)), sorted(set(listed) - PLACES.keys())
    assert not unlisted, 'name the scenarios that run these in RUN_BY, or say in ONLY_A_GPU why none can'
    assert not gone, 'the code does not have these any more, or they are not about GPUs; take them out'
    assert len(set(listed)) == len(listed), 'a place is in both tables'
    assert all(map(str.strip, ONLY_A_GPU.values())) and all(RUN_BY.values())


# --- The stand-in, and what is looked for -----------------------------------------------------------------------------

def of_scenarios(name: str) -> bool:
    return all(callable(scenario) for scenario in RUN_BY[name])


@functools.cache
def seen_by(scenario) -> set:
    with stand_in() as gpu, Trace(ROOT, PLACES) as trace:
        scenario(gpu)
    return trace.seen


@pytest.mark.parametrize('name', [name for name in RUN_BY if of_scenarios(name)])
def test_scenarios_run_what_a_gpu_would(name):
    seen = set().union(*map(seen_by, RUN_BY[name]))
    assert not missing(PLACES[name], seen)


def test_tests_elsewhere_run_what_a_gpu_would(tmp_path):
    names = [name for name in RUN_BY if not of_scenarios(name)]
    tests = sorted({test for name in names for test in RUN_BY[name]})
    succeeded(run_command([warm().python, '-m', 'pytest', '-q', '-p', 'tests.cuda_places', '-p', 'no:cacheprovider',
                           *tests], ROOT, CUDA_TRACE=str(tmp_path / 'trace')))
    seen = {(file, tuple(span)) for file, span in json.loads((tmp_path / 'trace').read_text())}
    assert {name: missing(PLACES[name], seen) for name in names} == dict.fromkeys(names, [])


CODE = """
import torch

def copy(batch, device):
    on_gpu = device.type == 'cuda'
    if device.type != 'cuda':
        return batch
    kind = 'nccl' if on_gpu else 'gloo'
    return batch.to(device, non_blocking=True), kind

class Box:
    def size(self, device):
        return torch.cuda.memory_allocated(device) if device.type == 'cuda' else len('cpu')

def unconcerned(name):
    return name == 'cpu'
"""


@pytest.mark.parametrize('line', [
    "x.to('cuda:1')", 'x.cuda()', 'x.is_cuda', "str(device).startswith('cuda')", 'torch.accelerator.synchronize()',
    'torch.cuda.synchronize()', "device.type != 'cpu'", 'x.pin_memory()'])
def test_every_spelling_is_found(line, tmp_path):
    (tmp_path / 'code.py').write_text(f'import torch\n\ndef f(x, device):\n    return {line}\n')
    assert list(find_places(tmp_path)) == ['code.py::f']


def test_places_and_what_has_not_run_are_found(tmp_path):
    file = tmp_path / 'engine/copying.py'
    file.parent.mkdir()
    file.write_text(CODE)
    (tmp_path / 'tests').mkdir()
    (tmp_path / 'tests/test_it.py').write_text(CODE)
    places = find_places(tmp_path)
    assert list(places) == ['engine/copying.py::copy', 'engine/copying.py::Box.size']
    module, cpu = {}, torch.device('cpu')
    exec(compile(CODE, file, 'exec'), module)
    with Trace(tmp_path, places) as trace:
        module['copy'](torch.zeros(1), cpu)
        module['Box']().size(cpu)
    lacking = [missing(place, trace.seen) for place in places.values()]
    assert lacking[0] == ["8: 'nccl'", '9: non_blocking=True', "8: kind = 'nccl' if on_gpu else 'gloo'",
                          '9: return (batch.to(device, non_blocking=True), kind)', "8: 'nccl'"]
    assert lacking[1] == ['13: torch.cuda.memory_allocated', '13: torch.cuda.memory_allocated(device)']
    with stand_in() as gpu, Trace(tmp_path, places) as trace:
        gpu.answer(memory_allocated=5)
        assert module['Box']().size(GPU) == 5
        module['copy'](SimpleNamespace(to=lambda device, non_blocking: None), GPU)
    assert [missing(place, trace.seen) for place in places.values()] == [[], []]


def test_stand_in_takes_nothing_that_torch_does_not_have():
    with stand_in() as gpu:
        with pytest.raises(AttributeError, match='getdevice_name'):
            gpu.answer(getdevice_name='A GPU')
        gpu.answer(get_device_name='A GPU')
        with pytest.raises(TypeError):
            torch.cuda.get_device_name(GPU, 'more')
        assert torch.cuda.get_device_name(GPU) == 'A GPU' and gpu.notes == [('get_device_name', GPU)]
    with stand_in() as gpu, gpu.tensors():
        on_host, on_gpu = torch.zeros(2), torch.zeros(2, device=GPU)
        gpu.notes.clear()
        for copy in (lambda: on_gpu.copy_(on_host), lambda: on_host.copy_(on_gpu, non_blocking=True), on_gpu.cpu):
            copy()
        assert [note[1:] for note in gpu.notes] == [('copies to the GPU', 'waiting'), (
            'copies to the host', 'without waiting'), ('copies to the host', 'waiting')]
    own = {name for name in vars(Stream) if not name.startswith('_')}
    assert own == {'wait_stream'} <= set(dir(torch.cuda.Stream))
