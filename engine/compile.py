"""torch.compile for training and evaluation, in place: the model, its keys and its copies stay the same."""
import torch
from torch import nn

from utils.errors import UserError

# timm's names for the children of a model that repeat the same code, which is compiled once.
REPEATED = ('blocks', 'stages', 'layers')
MODES = {'model': None, 'graphs': 'reduce-overhead', 'autotune': 'max-autotune-no-cudagraphs'}


def compile_model(model: nn.Module, how: str, called: nn.Module | None = None) -> None:
    """Compile `model` in place. Under DDP, communication still overlaps with the backward pass.

    DDP sums a bucket as soon as its gradients are ready: between blocks, or between the graphs into which
    torch.compile cuts a whole model at the borders of the buckets.

    Args:
        how: '' does nothing; 'blocks' compiles one block at a time, in a minute; 'model' compiles the whole model,
            which fuses more and takes minutes; 'graphs' also launches it as CUDA graphs; 'autotune' also tries kernels
            out first.
        called: what is called instead and holds the model; it is compiled as a whole in its place.
    Raises:
        UserError: there is no C++ compiler, or the model has no blocks.
    """
    if not how:
        return
    check_compiler()
    # torch.compile cuts a graph at the borders of DDP's buckets. That fails on a block that takes a number as an input.
    # It would gain nothing, since a block is smaller than a bucket.
    torch._dynamo.config.optimize_ddp = how != 'blocks'
    if how == 'blocks':
        blocks = list_blocks(model)
        # timm's blocks have one graph per drop path rate. Beyond the limit, blocks would stay eager.
        # Models of several sizes in one process may share the code of their blocks.
        torch._dynamo.config.recompile_limit += 2 * len(blocks)
        for block in blocks:
            block.compile()
    else:
        # One graph per image size: models of several sizes in one process each have their own.
        (called or model).compile(dynamic=False, mode=MODES[how])


def check_compiler() -> None:
    """Raise UserError if there is no C++ compiler, which torch.compile needs for GPUs too."""
    from torch._inductor import cpp_builder, exc
    try:
        cpp_builder.get_cpp_compiler()
    except exc.InvalidCxxCompiler:
        raise UserError('--compile needs a C++ compiler, such as g++; install one, or leave --compile out') from None


def list_blocks(model: nn.Module) -> list[nn.Module]:
    """Return the repeated blocks of a model, after its tokens-to-token module if it has one.

    Raises:
        UserError: it has no blocks.
    """
    if not has_blocks(model):
        raise UserError(f'--compile blocks: {type(model).__name__} has no blocks; say --compile model')
    tokens = getattr(model, 'tokens_to_token', None)
    return _repeated(model) if tokens is None else [tokens, *_repeated(model)]


def has_blocks(model: nn.Module) -> bool:
    """Tell whether a model has repeated blocks, which can be compiled one at a time."""
    return bool(_repeated(model))


def _repeated(model: nn.Module) -> list[nn.Module]:
    return [child for name in REPEATED for child in getattr(model, name, ())]
