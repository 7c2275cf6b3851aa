"""Measure the training time that is lost to saving checkpoints: steps of a fixed length, with saves and without.

    python -m benchmarks.reliability.saving                     # t2t_vit_24, a save per minute: 2.5 minutes
    python -m benchmarks.reliability.saving --interval 10 --saves 3

A step is a sleep, since a GPU's step leaves the CPU idle; a busy loader is not simulated. The state is all that a run
saves: weights, their average and AdamW's moments.
"""
import os
import platform
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.shared.command import parse_command
from benchmarks.shared.records import markdown_table, save
from engine.writer import CheckpointWriter
from models import create_model
from options.types import positive, positive_int
from utils.script import run_script

ALLOWED = 0.01  # part of the training time


def state_of_a_run(name: str) -> dict:
    """Return the tensors of a checkpoint: a model, its average, and AdamW after a step."""
    model = create_model(name)
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    average = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    return {'state_dict': model.state_dict(), 'state_dict_ema': average, 'optimizer': optimizer.state_dict()}


def train(steps: int, step_seconds: float) -> float:
    """Return the seconds that `steps` steps take."""
    started = time.perf_counter()
    for _ in range(steps):
        time.sleep(step_seconds)
    return time.perf_counter() - started


def saving_options(parser) -> None:
    add = parser.add_argument_group('What is measured').add_argument
    add('--model', default='t2t_vit_24', metavar='MODEL', help='by name')
    add('--step', type=positive, default=0.2, metavar='S', help='seconds of a step')
    add('--interval', type=positive, default=60, metavar='S', help='seconds of training between saves')
    add('--saves', type=positive_int, default=2, metavar='N', help='saves to measure, after a first one')
    add('--folder', metavar='DIR', help='where to save (default: a temporary folder, on its disk)')


def main() -> None:
    args = parse_command('Measure the training time that is lost to saving.', 'saving', saving_options)
    content = state_of_a_run(args.model)
    steps = max(1, round(args.interval / args.step))
    baseline_steps = min(steps, round(10 / args.step))
    per_step = train(baseline_steps, args.step) / baseline_steps
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        writer = CheckpointWriter(Path(folder), keep=2)
        held_up, lost, written = [], [], []
        for number in range(args.saves + 1):
            started = time.perf_counter()
            writer.save(content, number)
            held_up.append(time.perf_counter() - started)
            if number == 0:  # a run allocates its memory once
                writer.wait()
                written.append(time.perf_counter() - started)
                continue
            train(steps, args.step)
            lost.append(time.perf_counter() - started - steps * per_step)
        started = time.perf_counter()
        writer.save(content, args.saves + 1, must_succeed=True)
        written.append(time.perf_counter() - started)
        size = max(path.stat().st_size for path in Path(folder).glob('*.pth.tar'))
    record = {
        'model': args.model, 'checkpoint_megabytes': round(size / 1e6), 'step_seconds': args.step,
        'interval_seconds': args.interval, 'saves': args.saves,
        'held_up_seconds_first': round(held_up[0], 3), 'held_up_seconds': [round(s, 3) for s in held_up[1:]],
        'lost_seconds_per_save': [round(s, 3) for s in lost],
        'lost_percent': round(100 * sum(lost) / (args.saves * steps * per_step), 3),
        'written_after_seconds': [round(s, 2) for s in written],
        'interval_of_one_percent_seconds': round(max(*lost, 0) / ALLOWED, 1),
        'machine': f'{platform.machine()}, {os.cpu_count()} cores', 'python': platform.python_version(),
        'torch': torch.__version__}
    text = markdown_table(['what', 'value'], [[name, value] for name, value in record.items()])
    print(text, *save(args, record, text + '\n'), sep='\n')


if __name__ == '__main__':
    run_script(main)
