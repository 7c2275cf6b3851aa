"""Recipe: options that do not go together."""
import math
from collections.abc import Iterator

import torch

from tools.doctor.case import Case, Schedule, Splits
from tools.doctor.findings import LOOK, OK, Finding
from tools.doctor.speed import device_name
from utils.console import plural

# Learning rate for each image of a step.
PUBLISHED_RATE = 5e-4 / 512
# Training images from which on a data set is like ImageNet.
LARGE = 100_000
# Share of the average that may still be the initial weights.
FORGOTTEN = 0.01


def look_at_recipe(case: Case, splits: Splits, schedule: Schedule | None) -> Iterator[Finding]:
    """Check whether the options fit one another, and this machine."""
    is_sound = True
    for findings in (_learning_rate(case, splits), _lengths(case, schedule.steps if schedule else 0), _precision(case)):
        for finding in findings:
            is_sound = False
            yield finding
    if is_sound:
        yield Finding(OK, 'Recipe', 'No conflicts found')


def _learning_rate(case: Case, splits: Splits) -> Iterator[Finding]:
    args = case.args
    images = args.batch_size * args.accum_steps * case.processes
    published = PUBLISHED_RATE * images
    is_tuning = bool(args.pretrained or args.initial_checkpoint)
    if len(splits.train) < LARGE:
        return  # small data sets have no published rate
    # The smallest models were trained at twice that rate.
    if args.opt.lower() == 'adamw' and (args.lr > 2.1 * published or (args.lr < published / 2.1 and not is_tuning)):
        figure = (f'--lr {args.lr:g} with {images:,} images a step; the published recipe has 5e-4 for every 512 '
                  f'images: {published:.2g}, up to twice that for the smallest models')
        remedy = (f'For ImageNet from scratch say --lr {published:.2g}, or tell the doctor the --processes of the run; '
                  'other data may need another rate.')
        yield Finding(LOOK, 'Learning rate', figure, remedy,
                      numbers={'lr': args.lr, 'published': published, 'images': images})


def _lengths(case: Case, steps: int) -> Iterator[Finding]:
    args = case.args
    if args.warmup_epochs >= args.epochs:
        yield Finding(LOOK, 'Warm-up', f'{args.warmup_epochs} epochs of {args.epochs}: the rate never reaches its top',
                      f'Say --warmup-epochs {args.epochs // 10}.')
    if args.model_ema and steps:
        initial = args.model_ema_decay ** steps
        if initial > FORGOTTEN:
            decay = FORGOTTEN ** (1 / (0.2 * steps))
            text = f'{decay:.{1 - math.floor(math.log10(1 - decay))}f}'  # two digits of its difference to one
            figure = (f'--model-ema-decay {args.model_ema_decay:g} over {plural(steps, "step")}: at the end '
                      f'{100 * initial:.0f} % of the average is still the initial weights')
            remedy = f'Say --model-ema-decay {text}, which forgets them in a fifth of the run; or --no-model-ema.'
            yield Finding(LOOK, 'Averaged weights', figure, remedy, numbers={'initial': initial, 'steps': steps})


def _precision(case: Case) -> Iterator[Finding]:
    args, device = case.args, case.world.device
    if device.type != 'cuda':
        return
    has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
    name = device_name(device)
    if not args.amp:
        yield Finding(LOOK, 'Precision', f'float32 on {name}', 'Say --amp, as the published recipe does: it is faster.')
    elif case.precision.dtype is torch.float16 and has_bfloat16:
        yield Finding(LOOK, 'Precision', f'float16 on {name}, which has bfloat16',
                      'Leave --amp-dtype out: bfloat16 needs no scaling and does not overflow.')
    elif case.precision.dtype is torch.bfloat16 and not has_bfloat16:
        yield Finding(LOOK, 'Precision', f'bfloat16 on {name}, which only emulates it', 'Leave --amp-dtype out.')
    if not args.pin_mem:
        yield Finding(LOOK, 'Transfer', '--no-pin-mem: the GPU waits while batches are copied', 'Leave it out.')
    if args.deterministic:
        yield Finding(LOOK, 'Kernels', '--deterministic: only kernels that repeat to the bit',
                      'Leave it out unless you need that: others are faster.')
