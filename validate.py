"""Evaluate a checkpoint, or pretrained weights, on the evaluation split of a data set.

    python validate.py /data/imagenet --model t2t_vit_14 -b 100 --eval_checkpoint path/to/checkpoint
    python validate.py /data/imagenet --eval_checkpoint path/to/checkpoint   # the checkpoint names model and image size
    SCRIPT=validate.py ./distributed_train.sh 8 /data/imagenet --model t2t_vit_14 --eval_checkpoint path/to/checkpoint

No train/ folder is needed. Every image counts exactly once on any number of processes. Results go to the console, a
JSON file and CSV files: one of the whole, one of each class and one of the confusions.
"""
import json
import logging

from options.checks import check_trained_model
from options.parser import parse_options
from options.scripts import validate_parser
from utils.script import run_script

log = logging.getLogger(__name__)


def main():
    # --- Options ------------------------------------------------------------------------------------------------------
    args = parse_options(validate_parser())
    check_trained_model(args)

    from data.pipeline import create_eval_loader, name_classes, open_evaluation_data, resolve_input
    from engine.compile import compile_model
    from engine.confusion import class_rows, describe, pair_rows
    from engine.evaluate import evaluate
    from models import open_trained_model
    from utils.distributed import destroy_process_group
    from utils.results import results_stem, write_results
    from utils.runtime import describe_environment, move_model, start

    # --- Runtime ------------------------------------------------------------------------------------------------------
    world, precision = start(args)

    # --- Model, and data with the class numbers of its training -------------------------------------------------------
    model, args, known_classes = open_trained_model(args)
    # Mistakes in the options are reported before the data is scanned.
    compile_model(model, args.compile)
    stem = results_stem(args, args.results_file, '--results-file', 'validate')
    config = resolve_input(args, model.pretrained_cfg)
    dataset = open_evaluation_data(args, known_classes, model.num_classes, world)
    move_model(model, world.device, channels_last=args.channels_last)

    # --- Evaluation ---------------------------------------------------------------------------------------------------
    loader, prepare = create_eval_loader(args, dataset, config, world)
    result = evaluate(model, loader, prepare, precision=precision, log_interval=args.log_interval)

    # --- Results ------------------------------------------------------------------------------------------------------
    left_out = f', {result.bad_images} left out that cannot be decoded' if result.bad_images else ''
    log.info('Evaluated %d images%s', result.count, left_out)
    names = name_classes(args, known_classes or dataset.classes, model.num_classes)
    log.info('%s', describe(result.confusion, names))
    log.info('Balanced accuracy: %.1f%%, macro F1: %.1f%%', result.confusion.balanced_accuracy,
             result.confusion.macro_f1)
    log.info('Top-1 accuracy of the model is: %.1f%%', result.top1)
    if world.is_main:
        record = {
            'model': args.model, 'checkpoint': args.eval_checkpoint or 'pretrained', 'data': args.data or args.dataset,
            **result.as_dict(), 'parameters': sum(p.numel() for p in model.parameters()),
            'img_size': list(config.img_size), 'crop_pct': config.crop_pct, 'interpolation': config.interpolation,
            'precision': str(precision), 'processes': world.size, **describe_environment(world.device)}
        print(json.dumps(record, indent=2))
        write_results(stem, record, [record], '--results-file', {
            'classes': class_rows(result.confusion, names), 'confusion': pair_rows(result.confusion, names)})
    destroy_process_group()


if __name__ == '__main__':
    run_script(main)
