"""Train for a number of steps in float16 and record loss, gradient and skipped steps: whether they stay finite.

    python -m benchmarks.float16                                                             # on a GPU
    python -m benchmarks.float16 --model t2t_vit_7 --img-size 32 -b 8 --steps 4 --device cpu # a CPU takes bfloat16

It trains as train.py does on the embedded digits, without evaluations and checkpoints, until --steps or --seconds.
The record and its table are written every --log-interval steps.
"""
import itertools
import math
import time

from benchmarks.shared.command import common_options, parse_command, shared_training_options
from benchmarks.shared.measure import create_step
from benchmarks.shared.records import markdown_table, new_record, origin, save
from data.pipeline import create_training_input, open_training_data
from engine.loss import create_loss
from engine.optimizer import create_schedule
from engine.step import TrainingStep
from models import create_model_from_options, resolve_name
from options.types import count, positive, positive_int
from utils.console import progress_bar
from utils.errors import NotFiniteError
from utils.runtime import start
from utils.script import run_script

WARMUP_EPOCHS = 2


def float16_options(parser) -> None:
    add = parser.add_argument_group('What is trained').add_argument
    add('--model', default='t2t_vit_14', metavar='MODEL', help='by name')
    common_options(add, batch_size=64, img_size=224, device='auto')
    add('--lr', type=positive, default=5e-4, metavar='RATE', help='learning rate after the warm-up')
    add('-j', '--workers', type=count, default=4, metavar='N', help='processes that prepare images')
    add = parser.add_argument_group('How long').add_argument
    add('--steps', type=positive_int, default=506, metavar='N', help='maximum of steps')
    add('--seconds', type=positive, default=60, metavar='S', help='begin no step after this time')
    add('--log-interval', type=positive_int, default=10, metavar='N', help='steps per line')


def prepare_training(args, training_args):
    """Return the step, its state, the schedule of its rate, the loader and the precision, as train.py makes them."""
    world, precision = start(training_args, alone=True)
    train_set, val_set = open_training_data(training_args, world)
    model = create_model_from_options(training_args, num_classes=len(train_set.classes))
    batches = create_training_input(training_args, train_set, val_set, model.pretrained_cfg, model.num_classes, world)
    steps_per_epoch = len(batches.train_loader)
    training_args = training_args.replacing(epochs=max(math.ceil(args.steps / steps_per_epoch), WARMUP_EPOCHS + 1))
    state, step = create_step(training_args, model, precision, world, prepare=batches.prepare_train,
                              loss=create_loss(training_args, soft_targets=batches.prepare_train.mixing))
    schedule, _ = create_schedule(state.optimizer, training_args, steps_per_epoch)
    return step, state, schedule, batches.train_loader, precision


def epochs_of(loader, state, schedule):
    """Yield batches without end, epoch after epoch, at the rate of the schedule."""
    for epoch in itertools.count():
        schedule.step(epoch)
        loader.set_position(epoch)
        for batch in loader:
            schedule.step_update(state.global_step)
            yield batch


def log_line(step: TrainingStep, state) -> dict:
    """Return loss and gradient since the last line; the loss is None if every step was skipped."""
    step.sync_skipped_steps()
    loss, count = (state.loss_sums - state.window_sums).tolist()
    state.window_sums.copy_(state.loss_sums)
    return {'step': state.global_step, 'skipped': state.skipped_steps, 'loss': loss / count if count else None,
            'gradient_norm': step.gradient_norm.item()}


def as_text(record: dict) -> str:
    """Return the record in Markdown, with about 20 of its lines and the last one."""
    lines = record['lines']
    shown = lines[::math.ceil(len(lines) / 20)] if lines else []
    shown += [line for line in lines[-1:] if line is not shown[-1]]
    rows = [[line['step'], line['skipped'], *(
        'not finite' if value is None or not math.isfinite(value) else f'{value:.3g}'
        for value in (line['loss'], line['gradient_norm']))] for line in shown]
    remark = '' if record['finished'] else ' It is not finished.'
    return (f'# Training in {record["precision"]}\n\n{origin(record)} '
            'Loss is the mean since the line before, without skipped steps; the gradient is that of the last step.'
            f'{remark}\n\n{markdown_table(["step", "skipped", "loss", "norm of the gradient"], rows)}\n')


def main() -> None:
    args = parse_command('Train for some steps in float16.', 'float16', float16_options)
    resolve_name(args.model)
    training_args = shared_training_options(args).replacing(
        dataset='digits', amp=True, amp_dtype='auto' if args.device == 'cpu' else 'float16',  # a CPU takes bfloat16
        warmup_epochs=WARMUP_EPOCHS, cooldown_epochs=0)
    step, state, schedule, loader, precision = prepare_training(args, training_args)
    lines: list[dict] = []
    record = {**new_record('float16', args, state.world.device), 'precision': str(precision), 'finished': False,
              'lines': lines}
    started = time.perf_counter()
    batches = epochs_of(loader, state, schedule)
    bar = progress_bar(total=args.steps, desc=f'{args.model}, {precision}')
    try:
        # It takes a step at least, so that there is a line.
        while not state.global_step or (
                state.global_step < args.steps and time.perf_counter() - started < args.seconds):
            step(batches)
            bar.update()
            if state.global_step == 1 or state.global_step % args.log_interval == 0:
                lines.append(log_line(step, state))
                save(args, record, as_text(record))
        if lines[-1]['step'] != state.global_step:
            lines.append(log_line(step, state))
        record['finished'] = True
    except NotFiniteError:
        lines.append({'step': state.global_step, 'skipped': state.skipped_steps, 'loss': None, 'gradient_norm': None})
        raise
    finally:
        bar.close()
        loader.close()
        paths = save(args, record, as_text(record))
    print(as_text(record), *paths, sep='\n')


if __name__ == '__main__':
    run_script(main)
