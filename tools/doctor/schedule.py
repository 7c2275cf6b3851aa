"""Time and cost of all epochs, from the measured rates."""
from collections.abc import Iterator

from engine.optimizer import create_schedule
from options.checks import count_runs
from tools.doctor.case import Case, Loading, Rates, Saved, Schedule, Setup, Splits, Steps
from tools.doctor.disk import save_once
from tools.doctor.findings import LOOK, OK, Finding, duration
from utils.console import plural
from utils.errors import UserError

# Seconds of training that a user should know of.
LONG = 14 * 86400


def look_at_schedule(case: Case, splits: Splits, setup: Setup, loading: Loading, steps: Steps,
                     rates: Rates) -> Iterator[Finding | Schedule | Saved]:
    """Compute hours and money of all epochs, with evaluation and saving."""
    args, is_gpu = case.args, case.world.device.type == 'cuda'
    per_step = args.batch_size * args.accum_steps * case.processes
    per_epoch = len(splits.train) // per_step
    if not per_epoch:
        raise UserError(f'{len(splits.train):,} training images are fewer than one step of {per_step:,}; use a '
                        'smaller -b')
    _, epochs = create_schedule(setup.state.optimizer, args, per_epoch)
    yield Schedule(per_epoch * epochs)
    training = per_epoch * per_step / rates.total
    evaluating = 0.0
    if loading.eval_rate:
        rate = min(steps.forward_rate * (case.processes if is_gpu else 1),
                   loading.supply * loading.eval_rate / loading.rate)
        evaluating = len(splits.val or ()) / rate * (2 if args.model_ema and not args.model_ema_force_cpu else 1)
        evaluating *= -(-epochs // args.val_interval) / epochs
    saved = save_once(case, setup)
    yield saved
    # A checkpoint is written while training continues: only what lasts longer than an epoch holds it up.
    runs = count_runs(args) or 1
    seconds = runs * epochs * (training + evaluating + max(0.0, saved.seconds - training))
    hours = seconds / 3600 * case.processes
    figure = f'{plural(epochs, "epoch")} of {plural(per_epoch, "step")}'
    if args.cooldown_epochs and epochs > args.epochs:
        figure += f' ({epochs - args.cooldown_epochs:,} of --epochs, then {args.cooldown_epochs:,} to cool down)'
    figure = (f'{plural(runs, "run")} of {figure}' if runs > 1 else figure) + f': {duration(seconds)}'
    money = args.price and hours * args.price
    if is_gpu:
        figure += f', {hours:,.1f} GPU-hours' + '; --price says what they cost' * (not money)
    if money:
        figure += f'; at --price {args.price:g} that costs {money:,.2f}'
    parts = (f'an epoch is {duration(training)} of training and {duration(evaluating)} of evaluation; a checkpoint is '
             f'written in {saved.seconds:.1f} s, while training goes on')
    mark, remedy = OK, ''
    if seconds > LONG:
        mark, remedy = LOOK, 'More or faster devices, fewer --epochs, a smaller model or --img-size shorten it.'
    yield Finding(mark, 'Whole schedule', figure, remedy, [parts], {
        'epochs': epochs, 'steps_per_epoch': per_epoch, 'seconds': seconds, 'hours': hours, 'money': money})
    if case.processes > 1:
        means = 'as many times as fast' if is_gpu else 'as fast, because they share the cores'
        yield Finding(OK, 'Estimated', f'One process was measured; {case.processes} are assumed to be {means}')
