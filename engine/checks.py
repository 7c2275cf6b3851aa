"""What is wrong with a run's options and can be known before its data is scanned, minutes on a slow disk."""
from pathlib import Path

import torch
from torch import nn

from engine.checkpoint import LAST
from engine.loss import create_loss
from engine.optimizer import create_optimizer, create_schedule
from utils.distributed import World
from utils.errors import UserError
from utils.files import read_checkpoint
from utils.log import check_folder


def check_run_options(args, world: World, *, kind: str) -> None:
    """Raises the UserError that optimizer, schedule, loss, checkpoints or the run's folder would raise later.

    Args:
        kind: 'train' or 'transfer', the part of --output where the run's folder is.
    """
    group = {'params': [nn.Parameter(torch.zeros(2, 2))], 'weight_decay': args.weight_decay, 'lr_scale': 1.0}
    create_schedule(create_optimizer([group], args), args, steps_per_epoch=1)
    create_loss(args, soft_targets=False)
    folder = Path(args.output).expanduser() / kind / args.experiment
    if args.resume not in ('', 'auto'):
        checkpoint = Path(args.resume).expanduser()
        checkpoint = checkpoint / LAST if checkpoint.is_dir() else checkpoint
        if not checkpoint.is_file():
            raise UserError(f"--resume {args.resume}: no such checkpoint; give a file such as {LAST}, or 'auto'")
        folder = folder if args.experiment else checkpoint.parent
    if world.is_main:
        check_folder(folder, '--output')
        for path in (args.initial_checkpoint, getattr(args, 'transfer_model', None)):
            if path:
                read_checkpoint(path)
