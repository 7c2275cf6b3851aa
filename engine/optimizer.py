"""Parameter groups, the optimizer and the learning rate of every epoch; timm builds both, this says from what."""
import torch
from timm.optim import create_optimizer_v2, get_optimizer_class, list_optimizers
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler

from utils.errors import UserError, did_you_mean
from utils.timm_model import TimmModel

# One kernel for all parameters, the same as the others' to rounding, that can be told on the device to change nothing.
FUSED = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD)


def param_groups(model: TimmModel, weight_decay: float, body_lr_scale: float = 1.0) -> list[dict]:
    """Every trainable parameter of `model` in exactly one group.

    Weights decay; biases, 1-D parameters and what `model.no_weight_decay()` names do not. With `body_lr_scale`, all
    but the classifier learn at this part of the learning rate, at every point of the schedule. Groups have a 'name',
    such as 'decayed' or 'head, not decayed'.
    """
    without_decay = model.no_weight_decay() if hasattr(model, 'no_weight_decay') else set()
    # A classifier can be several heads (distilled DeiT).
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
    """The optimizer that --opt names, over `groups`; in torch's fused form where there is one.

    Raises:
        UserError: no such optimizer, or settings that it refuses.
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
    except (TypeError, ValueError, RuntimeError, AssertionError, ImportError) as e:
        raise UserError(f'--opt {args.opt} with these settings: {e}') from None
    if getattr(optimizer, 'is_second_order', False):
        raise UserError(f'--opt {args.opt} needs second derivatives, which training does not compute; use another')
    return optimizer


def create_schedule(optimizer: torch.optim.Optimizer, args, steps_per_epoch: int) -> tuple[Scheduler, int]:
    """timm's schedule that the options ask for, and the number of epochs with the cool-down.

    `schedule.step(epoch)` sets the rates of an epoch or, with --sched-on-updates, `schedule.step_update(step)` those
    of a step; the other does nothing. Both are functions of the options, so that there is nothing to save. For the
    published recipe, with lr the top rate: epoch 0 at 1e-6, epochs 1-9 at 1e-6 + e (lr - 1e-6) / 10, epochs 10-299 at
    1e-5 + (lr - 1e-5)(1 + cos(pi e / 300)) / 2, epochs 300-309 at 1e-5.

    Raises:
        UserError: the noise is neither one nor two parts of the epochs.
    """
    if args.lr_noise and len(args.lr_noise) > 2:
        raise UserError(f'--lr-noise {args.lr_noise}: give one or two parts of the epochs, such as 0.4 0.9')
    return create_scheduler_v2(
        optimizer, args.sched, num_epochs=args.epochs, decay_epochs=args.decay_epochs,
        cooldown_epochs=args.cooldown_epochs, decay_rate=args.decay_rate, min_lr=args.min_lr, warmup_lr=args.warmup_lr,
        warmup_epochs=args.warmup_epochs, noise=args.lr_noise, noise_pct=args.lr_noise_pct, noise_std=args.lr_noise_std,
        noise_seed=args.seed, cycle_mul=args.lr_cycle_mul, cycle_limit=args.lr_cycle_limit,
        step_on_epochs=not args.sched_on_updates, updates_per_epoch=steps_per_epoch)
