"""Export a trained model to the formats of other runtimes, and compare each with the model in PyTorch.

    python export.py --checkpoint output/train/demo/model_best.pth.tar --dataset digits
    python export.py photo.jpg folder/ --checkpoint path/to/checkpoint --format onnx int8 -o exported
    python export.py --data /data/imagenet --samples 250 --checkpoint path/to/checkpoint       # what does int8 cost?

    safetensors    timm's folder: config.json, model.safetensors
    onnx           one file, dynamic batch and (if the model allows it) image size; needs requirements-export.txt
    torch-export   graph of torch.export, dynamic batch and (if the model allows it) image size
    aotinductor    compiled for CPUs like this one, dynamic batch; needs a C++ compiler
    int8           linear layers in 8 bits, for CPUs; models.runtimes.read_int8 reads it

Each format is read back and compared on random images and on the given images. An exact format that differs from
PyTorch by more than 1e-4 (relative to the largest logit, if that exceeds 1) is deleted. A failed format is reported in
one line; it is an error if it differs or was named in --format. With a labelled data set, the accuracy of int8 is
measured too. If an export is stopped, the same command makes the formats that are left.
"""
import json
import logging
from pathlib import Path

from options.checks import check_images, check_trained_model
from options.parser import parse_options
from options.scripts import FORMATS, export_parser
from utils.errors import UserError
from utils.script import run_script

COLUMNS = {'format': 'format', 'file': 'file', 'megabytes': 'MB', 'axes': 'open axes',
           'difference_random': '|Δ| random', 'difference_real': '|Δ| real', 'same_top1': 'same top-1',
           'top1': 'top-1', 'ms_per_image': 'ms/image', 'export_seconds': 'seconds', 'note': ''}
NUMBERS = {'megabytes': '.1f', 'difference_random': '.1e', 'difference_real': '.1e', 'same_top1': '.1f%',
           'top1': '.2f%', 'ms_per_image': '.2f', 'export_seconds': '.1f'}

log = logging.getLogger(__name__)


def main():
    # --- Options ------------------------------------------------------------------------------------------------------
    args = parse_options(export_parser())
    has_images = bool(args.images or args.data or args.dataset != 'folder')
    if has_images:
        check_images(args)
    check_trained_model(args)

    import torch

    from data.pipeline import create_eval_loader, open_images, resolve_input
    from engine.evaluate import evaluate
    from models import open_trained_model
    from models.runtimes import RUNTIME_FORMATS, Checks, TracedModel, check_overwrites, describe, write_format
    from utils.console import progress_bar
    from utils.disk import make_folder
    from utils.results import write_results
    from utils.runtime import describe_environment, start

    # --- Runtime ------------------------------------------------------------------------------------------------------
    world, precision = start(args, alone=True)

    # --- Weights, and images numbered as they were trained ------------------------------------------------------------
    model, args, known_classes = open_trained_model(args)
    config = resolve_input(args, model.pretrained_cfg)
    folder = Path(args.output_dir or 'output/export/{}-{}x{}'.format(args.model, *config.img_size))
    make_folder(folder, '--output-dir')
    names = args.formats or FORMATS
    check_overwrites(folder, names)
    dataset = open_images(args, known_classes, model.num_classes, world) if has_images else None
    labels = label_classes(args, known_classes or (dataset.classes if dataset else None), model.num_classes)
    description = describe(model, **labels, input_size=(3, *config.img_size), mean=config.mean, std=config.std,
                           crop_pct=config.crop_pct, interpolation=config.interpolation)
    traced = TracedModel(model, description, config.img_size)

    # --- Exports, each compared with PyTorch --------------------------------------------------------------------------
    checks = Checks(model, config.img_size, first_batch(args, dataset, config, world) if dataset else None)
    rows = {'pytorch': {'format': 'pytorch', 'ms_per_image': checks.milliseconds(model)}}
    record = {
        'model': args.model, 'checkpoint': args.eval_checkpoint or 'pretrained', 'img_size': list(config.img_size),
        'real_images': checks.num_real, 'timed_images': len(checks.timed), 'threads': torch.get_num_threads(),
        **describe_environment(world.device)}
    begun = record | {'unfinished': {'options': args.as_dict(), 'weights': describe_file(args.eval_checkpoint)}}
    kept = read_unfinished(folder, begun)
    bar = progress_bar(total=len(names))
    for name in names:
        # Before each format, so that a folder with a file of ours always says so.
        write_record(folder / 'export.json', begun | {'exports': [*rows.values()]})
        bar.set_description(f'Export {name}')
        if name in kept and (folder / RUNTIME_FORMATS[name].file).exists():
            log.info('%s is there, of an export that was stopped', RUNTIME_FORMATS[name].file)
            rows[name] = kept[name]
        else:
            rows[name] = {'format': name, **write_format(name, traced, folder, checks)}
        bar.update()
    bar.close()

    # --- Accuracy of int8 ---------------------------------------------------------------------------------------------
    if dataset and (dataset.targets >= 0).all() and 'int8' in rows and 'failure' not in rows['int8']:
        loader, prepare = create_eval_loader(args, dataset, config, world)
        int8 = RUNTIME_FORMATS['int8']
        for name, candidate in (('pytorch', model), ('int8', int8.read(folder / int8.file))):
            rows[name].update(evaluate(candidate, loader, prepare, precision=precision, name=name).as_dict())
        loader.close()

    # --- Results ------------------------------------------------------------------------------------------------------
    record['exports'] = list(rows.values())
    columns = dict.fromkeys(name for row in rows.values() for name in row)
    write_results(folder / 'export', record, [columns | row for row in rows.values()], '--output-dir')
    print_table([row for row in rows.values() if 'failure' not in row])
    failures = {name: rows[name]['failure'] for name in names if 'failure' in rows[name]}
    message = '\n'.join(f'{name} was not exported: {failure}' for name, failure in failures.items())
    if any(args.formats or 'difference' in rows[name] for name in failures):
        raise UserError(message)
    if failures:
        log.warning('%s', message)


def describe_file(path: str | None) -> list | None:
    """Return what changes with a file: its length and time; None if there is none, as for published weights."""
    return [Path(path).stat().st_size, Path(path).stat().st_mtime_ns] if path and Path(path).exists() else None


def write_record(path: Path, record: dict) -> None:
    """Write what has been exported so far. Raises UserError if the file cannot be written."""
    from utils.disk import write_whole
    from utils.results import finite
    try:
        write_whole(path, json.dumps(finite(record)))
    except OSError as error:
        raise UserError(f'--output-dir: {path} cannot be written ({error.strerror})') from None


def read_unfinished(folder: Path, begun: dict) -> dict[str, dict]:
    """Return {format: row} of an earlier export into this folder that `begun` describes too and that was stopped."""
    try:
        before = json.loads((folder / 'export.json').read_bytes())
    except (OSError, ValueError):
        return {}
    if not isinstance(before, dict) or before.get('unfinished') is None:
        return {}
    rows = before.pop('exports', [])
    is_same = before == json.loads(json.dumps(begun))
    return {row['format']: row for row in rows if 'failure' not in row} if is_same else {}


def label_classes(args, classes: list[str] | None, num_classes: int) -> dict:
    """Return the names of the classes in the order of the logits, and words for names such as synsets."""
    from data import read_class_map
    from data.pipeline import name_classes
    words = name_classes(args, classes or None, num_classes)
    if args.class_map:
        classes = read_class_map(args.class_map)
    if not classes or len(classes) != num_classes:
        return {'classes': words}
    return {'classes': classes,
            'descriptions': {name: word for name, word in zip(classes, words, strict=True) if name != word}}


def first_batch(args, dataset, config, world):
    """Return a batch of evenly spaced images, float32 [B, 3, height, width]."""
    from data import evenly_spaced
    from data.pipeline import create_eval_loader
    args = args.replacing(workers=0, validation_batch_size_multiplier=1, channels_last=False)
    loader, prepare = create_eval_loader(args, evenly_spaced(dataset, args.batch_size), config, world)
    return prepare(*next(iter(loader)))[0]


def print_table(rows) -> None:
    """Print a line for each row, without columns that are empty in all rows."""
    columns = [name for name in COLUMNS if any(name in row for row in rows)]
    cells = [[COLUMNS[name] for name in columns], *([formatted(row, name) for name in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        print('  '.join(cell.rjust(width) if name in NUMBERS else cell.ljust(width)
                        for name, cell, width in zip(columns, line, widths, strict=True)).rstrip())


def formatted(row: dict, name: str) -> str:
    """Return a value as the table shows it."""
    if name not in row:
        return '-'
    form = NUMBERS.get(name, '')
    return format(row[name], form.rstrip('%')) + form[-1:].strip('fe')


if __name__ == '__main__':
    run_script(main)
