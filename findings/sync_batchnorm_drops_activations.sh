#!/usr/bin/env bash
# torch.nn.SyncBatchNorm.convert_sync_batchnorm removes the activations of timm's convolutional models, without a word.
#
# Whoever trains a T2T-ViT compares it with MobileNet, EfficientNet or a hybrid, on several GPUs, and turns on synchronised
# batch norm with torch's documented call. timm fuses norm and activation in BatchNormAct2d, a subclass of
# torch.nn.BatchNorm2d. torch replaces it with a SyncBatchNorm whose forward pass never calls the activation, which stays
# as a child: print(model) shows it where it was. The state dict keeps its keys, training runs, checkpoints load, and the
# network has hardly a nonlinearity left.
# timm.layers.convert_sync_batchnorm keeps it.
#
#     bash findings/sync_batchnorm_drops_activations.sh       # a minute or two; needs a package index and 6 GB for a while
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    torch==2.14.1 torchvision==0.29.1 timm==1.0.31
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import copy

import timm
import torch
from torch import nn

print(f'torch {torch.__version__}, timm {timm.__version__}')
torch.manual_seed(0)
images = torch.randn(2, 3, 64, 64)


def activations(model, images) -> tuple[int, int, torch.Tensor]:
    """How many the model holds, how many a forward pass calls, and its logits."""
    called = []
    held = [module for module in model.modules() if isinstance(module, (nn.ReLU, nn.ReLU6, nn.SiLU))]
    hooks = [module.register_forward_hook(lambda module, *_: called.append(id(module))) for module in held]
    logits = model(images)
    for hook in hooks:
        hook.remove()
    return len(held), len(set(called)), logits


dropped = {}
for name in ('mobilenetv2_100', 'efficientnet_b0', 'resnet18'):
    model = timm.create_model(name, num_classes=10).eval()
    with torch.no_grad():
        held, called, expected = activations(model, images)
        held_after, called_after, logits = activations(
            nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model)), images)
        by_timm = timm.layers.convert_sync_batchnorm(copy.deepcopy(model))
        assert torch.equal(by_timm(images), expected), "timm's own conversion has changed"
    difference = ((logits - expected).norm() / expected.norm()).item()
    dropped[name] = called - called_after
    print(f'{name}: calls {called} of {held} activations, after the conversion {called_after} of {held_after}; '
          f'its logits differ by {difference:.1e} of their size')
    assert (difference > 0.1) == (dropped[name] > 0), 'the behaviour has changed'
assert dropped['mobilenetv2_100'] and dropped['efficientnet_b0'] and not dropped['resnet18'], 'the behaviour has changed'
print("As found: torch's conversion drops timm's fused activations and says nothing.")
PYTHON
