"""Draw how a T2T-ViT makes tokens of an image: soft splits, grids of tokens, and what one token has seen.

    from figures.tokens import tokens_figure
    tokens_figure(model, image, picture, token=(3, 5)).savefig('tokens.png')
"""
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure, SubFigure
from matplotlib.patches import Rectangle
from timm.data import IMAGENET_DEFAULT_MEAN

from figures.attention import WIDTH, add_colorbar, add_title, check_token, draw_overlay
from figures.explain import Stage, pixel_relevance, receptive_field, token_stages
from figures.places import split_places
from models.tokens_to_token import SOFT_SPLITS
from utils.pictures import ORANGE, SEQUENTIAL, new_figure

PATCHES_SHOWN = 8  # rows and columns of patches of the first soft split


def tokens_figure(model: torch.nn.Module, image: torch.Tensor, picture: np.ndarray, *,
                  token: tuple[int, int] | None = None, title: str = '') -> Figure:
    """Draw the stages of the tokens-to-token module, as the paper's Figure 3, and trace one token back to the pixels.

    The grids are drawn as three principal components (red, green, blue) and as the norm of each token. Below is what
    the chosen token has seen, through the soft splits alone and with the token layers, which are global.

    Args:
        model: a T2T-ViT, of soft splits or of convolutions.
        image: normalised, [1, C, height, width].
        picture: the same for people, uint8 [height, width, 3].
        token: (row, column) on the last grid, by default its centre.
        title: above the figure.

    Raises:
        UserError: no such token; NotSeen if the model has no such module.
    """
    stages = token_stages(model, image)
    H, W = stages[-1].grid
    token = check_token((H // 2, W // 2) if token is None else token, (H, W))
    size = picture.shape[:2]
    seen = receptive_field(token, size)

    cell = min(2.6 * size[0] / size[1], 4.5)
    heights = [cell + 0.8, 2 * cell + 1.6, 1.3 * cell + 0.9]
    figure = new_figure(WIDTH, sum(heights) + 0.4)
    splits, grids, fields = figure.subfigures(3, 1, squeeze=False, height_ratios=heights).ravel()
    # The model pads normalised pixels with 0, which is the mean colour.
    mean = getattr(model, 'pretrained_cfg', {}).get('mean') or IMAGENET_DEFAULT_MEAN
    _draw_splits(splits, picture, 255 * np.array(mean), stages[-1].places.centre(token), seen)
    _draw_grids(grids, stages, token, size)
    _draw_fields(fields, picture, stages, token, seen)
    add_title(figure, title)
    return figure


def main_components(tokens: torch.Tensor) -> np.ndarray:
    """Return the three main components of tokens [channels, H, W] as colours [H, W, 3] in 0…1; missing ones are 0.5."""
    channels, H, W = tokens.shape
    values = tokens.double().flatten(1).T.cpu()  # [H · W, channels]
    values = values - values.mean(0)
    # Signs are arbitrary; the largest entry of each direction is made positive, so that pictures are reproducible.
    _, _, directions = torch.linalg.svd(values, full_matrices=False)
    directions = directions[:3]
    largest = directions.gather(1, directions.abs().argmax(1, keepdim=True))
    projected = values @ (directions * largest.sign()).T  # [H · W, up to 3]
    low, high = (projected.quantile(q, dim=0) for q in (0.01, 0.99))
    spread = high - low
    colours = torch.full((H * W, 3), 0.5, dtype=torch.float64)
    colours[:, :projected.shape[1]] = torch.where(
        spread > 1e-9, (projected - low) / spread.clamp_min(1e-9), 0.5).clamp(0, 1)
    return colours.view(H, W, 3).numpy()


def _draw_splits(part: SubFigure, picture: np.ndarray, border: np.ndarray, centre: tuple[float, float],
                 seen: torch.Tensor):
    """Draw the image with the token's receptive field framed, and separated patches of the first soft split.

    `border` is the colour of the padding, `centre` the pixel (y, x) at the token's centre.
    """
    kernel, stride, padding = SOFT_SPLITS[0]
    whole, patches = part.subplots(1, 2)
    whole.imshow(picture, interpolation='nearest')
    whole.set_title(f'The image, {picture.shape[0]} × {picture.shape[1]} pixels', fontsize=9)
    whole.set_axis_off()
    _frame(whole, seen > 0)

    height, width = picture.shape[:2]
    patch_places = split_places((height, width))[0]
    rows, columns = patch_places.grid
    shown = min(PATCHES_SHOWN, rows), min(PATCHES_SHOWN, columns)
    first = [max(0, min(middle - count // 2, total - count))
             for middle, count, total in zip(patch_places.nearest(centre), shown, (rows, columns), strict=True)]
    padded = np.empty((height + 2 * padding, width + 2 * padding, 3), np.uint8)
    padded[:] = border.round()
    padded[padding:-padding, padding:-padding] = picture
    gap = 2
    sheet = np.full((*(count * (kernel + gap) - gap for count in shown), 3), 255, np.uint8)
    for row in range(shown[0]):
        for column in range(shown[1]):
            y, x = ((start + place) * stride for start, place in zip(first, (row, column), strict=True))
            top, left = row * (kernel + gap), column * (kernel + gap)
            sheet[top:top + kernel, left:left + kernel] = padded[y:y + kernel, x:x + kernel]
    patches.imshow(sheet, interpolation='nearest')
    patches.set_axis_off()
    patches.set_title(f'Soft split: {rows} × {columns} patches of {kernel} × {kernel} pixels, {stride} apart, so that '
                      f'neighbours overlap by {kernel - stride}\n'
                      f'({shown[0]} × {shown[1]} of them around the token, drawn apart)', fontsize=9)


def _draw_grids(part: SubFigure, stages: list[Stage], token: tuple[int, int], size: tuple[int, int]):
    """Draw the tokens on their grids, as colours and by their norms, with the chosen token's receptive field framed."""
    panels = part.subplots(2, 3)
    made_by = ['soft split, token layer', 'soft split, token layer', 'soft split, projection']
    if stages[0].weights is None:
        made_by = ['convolution'] * 3
    for number, stage in enumerate(stages):
        H, W = stage.grid
        tokens = stage.tokens[0]
        window = receptive_field(token, size, splits=len(stages) - 1 - number) > 0

        def at_pixels(values, places=stage.places):  # every pixel has the value of its nearest token
            return places.spread(values, size, smooth=False)

        colours, lengths = panels[:, number]
        colours.imshow(at_pixels(main_components(tokens)), interpolation='nearest')
        colours.set_title(f'{H} × {W} tokens of {len(tokens)} channels\n({made_by[number]})', fontsize=9)
        drawn = lengths.imshow(at_pixels(tokens.norm(dim=0).cpu().numpy()), interpolation='nearest', cmap=SEQUENTIAL)
        lengths.set_title('length of each token', fontsize=9)
        add_colorbar(part, drawn, lengths, '', location='bottom', fraction=0.046, pad=0.02, aspect=30)
        for axes in (colours, lengths):
            axes.set_axis_off()
            _frame(axes, torch.from_numpy(at_pixels(window.numpy())))
    part.suptitle('The tokens, re-structurized: their three main components as red, green and blue; their lengths. '
                  'Framed: what token '
                  f'({token[0]}, {token[1]}) is split from', fontsize=10)


def _draw_fields(part: SubFigure, picture: np.ndarray, stages: list[Stage], token: tuple[int, int],
                 seen: torch.Tensor):
    """Draw what the token has seen through the soft splits alone, and with the token layers."""
    has_layers = stages[0].weights is not None
    panels = part.subplots(1, 2)
    drawn = draw_overlay(panels[0], picture, seen.numpy(), vmin=0, vmax=int(seen.max()))
    _frame(panels[0], seen > 0)
    rows, columns = (int((seen > 0).any(axis).sum()) for axis in (1, 0))
    panels[0].set_title(f'Receptive field of the soft splits alone: {rows} × {columns} pixels', fontsize=9)
    add_colorbar(part, drawn, panels[0], 'paths from a pixel to the token', fraction=0.046, pad=0.02)
    if not has_layers:
        panels[1].text(0.5, 0.5, 'Convolutions in place of token layers:\nthe token has seen nothing else.',
                       ha='center', va='center', fontsize=9, transform=panels[1].transAxes)
        panels[1].set_axis_off()
        return
    relevance = pixel_relevance(stages, token, picture.shape[:2])[0].cpu()
    inside = float(relevance[seen > 0].sum() / relevance.sum())
    share = (relevance / relevance.mean()).numpy()
    low = max(share[share > 0].min(), share.max() / 1000)
    drawn = draw_overlay(panels[1], picture, share.clip(low), norm=LogNorm(low, share.max()))
    _frame(panels[1], seen > 0)
    panels[1].set_title(f'With the token layers, which are global: {100 * inside:.0f} % of the token\n'
                        'comes from inside the frame (in each layer the residual, and what is attended to)', fontsize=9)
    add_colorbar(part, drawn, panels[1], 'relevance over an even share', fraction=0.046, pad=0.02)


def _frame(axes: Axes, where: torch.Tensor) -> None:
    """Frame the true part of a mask [height, width] on a picture of its size."""
    top, left = (int(where.any(axis).nonzero()[0]) for axis in (1, 0))
    bottom, right = (int(where.any(axis).nonzero()[-1]) + 1 for axis in (1, 0))
    for colour, line in (('white', 3), (ORANGE, 1.5)):
        axes.add_patch(Rectangle((left - 0.5, top - 0.5), right - left, bottom - top, fill=False, edgecolor=colour,
                                 linewidth=line, clip_on=False))
