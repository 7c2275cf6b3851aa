#!/usr/bin/env bash
# torch.compile cuts a module within DistributedDataParallel into graphs by the size of DDP's buckets. Two ordinary
# settings of a vision transformer do not survive that:
#
# 1. Blocks that are compiled one by one (the advice for short compile times) and drop paths at a rate that rises from block
#    to block. The rate is a float that the blocks' common graph takes as an input, and the cutting knows only tensors:
#    BackendCompilerFailed, 'float' object has no attribute 'meta'. One process compiles the same blocks without an error.
# 2. Buckets below 1 MiB, as suit a small model such as T2T-ViT-7, whose gradients all fit into one bucket of the default
#    size and so are summed after the backward pass: AssertionError, the first bucket should be smaller than others.
#
# torch._dynamo.config.optimize_ddp = False mends the first; it costs nothing, as a block is smaller than a bucket.
#
#     bash findings/ddp_compiled_blocks.sh       # two minutes; needs a package index, a C++ compiler and 6 GB for a while
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.14.1 setuptools numpy
cd "$folder"
cat > try.py <<'PYTHON'
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

torch.set_num_threads(1)


class Block(nn.Module):
    """A residual branch that is dropped for whole images at `rate`."""

    def __init__(self, rate: float):
        super().__init__()
        self.rate, self.layer = rate, nn.Sequential(nn.LayerNorm(192), nn.Linear(192, 768), nn.GELU(), nn.Linear(768, 192))

    def forward(self, x):
        keep = 1 - self.rate
        kept = torch.rand(x.shape[0], 1, device=x.device) < keep if self.rate else None
        branch = self.layer(x)
        return x + (branch if kept is None else branch * kept / keep)


def outcome(in_group: bool, by_block: bool, **settings) -> str:
    torch.compiler.reset()
    torch.manual_seed(0)
    blocks = nn.Sequential(*(Block(rate) for rate in (0.0, 0.05, 0.1, 0.15)))
    for module in blocks if by_block else [blocks]:
        module.compile(backend='aot_eager')
    model = DistributedDataParallel(blocks, **settings) if in_group else blocks
    try:
        model(torch.randn(4, 192)).sum().backward()
    except Exception as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        return f'{type(error).__name__}: {" ".join(lines[:2])}'
    return 'runs'


print(f'torch {torch.__version__}')
dist.init_process_group('gloo', init_method=f'file://{sys.argv[1]}', rank=0, world_size=1)
found = {
    'blocks, no DDP': outcome(False, True),
    'blocks, DDP': outcome(True, True),
    'whole, DDP, buckets of 1 MiB': outcome(True, False, bucket_cap_mb=1),
    'whole, DDP, buckets of 0.5 MiB': outcome(True, False, bucket_cap_mb=0.5)}
torch._dynamo.config.optimize_ddp = False
found['blocks, DDP, optimize_ddp off'] = outcome(True, True)
for case, result in found.items():
    print(f'{case}: {result}')
dist.destroy_process_group()
results = list(found.values())
assert results[0] == results[2] == results[4] == 'runs', 'the behaviour has changed'
assert "'float' object has no attribute 'meta'" in results[1], 'the behaviour has changed'
assert 'First bucket should be smaller' in results[3], 'the behaviour has changed'
print('As found: DDP and torch.compile do not take these settings.')
PYTHON
"$folder/venv/bin/python" try.py "$folder/meeting"
