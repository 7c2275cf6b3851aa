"""Runs a script on the CPU, where each operator fails that torch refuses on a GPU under --deterministic.

    python tests/as_on_gpu.py visualize.py cat.jpg --checkpoint PATH -j 0

The operators are those of torch.use_deterministic_algorithms: "will throw a RuntimeError".
"""
import runpy
import sys
from pathlib import Path

from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parents[1]
SAID = 'does not have a deterministic implementation'
REFUSED = {
    'avg_pool3d_backward', '_adaptive_avg_pool2d_backward', '_adaptive_avg_pool3d_backward',
    'adaptive_max_pool2d_backward', 'adaptive_max_pool3d_backward', 'max_pool3d_with_indices_backward',
    'fractional_max_pool2d_backward', 'fractional_max_pool3d_backward', 'max_unpool2d', 'max_unpool3d',
    'upsample_linear1d_backward', 'upsample_bilinear2d_backward', 'upsample_bicubic2d_backward',
    'upsample_trilinear3d_backward', '_upsample_bilinear2d_aa_backward', '_upsample_bicubic2d_aa_backward',
    'reflection_pad1d_backward', 'reflection_pad2d_backward', 'reflection_pad3d_backward',
    'nll_loss2d_forward', '_ctc_loss_backward', '_embedding_bag_backward', 'put', 'put_', 'histc', 'kthvalue',
    'grid_sampler_2d_backward', 'grid_sampler_3d_backward'}


class AsOnGpu(TorchDispatchMode):
    """Raises RuntimeError for what a GPU refuses."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name, overload, kwargs = function._schema.name.removeprefix('aten::'), function._overloadname, kwargs or {}
        has_indices = name in ('median', 'nanmedian') and overload.startswith('dim')
        has_weights = name == 'bincount' and (*args, *kwargs.values())[1:2] not in ((), (None,))
        is_product = name.startswith('scatter_reduce') and 'prod' in (*args, *kwargs.values())
        if name in REFUSED or has_indices or has_weights or is_product:
            raise RuntimeError(f'{function} {SAID}')
        return function(*args, **kwargs)


if __name__ == '__main__':
    sys.argv = sys.argv[1:]
    sys.path[0] = str(ROOT)
    with AsOnGpu():
        runpy.run_path(str(ROOT / sys.argv[0]), run_name='__main__')
