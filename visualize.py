"""Shows what a model sees, as PNG pictures: attention, the making of tokens, the channels of layers, its mistakes.

    python visualize.py cat.jpg --checkpoint output/train/demo/model_best.pth.tar
    python visualize.py cat.jpg --checkpoint PATH --figures attention --blocks 4 5
    python visualize.py cat.jpg --checkpoint PATH --figures tokens --token 3 10
    python visualize.py --dataset digits --samples 3 --checkpoint PATH --figures features --beside vit_s_16 resnet50
    python visualize.py --dataset digits --checkpoint PATH --figures mistakes

cat.jpg becomes output/visualize/cat-attention.png and so on. Model and image size are found out from the checkpoint.
The same figures are functions of figures/, for notebooks.
"""
import logging
import re
from pathlib import Path

from utils import options
from utils.errors import UserError, run_script

OF_IMAGES = ['attention', 'tokens', 'features']
FIGURES = (*OF_IMAGES, 'mistakes')
GROUPS = (options.image_options, options.model_options, options.trained_model_options, options.input_options,
          options.device_options)
# Which channels say nothing is judged over the images of a batch, whose maps are in memory together.
DEFAULTS = {**options.TRAINED_MODEL, 'batch_size': 16}
LINES, DPI = 20, 110  # files that the console names; pixels per inch of the pictures
SAMPLES = 3  # images of a data set that are shown, unless --samples says otherwise

log = logging.getLogger(__name__)


def visualize_options(parser):
    add = parser.add_argument_group('Pictures').add_argument
    add('--figures', nargs='+', choices=FIGURES, default=OF_IMAGES, metavar='FIGURE',
        help='which pictures: attention, tokens, features of each image (default: these three), mistakes of a data set')
    add('--blocks', type=options.positive_int, nargs='+', metavar='N',
        help='attention: blocks whose heads to show, counted from 1 (default: 4 5, as published)')
    add('--token', type=options.count, nargs=2, metavar=('ROW', 'COL'),
        help='attention, tokens: a token of the last grid, counted from 0 (default: the middle)')
    add('--layers', nargs='+', metavar='NAME',
        help='features: layers of the model (default: an early, a middle and a late one)')
    add('--beside', nargs='+', default=[], metavar='MODEL[=CHECKPOINT]',
        help='features: models to show beside it; without a checkpoint their weights are random')
    add('-o', '--output-dir', default='output/visualize', metavar='DIR', help='where the pictures go')


def main():
    # --- Options ------------------------------------------------------------------------------------------------------
    parser = options.create_parser('Show what a model sees.', (*GROUPS, visualize_options), DEFAULTS)
    args = given = options.parse_options(parser)
    options.check_images(args)
    options.check_trained_model(args)
    if 'mistakes' in args.figures and args.images:
        raise UserError('--figures mistakes needs images whose classes are known: give a data set (--data DIR, '
                        '--dataset digits)')

    import torch

    from data import spread
    from data.pipeline import name_classes, open_images, resolve_input
    from models import open_trained_model
    from models.explain import check_layers
    from utils.log import make_folder
    from utils.runtime import start

    # --- Runtime ------------------------------------------------------------------------------------------------------
    world, precision = start(args)
    if world.size > 1:
        raise UserError(f'visualize.py is one process, and {world.size} were started; call python visualize.py by '
                        'itself')
    folder = Path(args.output_dir)
    make_folder(folder, '--output-dir')

    # --- Weights, and images numbered as they were trained ------------------------------------------------------------
    model, args, known_classes = open_trained_model(args)
    check_layers(model, args.layers or ())
    image = resolve_input(args, model.pretrained_cfg)
    dataset = open_images(args, known_classes, model.num_classes, world)
    classes = name_classes(args, known_classes or dataset.classes or None, model.num_classes)
    models, inputs = {args.model: model}, [image]
    for text in args.beside if 'features' in args.figures else ():
        title, other, its_input = open_beside(given, text, image)
        models[unique(title, models)] = other
        inputs.append(its_input)
    for each in models.values():
        each.to(world.device, memory_format=torch.channels_last if args.channels_last else torch.preserve_format)

    # --- Pictures of single images ------------------------------------------------------------------------------------
    wanted = [name for name in args.figures if name in OF_IMAGES]
    shown = dataset if args.images or args.samples else spread(dataset, SAMPLES)
    files = draw_images(args, wanted, models, inputs, shown, classes, folder, world, precision) if wanted else []

    # --- Mistakes -----------------------------------------------------------------------------------------------------
    if 'mistakes' in args.figures:
        files.append(folder / f'{Path(args.data).resolve().name if args.data else args.dataset}-mistakes.png')
        draw_mistakes(args, model, dataset, classes, image, world, precision).savefig(files[-1], dpi=DPI)

    # --- Results ------------------------------------------------------------------------------------------------------
    if not files:
        raise UserError(f'model {args.model} can show none of these: {", ".join(args.figures)}')
    for file in files[:LINES]:
        print(file)
    if len(files) > LINES:
        print(f'… and {len(files) - LINES} more in {folder}')


def draw_images(args, wanted: list[str], models: dict, inputs: list, dataset, classes: list[str], folder: Path, world,
                precision) -> list[Path]:
    """Draws the wanted figures of every image, and returns the files; what the model has nothing of is logged.

    models, inputs: by title, and of each its data.pipeline.Input; the first is the one that is shown.
    """
    import torch

    from data import Numbered
    from data.pipeline import create_eval_loader
    from models.explain import NotSeen
    from utils.log import progress_bar
    model, numbered, wanted = next(iter(models.values())), Numbered(dataset), list(wanted)
    paths = [dataset.path(number) for number in range(len(dataset))]
    stems, files = file_names(paths), []
    loading = args.replacing(workers=min(args.workers, len(dataset) // args.batch_size))
    loaders = [create_eval_loader(loading, numbered, image, world) for image in inputs]
    bar = progress_bar(total=len(dataset) * len(wanted), desc='Pictures')
    for batches in zip(*(loader for loader, _ in loaders), strict=True):
        images = [prepare(*batch)[0] for batch, (_, prepare) in zip(batches, loaders, strict=True)]
        pictures, numbers = batches[0][0].permute(0, 2, 3, 1).numpy(), batches[0][1].tolist()
        with torch.no_grad(), precision.autocast():
            probabilities = model(images[0]).float().softmax(1)
            features = see_features(args, models, images) if 'features' in wanted else {}
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
                    figure.savefig(files[-1], dpi=DPI)
                    bar.update()
        if not wanted:
            break
    bar.close()
    for loader, _ in loaders:
        loader.close()
    return files


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
    from models.explain import layer_features
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


def draw_mistakes(args, model, dataset, classes: list[str], image, world, precision):
    """The figure of a model's mistakes on all images of `dataset`, of which --max-bad-val-images may be undecodable."""
    import numpy as np

    from data import Numbered
    from data.pipeline import create_eval_loader
    from engine.predict import predict
    from figures.mistakes import mistakes_figure
    workers = min(args.workers, len(dataset) // args.batch_size)
    loader, prepare = create_eval_loader(args.replacing(workers=workers), Numbered(dataset), image, world)
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
    own = args.replacing(model=name, eval_checkpoint=checkpoint, pretrained=False, num_classes=None, gp=None,
                         model_kwargs=None, class_map=None)
    model, own, _ = open_trained_model(own)
    return f'{name} ({Path(checkpoint).name})', model, resolve_input(own, model.pretrained_cfg)


def file_names(paths: list[str]) -> list[str]:
    """For each image the start of its pictures' names: that of its file, with a number where others have the same."""
    names = []
    for path in paths:
        stem = Path(path).stem if '[' not in path else path
        names.append(unique(re.sub(r'[^\w.-]+', '-', stem).strip('-') or 'image', names))
    return names


def unique(name: str, taken) -> str:
    """`name`, or where it is taken the first of name-2, name-3, … that is not."""
    number, free = 1, name
    while free in taken:
        number += 1
        free = f'{name}-{number}'
    return free


if __name__ == '__main__':
    run_script(main)
