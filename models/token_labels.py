"""What training with token labels needs of a model: a classifier of each token, and where the tokens lie."""
from timm.layers import to_2tuple
from timm.models import split_model_name_tag
from torch import nn

from models.t2t_vit import VARIANTS, T2TViT
from models.tokens_to_token import token_lines
from utils.errors import UserError
from utils.keywords import keywords

REMEDY = 'give a T2T-ViT, such as t2t_vit_24_token_labeling, or t2t_vit_14 with --model-kwargs aux_head=True'


def check_dense_model(args) -> None:
    """Raise UserError, before data is read, if the options have token labels and a model without such a classifier."""
    if not getattr(args, 'token_labels', None):
        return
    name, _ = split_model_name_tag(args.model.lower())
    if not name.startswith('t2t_vit'):
        raise UserError(f'--token-labels: {args.model} has no classifier of its tokens; {REMEDY}')
    if not keywords(args.model_kwargs).get('aux_head', name in VARIANTS and VARIANTS[name].aux_head):
        raise UserError(f'--token-labels: {args.model} has no classifier of its tokens; add --model-kwargs '
                        'aux_head=True')
    if args.gp == '':
        raise UserError("--token-labels with --gp '': without pooling there is no classifier of the image; leave --gp "
                        'out')


def token_layout(model: nn.Module, img_size: int | tuple[int, int]) -> tuple[tuple[int, int], tuple[float, ...]]:
    """Return the grid (rows, columns) of a T2T-ViT's tokens, and the window of an image that it covers.

    The window is (top, left, bottom, right) in shares of the image. Each token is in the middle of its cell of it. The
    tokens of a T2T-ViT are centred at pixel 16 k + 1, not at 16 k + 7.5, so it reaches out at the top and left.

    Raises:
        UserError: the model has no classifier of its tokens.
    """
    if not isinstance(model, T2TViT) or model.aux_head is None:
        raise UserError(f'--token-labels: {type(model).__name__} has no classifier of its tokens; {REMEDY}')
    size = to_2tuple(img_size)
    rows, columns = token_lines(*size)[-1]
    starts = [(line.centre(-0.5) + 0.5) / side for line, side in zip((rows, columns), size, strict=True)]
    ends = [(line.centre(line.count - 0.5) + 0.5) / side for line, side in zip((rows, columns), size, strict=True)]
    return (rows.count, columns.count), (*starts, *ends)
