"""Show what a model sees, as PNG pictures: attention, the making of tokens, channels of layers, mistakes.

    python visualize.py cat.jpg --checkpoint output/train/demo/model_best.pth.tar
    python visualize.py cat.jpg --checkpoint PATH --figures attention --blocks 4 5
    python visualize.py cat.jpg --checkpoint PATH --figures tokens --token 3 10
    python visualize.py cat.jpg --checkpoint PATH --figures attention --target-class dog
    python visualize.py cat.jpg --checkpoint PATH --figures features --beside vit_s_16=vit.pth resnet50=pretrained
    python visualize.py --dataset digits --checkpoint PATH --figures mistakes

cat.jpg becomes output/visualize/cat-t2t_vit_7-demo-model_best-attention.png and so on, named by image, model and
weights; a picture of that name that shows something else is kept. Model and image size are read from the checkpoint.
Files that cannot be decoded are reported and left out. The functions of figures/ draw the same in notebooks.
"""
import logging
from pathlib import Path

from options.checks import check_images, check_trained_model
from options.parser import parse_options
from options.scripts import FIGURES_OF_IMAGES, visualize_parser
from utils.console import printable
from utils.errors import UserError, did_you_mean
from utils.script import run_script

LINES = 20  # files listed on the console
SAMPLES = 3  # images of a data set that are shown without --samples
# Options that change no picture.
UNSEEN = ('figures', 'images', 'output_dir', 'samples', 'max_bad_val_images', 'device', 'workers', 'batch_size',
          'pin_mem', 'shard_cache', 'shard_cache_size', 'shard_timeout', 'log_interval', 'timeout')

log = logging.getLogger(__name__)


def main():
    # --- Options ------------------------------------------------------------------------------------------------------
    args = given = parse_options(visualize_parser())
    check_images(args)
    check_trained_model(args)
    check_figures(args)

    from data import evenly_spaced
    from data.pipeline import name_classes, open_images, resolve_input
    from figures.explain import check_layers
    from figures.files import save_figure, unique, weights_name
    from models import open_trained_model
    from utils.disk import make_folder
    from utils.runtime import move_model, start

    # --- Runtime ------------------------------------------------------------------------------------------------------
    world, precision = start(args, alone=True)
    folder = Path(args.output_dir)
    make_folder(folder, '--output-dir')

    # --- Weights, and images numbered as they were trained ------------------------------------------------------------
    model, args, known_classes = open_trained_model(args)
    check_layers(model, args.layers or ())
    config = resolve_input(args, model.pretrained_cfg)
    dataset = open_images(args, known_classes, model.num_classes, world, needs_classes='mistakes' in args.figures)
    classes = name_classes(args, known_classes or dataset.classes or None, model.num_classes)
    target = find_target(args.target_class, classes, known_classes)
    if args.max_bad_val_images is None:
        args = args.replacing(max_bad_val_images=len(dataset) if args.images else 0)
    beside = [open_beside(given, text) for text in args.beside]
    titles, opened, configs = zip((args.model, model, config), *beside, strict=True)
    models = dict(zip(unique(titles), opened, strict=True))
    for each in models.values():
        move_model(each, world.device, channels_last=args.channels_last)

    # --- Pictures of single images ------------------------------------------------------------------------------------
    wanted = [name for name in args.figures if name in FIGURES_OF_IMAGES]
    shown = dataset if args.images or args.samples else evenly_spaced(dataset, SAMPLES)
    files: list[Path] = []
    left_out = 0
    if wanted:
        files, left_out = draw_images(args, wanted, models, configs, shown, classes, target, folder, world, precision)

    # --- Mistakes -----------------------------------------------------------------------------------------------------
    if 'mistakes' in args.figures:
        data = Path(args.data).resolve().name if args.data else args.dataset
        name = f'{data}-{weights_name(args.model, args.eval_checkpoint)}-mistakes.png'
        files.append(save_figure(draw_mistakes(args, model, dataset, classes, config, world, precision), folder / name,
                                 shown_options(args)))

    # --- Results ------------------------------------------------------------------------------------------------------
    if not files:
        raise UserError(f'model {args.model} can show none of these: {", ".join(args.figures)}')
    for file in files[:LINES]:
        print(printable(str(file)))
    if len(files) > LINES:
        print(f'… and {len(files) - LINES} more in {folder}')
    if left_out:
        print(f'{left_out} of {len(shown)} images left out')


def check_figures(args) -> None:
    """Raise UserError for an option of a figure that is not drawn, and for a figure without its data."""
    for option, figures in (('target_class', ['attention']), ('blocks', ['attention']),
                            ('token', ['attention', 'tokens']), ('layers', ['features']), ('beside', ['features'])):
        if getattr(args, option) and not set(figures) & set(args.figures):
            raise UserError(f'--{option.replace("_", "-")} is for the figure {" or ".join(figures)}, which is not '
                            f'among --figures {" ".join(args.figures)}; leave it out or add that figure')
    for text in args.beside:
        if not text.partition('=')[2]:
            raise UserError(f'--beside {text}: which weights? Random ones show nothing; give {text}=CHECKPOINT or '
                            f'{text}=pretrained')
    if 'mistakes' in args.figures and args.images:
        raise UserError('--figures mistakes needs images whose classes are known: give a data set (--data DIR, '
                        '--dataset digits)')


def find_target(text: str | None, names: list[str], known_classes: list[str] | None) -> int | None:
    """Return the number of the class that --target-class names, as it is printed or as it was trained."""
    from data.classes import class_number
    if text is None:
        return None
    for classes in (names, known_classes or []):
        if (number := class_number(text, classes)) is not None:
            return number
    raise UserError(f'--target-class {text}: the model has no such class{did_you_mean(text, names)}; give a name, such '
                    f'as {names[0]!r}, or a number from 0 to {len(names) - 1}')


def shown_options(args) -> dict:
    """Return the options that decide what a picture shows: pictures of others keep their files."""
    weights = args.eval_checkpoint and str(Path(args.eval_checkpoint).resolve())
    return {name: value for name, value in args.as_dict().items() if name not in UNSEEN} | {'eval_checkpoint': weights}


def draw_images(args, wanted: list[str], models: dict, configs: tuple, dataset, classes: list[str], target: int | None,
                folder: Path, world, precision) -> tuple[list[Path], int]:
    """Draw the wanted figures of every image; return the files, and the number of images that cannot be decoded.

    The first of `models` (by title) is shown; `configs` has the data.pipeline.InputConfig of each. `target` is the
    number of the class to explain. Figures that a model cannot have are logged. Raises UserError if no image can be
    decoded.
    """
    import torch

    from data import Numbered
    from data.pipeline import create_eval_loader
    from figures.files import draw_figure, features_of_models, file_names, save_figure, weights_name
    from figures.places import NotSeen
    from utils.console import percent, progress_bar
    model, numbered, wanted = next(iter(models.values())), Numbered(dataset), list(wanted)
    paths = [dataset.path(number) for number in range(len(dataset))]
    stems = [f'{name}-{weights_name(args.model, args.eval_checkpoint)}'
             for name in file_names(paths, in_class_folders=bool(args.data))]
    files: list[Path] = []
    has_shares = False
    loading = args.replacing(workers=min(args.workers, len(dataset) // args.batch_size))
    loaders = [create_eval_loader(loading, numbered, config, world) for config in configs]
    bar = progress_bar(total=len(dataset) * len(wanted), desc='Pictures')
    for batches in zip(*(loader for loader, _ in loaders), strict=True):
        images = [prepare(*batch)[0] for batch, (_, prepare) in zip(batches, loaders, strict=True)]
        pictures, numbers = batches[0][0].permute(0, 2, 3, 1).numpy(), batches[0][1].tolist()
        features: dict = {}
        with torch.no_grad(), precision.autocast():
            probabilities = model(images[0]).float().softmax(1)
            for index, number in enumerate(numbers):
                probability, label = probabilities[index].max(0)
                title = (f'{Path(paths[number]).name} · {args.model} says {classes[label]}, '
                         f'{percent(float(probability))}')
                for name in list(wanted):
                    try:
                        if name == 'features' and not features:
                            features = features_of_models(models, images, args.layers)
                            if not has_shares:
                                print_shares(features, len(numbers))
                                has_shares = True
                        figure = draw_figure(name, args, model, images[0][index:index + 1], pictures[index], classes,
                                             target, features, index, title)
                    except NotSeen as reason:
                        log.warning('no picture of %s: %s', name, reason)
                        wanted.remove(name)
                        continue
                    files.append(save_figure(figure, folder / f'{stems[number]}-{name}.png',
                                             [str(Path(paths[number]).resolve()), shown_options(args)]))
                    bar.update()
        if not wanted:
            break
    bar.close()
    left_out, bad_images = loaders[0][0].take_bad_count(), loaders[0][0].bad_images
    for loader, _ in loaders:
        loader.close()
    if left_out == len(dataset):
        raise UserError(f'none of {left_out} images could be read; the first: {next(iter(bad_images.values()))}')
    return files, left_out


def print_shares(features: dict, count: int) -> None:
    """Print the shares of dead and saturated channels in each layer of each model, judged by `count` images."""
    from figures.features import describe_health
    from utils.console import plural
    width = max(len(layer.layer) for layers in features.values() for layer in layers)
    print(f'Dead and saturated channels, judged by {plural(count, "image")}:')
    for title, layers in features.items():
        for layer in layers:
            print(f'  {title:{max(map(len, features))}}  {layer.layer:{width}}  {describe_health(layer.health)}')


def draw_mistakes(args, model, dataset, classes: list[str], config, world, precision):
    """Return the figure of a model's mistakes on all images of `dataset`."""
    import numpy as np

    from data import Numbered
    from data.pipeline import create_eval_loader
    from engine.predict import predict
    from figures.mistakes import mistakes_figure
    workers = min(args.workers, len(dataset) // args.batch_size)
    loader, prepare = create_eval_loader(args.replacing(workers=workers), Numbered(dataset), config, world)
    predictions = predict(model, loader, prepare, precision=precision, log_interval=args.log_interval)
    loader.close()
    return mistakes_figure(predictions, dataset.targets[predictions.indices], classes,
                           lambda index: np.asarray(dataset.image(index)))


def open_beside(args, text: str) -> tuple:
    """Return (title, model, input) of a value of --beside.

    `args` are the options as given, without those recorded in the checkpoint of the shown model.
    """
    from data.pipeline import resolve_input
    from models import open_trained_model, resolve_name
    name, _, checkpoint = text.partition('=')
    name = resolve_name(name)
    pretrained = checkpoint == 'pretrained'
    own = args.replacing(model=name, eval_checkpoint=None if pretrained else checkpoint, pretrained=pretrained,
                         weights_key=None, num_classes=None, gp=None, model_kwargs=None, class_map=None)
    model, own, _ = open_trained_model(own)
    return f'{name} ({Path(checkpoint).name})', model, resolve_input(own, model.pretrained_cfg)


if __name__ == '__main__':
    run_script(main)
