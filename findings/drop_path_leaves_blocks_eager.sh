#!/usr/bin/env bash
# torch.compile, block by block, leaves the last blocks of a vision transformer as they were when paths are dropped.
#
# Compiling each block of a ViT is the usual advice for a short compile time: blocks are alike, so one graph should serve them
# all. With stochastic depth each block has a rate of its own, a Python float that timm's DropPath uses as a probability.
# torch.compile specialises on its value: a graph for each block, until config.recompile_limit, which is 8 for the one forward
# function that they share. The remaining blocks run eager from then on, in every step; a line in a log is all that says so.
# An evaluation, in which nothing is dropped, stays below the limit: whoever times inference sees nothing of it.
# A rate that is a tensor (a buffer) would be an input of the graph; a higher limit compiles every block by itself.
#
#     bash findings/drop_path_leaves_blocks_eager.sh       # two minutes; needs a package index and 6 GB for a while
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    torch==2.14.1 torchvision==0.29.1 timm==1.0.31
cd "$folder"
cat > try.py <<'PYTHON'
import timm
import torch
from torch._dynamo.backends.debugging import aot_eager


def compiled_blocks(train: bool, limit: int = 8) -> int:
    """Graphs that two steps make of a DeiT with twelve blocks, compiled one by one."""
    torch.compiler.reset()
    torch._dynamo.config.recompile_limit = limit
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return aot_eager(graph, inputs)

    torch.manual_seed(0)
    model = timm.create_model('deit_tiny_patch16_224', img_size=32, drop_path_rate=0.1).train(train)
    for block in model.blocks:
        block.compile(backend=backend)
    for _ in range(2):
        model(torch.randn(2, 3, 32, 32)).sum().backward()
    return len(graphs)


print(f'torch {torch.__version__}, timm {timm.__version__}, '
      f'recompile_limit {torch._dynamo.config.recompile_limit}')
evaluation, training, unlimited = compiled_blocks(False), compiled_blocks(True), compiled_blocks(True, limit=24)
print(f'graphs of 12 blocks: {evaluation} in evaluation, {training} in training, {unlimited} with a limit of 24')
assert (evaluation, training, unlimited) == (4, 8, 12), 'the behaviour has changed'
print('As found: four of twelve blocks are never compiled in training.')
PYTHON
"$folder/venv/bin/python" try.py
