"""Shows what a model sees, as PNG pictures: attention, the making of tokens, the channels of layers, its mistakes.

    python visualize.py cat.jpg --checkpoint output/train/demo/model_best.pth.tar
    python visualize.py cat.jpg --checkpoint PATH --figures attention --blocks 4 5
    python visualize.py cat.jpg --checkpoint PATH --figures tokens --token 3 10
    python visualize.py --dataset digits --samples 3 --checkpoint PATH --figures features --beside vit_s_16 resnet50
    python visualize.py cat.jpg --checkpoint PATH --figures features --beside vit_s_16=vit.pth resnet50=pretrained
    python visualize.py --dataset digits --checkpoint PATH --figures mistakes

cat.jpg becomes output/visualize/cat-attention.png and so on. Model and image size are found out from the checkpoint.
A file that cannot be decoded is named and left out. The same figures are functions of figures/, for notebooks.
"""
import logging
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from options.checks import check_images, check_trained_model
from options.parser import parse_options
from options.scripts import FIGURES_OF_IMAGES, visualize_parser
from utils.errors import UserError
from utils.script import run_script

LINES, DPI = 20, 110  # files that the console names; pixels per inch of the pictures
NAME_BYTES = 200  # of a picture's name, at most, that come from its image; file systems take 255
SAMPLES = 3  # images of a data set that are shown, unless --samples says otherwise

log = logging.getLogger(__name__)


def main():
    # --- Options ------------------------------------------------------------------------------------------------------
    args = given = parse_options(visualize_parser())
    check_images(args)
    check_trained_model(args)
    check_figures(args)
    if 'mistakes' in args.figures and args.images:
        raise UserError('--figures mistakes needs images whose classes are known: give a data set (--data DIR, '
                        '--dataset digits)')

    from data import evenly_spaced
    from data.pipeline import name_classes, open_images, resolve_input
    from figures.explain import check_layers
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
    dataset = open_images(args, known_classes, model.num_classes, world)
    classes = name_classes(args, known_classes or dataset.classes or None, model.num_classes)
    if args.max_bad_val_images is None:
        args = args.replacing(max_bad_val_images=len(dataset) if args.images else 0)
    beside = [open_beside(given, text, config) for text in args.beside]
    titles, opened, inputs = zip((args.model, model, config), *beside, strict=True)
    models = dict(zip(unique(titles), opened, strict=True))
    for each in models.values():
        move_model(each, world.device, channels_last=args.channels_last)

    # --- Pictures of single images ------------------------------------------------------------------------------------
    wanted = [name for name in args.figures if name in FIGURES_OF_IMAGES]
    shown = dataset if args.images or args.samples else evenly_spaced(dataset, SAMPLES)
    files: list[Path] = []
    left_out = 0
    if wanted:
        files, left_out = draw_images(args, wanted, models, inputs, shown, classes, folder, world, precision)

    # --- Mistakes -----------------------------------------------------------------------------------------------------
    if 'mistakes' in args.figures:
        files.append(folder / f'{Path(args.data).resolve().name if args.data else args.dataset}-mistakes.png')
        save(draw_mistakes(args, model, dataset, classes, config, world, precision), files[-1])

    # --- Results ------------------------------------------------------------------------------------------------------
    if not files:
        raise UserError(f'model {args.model} can show none of these: {", ".join(args.figures)}')
    for file in files[:LINES]:
        print(file)
    if len(files) > LINES:
        print(f'… and {len(files) - LINES} more in {folder}')
    if left_out:
        print(f'{left_out} of {len(shown)} images left out')


def check_figures(args) -> None:
    """Raises UserError for an option of figures that are not drawn."""
    for option, figures in (('blocks', ['attention']), ('token', ['attention', 'tokens']), ('layers', ['features']),
                            ('beside', ['features'])):
        if getattr(args, option) and not set(figures) & set(args.figures):
            raise UserError(f'--{option} is for the figure {" or ".join(figures)}, which is not among --figures '
                            f'{" ".join(args.figures)}; leave it out or add that figure')


def draw_images(args, wanted: list[str], models: dict, inputs: tuple, dataset, classes: list[str], folder: Path, world,
                precision) -> tuple[list[Path], int]:
    """Draws the wanted figures of every image; what the model has nothing of is logged.

    models, inputs: by title, and of each its data.pipeline.Input; the first is the one that is shown.

    Returns the files, and how many images could not be decoded. Raises UserError if none could.
    """
    import torch

    from data import Numbered
    from data.pipeline import create_eval_loader
    from figures.explain import NotSeen
    from utils.console import progress_bar
    model, numbered, wanted = next(iter(models.values())), Numbered(dataset), list(wanted)
    paths = [dataset.path(number) for number in range(len(dataset))]
    stems = file_names(paths, in_class_folders=bool(args.data))
    files: list[Path] = []
    loading = args.replacing(workers=min(args.workers, len(dataset) // args.batch_size))
    loaders = [create_eval_loader(loading, numbered, config, world) for config in inputs]
    bar = progress_bar(total=len(dataset) * len(wanted), desc='Pictures')
    for batches in zip(*(loader for loader, _ in loaders), strict=True):
        images = [prepare(*batch)[0] for batch, (_, prepare) in zip(batches, loaders, strict=True)]
        pictures, numbers = batches[0][0].permute(0, 2, 3, 1).numpy(), batches[0][1].tolist()
        with torch.no_grad(), precision.autocast():
            probabilities = model(images[0]).float().softmax(1)
            features = {}
            if 'features' in wanted:
                try:
                    features = see_features(args, models, images)
                except NotSeen as reason:
                    log.warning('no picture of features: %s', reason)
                    wanted.remove('features')
            if features and not files:
                print_shares(features, len(numbers))
            for index, number in enumerate(numbers):
                probability, label = probabilities[index].max(0)
                title = f'{Path(paths[number]).name} · {args.model} says {classes[label]}, {100 * probability:.0f} %'
                for name in list(wanted):
                    try:
                        figure = draw(name, args, model, images[0][index:index + 1], pictures[index],
                                      features, index, title)
                    except NotSeen as reason:
                        log.warning('no picture of %s: %s', name, reason)
                        wanted.remove(name)
                        continue
                    files.append(folder / f'{stems[number]}-{name}.png')
                    save(figure, files[-1])
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


def save(figure, path: Path) -> None:
    """Writes a picture, or raises UserError if that is not possible."""
    try:
        figure.savefig(path, dpi=DPI)
    except OSError as e:
        raise UserError(f'--output-dir: {path} cannot be written ({e.strerror or e})') from None


def draw(name: str, args, model, image, picture, features: dict, index: int, title: str):
    """One figure of one image: normalised [1, C, height, width], and the picture [height, width, 3] for people."""
    if name == 'attention':
        from figures.attention import attention_figure
        queries = [args.token] if args.token else None
        return attention_figure(model, image, picture, blocks=args.blocks, queries=queries, title=title)
    if name == 'tokens':
        from figures.tokens import tokens_figure
        return tokens_figure(model, image, picture, token=args.token, title=title)
    from figures.features import features_figure
    return features_figure(features, index, title=title)


def see_features(args, models: dict, images: list) -> dict:
    """The layers of each model for a batch; those named by --layers where a model has all of them."""
    from figures.explain import layer_features
    names = [[n for n, _ in model.named_modules()] for model in models.values()]
    layers = [args.layers if args.layers and set(args.layers) <= set(known) else None for known in names]
    return {title: layer_features(model, batch, chosen)
            for (title, model), batch, chosen in zip(models.items(), images, layers, strict=True)}


def print_shares(features: dict, count: int) -> None:
    """The shares of channels that say nothing, for each layer of each model, judged over `count` images."""
    from figures.features import describe_health
    width = max(len(layer.layer) for layers in features.values() for layer in layers)
    print(f'Channels that say nothing of {count} image{"s" * (count > 1)}:')
    for title, layers in features.items():
        for layer in layers:
            print(f'  {title:{max(map(len, features))}}  {layer.layer:{width}}  {describe_health(layer.health)}')


def draw_mistakes(args, model, dataset, classes: list[str], config, world, precision):
    """The figure of a model's mistakes on all images of `dataset`, of which --max-bad-val-images may be undecodable."""
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


def open_beside(args, text: str, image) -> tuple:
    """What a model to show beside is called, the model, and its input; `image` is that of the first model.

    args: as they were given, without what the checkpoint of the first model recorded.
    """
    from data.pipeline import resolve_input
    from models import create_model, open_trained_model, resolve_name
    name, _, checkpoint = text.partition('=')
    name = resolve_name(name)
    if not checkpoint:
        # The same pictures for both; weights that were never trained have no input of their own.
        return f'{name} (random weights)', create_model(name, img_size=image.img_size).eval(), image
    pretrained = checkpoint == 'pretrained'
    own = args.replacing(model=name, eval_checkpoint=None if pretrained else checkpoint, pretrained=pretrained,
                         num_classes=None, gp=None, model_kwargs=None, class_map=None)
    model, own, _ = open_trained_model(own)
    return f'{name} ({Path(checkpoint).name})', model, resolve_input(own, model.pretrained_cfg)


def file_names(paths: list[str], in_class_folders: bool = False) -> list[str]:
    """For each image the start of its pictures' names: that of its file, with a number where others have the same.

    in_class_folders: put the name of the folder that an image is in before its own.
    """
    stems = []
    for path in paths:
        stem = Path(path).stem
        if re.search(r'\[\d+\]$', path):  # an image of a data set without folders
            stem = path
        elif in_class_folders:
            stem = f'{Path(path).parent.name}-{stem}'
        stem = re.sub(r'[^\w.-]+', '-', stem).strip('-').encode()[:NAME_BYTES].decode(errors='ignore')
        stems.append(stem or 'image')
    return unique(stems)


def unique(names: Iterable[str]) -> list[str]:
    """The names; instead of one that is taken already the first of name-2, name-3, … that is not."""
    taken, result = set(), []
    last: Counter[str] = Counter()
    for name in names:
        free = name
        while free in taken:
            last[name] += 1
            free = f'{name}-{last[name] + 1}'
        taken.add(free)
        result.append(free)
    return result


if __name__ == '__main__':
    run_script(main)
