"""Options of a run that do not go together. A run says them before it starts, and tools/doctor shows them."""
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from engine.ema import FORGOTTEN, PUBLISHED_DECAY, initial_share
from utils.console import plural

_logger = logging.getLogger(__name__)

# Learning rate for each image of a step.
PUBLISHED_RATE = 5e-4 / 512
# Training images from which on a data set is like ImageNet.
LARGE = 100_000


@dataclass(frozen=True)
class Advice:
    """What was found and what to do.

    Attributes:
        title: what was checked, in up to 18 letters.
        figure: what was found, without a full stop.
        remedy: sentences on what to do.
        numbers: the same for programs, by name.
    """
    title: str
    figure: str
    remedy: str
    numbers: dict = field(default_factory=dict)

    def __str__(self) -> str:
        return f'{self.title.lower()}: {self.figure}. {self.remedy}'


def advise(args, *, images: int, processes: int, steps: int, device: torch.device,
           dtype: torch.dtype | None) -> Iterator[Advice]:
    """Check whether the options of a run fit one another, and its machine.

    Args:
        images: in the training split.
        processes: of the run.
        steps: of the whole run; 0 if unknown.
        dtype: of mixed precision; None for float32.
    """
    yield from _learning_rate(args, images, args.batch_size * args.accum_steps * processes)
    yield from _lengths(args, steps)
    yield from _choice(args)
    yield from _order(args, args.batch_size * args.accum_steps * processes)
    if device.type == 'cuda':
        yield from _gpu(args, device, dtype)


def warn(args, **case) -> None:
    """Log what `advise` finds."""
    for advice in advise(args, **case):
        _logger.warning('%s', advice)


def _learning_rate(args, images: int, per_step: int) -> Iterator[Advice]:
    published = PUBLISHED_RATE * per_step
    is_tuning = bool(args.pretrained or args.initial_checkpoint or getattr(args, 'transfer_model', None))
    if images < LARGE:
        return  # small data sets have no published rate
    # The smallest models were trained at twice that rate.
    if args.opt.lower() == 'adamw' and (args.lr > 2.1 * published or (args.lr < published / 2.1 and not is_tuning)):
        figure = (f'--lr {args.lr:g} with {per_step:,} images a step; the published recipe has 5e-4 for every 512 '
                  f'images: {published:.2g}, up to twice that for the smallest models')
        remedy = (f'For ImageNet from scratch say --lr {published:.2g}, or change the images of a step; other data may '
                  'need another rate.')
        yield Advice('Learning rate', figure, remedy,
                     {'lr': args.lr, 'published': published, 'images': per_step})


def _lengths(args, steps: int) -> Iterator[Advice]:
    if args.warmup_epochs >= args.epochs:
        yield Advice('Warm-up', f'{args.warmup_epochs} epochs of {args.epochs}: the rate never reaches its top',
                     f'Say --warmup-epochs {args.epochs // 10}.')
    if args.model_ema_decay is not None and not args.model_ema:
        yield Advice('Averaged weights', f'--model-ema-decay {args.model_ema_decay:g}, but no average is kept',
                     'Say --model-ema, or leave the decay out.')
    if not args.model_ema or args.model_ema_decay is None or not steps:
        return
    initial = initial_share(args.model_ema_decay, steps)
    if initial > FORGOTTEN:
        decay = FORGOTTEN ** (1 / (0.2 * steps))
        text = f'{decay:.{1 - math.floor(math.log10(1 - decay))}f}'  # two digits of its difference to one
        figure = (f'--model-ema-decay {args.model_ema_decay:g} over {plural(steps, "step")}: at the end '
                  f'{100 * initial:.0f} % of the average is still the initial weights')
        remedy = (f'Leave it out, and it warms up to {PUBLISHED_DECAY:g}; or say --model-ema-decay {text}, which '
                  'forgets them in a fifth of the run.')
        yield Advice('Averaged weights', figure, remedy, {'initial': initial, 'steps': steps})


def _choice(args) -> Iterator[Advice]:
    wait = (args.early_stop or 0) * args.val_interval
    if wait >= args.epochs:
        yield Advice('Early stop', f'--early-stop {args.early_stop} waits {wait} epochs, of {args.epochs}: it never '
                     'ends the run', f'Say --early-stop {max(1, args.epochs // args.val_interval // 5)}, or leave it '
                     'out.')
    if args.val_interval >= args.epochs > 1:
        yield Advice('Evaluation', f'--val-interval {args.val_interval} of {args.epochs} epochs: only the last one is '
                     'evaluated, so it is the best one', f'Say --val-interval {max(1, args.epochs // 10)}.')


def _order(args, per_step: int) -> Iterator[Advice]:
    repeats = args.aug_repeats
    if repeats > 1 and not args.aug:
        yield Advice('Repeats', f'--aug-repeats {repeats} beside --no-aug: all repeats of an image are the same',
                     'Leave one of the two out.')
    elif repeats > per_step:
        yield Advice('Repeats', f'--aug-repeats {repeats} with {plural(per_step, "image")} a step: all are of the same '
                     'one', 'Say --aug-repeats 3, as published.')
    if args.sampler == 'balanced' and getattr(args, 'class_weights', None):
        yield Advice('Class balance', '--sampler balanced beside --class-weights: rare classes count twice over',
                     'Leave one of the two out.')


def _gpu(args, device: torch.device, dtype: torch.dtype | None) -> Iterator[Advice]:
    has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
    name = torch.cuda.get_device_name(device)
    if not args.amp:
        yield Advice('Precision', f'float32 on {name}', 'Say --amp, as the published recipe does: it is faster.')
    elif dtype is torch.float16 and has_bfloat16:
        yield Advice('Precision', f'float16 on {name}, which has bfloat16',
                     'Leave --amp-dtype out: bfloat16 needs no scaling and does not overflow.')
    elif dtype is torch.bfloat16 and not has_bfloat16:
        yield Advice('Precision', f'bfloat16 on {name}, which only emulates it', 'Leave --amp-dtype out.')
    if not args.pin_mem:
        yield Advice('Transfer', '--no-pin-mem: the GPU waits while batches are copied', 'Leave it out.')
    if args.deterministic:
        yield Advice('Kernels', '--deterministic: only kernels that repeat to the bit',
                     'Leave it out unless you need that: others are faster.')
