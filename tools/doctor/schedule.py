"""What tools/doctor reckons of a run from what doctor_speed measured, and tries: time, disk, processes, recipe.

What is written goes to temporary folders below --output, or the nearest folder above it that is there.
"""
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from engine.checkpoint import KEEP_AT_LEAST, save_checkpoint
from engine.optimizer import create_schedule
from engine.run_folder import RunLock
from tools.doctor.findings import LOOK, OK, STOP, Finding, NotMeasured, duration, gib, plural
from tools.doctor.speed import RATES, device_name
from utils.disk import ROOT
from utils.errors import UserError
from utils.job import without_job

if TYPE_CHECKING:
    from tools.doctor.__main__ import Case

ROUND_TRIP_SECONDS = 60
LONG = 14 * 86400  # seconds of training, beyond which one would rather know
PUBLISHED_RATE = 5e-4 / 512  # of learning, for each image of a step
LARGE = 100_000  # images to train on, from which on a data set is like ImageNet
FORGOTTEN = 0.01  # part of the average that may still be the initial weights


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


def checkpoint_of(case: 'Case') -> dict:
    """Saves a checkpoint of this run once, where the run would; its bytes and seconds, and what the folder can do."""
    if case.saved is None:
        output = Path(case.args.output).expanduser().absolute()
        existing = next(path for path in (output, *output.parents) if path.exists())
        try:
            with tempfile.TemporaryDirectory(prefix='.doctor-', dir=existing) as folder:
                case.saved = {'folder': existing, **_save_once(case, Path(folder))}
        except OSError as error:
            case.saved = {'folder': existing, 'bytes': 0, 'seconds': 0.0, 'problem': error.strerror or str(error)}
    return case.saved


def _save_once(case: 'Case', folder: Path) -> dict:
    """Raises OSError where something could not be written."""
    lock, is_locked = RunLock(folder), False
    try:
        RunLock(folder).release()
    except UserError:
        is_locked = True
    content = case.state.state_dict()
    started = time.perf_counter()
    path = save_checkpoint(content, folder, global_step=0, keep=KEEP_AT_LEAST, is_best=True)
    seconds = time.perf_counter() - started
    has_links = path.stat().st_nlink > 1
    lock.release()
    return {'bytes': path.stat().st_size, 'seconds': seconds, 'locks': is_locked, 'links': has_links, 'problem': ''}


def look_at_disk(case: 'Case'):
    """Whether the checkpoints fit, and whether the folder can do what they need."""
    if not hasattr(case, 'state'):
        raise NotMeasured(f'there is no model to save, see "{RATES}"')
    saved = checkpoint_of(case)
    if saved['problem']:
        yield Finding(STOP, 'Checkpoints', f'A checkpoint cannot be written in {saved["folder"]} ({saved["problem"]})',
                      'Make room, get the right to write there, or name another --output.')
        return
    # The newest ones, the best, and the one that is being written while all others are still there.
    kept = max(case.args.checkpoint_hist, KEEP_AT_LEAST) + 2
    need, free = kept * saved['bytes'], shutil.disk_usage(saved['folder']).free
    speed = saved['bytes'] / max(saved['seconds'], 1e-6)
    figure = (f'{gib(saved["bytes"])} each, up to {kept} at a time: {gib(need)}; {saved["folder"]} has {gib(free)} '
              f'free; written in {saved["seconds"]:.1f} s ({speed / 1e6:,.0f} MB/s)')
    numbers = {'bytes': saved['bytes'], 'needed': need, 'free': free, 'seconds': saved['seconds']}
    if need > free:
        yield Finding(STOP, 'Checkpoints', figure, f'Make room for {gib(need - free)}, or name another --output.',
                      numbers=numbers)
    elif free < 2 * need:
        yield Finding(LOOK, 'Checkpoints', figure, 'That is close: make room, or name another --output.',
                      numbers=numbers)
    else:
        yield Finding(OK, 'Checkpoints', figure, numbers=numbers)
    lacks = ['locks, so nothing keeps two runs out of one folder'] * (not saved['locks']) + [
        'hard links, so the best and the last are written twice'] * (not saved['links'])
    inodes = os.statvfs(saved['folder'])
    if inodes.f_files and inodes.f_favail < 1000:
        lacks.append(f'room for more than {inodes.f_favail} files')
    if lacks:
        yield Finding(LOOK, 'File system', f'{saved["folder"]} has no {"; no ".join(lacks)}',
                      'Name an --output on another disk, or start one run at a time and leave it room.')
    else:
        yield Finding(OK, 'File system', 'Files can be written, renamed, linked and locked')


# ---------------------------------------------------------------------------------------------------------------------
# 7. Processes together


def look_at_processes(case: 'Case'):
    """Starts the processes by the launcher, as a run does, and has them add up a gradient."""
    count, device = case.together, case.world.device
    if count == 1:
        yield Finding(OK, 'Processes', 'One, which has nothing to exchange')
        return
    megabytes = (case.gradient_bytes or 86_000_000) / 1e6
    if device.type == 'cuda':
        torch.cuda.empty_cache()
    found, problem = add_up(count, megabytes, device.type)
    if found is None:
        yield Finding(STOP, 'Round trip', f'{count} processes could not add up a gradient: {problem}',
                      'See to what is said there; GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME name the network to use, '
                      'NCCL_DEBUG=INFO tells more.')
        return
    seconds, share = found['seconds'], found['seconds'] / case.step_seconds if case.step_seconds else 0
    figure = (f'{count} processes add up {megabytes:,.1f} MB in {1000 * seconds:,.1f} ms '
              f'({found["bytes_per_second"] / 1e9:.2f} GB/s); the sum is right')
    if share:
        figure += f'; {100 * share:.0f} % of a step'
        # On a CPU it takes the cores that compute.
        figure += ', most of it while the gradient is computed' * (device.type == 'cuda')
    if share > 0.5 and case.processes > 1:
        yield Finding(LOOK, 'Round trip', figure, 'Larger -b or --accum-steps make it rarer; a faster link between the '
                      'processes makes it shorter.', numbers=found)
    else:
        yield Finding(OK, 'Round trip', figure, numbers=found)


def add_up(count: int, megabytes: float, kind: str) -> tuple[dict | None, str]:
    """What tools/doctor/round_trip.py has found with `count` processes here, or why it has not."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / 'found.json'
        command = [sys.executable, '-m', 'launch.launcher', str(count), str(ROOT / 'tools/doctor/round_trip.py'),
                   '--megabytes', f'{megabytes:.6f}', '--device', kind, '--timeout', str(ROUND_TRIP_SECONDS // 2),
                   '--json', str(result)]
        # Of a job that this process may itself be in, the others must know nothing.
        environment = {**without_job(os.environ), 'GRACE': '2', 'MAX_RESTARTS': '0'}
        process = subprocess.Popen(command, cwd=ROOT, env=environment, text=True,
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL)
        try:
            _, said = process.communicate(timeout=ROUND_TRIP_SECONDS)
        except subprocess.TimeoutExpired:
            return None, f'not done after {ROUND_TRIP_SECONDS} s'
        finally:
            _end(process)
        if process.returncode:
            return None, (said.strip().splitlines() or [f'exit code {process.returncode}'])[-1]
        return json.loads(result.read_text(encoding='utf-8')), ''


def _end(process: subprocess.Popen) -> None:
    """Ends the launcher, which ends the processes that it has started."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.communicate(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()


# ---------------------------------------------------------------------------------------------------------------------
# 8. The recipe


def look_at_recipe(case: 'Case'):
    """Options that do not go with one another, or with this machine."""
    is_sound = True
    for look in (_learning_rate, _lengths, _precision):
        for finding in look(case):
            is_sound = False
            yield finding
    if is_sound:
        yield Finding(OK, 'Recipe', 'Nothing speaks against it')


def _learning_rate(case: 'Case'):
    args = case.args
    images = args.batch_size * args.accum_steps * case.processes
    published = PUBLISHED_RATE * images
    is_tuning = bool(args.pretrained or args.initial_checkpoint)
    if len(case.train) < LARGE:
        return  # what is right for small data sets nobody knows
    # The smallest models were trained at twice that rate.
    if args.opt.lower() == 'adamw' and (args.lr > 2.1 * published or (args.lr < published / 2.1 and not is_tuning)):
        figure = (f'--lr {args.lr:g} with {images:,} images a step; the published recipe has 5e-4 for every 512 '
                  f'images: {published:.2g}, up to twice that for the smallest models')
        remedy = (f'For ImageNet from scratch say --lr {published:.2g}, or tell the doctor the --processes of the run; '
                  'for other data it may be as you mean it.')
        yield Finding(LOOK, 'Learning rate', figure, remedy,
                      numbers={'lr': args.lr, 'published': published, 'images': images})


def _lengths(case: 'Case'):
    args = case.args
    if args.warmup_epochs >= args.epochs:
        yield Finding(LOOK, 'Warm-up', f'{args.warmup_epochs} epochs of {args.epochs}: the rate never comes to its top',
                      f'Say --warmup-epochs {args.epochs // 10}.')
    if args.model_ema and case.total_steps:
        initial = args.model_ema_decay ** case.total_steps
        if initial > FORGOTTEN:
            decay = FORGOTTEN ** (1 / (0.2 * case.total_steps))
            text = f'{decay:.{1 - math.floor(math.log10(1 - decay))}f}'  # two digits of what it lacks to one
            figure = (f'--model-ema-decay {args.model_ema_decay:g} over {plural(case.total_steps, "step")}: at the end '
                      f'{100 * initial:.0f} % of the average is still what it began with')
            remedy = f'Say --model-ema-decay {text}, which forgets it in a fifth of the run; or --no-model-ema.'
            yield Finding(LOOK, 'Averaged weights', figure, remedy,
                          numbers={'initial': initial, 'steps': case.total_steps})


def _precision(case: 'Case'):
    args, device = case.args, case.world.device
    if device.type != 'cuda':
        return
    has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
    name = device_name(device)
    if not args.amp:
        yield Finding(LOOK, 'Precision', f'float32 on {name}', 'Say --amp, as the published recipe: it is faster.')
    elif case.precision.dtype is torch.float16 and has_bfloat16:
        yield Finding(LOOK, 'Precision', f'float16 on {name}, which has bfloat16',
                      'Leave --amp-dtype out: bfloat16 needs no scaling and does not overflow.')
    elif case.precision.dtype is torch.bfloat16 and not has_bfloat16:
        yield Finding(LOOK, 'Precision', f'bfloat16 on {name}, which only imitates it', 'Leave --amp-dtype out.')
    if not args.pin_mem:
        yield Finding(LOOK, 'Transfer', '--no-pin-mem: the GPU waits while batches are copied', 'Leave it out.')
    if args.deterministic:
        yield Finding(LOOK, 'Kernels', '--deterministic: only those that repeat to the bit',
                      'Leave it out where that does not matter: others are faster.')
