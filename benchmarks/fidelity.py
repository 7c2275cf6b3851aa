"""Measures how far every path is from float64: the published formulation, ours, and on request ours compiled.

    python -m benchmarks.fidelity --data ../shared/data/imagenet_sample                 # 10 minutes on two cores
    python -m benchmarks.fidelity --models t2t_vit_7 --weights golden --img-size 64     # seconds, random images alone
    python -m benchmarks.fidelity --precision fp32 bf16 fp16 --compile model --images 16 --data …  # GPU

What is right is the published formulation in float64, with the same weights, on the same images. The error of a path
is the relative L2 distance from that: of the logits of all images and of the image where it is worst; of what comes
out of the tokens-to-token module's two layers and its projection, where the paths differ; and of the gradient of
cross-entropy, over all parameters and over those of a part. Models are in evaluation mode: dropout is no error.

Weights are the golden ones (see golden_state) and initial ones. Images are

    random                standard normal numbers
    smooth                4 × 4 of these, enlarged, all channels alike
    photographs           those of --data, evenly spread
    white margin          these (without --data: the random ones) with a left half that is white
    single-value margin   or that has one value in all channels, as white has where --mean and --std are one number
    single value          of one value; in every other image a few pixels are one level of 256 brighter

for a LayerNorm over patches of little contrast shows what was lost before it.

NAME.json, the record with every error, and NAME.md, the tables, go to --output, after each model and its weights.
"""
import copy
import itertools
import logging
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from benchmarks.shared.measure import training_options
from benchmarks.shared.published import PUBLISHED, golden_state, published_model
from benchmarks.shared.records import (
    PRECISIONS,
    check_precisions,
    check_record_options,
    markdown_table,
    new_record,
    origin,
    precision_of,
    record_options,
    write_record,
)
from data.base import evenly_spaced
from data.batch import BatchPreparer
from data.folders import ImageFiles
from data.transforms import create_eval_transform
from engine.compile import compile_model
from models import create_model
from options.groups import compile_options
from options.parser import create_parser, parse_options
from options.types import image_size, number, seed
from utils.console import progress_bar
from utils.runtime import Precision, seed_everything, start
from utils.script import run_script
from utils.timm_model import TimmModel

WEIGHTS = ('golden', 'initial')
STAGES = ('attention1', 'attention2', 'project')  # in the order of the forward pass
PARTS = ('tokens_to_token', 'blocks', 'head')
MEASURES = ('logits', 'worst image', *STAGES, 'gradient', *(f'gradient of {part}' for part in PARTS))
LOSS_SCALE = 2 ** 10  # of float16's gradients, most of which would be zero without one


def fidelity_options(parser) -> None:
    add = parser.add_argument_group('What is measured').add_argument
    add('--models', nargs='+', default=['t2t_vit_7', 't2t_vit_14', 't2t_vit_t_14'], choices=PUBLISHED, metavar='MODEL',
        help='published T2T-ViTs, by name')
    add('--precision', nargs='+', default=['fp32', 'bf16'], choices=list(PRECISIONS), help='a table for each')
    add('--weights', nargs='+', default=list(WEIGHTS), choices=WEIGHTS, help='where they come from')
    add('--data', metavar='DIR', help='folder with photographs, at any depth (default: random images alone)')
    add('--images', type=number(int, low=2), default=4, metavar='N', help='images of a kind, in one batch')
    add('--img-size', type=image_size, default=224, metavar='N', help='input size in pixels, or HxW')
    add('--device', default='auto', metavar='NAME', help='auto (a GPU where there is one), cuda, cuda:1 or cpu')
    add('--seed', type=seed, default=0, metavar='S', help='of initial weights and images')
    record_options(parser, 'fidelity')


# ---------------------------------------------------------------------------------------------------------------------
# Weights and images

def make_images(args) -> dict[str, torch.Tensor]:
    """Batches of normalised images [--images, 3, H, W] by their kind.

    Raises:
        UserError: --data is no folder with images.
    """
    size = (args.img_size,) * 2 if isinstance(args.img_size, int) else args.img_size
    generator = np.random.RandomState(args.seed)
    kinds = {'random': _float32(generator.standard_normal((args.images, 3, *size)))}
    coarse = _float32(generator.standard_normal((args.images, 1, 4, 4))).repeat(1, 3, 1, 1)
    kinds['smooth'] = F.interpolate(coarse, size, mode='bicubic')
    if args.data:
        kinds['photographs'] = _read_photographs(args.data, args.images, size)
    below = kinds.get('photographs', kinds['random'])
    mean, std = (torch.tensor(values)[:, None, None] for values in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    for kind, value in (('white margin', (1 - mean) / std), ('single-value margin', 1)):
        kinds[kind] = below.clone()
        kinds[kind][..., :size[1] // 2] = value
    kinds['single value'] = torch.linspace(-2, 2.5, args.images)[:, None, None, None].repeat(1, 3, *size)
    noise = generator.standard_normal((args.images, 3, *size)) > 2  # about three values of a patch
    kinds['single value'][1::2] += (_float32(noise) / 255 / std)[1::2]
    return kinds


def _float32(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array.astype(np.float32))


def _read_photographs(folder: str, count: int, size: tuple[int, int]) -> torch.Tensor:
    photographs, transform = evenly_spaced(ImageFiles([folder]), count), create_eval_transform(size)
    pixels = torch.stack([transform(photographs.image(index)) for index in range(len(photographs))])
    return BatchPreparer('cpu')(pixels, torch.empty(0))[0]


def make_models(name: str, weights: str, args, device: torch.device, **kwargs) -> dict[str, TimmModel]:
    """The model in float64, and by path: one after the other the same weights, in evaluation mode on the device.

    Args:
        weights: one of WEIGHTS.
        kwargs: further arguments of `models.create_model`.
    """
    paths: dict[str, Callable[..., TimmModel]] = {
        'float64': published_model, 'published': published_model, 'default': create_model}
    models: dict[str, TimmModel] = {}
    for path, create in paths.items():
        seed_everything(args.seed, 0)  # for there to be the same initial weights
        model = create(name, img_size=args.img_size, **kwargs).eval()
        if weights == 'golden':
            model.load_state_dict(golden_state(model))
        models[path] = (model.double() if path == 'float64' else model).to(device)
    if args.compile:
        models['compiled'] = copy.deepcopy(models['default'])
        compile_model(models['compiled'], args.compile)
    return models


# ---------------------------------------------------------------------------------------------------------------------
# Errors

def compute(model: TimmModel, images: torch.Tensor, precision: Precision, *,
            stages: Sequence[str] = STAGES) -> dict[str, torch.Tensor]:
    """All that is compared, in float64: logits [B, classes], and as vectors stages and gradients, by MEASURES.

    Args:
        stages: those to look at; in a compiled model that would change what is compiled.
    """
    seen = {}
    hooks = [model.get_submodule(f'tokens_to_token.{stage}').register_forward_hook(
        lambda _, __, output, stage=stage: seen.update({stage: output.detach().double().flatten()}))
        for stage in stages]
    labels = (3 + 4 * torch.arange(len(images), device=images.device)) % model.num_classes  # those of the golden data
    scale = LOSS_SCALE if precision.dtype is torch.float16 else 1
    model.zero_grad(set_to_none=True)
    with precision.autocast():
        logits = model(images)
        loss = F.cross_entropy(logits, labels)
    (scale * loss).backward()
    for hook in hooks:
        hook.remove()

    def gradient(part: str) -> torch.Tensor:
        gradients = [parameter.grad for key, parameter in model.named_parameters() if key.startswith(part)]
        return torch.cat([gradient.double().flatten() / scale for gradient in gradients if gradient is not None])

    return {'logits': logits.detach().double(), **seen, 'gradient': gradient(''),
            **{f'gradient of {part}': gradient(f'{part}.') for part in PARTS}}


def errors(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> dict[str, float]:
    """Relative L2 distances by MEASURES, of what `compute` returns; NaN where something is not finite."""
    distances = {measure: _distance(values.flatten(), expected[measure].flatten()).item()
                 for measure, values in actual.items()}
    distances['worst image'] = _distance(actual['logits'], expected['logits']).max().item()
    return {measure: distances[measure] for measure in MEASURES if measure in distances}


def _distance(actual: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    return (actual - expected).norm(dim=-1) / expected.norm(dim=-1)


def measure(models: dict[str, TimmModel], images: torch.Tensor, precisions: dict[str, Precision]) -> list[dict]:
    """A row for each precision and path: {'precision', 'path', 'errors'}."""
    expected = compute(models['float64'], images.double(), Precision(images.device, enabled=False))
    rows = []
    for (name, precision), (path, model) in itertools.product(precisions.items(), models.items()):
        if path != 'float64':
            actual = compute(model, images, precision, stages=() if path == 'compiled' else STAGES)
            rows.append({'precision': name, 'path': path, 'errors': errors(actual, expected)})
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# Tables

def add_ratios(rows: list[dict]) -> None:
    """Gives every row of a path of ours the `ratios` of its errors to those of the published path, where there are."""
    def case(row: dict) -> tuple:
        return tuple(row[key] for key in ('model', 'precision', 'weights', 'images'))

    published = {case(row): row['errors'] for row in rows if row['path'] == 'published'}
    for row in rows:
        if row['path'] != 'published':
            row['ratios'] = {name: error / published[case(row)][name] for name, error in row['errors'].items()
                             if math.isfinite(error) and math.isfinite(published[case(row)][name])}


def as_summary(rows: list[dict]) -> str:
    """Of each model, precision and path: the largest ratios, and where the largest of all is."""
    groups = {'logits': MEASURES[:2], 'stages': STAGES, 'gradients': MEASURES[-1 - len(PARTS):]}
    lines = []
    for key, group in itertools.groupby(rows, key=lambda row: (row['model'], row['precision'])):
        of_key = list(group)
        for path in dict.fromkeys(row['path'] for row in of_key if 'ratios' in row):
            ratios = [(ratio, name, row) for row in of_key if row['path'] == path
                      for name, ratio in row['ratios'].items()]
            lost = sum(not math.isfinite(error) for row in of_key if row['path'] == path
                       for error in row['errors'].values())
            cells = [max((f'{ratio:.2f}' for ratio, name, _ in ratios if name in group), key=float, default='–')
                     for group in groups.values()]
            ratio, name, row = max(ratios, key=lambda found: found[0], default=(0, '', None))
            where = f'{name}, {row["weights"]} weights, {row["images"]}' if row else '–'
            lines.append([*key, path, *cells, where, str(lost)])
    return markdown_table(['model', 'precision', 'path', *groups, 'the largest', 'not finite'], lines)


def as_table(rows: list[dict]) -> str:
    """One model and precision: the published path's errors, and below them what others have for each of its one."""
    lines = []
    for row in rows:
        cells = []
        for name in MEASURES:
            error, ratio = row['errors'].get(name), row.get('ratios', {}).get(name)
            cells.append('' if error is None else f'× {ratio:.2f}' if ratio is not None else
                         f'{error:.1e}' if math.isfinite(error) else 'not finite')
        lines.append([f'{row["weights"]} weights, {row["images"]}' * (row['path'] == 'published'), row['path'], *cells])
    heading = f'## {rows[0]["model"]}, {rows[0]["precision"]}'
    return f'{heading}\n\n{markdown_table(["", "path", *MEASURES], lines)}\n'


def as_text(record: dict) -> str:
    """The whole record in Markdown."""
    photographs = '' if record['options']['data'] else ' There are no photographs: no --data was given.'
    head = (f'# Errors against float64\n\n{origin(record)}\n\n'
            'Relative L2 distances of outputs and gradients from those of the published formulation in float64. Of '
            "`published` the error itself, of our paths how many times the published one's it is." + photographs
            + f'\n\n## The largest ratios\n\n{as_summary(record["rows"])}\n')
    tables = itertools.groupby(record['rows'], key=lambda row: (row['model'], row['precision']))
    return '\n'.join([head, *(as_table(list(rows)) for _, rows in tables)])


def main() -> None:
    parser = create_parser('Measure the errors of all paths.', (fidelity_options, compile_options))
    args = parse_options(parser)
    folder = check_record_options(args)
    logging.disable(logging.INFO)  # the bar and the tables are enough
    world, _ = start(training_options('--device', args.device, '--seed', str(args.seed)), alone=True)
    check_precisions(args.precision, world.device)
    precisions = {name: precision_of(name, world.device) for name in args.precision}
    images = {kind: batch.to(world.device) for kind, batch in make_images(args).items()}
    rows: list[dict] = []
    record = {**new_record('fidelity', args, world.device, args.data), 'rows': rows}
    cases = list(itertools.product(args.models, args.weights))
    with progress_bar(total=len(cases) * len(images), unit='batch') as bar:
        for model, weights in cases:
            torch.compiler.reset()
            models = make_models(model, weights, args, world.device)
            for kind, batch in images.items():
                bar.set_description(f'{model}, {weights} weights, {kind}')
                rows += [{'model': model, 'weights': weights, 'images': kind, **row}
                         for row in measure(models, batch, precisions)]
                bar.update()
            # Stable, so that within a table the order stays.
            rows.sort(key=lambda row: (args.models.index(row['model']), args.precision.index(row['precision'])))
            add_ratios(rows)
            paths = write_record(folder, args.name, record, as_text(record))
    print(as_summary(rows), *paths, sep='\n')


if __name__ == '__main__':
    run_script(main)
