#!/usr/bin/env bash
# timm writes into the feature_cfg that a model's author passes to build_model_with_cfg: a shared one works only once.
#
# Whoever registers several variants of a ViT with timm describes their feature maps in one place, as a constant, and
# passes it for every variant. The first `features_only=True` takes 'feature_cls' out of that dict and leaves its own
# out_indices there. So the next model of the process, with the same arguments, is wrapped in another class, which finds
# no such layers in a ViT and raises. A test that creates each model once does not see it; the second in a notebook does.
# timm's own models pass a new dict in each call. A copy of the constant is enough.
#
#     bash findings/feature_cfg_is_used_up.sh       # two minutes; needs a package index and 6 GB for a while
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    torch==2.14.1 torchvision==0.29.1 timm==1.0.31
cd "$folder"
cat > try.py <<'PYTHON'
import timm
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer

FEATURE_CFG = {'out_indices': 3, 'feature_cls': 'getter'}
default_cfgs = generate_default_cfgs({'tiny_vit_of_ours.untrained': {}})


@register_model
def tiny_vit_of_ours(pretrained=False, **kwargs):
    return build_model_with_cfg(VisionTransformer, 'tiny_vit_of_ours', pretrained, feature_cfg=FEATURE_CFG,
                                img_size=32, embed_dim=32, depth=4, num_heads=2, **kwargs)


def create() -> str:
    try:
        return type(timm.create_model('tiny_vit_of_ours', features_only=True, out_indices=(1,))).__name__
    except AssertionError as error:
        return f'{type(error).__name__}: {error}'


print(f'timm {timm.__version__}')
first, left, second = create(), dict(FEATURE_CFG), create()
print(f'the first model: {first}')
print(f'what is left of the description: {left}')
print(f'the same call again: {second}')
assert first == 'FeatureGetterNet', 'the behaviour has changed'
assert 'feature_cls' not in left and left['out_indices'] == (1,), 'the behaviour has changed'
assert second.startswith('AssertionError: Return layers'), 'the behaviour has changed'
print('As found: the second model of the same description cannot be created.')
PYTHON
"$folder/venv/bin/python" try.py
