"""Parameter groups, and timm's optimizer and learning rate schedule for them."""
import inspect

import torch
from timm.optim import create_optimizer_v2, get_optimizer_class, list_optimizers
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler

from engine.layers import classifier_parameters, number_layers
from utils.errors import UserError, did_you_mean
from utils.keywords import keywords
from utils.timm_model import TimmModel

# Optimizers that update all parameters in one kernel, and can skip a step by a flag on the device.
FUSED = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD)
# Arguments of optimizers that have an option of their own, or that TrainingStep depends on.
OPTIONS_OF_ARGUMENTS = {'lr': 'lr', 'weight_decay': 'weight-decay', 'momentum': 'momentum', 'eps': 'opt-eps',
                        'betas': 'opt-betas', 'opt': 'opt', 'layer_decay': 'layer-decay'}
# Arguments of timm's create_optimizer_v2, beside these, and what training depends on.
NOT_OF_OPTIMIZERS = {*inspect.signature(create_optimizer_v2).parameters, 'params', 'fused', 'capturable',
                     'differentiable'} - {'foreach', *OPTIONS_OF_ARGUMENTS}


def param_groups(model: TimmModel, weight_decay: float, body_lr_scale: float = 1.0,
                 layer_decay: float | None = None) -> list[dict]:
    """Put every trainable parameter of `model` into exactly one group.

    Weights decay; biases, 1-D parameters and those that `model.no_weight_decay()` names do not. All parameters but the
    classifier's use `body_lr_scale` times the learning rate, at every point of the schedule. With `layer_decay`, each
    layer also uses this factor times the rate of the layer above it (Clark et al. 2020, ELECTRA; as timm's
    `param_groups_layer_decay`). Groups have a 'name', such as 'decayed', 'head, not decayed' or 'layer 3, decayed'.
    """
    without_decay = model.no_weight_decay() if hasattr(model, 'no_weight_decay') else set()
    in_head = classifier_parameters(model)
    layers = number_layers(model) if layer_decay else {}
    top = max(layers.values(), default=0)
    groups: dict[str, dict] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        decays = parameter.ndim > 1 and not name.endswith('.bias') and name not in without_decay
        scale = 1.0 if id(parameter) in in_head else body_lr_scale
        parts = [] if body_lr_scale == 1 else ['head'] if id(parameter) in in_head else ['body']
        if layer_decay:
            scale *= layer_decay ** (top - layers[name])
            parts.append(f'layer {layers[name]}')
        group_name = ', '.join([*parts, 'decayed' if decays else 'not decayed'])
        group = groups.setdefault(group_name, {
            'params': [], 'weight_decay': weight_decay if decays else 0.0, 'lr_scale': scale, 'name': group_name})
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
    further = keywords(args.opt_kwargs)
    for name in further.keys() & OPTIONS_OF_ARGUMENTS.keys():
        raise UserError(f'--opt-kwargs {name}: use --{OPTIONS_OF_ARGUMENTS[name]}')
    for name in further.keys() & NOT_OF_OPTIMIZERS:
        raise UserError(f'--opt-kwargs {name}: no setting of an optimizer; leave it out')
    extra = {'eps': args.opt_eps, 'betas': args.opt_betas and tuple(args.opt_betas)}
    try:
        if get_optimizer_class(args.opt.lower(), bind_defaults=False) in FUSED:
            extra['fused'] = True
        settings = {k: v for k, v in extra.items() if v is not None} | further
        optimizer = create_optimizer_v2(groups, opt=args.opt, lr=args.lr, weight_decay=args.weight_decay,
                                        momentum=args.momentum, **settings)
    except (TypeError, ValueError, RuntimeError, AssertionError, ImportError) as error:
        given = f' and --opt-kwargs {" ".join(args.opt_kwargs)}' if further else ''
        raise UserError(f'--opt {args.opt} with these settings{given}: {error}') from None
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
