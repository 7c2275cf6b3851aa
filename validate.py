"""Evaluate checkpoints, or pretrained weights, on the evaluation split of a data set, or on ImageNet's evaluation sets.

    python validate.py /data/imagenet --model t2t_vit_14 -b 100 --eval_checkpoint path/to/checkpoint
    python validate.py /data/imagenet --eval_checkpoint path/to/checkpoint   # the checkpoint names model and image size
    python validate.py /data/imagenet --eval_checkpoint one two three        # side by side, averaged and combined
    python validate.py /data/imagenet --sets val real v2 --data v2=/data/imagenetv2 --checkpoint path/to/checkpoint
    SCRIPT=validate.py ./distributed_train.sh 8 /data/imagenet --model t2t_vit_14 --eval_checkpoint path/to/checkpoint

No train/ folder is needed. Every image counts exactly once on any number of processes. Results go to the console, a
JSON file and CSV files: one of the whole, one of each class and one of the confusions.
"""
import json
import logging

from options.checks import check_trained_model, locate_sets
from options.parser import parse_options
from options.scripts import validate_parser
from utils.script import run_script
from utils.tables import check_table, write_table

log = logging.getLogger(__name__)


def main():
    # --- Options ------------------------------------------------------------------------------------------------------
    args = parse_options(validate_parser())
    check_trained_model(args)
    check_table(args.per_image, '--per-image')
    places = locate_sets(args)

    import torch

    from data.evaluation_sets import ALEXNET_ERRORS, columns_of, open_set
    from data.pipeline import create_views_loader, resolve_input
    from data.views import plan_views, scales
    from engine.compile import compile_model
    from engine.ensemble import ENSEMBLE, OfViews, check_sizes
    from engine.evaluate import evaluate_together
    from engine.scores import Scores
    from models import average_weights, open_trained_models
    from utils.distributed import destroy_process_group
    from utils.results import results_stem, write_results
    from utils.runtime import describe_environment, move_model, start

    # --- Runtime ------------------------------------------------------------------------------------------------------
    world, precision = start(args)

    # --- Models, and images with the class numbers of their training --------------------------------------------------
    trained = open_trained_models(args)
    members = len(trained)
    inputs = [resolve_input(one.args, one.model.pretrained_cfg) for one in trained]
    if members > 1 and (average := average_weights(trained, inputs)):
        trained, inputs = [*trained, average], [*inputs, inputs[0]]
    args = trained[0].args
    # Mistakes in the options are reported before the data is scanned.
    views = plan_views(inputs, args.tta)
    stem = results_stem(args, args.results_file, '--results-file', 'validate')
    for one, config in zip(trained, inputs, strict=True):
        if args.tta == 'multi-scale':
            check_sizes(one.model, one.args.model, scales(config.img_size))
        compile_model(one.model, args.compile)
    first = trained[0]
    sets = [open_set(name, folder, args, first.classes, first.model.num_classes, world)
            for name, folder in places.items()]
    columns = [[columns_of(image_set, one.args, one.classes, one.model.num_classes) for one in trained]
               for image_set in sets]
    for one in trained:
        move_model(one.model, world.device, channels_last=args.channels_last)

    # --- Evaluation, of all models at once on each set ----------------------------------------------------------------
    scores = Scores(ALEXNET_ERRORS)
    for image_set, columns_of_set in zip(sets, columns, strict=True):
        loader, prepare = create_views_loader(args, image_set.dataset, views, world)
        models = [OfViews(one.model, own, asked).to(world.device)
                  for one, own, asked in zip(trained, views.of, columns_of_set, strict=True)]
        scores.add(image_set, evaluate_together(
            models, loader, prepare, precision=precision, truth=torch.from_numpy(image_set.truth).to(world.device),
            ensemble=members if members > 1 else 0, log_interval=args.log_interval,
            name='Test' if len(sets) == 1 else f'Test ({image_set.name})'))
        loader.close()

    # --- Results ------------------------------------------------------------------------------------------------------
    described = [describe(one, config) for one, config in zip(trained, inputs, strict=True)]
    if members > 1:
        common = {name: value if all(one[name] == value for one in described) else None
                  for name, value in described[0].items()}
        parameters = sum(one['parameters'] for one in described[:members])
        described.append(common | {'checkpoint': ENSEMBLE, 'parameters': parameters})
    rows = scores.rows(described)
    log.info('%s', scores.describe(rows))
    if world.is_main:
        run = {'tta': args.tta or None, 'precision': str(precision), 'processes': world.size,
               **describe_environment(world.device)}
        record = rows[0] | run if len(rows) == 1 else {'results': rows, **run}
        if len(rows) == 1:
            print(json.dumps(record, indent=2))
        write_results(stem, record, [row | run for row in rows], '--results-file', scores.tables(described))
        if args.per_image:
            write_table(args.per_image, scores.image_rows(described), '--per-image')
    destroy_process_group()


def describe(trained, config) -> dict:
    """Return what the results say of a model and its input."""
    return {'model': trained.args.model, 'checkpoint': trained.args.eval_checkpoint or 'pretrained',
            'parameters': sum(p.numel() for p in trained.model.parameters()), 'img_size': list(config.img_size),
            'crop_pct': config.crop_pct, 'interpolation': config.interpolation}


if __name__ == '__main__':
    run_script(main)
