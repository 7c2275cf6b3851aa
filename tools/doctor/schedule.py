"""What tools/doctor reckons of a run from what doctor_speed measured, and tries: time, disk, processes, recipe.

What is written goes to temporary folders below --output, or the nearest folder above it that is there.
"""
from typing import TYPE_CHECKING

from engine.optimizer import create_schedule
from tools.doctor.disk import checkpoint_of
from tools.doctor.findings import LOOK, OK, Finding, NotMeasured, duration, plural
from tools.doctor.speed import RATES
from utils.errors import UserError

if TYPE_CHECKING:
    from tools.doctor.case import Case

LONG = 14 * 86400  # seconds of training, beyond which one would rather know


# ---------------------------------------------------------------------------------------------------------------------
# 5. Time and cost


def look_at_schedule(case: 'Case'):
    """Hours and money of all epochs, with evaluation and saving."""
    args = case.args
    if not case.total_rate:
        raise NotMeasured(f'no training step could be measured, see "{RATES}"')
    per_step = args.batch_size * args.accum_steps * case.processes
    steps = len(case.train) // per_step
    if not steps:
        raise UserError(f'{len(case.train):,} training images do not make one step of {per_step:,}; use a smaller -b')
    _, epochs = create_schedule(case.state.optimizer, args, steps)
    case.total_steps = steps * epochs
    training = steps * per_step / case.total_rate
    evaluating = 0.0
    if case.eval_loader_rate:
        devices = case.processes if case.world.device.type == 'cuda' else 1
        rate = min(case.forward_rate * devices, case.supply * case.eval_loader_rate / case.loader_rate)
        evaluating = len(case.val or ()) / rate * (2 if args.model_ema and not args.model_ema_force_cpu else 1)
    saving = checkpoint_of(case)['seconds']
    # It is written while training goes on: only what lasts longer than an epoch holds it up.
    seconds = epochs * (training + evaluating + max(0.0, saving - training))
    hours = seconds / 3600
    figure = f'{plural(epochs, "epoch")} of {plural(steps, "step")}'
    if args.cooldown_epochs and epochs > args.epochs:
        figure += f' ({epochs - args.cooldown_epochs:,} of --epochs, then {args.cooldown_epochs:,} to cool down)'
    figure += f': {duration(seconds)}'
    money = args.price and hours * case.processes * args.price
    if case.world.device.type == 'cuda':
        figure += f', {hours * case.processes:,.1f} GPU-hours' + '; --price says what they cost' * (not money)
    if money:
        figure += f'; at --price {args.price:g} that costs {money:,.2f}'
    parts = (f'an epoch is {duration(training)} of training and {duration(evaluating)} of evaluation; a checkpoint is '
             f'written in {saving:.1f} s, while training goes on')
    numbers = {'epochs': epochs, 'steps_per_epoch': steps, 'seconds': seconds, 'hours': hours * case.processes,
               'money': money}
    mark, remedy = OK, ''
    if seconds > LONG:
        mark, remedy = LOOK, 'More or faster devices, fewer --epochs, a smaller model or --img-size shorten it.'
    yield Finding(mark, 'Whole schedule', figure, remedy, [parts], numbers)
    if case.processes > 1:
        means = 'as many times as fast' if case.world.device.type == 'cuda' else 'as fast, for they share the cores'
        yield Finding(OK, 'Reckoned', f'One process was measured; {case.processes} are taken to be {means}')


# ---------------------------------------------------------------------------------------------------------------------
# 6. Disk


# ---------------------------------------------------------------------------------------------------------------------
# 7. Processes together


# ---------------------------------------------------------------------------------------------------------------------
# 8. The recipe
