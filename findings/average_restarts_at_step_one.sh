#!/usr/bin/env bash
# timm's ModelEmaV3 has no decay at steps 0 and 1, warm-up or not: whoever counts steps per epoch loses the average there.
#
# A training loop that averages its ViT calls `update(model, step)` with the number of the step. Without use_warmup the
# step seems not to matter, since the decay is a constant. It does: up to step update_after_step + 1 the decay is 0, and
# the average becomes a copy of the weights. A loop that passes the step within the epoch therefore throws its average
# away at the start of every epoch, and a resumed run that counts anew does so once. No shape, loss or log line shows it.
# Pass the number of all steps of the run, or none.
#
#     bash findings/average_restarts_at_step_one.sh       # two minutes; needs a package index and 6 GB for a while
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
from timm.utils import ModelEmaV3


def after_one_update(**step) -> float:
    """Return the average of a weight that was 0 and is 1 now, with a decay of 0.9999."""
    layer = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(layer.weight)
    average = ModelEmaV3(layer, decay=0.9999)
    torch.nn.init.ones_(layer.weight)
    average.update(layer, **step)
    return round(average.module.weight.item(), 6)


found = {'no step': after_one_update(), **{f'step {k}': after_one_update(step=k) for k in (0, 1, 2, 1000)}}
print(f'timm {timm.__version__}, ModelEmaV3(decay=0.9999), weight 0 → 1, the average after one update:')
for name, value in found.items():
    print(f'  {name:9} {value}')
assert found == {'no step': 0.0001, 'step 0': 1.0, 'step 1': 1.0, 'step 2': 0.0001, 'step 1000': 0.0001}, \
    'the behaviour has changed'
print('As found: at steps 0 and 1 the average is overwritten.')
PYTHON
"$folder/venv/bin/python" try.py
