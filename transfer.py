"""Transfers a trained model to another data set: its weights, a new classifier, a learning rate for each of the two.

    python transfer.py --dataset cifar10 --model t2t_vit_19 --lr 0.05 --b 64 --num-classes 10 --img-size 224 \
        --transfer-learning True --transfer-model path/to/checkpoint
    python transfer.py /data/flowers --model t2t_vit_14 --transfer-learning True --transfer-model path/to/checkpoint

The classifier learns at --lr, everything else at --transfer-ratio of it, at every epoch. Without --transfer-learning
the model trains from random weights, all of it at --lr. CIFAR is fetched into ./data_cifar where no DIR is given. The
defaults are the published recipe, but that biases and norms do not decay.
"""
from options import groups as options
from utils.errors import UserError, run_script

GROUPS = (options.data_options, options.training_data_options, options.model_options, options.input_options,
          options.optimizer_options, options.schedule_options, options.augmentation_options,
          options.batch_norm_options, options.ema_options, options.device_options, options.compile_options,
          options.run_options)

# The published transfer recipe: SGD with plain momentum (timm's 'sgd' is Nesterov's), a cosine without warm-up, padded
# crops and flips, plain cross-entropy.
DEFAULTS = dict(
    dataset='cifar10', opt='momentum', lr=0.01, weight_decay=5e-4, batch_size=128,
    epochs=60, warmup_epochs=0, cooldown_epochs=0, min_lr=2e-4, train_crop_mode='pad', train_interpolation='bilinear',
    interpolation='bilinear', crop_pct=1.0, aa='', color_jitter=0.0, reprob=0.0, mixup=0.0, cutmix=0.0, smoothing=0.0,
    model_ema=False)


def transfer_options(parser):
    add = parser.add_argument_group('Transfer').add_argument
    add('--transfer-learning', type=options.truth, nargs='?', const=True, default=False, metavar='True|False',
        help='start from --transfer-model, or from --pretrained weights')
    add('--transfer-model', metavar='PATH', help='checkpoint to start from; its classifier may be of any size')
    add('--transfer-ratio', type=options.rate, default=0.01, metavar='R',
        help='learning rate of all but the classifier, as a part of --lr')
    add('--pixel-stats', default='imagenet', choices=['imagenet', 'cifar'],
        help="normalisation: that of the weights' training (imagenet), or the target's, as published (cifar)")


def main():
    # --- Options ------------------------------------------------------------------------------------------------------
    parser = options.create_parser('Transfer a model to another data set.', (*GROUPS, transfer_options), DEFAULTS)
    args = options.parse_options(parser)
    if args.transfer_learning and not (args.transfer_model or args.pretrained):
        raise UserError('--transfer-learning True: from what? give --transfer-model PATH or --pretrained')
    if args.transfer_model and not args.transfer_learning:
        raise UserError(f'--transfer-model {args.transfer_model} is given, but transfer learning is off; '
                        'add --transfer-learning True, or leave the checkpoint out to train from scratch')

    from data.pipeline import CIFAR_STATS, check_training_input, create_training_input, open_training_data
    from engine.checks import check_run_options
    from engine.optimizer import create_optimizer, param_groups
    from engine.run import create_state, fit
    from models import create_model_from_options, resolve_name
    from utils.distributed import leave
    from utils.runtime import start

    if args.pixel_stats == 'cifar':  # as options, so that the checkpoint records what its pixels were
        args = args.replacing(**{name: getattr(args, name) or list(value) for name, value in CIFAR_STATS.items()})

    # --- Runtime, data ------------------------------------------------------------------------------------------------
    world, precision = start(args)
    args = options.share_global_batch(args, world.size)
    # What is wrong with the options should not wait for the data to be scanned.
    resolve_name(args.model)
    check_training_input(args)
    check_run_options(args, world, kind='transfer')
    train_set, val_set = open_training_data(args, world)

    # --- Model: weights of the source, a classifier for the target ----------------------------------------------------
    num_classes = options.resolve_num_classes(args, train_set.classes)
    model = create_model_from_options(args, num_classes=num_classes, transfer_from=args.transfer_model)
    batches = create_training_input(args, train_set, val_set, model.pretrained_cfg, num_classes, world)

    # --- Optimizer: two learning rates, one schedule ------------------------------------------------------------------
    body_lr_scale = args.transfer_ratio if args.transfer_learning else 1.0
    optimizer = create_optimizer(param_groups(model, args.weight_decay, body_lr_scale), args)
    state = create_state(args, model, optimizer, precision, train_set.classes, world)

    # --- Resume, then the epochs --------------------------------------------------------------------------------------
    fit(args, state, batches, precision, kind='transfer')
    leave()


if __name__ == '__main__':
    run_script(main)
