"""Parameter groups, and timm's optimizer and learning rate schedule for them."""
import torch
from timm.optim import create_optimizer_v2, get_optimizer_class, list_optimizers
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler

from utils.errors import UserError, did_you_mean
from utils.timm_model import TimmModel

# Optimizers that update all parameters in one kernel, and can skip a step by a flag on the device.
FUSED = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD)


def param_groups(model: TimmModel, weight_decay: float, body_lr_scale: float = 1.0) -> list[dict]:
    """Put every trainable parameter of `model` into exactly one group.

    Weights decay; biases, 1-D parameters and those that `model.no_weight_decay()` names do not. All parameters but the
    classifier's use `body_lr_scale` times the learning rate, at every point of the schedule. Groups have a 'name', such
    as 'decayed' or 'head, not decayed'.
    """
    without_decay = model.no_weight_decay() if hasattr(model, 'no_weight_decay') else set()
    # A classifier can have several heads (distilled DeiT).
    classifier = model.get_classifier()
    heads = classifier if isinstance(classifier, tuple) else (classifier,)
    in_head = {id(p) for head in heads for p in head.parameters()}
    groups: dict[tuple[bool, float], dict] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        decays = parameter.ndim > 1 and not name.endswith('.bias') and name not in without_decay
        scale = 1.0 if id(parameter) in in_head else body_lr_scale
        part = '' if body_lr_scale == 1 else 'head, ' if id(parameter) in in_head else 'body, '
        group = groups.setdefault((decays, scale), {
            'params': [], 'weight_decay': weight_decay if decays else 0.0, 'lr_scale': scale,
            'name': f'{part}decayed' if decays else f'{part}not decayed'})
        group['params'].append(parameter)
    return list(groups.values())


def create_optimizer(groups: list[dict], args) -> torch.optim.Optimizer:
    """Create the optimizer that --opt names, in torch's fused form if there is one.

    Raises:
        UserError: there is no such optimizer, or it refuses the settings.
    """
    names = [str(name) for name in list_optimizers()]
    if args.opt.lower() not in names:
        raise UserError(f'--opt {args.opt}: no such optimizer{did_you_mean(args.opt.lower(), names)}')
    if args.opt_betas and len(args.opt_betas) < 2:
        raise UserError(f'--opt-betas {args.opt_betas[0]}: give all of them, such as 0.9 0.999')
    extra = {'eps': args.opt_eps, 'betas': args.opt_betas and tuple(args.opt_betas)}
    try:
        if get_optimizer_class(args.opt.lower(), bind_defaults=False) in FUSED:
            extra['fused'] = True
        optimizer = create_optimizer_v2(groups, opt=args.opt, lr=args.lr, weight_decay=args.weight_decay,
                                        momentum=args.momentum, **{k: v for k, v in extra.items() if v is not None})
    except (TypeError, ValueError, RuntimeError, AssertionError, ImportError) as error:
        raise UserError(f'--opt {args.opt} with these settings: {error}') from None
    if getattr(optimizer, 'is_second_order', False):
        raise UserError(f'--opt {args.opt} needs second derivatives, which training does not compute; use another one')
    return optimizer


def create_schedule(optimizer: torch.optim.Optimizer, args, steps_per_epoch: int) -> tuple[Scheduler, int]:
    """Return timm's schedule, and the number of epochs including the cool-down.

    `schedule.step(epoch)` sets the rates of an epoch, or `schedule.step_update(step)` those of a step with
    --sched-on-updates; the other one does nothing. Rates depend only on the options, so there is nothing to save.
    The published recipe, with lr the top rate: epoch 0 at 1e-6, epochs 1-9 at 1e-6 + e (lr - 1e-6) / 10, epochs 10-299
    at 1e-5 + (lr - 1e-5)(1 + cos(pi e / 300)) / 2, epochs 300-309 at 1e-5.

    Raises:
        UserError: --lr-noise has more than two values.
    """
    if args.lr_noise and len(args.lr_noise) > 2:
        raise UserError(f'--lr-noise {args.lr_noise}: give one or two parts of the epochs, such as 0.4 0.9')
    return create_scheduler_v2(
        optimizer, args.sched, num_epochs=args.epochs, decay_epochs=args.decay_epochs,
        cooldown_epochs=args.cooldown_epochs, decay_rate=args.decay_rate, min_lr=args.min_lr, warmup_lr=args.warmup_lr,
        warmup_epochs=args.warmup_epochs, noise=args.lr_noise, noise_pct=args.lr_noise_pct, noise_std=args.lr_noise_std,
        noise_seed=args.seed, cycle_mul=args.lr_cycle_mul, cycle_limit=args.lr_cycle_limit,
        step_on_epochs=not args.sched_on_updates, updates_per_epoch=steps_per_epoch)
