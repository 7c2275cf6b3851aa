"""Count what a training step reads and writes in a GPU's memory, and its operators, without a GPU.

    python -m benchmarks.traffic
    python -m benchmarks.traffic --models t2t_vit_7 t2t_vit_t_14 --batch-size 64 --precision fp32

Every operator that computes reads its arguments and writes its results. They are counted on a CPU for two batch sizes,
with a GPU's attention, and extrapolated linearly to --batch-size. `floor` is the time of the bytes at --bandwidth.

Not seen are caches and the inside of a fused attention. A CPU's autocast leaves softmax, exp and layer_norm in
bfloat16; a GPU's does not. Each gradient of a fused optimizer counts once too often.
"""
import itertools
from collections.abc import Callable

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.shared.command import common_options, parse_command, start_alone
from benchmarks.shared.measure import NOT_COMPUTING, Contender, start_training
from benchmarks.shared.records import markdown_table, new_record, precision_of, save
from models import layers, resolve_name
from options.types import positive
from utils.console import progress_bar
from utils.distributed import World
from utils.script import run_script

BATCHES = (2, 4)


def traffic_options(parser) -> None:
    add = parser.add_argument_group('What is counted').add_argument
    add('--models', nargs='+', default=['t2t_vit_14', 't2t_vit_7', 't2t_vit_t_14'], metavar='MODEL',
        help='T2T-ViTs, by name')
    add('--bandwidth', type=positive, default=4.3, metavar='TB/S', help='of the memory (H200: 4.3)')
    common_options(add, batch_size=256, img_size=224, precision='bf16', seed=42)


class Traffic(TorchDispatchMode):
    """Count the operators that compute, and the bytes that they read and write."""

    def __init__(self):
        super().__init__()
        self.operators = self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        read = _tensors((args, kwargs))
        result = func(*args, **kwargs)
        if written := what_is_computed(func, args, kwargs, result):
            self.operators += 1
            # A tensor changed in place is an argument and a result (or marked in the schema): read and written.
            self.bytes += sum(map(_size, read)) + sum(map(_size, written))
        return result


def what_is_computed(func, args: tuple, kwargs: dict, result) -> list[torch.Tensor]:
    """Return the tensors that an operator writes; none if it makes a view, makes memory or reads a value."""
    if func._schema.name.partition('::')[2] in NOT_COMPUTING or func.is_view:
        return []
    return _tensors(result) or _written(func, args, kwargs)


def _tensors(tree) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _written(func, args: tuple, kwargs: dict) -> list[torch.Tensor]:
    """Return the arguments that an operator writes to by its schema."""
    arguments = func._schema.arguments
    by_name = {argument.name: value for argument, value in zip(arguments, args, strict=False)} | kwargs
    return _tensors([by_name.get(argument.name) for argument in arguments
                     if argument.alias_info is not None and argument.alias_info.is_write])


def _size(tensor: torch.Tensor) -> int:
    """Return the bytes of a tensor's elements; an expanded tensor has them once."""
    return tensor.element_size() * min(tensor.numel(), tensor.untyped_storage().nbytes() // tensor.element_size())


def count(work: Callable[[], object]) -> np.ndarray:
    """Return the operators and bytes of `work`."""
    with Traffic() as traffic:
        work()
    return np.array([traffic.operators, traffic.bytes])


def count_step(contender: Contender, batch_size: int, args, training_args, world: World) -> np.ndarray:
    """Return the operators of a step of `batch_size` images, and their bytes."""
    running = start_training(contender, args.replacing(batch_size=batch_size), training_args,
                             precision_of(args.precision, world.device), world)
    running.step()  # the first step makes the optimizer's state
    return count(running.step)


def as_text(record: dict) -> str:
    """Return the record in Markdown."""
    asked = record['options']
    rows = []
    for model in asked['models']:
        mine = [row for row in record['rows'] if row['model'] == model]
        rows += [[f"{model}, {row['contender']}", f"{row['operators']:,}", f"{row['bytes'] / 1e9:.1f}",
                  f"{row['bytes'] / mine[0]['bytes']:.2f}", f"{row['floor_milliseconds']:.1f}",
                  f"{row['floor_images_per_second']:,.0f}"] for row in mine]
    header = ['model', 'operators', 'GB', '× published',
              f"floor at {asked['bandwidth']:g} TB/s, ms", 'img/s']
    return '\n'.join([
        f"# Memory traffic of a training step: batch {asked['batch_size']}, {asked['img_size']} pixels, "
        f"{asked['precision']}", '', f"    {record['command']}", '',
        'Counted, not timed: what the operators of a step read and write. The floor is the time of that alone.', '',
        markdown_table(header, rows), ''])


def main() -> None:
    args = parse_command('Count what a training step reads and writes.', 'traffic', traffic_options,
                         device='cpu', channels_last=False)
    for model in args.models:
        resolve_name(model)
    training_args, world = start_alone(args)
    layers.HAS_MATRIX_UNITS = True  # attention as on a GPU
    rows = []
    for model, name in progress_bar(iterable=list(itertools.product(args.models, ('published', 'default'))),
                                    desc='traffic'):
        contender = Contender(name, model, args.img_size, is_published=name == 'published')
        counts = [count_step(contender, batch_size, args, training_args, world) for batch_size in BATCHES]
        slope = (counts[1] - counts[0]) / (BATCHES[1] - BATCHES[0])
        operators, traffic = (counts[0] + slope * (args.batch_size - BATCHES[0])).tolist()
        seconds = traffic / (args.bandwidth * 1e12)
        rows.append({'model': model, 'contender': name, 'operators': round(operators), 'bytes': traffic,
                     'floor_milliseconds': 1000 * seconds, 'floor_images_per_second': args.batch_size / seconds,
                     'counted': {str(size): count.tolist() for size, count in zip(BATCHES, counts, strict=True)}})
    record = {**new_record('traffic', args, world.device), 'rows': rows}
    text = as_text(record)
    print(text, *save(args, record, text), sep='\n')


if __name__ == '__main__':
    run_script(main)
