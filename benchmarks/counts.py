"""Count what the host does in a training step: kernels it starts, values it reads, collectives it takes part in.

    python -m benchmarks.counts

The counts are made on a CPU and hold for every machine with the same torch. tests/test_counts.py compares the code with
the record, and this command renews it. A kernel is an operator that writes a tensor. A read is a value or a copy that
the host gets from the device and waits for. All counts are of the third step, on small images; they depend on neither
their size nor the batch's.

The signals between ranks go over the CPU, so they have their own line. So have batches, which `meta` stands in for a
GPU to prepare; erasing starts kernels for each image.
"""
import contextlib
import itertools
import random
import sys
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import torch
from timm.loss import SoftTargetCrossEntropy
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.shared.command import parse_command, start_alone, training_options
from benchmarks.shared.measure import create_step
from benchmarks.shared.ranks import group_of_one
from benchmarks.shared.records import markdown_table, new_record, save
from benchmarks.traffic import what_is_computed
from data.batch import BatchPreparer, TrainBatchPreparer
from engine.evaluate import evaluate
from engine.log.run_log import RunLog
from engine.loop import Trainer, wrap_model
from models import create_model_from_options, layers
from utils.console import progress_bar
from utils.distributed import AsyncMax, World
from utils.runtime import Precision, seed_everything
from utils.script import run_script

SEED, SIZE, CLASSES, BATCH, LOADED = 0, 32, 10, 4, 64
DEVICE = torch.device('cpu')
ONE = World(rank=0, local_rank=0, size=1, device=DEVICE)
TORCH = str(Path(torch.__file__).parent)
SCALE = 1024.  # initial scale of float16's losses
# Steps by name, with the options of train.py.
STEPS = {
    'recipe of T2T-ViT-14': '--model t2t_vit_14 --amp',
    'of two batches': '--model t2t_vit_14 --amp --accum-steps 2',
    'clipped, float32': '--model t2t_vit_14 --clip-grad 1',
    'Transformer tokens': '--model t2t_vit_t_14 --amp',
    'loss scaling': '--model t2t_vit_7',
    'SGD of transfer.py': '--model t2t_vit_7 --opt momentum --no-model-ema',
    'average on the CPU': '--model t2t_vit_7 --model-ema-force-cpu',
    'unfused optimizer': '--model t2t_vit_7 --opt lion',
    'batch norm': '--model resnet18',
    'DDP': '--model t2t_vit_14 --amp',
    'DDP, of two batches': '--model t2t_vit_14 --amp --accum-steps 2',
    'DDP, batch norm': '--model resnet18',
}


# --- Counting ---------------------------------------------------------------------------------------------------------

@dataclass
class Counts:
    """Counts of operators that compute, of reads and of collectives, by name."""
    kernels: Counter[str] = field(default_factory=Counter)
    reads: Counter[str] = field(default_factory=Counter)
    collectives: Counter[str] = field(default_factory=Counter)

    def as_dict(self) -> dict[str, dict[str, int]]:
        return {kind: dict(sorted(counter.items())) for kind, counter in vars(self).items()}

    def __sub__(self, other: 'Counts') -> 'Counts':
        return Counts(*(mine - theirs for mine, theirs in zip(vars(self).values(), vars(other).values(), strict=True)))


@contextlib.contextmanager
def counting():
    """Count what this thread and its backward passes do in the block."""
    counts = Counts()
    asked = _Asked(counts)
    with asked, _Started(counts, asked):
        yield counts


class _Asked(TorchFunctionMode):
    """Count reads as Python code calls them: on a CPU some of them never become an operator."""

    NAMES = ('tolist', 'item', 'numpy', 'cpu', '__bool__', '__int__', '__float__', '__index__', '__array__')

    def __init__(self, counts: Counts):
        super().__init__()
        self._counts, self.is_reading = counts, False

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name, kwargs = getattr(function, '__name__', ''), kwargs or {}
        # Torch's own code moves tensors to where others are, which on a GPU is not the CPU.
        is_to_cpu = any(str(value) == 'cpu' for value in (*args[1:], *kwargs.values())
                        if isinstance(value, str | torch.device))
        copies = name == 'to' and is_to_cpu and not kwargs.get('non_blocking') and (
            not sys._getframe(1).f_code.co_filename.startswith(TORCH))
        if self.is_reading or not (copies or name in self.NAMES):
            return function(*args, **kwargs)
        self._counts.reads['to cpu' if copies else name] += 1
        self.is_reading = True  # the operators inside are no further reads
        try:
            return function(*args, **kwargs)
        finally:
            self.is_reading = False


class _Started(TorchDispatchMode):
    """Count operators that compute, operators that read, and collectives."""

    READS = ('_local_scalar_dense', 'is_nonzero', 'nonzero', 'equal', 'masked_select', '_unique2', 'unique_dim',
             'unique_consecutive')

    def __init__(self, counts: Counts, asked: _Asked):
        super().__init__()
        self._counts, self._asked = counts, asked

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        space, _, name = function._schema.name.partition('::')
        if space == 'c10d':
            self._counts.collectives[name] += 1
            return function(*args, **kwargs)
        if name in self.READS and not self._asked.is_reading:
            self._counts.reads[name] += 1
        if name.startswith('index') and any(_is_mask(value) for value in tree_leaves(args[1:2])):
            self._counts.reads[f'{name} by a mask'] += 1  # the host waits for their number
        result = function(*args, **kwargs)
        if what_is_computed(function, args, kwargs, result):
            self._counts.kernels[name] += 1
        return result


def _is_mask(value) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype in (torch.bool, torch.uint8)


# --- What is counted --------------------------------------------------------------------------------------------------

def count_step(words: str, *, is_scaled: bool = False, has_ddp: bool = False) -> Counts:
    """Count the third step of train.py with these options."""
    with group_of_one(DEVICE) if has_ddp else contextlib.nullcontext():
        _, step = make_step(words, is_scaled=is_scaled, has_ddp=has_ddp)
        batches = make_batches()
        for _ in range(2):
            step(batches)
        with counting() as counts:
            step(batches)
    return counts


def count_signals() -> Counts:
    """Count the signals between ranks between two steps."""
    with group_of_one(DEVICE), contextlib.closing(AsyncMax()) as signals:
        signals.exchange(0)
        with counting() as counts:
            signals.exchange(0)
    return counts


def make_step(words: str, *, is_scaled: bool = False, has_ddp: bool = False):
    """Return a new run's state and step as train.py makes them with these options."""
    seed_everything(SEED, rank=0)
    args = training_options(*words.split(), '--img-size', str(SIZE), '--batch-size', str(BATCH))
    model = create_model_from_options(args, num_classes=CLASSES)
    precision = Precision(DEVICE, enabled=args.amp)
    if is_scaled:
        precision.scaler = torch.amp.GradScaler(DEVICE.type, init_scale=SCALE)
    # wrap_model does not wrap for a single rank, so it is told of a second one.
    return create_step(args, model, precision, ONE, loss=SoftTargetCrossEntropy(),
                       wrap=lambda module: wrap_model(module, replace(ONE, size=2)) if has_ddp else module)


def make_batches():
    """Repeat one batch of normalised images and soft targets."""
    generator = torch.Generator().manual_seed(SEED)
    return itertools.repeat((torch.randn(BATCH, 3, SIZE, SIZE, generator=generator),
                             torch.full((BATCH, CLASSES), 1 / CLASSES)))


def count_preparing() -> dict[str, Counts]:
    """Count the preparation of batches on a device other than the CPU."""
    training = TrainBatchPreparer('meta', batch_size=LOADED, num_classes=CLASSES, mixup_alpha=0.8, cutmix_alpha=1.0,
                                  erase_prob=0.25)
    found = {}
    for name, prepare in (('training batch', training), ('evaluation batch', BatchPreparer('meta'))):
        random.seed(SEED)
        np.random.seed(SEED)
        batch = torch.zeros(LOADED, 3, SIZE, SIZE, dtype=torch.uint8), torch.zeros(LOADED, dtype=torch.long)
        with counting() as found[name]:
            prepare(*batch)
    return found


def count_log_line() -> Counts:
    """Count a line of the log after a step."""
    state, step = make_step('--model t2t_vit_7')
    loaders = SimpleNamespace(train_loader=range(9), val_loader=(), prepare_train=None, prepare_val=None,
                              class_names=[])
    trainer = Trainer(state, state.model, loaders, schedule=None, num_epochs=1, folder=Path(),
                      precision=Precision(DEVICE, enabled=False), args=training_options(),
                      log=RunLog(None, options={}), writer=None)
    trainer._step, trainer._steps_since_start = step, 1
    step(make_batches())
    with progress_bar(total=1) as bar, counting() as counts:
        trainer._log_line(bar, 0., state.window_sums, 0)
    return counts


class Loaded(list):
    """A list of batches with the interface of a loader."""

    def take_bad_count(self) -> int:
        return 0


def count_evaluation() -> dict[str, Counts]:
    """Count a batch of an evaluation, and apart from it lines and results; each line has two reads."""
    state, _ = make_step('--model t2t_vit_7')
    batch = torch.zeros(BATCH, 3, SIZE, SIZE, dtype=torch.uint8), torch.zeros(BATCH, dtype=torch.long)
    counted = []
    for number in (2, 3):
        with counting() as counts:
            evaluate(state.model, Loaded([batch] * number), _Prepared(), log_interval=100, eager=True,
                     precision=Precision(DEVICE, enabled=False))
        counted.append(counts)
    two, three = counted
    per_batch = three - two
    return {'evaluation, a batch': per_batch, 'evaluation, lines and results': two - per_batch - per_batch}


class _Prepared:
    """Prepare a batch without any counted operator."""
    device = DEVICE

    def __call__(self, images: torch.Tensor, targets: torch.Tensor):
        return torch.empty(images.shape), targets


def count_all() -> dict[str, Counts]:
    """Return all counts by name, in the order of the table."""
    with patch.object(layers, 'HAS_MATRIX_UNITS', True):  # attention as on a GPU
        steps = {f'step: {name}': count_step(words, is_scaled=name == 'loss scaling', has_ddp=name.startswith('DDP'))
                 for name, words in STEPS.items()}
        return {**steps, 'signals between steps': count_signals(), **count_preparing(), 'log line': count_log_line(),
                **count_evaluation()}


# --- The record -------------------------------------------------------------------------------------------------------

def differences(before: dict[str, dict], now: dict[str, dict]) -> list[str]:
    """Return a line for each count that differs from the record."""
    return [f'{name}: {kind} {what}: {old.get(what, 0)} → {new.get(what, 0)}'
            for name in sorted(before.keys() | now.keys())
            for kind in ('kernels', 'reads', 'collectives')
            for old, new in [(before.get(name, {}).get(kind, {}), now.get(name, {}).get(kind, {}))]
            for what in sorted(old.keys() | new.keys()) if old.get(what, 0) != new.get(what, 0)]


def as_text(record: dict) -> str:
    """Return the record in Markdown."""
    rows = [[name, sum(row['kernels'].values()), *(
        ', '.join(f'{count} {what}' for what, count in row[kind].items()) or 0 for kind in ('reads', 'collectives'))]
        for name, row in record['counts'].items()]
    return '\n'.join([
        '# What the host does in a step', '', f'    {record["command"]}', '',
        'Counted with torch {torch} and timm {timm}. A kernel is an operator that writes a tensor; the host waits for '
        'each read.'.format(**record['machine']), '',
        markdown_table(['', 'kernels', 'reads', 'collectives'], rows), ''])


def main() -> None:
    args = parse_command('Count what the host does in a training step.', 'counts', device='cpu')
    start_alone(args)
    record = {**new_record('counts', args, DEVICE),
              'counts': {name: counts.as_dict() for name, counts in count_all().items()}}
    text = as_text(record)
    print(text, *save(args, record, text), sep='\n')


if __name__ == '__main__':
    run_script(main)
