"""Train a T2T-ViT, or any model of timm, on a folder of images.

    ./distributed_train.sh 8 /data/imagenet --model t2t_vit_14 -b 64 --lr 5e-4 --weight-decay .05 --amp --img-size 224
    ./distributed_train.sh 8 /data/imagenet -c configs/t2t_vit_14.yaml
    python train.py -c configs/demo.yaml --device cpu

A run writes one folder, output/train/DATE-MODEL-SIZE: checkpoints, metrics.jsonl, summary.csv, curves.png, args.yaml
and TensorBoard events. `--resume auto` continues the newest such run.
"""
from options.checks import check_runs, resolve_num_classes, share_global_batch
from options.parser import parse_options
from options.scripts import train_parser
from utils.script import run_script


def main():
    # --- Options ------------------------------------------------------------------------------------------------------
    args = parse_options(train_parser())
    check_runs(args)

    # Importing torch takes seconds; --help and a misspelled option do not wait for it.
    from engine.several import run_all
    from utils.distributed import destroy_process_group
    from utils.runtime import start

    # --- Runtime: process group, seed, precision ----------------------------------------------------------------------
    world, precision = start(args)
    args = share_global_batch(args, world.size)

    # --- One run, or several with --k-fold or --seeds -----------------------------------------------------------------
    run_all(args, lambda args: train(args, world, precision.anew()), world, kind='train')
    destroy_process_group()


def train(args, world, precision) -> dict:
    """Make one run from its options, and return its result."""
    from data.pipeline import check_training_input, create_training_input, open_training_data
    from engine.checks import check_run_options
    from engine.layers import prepare_layers
    from engine.optimizer import create_optimizer, param_groups
    from engine.run import create_state, run_training
    from engine.teacher import create_teacher, projection_groups
    from models import check_teacher, create_model_from_options, open_teacher, resolve_model, token_layout

    # Mistakes in the options are reported before the data is scanned.
    args, weights = resolve_model(args)
    check_teacher(args)
    check_training_input(args)
    check_run_options(args, world, kind='train')

    # --- Data: the classes of the training split count ----------------------------------------------------------------
    train_set, val_set = open_training_data(args, world)

    # --- Model, with weights if the options name some; the one that it learns from ------------------------------------
    num_classes = resolve_num_classes(args, train_set.classes)
    model = create_model_from_options(args, num_classes=num_classes, transfer_from=weights)
    opened = open_teacher(args, train_set.classes, num_classes, world)

    # --- Loaders for the model's input size and statistics ------------------------------------------------------------
    layout = token_layout(model, args.img_size) if args.token_labels else None
    loaders = create_training_input(args, train_set, val_set, model.pretrained_cfg, model.num_classes, world,
                                    layout=layout, teacher=opened)

    # --- What learns, optimizer, state --------------------------------------------------------------------------------
    prepare_layers(model, args)
    teacher = create_teacher(args, model, opened, loaders.for_teacher, precision, world)
    groups = param_groups(model, args.weight_decay, layer_decay=args.layer_decay)
    optimizer = create_optimizer(groups + projection_groups(teacher, args.weight_decay), args)
    state = create_state(args, model, optimizer, precision, train_set.classes, world, teacher)

    # --- Resume and train ---------------------------------------------------------------------------------------------
    return run_training(args, state, loaders, precision, kind='train')


if __name__ == '__main__':
    run_script(main)
