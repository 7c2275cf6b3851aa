#!/usr/bin/env bash
# A fine-tuned model that timm itself writes as a Hub folder cannot be opened by transformers: num_classes comes twice.
#
# Who fine-tunes a ViT with timm and shares it writes the folder with timm's save_for_hf, and friends open it with
# transformers' AutoModelForImageClassification, which wraps timm's models. timm notes the number of classes twice, above
# the model's arguments and among them, as soon as it was given to create_model. timm reads its own folder; transformers
# passes both on, and Python stops at the second. Without the entry in model_args the same folder opens.
#
#     bash findings/class_count_given_twice.sh       # two minutes; needs a package index and 6 GB for a while
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    torch==2.14.1 torchvision==0.29.1 timm==1.0.31 transformers==5.24.0
cd "$folder"
cat > try.py <<'PYTHON'
import json
from pathlib import Path

import timm
import transformers
from timm.models import save_for_hf
from transformers import AutoModelForImageClassification


def opened() -> str:
    try:
        return type(AutoModelForImageClassification.from_pretrained('folder')).__name__
    except TypeError as error:
        return f'TypeError: {error}'


save_for_hf(timm.create_model('resnet18', num_classes=3), 'folder', safe_serialization=True)
config = json.loads(Path('folder/config.json').read_text())
print(f'timm {timm.__version__}, transformers {transformers.__version__}')
print(f'config.json: num_classes {config["num_classes"]}, model_args {config.get("model_args")}')
as_written = opened()
print(f'as timm writes it: {as_written}')
config['model_args'].pop('num_classes')
Path('folder/config.json').write_text(json.dumps(config))
without = opened()
print(f'without it in model_args: {without}')
assert "multiple values for keyword argument 'num_classes'" in as_written, 'the behaviour has changed'
assert without == 'TimmWrapperForImageClassification', 'the behaviour has changed'
print('As found: transformers cannot open the folder that timm wrote.')
PYTHON
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" try.py
