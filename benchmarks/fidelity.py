"""Measure how far every path is from float64: the published formulation, ours, and on request ours compiled.

    python -m benchmarks.fidelity --data ../shared/data/imagenet_sample                 # 10 minutes on two cores
    python -m benchmarks.fidelity --models t2t_vit_7 --weights golden --img-size 64     # seconds, random images alone
    python -m benchmarks.fidelity --precision fp32 bf16 fp16 --compile model --images 16 --data …  # GPU

The reference is the published formulation in float64 with the same weights and images. An error is a relative L2
distance from it: of the logits, of the stages of the tokens-to-token module, and of the gradient of cross-entropy.
Models are in evaluation mode. Images with little contrast show what a LayerNorm over patches loses.
"""
import copy
import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from benchmarks.shared.command import common_options, parse_command, start_alone
from benchmarks.shared.published import PUBLISHED, golden_state, published_model
from benchmarks.shared.records import markdown_table, new_record, origin, precision_of, save
from data.base import evenly_spaced
from data.batch import BatchPreparer
from data.folders import ImageFiles
from data.transforms import create_eval_transform
from engine.compile import compile_model
from models import create_model
from options.groups import compile_options
from options.types import number
from utils.console import progress_bar
from utils.runtime import Precision, seed_everything
from utils.script import run_script
from utils.timm_model import TimmModel

WEIGHTS = ('golden', 'initial')
STAGES = ('attention1', 'attention2', 'project')  # in the order of the forward pass
PARTS = ('tokens_to_token', 'blocks', 'head')
MEASURES = ('logits', 'worst image', *STAGES, 'gradient', *(f'gradient of {part}' for part in PARTS))
LOSS_SCALE = 2 ** 10  # for float16, in which most gradients would be zero without it


def fidelity_options(parser) -> None:
    add = parser.add_argument_group('What is measured').add_argument
    add('--models', nargs='+', default=['t2t_vit_7', 't2t_vit_14', 't2t_vit_t_14'], choices=PUBLISHED, metavar='MODEL',
        help='published T2T-ViTs, by name')
    add('--weights', nargs='+', default=list(WEIGHTS), choices=WEIGHTS, help='source of the weights')
    add('--data', metavar='DIR', help='folder with photographs, at any depth (default: random images alone)')
    add('--images', type=number(int, low=2), default=4, metavar='N', help='images of each kind, in one batch')
    common_options(add, img_size=224, precision=['fp32', 'bf16'], device='auto', seed=0)


# --- Weights and images -----------------------------------------------------------------------------------------------

def make_images(args) -> dict[str, torch.Tensor]:
    """Return batches of normalised images [--images, 3, H, W] by their kind.

    'smooth' are random 4 × 4 values, enlarged. A margin makes the left half white, or one value in all channels. Images
    of a single value have a few pixels that are one level of 256 brighter, in every other image.
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
    """Return models by path with equal weights, one of WEIGHTS: float64, published, default and maybe compiled.

    `kwargs` are further arguments of `models.create_model`.
    """
    paths: dict[str, Callable[..., TimmModel]] = {
        'float64': published_model, 'published': published_model, 'default': create_model}
    models: dict[str, TimmModel] = {}
    for path, create in paths.items():
        seed_everything(args.seed, 0)  # for equal initial weights
        model = create(name, img_size=args.img_size, **kwargs).eval()
        if weights == 'golden':
            model.load_state_dict(golden_state(model))
        models[path] = (model.double() if path == 'float64' else model).to(device)
    if args.compile:
        models['compiled'] = copy.deepcopy(models['default'])
        compile_model(models['compiled'], args.compile)
    return models


# --- Errors -----------------------------------------------------------------------------------------------------------

def compute(model: TimmModel, images: torch.Tensor, precision: Precision, *,
            stages: Sequence[str] = STAGES) -> dict[str, torch.Tensor]:
    """Return what is compared, by MEASURES and in float64: logits [B, classes], stages and gradients as vectors.

    A compiled model needs `stages=()`, since hooks would change what is compiled.
    """
    seen = {}
    hooks = [model.get_submodule(f'tokens_to_token.{stage}').register_forward_hook(
        lambda _, __, output, stage=stage: seen.update({stage: output.detach().double().flatten()}))
        for stage in stages]
    labels = (3 + 4 * torch.arange(len(images), device=images.device)) % model.num_classes  # as in the golden data
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
    """Return relative L2 distances of `compute`'s results, by MEASURES; NaN if something is not finite."""
    distances = {measure: _distance(values.flatten(), expected[measure].flatten()).item()
                 for measure, values in actual.items()}
    distances['worst image'] = _distance(actual['logits'], expected['logits']).max().item()
    return {measure: distances[measure] for measure in MEASURES if measure in distances}


def _distance(actual: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    return (actual - expected).norm(dim=-1) / expected.norm(dim=-1)


def measure(models: dict[str, TimmModel], images: torch.Tensor, precisions: dict[str, Precision]) -> list[dict]:
    """Return a row for each precision and path: {'precision', 'path', 'errors'}."""
    expected = compute(models['float64'], images.double(), Precision(images.device, enabled=False))
    rows = []
    for (name, precision), (path, model) in itertools.product(precisions.items(), models.items()):
        if path != 'float64':
            actual = compute(model, images, precision, stages=() if path == 'compiled' else STAGES)
            rows.append({'precision': name, 'path': path, 'errors': errors(actual, expected)})
    return rows


# --- Tables -----------------------------------------------------------------------------------------------------------

def add_ratios(rows: list[dict]) -> None:
    """Add to each row of our paths the `ratios` of its errors to those of the published path."""
    def case(row: dict) -> tuple:
        return tuple(row[key] for key in ('model', 'precision', 'weights', 'images'))

    published = {case(row): row['errors'] for row in rows if row['path'] == 'published'}
    for row in rows:
        if row['path'] != 'published':
            row['ratios'] = {name: error / published[case(row)][name] for name, error in row['errors'].items()
                             if math.isfinite(error) and math.isfinite(published[case(row)][name])}


def as_summary(rows: list[dict]) -> str:
    """Return a table of the largest ratios of each model, precision and path, and the case of the largest."""
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
            lines.append([*key, path, *cells, where, lost])
    return markdown_table(['model', 'precision', 'path', *groups, 'the largest', 'not finite'], lines)


def as_table(rows: list[dict]) -> str:
    """Return a table for one model and precision: errors of the published path, and ours as multiples of them."""
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
    """Return the whole record in Markdown."""
    photographs = '' if record['options']['data'] else ' There are no photographs: no --data was given.'
    head = (f'# Errors against float64\n\n{origin(record)}\n\n'
            'Relative L2 distances of outputs and gradients from those of the published formulation in float64. Errors '
            'of our paths are multiples of those of `published`.' + photographs
            + f'\n\n## The largest ratios\n\n{as_summary(record["rows"])}\n')
    tables = itertools.groupby(record['rows'], key=lambda row: (row['model'], row['precision']))
    return '\n'.join([head, *(as_table(list(rows)) for _, rows in tables)])


def main() -> None:
    args = parse_command('Measure the errors of all paths.', 'fidelity', fidelity_options, compile_options)
    _, world = start_alone(args)
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
            # The sort is stable, so the order within a table stays.
            rows.sort(key=lambda row: (args.models.index(row['model']), args.precision.index(row['precision'])))
            add_ratios(rows)
            paths = save(args, record, as_text(record))
    print(as_summary(rows), *paths, sep='\n')


if __name__ == '__main__':
    run_script(main)
