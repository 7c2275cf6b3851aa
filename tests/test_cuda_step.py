"""A training step, an evaluation and what a model has seen, on a GPU that is not there (see tests/cuda_stand_in.py).

    python -m pytest tests/test_cuda_step.py

Tensors of two devices do not mix there, as on a GPU, and whatever reads a value fails: so a step waits for nothing.
"""
import itertools
from unittest.mock import patch

import pytest
import torch
from timm.loss import SoftTargetCrossEntropy
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException

from data.batch import BatchPreparer, TrainBatchPreparer
from engine.confusion import ConfusionCounter
from engine.evaluate import MostConfidentErrors, _batch_sums
from engine.objective import Objective
from engine.optimizer import create_optimizer, param_groups
from engine.run import create_state
from engine.state import TrainState
from engine.step import TrainingStep
from figures import explain
from models import create_model
from tests.cuda_stand_in import GPU, bytes_of, pinned, stand_in
from tests.test_step import Options, WithStatistics, make
from utils.distributed import World
from utils.runtime import Precision

BATCH = 4


def start_training(model: nn.Module, args, *, is_scaled: bool) -> tuple[TrainState, TrainingStep]:
    """As train.py does on a GPU, but that the model is there before: the tensors that stand for it cannot move."""
    model.to(GPU, memory_format=torch.channels_last if args.channels_last else torch.preserve_format)
    model.to = lambda *_, **__: model
    precision = Precision(GPU, enabled=args.amp, dtype_name='float16' if is_scaled else 'bfloat16')
    optimizer = create_optimizer(param_groups(model, args.weight_decay), args)
    of_cpu = torch.Generator()
    with patch.object(torch, 'Generator', lambda device: of_cpu):  # timm's average has one; nothing is drawn from it
        state = create_state(args, model, optimizer, precision, ['a', 'b', 'c'],
                             World(rank=0, local_rank=0, size=1, device=GPU))
    prepare = TrainBatchPreparer(GPU, batch_size=BATCH, num_classes=3, mixup_alpha=0.8, cutmix_alpha=1.0,
                                 erase_prob=0.5)
    return state, TrainingStep(state, Objective(model.train(), SoftTargetCrossEntropy()), prepare=prepare,
                               precision=precision, args=args)


def leave_gradients(loss: torch.Tensor, parameters: list) -> None:
    """In place of `backward`, whose threads want a GPU."""
    assert loss.device == GPU and loss.requires_grad
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)


@pytest.mark.parametrize('changes', [
    {}, {'amp': True, 'accum_steps': 2}, {'amp': True, 'is_scaled': True},
    {'opt': 'momentum', 'clip_grad': None, 'channels_last': True}], ids=str)
def test_a_step_on_a_gpu_neither_mixes_devices_nor_reads_a_value(changes):
    is_scaled = changes.pop('is_scaled', False)
    args, model = Options(**make(**changes)[0].options), WithStatistics()
    with stand_in() as gpu, gpu.tensors(), \
            patch.object(torch.cuda.amp.common, 'amp_definitely_not_available', lambda: False):
        gpu.answer(is_bf16_supported=True)
        state, step = start_training(model, args, is_scaled=is_scaled)
        assert state.scaler.is_enabled() == is_scaled
        batches = itertools.repeat((pinned(bytes_of(BATCH, 3, 32, 32)), pinned(torch.arange(BATCH) % 3)))
        with patch.object(torch.Tensor, 'backward', lambda loss: leave_gradients(loss, list(model.parameters()))):
            step(batches)
            gpu.notes.clear()
            step(batches)
        assert len(gpu.notes) > 100 and state.global_step == 2
        assert step.gradient_norm.device == state.loss_sums.device == GPU
        copies = [note for note in gpu.notes if str(note[1:2]).count('copies')]
        assert copies == [('side 1', 'copies to the GPU', 'without waiting')] * 2 * args.accum_steps
        assert all(value.device == GPU for moments in state.optimizer.state.values() for value in moments.values())
        with pytest.raises(DataDependentOutputException):  # for the measure of this test sees what is read
            step.sync_skipped_steps()


def test_an_evaluation_on_a_gpu_reads_nothing_but_its_sums():
    model, errors, counter = WithStatistics().eval(), MostConfidentErrors(limit=2), ConfusionCounter()
    with stand_in() as gpu, gpu.tensors(), torch.no_grad():
        model.to(GPU)
        prepare = BatchPreparer(GPU)
        for _ in range(2):
            images, targets = prepare(pinned(bytes_of(BATCH, 3, 32, 32)), pinned(torch.arange(BATCH) % 3))
            logits = model(images)
            errors.add(images, targets, logits)
            guesses = logits.topk(2).indices
            assert _batch_sums(logits, targets, guesses).device == GPU
            counter.add(targets, guesses[:, 0], num_classes=logits.shape[1])
        assert all(kept.device == GPU for kept in errors._kept) and len(errors._kept[1]) == 2
        with pytest.raises(DataDependentOutputException):
            errors.fetch()


@pytest.mark.parametrize('tokens_type', ['performer', 'transformer'])
def test_what_a_model_has_seen_is_found_on_a_gpu(tokens_type):
    model = create_model('t2t_vit_7', img_size=32, embed_dim=32, depth=2, num_heads=2, tokens_type=tokens_type)
    with stand_in() as gpu, gpu.tensors():
        model.to(GPU)
        image = torch.zeros(1, 3, 32, 32, device=GPU)
        seen = explain.classifier_attention(model, image)
        assert seen.rollout.shape == (2, 2) and seen.blocks.shape == (2, 2, 2, 2)
        stages = explain.token_stages(model, image)
        assert explain.pixel_relevance(stages, (1, 1), (32, 32)).device == GPU
        maps = explain.layer_maps(model, image, explain.default_layers(model))
        assert {tensor.device for tensor in maps.values()} == {GPU}
