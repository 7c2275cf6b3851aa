"""Predict the most probable classes of images, on the console and as CSV and JSON.

    python predict.py cat.jpg holiday/ --checkpoint output/train/demo/model_best.pth.tar
    python predict.py --dataset digits --samples 20 --checkpoint output/train/demo/model_best.pth.tar -k 3
    python predict.py cat.jpg --model resnet50 --pretrained -o cat

Model, image size and names of the classes are read from the checkpoint. Images that cannot be decoded are reported and
left out. For a data set, the true class is shown too.
"""
import logging
from collections import Counter

from options.checks import check_images, check_trained_model
from options.parser import parse_options
from options.scripts import predict_parser
from utils import console
from utils.console import plural
from utils.errors import UserError
from utils.script import run_script

LINES = 20  # images, and classes, shown on the console

log = logging.getLogger(__name__)


def main():
    # --- Options ------------------------------------------------------------------------------------------------------
    args = parse_options(predict_parser())
    check_images(args)
    check_trained_model(args)

    from data import Numbered
    from data.pipeline import create_eval_loader, name_classes, open_images, resolve_input
    from engine.predict import predict
    from models import open_trained_model
    from utils.results import results_stem, write_results
    from utils.runtime import describe_environment, move_model, start

    # --- Runtime ------------------------------------------------------------------------------------------------------
    world, precision = start(args, alone=True)

    # --- Weights, and images numbered as they were trained ------------------------------------------------------------
    model, args, known_classes = open_trained_model(args)
    stem = results_stem(args, args.results_file, '--results-file', 'predict')
    config = resolve_input(args, model.pretrained_cfg)
    dataset = open_images(args, known_classes, model.num_classes, world)
    names = name_classes(args, known_classes or dataset.classes or None, model.num_classes)
    move_model(model, world.device, channels_last=args.channels_last)

    # --- Predictions --------------------------------------------------------------------------------------------------
    num_batches = -(-len(dataset) // (args.batch_size * args.validation_batch_size_multiplier))
    args = args.replacing(
        workers=min(args.workers, num_batches) if num_batches > 1 else 0,  # starting workers takes longer than a batch
        max_bad_val_images=len(dataset) if args.max_bad_val_images is None else args.max_bad_val_images)
    loader, prepare = create_eval_loader(args, Numbered(dataset), config, world)
    predictions = predict(model, loader, prepare, precision=precision, k=args.top_k, log_interval=args.log_interval)
    loader.close()

    # --- Results ------------------------------------------------------------------------------------------------------
    entries = describe_images(dataset, predictions, names, loader.bad_images)
    record = {
        'model': args.model, 'checkpoint': args.eval_checkpoint or 'pretrained',
        'data': None if args.images else args.data or args.dataset,
        'img_size': list(config.img_size), 'crop_pct': config.crop_pct, 'interpolation': config.interpolation,
        'precision': str(precision), **describe_environment(world.device), 'images': entries}
    write_results(stem, record, [as_row(entry, min(args.top_k, model.num_classes)) for entry in entries],
                  '--results-file')
    print_table(entries)  # after writing the results, so that a broken console cannot lose them
    if all('error' in entry for entry in entries):
        raise UserError(f'none of {len(entries)} images could be predicted; the first: '
                        f'{entries[0]["path"]}: {entries[0]["error"]}')


def describe_images(dataset, predictions, names: list[str], bad_images: dict[str, str]) -> list[dict]:
    """Return an entry for each image of `dataset`, in its order: the path, and the classes or an error."""
    row_of = {int(index): row for row, index in enumerate(predictions.indices)}
    entries = []
    for index in range(len(dataset)):
        entry = {'path': dataset.path(index)}
        target, row = int(dataset.targets[index]), row_of.get(index)
        if target >= 0:
            entry['true_class'] = names[target]
        if row is None:
            entry['error'] = bad_images[entry['path']].removeprefix(f"image {entry['path']}: ")
        elif not all(abs(p) <= 1 for p in predictions.probabilities[row]):
            entry['error'] = 'the probabilities are not finite; try without --amp, or another checkpoint'
        else:
            entry['classes'] = [
                {'class': names[number], 'number': int(number), 'probability': round(float(probability), 6)}
                for number, probability in zip(predictions.classes[row], predictions.probabilities[row], strict=True)]
        entries.append(entry)
    return entries


def as_row(entry: dict, k: int) -> dict:
    """Return an entry as a row of a CSV table; all rows have the same columns."""
    row = {'path': entry['path']}
    if 'true_class' in entry:
        row['true_class'] = entry['true_class']
    classes = entry.get('classes', [{'class': None, 'probability': None}] * k)
    for place, guess in enumerate(classes, start=1):
        row |= {f'class_{place}': guess['class'], f'probability_{place}': guess['probability']}
    return row | {'error': entry.get('error')}


def print_table(entries: list[dict]) -> None:
    """Print the first images with their classes, and for many images the most frequent classes."""
    shown = [(printable(entry['path']), entry) for entry in entries[:LINES]]
    width = max(len(path) for path, _ in shown)
    for path, entry in shown:
        guesses = ', '.join(f"{guess['class']} {guess['probability']:.1%}" for guess in entry.get('classes', []))
        print(f'{path:{width}}  ' + printable(f"{guesses or entry['error']}{judge(entry)}"))
    predicted = [entry for entry in entries if 'classes' in entry]
    first = [entry['classes'][0]['class'] for entry in predicted]
    if len(entries) > LINES:
        print(f"… and {plural(len(entries) - LINES, 'more image')}")
        counts = Counter(first).most_common()
        more = f" and {plural(len(counts) - LINES, 'more class', 'more classes')}" if len(counts) > LINES else ''
        print(printable('Most probable: ' + ', '.join(f'{name} ({count})' for name, count in counts[:LINES]) + more))
    known = [entry['true_class'] == name for entry, name in zip(predicted, first, strict=True) if 'true_class' in entry]
    left_out = f', {len(entries) - len(predicted)} left out' if len(predicted) < len(entries) else ''
    right = f', {sum(known)} of {len(known)} right ({sum(known) / len(known):.1%})' if known else ''
    print(f"{plural(len(predicted), 'image')} predicted{left_out}{right}")


def judge(entry: dict) -> str:
    """Return whether the first class is right, as text; '' if the true class is unknown."""
    if 'true_class' not in entry or 'classes' not in entry:
        return ''
    return '  right' if entry['classes'][0]['class'] == entry['true_class'] else f"  wrong: is {entry['true_class']}"


def printable(text: str) -> str:
    """Return text as one line that a console can show, since file names may contain any bytes."""
    return console.printable(' '.join(text.encode('utf-8', 'replace').decode().splitlines()))


if __name__ == '__main__':
    run_script(main)
