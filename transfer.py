"""Transfer a trained model to another data set, with a new classifier and a learning rate for each of the two.

    python transfer.py --dataset cifar10 --model t2t_vit_19 --lr 0.05 --b 64 --num-classes 10 --img-size 224 \
        --transfer-learning True --transfer-model path/to/checkpoint
    python transfer.py /data/flowers --model t2t_vit_14 --transfer-model path/to/checkpoint

    python transfer.py /data/flowers --model t2t_vit_14 --transfer-model path/to/checkpoint --linear-probe

The classifier learns at --lr, everything else at --transfer-ratio times --lr, in every epoch. Without --transfer-model
and --transfer-learning the whole model trains at --lr, from random weights unless --pretrained is given. Without DIR
and --dataset, CIFAR-10 is downloaded into ./data_cifar. The defaults are the published recipe, except that biases and
norms do not decay.
"""
from options.checks import check_runs, resolve_num_classes, share_global_batch
from options.parser import parse_options
from options.scripts import transfer_parser
from utils.errors import UserError
from utils.script import run_script


def main():
    # --- Options ------------------------------------------------------------------------------------------------------
    args = parse_options(transfer_parser())
    if args.transfer_learning and not (args.transfer_model or args.pretrained):
        raise UserError('--transfer-learning True: from what? give --transfer-model PATH or --pretrained')
    if args.transfer_model and not args.transfer_learning:
        raise UserError(f'--transfer-model {args.transfer_model} beside --transfer-learning False; leave one of the '
                        'two out')
    check_runs(args)

    from data.pipeline import CIFAR_STATS
    from engine.several import run_all
    from utils.distributed import destroy_process_group
    from utils.runtime import start

    if args.pixel_stats == 'cifar':  # as options, which the checkpoint records
        args = args.replacing(**{name: getattr(args, name) or list(value) for name, value in CIFAR_STATS.items()})

    # --- Runtime ------------------------------------------------------------------------------------------------------
    world, precision = start(args)
    args = share_global_batch(args, world.size)

    # --- One run, or several with --k-fold or --seeds -----------------------------------------------------------------
    run_all(args, lambda args: transfer(args, world, precision.anew()), world, kind='transfer')
    destroy_process_group()


def transfer(args, world, precision) -> dict:
    """Make one run from its options, and return its result."""
    from data.pipeline import check_training_input, create_probe_input, create_training_input, open_training_data
    from engine.checks import check_run_options
    from engine.layers import prepare_layers
    from engine.linear_probe import check_probe, run_probe
    from engine.optimizer import create_optimizer, param_groups
    from engine.run import create_state, run_training
    from engine.teacher import create_teacher, projection_groups
    from models import check_teacher, create_model_from_options, open_teacher, resolve_model, token_layout

    # --- Data ---------------------------------------------------------------------------------------------------------
    # Mistakes in the options are reported before the data is scanned.
    args, weights = resolve_model(args)
    check_teacher(args)
    check_training_input(args)
    check_run_options(args, world, kind='transfer')
    if args.linear_probe:
        check_probe(args, world)
    train_set, val_set = open_training_data(args, world)

    # --- Model: weights of the source, a new classifier for the target ------------------------------------------------
    num_classes = resolve_num_classes(args, train_set.classes)
    model = create_model_from_options(args, num_classes=num_classes, transfer_from=args.transfer_model or weights)

    # --- A linear probe ends here: no other layer learns --------------------------------------------------------------
    if args.linear_probe:
        probe_input = create_probe_input(args, train_set, val_set, model.pretrained_cfg, world)
        return run_probe(args, model, probe_input, precision, train_set.classes, world)

    # --- A teacher, loaders for both --------------------------------------------------------------------------------
    opened = open_teacher(args, train_set.classes, num_classes, world)
    layout = token_layout(model, args.img_size) if args.token_labels else None
    loaders = create_training_input(args, train_set, val_set, model.pretrained_cfg, num_classes, world, layout=layout,
                                    teacher=opened)

    # --- Optimizer: two learning rates, one schedule ------------------------------------------------------------------
    body_lr_scale = args.transfer_ratio if args.transfer_learning else 1.0
    prepare_layers(model, args)
    teacher = create_teacher(args, model, opened, loaders.for_teacher, precision, world)
    groups = param_groups(model, args.weight_decay, body_lr_scale, args.layer_decay)
    optimizer = create_optimizer(groups + projection_groups(teacher, args.weight_decay), args)
    state = create_state(args, model, optimizer, precision, train_set.classes, world, teacher)

    # --- Resume and train ---------------------------------------------------------------------------------------------
    return run_training(args, state, loaders, precision, kind='transfer')


if __name__ == '__main__':
    run_script(main)
