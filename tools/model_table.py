"""Print a table of models in Markdown: parameters, multiply-accumulates, activations, published accuracy.

    python tools/model_table.py
    python tools/model_table.py --img-size 384 --output zoo.md
    python tools/model_table.py t2t_vit_14 'deit_small*' resnet50

Names and patterns are those of timm.list_models; the default is all models of this project. Only shapes are computed,
which takes no memory.

The table has both conventions of counting, because papers mix them. Parameters: all in a checkpoint, and those that
are trained (in T2T-ViT, `pos_embed` and the Performer's `w` are not). MACs, multiply-accumulates of one image: of all
matrix products, and of linear and convolution layers alone, without the products in attention. Activations are the
outputs of these layers.
"""
import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from options.parser import Parser
from options.types import image_size
from utils.disk import ROOT
from utils.errors import UserError
from utils.script import run_script

# Top-1 and top-5 on ImageNet's validation set, published for the weights of a name at their training size.
PUBLISHED = {
    't2t_vit_7': (71.7, 90.9), 't2t_vit_10': (75.2, 92.8), 't2t_vit_12': (76.5, 93.5),
    't2t_vit_14': (81.5, 95.67), 't2t_vit_19': (81.9, 95.74), 't2t_vit_24': (82.3, 95.89),
    't2t_vit_14.in1k_384': (83.3, 96.5), 't2t_vit_24_token_labeling': (84.2, None),
    't2t_vit_t_14': (81.7, 95.85), 't2t_vit_t_19': (82.4, 96.08), 't2t_vit_t_24': (82.6, 96.07),
    't2t_vit_14_resnext': (81.5, None), 't2t_vit_14_wide': (77.9, None), 't2t_vit_14_se': (81.6, None),
    't2t_vit_dense': (80.6, None), 't2t_vit_16_ghost': (79.5, None), 't2t_vit_c_14': (80.8, None),
    'vit_s_16': (78.1, None), 'vit_se': (78.4, None), 'vit_dn': (79.0, None),
}
# Recipes with other names than their models.
RECIPES = {'t2t_vit_14.in1k_384': 't2t_vit_14_384'}
HEADER = ('| model | size | parameters | trained | MACs, G | of layers, G | activations, M | top-1 | top-5 |\n'
          '|---|---|---|---|---|---|---|---|---|')


class Counts(NamedTuple):
    """The costs of one model for one image, as the module's docstring defines them."""
    parameters: int
    trained: int
    macs: float
    layer_macs: float
    activations: int


def count(name: str, img_size: tuple[int, int] | None) -> tuple[Counts, tuple[int, int]]:
    """Return the counts of a registered model, and the image size they hold for (None: that of its weights)."""
    import torch
    from torch import nn
    from torch.utils.flop_counter import FlopCounterMode

    import models

    with torch.device('meta'):  # also because torch's counter does not know the CPU's fused attention
        model = models.create_model(name, img_size=img_size).eval()
    channels, height, width = model.pretrained_cfg['input_size']
    size = img_size or (height, width)
    outputs: list[tuple[int, int]] = []  # of each layer: numbers that it puts out, and inputs of one of them
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.modules.conv._ConvNd):
            module.register_forward_hook(
                lambda layer, _, output: outputs.append((output.numel(), layer.weight[0].numel())))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        try:
            model(torch.empty(1, channels, *size, device='meta'))
        except (AssertionError, ValueError, RuntimeError) as error:
            raise UserError(f'{name} does not take images of {size[0]} × {size[1]} ({error}); '
                            'give another --img-size') from error
    trained = sum(parameter.numel() for parameter in model.parameters())
    # Running statistics of batch norm are in the state dict too, but are not called parameters.
    saved = model.state_dict().keys()
    fixed = sum(buffer.numel() for key, buffer in model.named_buffers() if key in saved
                and not key.endswith(('running_mean', 'running_var', 'num_batches_tracked')))
    layer_macs, activations = sum(count * inputs for count, inputs in outputs), sum(count for count, _ in outputs)
    return Counts(trained + fixed, trained, counter.get_total_flops() / 2, layer_macs, activations), size


def row(name: str, img_size: tuple[int, int] | None) -> str:
    """Return one line of the table, with the accuracy only at the size of the published weights."""
    from models.weights.loading import published_config

    counts, size = count(name, img_size)
    recipe = f'configs/{RECIPES.get(name, name)}.yaml'
    published = PUBLISHED.get(name, (None, None)) if size == published_config(name).input_size[-2:] else ()
    return '| ' + ' | '.join((
        f'[{name}]({recipe})' if (ROOT / recipe).exists() else name,
        str(size[0]) if size[0] == size[1] else f'{size[0]} × {size[1]}',
        f'{counts.parameters:,}', f'{counts.trained:,}',
        f'{counts.macs / 1e9:.2f}', f'{counts.layer_macs / 1e9:.2f}', f'{counts.activations / 1e6:.1f}',
        *('' if accuracy is None else str(accuracy) for accuracy in (*published, None, None)[:2]),
    )) + ' |'


def table(patterns: list[str], img_size: tuple[int, int] | None = None) -> str:
    """Return the table in Markdown. Raises UserError for a name without a model, or a model that refuses `img_size`."""
    import timm

    import models

    if patterns:
        names = [name for pattern in patterns for name in timm.list_models(pattern) or [pattern]]
    else:
        names = [*PUBLISHED, *models.our_models()]
    if img_size:
        names = [name for name in names if '.' not in name or name in patterns]  # one row per model
    return '\n'.join([HEADER, *(row(name, img_size) for name in dict.fromkeys(names))]) + '\n'


def main():
    parser = Parser(description='Print a table of models.')
    parser.add_argument('models', nargs='*', metavar='MODEL', help='name or pattern (default: all of this project)')
    parser.add_argument('--img-size', type=image_size, metavar='N',
                        help="pixels, or HxW (default: the size of each model's weights)")
    parser.add_argument('-o', '--output', metavar='FILE', help='also write the table to this file')
    args = parser.parse_args()
    size = (args.img_size, args.img_size) if isinstance(args.img_size, int) else args.img_size
    text = table(args.models, size)
    print(text, end='')
    if args.output:
        try:
            Path(args.output).write_text(text, encoding='utf-8')
        except OSError as error:
            raise UserError(f'--output {args.output} cannot be written ({error.strerror}); '
                            'give a file in a folder that exists') from error


if __name__ == '__main__':
    run_script(main)
