"""Checks a run's options before its data is scanned, which takes minutes on a slow disk."""
from pathlib import Path

import torch
from torch import nn

from engine.compile import check_compiler
from engine.loss import create_loss
from engine.optimizer import create_optimizer, create_schedule
from engine.run_folder import check_resume
from utils import job
from utils.disk import check_writable
from utils.distributed import World
from utils.errors import UserError
from utils.weight_sources import read_weights


def check_run_options(args, world: World, *, kind: str) -> None:
    """Raise the UserError that optimizer, schedule, loss, checkpoints or the run's folder would raise later.

    Args:
        kind: 'train' or 'transfer', the part of --output that holds the run's folder.
    """
    group = {'params': [nn.Parameter(torch.zeros(2, 2))], 'weight_decay': args.weight_decay, 'lr_scale': 1.0}
    create_schedule(create_optimizer([group], args), args, steps_per_epoch=1)
    create_loss(args, soft_targets=False)
    if args.token_labels and (args.loss != 'ce' or args.class_weights or args.jsd):
        raise UserError('--token-labels: their loss is the cross-entropy of images and tokens; leave --loss, '
                        '--class-weights and --jsd out')
    if args.sync_bn and world.size > 1 and world.device.type != 'cuda':
        raise UserError('--sync-bn: batch norm over several processes needs GPUs; leave it out')
    if args.compile:
        check_compiler()
    if args.compile == 'graphs' and args.accum_steps > 1:
        raise UserError(f'--compile graphs with --accum-steps {args.accum_steps}: each batch would overwrite '
                        'the gradient of the previous one; use --compile model')
    folder = Path(args.output).expanduser() / kind / args.experiment
    if args.resume not in ('', 'auto') and not job.was_restarted():
        start = check_resume(args.resume)
        folder = folder if args.experiment else start
    if world.is_main:
        check_writable(folder, '--output')
        for path in (args.initial_checkpoint, getattr(args, 'transfer_model', None), args.teacher_checkpoint):
            if path:
                read_weights(path)
