"""torch.compile for training and evaluation, in place: the model, its keys and its copies stay what they are."""
import torch
from torch import nn

from utils.errors import UserError

# By names of timm, the children of a model that repeat one piece of code, which is compiled once for all of them.
REPEATED = ('blocks', 'stages', 'layers')
MODES = {'model': None, 'graphs': 'reduce-overhead', 'autotune': 'max-autotune-no-cudagraphs'}


def compile_model(model: nn.Module, how: str) -> None:
    """Has `model`, when it is called, run as torch.compile makes it; inside DDP too, which then still overlaps.

    DDP sums a bucket as soon as its gradients are there: between the blocks or, of a whole model, between the graphs
    into which torch.compile cuts it at the borders of the buckets.

    Args:
        how: '' for not at all; 'blocks', one block at a time: a minute; 'model' as a whole, which fuses more and
            takes minutes; 'graphs', as a whole, and launched as CUDA graphs; 'autotune', as a whole, with kernels that
            are tried out first.
    Raises:
        UserError: no C++ compiler, or a model without blocks.
    """
    if not how:
        return
    check_compiler()
    # torch.compile cuts a graph at the borders of DDP's buckets. That fails on a block that takes a number as an input,
    # and gains nothing: a block is smaller than a bucket.
    torch._dynamo.config.optimize_ddp = how != 'blocks'
    if how == 'blocks':
        blocks = list_blocks(model)
        # timm's blocks have a graph for each rate of dropped paths. Beyond the limit, blocks would stay eager.
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 2 * len(blocks))
        for block in blocks:
            block.compile()
    else:
        # One graph for one size of images: models of several sizes in one process each have their own.
        model.compile(dynamic=False, mode=MODES[how])


def check_compiler() -> None:
    """Raises UserError where torch.compile would have no C++ compiler, which it needs for GPUs too."""
    from torch._inductor import cpp_builder, exc
    try:
        cpp_builder.get_cpp_compiler()
    except exc.InvalidCxxCompiler:
        raise UserError('--compile needs a C++ compiler, such as g++; install one, or leave --compile out') from None


def list_blocks(model: nn.Module) -> list[nn.Module]:
    """The repeated blocks of a model, and what comes before them where that is a tokens-to-token module.

    Raises:
        UserError: it has none.
    """
    repeated = [child for name in REPEATED for child in getattr(model, name, ())]
    if not repeated:
        raise UserError(f'--compile blocks: {type(model).__name__} has no blocks; say --compile model')
    tokens = getattr(model, 'tokens_to_token', None)
    return repeated if tokens is None else [tokens, *repeated]
